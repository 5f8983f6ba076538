"""Types of options: those that may be left out, and those that several commands share."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Annotated, Any, Literal, TypeAlias

from tyro.conf import FlagCreatePairsOff, Positional, arg
from tyro.constructors import PrimitiveConstructorSpec

from ..recipes import table
from ..text import LARGEST, MOST, shown


def _spec(
    parse: Callable[[list[str]], Any], metavar: str, choices: tuple[str, ...] | None = None
) -> PrimitiveConstructorSpec[Any]:
    """One word, whatever its default is."""
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=metavar,
        instance_from_str=parse,
        is_instance=lambda value: True,
        str_from_instance=lambda value: [str(value)],
        choices=choices,
    )


def one(
    kind: Callable[[str], Any], metavar: str, what: str, choices: tuple[str, ...] | None = None
) -> PrimitiveConstructorSpec[Any]:
    """One word of a kind, or `None` where it is not given."""

    def parse(words: list[str]) -> Any:
        try:
            return kind(words[0])
        except ValueError:
            raise ValueError(f"{shown(words[0])!r} is not {what}") from None

    return _spec(parse, metavar, choices)


def number(
    kind: type[int] | type[float], least: int = 0, most: int | None = None
) -> PrimitiveConstructorSpec[Any]:
    """One number from `least` to `most`."""

    largest = most or (MOST if kind is int else LARGEST)

    def parse(word: str) -> int | float:
        value = kind(word)
        if not least <= value <= largest:
            raise ValueError
        return value

    name = "a whole number" if kind is int else "a number"
    return one(parse, kind.__name__.upper(), f"{name} from {least:g} to {largest:.10g}")


def _named(metavar: str, known: Iterable[str], own: str) -> PrimitiveConstructorSpec[Any]:
    """One of these names, or what is named by the module of the user that it is in."""
    names = list(known)

    def parse(words: list[str]) -> str:
        (word,) = words
        if word in names or ":" in word or (own == "Learner" and word in table.plugins()):
            return word
        said = table.one_of(word, [*names, f"your own, my_module:{own}"]).removeprefix("there are ")
        raise ValueError(f"{shown(word)!r} is not one of {said}")

    return _spec(parse, metavar)


def _mapping(word: str) -> str | int:
    if word in ("auto", "scan", "vmap"):
        return word
    if (chunk := int(word)) < 1:
        raise ValueError
    return chunk


def _path(word: str) -> str:
    if not word.strip():
        raise ValueError
    return word


def _share(word: str) -> float:
    value = float(word)
    if not 0 < value < 1:
        raise ValueError
    return value


_HINT = arg(help_behavior_hint="(default: of the closest recipe)")
_RUN = arg(help_behavior_hint="(default: of the run)")
_NONE = arg(help_behavior_hint="")

Int: TypeAlias = Annotated[int | None, number(int), _HINT]
Count: TypeAlias = Annotated[int | None, number(int, 1), _HINT]
Float: TypeAlias = Annotated[float | None, number(float), _HINT]
OwnInt: TypeAlias = Annotated[int | None, number(int), _NONE]
OwnCount: TypeAlias = Annotated[int | None, number(int, 1), _NONE]
OwnFloat: TypeAlias = Annotated[float | None, number(float), _NONE]
RunInt: TypeAlias = Annotated[int | None, number(int), _RUN]
RunCount: TypeAlias = Annotated[int | None, number(int, 1), _RUN]
Size: TypeAlias = Annotated[int, number(int, 1)]
Number: TypeAlias = Annotated[float, number(float)]
Share: TypeAlias = Annotated[float, one(_share, "FLOAT", "a number between 0 and 1")]
Seed: TypeAlias = Annotated[int, number(int, -(2**31), 2**32 - 1)]
OwnSeed: TypeAlias = Annotated[int | None, number(int, -(2**31), 2**32 - 1), _HINT]
"""Counts and sizes are at least 1; seeds are of 32 bits, which are all that a key keeps."""
Word: TypeAlias = Annotated[str | None, one(_path, "PATH", "a path"), _NONE]
Mapping: TypeAlias = Annotated[
    str | int,
    one(_mapping, "auto|scan|vmap|INT", "auto, scan, vmap or a whole number of 1 or more"),
]
Format: TypeAlias = Literal["png", "pdf", "svg"]
Flag: TypeAlias = FlagCreatePairsOff[Annotated[bool, _NONE]]
Algorithm: TypeAlias = Positional[
    Annotated[str | None, _named("ALGORITHM", table.LEARNERS, "Learner"), _NONE]
]
Family: TypeAlias = Positional[
    Annotated[str | None, _named("TASKS", table.FAMILIES, "tasks"), _NONE]
]
Comparison: TypeAlias = Positional[
    Annotated[str | None, _named("TASKS", ["ambiguous", *table.FAMILIES], "tasks"), _NONE]
]

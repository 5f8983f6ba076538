"""Types of options: those that may be left out, and those that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, TypeAlias

from tyro.conf import FlagCreatePairsOff, Positional, arg
from tyro.constructors import PrimitiveConstructorSpec

ALGORITHMS = (
    "maml", "fomaml", "anil", "meta-sgd", "maml++", "reptile", "platipus", "bmaml", "emaml",
    "leo", "pretrained", "class-mean", "ridge",
)  # fmt: skip
FAMILIES = (
    "sinusoid", "omniglot", "mini_imagenet", "glyphs", "folder",
    "sinusoid_or_line", "finite_sinusoids", "circles", "celeba", "fsmol", "embeddings",
    "navigation", "bandit", "tabular_mdp", "half_cheetah", "ant",
)  # fmt: skip


def one(
    kind: Callable[[str], Any], metavar: str, what: str, choices: tuple[str, ...] | None = None
) -> PrimitiveConstructorSpec[Any]:
    """One word of a kind, or `None` where it is not given."""

    def parse(words: list[str]) -> Any:
        try:
            return kind(words[0])
        except ValueError:
            raise ValueError(f"{words[0]!r} is not {what}") from None

    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=metavar,
        instance_from_str=parse,
        is_instance=lambda value: True,
        str_from_instance=lambda value: [str(value)],
        choices=choices,
    )


def _mapping(word: str) -> str | int:
    return word if word in ("auto", "scan", "vmap") else int(word)


_HINT = arg(help_behavior_hint="(default: of the closest recipe)")
_NONE = arg(help_behavior_hint="")

Int: TypeAlias = Annotated[int | None, one(int, "INT", "a whole number"), _HINT]
Float: TypeAlias = Annotated[float | None, one(float, "FLOAT", "a number"), _HINT]
OwnInt: TypeAlias = Annotated[int | None, one(int, "INT", "a whole number"), _NONE]
Word: TypeAlias = Annotated[str | None, one(str, "PATH", "a path"), _NONE]
Mapping: TypeAlias = Annotated[
    str | int, one(_mapping, "auto|scan|vmap|INT", "auto, scan, vmap or a whole number")
]
Flag: TypeAlias = FlagCreatePairsOff[Annotated[bool, _NONE]]
Algorithm: TypeAlias = Positional[
    Annotated[str | None, one(str, "ALGORITHM", "an algorithm", ALGORITHMS), _NONE]
]
Family: TypeAlias = Positional[
    Annotated[str | None, one(str, "TASKS", "a task family", FAMILIES), _NONE]
]
Comparison: TypeAlias = Positional[
    Annotated[str | None, one(str, "TASKS", "a task family", ("ambiguous", *FAMILIES)), _NONE]
]

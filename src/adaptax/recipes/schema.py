"""What settings may be, read from the signatures of what takes them."""

from __future__ import annotations

import functools
import inspect
import math
import types
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal, Union

from .. import rl
from ..task import Splits
from ..text import LARGEST, MOST
from .table import one_of

Known = Mapping[str, tuple[Any, Any]]
"""The type and the default value of every setting that something takes."""


@functools.cache
def taken(function: Callable[..., Any], without: tuple[str, ...] = ()) -> Known:
    """What a function takes that JSON can say, and what it passes on.

    Args:
        function: or class. If it has `**how`, these are arguments of the class that it returns;
            those of families of environments, of `adaptax.rl.Tasks`.
        without: names that are not for settings.
    """
    known: dict[str, tuple[Any, Any]] = {}
    kinds = _kinds(function)
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            further = kinds["return"]
            known |= taken(rl.Tasks if further is Splits else further, ("env", "split"))
        elif name not in without and (kind := _sayable(kinds.get(name), parameter.default)):
            known[name] = (kind, parameter.default)
    return {name: one for name, one in known.items() if name not in without}


def checked(
    section: str, values: Any, known: Known, *, signed: Collection[str] = ()
) -> dict[str, Any]:
    """The settings, whole numbers made floats and lists tuples where those are wanted.

    Args:
        section: how settings are named in errors, `section.name`.
        values: of JSON, or of Python.
        known: see `taken`.
        signed: names of numbers that may be negative, whole ones not counted.

    Raises:
        ValueError: naming the setting that is not known, or whose value is of another kind.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"{section} is {_short(values)}; expected settings by their names")
    new = {}
    for name, value in values.items():
        where = f"{section}.{name}"
        if name not in known:
            raise ValueError(f"{where} is not a setting here; {one_of(str(name), known)}")
        kind, default = known[name]
        most = 2**63 - 1 if isinstance(default, int) and default > MOST else MOST
        least = -(2**31) if name == "seed" else 0
        new[name] = fitting(where, value, kind, signed=name in signed, least=least, most=most)
    return new


def fitting(
    where: str, value: Any, kind: Any, *, signed: bool = False, least: int = 0, most: int = MOST
) -> Any:
    """The value as one of this kind.

    Args:
        where: names it in errors.
        value: of JSON, or of Python.
        kind: a type, as annotations have them.
        signed: whether numbers may be negative, whole ones not counted.
        least: the smallest whole number.
        most: the largest whole number.

    Raises:
        ValueError: saying what was expected.
    """
    if kind is Any:  # which is checked elsewhere
        return value
    how: dict[str, Any] = {"signed": signed, "least": least, "most": most}
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (Union, types.UnionType):
        members = [one for one in inner if one is not type(None)]
        if value is None and len(members) < len(inner):
            return None
        for one in members:
            try:
                return fitting(where, value, one, **how)
            except ValueError:
                if len(members) == 1:
                    raise
    elif origin is Literal:
        if isinstance(value, str) and value not in inner:
            raise ValueError(f"{where} {_short(value)}: {one_of(value, inner)}")
        if any(value is one or (isinstance(one, str) and value == one) for one in inner):
            return value
    elif origin is tuple and isinstance(value, list | tuple):
        of = inner[:1] * len(value) if inner[1:] == (...,) else inner
        if len(of) == len(value):
            return tuple(fitting(f"{where}[{i}]", v, k, **how)
                         for i, (v, k) in enumerate(zip(value, of)))  # fmt: skip
    elif origin is Sequence and isinstance(value, list | tuple):
        return [fitting(f"{where}[{i}]", v, inner[0], **how) for i, v in enumerate(value)]
    elif origin is Mapping and isinstance(value, Mapping):
        return {n: fitting(f"{where}.{n}", v, inner[1], **how) for n, v in value.items()}
    elif kind in (bool, str, type(None)):
        if isinstance(value, kind) and not (kind is str and "\0" in value):
            return value
    elif kind is int and isinstance(value, int) and not isinstance(value, bool):
        if least <= value <= most:
            return value
        raise ValueError(
            f"{where} is {_short(value)}; expected a whole number from {least} to {most}"
        )
    elif kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        if (-LARGEST if signed else 0) <= value <= LARGEST:
            return float(value)
        raise ValueError(
            f"{where} is {_short(value)}; expected a number"
            f"{'' if signed else ', 0 or more'}, and finite"
        )
    raise ValueError(f"{where} is {_short(value)}; expected {_words(kind)}")


def _kinds(function: Callable[..., Any]) -> dict[str, Any]:
    """The types of arguments by name; of a class, those of its fields and of its own `__init__`."""
    if not inspect.isclass(function):
        return typing.get_type_hints(function)
    own = inspect.unwrap(vars(function).get("__init__", object.__init__))
    kinds = typing.get_type_hints(function)
    written = hasattr(own, "__code__") and own.__code__.co_filename != "<string>"  # no dataclass's
    return kinds | typing.get_type_hints(own) if written else kinds


def _sayable(kind: Any, default: Any) -> Any:
    """What of a type JSON can say; `None` if nothing."""
    if kind is Any:  # a step size: a number, or trees and schedules, which are of Python
        return float if isinstance(default, float) else None
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (Union, types.UnionType):
        members = [one for one in inner if one is not type(None) and _sayable(one, None)]
        if {int, float} <= set(members):
            members.remove(int)
        optional = [type(None)] if type(None) in inner else []
        return Union[tuple(members + optional)] if members else None  # noqa: UP007
    if origin in (tuple, Sequence):
        return kind if all(one is ... or _sayable(one, None) for one in inner) else None
    if origin is Mapping:
        return kind if _sayable(inner[1], None) else None
    return kind if origin is Literal or kind in (bool, int, float, str) else None


def _words(kind: Any) -> str:
    """A type in words."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (Union, types.UnionType):
        return " or ".join(map(_words, inner))
    if origin is Literal:
        return "one of " + ", ".join(map(str, inner))
    if origin is tuple and inner[1:] != (...,):
        return f"a list of {len(inner)}: " + ", ".join(map(_words, inner))
    if origin in (tuple, Sequence):
        return f"a list, each {_words(inner[0])}"
    if origin is Mapping:
        return "settings by their names"
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "a word"}
    return names.get(kind, "null")


def _short(value: Any) -> str:
    """A value in an error, however long it is."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > 2**200:
        return "a number of more than 60 digits"
    if isinstance(value, Mapping):
        return "a JSON object"
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}"
    text = "null" if value is None else repr(value)
    return text if len(text) < 80 else f"{text[:78]}…"

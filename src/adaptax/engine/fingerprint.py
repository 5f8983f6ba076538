"""What a value is, in words that two processes agree on, so that a resumed run can compare it.

A value becomes a dictionary of names and texts: `learner` is `adaptax.algorithms.maml.MAML`,
`learner.inner_lr` is `0.01`, `tasks.bank` is `uint8[964,28,28,1] #9d3f01c2`. Records and containers
are walked through; arrays count by their content; functions by their name and, where they are not
of an installed library, by their code, the variables they close over and the globals
they use; `functools.partial` by its arguments. Nothing depends on addresses, on the order of a
dictionary or set, or on the seed of hashes. What cannot be looked into is named as such.
"""

from __future__ import annotations

import copyreg
import dataclasses
import enum
import functools
import importlib.metadata
import json
import platform
import types
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..origins import installed, instructions, of_library, unchecked

UNKNOWN = "cannot be compared"
"""Ends the text of what cannot be looked into."""

SAMPLED = 2**30
"""Bytes on the host beyond which an array counts by 1,024 of its rows."""

MOST_VISITS, MOST_ENTRIES, DEEPEST = 50_000, 1_000, 100
_SHORT = 60


def fingerprint(**values: Any) -> dict[str, str]:
    """What each of these values is, and each of its parts.

    Args:
        values: by the names that they are to have.

    Returns:
        A text for every name, such as `learner.loss`; at most some thousand, beyond which the
        deepest parts are summed up.
    """
    walk = _Walk()
    for name, value in values.items():
        walk.visit((name,), value)
    return {"".join(path): text for path, text in _folded(walk.found).items()}


def made_by() -> dict[str, str]:
    """Versions of Python and of the libraries that compute, and the machine."""
    names = ("adaptax", "jax", "jaxlib", "equinox", "optax", "numpy")
    return {
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in names},
        "processor": processor(),
        "backend": jax.default_backend(),
        "local devices": str(jax.local_device_count()),
        "processes": str(jax.process_count()),
    }


def settings() -> dict[str, Any]:
    """What of JAX's own settings numbers depend on."""
    names = (
        "enable_x64",
        "default_matmul_precision",
        "default_prng_impl",
        "threefry_partitionable",
    )
    return {f"jax_{name}": getattr(jax.config, f"jax_{name}") for name in names}


def processor() -> str:
    """The name of the processor."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


Names = tuple[str, ...]


class _Walk:
    """A walk through values, depth first; `found` has a text for every path."""

    def __init__(self, outer: _Walk | None = None):
        self.found: dict[Names, str] = {}
        # What is being looked into, from the outside in; and what of code was looked into before,
        # anywhere: classes with the sum of their methods, and functions whose globals are told.
        self.within: tuple[Any, ...] = outer.within if outer else ()
        self.classes: dict[type, str] = outer.classes if outer else {}
        self.told: set[Any] = outer.told if outer else set()

    def visit(self, path: Names, value: Any) -> None:
        """Look into a value."""
        if (text := _plain(value)) is not None:
            self.found[path] = text
        elif any(value is outer for outer in self.within):
            self.found[path] = "itself"
        elif len(self.found) > MOST_VISITS or len(self.within) > DEEPEST:
            self.found[path] = f"{_name(type(value))}, too large or deep, which {UNKNOWN}"
        else:
            self.within += (value,)
            self._inside(path, value)
            self.within = self.within[:-1]

    def _parts(self, path: Names, parts: Mapping[str, Any]) -> None:
        for name, part in parts.items():
            self.visit((*path, name), part)

    def _inside(self, path: Names, value: Any) -> None:
        kind = type(value)
        self.found[path] = _name(kind)
        if isinstance(value, type):
            self.found[path] = _name(value)
            self._code_of(path, value)
        elif isinstance(value, types.FunctionType):
            self._function(path, value)
        elif isinstance(value, types.MethodType):
            self.visit(path, value.__func__)
            self.visit((*path, ".__self__"), value.__self__)
        elif isinstance(value, types.BuiltinFunctionType):
            self.found[path] = _name(value)
            if not isinstance(value.__self__, types.ModuleType | None):
                self.visit((*path, ".__self__"), value.__self__)
        elif isinstance(value, functools.partial):
            self.found[path] = "partial"
            self._parts(path, {".function": value.func, ".arguments": value.args})
            self._parts(path, {f".{n}": part for n, part in sorted(value.keywords.items())})
        elif isinstance(value, Mapping):
            self.found[path] = f"{kind.__name__} of {len(value)}"
            names = {f"[{_plain(key) or self._digest(key)}]": part for key, part in value.items()}
            self._parts(path, dict(sorted(names.items(), key=lambda item: item[0])))
        elif isinstance(value, set | frozenset):
            self.found[path] = _short(f"{kind.__name__} {sorted(self._digest(v) for v in value)}")
        elif isinstance(value, tuple | list):
            if all(part is None or type(part) in _SCALARS for part in value):
                self.found[path] = _short(f"{kind.__name__}({', '.join(map(repr, value))})")
            else:
                fields = getattr(value, "_fields", None)
                if fields is None:
                    self.found[path] = f"{kind.__name__} of {len(value)}"
                self._parts(path, {f".{fields[i]}" if fields else f"[{i}]": part
                                   for i, part in enumerate(value)})  # fmt: skip
        elif dataclasses.is_dataclass(value):
            self._code_of(path, kind)
            own = [field.name for field in dataclasses.fields(value)]
            self._parts(path, {f".{n}": getattr(value, n) for n in own if hasattr(value, n)})
        elif isinstance(value, property):
            self._parts(path, {".get": value.fget, ".set": value.fset})
        elif "__wrapped__" in getattr(value, "__dict__", ()):
            self.visit(path, value.__wrapped__)
            if kind.__name__ != "PjitFunction" and not _of_library(value.__wrapped__):
                self._attributes(path, value)  # the derivative, of `jax.custom_jvp`
        elif hasattr(value, "__dict__") or _slots(value):
            self._code_of(path, kind)
            self._attributes(path, value)
        else:
            self._reduced(path, value)

    def _attributes(self, path: Names, value: Any) -> None:
        names = sorted({*getattr(value, "__dict__", ()), *_slots(value)})
        # Double underscores: of the language, and of Flax, whose objects know their trace by them.
        names = [n for n in names if "__" not in n and n != "_trace_state" and hasattr(value, n)]
        self._parts(path, {f".{name}": getattr(value, name) for name in names})

    def _reduced(self, path: Names, value: Any) -> None:
        """An object without attributes, by what it would be made of again."""
        try:
            reduce: Any = copyreg.dispatch_table.get(type(value))
            parts: Any = reduce(value) if reduce else value.__reduce_ex__(4)
        except Exception:
            self.found[path] = f"{_name(type(value))}, which {UNKNOWN}"
            return
        if isinstance(parts, str):
            self.found[path] = f"{_name(type(value))} {parts}"
            return
        _, arguments, state, *items = [*parts, None, None, None][:5]
        known = [part for part in (arguments, state, *map(list, filter(None, items))) if part]
        self._parts(path, {f".{i}": part for i, part in enumerate(known)})

    def _function(self, path: Names, function: types.FunctionType) -> None:
        code = function.__code__
        if (wrapped := unchecked(function)) is not function:
            self.visit(path, wrapped)
            return
        self.found[path] = _name(function)
        ours = _of_library(function)
        if ours and "<locals>" not in function.__qualname__:
            return
        if not ours or function.__name__ == "<lambda>":
            self.found[(*path, ".code")] = _sum(_code(code, function.__doc__))
        for name, cell in zip(code.co_freevars, function.__closure__ or ()):
            try:
                self.visit((*path, f".{name}"), cell.cell_contents)
            except ValueError:  # a variable that has no value yet
                self.found[(*path, f".{name}")] = "unset"
        for i, part in enumerate(function.__defaults__ or ()):
            self.visit((*path, f".default {i}"), part)
        self._parts(path, {f".{n}": part for n, part in (function.__kwdefaults__ or {}).items()})
        if not ours and (code, id(function.__globals__)) not in self.told:
            self.told.add((code, id(function.__globals__)))
            names = sorted({".".join(names) for names in _globals(code)})
            for name in names:
                try:
                    first, *rest = name.split(".")
                    part = functools.reduce(getattr, rest, function.__globals__[first])
                except (KeyError, AttributeError):  # of the language, or not there
                    continue
                self.visit((*path, f".{name}"), part)

    def _code_of(self, path: Names, cls: type) -> None:
        """Of a class that is of no library: what its methods do."""
        bodies = [vars(each) for each in cls.__mro__ if not _of_library(each)]
        if bodies and cls not in self.classes:
            self.classes[cls] = "itself"
            own = {f".{name}": part for body in reversed(bodies)
                   for name, part in sorted(body.items())
                   if name not in _GENERATED and not name.startswith("_abc_")}  # fmt: skip
            self.classes[cls] = self._digest(own)
        if bodies:
            self.found[(*path, ".code")] = self.classes[cls]

    def _digest(self, value: Any) -> str:
        inner = _Walk(self)
        if isinstance(value, dict):
            inner._parts((), value)
        else:
            inner.visit((), value)
        return _sum(json.dumps(["".join(path) + text for path, text in inner.found.items()]))


_GENERATED = {
    "__dict__", "__weakref__", "__doc__", "__module__", "__qualname__", "__annotations__",
    "__slots__", "__abstractmethods__", "__abstractvars__", "__abstractclassvars__", "__init__",
    "__repr__", "__eq__", "__hash__", "__setattr__", "__delattr__", "__match_args__",
    "__dataclass_fields__", "__dataclass_params__", "__parameters__", "__orig_bases__",
    "__replace__", "__firstlineno__", "__static_attributes__", "__annotate__", "__annotate_func__",
    "__annotations_cache__",
}  # fmt: skip
"""Attributes of classes that Python makes; the fields of an object tell what `__init__` did."""


_SCALARS = (bool, int, float, complex, str, bytes)


def _plain(value: Any) -> str | None:
    """The text of a value that has no parts; `None` for others."""
    kind = type(value)
    if value is None or kind in _SCALARS:
        return _short(repr(value))
    if isinstance(value, jax.ShapeDtypeStruct):
        return f"{value.dtype}{list(value.shape)}".replace(" ", "")
    if isinstance(value, np.ndarray | np.generic | jax.Array) and not isinstance(
        value, jax.core.Tracer
    ):
        return _array(value)
    if hasattr(value, "detach") and hasattr(value, "numpy") and not isinstance(value, type):
        return _array(value.detach().cpu().numpy())  # of PyTorch
    if isinstance(value, enum.Enum | np.dtype | PurePath | range | slice):
        return _short(f"{kind.__name__} {value}")
    if isinstance(value, jax.sharding.Mesh | jax.tree_util.PyTreeDef):
        return _short(str(value))
    if isinstance(value, jax.Device | types.ModuleType):
        return f"{kind.__name__} {getattr(value, '__name__', value)}"
    if value is Ellipsis or value is NotImplemented or value is dataclasses.MISSING:
        return kind.__name__
    return None


def _array(value: Any) -> str:
    if jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        value, kind = jax.random.key_data(value), f"{value.dtype} "
    else:
        kind = ""
    array = np.asarray(value)
    kind = f"{kind}{array.dtype}{list(array.shape)}".replace(" ", "")
    if array.dtype == object:
        return _short(f"{kind} {array.tolist()}")
    if array.size <= 4:
        return f"{kind} {array.tolist()}"
    if array.nbytes > SAMPLED and isinstance(value, np.ndarray):
        array = array[np.linspace(0, len(array) - 1, min(len(array), 1024)).astype(int)]
    return f"{kind} {_sum(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)}"


def _name(thing: Any) -> str:
    """The name of a function or class; with its module if that is of a library."""
    name = str(getattr(thing, "__qualname__", type(thing).__name__))
    module = getattr(thing, "__module__", None)
    return f"{module}.{name}" if module is not None and _of_library(thing) else name


def _of_library(thing: Any) -> bool:
    code = getattr(thing, "__code__", None)
    if isinstance(code, types.CodeType):
        return installed(code.co_filename)
    return of_library(getattr(thing, "__module__", None))


def _slots(value: Any) -> list[str]:
    found = [getattr(cls, "__slots__", ()) for cls in type(value).__mro__]
    return [name for slots in found for name in ((slots,) if isinstance(slots, str) else slots)]


def _code(code: types.CodeType, doc: str | None = None) -> str:
    """What a function does, but for where it stands and how its variables are called."""

    def constant(value: Any) -> str:
        if isinstance(value, types.CodeType):
            return _code(value)
        if isinstance(value, frozenset | tuple):
            parts = [constant(part) for part in value]
            return repr(sorted(parts) if isinstance(value, frozenset) else parts)
        return repr(value)

    constants = [constant(value) for value in code.co_consts if value is not doc or doc is None]
    return json.dumps([code.co_code.hex(), constants, code.co_names, code.co_freevars,
                       code.co_argcount, code.co_kwonlyargcount, code.co_flags])  # fmt: skip


def _globals(code: types.CodeType) -> Iterator[list[str]]:
    """Global names that a function uses, with the attributes that it takes of them."""
    names: list[str] = []
    for step in instructions(code):
        if step and step.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            names = [step.argval]
        elif step and names and step.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            names = [*names, step.argval]
            continue
        else:
            names = []
        if names:
            yield names


def _folded(found: dict[Names, str]) -> dict[Names, str]:
    """The same with the deepest paths summed up, if there are too many."""
    if len(found) <= MOST_ENTRIES:
        return found
    depth = 1
    while len({path[: depth + 1] for path in found}) <= MOST_ENTRIES:
        depth += 1
    parts: dict[Names, list[str]] = {}
    for path, text in found.items():
        parts.setdefault(path[:depth], []).append("".join(path[depth:]) + text)
    return {path: texts[0] if len(texts) == 1 else f"{texts[0]} {_sum(json.dumps(texts))}"
            for path, texts in parts.items()}  # fmt: skip


def _short(text: str) -> str:
    return text if len(text) <= _SHORT else f"{text[:40]}… {_sum(text)}"


def _sum(data: Any) -> str:
    return f"#{zlib.crc32(data.encode() if isinstance(data, str) else data):08x}"

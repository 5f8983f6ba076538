"""Compiled programs, kept for the next call: what is compiled, when, and how long it stays.

`learner.adapt`, `learner.iterates`, `predict`, `evaluate` and `fit` all run through `call`.
"""

from __future__ import annotations

import dataclasses
import dis
import functools
import sys
import sysconfig
import threading
import types
import weakref
from collections import OrderedDict
from collections.abc import Callable, Collection, Hashable
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import numpy as np

from . import roles
from .process import check_not_forked

LIMIT = 32
"""Programs that are kept; beyond, the one that was not called for the longest time is freed."""

_UNTRACEABLE = (
    jax.errors.ConcretizationTypeError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
    jax.errors.NonConcreteBooleanIndexError,
)
_INSTALLED = (
    *(str(sysconfig.get_path(name)) for name in ("purelib", "platlib", "stdlib")),
    str(Path(__file__).parent),
)
_PLAIN = frozenset((bool, int, str, bytes, type(None)))
_SMALL = 2**16  # bytes of a NumPy array that are compared at every call

_programs: OrderedDict[Hashable, _Program] = OrderedDict()
_lock = threading.Lock()
_given: ContextVar[Any] = ContextVar("given")


def call(function: Callable[..., Any], *args: Any, donate: Collection[int] = ()) -> Any:
    """`function(*args)` as one compiled program, which the next such call finds ready.

    Arrays are inputs of the program; all else in the arguments, and what functions among them
    close over, is built in. Two calls share a program if the arrays agree in shape and dtype and
    the rest is equal. Functions are equal if their code, their defaults and the variables that
    they close over are; outside of installed packages also the global variables that they read.
    So a loss or an optax rule that is made anew at every call does not compile anew, and one
    whose variables have changed does. Arrays among such variables are compared by identity.

    No argument is kept. What cannot be compared is compiled anew at every call; what cannot be
    traced, since it asks for values, runs uncompiled. With traced arguments this is a plain call.
    Variables that an argument has in several places (see `adaptax.roles`) are one input.

    Args:
        function: pure; of a method of an `equinox.Module` the arrays are inputs, too.
        args: any pytrees.
        donate: positions of arguments whose memory the program may reuse.
    """
    check_not_forked()
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((function, args))):
        return function(*args)
    once = tuple(map(roles.deduplicate, args))
    # What the caller gives without shared variables he gets back so.
    out = roles.reshare if any(a is not b for a, b in zip(once, args, strict=True)) else _as_it_is
    parts = [jax.tree.flatten(arg) for arg in (function, *once)]
    program = _find(function, once, donate)
    token = _given.set(parts)
    try:
        if program.traceable:
            arrays = [[leaf for leaf in leaves if eqx.is_array(leaf)] for leaves, _ in parts]
            return out(program.result(program.run(*arrays)))
    except _UNTRACEABLE:
        program.traceable = False
    finally:
        _given.reset(token)
    return out(function(*once))


def _as_it_is(result: Any) -> Any:
    return result


def clear() -> None:
    """Forget all programs and free their memory."""
    with _lock:
        _programs.clear()


class _Program:
    """A compiled function of arrays, and the rest of its result.

    What is no array it reads from `_given` when it is traced, and keeps none of it.
    """

    def __init__(self, name: str, donate: Collection[int], alive: list[weakref.ref[Any]]):
        self.alive, self.traceable = alive, True
        rest: list[Any] = []

        def traced(*arrays: list[Any]) -> list[Any]:
            filled = []
            for (leaves, structure), mine in zip(_given.get(), arrays, strict=True):
                own = iter(mine)
                leaves = [next(own) if eqx.is_array(leaf) else leaf for leaf in leaves]
                filled.append(jax.tree.unflatten(structure, leaves))
            function, *args = filled
            found, structure = jax.tree.flatten(function(*args))
            rest[:] = structure, [None if eqx.is_array(leaf) else (leaf,) for leaf in found]
            return [leaf for leaf in found if eqx.is_array(leaf)]

        traced.__name__ = traced.__qualname__ = name
        self.run, self._rest = jax.jit(traced, donate_argnums=[1 + i for i in donate]), rest

    def result(self, arrays: list[Any]) -> Any:
        """What the function returned."""
        structure, static = self._rest
        found = iter(arrays)
        leaves = [next(found) if leaf is None else leaf[0] for leaf in static]
        return jax.tree.unflatten(structure, leaves)


def _find(function: Callable[..., Any], args: Any, donate: Collection[int]) -> _Program:
    """The program of these arguments, a new one if there is none."""
    look = _Look()
    name = getattr(function, "__qualname__", "call").replace("<locals>", "")
    try:
        precision = jax.dtypes.canonicalize_dtype(float)
        key = look((function, args), traced=True), tuple(donate), precision
        hash(key)
    except (TypeError, RecursionError):  # not hashable: is the next one equal? No telling.
        return _Program(name, donate, [])
    with _lock:
        program = _programs.pop(key, None)
        if program is None:
            program = _Program(name, donate, look.alive)
            for old in [k for k, p in _programs.items() if any(r() is None for r in p.alive)]:
                del _programs[old]
        _programs[key] = program
        while len(_programs) > LIMIT:
            _programs.popitem(last=False)
    return program


class _Same:
    """An object compared by identity, and not kept alive if that can be."""

    def __init__(self, ref: Callable[[], Any], number: int):
        self.ref, self.number = ref, number

    def __hash__(self) -> int:
        return self.number

    def __eq__(self, other: object) -> bool:
        mine = self.ref()
        return isinstance(other, _Same) and mine is not None and mine is other.ref()


class _Look:
    """Makes of an object what two objects have alike that a program need not tell apart.

    Called with `traced=True` for arrays that are inputs, of which shape and dtype count.
    """

    def __init__(self) -> None:
        self.alive: list[weakref.ref[Any]] = []
        self._owner: list[weakref.ref[Any]] = []  # the function whose variables are looked at
        self._seen: dict[int, int] = {}

    def __call__(self, x: Any, traced: bool = False) -> Hashable:
        kind: Any = type(x)
        if kind in _PLAIN:
            return kind, x
        if issubclass(kind, eqx.Module):
            # Past Equinox's own way to attributes, which is slow.
            fields, own = kind.__dataclass_fields__, object.__getattribute__(x, "__dict__")
            return self(kind), *(
                self(own.get(name), traced and not field.metadata.get("static", False))
                for name, field in fields.items()
            )
        if kind in (tuple, list) or (issubclass(kind, tuple) and hasattr(x, "_fields")):
            return kind, *(self(item, traced) for item in x)
        if kind is set or kind is frozenset:
            return kind, frozenset(self(item) for item in x)
        if kind is dict:
            return kind, *((self(k), self(v, traced)) for k, v in x.items())
        if isinstance(x, jax.core.Tracer):
            raise TypeError("a traced array, which is gone after its program is made")
        if eqx.is_array(x):
            if traced:
                return kind is np.ndarray, x.shape, x.dtype, getattr(x, "weak_type", False)
            if isinstance(x, jax.Array):
                self.alive += self._owner
                return self._same(x)
            if x.nbytes > _SMALL or x.dtype.hasobject:
                raise TypeError("a large NumPy array, which may change")
            return x.shape, x.dtype, x.tobytes()
        if kind is float or kind is complex:
            return kind, repr(x)  # which tells 0.0 from −0.0
        if kind is types.FunctionType:
            return self._once(x, self._function)
        if issubclass(kind, type):
            return self._once(x, self._class) if _own(x.__module__) else x
        if isinstance(x, functools.partial):
            traced = traced and isinstance(x, jax.tree_util.Partial)
            return kind, self(x.func), self(x.args, traced), self(x.keywords, traced)
        if kind is types.MethodType:
            return kind, self(x.__func__), self(x.__self__)
        node = jax.tree_util.default_registry.flatten_one_level(x)
        if node is not None and node[1] is not x:  # which what is registered as static is
            return kind, self(node[1]), *(self(child, traced) for child in node[0])
        if dataclasses.is_dataclass(x) and kind.__eq__ is not object.__eq__:
            own = {f.name: getattr(x, f.name) for f in dataclasses.fields(x)}
            return kind, self({**own, **getattr(x, "__dict__", {})})
        if kind.__eq__ is not object.__eq__ and _hashable(x):
            return kind, x
        written = type(kind.__dict__.get("__call__")) is types.FunctionType
        if written and hasattr(x, "__dict__") and not kind.__module__.startswith("jax."):
            return self._once(x, self._callable)
        return self._same(x)

    def _function(self, f: types.FunctionType) -> Hashable:
        """The code of a function and the variables that it reads."""
        code, installed = f.__code__, _installed(f.__code__.co_filename)
        if "jaxtyping" in code.co_filename and hasattr(f, "__wrapped__"):
            return self(f.__wrapped__)  # it checks types, by objects made for every function
        if installed and f.__closure__ is None and f.__qualname__ == f.__name__:
            return f
        reads, writes = _variables(code, code.co_filename)
        cells = zip(code.co_freevars, f.__closure__ or (), strict=True)
        seen = [_content(cell) for name, cell in cells if name not in writes]
        seen += [f.__globals__.get(name) for name in reads]
        seen += [item for item in vars(f).items() if item[0] not in writes]
        owner, self._owner = self._owner, [weakref.ref(f)]
        defaults = self(f.__defaults__), self(f.__kwdefaults__)
        key = code, f.__module__, defaults, *(self._variable(v, f, installed) for v in seen)
        self._owner = owner
        return key

    def _callable(self, x: Any) -> Hashable:
        """An object, and its attributes."""
        code = type(x).__call__.__code__
        _, writes = _variables(code, code.co_filename)
        seen = [value for name, value in vars(x).items() if name not in writes]
        return self._same(x), *(self._variable(v, x, _installed(code.co_filename)) for v in seen)

    def _variable(self, value: Any, owner: Any, installed: bool) -> Hashable:
        # Not by what it holds: a list that tracing appends to is no reason to compile again.
        if type(value) in (list, dict, set) and not installed:
            return self._same(owner), id(value)
        return self(value)

    def _class(self, kind: type) -> Hashable:
        """A class of the user's, and the variables that its methods read."""
        members = [m for c in kind.__mro__ if _own(c.__module__) for m in vars(c).values()]
        functions = [getattr(m, "fget", getattr(m, "__func__", m)) for m in members]
        own = [f for f in functions if isinstance(f, types.FunctionType)]
        return self._same(kind), *(self._once(f, self._function) for f in own)

    def _once(self, x: Any, look: Callable[[Any], Hashable]) -> Hashable:
        """What `look` gives; where x was met before, on the way to itself too, its number."""
        if id(x) in self._seen:
            return _Same, self._seen[id(x)]
        self._seen[id(x)] = len(self._seen)
        return look(x)

    def _same(self, x: Any) -> Hashable:
        try:
            ref = weakref.ref(x)
        except TypeError:  # it has slots, or is of another language
            return _Same(lambda: x, id(x))
        self.alive.append(ref)
        return _Same(ref, id(x))


def _hashable(x: Any) -> bool:
    try:
        hash(x)
    except TypeError:
        return False
    return True


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not assigned yet
        return _content


@functools.lru_cache(4096)
def _installed(file: str) -> bool:
    """Whether code comes from an installed package, whose variables stay as they are."""
    return file.startswith(_INSTALLED)


@functools.lru_cache(4096)
def _variables(code: types.CodeType, file: str) -> tuple[list[str], set[str]]:
    """Global variables that code reads and does not write; other names that it writes to."""
    if _installed(file):
        return [], set()
    codes, found = [code], []
    for one in codes:
        codes += [inner for inner in one.co_consts if isinstance(inner, types.CodeType)]
        found += [(i.opname, i.argval) for i in dis.get_instructions(one)]
    named = lambda *kinds: [name for kind, name in dict.fromkeys(found) if kind in kinds]  # noqa: E731
    reads, writes = named("LOAD_GLOBAL", "LOAD_NAME"), named("STORE_GLOBAL")
    return [name for name in reads if name not in writes], set(named("STORE_DEREF", "STORE_ATTR"))


@functools.lru_cache(4096)
def _own(module: str) -> bool:
    """Whether a module is the user's, whose variables may change."""
    file = getattr(sys.modules.get(module), "__file__", None) or ""
    return module not in sys.builtin_module_names and not _installed(file)

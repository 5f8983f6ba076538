"""What of a value a compiled program depends on, as a key that finds the program again."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import types
import weakref
from collections.abc import Callable, Hashable
from typing import Any

import equinox as eqx
import jax
import numpy as np

from .origins import installed, instructions, of_library, unchecked

_PLAIN = frozenset((bool, int, str, bytes, type(None)))
_SCALARS = _PLAIN | {float, complex}
_SPACES = frozenset((types.SimpleNamespace, argparse.Namespace))
_CONTAINERS = _SPACES | {list, dict, set}
_SMALL = 2**16  # bytes of a NumPy array that are compared at every call


class Look:
    """Makes a key of a value: equal for two values that a program need not tell apart.

    Called with `traced=True` for arrays that are inputs, of which shape and dtype count. Of a list,
    dictionary, set or namespace among the variables of a user's function the key says which it is,
    and `contents` what is in it, by the identities of its owner and of itself.
    """

    def __init__(self, within: frozenset[int] = frozenset()) -> None:
        self.alive: list[weakref.ref[Any]] = []
        self.contents: dict[tuple[int, int], Hashable] = {}
        self._within = within  # the containers that are being looked into
        self._owner: list[weakref.ref[Any]] = []  # the function whose variables are looked at
        self._seen: dict[int, int] = {}

    def __call__(self, x: Any, traced: bool = False) -> Hashable:
        """Return the key.

        Raises:
            TypeError: for what cannot be compared.
        """
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
            return x if of_library(x.__module__) else self._once(x, self._class)
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
        if (wrapped := unchecked(f)) is not f:
            return self(wrapped)
        code, ours = f.__code__, installed(f.__code__.co_filename)
        if ours and f.__closure__ is None and f.__qualname__ == f.__name__:
            return f
        reads, writes = _variables(code, code.co_filename)
        cells = zip(code.co_freevars, f.__closure__ or (), strict=True)
        seen = [_content(cell) for name, cell in cells if name not in writes]
        seen += [f.__globals__.get(name) for name in reads]
        seen += [item for item in vars(f).items() if item[0] not in writes]
        owner, self._owner = self._owner, [weakref.ref(f)]
        defaults = self(f.__defaults__), self(f.__kwdefaults__)
        key = code, f.__module__, defaults, *(self._variable(v, f, ours) for v in seen)
        self._owner = owner
        return key

    def _callable(self, x: Any) -> Hashable:
        """An object, and its attributes."""
        code = type(x).__call__.__code__
        _, writes = _variables(code, code.co_filename)
        seen = [value for name, value in vars(x).items() if name not in writes]
        return self._same(x), *(self._variable(v, x, installed(code.co_filename)) for v in seen)

    def _variable(self, value: Any, owner: Any, ours: bool) -> Hashable:
        """A variable that code of an owner reads, or of ours, which changes none."""
        kind = type(value)
        if kind not in _CONTAINERS or ours:
            return self(value)
        # What is in it is told apart, by a look of its own: tracing may append to it, after which
        # it is not compared. One that is being looked into already is not looked into again.
        if id(value) not in self._within:
            inner = Look(self._within | {id(value)})
            try:
                content = inner(vars(value) if kind in _SPACES else value)
            except (TypeError, RecursionError):  # it holds what cannot be compared
                content = None
            self.alive += inner.alive
            self.contents |= {**inner.contents, (id(owner), id(value)): content}
        return self._same(owner), id(value)

    def _class(self, kind: type) -> Hashable:
        """A class of the user's, its variables, and those that its methods read."""
        found = []
        for owner in kind.__mro__:
            for name, member in () if of_library(owner.__module__) else vars(owner).items():
                member = getattr(member, "fget", getattr(member, "__func__", member))
                if isinstance(member, types.FunctionType):
                    found.append(self._once(member, self._function))
                elif type(member) in _SCALARS | _CONTAINERS and not name.startswith("__"):
                    found.append(self._variable(member, owner, False))
        return self._same(kind), *found

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


class _Same:
    """An object compared by identity, and not kept alive if that can be."""

    def __init__(self, ref: Callable[[], Any], number: int):
        self.ref, self.number = ref, number

    def __hash__(self) -> int:
        return self.number

    def __eq__(self, other: object) -> bool:
        mine = self.ref()
        return isinstance(other, _Same) and mine is not None and mine is other.ref()


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
def _variables(code: types.CodeType, file: str) -> tuple[list[str], set[str]]:
    """Global variables that code reads and does not write; other names that it writes to."""
    if installed(file):
        return [], set()
    found = dict.fromkeys((step.opname, step.argval) for step in instructions(code) if step)
    of = lambda *kinds: [name for kind, name in found if kind in kinds]  # noqa: E731
    reads, writes = of("LOAD_GLOBAL", "LOAD_NAME"), of("STORE_GLOBAL")
    return [name for name in reads if name not in writes], set(of("STORE_DEREF", "STORE_ATTR"))

"""Compiled programs, kept for the next call: what is compiled, when, and how long it stays.

`learner.adapt`, `learner.iterates`, `predict`, `evaluate` and `fit` all run through `call`.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Hashable
from contextvars import ContextVar
from typing import Any

import equinox as eqx
import jax

from . import roles
from .look import Look
from .process import check_not_forked

LIMIT = 32
"""Programs that are kept; beyond, the one that was not called for the longest time is freed."""

_UNTRACEABLE = (
    jax.errors.ConcretizationTypeError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
    jax.errors.NonConcreteBooleanIndexError,
)
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
    whose variables have changed does. Lists, dictionaries, sets and namespaces among them are
    compared by content, unless tracing itself changes them; arrays by identity.

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
            result = program.result(program.run(*arrays))
            if not program.settled:
                program.settle(function, once)
            return out(result)
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

    def __init__(self, name: str, donate: Collection[int], look: Look):
        self.alive, self.contents = look.alive, look.contents
        self.traceable, self.settled = True, not look.contents
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

    def settle(self, function: Callable[..., Any], args: Any) -> None:
        """Compare no container any more that tracing has changed."""
        now = Look()
        now((function, args), traced=True)
        kept = {key: old for key, old in self.contents.items() if old == now.contents.get(key)}
        self.contents, self.settled = kept, True

    def suits(self, contents: dict[Any, Hashable]) -> bool:
        """Whether the containers that it was made with hold what they held."""
        return all(old == contents.get(key) for key, old in self.contents.items())


def _find(function: Callable[..., Any], args: Any, donate: Collection[int]) -> _Program:
    """The program of these arguments, a new one if there is none."""
    look = Look()
    name = getattr(function, "__qualname__", "call").replace("<locals>", "")
    try:
        precision = jax.dtypes.canonicalize_dtype(float)
        key = look((function, args), traced=True), tuple(donate), precision
        hash(key)
    except (TypeError, RecursionError):  # not hashable: is the next one equal? No telling.
        return _Program(name, donate, Look())
    with _lock:
        program = _programs.pop(key, None)
        if program is None or not program.suits(look.contents):
            program = _Program(name, donate, look)
            for old in [k for k, p in _programs.items() if any(r() is None for r in p.alive)]:
                del _programs[old]
        _programs[key] = program
        while len(_programs) > LIMIT:
            _programs.popitem(last=False)
    return program

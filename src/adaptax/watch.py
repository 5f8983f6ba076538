"""What is not finite on the way of adaptation, reported from inside a compiled program."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from . import tree

ORDER = ("support inputs", "support targets", "support loss", "inner gradient", "adapted weights")
"""What an inner step computes, in this order."""


class Watch:
    """What was not finite: in which inner loop of a meta-loss, at which step, which of `ORDER`."""

    def __init__(self) -> None:
        self.loops = 0
        self.found: set[tuple[int, int, int]] = set()

    def first(self) -> tuple[int, str] | None:
        """Inner step and name of the first that was not finite."""
        jax.effects_barrier()
        if not self.found:
            return None
        _, step, which = min(self.found)
        return step, ORDER[which]


_watch: ContextVar[Watch | None] = ContextVar("watch", default=None)


@contextmanager
def watching() -> Iterator[Watch]:
    """Have the inner loops that are traced meanwhile report to a `Watch` when they run."""
    watch = Watch()
    token = _watch.set(watch)
    try:
        yield watch
    finally:
        _watch.reset(token)


def begin() -> None:
    """An inner loop begins."""
    if (watch := _watch.get()) is not None:
        watch.loops += 1


def note(step: int | Array, **seen: PyTree) -> None:
    """Report what is not finite, if anybody watches.

    Args:
        step: of the inner loop.
        seen: by names of `ORDER`, `_` for spaces.
    """
    if (watch := _watch.get()) is None:
        return
    loop, names = watch.loops, [name.replace("_", " ") for name in seen]

    def report(step: Any, sound: Any) -> None:
        for name, good in zip(names, sound, strict=True):
            if not good:
                watch.found.add((loop, int(step), ORDER.index(name)))

    sound = jnp.stack([tree.finite(each) for each in seen.values()])
    jax.debug.callback(report, step, sound)

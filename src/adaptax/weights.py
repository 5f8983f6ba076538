"""What the examples of a batch count: 0 for padding, by which unequal tasks get one shape."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

Weight = Float[Array, "n ..."] | None
"""Of every example, `(n,)`, or of every target of it, as in `adaptax.Batch`; all 1 if `None`."""

_SEEN: contextvars.ContextVar[Any] = contextvars.ContextVar("weight", default=None)


@contextlib.contextmanager
def weighing(weight: Weight) -> Iterator[None]:
    """Let the layers of a model that is called inside see what the examples of its batch count.

    Args:
        weight: of the batch that it is called with.
    """
    token = _SEEN.set(weight)
    try:
        yield
    finally:
        _SEEN.reset(token)


def seen() -> Weight:
    """Return the weights of the batch that the model is called with."""
    return _SEEN.get()


def spread(weight: Array | np.ndarray, over: Array | np.ndarray) -> Array:
    """Return weights of examples, or of the first axes of their targets, as those of all entries.

    Args:
        weight: `(n, ...)`.
        over: an array whose first axes are those of the weights.
    """
    shape = weight.shape + (1,) * (over.ndim - weight.ndim)
    return jnp.broadcast_to(weight.reshape(shape), over.shape)


def present(weight: Float[Array, "n ..."]) -> Float[Array, " n"]:
    """Return what each example counts: the mean over its targets where these have weights."""
    return jnp.mean(weight.reshape(len(weight), -1), axis=1)


def total(each: Float[Array, "n ..."], weight: Weight) -> Float[Array, ""]:
    """Return `Σ w e`. What counts 0 may hold anything."""
    if weight is None:
        return jnp.sum(each)
    weight = spread(weight, each)
    return jnp.sum(jnp.where(weight > 0, weight * each, 0))


def average(each: Float[Array, "n ..."], weight: Weight) -> Float[Array, ""]:
    """Return `Σ w e / Σ w`; the mean of nothing is 0.

    Args:
        each: one for every example, or for every target of it.
        weight: of the batch.
    """
    if weight is None:
        return jnp.mean(each)
    count = jnp.sum(spread(weight, each))
    return total(each, weight) / jnp.where(count > 0, count, 1)

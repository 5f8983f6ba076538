"""Pooling by the maximum, whose derivatives of any order are as cheap as itself on a CPU."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad
from jaxtyping import Array, Float

from .primitive import primitive

Window: TypeAlias = tuple[int, int]


def max_pool(
    x: Float[Array, "n h w c"],
    padding: Literal["VALID", "SAME"] = "VALID",
    window: Window = (2, 2),
) -> Float[Array, "n h2 w2 c"]:
    """Pool by the maximum of windows that lie side by side.

    Where several pixels are the largest, the derivative is of the first, as in PyTorch.

    Args:
        x: a batch of images.
        padding: `"VALID"` drops rows and columns that fill no window, `"SAME"` keeps them.
        window: rows and columns of one.
    """
    over = [size % each for size, each in zip(x.shape[1:3], window)]
    if padding == "SAME":
        pads = [(0, -left % each) for left, each in zip(over, window)]
        x = jnp.pad(x, ((0, 0), *pads, (0, 0)), constant_values=-jnp.inf)
    else:
        x = x[:, : x.shape[1] - over[0], : x.shape[2] - over[1]]
    pooled: Array = _maximum(x, window)
    return pooled


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _maximum(x: Array, window: Window) -> Array:
    return functools.reduce(jnp.maximum, _places(x, window))


@_maximum.defjvp
def _maximum_jvp(window: Window, primals: Any, tangents: Any) -> Any:
    (x,), (dx,) = primals, tangents
    return _maximum(x, window), _pick.bind(_first(x, window), dx, window=window)


def _places(x: Array, window: Window) -> list[Array]:
    """Return each of the pixels of every window."""
    rows, columns = window
    return [x[:, i::rows, j::columns] for i, j in itertools.product(range(rows), range(columns))]


def _first(x: Array, window: Window) -> Array:
    """Return which pixel of every window is the largest.

    Decided once, and not by comparing with the maximum: a compiler may round the two otherwise, and
    then no pixel were equal to it.
    """
    best, *others = _places(x, window)
    which = jnp.zeros(best.shape, jnp.uint8 if len(others) < 255 else jnp.int32)
    for k, other in enumerate(others, 1):
        better = other > best
        best, which = jnp.where(better, other, best), jnp.where(better, k, which)
    return which


def _picked(which: Array, v: Array, *, window: Window) -> Array:
    """Return of every window the pixel of `v` that was the largest."""
    return functools.reduce(
        jnp.add, [jnp.where(which == k, v, 0) for k, v in enumerate(_places(v, window))]
    )


def _spread(which: Array, v: Array, *, window: Window) -> Array:
    """Put `v` of every window where the largest pixel was, and zeros elsewhere."""
    (rows, columns), (n, h, w, c) = window, v.shape
    place = jnp.arange(rows * columns, dtype=which.dtype).reshape(rows, 1, columns, 1)
    chosen = which[:, :, None, :, None] == place
    found = jnp.where(chosen, v[:, :, None, :, None], 0)
    return found.reshape(n, rows * h, columns * w, c)


def _linear(name: str, form: Callable[..., Array]) -> Primitive:
    """A primitive linear in its second operand; the first says which pixels."""
    made = primitive(name, form, form, ("window",))

    def jvp(primals: Sequence[Any], tangents: Sequence[Any], **how: Any) -> Any:
        out, dv = made.bind(*primals, **how), tangents[-1]
        if type(dv) is ad.Zero:
            return out, ad.Zero(jax.typeof(out).to_tangent_aval())
        return out, made.bind(*primals[:-1], dv, **how)

    ad.primitive_jvps[made] = jvp
    return made


_pick, _put = _linear("pool_pick", _picked), _linear("pool_put", _spread)


def _transposed(other: Primitive) -> Callable[..., Any]:
    def rule(cotangent: Any, which: Any, v: Any, **how: Any) -> list[Any]:
        if type(cotangent) is ad.Zero:
            return [None, ad.Zero(v.aval)]
        return [None, other.bind(which, cotangent, **how)]

    return rule


ad.primitive_transposes[_pick] = _transposed(_put)
ad.primitive_transposes[_put] = _transposed(_pick)

"""Layers: a linear map, a convolution, batch normalisation by the batch, max pooling."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jax.nn import initializers
from jaxtyping import Array, Float, PRNGKeyArray

from .. import weights
from ..batch_norm import observe
from ..conv import conv
from ..tree import wide

Pool = Callable[[Array], Array]
Init = Literal["glorot", "he", "truncated", "normal", "zero"]
"""Weights: Xavier uniform, He normal (for ReLU), N(0, 0.01²) cut at two standard deviations,
N(0, 1), or 0. Biases start at zero."""

_INITIALIZERS = {
    "glorot": initializers.glorot_uniform(),
    "he": initializers.he_normal(),
    "truncated": initializers.truncated_normal(0.01),
    "normal": initializers.normal(1.0),
    "zero": initializers.zeros,
}


class Linear(eqx.Module):
    """`y = x W + b`.

    Args:
        in_size: width of the input.
        out_size: width of the output.
        key: of the initialisation.
        init: of the weight.
    """

    weight: Float[Array, "in_size out_size"]
    bias: Float[Array, " out_size"]

    def __init__(self, in_size: int, out_size: int, *, key: PRNGKeyArray, init: Init = "glorot"):
        self.weight = _INITIALIZERS[init](key, (in_size, out_size))
        self.bias = jnp.zeros(out_size)

    def __call__(self, x: Float[Array, "n in_size"]) -> Float[Array, "n out_size"]:
        """Return a batch of outputs."""
        return x @ self.weight + self.bias


class Conv2d(eqx.Module):
    """3×3 convolution with bias, padding SAME, by `adaptax.conv.conv`.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        stride: of both dimensions.
        key: of the initialisation (Xavier uniform).
    """

    weight: Float[Array, "3 3 in_channels out_channels"]
    bias: Float[Array, " out_channels"]
    stride: int = eqx.field(static=True)

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1, *, key: PRNGKeyArray):
        self.weight = _INITIALIZERS["glorot"](key, (3, 3, in_channels, out_channels))
        self.bias = jnp.zeros(out_channels)
        self.stride = stride

    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n h2 w2 c2"]:
        """Return a batch of images."""
        return conv(x, self.weight, strides=(self.stride, self.stride)) + self.bias


class BatchNorm(eqx.Module):
    """Normalise each channel by the mean and variance of *this* batch.

    Examples of weight 0 have no part in the moments; see `adaptax.Batch`.

    The papers of the family do so for support and query, in training and in test: running
    averages are never used (MAML, Reptile) or collected in vain (MAML++'s code). The predictions
    for a batch of queries therefore see each other; `evaluate(transductive=False)` undoes that.

    A layer made by `tracking` also has running statistics, `momentum` times the old and the rest
    the batch's (the variance is the biased one), which a gradient updates; see
    `adaptax.batch_norm`. It normalises by them where `use_running_average` is set.

    Args:
        size: number of channels (the last axis).
        scale: learn a scale γ beside the shift β. MAML's networks have the shift alone.
        adapted: whether the inner loop of MAML adapts γ and β. In MAML's code it does not.
        eps: added to the variance.
    """

    shift: Float[Array, " size"]
    scale: Float[Array, " size"] | None
    mean: Float[Array, " size"] | None
    var: Float[Array, " size"] | None
    adapted: bool = eqx.field(static=True)
    eps: float = eqx.field(static=True)
    momentum: float = eqx.field(static=True)
    use_running_average: bool = eqx.field(static=True)

    def __init__(self, size: int, *, scale: bool = False, adapted: bool = False, eps: float = 1e-3):
        self.shift = jnp.zeros(size)
        self.scale = jnp.ones(size) if scale else None
        self.mean = self.var = None
        self.adapted = adapted
        self.eps = eps
        self.momentum = 0.9
        self.use_running_average = False

    def tracking(self) -> BatchNorm:
        """Return the layer with running statistics, 0 and 1 to start from."""
        start = (jnp.zeros_like(self.shift), jnp.ones_like(self.shift))
        return self._with(start)

    def forgetting(self) -> BatchNorm:
        """Return the layer without running statistics."""
        return self._with((None, None))

    def __call__(
        self, x: Float[Array, "n *hw size"], pool: Pool | None = None
    ) -> Float[Array, "n *hw2 size"]:
        """Return `γ (x − E x) / √(Var x + ε) + β`, moments over all axes but the last.

        Args:
            x: a batch.
            pool: pools by the maximum. The result is `pool` of that, and pooled before it is
                normalised, of which a quarter is then left to do.
        """
        pooled = x if pool is None else self._pooled(x, pool)
        if self.use_running_average and self.mean is not None and self.var is not None:
            return self._normalised(pooled, self.mean, self.var)
        dtype, x = x.dtype, wide(x)
        # E[d²] − E[d]² takes one pass, and loses no digits when d is taken about any value of
        # the channel; the result does not depend on which, so its derivative may be cut.
        about, mean, variance = _moments_seen(x)
        y = self._normalised(wide(pooled) - about, mean, variance).astype(dtype)
        if self.mean is None:
            return y
        running, now = (self.mean, self.var), (about + mean, variance)
        updated = jax.tree.map(lambda r, n: self.momentum * r + (1 - self.momentum) * n,
                               running, now)  # fmt: skip
        observed: Array = observe(y, running, updated)
        return observed

    def _pooled(self, x: Array, pool: Pool) -> Array:
        """Pool by what is the largest once it is multiplied by γ."""
        if self.scale is None:
            return pool(x)
        sign = lax.stop_gradient(jnp.where(self.scale < 0, -1, 1).astype(x.dtype))
        return pool(x * sign) * sign

    def _with(self, statistics: tuple[Array | None, Array | None]) -> BatchNorm:
        where = lambda layer: (layer.mean, layer.var)  # noqa: E731
        layer: BatchNorm = eqx.tree_at(where, self, statistics, is_leaf=lambda leaf: leaf is None)
        return layer

    def _normalised(self, x: Array, mean: Array, variance: Array) -> Array:
        gain = lax.rsqrt(variance + self.eps)
        gain = gain if self.scale is None else gain * self.scale
        return x * gain + (self.shift - mean * gain)


def _moments_seen(x: Array) -> tuple[Array, Array, Array]:
    """Return a value of every channel, and mean less that value and variance of what counts.

    Raises:
        ValueError: if the batch has weights and `x` does not lead with its examples.
    """
    weight = weights.seen()
    if weight is None:
        about = lax.stop_gradient(x[(0,) * (x.ndim - 1)])
        return about, *moments(x, about)
    if len(weight) != len(x):
        raise ValueError(
            f"batch normalisation of {len(x)} rows was given the weights of {len(weight)} examples;"
            " keep the axis of examples first, or give tasks of one size"
        )
    about = lax.stop_gradient(x[(jnp.argmax(weight > 0), *(0,) * (x.ndim - 2))])
    axes = tuple(range(x.ndim - 1))
    share = weight / jnp.sum(weight) * (weight.size * x.shape[-1] / x.size)
    share = share.astype(x.dtype).reshape(-1, *(1,) * (x.ndim - 1))
    d = jnp.where(share > 0, x - about, 0)
    mean = jnp.sum(share * d, axes)
    return about, mean, jnp.sum(share * d * d, axes) - mean * mean


@jax.custom_jvp
def moments(x: Array, about: Array) -> tuple[Array, Array]:
    """Return mean, less `about`, and variance of every channel, the last axis.

    Args:
        x: channels last.
        about: a number a channel near them, so that no digits are lost; it is not differentiated.
    """
    axes, rows = tuple(range(x.ndim - 1)), _rows(x)
    if rows is None:
        d = x - about
        mean = jnp.mean(d, axes)
        return mean, jnp.mean(d * d, axes) - mean * mean
    width = rows.shape[1]
    tiled = jnp.tile(about, width // len(about))

    def add(sums: Any, row: Array) -> Any:
        d = row - tiled
        return (sums[0] + d, sums[1] + d * d), None

    zero = jnp.zeros(width, x.dtype)
    sums = lax.scan(add, (zero, zero), rows)[0]
    first, second = (s.reshape(-1, len(about)).sum(0) / (x.size / len(about)) for s in sums)
    return first, second - first * first


@moments.defjvp
def _moments_jvp(primals: Any, tangents: Any) -> Any:
    (x, about), (dx, _) = primals, tangents
    axes = tuple(range(x.ndim - 1))
    mean, variance = moments(x, about)
    return (mean, variance), (
        jnp.mean(dx, axes),
        2 * jnp.mean((x - lax.stop_gradient(about) - mean) * dx, axes),
    )


def _rows(x: Array) -> Array | None:
    """Return a large array in rows that stay in a core's first cache; `None` if it is not large.

    XLA's CPU backend reads such an array twice for two sums, and writes the differences out.
    """
    width = x.shape[-1]
    for size in reversed(x.shape[:-1]):
        if width * size > 4096:
            break
        width *= size
    if jax.default_backend() != "cpu" or x.size < 64 * 4096 or width < 256:
        return None
    return x.reshape(-1, width)

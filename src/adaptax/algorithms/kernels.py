"""Covariances of Gaussian processes, which can be differentiated twice in everything."""

from __future__ import annotations

import math
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Kind = Literal["rbf", "matern52"]
"""Kernels by name: `exp(−r²/2)`, and Matérn's of smoothness 5/2."""


class Kernel(eqx.Module):
    """`k(a, b) = s² κ(‖a − b‖ / ℓ)`, and the noise σ of targets; all kept as logarithms.

    Args:
        kind: κ.
        amplitude: s.
        lengthscale: ℓ.
        noise: σ.
    """

    kind: Kind = eqx.field(static=True)
    log_amplitude: Float[Array, ""]
    log_lengthscale: Float[Array, ""]
    log_noise: Float[Array, ""]

    def __init__(self, kind: Kind, amplitude: float, lengthscale: float, noise: float):
        self.kind = kind
        self.log_amplitude = jnp.log(jnp.asarray(amplitude, float))
        self.log_lengthscale = jnp.log(jnp.asarray(lengthscale, float))
        self.log_noise = jnp.log(jnp.asarray(noise, float))

    def __call__(
        self, a: Float[Array, "n features"], b: Float[Array, "m features"]
    ) -> Float[Array, "n m"]:
        """Return the covariances of all pairs."""
        squares = _squared_distances(a, b) * jnp.exp(-2 * self.log_lengthscale)
        shape = jnp.exp(-squares / 2) if self.kind == "rbf" else _matern52(squares)
        return jnp.exp(2 * self.log_amplitude) * shape

    @property
    def noise_variance(self) -> Float[Array, ""]:
        """σ²."""
        return jnp.exp(2 * self.log_noise)

    def metrics(self) -> dict[str, Float[Array, ""]]:
        """Return s, ℓ and σ by name."""
        return {
            "amplitude": jnp.exp(self.log_amplitude),
            "lengthscale": jnp.exp(self.log_lengthscale),
            "noise": jnp.exp(self.log_noise),
        }


def _squared_distances(
    a: Float[Array, "n features"], b: Float[Array, "m features"]
) -> Float[Array, "n m"]:
    """Return `‖a − b‖²` of all pairs, about a common point, so that few digits cancel."""
    about = jax.lax.stop_gradient(jnp.mean(a, axis=0))
    a, b = a - about, b - about
    norms = jnp.sum(a**2, axis=1)[:, None] + jnp.sum(b**2, axis=1)
    return jnp.maximum(norms - 2 * jnp.matmul(a, b.T, precision="highest"), 0)


_ROOT = math.sqrt(5.0)


@jax.custom_jvp
def _matern52(q: Array) -> Array:
    """Return `(1 + √5 r + 5r²/3) exp(−√5 r)`, r = √q. Its derivatives at 0 are finite, √q's not."""
    r = jnp.sqrt(q)
    return (1 + _ROOT * r + 5 * q / 3) * jnp.exp(-_ROOT * r)


@_matern52.defjvp
def _matern52_jvp(primals: Any, tangents: Any) -> Any:
    (q,), (dq,) = primals, tangents
    return _matern52(q), _matern52_slope(q) * dq


@jax.custom_jvp
def _matern52_slope(q: Array) -> Array:
    """Return the derivative with respect to q, `−5/6 (1 + √5 r) exp(−√5 r)`."""
    r = jnp.sqrt(q)
    return -5 / 6 * (1 + _ROOT * r) * jnp.exp(-_ROOT * r)


@_matern52_slope.defjvp
def _matern52_slope_jvp(primals: Any, tangents: Any) -> Any:
    (q,), (dq,) = primals, tangents
    # Where q is 0 its root has no derivative; a third one is taken for 0 there.
    r = jnp.where(q > 0, jnp.sqrt(jnp.where(q > 0, q, 1)), 0)
    return _matern52_slope(q), 25 / 12 * jnp.exp(-_ROOT * r) * dq

"""The linear feature baseline of rllab, which MAML's experiments use."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .advantages import kept

REGULARISATION = 1e-5
"""Ridge that the fit starts with."""

TRIES = 6
"""Fits, each with ten times the ridge, before it is left at that."""


def features(observations: Float[Array, "n t o"]) -> Float[Array, "n t f"]:
    """`[o, o², τ, τ², τ³, 1]` with o clipped to ±10 and `τ = t/100`; `f = 2·o + 4`."""
    o = jnp.clip(observations, -10.0, 10.0)
    n, length = o.shape[:2]
    time = jnp.arange(length, dtype=o.dtype) / 100
    curve = jnp.stack([time, time**2, time**3, jnp.ones_like(time)], axis=-1)
    return jnp.concatenate([o, o**2, jnp.broadcast_to(curve, (n, length, 4))], axis=-1)


def fitted_values(
    observations: Float[Array, "n t o"],
    returns: Float[Array, "n t"],
    mask: Float[Array, "n t"],
) -> Float[Array, "n t"]:
    """The returns as the ridge regression on `features` sees them, fitted on these very steps.

        w = (ΦᵀΦ + ρI)⁻¹ ΦᵀR,   V = Φw

    ρ is 1e-5, and ten times more, up to five times, while the solution is not finite.

    Args:
        observations: of n episodes of t steps.
        returns: what to fit.
        mask: 1 for the steps that count; the values of the others are 0.
    """
    phi = jnp.where(mask[..., None] > 0, features(observations), 0.0)
    rows = phi.reshape(-1, phi.shape[-1])
    gram, moment = rows.T @ rows, rows.T @ kept(returns, mask).ravel()
    eye = jnp.eye(len(gram), dtype=gram.dtype)

    def solve(ridge: Array) -> Array:
        return jax.scipy.linalg.solve(gram + ridge * eye, moment, assume_a="pos")

    def unfinished(carry: tuple[Array, Array, Array]) -> Array:
        weights, _, tries = carry
        return ~jnp.all(jnp.isfinite(weights)) & (tries < TRIES)

    def again(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        _, ridge, tries = carry
        return solve(10 * ridge), 10 * ridge, tries + 1

    ridge = jnp.asarray(REGULARISATION, gram.dtype)
    weights, _, _ = jax.lax.while_loop(unfinished, again, (solve(ridge), ridge, jnp.array(1)))
    return phi @ weights

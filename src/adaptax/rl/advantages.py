"""Discounted returns, generalised advantages, and their standardisation."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..tree import wide


def discounted(rewards: Float[Array, "*n t"], discount: float) -> Float[Array, "*n t"]:
    """`R_t = r_t + γ R_{t+1}`, with `R_T = 0`.

    Args:
        rewards: 0 after the end of an episode.
        discount: γ.
    """

    def back(after: Array, now: Array) -> tuple[Array, Array]:
        total = now + discount * after
        return total, total

    along = jnp.moveaxis(rewards, -1, 0)
    _, totals = jax.lax.scan(back, jnp.zeros_like(along[0]), along, reverse=True)
    return jnp.moveaxis(totals, 0, -1)


def gae(
    rewards: Float[Array, "*n t"],
    values: Float[Array, "*n t"],
    discount: float,
    decay: float,
) -> Float[Array, "*n t"]:
    """Generalised advantage estimates (Schulman et al. 2016, arXiv:1506.02438).

        Â_t = Σ_l (γλ)^l δ_{t+l},   δ_t = r_t + γ V_{t+1} − V_t,   V_T = 0

    With λ = 1 that is `R_t − V_t`, with λ = 0 the one-step error `δ_t`. As in MAML's code,
    nothing is bootstrapped where the horizon cuts an episode.

    Args:
        rewards: 0 after the end of an episode.
        values: of the baseline, 0 after the end of an episode.
        discount: γ.
        decay: λ.
    """
    after = jnp.concatenate([values[..., 1:], jnp.zeros_like(values[..., :1])], axis=-1)
    return discounted(rewards + discount * after - values, discount * decay)


def masked_mean(values: Float[Array, "*n"], mask: Float[Array, "*n"]) -> Float[Array, ""]:
    """Mean of the entries whose mask is 1, whatever the others are; 0 if there is none."""
    return jnp.sum(kept(values, mask)) / jnp.maximum(jnp.sum(mask), 1.0)


def kept(values: Float[Array, "*n"], mask: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """The entries whose mask is 1, and 0 for the others, though they be infinite or NaN."""
    return jnp.where(mask > 0, wide(values) * mask, 0.0)


def standardise(values: Float[Array, "*n"], mask: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """Shifted and scaled to mean 0 and standard deviation 1 where the mask is 1; 0 elsewhere."""
    centred = kept(values - masked_mean(values, mask), mask)
    spread = jnp.sqrt(masked_mean(centred**2, mask))
    return centred / (spread + 1e-8)

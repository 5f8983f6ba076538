"""The terms of LEO's objective, its dropout, and what bounds and scales gradients."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, PRNGKeyArray, PyTree

from .. import inner, roles, tree
from ..task import Model

COLLAPSED = 1e-6
"""Standard deviations below which `collapse` speaks."""


class Course(NamedTuple):
    """What happens to a support set: the codes' distribution, a draw of it, both inner loops."""

    mean: Float[Array, ...]
    std: Float[Array, ...]
    noise: Float[Array, ...] | None
    start: Float[Array, ...]
    latent: inner.Descent
    tuned: inner.Descent


def sampled_kl(
    mean: Float[Array, "*codes"], std: Float[Array, "*codes"], noise: Float[Array, "*codes"]
) -> Float[Array, ""]:
    """Return `mean [log q(z) − log N(z; 0, 1)]` at the sample `z = m + σε`, over entries.

    Its mean over ε is the KL divergence `½(σ² + m² − 1 − log σ²)`. With ε for `(z − m)/σ`, which
    loses its digits where σ is small.

    Args:
        mean: m.
        std: σ.
        noise: ε.
    """
    return jnp.mean(((mean + std * noise) ** 2 - noise**2) / 2 - jnp.log(std))


def encoder_penalty(start: Float[Array, "*codes"], end: Float[Array, "*codes"]) -> Float[Array, ""]:
    """`mean (stop(z') − z)²`, which draws the encoder to what adaptation finds.

    Args:
        start: z, as encoded.
        end: z', as adapted.
    """
    return jnp.mean((jax.lax.stop_gradient(end) - start) ** 2)


def correlation(rows: Float[Array, "n m"]) -> Float[Array, ""]:
    """`mean (C − I)²`, C the correlations `w_i·w_j / ‖w_i‖‖w_j‖` of the rows: 0 if orthogonal."""
    unit = rows / (jnp.linalg.norm(rows, axis=1, keepdims=True) + 1e-32)
    return jnp.mean((unit @ unit.T - jnp.eye(len(rows), dtype=rows.dtype)) ** 2)


def weight_decay(networks: PyTree) -> Float[Array, ""]:
    """`½ Σ ‖W‖²` over the matrices of the networks."""
    leaves = (leaf for leaf in jax.tree.leaves(tree.parameters(networks)) if leaf.ndim == 2)
    return sum((jnp.sum(tree.wide(leaf) ** 2) for leaf in leaves), jnp.zeros(())) / 2


def kept(key: PRNGKeyArray, rate: float, shape: tuple[int, ...]) -> Bool[Array, ...]:
    """Which entries a dropout of this rate keeps.

    Sixteen random bits decide for an entry, half of those of `jax.random.bernoulli`, since random
    bits are much of what a meta-step costs: a rate is one to 2⁻¹⁶.
    """
    size = math.prod(shape)
    words = jax.random.bits(key, ((size + 1) // 2,), jnp.uint32)
    halves = jax.lax.bitcast_convert_type(words, jnp.uint16).ravel()[:size]
    return halves.reshape(shape) < _threshold(rate)


def _threshold(rate: float) -> int:
    """How many of the 2¹⁶ draws are kept."""
    return max(round((1 - rate) * 2**16), 1)


def dropped(x: Float[Array, ...], key: PRNGKeyArray | None, rate: float) -> Float[Array, ...]:
    """Entries zeroed at a rate and the others scaled up, so that the mean is kept.

    Args:
        x: any array.
        key: of what is dropped; without it nothing is.
        rate: in [0, 1), to 2⁻¹⁶.
    """
    if key is None or _threshold(rate) == 2**16:
        return x
    return jnp.where(kept(key, rate, x.shape), x * (2**16 / _threshold(rate)), 0)


class Dropping(eqx.Module):
    """A model whose inputs drop out."""

    model: Model
    key: PRNGKeyArray
    rate: float = eqx.field(static=True)

    def __call__(self, x: Float[Array, "n ..."]) -> PyTree:
        """Predictions."""
        return self.model(dropped(x, self.key, self.rate))


def dropping(model: Model, key: PRNGKeyArray | None, rate: float) -> Model:
    """Return the model with dropout on its inputs, and other keys of its own."""
    if key is None:
        return model
    model = roles.fresh(model, key)
    return model if rate == 0 else Dropping(model, key, rate)


def clip_each_by_norm(limit: float) -> optax.GradientTransformation:
    """Scales each array of the gradient down to a norm of `limit`, if it is above."""

    def clip(g: Array, _: Any) -> Array:
        norm = jnp.linalg.norm(g.ravel())
        return jnp.where(norm > limit, g * (limit / jnp.where(norm > 0, norm, 1)), g)

    return optax.stateless_with_tree_map(clip)


def bounded(limit: float | None) -> optax.GradientTransformation:
    """Scale what an inner loop descends down to a norm of `limit`, if there is one.

    By the root of `max(‖g‖², limit²)`, which has a derivative where g is zero.
    """
    if limit is None:
        return optax.identity()

    def bound(grads: PyTree, _: Any) -> PyTree:
        square = sum(jnp.sum(tree.wide(g) ** 2) for g in jax.tree.leaves(grads))
        factor = limit / jnp.sqrt(jnp.maximum(square, limit**2))
        return tree.in_types_of(grads, optax.tree.scale(factor, grads))

    return optax.stateless(bound)


def scaled(units: Mapping[str, float]) -> optax.GradientTransformation:
    """Multiply the updates of the parts of a dict that have a unit by it."""

    def scale(updates: dict[str, PyTree], _: Any) -> dict[str, PyTree]:
        return {n: optax.tree.scale(units.get(n, 1.0), part) for n, part in updates.items()}

    return optax.stateless(scale)


def collapse(metrics: Mapping[str, Any], alike: str, *, random: bool, points: bool) -> str | None:
    """Return a sentence if codes coincide or their noise is gone, else `None`; see `LEO.collapsed`.

    Args:
        metrics: `latent_spread` and `latent_std`.
        alike: words for codes that coincide, with a place for how far apart they are.
        random: codes know nothing of the support by choice.
        points: codes have no noise by choice.
    """
    spread, std = (float(metrics.get(name, 1)) for name in ("latent_spread", "latent_std"))
    if spread < COLLAPSED and not random:
        return (
            f"LEO's latent has collapsed: {alike.format(spread)} and say nothing of the support; "
            "lower kl_weight or the outer step size"
        )
    if std < COLLAPSED and not points:
        return (
            f"LEO's latent has collapsed: the noise of its codes is {std:.1e}, so they are points; "
            "raise kl_weight, or say stochastic=False if that is wanted"
        )
    return None

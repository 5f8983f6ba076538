"""Particles, the models of an ensemble: where they start, and what they learn from."""

from __future__ import annotations

import math

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray, PyTree

from .. import program, roles, tree
from ..learner import Ensemble
from ..task import Batch, Model, Source


def around(
    model: Model,
    count: int,
    spread: float,
    key: PRNGKeyArray,
    differ: PyTree = None,
    train_only: tree.Predicate | None = None,
) -> Ensemble:
    """Return a model, and others like it: where the particles of a learner start.

    The others have arrays drawn about the mean of the model's over their entries:
    `mean + √(1 − s²) (θ − mean) + s · std · ε`, std that over entries.

    Args:
        model: the first particle.
        count: how many there are to be, M.
        spread: s, in (0, 1]. With 1 the others are independent of the arrays, and of their scale.
        key: of the draws.
        differ: a mask of the arrays to draw, the others are shared; all parameters if `None`.
        train_only: a predicate on paths choosing what is drawn of those; the others are equal.

    Raises:
        ValueError: if none of the arrays varies over its entries, so that all would be equal.
    """
    mask = roles.trained(model) if differ is None else differ
    arrays, shared = eqx.partition(model, mask)

    drawn = program.call(_draw, arrays, count, spread, key, train_only)
    leaves = jax.tree.leaves(drawn)
    known = count > 1 and not any(isinstance(leaf, jax.core.Tracer) for leaf in leaves)
    if known and all(jnp.array_equal(leaf[0], leaf[1]) for leaf in leaves):
        raise ValueError(
            "every parameter that particles would differ in is constant over its entries, so that "
            "nothing tells how far apart to start; start from an Ensemble of models instead"
        )
    return Ensemble(drawn, shared)


def _draw(
    arrays: PyTree,
    count: int,
    spread: float,
    key: PRNGKeyArray,
    train_only: tree.Predicate | None,
) -> PyTree:
    def draw(path: str, leaf: Array, noise: Array) -> Array:
        if not (train_only or tree.every)(path):
            return jnp.broadcast_to(leaf, (count, *leaf.shape))
        mean, std = jnp.mean(leaf), jnp.std(leaf)
        others = mean + math.sqrt(1 - spread**2) * (leaf - mean) + spread * std * noise
        return jnp.concatenate([leaf[None], others])

    tiled = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (count - 1, *leaf.shape)), arrays)
    return jax.tree.map(draw, tree.paths(arrays), arrays, tree.noise_like(key, tiled))


def start(
    model: Model,
    count: int,
    spread: float,
    key: PRNGKeyArray,
    train_only: tree.Predicate | None = None,
) -> Ensemble:
    """Return an `Ensemble` of models with arrays of their own: one that is given, or `around`."""
    if isinstance(model, Ensemble):
        return given(model, count)
    return around(model, count, spread, key, train_only=train_only).stacked()


def given(ensemble: Ensemble, count: int) -> Ensemble:
    """Return the ensemble with arrays of their own for all models.

    Raises:
        ValueError: unless it has as many models as the learner has particles.
    """
    if ensemble.particles != count:
        raise ValueError(
            f"the learner has particles={count}, and was given an ensemble of "
            f"{ensemble.particles}; make the two equal"
        )
    return ensemble.stacked()


def check(count: int, spread: float) -> None:
    """Validate count and spread, as `around` has them.

    Raises:
        ValueError: if there are no particles, or all would start equal.
    """
    if count < 1:
        raise ValueError(f"particles is 1 or more, not {count}")
    if not 0 < spread <= 1:
        raise ValueError(
            f"spread is above 0 and at most 1, not {spread}: particles that start equal stay equal"
        )


def nonempty(source: Source, name: str) -> Source:
    """Return the source.

    Args:
        source: where batches come from.
        name: what the task calls it.

    Raises:
        ValueError: if it is a batch without examples: there is no mean over it.
    """
    if isinstance(source, Batch) and source.size == 0:
        raise ValueError(f"the task's {name} has no examples; sample tasks with at least one")
    return source

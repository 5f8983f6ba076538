"""Particles: models that differ in some parameters, where they start, and what they learn from."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray, PyTree

from .. import tree
from ..learner import Ensemble
from ..task import Batch, Model, Source

T = TypeVar("T")


class Particles(eqx.Module):
    """M models that differ in some of their parameters and share the others.

    Args:
        each: the parameters that differ, leading with an axis of M; `None` in place of the others.
        shared: everything else; `None` in place of those.
    """

    each: PyTree
    shared: PyTree

    def __call__(self, x: PyTree) -> PyTree:
        """Predictions `(particles, n, out)`."""
        return self.map(lambda model: model(x))

    def map(self, function: Callable[[Model], T]) -> T:
        """The function of every model, results leading with an axis of M."""
        return jax.vmap(lambda own: function(eqx.combine(own, self.shared)))(self.each)

    def ensemble(self, axis: int = 0) -> Ensemble:
        """The same models, each with parameters of its own.

        Args:
            axis: where the axis of M is in `each`, and shall be in all arrays.
        """
        count = jax.tree.leaves(self.each)[0].shape[axis]

        def repeat(leaf: Any) -> Any:
            if not eqx.is_array(leaf):
                return leaf
            shape = (*leaf.shape[:axis], count, *leaf.shape[axis:])
            return jnp.broadcast_to(jnp.expand_dims(leaf, axis), shape)

        return Ensemble(eqx.combine(self.each, jax.tree.map(repeat, self.shared)))


def around(arrays: PyTree, count: int, spread: float, key: PRNGKeyArray) -> PyTree:
    """The arrays, and others like them, stacked: where the particles of a learner start.

    The others are drawn about the mean of an array over its entries:
    `mean + √(1 − s²) (θ − mean) + s · std · ε`, std that over entries.

    Args:
        arrays: a pytree of them.
        count: how many to stack, M.
        spread: s, in (0, 1]. With 1 the others are independent of the arrays, and of their scale.
        key: of the draws.

    Raises:
        ValueError: if none of the arrays varies over its entries, so that all would be equal.
    """

    def draw(leaf: Array, noise: Array) -> Array:
        mean, std = jnp.mean(leaf), jnp.std(leaf)
        others = mean + math.sqrt(1 - spread**2) * (leaf - mean) + spread * std * noise
        return jnp.concatenate([leaf[None], others])

    @eqx.filter_jit
    def draw_all(arrays: PyTree, key: PRNGKeyArray) -> PyTree:
        tiled = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (count - 1, *leaf.shape)), arrays)
        return jax.tree.map(draw, arrays, tree.noise_like(key, tiled))

    drawn = draw_all(arrays, key)
    leaves = jax.tree.leaves(drawn)
    known = count > 1 and not any(isinstance(leaf, jax.core.Tracer) for leaf in leaves)
    if known and all(jnp.array_equal(leaf[0], leaf[1]) for leaf in leaves):
        raise ValueError(
            "every parameter that particles would differ in is constant over its entries, so that "
            "nothing tells how far apart to start; start from an Ensemble of models instead"
        )
    return drawn


def check(count: int, spread: float) -> None:
    """Whether so many particles can start so far apart.

    Args:
        count: M.
        spread: as `around` has it.

    Raises:
        ValueError: if not.
    """
    if count < 1:
        raise ValueError(f"particles is 1 or more, not {count}")
    if not 0 < spread <= 1:
        raise ValueError(
            f"spread is above 0 and at most 1, not {spread}: particles that start equal stay equal"
        )


def demand(ensemble: Ensemble, count: int) -> None:
    """That an ensemble has as many models as a learner has particles.

    Args:
        ensemble: given to start from.
        count: M.

    Raises:
        ValueError: if it has not.
    """
    if ensemble.particles != count:
        raise ValueError(
            f"the learner has particles={count}, and was given an ensemble of "
            f"{ensemble.particles}; make the two equal"
        )


def nonempty(source: Source, name: str) -> Source:
    """The source, unless it is a batch without examples.

    Args:
        source: where batches come from.
        name: what the task calls it.

    Raises:
        ValueError: if it is such a batch: there is no mean over it.
    """
    if isinstance(source, Batch) and source.size == 0:
        raise ValueError(f"the task's {name} has no examples; sample tasks with at least one")
    return source

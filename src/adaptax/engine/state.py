"""What meta-training carries from chunk to chunk, and keeps in a checkpoint."""

from __future__ import annotations

import dataclasses
import math
import warnings
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PRNGKeyArray, PyTree

from .. import roles
from ..learner import Meta, MetaLearner
from ..task import Model
from .run import differences
from .steps import Outer


class State(eqx.Module):
    """Everything that training depends on, besides its arguments: what a checkpoint holds.

    The best meta-parameters by validation lead with an axis of ranks, the best of all first, as
    do their scores (minus infinity where there are not so many yet) and steps.
    """

    step: Array
    meta: PyTree
    opt_state: PyTree
    best: PyTree
    best_score: Array
    best_step: Array
    stale: Array


def initial_state(
    learner: MetaLearner,
    model: Model,
    optimizer: optax.GradientTransformation | Outer,
    key: PRNGKeyArray,
    keep: int = 1,
) -> tuple[State, PyTree]:
    """The state before the first meta-step, and what of the meta-parameters is not trained.

    Variables that the model shares are in one place, in both.
    """
    meta = roles.deduplicate(learner.init(model, key=key))
    trained, fixed = eqx.partition(meta, learner.trained(meta))
    zero = jnp.zeros((), jnp.int32)
    best = jax.tree.map(lambda leaf: jnp.repeat(leaf[None], keep, axis=0), trained)
    state = State(
        step=zero,
        meta=trained,
        opt_state=optimizer.init(trained),
        best=best,
        best_score=jnp.full(keep, -jnp.inf),
        best_step=jnp.zeros(keep, jnp.int32),
        stale=zero,
    )
    return copied(state), fixed


def copied(state: PyTree) -> PyTree:
    """The arrays copied, of no weak type.

    The compiled program reuses the memory of its arguments, and the caller's arrays stay. With a
    dtype, as the program returns them: a weak one would have it compiled a second time.
    """
    return jax.tree.map(lambda leaf: jnp.array(leaf, leaf.dtype, copy=True), state)


def shaped(trained: PyTree, fixed: PyTree) -> PyTree:
    """What of a model a resumed run compares: not the values that are trained, since those of the
    checkpoint take their place, but their shapes."""
    shape = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)  # noqa: E731
    return eqx.combine(jax.tree.map(shape, trained), fixed)


def best_of(state: State, fixed: PyTree) -> tuple[Meta, int, float, Meta]:
    """The best meta-parameters of a state, their step and score, and all that are kept."""
    count = max(int(jnp.isfinite(state.best_score).sum()), 1)
    kept = jax.tree.map(lambda leaf: leaf[:count], state.best)
    best = jax.tree.map(lambda leaf: leaf[0], kept)
    stacked = jax.tree.map(
        lambda leaf: jnp.repeat(leaf[None], count, axis=0) if eqx.is_array(leaf) else leaf, fixed
    )
    best, kept = roles.reshare((eqx.combine(best, fixed), eqx.combine(kept, stacked)))
    return best, int(state.best_step[0]), float(state.best_score[0]), kept


def select(state: State, score: float) -> State:
    """Keep the current meta-parameters if they are among the best so far."""
    score = -math.inf if math.isnan(score) else score
    score = float(np.asarray(score, state.best_score.dtype))  # as it was kept
    scores = np.append(state.best_score, score)
    # Stable: of equals the earlier stays ahead.
    order = np.argsort(-scores, kind="stable")[:-1]

    def ranked(best: Array, now: Array) -> Array:
        return jnp.concatenate([best, now[None]])[order]

    improved = score > float(state.best_score[0])
    return dataclasses.replace(
        state,
        best=jax.tree.map(ranked, state.best, state.meta),
        best_score=ranked(state.best_score, jnp.array(score, state.best_score.dtype)),
        best_step=ranked(state.best_step, state.step),
        stale=jnp.zeros((), jnp.int32) if improved else state.stale + 1,
    )


def reselect(state: State, before: Any, now: dict[str, Any]) -> State:
    """The state, without what was selected by another validation, whose scores say nothing now."""
    if before is None or not (changed := differences(before, now)):
        return state
    warnings.warn(
        f"the run is validated in another way than before its break: {changed}; the best so far no "
        "longer counts, and the selection begins anew",
        stacklevel=4,
    )
    return dataclasses.replace(
        state,
        best=jax.tree.map(
            lambda best, now: jnp.broadcast_to(now, best.shape), state.best, state.meta
        ),
        best_score=jnp.full_like(state.best_score, -jnp.inf),
        best_step=jnp.zeros_like(state.best_step),
        stale=jnp.zeros((), jnp.int32),
    )

"""What a meta-step is: the gradient and an optax rule, or an outer step of its own kind."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from .. import program, tree
from ..learner import Meta, MetaLearner
from ..task import Task, TaskDistribution
from . import feed
from .mapping import Mapping, first, meta_gradient, task_gradient
from .work import Work, work


@runtime_checkable
class Outer(Protocol):
    """An outer step of its own kind, where a gradient and an optax rule will not do.

    Both methods are pure and traceable; `fit` calls `step` inside its compiled program. See
    `adaptax.rl.TRPO`.
    """

    def init(self, trained: PyTree) -> PyTree:
        """The state to start from, for these trained meta-parameters."""
        ...

    def step(
        self,
        learner: MetaLearner,
        meta: Meta,
        state: PyTree,
        tasks: Task,
        *,
        key: PRNGKeyArray,
        progress: float | Array,
        mesh: Mesh | None = None,
    ) -> tuple[Meta, PyTree, Float[Array, ""], dict[str, Array]]:
        """New meta-parameters and state, a loss and metrics.

        Args:
            learner: any that it can do with.
            meta: the meta-parameters.
            state: its own.
            tasks: a meta-batch; arrays lead with the task axis.
            key: all the randomness there is.
            progress: in `[0, 1]`, how far meta-training has come.
            mesh: of devices to share the tasks among; see `adaptax.engine.mapping.over_devices`.
        """
        ...


def meta_steps(
    learner: MetaLearner,
    optimizer: optax.GradientTransformation,
    outer: Outer | None,
    meta_batch: int,
    steps: int,
    mapping: Mapping,
    mesh: Mesh | None,
) -> Callable[..., Any]:
    """A chunk of meta-steps as one function.

    A step that is not finite does not change the state, and neither do those after it: the
    function ends with the last good state.
    """

    def descend(given: PyTree, state: PyTree, loaded: PyTree) -> Any:
        (tasks, key, fixed), (step, trained, opt_state) = given, state
        (loss, metrics), grads = meta_gradient(
            learner,
            eqx.combine(trained, fixed),
            loaded,
            jax.tree_util.Partial(feed.task, tasks),
            key=jax.random.fold_in(key, step),
            count=meta_batch,
            progress=step / steps,
            mapping=mapping,
            mesh=mesh,
        )
        updates, opt_state = optimizer.update(grads, opt_state, trained)
        logs = {"loss": loss, "gradient_norm": tree.norm(grads), **metrics}
        new = optax.apply_updates(trained, updates)
        return (new, opt_state), tree.finite((grads, new)), logs

    def given_step(outer: Outer, given: PyTree, state: PyTree, loaded: PyTree) -> Any:
        (tasks, key, fixed), (step, trained, opt_state) = given, state
        meta, opt_state, loss, metrics = outer.step(
            learner,
            eqx.combine(trained, fixed),
            opt_state,
            eqx.filter_vmap(lambda loaded: feed.task(tasks, loaded))(loaded),
            key=jax.random.fold_in(key, step),
            progress=step / steps,
            mesh=mesh,
        )
        trained = eqx.filter(meta, learner.trained(meta))
        return (trained, opt_state), tree.finite(meta), {"loss": loss, **metrics}

    def meta_step(given: PyTree, carry: PyTree, loaded: PyTree) -> tuple[PyTree, dict[str, Array]]:
        state, good = carry
        how = descend if outer is None else functools.partial(given_step, outer)
        new, finite, logs = how(given, state, loaded)
        good = good & jnp.isfinite(logs["loss"]) & finite
        kept = jax.tree.map(lambda new, old: jnp.where(good, new, old), (state[0] + 1, *new), state)
        return (kept, good), logs

    def chunk(
        given: tuple[TaskDistribution, PyTree, PRNGKeyArray, PyTree], state: PyTree
    ) -> tuple[PyTree, Array, dict[str, Array]]:
        tasks, loaded, key, fixed = given
        (state, good), logs = jax.lax.scan(
            lambda carry, loaded: meta_step((tasks, key, fixed), carry, loaded),
            (state, jnp.array(True)),
            loaded,
        )
        return state, good, logs

    return chunk


def task_work(learner: MetaLearner, meta: Meta, tasks: TaskDistribution, key: PRNGKeyArray) -> Work:
    """Return the work of the meta-gradient of one task."""
    loaded = feed.load(tasks, key, jnp.zeros(1, jnp.uint32))
    return program.call(_work, learner, meta, tasks, loaded, key)


def _work(
    learner: MetaLearner, meta: Meta, tasks: TaskDistribution, loaded: PyTree, key: PRNGKeyArray
) -> Work:
    trained, fixed = eqx.partition(meta, learner.trained(meta))

    def one(loaded: PyTree, trained: PyTree) -> Any:
        make = functools.partial(feed.task, tasks)
        return task_gradient(learner, trained, fixed, make, jnp.array(0.0), loaded, key)

    return work(one, first(loaded), trained)

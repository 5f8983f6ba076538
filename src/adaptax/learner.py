"""What every meta-learner answers, written for one task; mapping over tasks is done outside."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import optax
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from . import tree
from .losses import Loss
from .task import Model, Source, Task

Meta = Any
"""What a learner meta-learns: a pytree whose inexact arrays the outer loop trains."""


class MetaLearner(eqx.Module):
    """Abstract: learns, over many tasks, how to learn one.

    A learner is a frozen record of hyper-parameters and three pure functions. It never sees a
    task axis: `adaptax.meta_value_and_grad`, `fit` and `evaluate` map it over tasks.
    """

    loss: eqx.AbstractVar[Loss]

    def init(self, model: Model, *, key: PRNGKeyArray) -> Meta:
        """The meta-parameters to start from. Here: the model itself."""
        return model

    def adapt(self, meta: Meta, support: Source, *, key: PRNGKeyArray) -> Model:
        """The model (or `Ensemble`) that has learnt from `support`."""
        raise NotImplementedError  # pragma: no cover - abstract

    def meta_loss(
        self, meta: Meta, task: Task, *, key: PRNGKeyArray, progress: float | Array
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """The scalar that meta-training descends, and metrics to log.

        Args:
            meta: the meta-parameters.
            task: one task.
            key: all the randomness there is.
            progress: in `[0, 1]`, how far meta-training has come; drives every schedule.
        """
        raise NotImplementedError  # pragma: no cover - abstract

    def reference(
        self, meta: Meta, task: Task, *, at: Meta, key: PRNGKeyArray, progress: float | Array
    ) -> Float[Array, ""]:
        """The function of `meta` whose exact gradient, at `meta = at`, the meta-gradient is.

        Here: the meta-loss. A learner that stops gradients says here what it holds fixed: the
        same value, in which all that is stopped is computed from `at` instead of `meta`. Only
        `adaptax.testing.check_meta_gradient` asks, and takes finite differences of it.
        """
        return self.meta_loss(meta, task, key=key, progress=progress)[0]

    def iterates(
        self, meta: Meta, support: Source, *, key: PRNGKeyArray, steps: int | None = None
    ) -> Model:
        """The models on the way of adaptation, arrays leading with an axis of steps.

        Here: the adapted model alone, for learners that have no notion of a step.
        """
        return tree.stack([self.adapt(meta, support, key=key)])

    def optimizer(self, steps: int) -> optax.GradientTransformation:
        """The outer optimizer that `fit` uses unless told otherwise: Adam, 1e-3."""
        return optax.adam(1e-3)

    def describe(self) -> dict[str, Any]:
        """What a report says of the learner."""
        return {"algorithm": type(self).__name__}


class Ensemble(eqx.Module):
    """Models of one structure, stacked: predictions lead with a particle axis.

    Args:
        models: a model whose arrays lead with an axis of particles; see `adaptax.tree.stack`.
    """

    models: Model

    def __call__(self, x: PyTree) -> PyTree:
        """Predictions `(particles, n, out)`."""
        return eqx.filter_vmap(lambda model: model(x), in_axes=eqx.if_array(0))(self.models)

    @property
    def particles(self) -> int:
        """Number of models."""
        return len(jax.tree.leaves(tree.parameters(self.models))[0])


class Functional(eqx.Module):
    """A model made of a tree of parameters and a function: `apply(params, x)`.

    Args:
        params: any pytree.
        apply: a pure function of the parameters and a batch of inputs.
    """

    params: PyTree
    apply: Callable[[PyTree, Any], Any] = eqx.field(static=True)

    def __call__(self, x: PyTree) -> PyTree:
        """`apply(params, x)`."""
        return self.apply(self.params, x)

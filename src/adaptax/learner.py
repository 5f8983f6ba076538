"""What every meta-learner answers, written for one task; mapping over tasks is done outside."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from . import program, tree
from .losses import Loss
from .task import Model, Source, Task

Meta = Any
"""What a learner meta-learns: a pytree whose inexact arrays the outer loop trains."""


def _compiled(method: Callable[..., Any]) -> Callable[..., Any]:
    """`adapt` or `iterates` of a learner, run as one compiled program where values are known."""

    @functools.wraps(method)
    def run(self: MetaLearner, meta: Meta, support: Source, **how: Any) -> Any:
        values = jax.tree.leaves((self, meta, support, how))
        if any(isinstance(value, jax.core.Tracer) for value in values):
            return method(self, meta, support, **how)
        self.check(meta, support, **how)
        # The next answer of an object of the user's own may be another.
        if all(eqx.is_array_like(x) or callable(x) for x in jax.tree.leaves(support)):
            return program.call(_call, method, self, meta, support, how)
        return method(self, meta, support, **how)

    return run


def _call(method: Callable[..., Any], learner: Any, meta: Meta, support: Source, how: Any) -> Any:
    return method(learner, meta, support, **how)


class MetaLearner(eqx.Module):
    """Abstract: learns, over many tasks, how to learn one.

    A learner is a frozen record of hyper-parameters and three pure functions. It never sees a
    task axis: `adaptax.meta_value_and_grad`, `fit` and `evaluate` map it over tasks. `adapt` and
    `iterates` are compiled by themselves: see `adaptax.program`.
    """

    loss: eqx.AbstractVar[Loss]

    def __init_subclass__(cls, **how: Any) -> None:
        super().__init_subclass__(**how)
        for name in ("adapt", "iterates"):
            if inspect.isfunction(method := vars(cls).get(name)):
                setattr(cls, name, _compiled(method))

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

    def check(
        self, meta: Meta, support: Source, *, key: PRNGKeyArray, steps: int | None = None
    ) -> None:
        """Raise for a support of wrong values; `adapt` and `iterates` ask where they are known."""

    @_compiled
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

    What all models have alike need not be repeated, nor what follows from it be computed more than
    once: an extractor of features runs once for all heads.

    Args:
        models: a model whose arrays lead with an axis of particles; see `adaptax.tree.stack`.
        shared: the model's other leaves, in place of which `models` has `None`; nothing if `None`.
    """

    models: Model
    shared: Model = None

    def __call__(self, x: PyTree) -> PyTree:
        """Predictions `(particles, n, out)`."""
        return self.map(lambda model: model(x))

    def map(self, function: Callable[..., PyTree], *more: PyTree) -> PyTree:
        """The function of every model, results leading with an axis of particles.

        Args:
            function: of a model, and of its part of `more`.
            more: arrays that lead with that axis, too.
        """
        each = lambda own, *more: function(self._whole(own), *more)  # noqa: E731
        return eqx.filter_vmap(each, in_axes=eqx.if_array(0))(self.models, *more)

    def member(self, index: int) -> Model:
        """One of the models."""
        return self._whole(tree.at(self.models, index))

    def stacked(self) -> Ensemble:
        """The same models, each with arrays of its own: nothing is shared."""
        if self.shared is None:
            return self
        arrays, rest = eqx.partition(self.shared, eqx.is_array)
        lead = lambda leaf: jnp.broadcast_to(leaf, (self.particles, *leaf.shape))  # noqa: E731
        return Ensemble(eqx.combine(self.models, jax.tree.map(lead, arrays), rest))

    @property
    def particles(self) -> int:
        """Number of models."""
        return len(jax.tree.leaves(tree.parameters(self.models))[0])

    @property
    def size(self) -> int:
        """Number of parameters of a model."""
        return tree.count(self.models) // self.particles + tree.count(self.shared)

    def _whole(self, own: Model) -> Model:
        return own if self.shared is None else eqx.combine(own, self.shared)


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

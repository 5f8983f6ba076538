"""What every meta-learner answers, written for one task; mapping over tasks is done outside."""

from __future__ import annotations

import abc
import copy
import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from . import modes, program, roles, tree
from .losses import Loss
from .task import Batch, Model, Source, Task
from .text import readable

Meta = Any
"""What a learner meta-learns: a pytree whose parameters the outer loop trains."""


def _sharing(init: Callable[..., Meta]) -> Callable[..., Meta]:
    """`init` of a learner, for models with shared variables; see `adaptax.roles`."""

    @functools.wraps(init)
    def run(self: MetaLearner, model: Model, **how: Any) -> Meta:
        return roles.kept(lambda once: init(self, once, **how), model)

    return run


def _compiled(method: Callable[..., Any]) -> Callable[..., Any]:
    """`adapt` or `iterates` of a learner, run as one compiled program where values are known."""

    @functools.wraps(method)
    def run(self: Adapter, meta: Meta, support: Any, **how: Any) -> Any:
        if getattr(self, "way", 0) is None:
            self = self.with_way(_largest_label(support))
        values = jax.tree.leaves((self, meta, support, how))
        if any(isinstance(value, jax.core.Tracer) for value in values):
            return roles.kept(lambda once: method(self, once, support, **how), meta)
        # Of the class, since Equinox binds slowly.
        type(self).check_support(self, meta, support, key=how["key"])
        # The next answer of an object of the user's own may be another.
        if all(eqx.is_array_like(x) or callable(x) for x in jax.tree.leaves(support)):
            return program.call(_call, method, self, meta, support, how)
        return roles.kept(lambda once: method(self, once, support, **how), meta)

    return run


def _largest_label(support: Any) -> int | None:
    """Return how many classes a support of known values has, by its largest label, if any."""
    known = isinstance(support, Batch) and eqx.is_array(support.y)
    traced = any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(support))
    if not known or traced or not jnp.issubdtype(support.y.dtype, jnp.integer):
        return None
    labels, weight = np.asarray(support.y), support.weight
    labels = labels if weight is None else labels[np.asarray(weight) > 0]
    return max(int(np.max(labels)) + 1, 1) if labels.size else None


def _call(method: Callable[..., Any], learner: Any, meta: Meta, support: Any, how: Any) -> Any:
    return method(learner, meta, support, **how)


class Adapter(eqx.Module):
    """Abstract: adapts to a task. Evaluation, prediction and figures ask no more of a learner.

    Define `adapt` or `iterates`; each follows from the other. Both are compiled by themselves:
    see `adaptax.program`.
    """

    loss: eqx.AbstractVar[Loss]
    title: ClassVar[str] = ""
    """Name in reports; that of the class if empty."""

    def __init_subclass__(cls, **how: Any) -> None:
        super().__init_subclass__(**how)
        for name, wrap in (("init", _sharing), ("adapt", _compiled), ("iterates", _compiled)):
            if inspect.isfunction(method := vars(cls).get(name)):
                setattr(cls, name, wrap(method))

    def __check_init__(self) -> None:
        own = type(self)
        if own.adapt is Adapter.adapt and own.iterates is Adapter.iterates:
            raise TypeError(f"{own.__name__} defines neither adapt nor iterates; define one")

    @_compiled
    def adapt(self, meta: Meta, support: Source, *, key: PRNGKeyArray) -> Model:
        """Return the model (or `Ensemble`) that has learnt from `support`. Here: the last iterate.

        Args:
            meta: the meta-parameters.
            support: what may be learnt from.
            key: all the randomness there is.
        """
        return tree.at(self.iterates(meta, support, key=key), -1)

    @_compiled
    def iterates(
        self, meta: Meta, support: Source, *, key: PRNGKeyArray, steps: int | None = None
    ) -> Model:
        """Return the models on the way of adaptation, arrays leading with an axis of steps.

        Here: the adapted model alone, for learners that have no notion of a step.
        """
        return tree.stack([self.adapt(meta, support, key=key)])

    def with_loss(self, loss: Loss) -> Any:
        """Return the same with another loss."""
        twin = copy.copy(self)
        # It may be a static field, out of reach of `eqx.tree_at`; the copy is ours to complete.
        object.__setattr__(twin, "loss", loss)
        return twin

    def with_way(self, way: int | None) -> Any:
        """Return the same for tasks of so many classes, where it has a `way` that is `None`.

        So a learner whose meta-parameters do not depend on the number of classes declares it:
        `way: int | None = None`. `fit` and `evaluate` say what the tasks have, and `adapt` what
        the largest label of the support tells.
        """
        if way is None or getattr(self, "way", 0) is not None:
            return self
        twin = copy.copy(self)
        object.__setattr__(twin, "way", way)
        return twin

    def check_support(self, meta: Meta, support: Any, *, key: PRNGKeyArray) -> None:
        """Raise for a support of wrong values; `adapt` and `iterates` ask where they are known."""

    def describe(self) -> dict[str, Any]:
        """Return name and hyper-parameters, as reports say them; those that are `None` left out."""
        own = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        said = {name: readable(value) for name, value in own.items() if value is not None}
        return {"algorithm": self.title or type(self).__name__, **said}


class MetaLearner(Adapter):
    """Abstract: learns, over many tasks, how to learn one.

    A learner is a frozen record of hyper-parameters and three pure functions, `init`, `adapt` and
    `meta_loss`. It never sees a task axis: `adaptax.meta_value_and_grad`, `fit` and `evaluate`
    map it over tasks.

    Args:
        train_only: a predicate on the leaf paths of the model choosing what the *outer* loop
            trains, such as `adaptax.tree.under("head")`; everything if `None`. The other leaves
            stay as they are, and so does what belongs to one of them alone: its learned rate, its
            variance. The inner loop may adapt them all the same; `adapt_only` leaves them out.
    """

    train_only: tree.Predicate | None = eqx.field(static=True, default=None, kw_only=True)

    def init(self, model: Model, *, key: PRNGKeyArray) -> Meta:
        """Return the meta-parameters to start from. Here: the model itself."""
        return model

    @abc.abstractmethod
    def meta_loss(
        self, meta: Meta, task: Task, *, key: PRNGKeyArray, progress: float | Array
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """Return the scalar that meta-training descends, and metrics to log.

        Args:
            meta: the meta-parameters.
            task: one task.
            key: all the randomness there is.
            progress: in `[0, 1]`, how far meta-training has come; drives every schedule.
        """

    def fallback(self, meta: Meta, task: Task, *, key: PRNGKeyArray) -> Float[Array, ""] | None:
        """Return what a task descends instead whose meta-loss or gradient is not finite.

        Not finite itself where the task's data are at fault. The metric `rescued` says how often.
        Here: `None`; meta-training ends with `TrainingDiverged`.
        """
        return None

    def trained(self, meta: Meta) -> PyTree[bool]:
        """Return which leaves the outer loop trains, as a tree of booleans.

        Raises:
            ValueError: if none is left, or a parameter is complex.
        """

        def chosen(path: str) -> bool:
            own = self.part_of(path, meta)
            return own is None or self.train_only is None or self.train_only(own)

        return tree.only(roles.trained(meta), chosen, "train_only")

    def part_of(self, path: str, meta: Meta) -> str | None:
        """Return the path in the model of the leaf that a leaf of the meta-parameters belongs to.

        Here: the path itself where the meta-parameters are a model; what follows the first name in
        those of an `Ensemble`, and of a dict with a `"model"`.

        Args:
            path: in the meta-parameters.
            meta: the meta-parameters.

        Returns:
            `None` for what belongs to no leaf alone, and is trained in any case.
        """
        if hasattr(meta, "particles") or (isinstance(meta, dict) and "model" in meta):
            return path.partition("/")[2] or None
        return path

    def optimizer(self, steps: int) -> optax.GradientTransformation:
        """Return the outer optimizer that `fit` uses unless told otherwise: Adam, 1e-3."""
        return optax.adam(1e-3)


class InnerLoop(MetaLearner):
    """Abstract: adapts by an inner loop of `inner_steps` steps, which are its iterates."""

    def __check_init__(self) -> None:
        modes.parse(getattr(self, "meta_gradient", "auto"))

    @property
    def steps(self) -> int:
        """Steps that `adapt` takes: `eval_steps`, or as many as in training if there are none."""
        # No abstract field, which would go before the fields of subclasses.
        own = getattr(self, "eval_steps", None)
        steps: int = getattr(self, "inner_steps", 0) if own is None else own
        return steps

    @abc.abstractmethod
    def course(
        self,
        meta: Meta,
        support: Source,
        *,
        key: PRNGKeyArray,
        steps: int,
        keep_path: bool = False,
    ) -> Model:
        """Return the model after `steps` steps; with `keep_path` those after 0, 1, … of them."""

    def adapt(self, meta: Meta, support: Source, *, key: PRNGKeyArray) -> Model:
        """Return the model after all `steps`."""
        return self.course(meta, support, key=key, steps=self.steps)

    def iterates(
        self, meta: Meta, support: Source, *, key: PRNGKeyArray, steps: int | None = None
    ) -> Model:
        """Return the models after 0, 1, … `steps` steps, by default all that `adapt` takes."""
        steps = self.steps if steps is None else steps
        return self.course(meta, support, key=key, steps=steps, keep_path=True)

    def describe(self) -> dict[str, Any]:
        """Return name and hyper-parameters, and how many steps `adapt` takes."""
        return {**super().describe(), "eval_steps": self.steps}


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

    Typed PRNG keys among the parameters are the randomness of the model: every pass of training
    gets others. With Flax Linen, for instance, dropout and batch normalisation included:

        variables = {**net.init(key, x), "key": jax.random.key(0)}   # "params", "batch_stats"

        def apply(v, x):
            v, key = {n: v[n] for n in v if n != "key"}, v["key"]
            return net.apply(v, x, rngs={"dropout": key})

        model = adaptax.Functional(variables, apply)

    Args:
        params: any pytree.
        apply: a pure function of the parameters and a batch of inputs.
        trained: a predicate on the paths in `params` of what is trained; the rest is state. If
            `None`, what is below `"params"` where `params` is a mapping with such a name, as the
            variables of Flax Linen are, else everything.
    """

    params: PyTree
    apply: Callable[[PyTree, Any], Any] = eqx.field(static=True)
    trained: tree.Predicate | None = eqx.field(static=True, default=None)

    def __call__(self, x: PyTree) -> PyTree:
        """`apply(params, x)`."""
        return self.apply(self.params, x)

    def is_state(self, path: str) -> bool:
        """Whether a leaf is not trained; see `adaptax.roles`."""
        trained = self.trained
        if trained is None:
            linen = isinstance(self.params, Mapping) and "params" in self.params
            trained = tree.under("params") if linen else tree.every
        return not trained(path.removeprefix("params/"))


class Batched(eqx.Module):
    """An Equinox model of one example as a model of a batch, with its state and a key.

        model = adaptax.Batched(net)                              # net(x)
        model = adaptax.Batched(net, key=jax.random.key(0))       # net(x, key=key): dropout

        net, state = equinox.nn.make_with_state(Net)(...)
        model = adaptax.Batched(net, state)                       # net(x, state): batch norm

    The axis of examples is named `"batch"`, as `equinox.nn.BatchNorm` wants to know it. State is
    read and stays as it is. Every example has a key of its own, and every pass of training others.

    Args:
        model: of one example.
        state: of its stateful layers; `None` for a model without.
        key: of its dropout; `None` for a model that takes no key.
    """

    model: Model
    state: eqx.nn.State | None = None
    key: PRNGKeyArray | None = None

    def __call__(self, x: PyTree) -> PyTree:
        """The outputs of a batch."""

        def one(x: PyTree, key: PRNGKeyArray | None) -> PyTree:
            how = {} if key is None else {"key": key}
            if self.state is None:
                return self.model(x, **how)
            # A copy: Equinox lets no state be updated twice.
            return self.model(x, jax.tree.map(lambda leaf: leaf, self.state), **how)[0]

        keys = None
        if self.key is not None:
            keys = jax.random.split(self.key, len(jax.tree.leaves(x)[0]))
        return jax.vmap(one, axis_name="batch")(x, keys)

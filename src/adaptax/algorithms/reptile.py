"""Reptile (Nichol, Achiam & Schulman 2018, arXiv:1803.02999)."""

from __future__ import annotations

from dataclasses import KW_ONLY
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from .. import inner, tree
from ..learner import InnerLoop, Meta
from ..losses import Loss
from ..task import Batch, Minibatches, Model, Source, Task


class Reptile(InnerLoop):
    """Move the initialisation towards the weights that each task leads to.

        φ = U_k(θ; S),   θ ← θ + ε · mean over tasks (φ − θ)

    Here as a meta-loss, `½‖θ − stop(φ)‖²`, whose gradient is `θ − φ`: plain gradient descent with
    rate ε on it *is* Reptile (serial with a meta-batch of one, batched with more), and any optax
    optimizer may take its place. One step of inner SGD makes it joint training.

    Paper and code. The experiments' inner rule is Adam without momentum,
    `inner_optimizer=adaptax.inner.adam(lr)`. The released code keeps Adam's second moments and
    step count from task to task, and starts evaluation from them: `carry_state=True` (with a
    meta-batch of n tasks we carry the mean of theirs, the code the last one's). Its loss sums over
    the minibatch, `reduction="sum"`. With fresh moments Adam does not notice; with moments carried
    into a test whose minibatches have another size it does: after training on ten images a step, a
    sum over five takes half the step of a mean. It samples no query set: use tasks with
    `train_query=0` and more `train_shot`, or `include_query=True`. Batch normalisation's
    parameters are adapted.

    Not all inner gradients `g_1 … g_k` need count: with `skip=s` the goal is `θ + U_k − U_s`, and
    θ moves along `g_{s+1} + … + g_k`. With `skip=k−1` that is the last gradient alone, first-order
    MAML with the last minibatch as its query (`--foml` in the released code; the paper's shared
    tail). With `separate_tail=True` besides, that minibatch is the query of the task, which no
    earlier step has seen (`--foml-tail`), and the gradient is α times that of `FOMAML` with k − 1
    inner steps.

    Args:
        loss: of the inner loop.
        inner_lr: step size of inner gradient descent.
        inner_steps: k, in meta-training.
        inner_batch: examples an inner step, drawn without replacement; all if `None`.
        eval_steps: steps that `adapt` takes; as many as in training if `None`.
        eval_batch: examples a step of `adapt`; as `inner_batch` if `None`.
        inner_optimizer: any optax rule instead of gradient descent by `inner_lr`.
        outer_lr: ε at the start of meta-training, from where it falls linearly to 0.
        carry_state: keep the inner rule's state from task to task.
        include_query: meta-train on support and query together.
        skip: inner steps at the start that are taken but do not count; fewer than `inner_steps`.
        separate_tail: take the last inner step of meta-training on the query, not on the support.
        adapt_only: a predicate on leaf paths choosing what is adapted; everything if `None`.

    Raises:
        ValueError: if `skip` leaves no step, or the query has to serve two purposes.
    """

    loss: Loss = eqx.field(static=True)
    inner_lr: inner.Rate = 0.02
    inner_steps: int = eqx.field(static=True, default=5)
    inner_batch: int | None = eqx.field(static=True, default=None)
    _: KW_ONLY
    eval_steps: int | None = eqx.field(static=True, default=None)
    eval_batch: int | None = eqx.field(static=True, default=None)
    inner_optimizer: optax.GradientTransformation | None = eqx.field(static=True, default=None)
    outer_lr: float = eqx.field(static=True, default=1.0)
    carry_state: bool = eqx.field(static=True, default=False)
    include_query: bool = eqx.field(static=True, default=False)
    skip: int = eqx.field(static=True, default=0)
    separate_tail: bool = eqx.field(static=True, default=False)
    adapt_only: tree.Predicate | None = eqx.field(static=True, default=None)

    def __check_init__(self) -> None:
        if self.skip and not 0 < self.skip < self.inner_steps:
            raise ValueError(
                f"skip={self.skip} of inner_steps={self.inner_steps} should leave a step that "
                "counts; skip at most inner_steps − 1"
            )
        if self.separate_tail and (self.include_query or self.inner_steps < 1):
            raise ValueError(
                "separate_tail=True takes the last inner step on the query: it wants "
                "inner_steps of 1 or more, and include_query=False"
            )

    def init(self, model: Model, *, key: PRNGKeyArray) -> Meta:
        """The model; with `carry_state`, `{"model": ..., "state": of the inner rule}`."""
        if not self.carry_state:
            return model
        adapted = eqx.filter(model, tree.adaptable(model, self._adapt_only))
        return {"model": model, "state": _as_floats(self._rule.init(adapted))}

    def course(
        self, meta: Meta, support: Source, *, key: PRNGKeyArray, steps: int, keep_path: bool = False
    ) -> Model:
        """Return `U_steps(θ; S)`, by minibatches of `eval_batch`, or the models on the way."""
        draw_key, order_key = jax.random.split(key)
        support = _minibatches(support, self.eval_batch or self.inner_batch, order_key)
        end = self._run(*self._start(meta), support, draw_key, steps, keep_path)
        return end.path if keep_path else end.model

    def meta_loss(
        self, meta: Meta, task: Task, *, key: PRNGKeyArray, progress: float | Array = 1.0
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """Return `½‖θ − stop(φ)‖²`, and the same for a carried state of the inner rule."""
        goal, state = self._goal(meta, task, key)
        distance = tree.squared_distance(_model(meta), inner.stop(goal))
        if self.carry_state:
            distance += tree.squared_distance(meta["state"], inner.stop(_as_floats(state)))
        return distance / 2, {}

    def part_of(self, path: str, meta: Meta) -> str | None:
        """As for other learners; the carried state is replaced in any case."""
        if meta is not _model(meta) and path.startswith("state/"):
            return None
        return super().part_of(path, meta)

    def optimizer(self, steps: int) -> optax.GradientTransformation:
        """Gradient descent with ε from `outer_lr` linearly to 0; a carried state is replaced."""
        reptile = optax.sgd(optax.linear_schedule(self.outer_lr, 0.0, steps))
        if not self.carry_state:
            return reptile
        labels = lambda meta: {name: name for name in meta}  # noqa: E731
        return optax.partition({"model": reptile, "state": optax.sgd(1.0)}, labels)

    def describe(self) -> dict[str, Any]:
        """Return name and hyper-parameters, and the inner rule."""
        return {
            **super().describe(),
            "inner_batch": self.inner_batch or "all",
            "inner_rule": "given" if self.inner_optimizer else f"SGD {self.inner_lr}",
        }

    @property
    def _rule(self) -> optax.GradientTransformation:
        return self.inner_optimizer or inner.sgd(self.inner_lr)

    @property
    def _adapt_only(self) -> tree.Predicate:
        return self.adapt_only or tree.every

    def _start(self, meta: Meta) -> tuple[Model, PyTree]:
        """Return the model, and the inner rule's state: `None` for a fresh one."""
        model = _model(meta)
        if not self.carry_state:
            return model, None
        adapted = eqx.filter(model, tree.adaptable(model, self._adapt_only))
        return model, _as(jax.eval_shape(self._rule.init, adapted), meta["state"])

    def _goal(self, meta: Meta, task: Task, key: PRNGKeyArray) -> tuple[Model, PyTree]:
        """Where the outer loop pulls the model, `θ + U_k − U_skip`, and the inner rule's state."""
        draw_key, query_key, order_key = jax.random.split(key, 3)
        start, state = self._start(meta)
        support = _union(task, start, query_key) if self.include_query else task.support
        support = _minibatches(support, self.inner_batch, order_key)
        steps = self.inner_steps - self.separate_tail
        end = self._run(start, state, support, draw_key, steps, self.skip > 0)
        goal, state = end.model, end.state
        if self.separate_tail:
            tail = self._run(goal, state, task.query, query_key, 1)
            goal, state = tail.model, tail.state
        if self.skip:
            goal = tree.shift(start, goal, tree.at(end.path, self.skip))
        return goal, state

    def _run(
        self,
        start: Model,
        state: PyTree,
        support: Source,
        key: PRNGKeyArray,
        steps: int,
        keep_path: bool = False,
    ) -> inner.Descent:
        return inner.run(
            self.loss,
            start,
            support,
            key=key,
            steps=steps,
            optimizer=self._rule,
            state=state,
            first_order=True,
            adapt_only=self._adapt_only,
            keep_path=keep_path,
        )


def _model(meta: Meta) -> Model:
    carried = isinstance(meta, dict) and set(meta) == {"model", "state"}
    return meta["model"] if carried else meta


def _union(task: Task, model: Model, key: PRNGKeyArray) -> Batch:
    """Support and query as one batch: Reptile needs no split of a training task."""
    batches = [source.draw(model, key) for source in (task.support, task.query)]
    return Batch.joined(*batches)


def _minibatches(support: Source, size: int | None, key: PRNGKeyArray) -> Source:
    if size is None or not isinstance(support, Batch):
        return support
    return Minibatches(support, size, key)


def _as_floats(state: PyTree) -> PyTree:
    """Counters as floats, so that the outer optimizer carries them like everything else."""
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.result_type(leaf, float)), state)


def _as(shapes: PyTree, state: PyTree) -> PyTree:
    """Back to the dtypes that the rule wants, without a derivative."""
    return jax.tree.map(
        lambda s, leaf: jax.lax.stop_gradient(
            jnp.round(leaf) if jnp.issubdtype(s.dtype, jnp.integer) else leaf
        ).astype(s.dtype),
        shapes,
        state,
    )

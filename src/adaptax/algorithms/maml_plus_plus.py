"""MAML++ (Antoniou, Edwards & Storkey 2019, arXiv:1810.09502)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import KW_ONLY
from typing import Any, Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from .. import batch_norm, inner, roles, tree
from ..learner import Meta, MetaLearner
from ..losses import Loss
from ..task import Model, Source, Task

Statistics = Literal["paper", "code"]

_ROUNDING = 1e-6
"""Of `step / steps`, which must not miss the threshold or epoch that it falls on."""


class Phase(NamedTuple):
    """What the meta-loss is until meta-training has come to `end`."""

    end: float
    first_order: bool
    multi_step: bool


class MAMLPlusPlus(MetaLearner):
    """MAML made stable by six parts, each a switch of its own. Five of them are on by default.

        θ_{j+1} = θ_j − α_j ∘ ∇L_S(θ_j, γ_j),   meta-loss  Σ_j v_j L_Q(θ_{j+1}, γ_j)

    with a rate for every step and tensor α_j, and batch normalisation's weights γ_j for every
    step. The parts, with how to turn each off:

    1. Multi-step loss: v goes from 1/N each to the last step alone; see `multi_step_weights`.
       `multi_step_loss` is the fraction of meta-training it takes, 0 turns it off. After it, only
       the last step counts, as in the code: the floor of the formula is given up.
    2. Derivative-order annealing: first order for the fraction `derivative_order_annealing` of
       meta-training, second order after. 0 turns it off. One program holds both, and takes each
       derivative inside its branch, so that the first costs what FOMAML costs.
    3. Per-step running statistics of batch normalisation: `per_step_batch_norm_statistics`, off
       by default. Meta-training normalises by the batch in any case. With `"paper"` every pass of
       step j, on support or query, updates row j, and an adapted model predicts by the rows, so
       that queries do not see each other: on Omniglot that halves the accuracy, see the page on
       batch normalisation. The paper has them used, and does not say where. `"code"` collects
       them and never uses them, as the released code whose scores were published: all that is
       learned and predicted is that of `None`.
    4. Per-step weights of batch normalisation: `per_step_batch_norm_weights`.
    5. Learned rates, one for each step and tensor, that may turn negative: `learned_rates`.
    6. Cosine annealing of the outer rate, from `outer_lr` to `outer_lr_min`: `cosine_annealing`.

    With all six off it is MAML to the bit. Batch normalisation's weights are not adapted. More
    steps in evaluation than in training repeat the last step's rates and rows; the released code
    allows no other number of steps.

    Paper and code. Statistics: the code updates them task after task, with an unbiased variance;
    we take the mean over the meta-batch, and the layer's own rule. Schedules: the code moves them
    from epoch to epoch, we at every meta-step unless `epochs` is given. The rates of the code have
    a row for a step that is never taken; ours have not.

    The meta-parameters are a dict: `"model"`, and, of the parts that are on, `"rates"`,
    `"norm_weights"` and `"norm_statistics"`, which hold a row for each step by the leaf's path.
    A batch-norm layer is what `adaptax.batch_norm` says. In a model without, parts 3 and 4 have
    nothing to do.

    Args:
        loss: of both loops.
        inner_lr: where every rate starts.
        inner_steps: N, in meta-training.
        multi_step_loss: fraction of meta-training that anneals it (50 of 250 epochs in the code).
        derivative_order_annealing: fraction of meta-training in first order (the paper has 50
            epochs; the code's examples 80 of 150, or none). The code turns to second order after
            the epoch it is given, counted from 0: 50 is 51 epochs in first order.
        per_step_batch_norm_statistics: `None`, `"paper"`, or `"code"`.
        per_step_batch_norm_weights: a scale and shift for each step.
        learned_rates: train the rates.
        cosine_annealing: of the outer rate.
        eval_steps: steps that `adapt` takes; as many as in training if `None`.
        outer_lr: of Adam, at the start.
        outer_lr_min: of Adam, at the end of the annealing.
        clip: bound on every entry of the meta-gradient but the rates'; 10 in the code for
            miniImageNet.
        epochs: let the schedules move so many times in meta-training, as in the code.
        head: what every task starts from below `head_path`: the learned weights (`"free"`), the
            same weights for every way (`"tied"`, their mean over the last axis), or zeros.
        head_path: path of the head in the model; `adaptax.models` call it `head`.
        remat: recompute inner steps in the backward pass: memory for time.
        adapt_only: as in `MAML`.
    """

    loss: Loss = eqx.field(static=True)
    inner_lr: float = 0.1
    inner_steps: int = eqx.field(static=True, default=5)
    _: KW_ONLY
    multi_step_loss: float = eqx.field(static=True, default=0.2)
    derivative_order_annealing: float = eqx.field(static=True, default=0.2)
    per_step_batch_norm_statistics: Statistics | None = eqx.field(static=True, default=None)
    per_step_batch_norm_weights: bool = eqx.field(static=True, default=True)
    learned_rates: bool = eqx.field(static=True, default=True)
    cosine_annealing: bool = eqx.field(static=True, default=True)
    eval_steps: int | None = eqx.field(static=True, default=None)
    outer_lr: float = eqx.field(static=True, default=1e-3)
    outer_lr_min: float = eqx.field(static=True, default=1e-5)
    clip: float | None = eqx.field(static=True, default=None)
    epochs: int | None = eqx.field(static=True, default=None)
    head: Literal["free", "tied", "zero"] = eqx.field(static=True, default="free")
    head_path: str = eqx.field(static=True, default="head")
    remat: bool = eqx.field(static=True, default=False)
    adapt_only: tree.Predicate | None = eqx.field(static=True, default=None)

    def __check_init__(self) -> None:
        if self.inner_steps < 1:
            raise ValueError(f"MAML++ takes 1 or more inner steps, not {self.inner_steps}")
        for name in ("multi_step_loss", "derivative_order_annealing"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(
                    f"{name} is a fraction of meta-training in [0, 1], not {getattr(self, name)}"
                )
        if self.per_step_batch_norm_statistics not in (None, "paper", "code"):
            raise ValueError(
                'per_step_batch_norm_statistics is "paper", "code" or None, not '
                f"{self.per_step_batch_norm_statistics!r}"
            )
        if self.head not in ("free", "tied", "zero"):
            raise ValueError(f'head is "free", "tied" or "zero", not {self.head!r}')

    def init(self, model: Model, *, key: PRNGKeyArray) -> Meta:
        """The model, and rows for each step of the parts that are on."""
        rows = lambda leaf: jnp.repeat(leaf[None], self.inner_steps, axis=0)  # noqa: E731
        meta: dict[str, Any] = {"model": model}
        if self.per_step_batch_norm_statistics:
            meta["model"] = model = batch_norm.track(model)
            meta["norm_statistics"] = jax.tree.map(rows, batch_norm.statistics(model))
        if self.per_step_batch_norm_weights:
            meta["norm_weights"] = jax.tree.map(rows, batch_norm.weights(model))
        if self.learned_rates:
            full = lambda leaf: jnp.full(self.inner_steps, self.inner_lr, leaf.dtype)  # noqa: E731
            meta["rates"] = {path: full(leaf) for path, leaf in self._adapted(meta).items()}
        return meta

    def adapt(self, meta: Meta, support: Source, *, key: PRNGKeyArray) -> Model:
        """The model after `eval_steps` steps with the learned rates."""
        steps = self._eval_steps
        end, _ = self._descend(meta, support, key, steps, training=False)
        return self._predicting(self._at(meta, end["model"], steps - 1))

    def iterates(
        self, meta: Meta, support: Source, *, key: PRNGKeyArray, steps: int | None = None
    ) -> Model:
        """The models after 0, 1, … `steps` (by default `eval_steps`) steps."""
        steps = self._eval_steps if steps is None else steps
        _, path = self._descend(meta, support, key, steps, training=False, keep_path=True)
        return self._predicting(self._at(meta, path["model"], jnp.arange(-1, steps)))

    def meta_loss(
        self, meta: Meta, task: Task, *, key: PRNGKeyArray, progress: float | Array = 1.0
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """`Σ_j v_j L_Q(θ_{j+1}, γ_j)`, its weights and order of derivative those of `progress`."""
        progress = self._in_epochs(progress)
        losses = [
            lambda *arguments, phase=phase: self._query_loss(*arguments, phase=phase)
            for phase in self._phases
        ]
        return _switch(self._phase(progress), losses, meta, task, key, progress), {}

    def reference(
        self, meta: Meta, task: Task, *, at: Meta, key: PRNGKeyArray, progress: float | Array = 1.0
    ) -> Float[Array, ""]:
        """The meta-loss; in first order with the inner gradients fixed at `at`.

        The running statistics, which the loss does not depend on, add the product with their
        update, whose derivative that is.
        """
        now = self._in_epochs(progress)
        losses = [
            lambda phase=phase: self._query_loss(meta, task, key, now, phase=phase, at=at)
            for phase in self._phases
        ]
        value = jax.lax.switch(self._phase(now), losses)
        if not at.get("norm_statistics"):
            return value
        inexact, rest = eqx.partition(at, roles.trained(at))
        loss = lambda at: self.meta_loss(  # noqa: E731
            eqx.combine(at, rest), task, key=key, progress=progress
        )[0]
        update = jax.grad(loss)(inexact)["norm_statistics"]
        away = jax.tree.map(jnp.subtract, meta["norm_statistics"], at["norm_statistics"])
        return value + _product(away, update)

    def optimizer(self, steps: int) -> optax.GradientTransformation:
        """Adam, annealed and clipped as asked; running statistics follow their own updates.

        The learned rates are not clipped: the code clips what is the network's.
        """
        rate: Any = self.outer_lr
        if self.cosine_annealing:
            cosine = optax.cosine_decay_schedule(
                self.outer_lr, 1, alpha=self.outer_lr_min / self.outer_lr
            )
            rate = lambda step: cosine(self._in_epochs(step / steps))  # noqa: E731
        adam = optax.adam(rate)
        if self.clip is not None:
            clipped = lambda meta: {name: name != "rates" for name in meta}  # noqa: E731
            adam = optax.chain(optax.masked(optax.clip(self.clip), clipped), adam)
        if not self.per_step_batch_norm_statistics:
            return adam
        labels = lambda meta: {  # noqa: E731
            name: "moving" if name == "norm_statistics" else "adam" for name in meta
        }
        return optax.partition({"adam": adam, "moving": optax.sgd(1.0)}, labels)

    def describe(self) -> dict[str, Any]:
        """Name, steps, rate, and the parts that are on."""
        parts = {
            "multi-step loss": self.multi_step_loss,
            "derivative-order annealing": self.derivative_order_annealing,
            f"per-step statistics ({self.per_step_batch_norm_statistics})":
                self.per_step_batch_norm_statistics,
            "per-step batch-norm weights": self.per_step_batch_norm_weights,
            "learned rates": self.learned_rates,
            "cosine annealing": self.cosine_annealing,
        }  # fmt: skip
        return {
            "algorithm": "MAML++",
            "inner_steps": self.inner_steps,
            "eval_steps": self._eval_steps,
            "inner_lr": self.inner_lr,
            "parts": ", ".join(name for name, on in parts.items() if on) or "none",
        }

    def part_of(self, path: str, meta: Meta) -> str | None:
        """As for other learners; running statistics follow the data also where nothing trains."""
        return None if path.startswith("norm_statistics/") else super().part_of(path, meta)

    @property
    def _eval_steps(self) -> int:
        return self.inner_steps if self.eval_steps is None else self.eval_steps

    def _in_epochs(self, progress: float | Array) -> float | Array:
        if self.epochs is None:
            return progress
        return jnp.floor((progress + _ROUNDING) * self.epochs) / self.epochs

    def _adapted(self, meta: Meta) -> dict[str, Array]:
        """What the inner loop adapts, by path: batch normalisation's weights never."""
        model = meta["model"]
        chosen = eqx.filter(model, tree.adaptable(model, self.adapt_only))
        norm = {**batch_norm.weights(model), **batch_norm.statistics(model)}
        return {path: leaf for path, leaf in tree.by_path(chosen).items() if path not in norm}

    def _at(self, meta: Meta, model: Model, step: int | Array) -> Model:
        """The model with the rows of a step; for an array of steps, models stacked likewise."""
        row = jnp.clip(step, 0, self.inner_steps - 1)
        rows = {**meta.get("norm_weights", {}), **meta.get("norm_statistics", {})}
        return tree.replace(model, {path: leaf[row] for path, leaf in rows.items()})

    def _predicting(self, model: Model) -> Model:
        """The model as it predicts after adaptation."""
        by_rows = self.per_step_batch_norm_statistics == "paper"
        return (batch_norm.use_running_average if by_rows else batch_norm.forget)(model)

    def _start(self, model: Model) -> Model:
        """Where every task starts: the model, its head as `head` says."""
        if self.head == "free":
            return model
        below = tree.under(self.head_path)
        head = {p: leaf for p, leaf in tree.by_path(tree.parameters(model)).items() if below(p)}
        if not head:
            raise ValueError(
                f"head={self.head!r} wants the model's head, and it has nothing below "
                f"{self.head_path!r}; give head_path="
            )
        tied = lambda leaf: jnp.broadcast_to(leaf.mean(-1, keepdims=True), leaf.shape)  # noqa: E731
        made = tied if self.head == "tied" else jnp.zeros_like
        return tree.replace(model, jax.tree.map(made, head))

    @property
    def _phases(self) -> list[Phase]:
        """What the meta-loss is from one progress to the next."""
        ends = sorted({self.derivative_order_annealing, self.multi_step_loss, 1.0} - {0.0})
        return [
            Phase(
                end,
                first_order=end <= self.derivative_order_annealing,
                multi_step=end <= self.multi_step_loss and self.inner_steps > 1,
            )
            for end in ends
        ]

    def _phase(self, progress: float | Array) -> Array:
        ends = jnp.array([phase.end for phase in self._phases[:-1]])
        return jnp.sum(progress + _ROUNDING >= ends)

    def _state(self, meta: Meta, training: bool) -> dict[str, PyTree]:
        """What the inner loop changes."""
        state = {"model": self._start(meta["model"])}
        if training and "norm_statistics" in meta:
            state["norm_statistics"] = meta["norm_statistics"]
        return state

    def _rule(self, metas: dict[str, Meta], met_by: str) -> optax.GradientTransformation:
        """Gradient descent of several states, with the rates of each, by the gradients of one.

        The gradient with respect to the statistics of step j is how its pass would update them,
        so that descending it with rate 1 does.
        """

        def rate(meta: Meta, path: str, row: Array) -> Any:
            kind, _, leaf = path.partition("/")
            if kind == "norm_statistics":
                return 1.0
            return meta["rates"][leaf][row] if leaf in meta.get("rates", {}) else self.inner_lr

        def update(grads: PyTree, step: Array, params: PyTree = None) -> tuple[PyTree, Array]:
            row, met = jnp.minimum(step, self.inner_steps - 1), grads[met_by]
            move = lambda meta: jax.tree.map(  # noqa: E731
                lambda path, g: -rate(meta, path, row) * g, tree.paths(met), met
            )
            return {name: move(meta) for name, meta in metas.items()}, step + 1

        return optax.GradientTransformation(lambda params: jnp.zeros((), jnp.int32), update)

    def _descend(
        self, meta: Meta, support: Source, key: PRNGKeyArray, steps: int, *, training: bool,
        first_order: bool = False, keep_path: bool = False, at: Meta | None = None,
    ) -> tuple[dict[str, Any], Any]:  # fmt: skip
        """End and path of the inner loop on `_state`, by the gradients that `at`, if any, meets."""
        metas, met_by = {"here": meta}, "here"
        if at is not None:
            metas, met_by = {"here": meta, "there": at}, "there"
        changed = [f"model/{path}" for path in self._adapted(meta)]
        changed += [f"norm_statistics/{path}" for path in meta.get("norm_statistics", {})]
        chosen = {f"{name}/{path}" for name in metas for path in changed}
        # In first order nothing that the inner gradients depend on carries a tangent.
        seeing = inner.stop(metas[met_by]) if first_order else metas[met_by]
        descent = inner.run(
            self.loss, {name: self._state(meta, training) for name, meta in metas.items()},
            support, key=key, steps=steps, optimizer=self._rule(metas, met_by),
            view=lambda state, step: _observed(
                self._at({**seeing, **state[met_by]}, state[met_by]["model"], step),
                training and "norm_statistics" in meta,
            ),
            first_order=first_order, remat=self.remat, keep_path=keep_path,
            adapt_only=chosen.__contains__,
        )  # fmt: skip
        return descent.model["here"], descent.path["here"] if descent.path else None

    def _query_loss(
        self, meta: Meta, task: Task, key: PRNGKeyArray, progress: float | Array, *,
        phase: Phase, at: Meta | None = None,
    ) -> Float[Array, ""]:  # fmt: skip
        adapt_key, query_key = jax.random.split(key)
        end, path = self._descend(
            meta, task.support, adapt_key, self.inner_steps, training=True,
            first_order=phase.first_order, keep_path=phase.multi_step,
            at=at if phase.first_order else None,
        )  # fmt: skip
        rows, moved = meta, jnp.zeros(())
        if "norm_statistics" in meta:
            rows, moved = _carry(meta, end["norm_statistics"])

        def loss(model: Model, step: int | Array) -> Float[Array, ""]:
            model = roles.fresh(self._at(rows, model, step), jax.random.fold_in(query_key, step))
            model = _observed(model, "norm_statistics" in meta)
            return self.loss(model, task.query.draw(model, query_key))

        if not phase.multi_step:
            return loss(end["model"], self.inner_steps - 1) + moved
        arrays, rest = eqx.partition(path["model"], eqx.is_array)
        weights = multi_step_weights(self.inner_steps, progress / self.multi_step_loss)

        def add(total: Array, now: PyTree) -> tuple[Array, None]:
            arrays, weight, step = now
            return total + weight * loss(eqx.combine(arrays, rest), step), None

        after = jax.tree.map(lambda leaf: leaf[1:], arrays)
        total, _ = jax.lax.scan(add, jnp.zeros(()), (after, weights, jnp.arange(self.inner_steps)))
        return total + moved


def _observed(model: Model, observed: bool) -> Model:
    return batch_norm.Observed(model) if observed else model


def multi_step_weights(steps: int, fraction: float | Array) -> Float[Array, " steps"]:
    """The weights v of the multi-step loss when `fraction` of its annealing is done.

        v_j = max(1/N − f/N, 0.03/N) for j < N,   v_N = min(1/N + f (N − 1)/N, 1 − 0.03 (N − 1)/N)

    They sum to 1, and stay at the floor of the formula for `fraction` ≥ 1.

    Args:
        steps: N.
        fraction: f, the epoch over the epochs of the annealing.
    """
    floor = 0.03 / steps
    early = jnp.maximum((1 - fraction) / steps, floor)
    last = jnp.minimum((1 + fraction * (steps - 1)) / steps, 1 - (steps - 1) * floor)
    return jnp.append(jnp.repeat(early, steps - 1), last)


def _carry(meta: Meta, moved: batch_norm.Rows) -> tuple[Meta, Array]:
    """Running statistics as the support passes left them, and a term of value 0.

    The term's derivative with respect to the statistics is what the support passes moved them by;
    the query's passes, on rows with the value of `moved`, add theirs.
    """
    rows = meta["norm_statistics"]
    still, moved = inner.stop(rows), inner.stop(moved)
    away = jax.tree.map(jnp.subtract, rows, still)  # 0, with a derivative
    by = jax.tree.map(jnp.subtract, still, moved)
    return {**meta, "norm_statistics": jax.tree.map(jnp.add, moved, away)}, _product(away, by)


def _product(x: PyTree, y: PyTree) -> Float[Array, ""]:
    pairs = zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True)
    return sum((jnp.sum(tree.wide(a) * tree.wide(b)) for a, b in pairs), jnp.zeros(()))


def _switch(
    index: Array, branches: list[Callable[..., Array]], meta: Meta, *rest: Any
) -> Float[Array, ""]:
    """One of several scalar functions of `meta`, differentiable once.

    `lax.switch`, differentiated, would keep what *any* branch's derivative needs. Here each
    branch takes its own derivative, and a cheap branch stays cheap.
    """
    if len(branches) == 1:
        return branches[0](meta, *rest)

    @eqx.filter_custom_vjp
    def chosen(meta: Meta, rest: Any, index: Array) -> Array:
        arrays, static = eqx.partition((meta, rest), eqx.is_array)
        calls = [lambda a, f=f: _call(f, eqx.combine(a, static)) for f in branches]
        return jax.lax.switch(index, calls, arrays)

    def forward(perturbed: Any, meta: Meta, rest: Any, index: Array) -> tuple[Array, Meta]:
        trained, fixed = eqx.partition(meta, roles.trained(meta))
        arrays, static = eqx.partition((fixed, rest), eqx.is_array)

        def derived(f: Callable[..., Array]) -> Callable[..., Any]:
            def call(trained: Meta, arrays: PyTree) -> tuple[Array, Meta]:
                fixed, rest = eqx.combine(arrays, static)
                return jax.value_and_grad(lambda t: f(eqx.combine(t, fixed), *rest))(trained)

            return call

        return jax.lax.switch(index, [derived(f) for f in branches], trained, arrays)

    def backward(gradient: Meta, cotangent: Array, *_: Any) -> Meta:
        return jax.tree.map(lambda leaf: cotangent * leaf, gradient)

    chosen.def_fwd(forward)
    chosen.def_bwd(backward)
    return chosen(meta, rest, index)


def _call(function: Callable[..., Array], arguments: tuple[Meta, tuple[Any, ...]]) -> Array:
    meta, rest = arguments
    return function(meta, *rest)

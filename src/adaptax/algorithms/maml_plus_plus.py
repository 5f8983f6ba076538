"""MAML++ (Antoniou, Edwards & Storkey 2019, arXiv:1810.09502)."""

from __future__ import annotations

import functools
from dataclasses import KW_ONLY
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from .. import batch_norm, inner, roles, tree
from ..checks import one_of
from ..learner import InnerLoop, Meta
from ..losses import Loss
from ..switch import switch
from ..task import Model, Source, Task

_ROUNDING = 1e-6
"""Of `step / steps`, which must not miss the threshold or epoch that it falls on."""


class MAMLPlusPlus(InnerLoop):
    """MAML made stable by six parts, each a switch of its own. Five of them are on by default.

        θ_{j+1} = θ_j − α_j ∘ ∇L_S(θ_j, γ_j),   meta-loss  Σ_j v_j L_Q(θ_{j+1}, γ_j)

    with a rate for every step and tensor α_j, and batch normalisation's weights γ_j for every
    step. The parts, with how to turn each off:

    1. Multi-step loss: v goes from 1/N each to the last step alone; see `multi_step_weights`.
       `multi_step_loss` is the fraction of meta-training it takes, 0 turns it off. After it, only
       the last step counts, as in the code: the floor of the formula is given up.
    2. Derivative-order annealing: first order for the fraction `derivative_order_annealing` of
       meta-training, second order after. 0 turns it off. Before, a step costs what FOMAML's does.
    3. Per-step running statistics of batch normalisation: `per_step_batch_norm_statistics`, off by
       default. Meta-training normalises by the batch in any case. `"paper"`: the passes of step j
       move row j, and an adapted model predicts by the rows, so that queries do not see each
       other, which halves the accuracy on Omniglot; the paper has them used, and does not say
       where. `"code"`: collected and never used, as in the released code; all else is as without.
    4. Per-step weights of batch normalisation: `per_step_batch_norm_weights`.
    5. Learned rates, one for each step and tensor, that may turn negative: `learned_rates`.
    6. Cosine annealing of the outer rate, from `outer_lr` to `outer_lr_min`: `cosine_annealing`.

    With all six off it is MAML to the bit. Batch normalisation's weights are not adapted. More
    steps in evaluation than in training, which the code does not allow, repeat the last rows.

    Paper and code. Statistics: the code updates them task after task, with an unbiased variance;
    we take the mean over the meta-batch, and the layer's own rule. Schedules: the code moves them
    from epoch to epoch, we at every meta-step unless `epochs` is given.

    The meta-parameters are a dict: `"model"`, and, of the parts that are on, `"rates"`,
    `"norm_weights"` and `"norm_statistics"`, which hold a row for each step by the leaf's path.
    What a batch-norm layer is `adaptax.batch_norm` says; without one parts 3 and 4 do nothing.

    Args:
        loss: of both loops.
        inner_lr: where every rate starts.
        inner_steps: N, in meta-training.
        multi_step_loss: fraction of meta-training that anneals it (50 of 250 epochs in the code).
        derivative_order_annealing: fraction of meta-training in first order: 50 epochs in the
            paper; the code, given 50, takes 51.
        per_step_batch_norm_statistics: `None`, `"paper"`, or `"code"`.
        per_step_batch_norm_weights: a scale and shift for each step.
        learned_rates: train the rates.
        cosine_annealing: of the outer rate.
        eval_steps: steps that `adapt` takes; as many as in training if `None`.
        outer_lr: of Adam, at the start.
        outer_lr_min: of Adam, at the end of the annealing.
        clip: bound on the entries of the meta-gradient but the rates'; 10 on miniImageNet.
        epochs: let the schedules move so many times in meta-training, as in the code.
        meta_gradient: how it goes back through the inner loop; see `adaptax.modes.parse`.
        adapt_only: as in `MAML`.
    """

    title = "MAML++"
    loss: Loss = eqx.field(static=True)
    inner_lr: float = 0.1
    inner_steps: int = eqx.field(static=True, default=5)
    _: KW_ONLY
    multi_step_loss: float = eqx.field(static=True, default=0.2)
    derivative_order_annealing: float = eqx.field(static=True, default=0.2)
    per_step_batch_norm_statistics: Literal["paper", "code"] | None = eqx.field(
        static=True, default=None
    )
    per_step_batch_norm_weights: bool = eqx.field(static=True, default=True)
    learned_rates: bool = eqx.field(static=True, default=True)
    cosine_annealing: bool = eqx.field(static=True, default=True)
    eval_steps: int | None = eqx.field(static=True, default=None)
    outer_lr: float = eqx.field(static=True, default=1e-3)
    outer_lr_min: float = eqx.field(static=True, default=1e-5)
    clip: float | None = eqx.field(static=True, default=None)
    epochs: int | None = eqx.field(static=True, default=None)
    meta_gradient: str = eqx.field(static=True, default="auto")
    adapt_only: tree.Predicate | None = eqx.field(static=True, default=None)

    def __check_init__(self) -> None:
        if self.inner_steps < 1:
            raise ValueError(f"MAML++ takes 1 or more inner steps, not {self.inner_steps}")
        for name in ("multi_step_loss", "derivative_order_annealing"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(
                    f"{name} is a fraction of meta-training in [0, 1], not {getattr(self, name)}"
                )
        one_of(self, per_step_batch_norm_statistics=("paper", "code", None))

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

    def course(
        self, meta: Meta, support: Source, *, key: PRNGKeyArray, steps: int, keep_path: bool = False
    ) -> Model:
        """Return the model after `steps` steps with the learned rates, or those on the way."""
        end = self._descend(meta, support, key=key, steps=steps, keep_path=keep_path)
        state, step = (end.path, jnp.arange(-1, steps)) if keep_path else (end.model, steps - 1)
        model = self._at(meta, state["model"], step)
        by_rows = self.per_step_batch_norm_statistics == "paper"
        return (batch_norm.use_running_average if by_rows else batch_norm.forget)(model)

    def meta_loss(
        self, meta: Meta, task: Task, *, key: PRNGKeyArray, progress: float | Array = 1.0
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """Return `Σ_j v_j L_Q(θ_{j+1}, γ_j)`, in the phase that `progress` is in."""
        progress = self._in_epochs(progress)
        losses = [functools.partial(self._loss, until=end) for end in self._ends]
        return switch(self._phase(progress), losses, meta, task, key, progress), {}

    def _loss(
        self, meta: Meta, task: Task, key: PRNGKeyArray, progress: float | Array, *, until: float
    ) -> Float[Array, ""]:
        """The meta-loss of the phase that ends with this progress."""
        multi_step = until <= self.multi_step_loss and self.inner_steps > 1
        adapt_key, query_key = jax.random.split(key)
        tracking, moved = "norm_statistics" in meta, jnp.zeros(())
        end = self._descend(
            meta, task.support, key=adapt_key, steps=self.inner_steps, tracking=tracking,
            first_order=until <= self.derivative_order_annealing, keep_path=multi_step,
        )  # fmt: skip
        if tracking:
            rows, moved = batch_norm.carry(meta["norm_statistics"], end.model["norm_statistics"])
            meta = {**meta, "norm_statistics": rows}

        def loss(model: Model, step: int | Array) -> Float[Array, ""]:  # L_Q(θ_{j+1}, γ_j)
            model = roles.fresh(self._at(meta, model, step), jax.random.fold_in(query_key, step))
            model = batch_norm.Observed(model) if tracking else model
            return self.loss(model, task.query.draw(model, query_key))

        if not multi_step:
            return loss(end.model["model"], self.inner_steps - 1) + moved
        path, rest = eqx.partition(end.path["model"], eqx.is_array)
        after = jax.tree.map(lambda leaf: leaf[1:], path), jnp.arange(self.inner_steps)
        losses = jax.lax.map(lambda at: loss(eqx.combine(at[0], rest), at[1]), after)
        weights = multi_step_weights(self.inner_steps, progress / self.multi_step_loss)
        return weights @ losses + moved

    def optimizer(self, steps: int) -> optax.GradientTransformation:
        """Adam, annealed and clipped as asked; running statistics follow their own updates.

        The learned rates are not clipped: the code clips what is the network's.
        """
        rate: Any = self.outer_lr
        if self.cosine_annealing:
            last = self.outer_lr_min / self.outer_lr
            cosine = optax.cosine_decay_schedule(self.outer_lr, 1, alpha=last)
            rate = lambda step: cosine(self._in_epochs(step / steps))  # noqa: E731
        adam = optax.adam(rate)
        if self.clip is not None:
            clipped = lambda meta: {name: name != "rates" for name in meta}  # noqa: E731
            adam = optax.chain(optax.masked(optax.clip(self.clip), clipped), adam)
        if not self.per_step_batch_norm_statistics:
            return adam
        labels = lambda meta: {n: "moving" if n == "norm_statistics" else "adam" for n in meta}  # noqa: E731
        return optax.partition({"adam": adam, "moving": optax.sgd(1.0)}, labels)

    def describe(self) -> dict[str, Any]:
        """Return name and hyper-parameters, and the parts that are on."""
        parts = {
            "multi-step loss": self.multi_step_loss,
            "derivative-order annealing": self.derivative_order_annealing,
            f"per-step statistics ({self.per_step_batch_norm_statistics})":
                self.per_step_batch_norm_statistics,
            "per-step batch-norm weights": self.per_step_batch_norm_weights,
            "learned rates": self.learned_rates,
            "cosine annealing": self.cosine_annealing,
        }  # fmt: skip
        on = ", ".join(name for name, on in parts.items() if on) or "none"
        return {**super().describe(), "parts": on}

    def part_of(self, path: str, meta: Meta) -> str | None:
        """As for other learners; running statistics follow the data also where nothing trains."""
        return None if path.startswith("norm_statistics/") else super().part_of(path, meta)

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

    @property
    def _ends(self) -> list[float]:
        """Where the phases of meta-training end, by the order of derivative and the loss."""
        return sorted({self.derivative_order_annealing, self.multi_step_loss, 1.0} - {0.0})

    def _phase(self, progress: float | Array) -> Array:
        return jnp.sum(progress + _ROUNDING >= jnp.array(self._ends[:-1]))

    def _descend(
        self, meta: Meta, support: Source, *, first_order: bool = False, tracking: bool = False,
        **how: Any,
    ) -> inner.Descent:  # fmt: skip
        """The inner loop on the model, and on the rows of statistics where they are tracked.

        The gradient with respect to the statistics of step j is how its pass would update them,
        so that descending it with rate 1 does.
        """
        names = ("model", "norm_statistics") if tracking else ("model",)
        state = {name: meta[name] for name in names}
        moving = {f"norm_statistics/{path}" for path in meta.get("norm_statistics", {})}
        chosen = moving | {f"model/{path}" for path in self._adapted(meta)}
        # In first order nothing that the inner gradients depend on carries a tangent.
        seeing = inner.stop(meta) if first_order else meta

        def view(now: PyTree, step: Array) -> Model:
            model = self._at({**seeing, **now}, now["model"], step)
            return batch_norm.Observed(model) if tracking else model

        def rates(step: Array) -> PyTree:
            row = jnp.minimum(step, self.inner_steps - 1)
            own = {f"model/{path}": rate[row] for path, rate in meta.get("rates", {}).items()}
            own |= dict.fromkeys(moving, 1.0)
            return jax.tree.map(lambda path: own.get(path, self.inner_lr), tree.paths(state))

        return inner.run(
            self.loss, state, support, lr=rates, view=view, first_order=first_order,
            meta_gradient=self.meta_gradient, adapt_only=chosen.__contains__, **how,
        )  # fmt: skip


def multi_step_weights(steps: int, fraction: float | Array) -> Float[Array, " steps"]:
    """The weights v of the multi-step loss when `fraction` of its annealing is done.

        v_j = max(1/N − f/N, 0.03/N) for j < N,   v_N = min(1/N + f (N − 1)/N, 1 − 0.03 (N − 1)/N)

    Args:
        steps: N.
        fraction: f, the epoch over the epochs of the annealing; beyond 1 the weights stay.
    """
    floor = 0.03 / steps
    early = jnp.maximum((1 - fraction) / steps, floor)
    last = jnp.minimum((1 + fraction * (steps - 1)) / steps, 1 - (steps - 1) * floor)
    return jnp.append(jnp.repeat(early, steps - 1), last)

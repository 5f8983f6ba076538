"""MAML (Finn, Abbeel & Levine 2017, arXiv:1703.03400), FOMAML, ANIL and Meta-SGD."""

from __future__ import annotations

from dataclasses import KW_ONLY
from typing import Any

import equinox as eqx
import jax
import optax
from jaxtyping import Array, Float, PRNGKeyArray

from .. import inner, tree
from ..learner import InnerLoop, Meta
from ..losses import Loss
from ..task import Model, Source, Task


class MAML(InnerLoop):
    """Model-agnostic meta-learning: an initialisation from which a few gradient steps go far.

        θ_0 = θ,   θ_{j+1} = θ_j − α ∇L_S(θ_j),   meta-loss  L_Q(θ_k)

    whose exact gradient is `(I − αH_0)…(I − αH_{k−1}) ∇L_Q(θ_k)`, `H_j` the Hessian of the support
    loss at `θ_j`. With `first_order=True` (FOMAML) every `H_j` is dropped.

    Paper and code. The paper sums over the tasks of a meta-batch, its code and we take the mean.
    The code's classification loss is `way` times the mean: the paper's α = 0.4 on 5-way Omniglot
    is `inner_lr=2.0` with `adaptax.losses.cross_entropy`, or 0.4 with `reduction="sum/shot"`.
    The parameters of batch normalisation are meta-trained and not adapted, as in the code, for
    the networks of `adaptax.models`; `adapt_only=adaptax.tree.every` adapts them too.

    Args:
        loss: of the inner and of the outer loop.
        inner_lr: step size α: a number, a tree with a rate for every leaf, or a schedule over the
            inner steps.
        inner_steps: k, in meta-training.
        eval_steps: steps that `adapt` takes; as many as in training if `None`. The paper's codes
            take more.
        first_order: FOMAML.
        meta_gradient: how it goes back through the inner loop; see `adaptax.modes.parse`.
        adapt_only: a predicate on leaf paths choosing what is adapted, such as
            `adaptax.tree.under("head")`.
        inner_optimizer: any optax rule instead of gradient descent by `inner_lr`.
    """

    loss: Loss = eqx.field(static=True)
    inner_lr: inner.Rate = 0.01
    inner_steps: int = eqx.field(static=True, default=1)
    _: KW_ONLY
    eval_steps: int | None = eqx.field(static=True, default=None)
    first_order: bool = eqx.field(static=True, default=False)
    meta_gradient: str = eqx.field(static=True, default="auto")
    adapt_only: tree.Predicate | None = eqx.field(static=True, default=None)
    inner_optimizer: optax.GradientTransformation | None = eqx.field(static=True, default=None)

    def course(self, meta: Meta, support: Source, **how: Any) -> Model:
        """Return `U_steps(θ; S)`, or the models on the way."""
        return inner.descend(
            self.loss,
            meta,
            support,
            lr=None if self.inner_optimizer else self.inner_lr,
            optimizer=self.inner_optimizer,
            first_order=self.first_order,
            meta_gradient=self.meta_gradient,
            adapt_only=self.adapt_only,
            **how,
        )

    def meta_loss(
        self, meta: Meta, task: Task, *, key: PRNGKeyArray, progress: float | Array = 1.0
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """Return `L_Q(U_k(θ; S))`."""
        adapt_key, query_key = jax.random.split(key)
        model = self.course(meta, task.support, key=adapt_key, steps=self.inner_steps)
        return self.loss(model, task.query.draw(model, query_key)), {}

    def describe(self) -> dict[str, Any]:
        """Return name and hyper-parameters."""
        return {**super().describe(), "algorithm": "FOMAML" if self.first_order else "MAML"}


def FOMAML(loss: Loss, inner_lr: inner.Rate = 0.01, inner_steps: int = 1, **how: Any) -> MAML:
    """First-order MAML: the gradient of the query loss at the adapted point, applied at the start.

        g = ∇L_Q(θ_k)

    About a third cheaper than MAML per meta-step, and nearly as accurate (MAML, section 5.2).
    """
    return MAML(loss, inner_lr, inner_steps, first_order=True, **how)


def ANIL(
    loss: Loss, inner_lr: inner.Rate = 0.01, inner_steps: int = 1, *, head: str = "head", **how: Any
) -> MAML:
    """Almost no inner loop (Raghu et al. 2020, arXiv:1909.09157): MAML that adapts the head alone.

    Args:
        loss: of both loops.
        inner_lr: step size.
        inner_steps: number of steps.
        head: path of the head in the model; `adaptax.models` call it `head`.
        how: further arguments of `MAML`.
    """
    return MAML(loss, inner_lr, inner_steps, adapt_only=tree.under(head), **how)


class MetaSGD(InnerLoop):
    """Meta-SGD (Li et al. 2017, arXiv:1707.09835): MAML with a learned rate for every weight.

        θ' = θ − α ∘ ∇L_S(θ),   meta-loss  L_Q(θ'),   minimised over θ and α

    The paper takes one step and draws α from U[0.005, 0.1]; we start every rate at `inner_lr`,
    and allow more steps, which share the rates. Rates may turn negative.

    Args:
        loss: of both loops.
        inner_lr: where every rate starts.
        inner_steps: number of steps, in training and in `adapt`.
        first_order: drop the Hessians. The rates are learned all the same.
        meta_gradient: as in `MAML`.
        adapt_only: as in `MAML`.
    """

    loss: Loss = eqx.field(static=True)
    inner_lr: float = 0.1
    inner_steps: int = eqx.field(static=True, default=1)
    _: KW_ONLY
    first_order: bool = eqx.field(static=True, default=False)
    meta_gradient: str = eqx.field(static=True, default="auto")
    adapt_only: tree.Predicate | None = eqx.field(static=True, default=None)

    def init(self, model: Model, *, key: PRNGKeyArray) -> Meta:
        """Return `{"model": the model, "lr": a rate for every parameter}`."""
        return {"model": model, "lr": tree.full_like(model, self.inner_lr)}

    def course(self, meta: Meta, support: Source, **how: Any) -> Model:
        """Return the model after `steps` steps with the learned rates, or those on the way."""
        return inner.descend(
            self.loss,
            meta["model"],
            support,
            lr=meta["lr"],
            first_order=self.first_order,
            meta_gradient=self.meta_gradient,
            adapt_only=self.adapt_only,
            **how,
        )

    def meta_loss(
        self, meta: Meta, task: Task, *, key: PRNGKeyArray, progress: float | Array = 1.0
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """Return `L_Q(θ − α ∘ ∇L_S(θ))`."""
        adapt_key, query_key = jax.random.split(key)
        model = self.adapt(meta, task.support, key=adapt_key)
        return self.loss(model, task.query.draw(model, query_key)), {}

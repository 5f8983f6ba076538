"""Ensembles of MAMLs: EMAML, the baseline of Bayesian MAML (Yoon et al. 2018, arXiv:1806.03836)."""

from __future__ import annotations

from dataclasses import KW_ONLY
from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from .. import inner, tree
from ..learner import Ensemble, Meta, MetaLearner
from ..losses import Loss
from ..task import Model, Source, Task
from . import particles
from .maml import MAML


class MAMLEnsemble(MetaLearner):
    """M independent MAMLs, trained on the same tasks: the baseline EMAML of Bayesian MAML.

        meta-loss  Σ_m L_Q(U_k(θ^m; S))

    whose gradient for each θ^m is that of `MAML` alone. All M are one program. Its code scores
    EMAML by the mean of its members' errors and BMAML by the error of the mean prediction;
    `evaluate` gives both for both, as `particle_mse` and `mse`.

    Args:
        loss: of the inner and of the outer loop.
        inner_lr: step size of every member's inner loop; see `MAML`.
        inner_steps: k, in meta-training.
        particles: M.
        spread: how far members start from the model; see `BayesianMAML.init`. All arrays are
            drawn, also those that are not adapted.
        eval_steps: steps that `adapt` takes; as many as in training if `None`.
        first_order: FOMAML.
        remat: recompute inner steps in the backward pass: memory for time.
        adapt_only: a predicate on leaf paths choosing what is adapted.

    Raises:
        ValueError: for counts out of range.
    """

    loss: Loss = eqx.field(static=True)
    inner_lr: inner.Rate = 0.01
    inner_steps: int = eqx.field(static=True, default=1)
    _: KW_ONLY
    particles: int = eqx.field(static=True, default=10)
    spread: float = eqx.field(static=True, default=1.0)
    eval_steps: int | None = eqx.field(static=True, default=None)
    first_order: bool = eqx.field(static=True, default=False)
    remat: bool = eqx.field(static=True, default=False)
    adapt_only: tree.Predicate | None = eqx.field(static=True, default=None)

    def __check_init__(self) -> None:
        particles.check(self.particles, self.spread)

    def init(self, model: Model, *, key: PRNGKeyArray) -> Meta:
        """An `Ensemble` around a model, its first member, or the one that is given."""
        if isinstance(model, Ensemble):
            particles.demand(model, self.particles)
            return model.stacked()
        how = {"train_only": self.train_only}
        return particles.around(model, self.particles, self.spread, key, **how).stacked()

    def adapt(self, meta: Meta, support: Source, *, key: PRNGKeyArray) -> Model:
        """An `Ensemble` of every member after `eval_steps` steps on the support."""
        return Ensemble(meta.map(lambda model: self._maml.adapt(model, support, key=key)))

    def iterates(
        self, meta: Meta, support: Source, *, key: PRNGKeyArray, steps: int | None = None
    ) -> Model:
        """The ensembles after 0, 1, … `steps` (by default `eval_steps`) steps."""
        path = lambda model: self._maml.iterates(model, support, key=key, steps=steps)  # noqa: E731
        return Ensemble(eqx.filter_vmap(path, out_axes=eqx.if_array(1))(meta.models))

    def meta_loss(
        self, meta: Meta, task: Task, *, key: PRNGKeyArray, progress: float | Array = 1.0
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """`Σ_m L_Q(U_k(θ^m; S))`, and the mean, which `query_loss` logs."""
        losses = meta.map(
            lambda model: self._maml.meta_loss(model, task, key=key, progress=progress)[0]
        )
        return jnp.sum(losses), {"query_loss": jnp.mean(losses)}

    def reference(
        self, meta: Meta, task: Task, *, at: Meta, key: PRNGKeyArray, progress: float | Array = 1.0
    ) -> Float[Array, ""]:
        """The sum of the members' references."""
        each = lambda model, there: self._maml.reference(  # noqa: E731
            model, task, at=there, key=key, progress=progress
        )
        return jnp.sum(meta.map(each, at.models))

    def describe(self) -> dict[str, Any]:
        """Name, steps and rate."""
        return {**self._maml.describe(), "algorithm": "EMAML", "first_order": self.first_order}

    @property
    def _maml(self) -> MAML:
        return MAML(
            self.loss,
            self.inner_lr,
            self.inner_steps,
            eval_steps=self.eval_steps,
            first_order=self.first_order,
            remat=self.remat,
            adapt_only=self.adapt_only,
        )

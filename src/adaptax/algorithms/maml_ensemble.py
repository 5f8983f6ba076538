"""Ensembles of MAMLs: EMAML, the baseline of Bayesian MAML (Yoon et al. 2018, arXiv:1806.03836)."""

from __future__ import annotations

from dataclasses import KW_ONLY
from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from .. import inner, tree
from ..learner import Ensemble, InnerLoop, Meta
from ..losses import Loss
from ..task import Model, Source, Task
from . import particles
from .maml import MAML


class MAMLEnsemble(InnerLoop):
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
        meta_gradient: how it goes back through the inner loop; see `adaptax.modes.parse`.
        adapt_only: a predicate on leaf paths choosing what is adapted.

    Raises:
        ValueError: for counts out of range.
    """

    title = "EMAML"
    loss: Loss = eqx.field(static=True)
    inner_lr: inner.Rate = 0.01
    inner_steps: int = eqx.field(static=True, default=1)
    _: KW_ONLY
    particles: int = eqx.field(static=True, default=10)
    spread: float = eqx.field(static=True, default=1.0)
    eval_steps: int | None = eqx.field(static=True, default=None)
    first_order: bool = eqx.field(static=True, default=False)
    meta_gradient: str = eqx.field(static=True, default="auto")
    adapt_only: tree.Predicate | None = eqx.field(static=True, default=None)

    def __check_init__(self) -> None:
        particles.check(self.particles, self.spread)

    def init(self, model: Model, *, key: PRNGKeyArray) -> Meta:
        """Return an `Ensemble` around a model, its first member, or the one that is given."""
        return particles.start(model, self.particles, self.spread, key, self.train_only)

    def course(self, meta: Meta, support: Source, *, keep_path: bool = False, **how: Any) -> Model:
        """Return an `Ensemble` of every member after `steps` steps, or those on the way."""
        each = lambda model: self._maml.course(model, support, keep_path=keep_path, **how)  # noqa: E731
        return Ensemble(eqx.filter_vmap(each, out_axes=eqx.if_array(int(keep_path)))(meta.models))

    def meta_loss(
        self, meta: Meta, task: Task, *, key: PRNGKeyArray, progress: float | Array = 1.0
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """Return `Σ_m L_Q(U_k(θ^m; S))`, and the mean, which `query_loss` logs."""
        losses = meta.map(lambda model: self._maml.meta_loss(model, task, key=key)[0])
        return jnp.sum(losses), {"query_loss": jnp.mean(losses)}

    @property
    def _maml(self) -> MAML:
        shared = ("loss", "inner_lr", "inner_steps", "first_order", "meta_gradient", "adapt_only")
        return MAML(**{name: getattr(self, name) for name in shared})

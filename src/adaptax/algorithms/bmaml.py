"""Bayesian MAML (Yoon et al. 2018, arXiv:1806.03836)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import KW_ONLY
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PRNGKeyArray

from .. import inner, svgd, tree
from ..checks import at_least, one_of
from ..learner import Ensemble, InnerLoop, Meta
from ..losses import Loss
from ..task import Batch, Model, Source, Task
from . import particles
from .particles import nonempty


class BayesianMAML(InnerLoop):
    """Bayesian MAML: M initialisations, adapted together by Stein variational gradient descent.

        Θ_n = SVGD_n(Θ_0; S, α),   log p(θ | S) = −L_S(θ) − prior(θ)

        chaser:  Σ_m ‖θ_n^m − stop(θ_{n+s}^m)‖²,   Θ_{n+s} = SVGD_s(Θ_n; S ∪ Q, α), the leader
        bfa:     −log 1/M Σ_m exp(−L_Q(θ_n^m))

    The chaser learns to be where some more steps, with the queries at hand, would take it; the
    query enters through the leader alone, to which no gradient flows. Bayesian fast adaptation
    (BFA) is MAML for the likelihood of the mixture, and with one particle it is MAML.

    The loss is a negative log-likelihood. Give one with `reduction="sum"` for that of all examples
    together, as the paper writes; the mean is that likelihood to the power 1/n, under which
    particles spread more. Step sizes are not those of `MAML`: SVGD averages over particles, so that
    one far from the others moves by α/M times its own gradient. Start from M times MAML's rate.

    Particles are an axis of one program: ten of them cost less than ten runs. What the inner loop
    adapts differs between particles, everything else is shared and meta-learned. With
    `adapt_only=adaptax.tree.under("head")` they are heads on one extractor of features, as in the
    paper's classification, and the extractor runs once for all of them. The chaser loss compares
    the particles alone; it alone cannot tell the extractor what features are good for, and may
    shrink them.

    Paper and code. The code for regression is released, that for classification is not: how heads
    share an extractor is our reading, as is the default `"median"` bandwidth. Where its code
    departs from the formulas we follow the formulas: it halves the repulsion and takes the
    bandwidth for a constant in the meta-gradient
    (`kernel=adaptax.svgd.RBF("median-all", half=True, stop=True)` does so too), and fails with one
    particle, whose kernel is 1 and repulsion 0 here. It draws every particle's weights anew and
    biases from N(0, 0.01²); `spread=1` draws from the statistics of the model's arrays, so biases
    that are all zero stay so. Its Gaussian likelihood and Gamma priors are in `Gaussian`. Its
    reinforcement learning, with a kernel and a chaser loss of other forms, is
    `adaptax.rl.BayesianMAML`. The paper sums over the tasks of a meta-batch, its code and we take
    the mean.

    Args:
        loss: `−log p` of a batch, of the inner loop and of BFA.
        inner_lr: step size α of chaser and leader; see `MAML`.
        inner_steps: n, the steps of the chaser.
        particles: M.
        objective: `"chaser"` or `"bfa"`.
        leader_steps: s; 1 for the chaser if `None`. With 0 the chaser loss is 0.
        prior: `−log p(θ)` of one model, up to a constant; flat if `None`. See `gamma_prior`.
        chase: a predicate on leaf paths choosing what the chaser loss compares; all if `None`.
        kernel: of SVGD; see `adaptax.svgd.RBF`.
        spread: how far particles start from the model; see `init`.
        eval_steps: steps that `adapt` takes; as many as the chaser if `None`.
        first_order: take the gradients of the log-posterior for constants (`stop_grad` in the
            code); those of the kernel are not.
        meta_gradient: how it goes back through the inner loop; see `adaptax.modes.parse`.
        adapt_only: a predicate on leaf paths choosing what is adapted, and so differs between
            particles; as in `MAML` if `None`.

    Raises:
        ValueError: for counts out of range, or options that do not belong to the objective.
    """

    title = "BMAML"
    loss: Loss = eqx.field(static=True)
    inner_lr: inner.Rate = 0.01
    inner_steps: int = eqx.field(static=True, default=1)
    _: KW_ONLY
    particles: int = eqx.field(static=True, default=10)
    objective: str = eqx.field(static=True, default="chaser")
    leader_steps: int | None = eqx.field(static=True, default=None)
    prior: Callable[[Model], Float[Array, ""]] | None = eqx.field(static=True, default=None)
    chase: tree.Predicate | None = eqx.field(static=True, default=None)
    kernel: svgd.Kernel = eqx.field(static=True, default=svgd.RBF())
    spread: float = eqx.field(static=True, default=1.0)
    eval_steps: int | None = eqx.field(static=True, default=None)
    first_order: bool = eqx.field(static=True, default=False)
    meta_gradient: str = eqx.field(static=True, default="auto")
    adapt_only: tree.Predicate | None = eqx.field(static=True, default=None)

    def __check_init__(self) -> None:
        particles.check(self.particles, self.spread)
        one_of(self, objective=("chaser", "bfa"))
        at_least(self, 0, "leader_steps")
        if self.objective == "bfa" and not (self.leader_steps is None and self.chase is None):
            raise ValueError(
                'leader_steps and chase belong to objective="chaser"; leave them out with "bfa"'
            )

    def init(self, model: Model, *, key: PRNGKeyArray) -> Meta:
        """An `Ensemble` around a model, or the one that is given, what is not adapted shared.

        The first particle is the model itself. The others have every adapted array drawn anew,
        about its mean over entries: `mean + √(1 − s²) (θ − mean) + s · std · ε`, where s is
        `spread` and std that over entries. So `spread=1` gives independent initialisations of the
        same scale, and a small one a cloud around a model that has been trained.

        Args:
            model: where to start: any model; or an `Ensemble` of as many models as there are
                particles, the first of which gives what is shared.
            key: of the draws.

        Raises:
            ValueError: if the numbers of particles differ, or a parameter to draw has no spread.
        """
        first = model.member(0) if isinstance(model, Ensemble) else model
        mask = tree.adaptable(first, self.adapt_only)
        if isinstance(model, Ensemble):
            each = particles.given(model, self.particles).models
            return Ensemble(eqx.filter(each, mask), eqx.filter(first, mask, inverse=True))
        how = {"differ": mask, "train_only": self.train_only}
        return particles.around(model, self.particles, self.spread, key, **how)

    def course(self, meta: Meta, support: Source, **how: Any) -> Model:
        """Return the `Ensemble` after `steps` steps of SVGD, or those on the way."""
        rate = self.inner_lr
        if not jax.tree_util.treedef_is_leaf(jax.tree.structure(rate)):
            rate = Ensemble(rate, rate)  # a rate for every parameter of a model
        return inner.descend(
            self._posterior,
            meta,
            nonempty(support, "support"),
            optimizer=optax.chain(svgd.stein(self.kernel), inner.sgd(rate)),
            first_order=self.first_order,
            meta_gradient=self.meta_gradient,
            adapt_only=tree.under("models"),
            **how,
        )

    def meta_loss(
        self, meta: Meta, task: Task, *, key: PRNGKeyArray, progress: float | Array = 1.0
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """Return the chaser loss, or that of the mixture."""
        chaser_key, query_key, leader_key = jax.random.split(key, 3)
        chaser = self.course(meta, task.support, key=chaser_key, steps=self.inner_steps)
        if self.objective == "bfa":
            query = nonempty(task.query, "query").draw(chaser, query_key)
            losses = chaser.map(lambda model: self.loss(model, query))
            return math.log(len(losses)) - jax.nn.logsumexp(-losses), {}
        seen = _union(task, chaser, query_key)
        leader = self.course(inner.stop(chaser), seen, key=leader_key, steps=self._leader_steps)
        return self._distance(chaser, inner.stop(leader)), {}

    def optimizer(self, steps: int) -> optax.GradientTransformation:
        """Adam, 1e-3 at first and 0.98 of it after every hundredth of the run, as in the code."""
        return optax.adam(lambda step: 1e-3 * 0.98 ** (100 * step / steps))

    def describe(self) -> dict[str, Any]:
        """Return name and hyper-parameters, and how many steps the leader takes."""
        said = super().describe()
        return said if self.objective == "bfa" else {**said, "leader_steps": self._leader_steps}

    @property
    def _leader_steps(self) -> int:
        return 1 if self.leader_steps is None else self.leader_steps

    def _distance(self, chaser: Ensemble, leader: Ensemble) -> Float[Array, ""]:
        """Return the squared distance of what the chaser loss compares."""
        pair = [one.models for one in (chaser, leader)]
        if self.chase is not None:
            chosen = jax.tree.map(self.chase, tree.paths(chaser.models))
            if not any(jax.tree.leaves(chosen)):
                raise ValueError("chase chose no parameter that particles differ in")
            pair = [eqx.filter(models, chosen) for models in pair]
        return tree.squared_distance(*pair)

    def _posterior(self, ensemble: Ensemble, batch: Batch) -> Float[Array, ""]:
        """`−Σ_m log p(θ^m | batch)`, whose gradient is that of each particle."""

        def one(model: Model) -> Float[Array, ""]:
            loss = self.loss(model, batch)
            return loss if self.prior is None else loss + self.prior(model)

        return jnp.sum(ensemble.map(one))


def _union(task: Task, chaser: Ensemble, key: PRNGKeyArray) -> Batch:
    """Return what the leader may see: what the chaser saw, and the queries, if there are any."""
    seen = [source.draw(chaser, key) for source in (task.support, task.query)]
    if seen[1].y is None:
        raise ValueError(
            "the task's query has no targets, y=None, and the leader learns from them; give "
            "labelled queries, or none, shapes (0, ...)"
        )
    return Batch.joined(*seen)

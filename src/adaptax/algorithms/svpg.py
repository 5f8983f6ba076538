"""Bayesian MAML's reinforcement learning (Yoon et al. 2018, arXiv:1806.03836): Stein variational
policy gradients (SVPG; Liu et al. 2017, arXiv:1704.02399) in the inner loop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import KW_ONLY
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from .. import inner, roles, svgd, tree
from ..checks import at_least, one_of
from ..distributions import StackedDistribution
from ..learner import Adapter, Ensemble, InnerLoop, Meta
from ..losses import Loss
from ..task import Batch, Model, Source, Task
from . import particles
from .maml import MAML

CODE_KERNEL: svgd.Kernel = svgd.RBF("mean-distance-plus")
"""The kernel of BMAML's code for reinforcement learning: `exp(−d²/2h²)`,
`h² = ½ (mean distance)² / log(M + 1)`, h differentiated with the rest. Its repulsion is that
kernel's exact derivative, not half of it as in the code for regression."""

KERNELS: dict[str, svgd.Kernel | None] = {
    "code": CODE_KERNEL,
    "median": svgd.RBF(),
    "none": None,
}
"""Kernels of SVPG by name; with none, policies are independent."""


class Policies(eqx.Module):
    """M policies of one structure, each acting in roll-outs of its own.

    A `RollOut` answers them with a batch whose arrays lead with an axis of M: trajectories,
    baseline and advantages of each. So `policies.map(loss, batch)` are the losses of each.

    Args:
        models: a policy whose arrays lead with an axis of M.
    """

    models: Model

    def __call__(self, x: Float[Array, "m ... observation_size"]) -> StackedDistribution:
        """Return the distribution of each policy for its own observations."""
        return StackedDistribution(self.map(lambda model, x: model(x), x))

    def map(self, function: Callable[..., PyTree], *more: PyTree) -> PyTree:
        """The function of every policy, results leading with an axis of M.

        Args:
            function: of a policy, and of its part of `more`.
            more: arrays that lead with that axis, too.
        """
        return self.ensemble.map(function, *more)

    @property
    def particles(self) -> int:
        """Number of policies."""
        return self.ensemble.particles

    @property
    def ensemble(self) -> Ensemble:
        """The same policies, all of which see the same observations."""
        return Ensemble(self.models)


class BayesianMAML(InnerLoop):
    """Bayesian MAML in reinforcement learning: M initial policies, adapted together by SVPG.

        θ^m ← θ^m + ε φ(θ^m),   log p(θ) = −L(θ) / α

    φ is the direction of Stein variational gradient descent (`adaptax.svgd`), L the inner
    objective on roll-outs of this very policy, with a baseline of their own. A high temperature α
    makes repulsion count for more. With `kernel=None` every policy follows its own gradient
    (VPG): the baselines are independent policies that share nothing but the tasks.

    The outer loop, for Θ_0 the initial policies, Θ_n the adapted ones and Θ_{n+s} the leaders,
    that have made s more steps on roll-outs of their own:

    | | |
    |---|---|
    | `objective="policy-gradient"` | `1/M Σ_m L(θ_n^m)` on roll-outs of the adapted policies |
    | with `outer=rl.ParticleTRPO()` | SVPG-TRPO, VPG-TRPO: a trust region for each policy |
    | with `outer=rl.TRPO()` | one trust region for all: mean surrogate, mean KL |
    | `objective="chaser"` | `Σ_m ‖θ_n^m − stop(θ_{n+s}^m)‖`: SVPG-chaser |
    | `objective="reptile"` | `Σ_m ‖θ_0^m − stop(θ_n^m)‖`: VPG-Reptile |

    TRPO brings its own objective; the distances are for an optimizer, Adam, 1e-3, as in the code.
    A policy is a particle whole: weights and log-std.

    Paper and code. Reinforcement learning is in the code alone, and differs from its regression:
    distances are not squared; leaders learn from roll-outs of their own, not from all that was
    seen; the kernel is `CODE_KERNEL`, where our default is `adaptax.svgd.RBF()`, of the median
    distance. The step averages over particles, so that far apart each moves by `ε/(αM)` times its
    own gradient. For 2-D navigation it takes 5 particles, 10 trajectories, ε = 0.1 and α of 1 with
    TRPO and 0.1 with the chaser; with a single particle it leaves α out. It reports returns as
    plots only, and so does `evaluate` here as the mean over all M policies, each acting alone.

    Args:
        loss: inner objective, and the outer one of `"policy-gradient"`, such as `log_prob`.
        inner_lr: step size ε; a number or a schedule over the inner steps.
        inner_steps: n.
        particles: M.
        objective: see above.
        leader_steps: s.
        temperature: α; only with a kernel.
        kernel: of SVPG; independent policies if `None`.
        spread: how far policies start from the one given; see `adaptax.BayesianMAML.init`.

    Raises:
        ValueError: for counts out of range or an unknown objective.
    """

    loss: Loss = eqx.field(static=True)
    inner_lr: inner.Rate = 0.1
    inner_steps: int = eqx.field(static=True, default=1)
    _: KW_ONLY
    particles: int = eqx.field(static=True, default=5)
    objective: str = eqx.field(static=True, default="policy-gradient")
    leader_steps: int = eqx.field(static=True, default=1)
    temperature: float = 1.0
    kernel: svgd.Kernel | None = eqx.field(static=True, default=svgd.RBF())
    spread: float = eqx.field(static=True, default=1.0)

    def __check_init__(self) -> None:
        particles.check(self.particles, self.spread)
        one_of(self, objective=("policy-gradient", "chaser", "reptile"))
        at_least(self, 0, "inner_steps", "leader_steps")
        if isinstance(self.temperature, (int, float)) and not self.temperature > 0:
            raise ValueError(f"temperature is positive, not {self.temperature}")

    def init(self, model: Model, *, key: PRNGKeyArray) -> Policies:
        """`Policies` around a policy, the first of them, or those of an `Ensemble`.

        Args:
            model: a policy, of whose arrays the others are drawn anew; or an `Ensemble`.
            key: of the draws.
        """
        start = particles.start(model, self.particles, self.spread, key, self.train_only)
        return Policies(start.models)

    def course(self, meta: Policies, support: Source, **how: Any) -> Policies:
        """Return the policies after `steps` steps of SVPG, or those on the way."""
        rule = inner.sgd(self.inner_lr)
        if self.kernel is not None:
            rule = optax.chain(svgd.stein(self.kernel), rule)
        path: Any = inner.descend(self._energy, meta, support, optimizer=rule, **how)
        return path

    def meta_loss(
        self, meta: Policies, task: Task, *, key: PRNGKeyArray, progress: float | Array = 1.0
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """Return the objective; leaders, and for Reptile the goals, are held fixed."""
        adapt_key, query_key = jax.random.split(key)
        adapted: Any = self.adapt(meta, task.support, key=adapt_key)
        if self.objective == "policy-gradient":
            return jnp.mean(adapted.map(self.loss, task.query.draw(adapted, query_key))), {}
        goals = inner.stop(adapted)
        if self.objective == "reptile":
            return _distance(meta, goals), {}
        leaders = self.course(goals, task.query, key=query_key, steps=self.leader_steps)
        return _distance(adapted, inner.stop(leaders)), {}

    def member(self, meta: Policies, m: Array, rolled_out: Source) -> tuple[Adapter, Model, Source]:
        """A learner of one policy alone, the others held where they are; see
        `adaptax.rl.ParticleTRPO`.

        Args:
            meta: all policies.
            m: which of them.
            rolled_out: the supports of tasks as they were rolled out, `(tasks, steps, m, …)`.

        Returns:
            The learner, its meta-parameters, and what it learns from.
        """
        only = lambda leaf: leaf[m] if eqx.is_array(leaf) else leaf  # noqa: E731
        one = jax.tree.map(only, meta.models)
        if self.kernel is not None:  # which lets each see the others
            return _Member(self.loss, self, meta, m), one, rolled_out
        mine = lambda leaf: leaf[:, :, m] if eqx.is_array(leaf) else leaf  # noqa: E731
        alone = MAML(self.loss, self.inner_lr, self.inner_steps, train_only=self.train_only)
        return alone, one, jax.tree.map(mine, rolled_out)

    def describe(self) -> dict[str, Any]:
        """Return name and hyper-parameters, and what is averaged."""
        said = super().describe()
        if self.kernel is None:
            said.pop("temperature")
        name = "VPG" if self.kernel is None else "BMAML (SVPG)"
        return {**said, "algorithm": name, "return": "mean over particles"}

    @property
    def inner_optimizer(self) -> None:
        """There is none but `inner_lr`, which `evaluate` may replace."""
        return None

    def _energy(self, policies: Policies, batch: Batch) -> Float[Array, ""]:
        """`−Σ_m log p(θ^m)`, whose gradient is that of each policy."""
        total = jnp.sum(policies.map(self.loss, batch))
        return total if self.kernel is None else total / self.temperature


class _Member(Adapter):
    """A learner of many policies as a learner of one of them, the others held fixed."""

    loss: Loss = eqx.field(static=True)
    learner: BayesianMAML
    others: Policies
    m: Array

    @property
    def inner_steps(self) -> int:
        return self.learner.inner_steps

    def trained(self, meta: Meta) -> Any:
        """Return which leaves of the policy the outer loop trains."""
        return tree.only(roles.trained(meta), self.learner.train_only, "train_only")

    def iterates(
        self, meta: Meta, support: Source, *, key: PRNGKeyArray, steps: int | None = None
    ) -> Model:
        """Return the policy after 0, 1, … steps of all."""
        place = lambda all, one: all.at[self.m].set(one) if eqx.is_array(all) else all  # noqa: E731
        everyone = Policies(jax.tree.map(place, self.others.models, meta))
        path = self.learner.iterates(everyone, support, key=key, steps=steps)
        pick = lambda leaf: leaf[:, self.m] if eqx.is_array(leaf) else leaf  # noqa: E731
        return jax.tree.map(pick, path.models)


def _distance(x: Policies, y: Policies) -> Float[Array, ""]:
    """`Σ_m ‖x^m − y^m‖`, with derivative 0 where two coincide."""
    squares = x.map(tree.squared_distance, y.models)
    apart = squares > 0
    return jnp.sum(jnp.where(apart, jnp.sqrt(jnp.where(apart, squares, 1.0)), 0.0))

"""The outer step of TRPO on each of several policies."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from ..engine.mapping import Across
from ..learner import MetaLearner
from ..protocols import Members
from ..task import Task
from .frozen import collect_all
from .outer import OnRollOuts
from .trpo import TRPO


class ParticleTRPO(OnRollOuts):
    """TRPO on each policy of `BayesianMAML` by itself, the others held where they are.

    All policies are rolled out together; then every one takes the step of `TRPO` on its own
    adapted policy: its own surrogate, trust region and line search, as a function of its own
    initial parameters. As `fit(..., outer=ParticleTRPO())`. Its metrics are the means of those of
    `TRPO`.

    With SVPG a policy's adaptation depends on where the others are, whose own adaptation is
    computed once more for each: time grows with M². `outer=TRPO()` takes the gradient of the mean
    over policies with respect to all of them, in one trust region, in time proportional to M.

    Paper and code. The code steps one policy after another, each seeing those that have already
    moved. Here all see the same, and their order does not matter.

    Args:
        trpo: the step of each.
    """

    trpo: TRPO = TRPO()

    def check(self, learner: MetaLearner) -> None:
        """Raise for a learner that has no members.

        Raises:
            ValueError: if it has not.
        """
        if not isinstance(learner, Members):
            raise ValueError(
                "ParticleTRPO steps the policies of adaptax.rl.BayesianMAML; for those of "
                f"{type(learner).__name__} take TRPO"
            )

    def on_device(self, across: Across, common: PyTree, mine: PyTree) -> PyTree:
        """The step from the tasks of one device, all means taken over those of all."""
        (learner, meta, state), (tasks, keys) = common, mine
        found = collect_all(learner, meta, tasks, keys, self.trpo.mapping)

        def improve(m: Array) -> tuple[Any, Array, dict[str, Array]]:
            # A task answers with what was rolled out: (tasks, steps, m, …) and (tasks, m, …).
            member, one, support = learner.member(meta, m, found.support)
            query = jax.tree.map(lambda leaf: leaf[:, m], found.query)
            given = (member, one, ()), (Task(support, query), keys)
            new, _, value, metrics = self.trpo.on_device(across, *given)
            return new, value, metrics

        new, values, metrics = jax.lax.map(improve, jnp.arange(meta.particles))
        trained = dataclasses.replace(meta, models=new)
        return trained, state, jnp.mean(values), jax.tree.map(jnp.mean, metrics)

"""What outer steps on roll-outs have alike."""

from __future__ import annotations

import abc

import equinox as eqx
import jax
from jax.sharding import Mesh
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from ..engine.mapping import Across, over_devices, task_count
from ..learner import Meta, MetaLearner
from ..task import Task
from .frozen import inner_steps


class OnRollOuts(eqx.Module):
    """Abstract: an outer step, as `adaptax.Outer`, from roll-outs that the devices share."""

    def init(self, trained: PyTree) -> PyTree:
        """The state to start from. Here: nothing is carried from step to step."""
        return ()

    def check(self, learner: MetaLearner) -> None:
        """Raise for a learner that the step cannot do with.

        Raises:
            ValueError: if it has no `inner_steps`.
        """
        inner_steps(learner)

    def step(
        self,
        learner: MetaLearner,
        meta: Meta,
        state: PyTree,
        tasks: Task,
        *,
        key: PRNGKeyArray,
        progress: float | Array,
        mesh: Mesh | None = None,
    ) -> tuple[Meta, PyTree, Float[Array, ""], dict[str, Array]]:
        """New meta-parameters, state, the surrogate, and metrics.

        Args:
            learner: any with `inner_steps`.
            meta: its meta-parameters.
            state: of `init`, or of the step before.
            tasks: arrays lead with the task axis.
            key: of the roll-outs.
            progress: not used.
            mesh: of devices to share the tasks among.
        """
        self.check(learner)
        keys = jax.random.split(key, task_count(tasks))
        common, mine = (learner, meta, state), (tasks, keys)
        trained, state, value, metrics = over_devices(self.on_device, mesh, common, mine)
        return eqx.combine(trained, meta), state, value, metrics

    @abc.abstractmethod
    def on_device(
        self, across: Across, common: PyTree, mine: PyTree
    ) -> tuple[PyTree, PyTree, Float[Array, ""], dict[str, Array]]:
        """The step on one device: what is trained, state, surrogate and metrics.

        Args:
            across: averages over devices; see `adaptax.engine.mapping.over_devices`.
            common: learner, meta-parameters and state.
            mine: this device's tasks, and a key for each.
        """

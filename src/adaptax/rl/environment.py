"""What an environment is: a frozen record of pure functions, one episode at a time."""

from __future__ import annotations

from typing import Protocol, TypeAlias, runtime_checkable

from jaxtyping import Array, Bool, Float, PRNGKeyArray, PyTree

EnvTask: TypeAlias = PyTree
"""What differs between the tasks of an environment: a goal, a transition table."""

EnvState: TypeAlias = PyTree
"""All that the future depends on, the task and (if need be) the time included."""


@runtime_checkable
class Environment(Protocol):
    """A family of Markov decision processes, written for one episode; the roll-out maps it.

    Every method is pure and traceable. Episodes need not end: the horizon of the roll-out cuts
    them. What follows `done` is masked, so no environment has to reset itself.

    Any record with these members will do; nothing needs to be derived from. One that wants to
    know when the roll-out will be over also has `until(horizon) -> Environment`; one that has but
    a few tasks may have them as `all_tasks`, stacked, and meta-batches then have them in turn.
    """

    @property
    def observation_size(self) -> int:
        """Length of an observation."""
        ...

    @property
    def action_size(self) -> int:
        """Length of an action, or the number of actions to choose from if `discrete`."""
        ...

    @property
    def discrete(self) -> bool:
        """Whether an action is an integer in `[0, action_size)`, not a vector."""
        ...

    def sample_task(self, key: PRNGKeyArray) -> EnvTask:
        """The task that this key names."""
        ...

    def reset(self, key: PRNGKeyArray, task: EnvTask) -> EnvState:
        """A first state of this task."""
        ...

    def step(
        self, state: EnvState, action: Array, key: PRNGKeyArray
    ) -> tuple[EnvState, Float[Array, ""], Bool[Array, ""]]:
        """The next state, the reward, and whether the episode is over."""
        ...

    def observe(self, state: EnvState) -> Float[Array, " observation_size"]:
        """What the policy sees of a state."""
        ...

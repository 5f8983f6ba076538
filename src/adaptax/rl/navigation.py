"""2-D navigation: the point robot of MAML (Finn, Abbeel & Levine 2017), section 5.3."""

from __future__ import annotations

from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray

SPEED = 0.1
"""The largest velocity in each coordinate."""


class Place(eqx.Module):
    """Where the point is, and where it should be.

    Args:
        position: `(x, y)`.
        goal: `(x, y)`.
    """

    position: Float[Array, 2]
    goal: Float[Array, 2]


class Navigation(eqx.Module):
    """A point in the plane is to move to a goal it does not see.

    It starts at the origin; the goal is uniform in a square about it. An action is a velocity,
    each coordinate at most 0.1 either way. The episode is over within 0.01 of the goal in both.

    Paper and code. The paper's reward is the negative squared distance, the code's the negative
    distance; the returns it reports (−40 before adaptation, over 100 steps) are the code's. The
    code normalises actions: what the policy gives is clipped to [−1, 1] and then scaled to ±0.1,
    so that its initial noise of 1 is the robot's whole speed, not ten times it. The paper does not
    say so, and its returns after adaptation (−3) cannot be had without: see `normalised`.

    Args:
        reward: `"distance"`, `−‖s − g‖`, or `"squared"`, `−‖s − g‖²`; s after the step.
        see_goal: show the goal to the policy: what the oracle of the paper sees.
        reach: goals are uniform in `[−reach, reach]²`.
        normalised: actions in [−1, 1] stand for velocities of ±0.1, as in the code; if not, an
            action is a velocity.
    """

    action_size: ClassVar[int] = 2
    discrete: ClassVar[bool] = False
    reward: str = eqx.field(static=True, default="distance")
    see_goal: bool = eqx.field(static=True, default=False)
    reach: float = eqx.field(static=True, default=0.5)
    normalised: bool = eqx.field(static=True, default=True)

    def __check_init__(self) -> None:
        if self.reward not in ("distance", "squared"):
            raise ValueError(f'reward is "distance" or "squared", not {self.reward!r}')

    @property
    def observation_size(self) -> int:
        """The position; with `see_goal` the goal too."""
        return 4 if self.see_goal else 2

    def sample_task(self, key: PRNGKeyArray) -> Float[Array, 2]:
        """A goal."""
        return jax.random.uniform(key, (2,), minval=-self.reach, maxval=self.reach)

    def reset(self, key: PRNGKeyArray, task: Float[Array, 2]) -> Place:
        """At the origin."""
        return Place(jnp.zeros(2), task)

    def step(
        self, state: Place, action: Float[Array, 2], key: PRNGKeyArray
    ) -> tuple[Place, Float[Array, ""], Bool[Array, ""]]:
        """Move by the action, scaled and clipped."""
        velocity = SPEED * action if self.normalised else action
        position = state.position + jnp.clip(velocity, -SPEED, SPEED)
        away = position - state.goal
        squared = jnp.sum(away**2)
        reward = -squared if self.reward == "squared" else -jnp.sqrt(squared)
        return Place(position, state.goal), reward, jnp.all(jnp.abs(away) < 0.01)

    def observe(self, state: Place) -> Float[Array, " observation_size"]:
        """The position, and the goal if it may be seen."""
        seen = [state.position, state.goal] if self.see_goal else [state.position]
        return jnp.concatenate(seen)

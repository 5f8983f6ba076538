"""Bandits: k arms, and a Gaussian one whose gradients and Hessians are known in closed form."""

from __future__ import annotations

from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray


class Bandit(eqx.Module):
    """`arms` slot machines: arm i pays 1 with probability `p_i ~ U[0, 1]`, else 0.

    The tasks of RL² (Duan et al. 2016, arXiv:1611.02779), section 3.1. An episode is as many
    pulls as the horizon of the roll-out; the observation is constant.

    Args:
        arms: how many.
    """

    observation_size: ClassVar[int] = 1
    discrete: ClassVar[bool] = True
    arms: int = eqx.field(static=True, default=5)

    @property
    def action_size(self) -> int:
        """The arms."""
        return self.arms

    def sample_task(self, key: PRNGKeyArray) -> Float[Array, " arms"]:
        """The probability that each arm pays."""
        return jax.random.uniform(key, (self.arms,))

    def reset(self, key: PRNGKeyArray, task: Float[Array, " arms"]) -> Float[Array, " arms"]:
        """The state is the task."""
        return task

    def step(
        self, state: Float[Array, " arms"], action: Int[Array, ""], key: PRNGKeyArray
    ) -> tuple[Array, Float[Array, ""], Bool[Array, ""]]:
        """Pull an arm."""
        paid = jax.random.uniform(key) < state[action]
        return state, jnp.where(paid, 1.0, 0.0), jnp.array(False)

    def observe(self, state: Float[Array, " arms"]) -> Float[Array, 1]:
        """Constant observation."""
        return jnp.ones(1)


class GaussianBandit(eqx.Module):
    """One action a in ℝ, paid `−(a − g)²`, and over; the task is `g ~ U[−1, 1]`.

    For `π = N(θ, σ²)` the expected return is `J(θ) = −(θ − g)² − σ²`, so `J' = −2(θ − g)` and
    `J'' = −2`: what estimators of gradient and curvature are to be compared with.
    """

    observation_size: ClassVar[int] = 1
    action_size: ClassVar[int] = 1
    discrete: ClassVar[bool] = False

    def sample_task(self, key: PRNGKeyArray) -> Float[Array, ""]:
        """g."""
        return jax.random.uniform(key, minval=-1.0, maxval=1.0)

    def reset(self, key: PRNGKeyArray, task: Float[Array, ""]) -> Float[Array, ""]:
        """The state is the task."""
        return task

    def step(
        self, state: Float[Array, ""], action: Float[Array, 1], key: PRNGKeyArray
    ) -> tuple[Array, Float[Array, ""], Bool[Array, ""]]:
        """Pay, and end."""
        return state, -jnp.sum((action - state) ** 2), jnp.array(True)

    def observe(self, state: Float[Array, ""]) -> Float[Array, 1]:
        """Constant observation."""
        return jnp.ones(1)

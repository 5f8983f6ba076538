"""Random tabular Markov decision processes."""

from __future__ import annotations

from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray


class Tables(eqx.Module):
    """One Markov decision process.

    Args:
        log_transition: `log p(s' | s, a)`.
        reward: mean reward of `(s, a)`.
    """

    log_transition: Float[Array, "states actions states"]
    reward: Float[Array, "states actions"]


class Cell(eqx.Module):
    """Where in which process.

    Args:
        at: the state.
        tables: the process.
    """

    at: Int[Array, ""]
    tables: Tables


class TabularMDP(eqx.Module):
    """Random Markov decision processes, those of RL² (Duan et al. 2016), section 3.2.

    For each `(s, a)` the next state has a flat Dirichlet law and the reward the law `N(m, 1)`
    with `m ~ N(1, 1)`. Episodes start in state 0 and never end: they are as long as the horizon
    of the roll-out (10 in the paper). The policy sees the state, one-hot.

    Args:
        states: how many; 10 in the paper.
        actions: how many; 5 in the paper.
    """

    discrete: ClassVar[bool] = True
    states: int = eqx.field(static=True, default=10)
    actions: int = eqx.field(static=True, default=5)

    @property
    def observation_size(self) -> int:
        """A state, one-hot."""
        return self.states

    @property
    def action_size(self) -> int:
        """The actions."""
        return self.actions

    def sample_task(self, key: PRNGKeyArray) -> Tables:
        """Transition and reward tables."""
        for_transition, for_reward = jax.random.split(key)
        # Exponentials, normalised: a flat Dirichlet law.
        shape = (self.states, self.actions, self.states)
        log_weights = jnp.log(jax.random.exponential(for_transition, shape))
        reward = 1.0 + jax.random.normal(for_reward, shape[:2])
        return Tables(jax.nn.log_softmax(log_weights), reward)

    def reset(self, key: PRNGKeyArray, task: Tables) -> Cell:
        """In state 0."""
        return Cell(jnp.zeros((), jnp.int32), task)

    def step(
        self, state: Cell, action: Int[Array, ""], key: PRNGKeyArray
    ) -> tuple[Cell, Float[Array, ""], Bool[Array, ""]]:
        """Draw reward and next state."""
        for_next, for_reward = jax.random.split(key)
        row = state.tables.log_transition[state.at, action]
        after = jax.random.categorical(for_next, row).astype(jnp.int32)
        reward = state.tables.reward[state.at, action] + jax.random.normal(for_reward)
        return Cell(after, state.tables), reward, jnp.array(False)

    def observe(self, state: Cell) -> Float[Array, " states"]:
        """The state, one-hot."""
        return jax.nn.one_hot(state.at, self.states, dtype=state.tables.reward.dtype)

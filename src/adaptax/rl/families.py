"""Task families of reinforcement learning, for training, validation and test."""

from __future__ import annotations

from typing import Any

from ..task import Splits
from .bandit import Bandit
from .environment import Environment
from .locomotion import Backend, Goal, Locomotion
from .navigation import Navigation
from .rollout import Tasks
from .tabular import TabularMDP


def splits(env: Environment, **how: Any) -> Splits:
    """`Tasks` of an environment for every split; they follow one law.

    Args:
        env: the environment.
        how: arguments of `Tasks`.
    """
    train, val, test = (Tasks(env, split=split, **how) for split in ("train", "val", "test"))
    return Splits(train, val, test)


def navigation(
    reward: str = "distance", *, see_goal: bool = False, normalised: bool = True, **how: Any
) -> Splits:
    """2-D navigation; see `Navigation`, and `Tasks` for the roll-outs: 20 of 100 steps."""
    return splits(Navigation(reward, see_goal, normalised=normalised), **how)


def bandit(arms: int = 5, *, horizon: int = 10, **how: Any) -> Splits:
    """Bandits of RL²; see `Bandit`."""
    return splits(Bandit(arms), horizon=horizon, **how)


def tabular_mdp(states: int = 10, actions: int = 5, *, horizon: int = 10, **how: Any) -> Splits:
    """Random decision processes of RL²; see `TabularMDP`."""
    return splits(TabularMDP(states, actions), horizon=horizon, **how)


def half_cheetah(
    goal: Goal = "velocity", *, backend: Backend = "spring", horizon: int = 200, **how: Any
) -> Splits:
    """Half-cheetahs of brax that are to run at a velocity or in a direction; see `Locomotion`."""
    return splits(Locomotion("half-cheetah", goal, backend), horizon=horizon, **how)


def ant(
    goal: Goal = "velocity", *, backend: Backend = "spring", horizon: int = 200, **how: Any
) -> Splits:
    """Ants of brax that are to walk at a velocity or in a direction; see `Locomotion`."""
    return splits(Locomotion("ant", goal, backend), horizon=horizon, **how)

"""Policies: `policy(observations) -> distribution` over actions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from ..distributions import Categorical, Gaussian
from .mlp import MLP

MIN_STD = 1e-6
"""Smallest standard deviation of a Gaussian policy."""


class GaussianMLP(eqx.Module):
    """Gaussian policy whose mean is an MLP and whose standard deviation is a vector of its own.

    MAML's policy: two hidden layers of 100, ReLU, Xavier weights, zero biases. Its log-std does
    not depend on the state and is a parameter like all others: the inner loop adapts it, as in
    the paper's code.

    Args:
        observation_size: length of an observation.
        action_size: length of an action.
        hidden: widths of the hidden layers.
        key: of the initialisation.
        activation: elementwise; the tests of second derivatives want a smooth one.
        std: where the standard deviation starts.
    """

    net: MLP
    log_std: Float[Array, " action_size"]

    def __init__(
        self,
        observation_size: int,
        action_size: int,
        hidden: Sequence[int] = (100, 100),
        *,
        key: PRNGKeyArray,
        activation: Callable[[Array], Array] = jax.nn.relu,
        std: float = 1.0,
    ):
        self.net = MLP(observation_size, action_size, hidden, key=key, activation=activation)
        self.log_std = jnp.full(action_size, math.log(std))

    def __call__(self, observations: Float[Array, "*batch observation_size"]) -> Gaussian:
        """Return the distribution of the action for each observation."""
        mean = _rows(self.net, observations)
        return Gaussian(mean, jnp.maximum(self.log_std, math.log(MIN_STD)))


class CategoricalMLP(eqx.Module):
    """A choice among actions whose logits are an MLP.

    Args:
        observation_size: length of an observation.
        action_size: number of actions.
        hidden: widths of the hidden layers.
        key: of the initialisation.
        activation: elementwise.
    """

    net: MLP

    def __init__(
        self,
        observation_size: int,
        action_size: int,
        hidden: Sequence[int] = (100, 100),
        *,
        key: PRNGKeyArray,
        activation: Callable[[Array], Array] = jax.nn.relu,
    ):
        self.net = MLP(observation_size, action_size, hidden, key=key, activation=activation)

    def __call__(self, observations: Float[Array, "*batch observation_size"]) -> Categorical:
        """Return the distribution of the action for each observation."""
        return Categorical(_rows(self.net, observations))


def _rows(net: MLP, observations: Array) -> Array:
    """An MLP on the last axis."""
    first = net.layers[0] if net.layers else net.head
    wanted = first.weight.shape[0]
    if observations.shape[-1] != wanted:
        raise ValueError(
            f"the policy takes observations of size {wanted} and was given size "
            f"{observations.shape[-1]}; make it with the environment's observation_size"
        )
    out = net(observations.reshape(-1, wanted))
    return out.reshape(*observations.shape[:-1], out.shape[-1])

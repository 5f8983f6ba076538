"""Policies: ordinary models, `policy(observations) -> distribution` over actions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from ..learner import Ensemble
from ..models import MLP
from ..tree import wide

MIN_STD = 1e-6
"""Smallest standard deviation of a Gaussian policy."""


class Gaussian(eqx.Module):
    """Independent normal laws, one for each coordinate of an action.

    Args:
        mean: `(*batch, action_size)`.
        log_std: `(action_size,)`, or with the axes of `mean`.
    """

    discrete: ClassVar[bool] = False
    mean: Float[Array, "*batch action_size"]
    log_std: Float[Array, "*#batch action_size"]

    @property
    def action_size(self) -> int:
        """Length of an action."""
        return self.mean.shape[-1]

    def sample(self, key: PRNGKeyArray) -> Float[Array, "*batch action_size"]:
        """One action for each row."""
        noise = jax.random.normal(key, self.mean.shape, self.mean.dtype)
        return self.mean + jnp.exp(self.log_std) * noise

    def log_prob(self, action: Float[Array, "*batch action_size"]) -> Float[Array, "*batch"]:
        """Log-density of each row's action."""
        z = (action - self.mean) * jnp.exp(-self.log_std)
        return -jnp.sum(z**2 / 2 + self.log_std + math.log(2 * math.pi) / 2, axis=-1)

    def kl(self, other: Gaussian) -> Float[Array, "*batch"]:
        """`KL(self ‖ other)` of each row."""
        ratio = jnp.exp(2 * (self.log_std - other.log_std))
        z = (self.mean - other.mean) * jnp.exp(-other.log_std)
        return jnp.sum(other.log_std - self.log_std + (ratio + z**2 - 1) / 2, axis=-1)

    def entropy(self) -> Float[Array, "*batch"]:
        """Differential entropy of each row."""
        each = self.log_std + (math.log(2 * math.pi) + 1) / 2
        return jnp.sum(jnp.broadcast_to(each, self.mean.shape), axis=-1)


class Categorical(eqx.Module):
    """A choice among `action_size` actions.

    A logit of −∞ forbids an action: its probability is 0, its log-probability −∞ with derivative
    0, and it adds nothing to entropy and divergence, nor to their derivatives.

    Args:
        logits: `(*batch, action_size)`, not normalised; one of them finite.
    """

    discrete: ClassVar[bool] = True
    logits: Float[Array, "*batch action_size"]

    @property
    def action_size(self) -> int:
        """Number of actions."""
        return self.logits.shape[-1]

    def sample(self, key: PRNGKeyArray) -> Int[Array, "*batch"]:
        """One action for each row."""
        return jax.random.categorical(key, self.logits)

    def log_prob(self, action: Int[Array, "*batch"]) -> Float[Array, "*batch"]:
        """Log-probability of each row's action."""
        return jnp.take_along_axis(self._rows, action[..., None], axis=-1)[..., 0]

    def kl(self, other: Categorical) -> Float[Array, "*batch"]:
        """`KL(self ‖ other)` of each row; infinite where the other cannot what this one may."""
        p, q = self._rows, other._rows
        return jnp.sum(jnp.exp(p) * jnp.where(jnp.isneginf(p), 0.0, p - q), axis=-1)

    def entropy(self) -> Float[Array, "*batch"]:
        """Entropy of each row."""
        p = self._rows
        return -jnp.sum(jnp.exp(p) * jnp.where(jnp.isneginf(p), 0.0, p), axis=-1)

    @property
    def _rows(self) -> Float[Array, "*batch action_size"]:
        """Log-probabilities of all actions."""
        rows = jax.nn.log_softmax(wide(self.logits))
        return jnp.where(jnp.isneginf(rows), -jnp.inf, rows)


class Laws(eqx.Module):
    """What M policies may do, each in roll-outs of its own: distributions along a leading axis.

    Args:
        each: a distribution whose arrays lead with an axis of M.
    """

    each: Any

    @property
    def discrete(self) -> bool:
        """As that of each."""
        return self.each.discrete

    @property
    def action_size(self) -> int:
        """As that of each."""
        return self.each.action_size

    def sample(self, key: PRNGKeyArray) -> Array:
        """Actions, leading with an axis of M."""
        keys = jax.random.split(key, len(jax.tree.leaves(self.each)[0]))
        return eqx.filter_vmap(lambda law, key: law.sample(key))(self.each, keys)

    def log_prob(self, action: Array) -> Float[Array, "m ..."]:
        """Of the actions of each."""
        return eqx.filter_vmap(lambda law, action: law.log_prob(action))(self.each, action)

    def kl(self, other: Laws) -> Float[Array, "m ..."]:
        """`KL(self ‖ other)` of each."""
        return eqx.filter_vmap(lambda law, other: law.kl(other))(self.each, other.each)

    def entropy(self) -> Float[Array, "m ..."]:
        """Of each."""
        return eqx.filter_vmap(lambda law: law.entropy())(self.each)


class Policies(eqx.Module):
    """M policies of one structure, each acting in roll-outs of its own.

    A `RollOut` answers them with a batch whose arrays lead with an axis of M: trajectories,
    baseline and advantages of each. So `policies.map(loss, batch)` are the losses of each.

    Args:
        models: a policy whose arrays lead with an axis of M.
    """

    models: Model

    def __call__(self, x: Float[Array, "m ... observation_size"]) -> Laws:
        """The law of each policy for its own observations."""
        return Laws(self.map(lambda model, x: model(x), x))

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
        """The law of the action for each observation."""
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
        """The law of the action for each observation."""
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

"""Distributions over actions, which policies answer with."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from .tree import wide


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
        """Draw one action for each row."""
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
        """Draw one action for each row."""
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


class StackedDistribution(eqx.Module):
    """M distributions along a leading axis, each with draws of its own: those of M policies, say.

    Args:
        each: a distribution whose arrays lead with an axis of M.
    """

    each: Any

    @property
    def discrete(self) -> bool:
        """As each has it."""
        return self.each.discrete

    @property
    def action_size(self) -> int:
        """As each has it."""
        return self.each.action_size

    def sample(self, key: PRNGKeyArray) -> Array:
        """Draw actions, leading with an axis of M."""
        keys = jax.random.split(key, len(jax.tree.leaves(self.each)[0]))
        return eqx.filter_vmap(lambda one, key: one.sample(key))(self.each, keys)

    def log_prob(self, action: Array) -> Float[Array, "m ..."]:
        """Log-probability of the actions of each."""
        return eqx.filter_vmap(lambda one, action: one.log_prob(action))(self.each, action)

    def kl(self, other: StackedDistribution) -> Float[Array, "m ..."]:
        """`KL(self ‖ other)` of each."""
        return eqx.filter_vmap(lambda one, other: one.kl(other))(self.each, other.each)

    def entropy(self) -> Float[Array, "m ..."]:
        """Entropy of each."""
        return eqx.filter_vmap(lambda one: one.entropy())(self.each)

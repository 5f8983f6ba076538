"""Policy-gradient objectives as losses, `loss(policy, batch) -> scalar`, by name.

All have the same gradient at the policy that took the actions, the policy gradient
`−mean_t Â_t ∇log π(a_t | s_t)`, and differ in the second derivative, which MAML's meta-gradient
makes use of. For the horizon-1 Gaussian bandit, where `J'' = −2`:

| objective | expected second derivative of −loss, at the sampling policy |
|---|---|
| `log_prob` | `−E[Â]/σ²`: 0 for centred advantages |
| `lvc` | −2, in one step; in longer episodes without the terms across time steps |
| `dice` | −2; unbiased for any horizon |
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..losses import Loss
from ..task import Batch, Model
from .advantages import kept, masked_mean


def log_prob(policy: Model, batch: Batch) -> Float[Array, ""]:
    """`−mean_t log π(a_t|s_t) Â_t`: REINFORCE, the inner objective of MAML's code.

    Its Hessian takes the advantages for constants and so leaves out how the policy's parameters
    change what is sampled. The inner step does not care; the meta-gradient does.
    """
    steps = batch.y
    return -masked_mean(policy(batch.x).log_prob(steps.actions) * steps.advantages, steps.mask)


def lvc(policy: Model, batch: Batch) -> Float[Array, ""]:
    """`−mean_t π(a_t|s_t) / stop(π(a_t|s_t)) Â_t`: low-variance curvature (ProMP,
    Rothfuss et al. 2019, arXiv:1810.06784).

    DiCE without its terms across time steps: some bias for much less variance.
    """
    steps = batch.y
    box = _magic(policy(batch.x).log_prob(steps.actions))
    return -masked_mean(box * steps.advantages, steps.mask)


def dice(policy: Model, batch: Batch) -> Float[Array, ""]:
    """`−mean_t [□(c_t) − □(c_{t−1})] Â_t`, `c_t = Σ_{s≤t} log π(a_s|s_s)`: DiCE with advantages.

    `□(x) = exp(x − stop(x))` is the magic box of Foerster et al. (2018, arXiv:1802.05098), whose
    derivatives of any order are unbiased. They weigh rewards, `Σ_t □(c_t) r_t`; summed by parts
    that is the form above with returns, in which a baseline takes away variance and adds no bias
    (Loaded DiCE, Farquhar et al. 2019, arXiv:1909.10549).
    """
    steps = batch.y
    each = kept(policy(batch.x).log_prob(steps.actions), steps.mask)
    so_far = jnp.cumsum(each, axis=-1)
    before = so_far - each
    return -masked_mean((_magic(so_far) - _magic(before)) * steps.advantages, steps.mask)


def importance(policy: Model, batch: Batch) -> Float[Array, ""]:
    """`−mean_t π(a_t|s_t) / π_old(a_t|s_t) Â_t`, `π_old` the policy that took the actions.

    The surrogate of TRPO and PPO: it says what another policy would have earned.
    """
    return -masked_mean(ratio(policy, batch) * batch.y.advantages, batch.y.mask)


def ratio(policy: Model, batch: Batch) -> Float[Array, "*n t"]:
    """`π(a_t|s_t) / π_old(a_t|s_t)` of every step, 1 where the mask is 0; 0, with derivative 0,
    where π cannot take the action."""
    steps = batch.y
    new = policy(batch.x).log_prob(steps.actions)
    logs = jnp.where(jnp.isneginf(new), new, new - steps.log_probs)
    return jnp.exp(kept(logs, steps.mask))


OBJECTIVES: dict[str, Loss] = {
    "log_prob": log_prob,
    "lvc": lvc,
    "dice": dice,
    "importance": importance,
}
"""The objectives by name."""


def _magic(x: Array) -> Array:
    """`exp(x − stop(x))`; of what is impossible, x = −∞, 1 with derivative 0."""
    away = jnp.where(jnp.isneginf(x), 0.0, x - jax.lax.stop_gradient(x))
    return jnp.exp(away)

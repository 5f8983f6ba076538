"""The terms of LEO's objective, its dropout, and what is done about gradients."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, PRNGKeyArray, PyTree

from .. import roles, tree
from ..learner import Meta
from ..task import Model, Task
from .leo_networks import Gaussian


def sampled_kl(prior: Gaussian, noise: Float[Array, "*codes"]) -> Float[Array, ""]:
    """`mean [log q(z) − log N(z; 0, 1)]` at the sample `z = m + σε`, over entries.

    Its mean over ε is the KL divergence `½(σ² + m² − 1 − log σ²)`. With ε for `(z − m)/σ`, which
    loses its digits where σ is small.

    Args:
        prior: q.
        noise: ε.
    """
    return jnp.mean((prior.at(noise) ** 2 - noise**2) / 2 - jnp.log(prior.std))


def encoder_penalty(start: Float[Array, "*codes"], end: Float[Array, "*codes"]) -> Float[Array, ""]:
    """`mean (stop(z') − z)²`, which draws the encoder to what adaptation finds.

    Args:
        start: z, as encoded.
        end: z', as adapted.
    """
    return jnp.mean((jax.lax.stop_gradient(end) - start) ** 2)


def correlation(rows: Float[Array, "n m"]) -> Float[Array, ""]:
    """`mean (C − I)²`, C the correlations `w_i·w_j / ‖w_i‖‖w_j‖` of the rows: 0 if orthogonal."""
    unit = rows / (jnp.linalg.norm(rows, axis=1, keepdims=True) + 1e-32)
    return jnp.mean((unit @ unit.T - jnp.eye(len(rows), dtype=rows.dtype)) ** 2)


def weight_decay(networks: PyTree) -> Float[Array, ""]:
    """`½ Σ ‖W‖²` over the matrices of the networks."""
    leaves = (leaf for leaf in jax.tree.leaves(tree.parameters(networks)) if leaf.ndim == 2)
    return sum((jnp.sum(tree.wide(leaf) ** 2) for leaf in leaves), jnp.zeros(())) / 2


def kept(key: PRNGKeyArray, rate: float, shape: tuple[int, ...]) -> Bool[Array, ...]:
    """Which entries a dropout of this rate keeps.

    Sixteen random bits decide for an entry, half of those of `jax.random.bernoulli`, since random
    bits are much of what a meta-step costs: a rate is one to 2⁻¹⁶.
    """
    size = math.prod(shape)
    words = jax.random.bits(key, ((size + 1) // 2,), jnp.uint32)
    halves = jax.lax.bitcast_convert_type(words, jnp.uint16).ravel()[:size]
    return halves.reshape(shape) < _threshold(rate)


def _threshold(rate: float) -> int:
    """How many of the 2¹⁶ draws are kept."""
    return max(round((1 - rate) * 2**16), 1)


def dropped(x: Float[Array, ...], key: PRNGKeyArray | None, rate: float) -> Float[Array, ...]:
    """Entries zeroed at a rate and the others scaled up, so that the mean is kept.

    Args:
        x: any array.
        key: of what is dropped; without it nothing is.
        rate: in [0, 1), to 2⁻¹⁶.
    """
    if key is None or _threshold(rate) == 2**16:
        return x
    return jnp.where(kept(key, rate, x.shape), x * (2**16 / _threshold(rate)), 0)


class Dropping(eqx.Module):
    """A model whose inputs drop out."""

    model: Model
    key: PRNGKeyArray
    rate: float = eqx.field(static=True)

    def __call__(self, x: Float[Array, "n ..."]) -> PyTree:
        """Predictions."""
        return self.model(dropped(x, self.key, self.rate))


def dropping(model: Model, key: PRNGKeyArray | None, rate: float) -> Model:
    """The model with dropout on its inputs; as it is without a key."""
    return model if key is None or rate == 0 else Dropping(model, key, rate)


def clip_each_by_norm(limit: float) -> optax.GradientTransformation:
    """Scales each array of the gradient down to a norm of `limit`, if it is above."""

    def clip(g: Array, _: Any) -> Array:
        norm = jnp.linalg.norm(g.ravel())
        return jnp.where(norm > limit, g * (limit / jnp.where(norm > 0, norm, 1)), g)

    return optax.stateless_with_tree_map(clip)


def bounded(limit: float) -> optax.GradientTransformation:
    """Scales what an inner loop descends down to a norm of `limit`, if it is above.

    By the root of `max(‖g‖², limit²)`, which has a derivative where g is zero.
    """

    def bound(grads: PyTree, _: Any) -> PyTree:
        square = sum(jnp.sum(tree.wide(g) ** 2) for g in jax.tree.leaves(grads))
        return tree.in_types_of(
            grads, optax.tree.scale(limit / jnp.sqrt(jnp.maximum(square, limit**2)), grads)
        )

    return optax.stateless(bound)


RESCUE = 1e-4
"""Weight of the decay that takes the place of a gradient that is not finite."""


def rescue(
    objective: Callable[..., Any], meta: Meta, task: Task, key: PRNGKeyArray
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """An objective and its metrics; `10⁻⁴ · ½‖networks‖²` where it or its gradient is not finite.

    Unless the data themselves are not: then it is NaN, and `fit` says so. The gradient is taken
    with the value, and so exists once.

    Args:
        objective: of `(meta, task, key)` to value, metrics, and whether the data are finite.
        meta: the meta-parameters.
        task: one task.
        key: of the objective.
    """

    def decay(trained: Meta) -> Meta:
        still = jax.tree.map(jnp.zeros_like, trained)
        return {**still, "networks": jax.tree.map(lambda w: RESCUE * w, trained["networks"])}

    def judged(meta: Meta, value: Array, metrics: dict[str, Array], bad: Array) -> Any:
        half = RESCUE * tree.norm(meta["networks"]) ** 2 / 2
        return jnp.where(bad, half, value), {**metrics, "rescued": bad.astype(value.dtype)}

    @eqx.filter_custom_vjp
    def call(meta: Meta, task: Task, key: PRNGKeyArray) -> Any:
        value, metrics, usable = objective(meta, task, key)
        return judged(meta, value, metrics, usable & ~jnp.isfinite(value))

    def forward(perturbed: Any, meta: Meta, task: Task, key: PRNGKeyArray) -> Any:
        trained, fixed = eqx.partition(meta, roles.trained(meta))

        def scalar(trained: Meta) -> Any:
            value, metrics, usable = objective(eqx.combine(trained, fixed), task, key)
            return value, (metrics, usable)

        (value, (metrics, usable)), grads = jax.value_and_grad(scalar, has_aux=True)(trained)
        bad = usable & ~(jnp.isfinite(value) & tree.finite(grads))
        grads = jax.tree.map(lambda g, d: jnp.where(bad, d, g), grads, decay(trained))
        return judged(meta, value, metrics, bad), grads

    def backward(grads: Meta, cotangent: Any, *_: Any) -> Meta:
        return jax.tree.map(lambda leaf: cotangent[0] * leaf, grads)

    call.def_fwd(forward)
    call.def_bwd(backward)
    return call(meta, task, key)

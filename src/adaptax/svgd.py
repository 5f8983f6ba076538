"""Stein variational gradient descent (Liu & Wang 2016, arXiv:1608.04471): particles that repel.

    φ(θ_i) = 1/M Σ_j [ k(θ_j, θ_i) ∇ log p(θ_j) + ∇_{θ_j} k(θ_j, θ_i) ],   θ_i ← θ_i + ε φ(θ_i)

M particles move so that their spread comes to be that of a density p: uphill, by the gradients of
all, and away from each other. They are a pytree whose leaves lead with an axis of M. `stein` is an
optax transformation, so that any rule may take the step:

    rule = optax.chain(svgd.stein(), optax.adam(0.1))
    particles = svgd.run(log_density, particles, steps=1000, optimizer=rule)
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

from . import roles, roots
from .tree import wide

Kernel = Callable[[Array], tuple[Array, Array]]
"""From flat particles `(M, D)` to the matrix `k(θ_i, θ_j)`, `(M, M)`, and to the repulsion
`Σ_j ∇_{θ_j} k(θ_j, θ_i)` that each feels, `(M, D)`. Differentiable."""

SMALL = 256
"""Parameters of a leaf below which `descent` joins it with others."""

RULES = ("median", "median-all", "median-distance", "mean-distance", "mean-distance-plus")
"""Rules that choose the bandwidth h, from the squared distances d² of M particles:

* `"median"`: the median of d² between different particles, over log(M + 1).
* `"median-all"`: the median of all M² of them, zeros included, over log M (BMAML's code, `org`).
* `"median-distance"`: the square of the median distance, over log M (BMAML's code, `med`).
* `"mean-distance"`: the square of the mean distance, over log M (BMAML's code, otherwise).
* `"mean-distance-plus"`: the same over log(M + 1) (BMAML's code for reinforcement learning).
"""


@dataclasses.dataclass(frozen=True)
class RBF:
    """The kernel `k(θ, θ') = exp(−‖θ − θ'‖² / h)`, whose gradient pushes particles apart.

        ∇_{θ_j} k(θ_j, θ_i) = −(2/h) (θ_j − θ_i) k(θ_j, θ_i)

    A single particle has `k = 1` and feels no repulsion. Particles that all coincide, for which
    every rule gives h = 0, get h = 1.

    Paper and code. BMAML's released code has 1/h where the derivative has 2/h, so that its
    particles spread less, by 1/√2 at most: `half=True`. It takes h for a constant when it
    differentiates a step, except under `"mean-distance"`: `stop=True`. We differentiate h too, as
    the exact meta-gradient wants. One particle makes its code divide by log 1.

    Args:
        bandwidth: h, a positive number, or a rule by name; see `RULES`.
        half: half the repulsion.
        stop: take h for a constant when differentiating. The derivative is then that of no
            function of the particles, and finite differences do not agree with it.

    Raises:
        ValueError: if the bandwidth is neither a rule nor positive.
    """

    bandwidth: str | float = "median"
    half: bool = False
    stop: bool = False

    def __post_init__(self) -> None:
        known = self.bandwidth in RULES
        if not known and (isinstance(self.bandwidth, str) or not self.bandwidth > 0):
            raise ValueError(
                f"bandwidth is a positive number or one of {', '.join(RULES)}, "
                f"not {self.bandwidth!r}"
            )

    def __call__(self, particles: Float[Array, "m d"]) -> tuple[Array, Array]:
        """The matrix `(M, M)` and the repulsion `(M, D)`."""
        count = len(particles)
        if count == 1:
            return jnp.ones((1, 1), particles.dtype), jnp.zeros_like(particles)
        x = _centred(particles)
        k, rate = self._matrix([x])
        pull = jnp.matmul(k, x, precision="highest")
        return k, rate * (jnp.sum(k, axis=1, keepdims=True) * x - pull)

    def descent(self, particles: list[Array], slopes: list[Array]) -> list[Array]:
        """−φ, as `descent` has it, of particles in parts `(M, D_l)`.

        Attraction and repulsion are one product with the matrix: `K (g + c x) − c (Σ_j K) x`, with
        c = 2/h. Parts need not be joined, which is a third of the work for small nets.
        """
        count = len(particles[0])
        if count == 1:
            return slopes
        parts = [_centred(part) for part in particles]
        k, rate = self._matrix(parts)
        k = k / count
        total = rate * jnp.sum(k, axis=1, keepdims=True)

        def one(x: Array, g: Array) -> Array:
            return jnp.matmul(k, g + rate * x, precision="highest") - total * x

        return [one(x, g) for x, g in zip(parts, slopes)]

    def _matrix(self, parts: list[Array]) -> tuple[Array, Array]:
        """The matrix, of centred particles in parts, and what differences are repelled by: 2/h."""
        squares = _squares(parts)
        h = self.width(squares)
        return jnp.exp(-squares / h), (1 if self.half else 2) / h

    def width(self, squares: Float[Array, "m m"]) -> Float[Array, ""]:
        """h, of two particles or more with these squared distances."""
        count = len(squares)
        pairs = squares[jnp.triu_indices(count, 1)]
        h: Any
        match self.bandwidth:
            case "median":
                h = jnp.median(pairs) / math.log(count + 1)
            case "median-all":
                h = jnp.median(squares) / math.log(count)
            case "median-distance":
                h = jnp.median(_root(pairs)) ** 2 / math.log(count)
            case "mean-distance":
                h = jnp.mean(_root(pairs)) ** 2 / math.log(count)
            case "mean-distance-plus":
                h = jnp.mean(_root(pairs)) ** 2 / math.log(count + 1)
            case _:
                h = jnp.asarray(self.bandwidth, squares.dtype)
        h = jnp.where(h > 0, h, 1.0)
        return jax.lax.stop_gradient(h) if self.stop else h


def direction(particles: PyTree, scores: PyTree, kernel: Kernel | None = None) -> PyTree:
    """The direction φ in which each particle moves.

    Args:
        particles: a pytree whose leaves lead with an axis of M.
        scores: `∇ log p` at each, of the same structure.
        kernel: `RBF()` if `None`.

    Raises:
        ValueError: if there are no particles, or leaves lead with different numbers of them.
    """
    slopes = jax.tree.map(jnp.negative, scores)
    return jax.tree.map(jnp.negative, descent(particles, slopes, kernel))


def descent(particles: PyTree, slopes: PyTree, kernel: Kernel | None = None) -> PyTree:
    """−φ, from the gradients of `−log p`: what each particle is to lose.

    Args:
        particles: a pytree whose leaves lead with an axis of M.
        slopes: `−∇ log p` at each, of the same structure.
        kernel: `RBF()` if `None`.

    Raises:
        ValueError: as `direction` does.
    """
    kernel = RBF() if kernel is None else kernel
    roles.trained(particles)  # refuses complex ones
    if isinstance(kernel, RBF):
        parts, join = _parts(particles)
        return join(kernel.descent(parts, _parts(slopes)[0]))
    flat, unflatten = _flatten(particles)
    matrix, repulsion = kernel(flat)
    attraction = jnp.matmul(matrix, _flatten(slopes)[0], precision="highest")
    return unflatten((attraction - repulsion) / len(flat))


def stein(kernel: Kernel | None = None) -> optax.GradientTransformation:
    """From the gradients of `−log p` at each particle to `−φ`, which descent follows.

    Args:
        kernel: `RBF()` if `None`.
    """

    def update(grads: PyTree, state: Any, params: PyTree = None) -> tuple[PyTree, Any]:
        return descent(params, grads, kernel), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def run(
    log_density: Callable[[PyTree], Float[Array, ""]],
    particles: PyTree,
    *,
    steps: int,
    optimizer: optax.GradientTransformation,
) -> PyTree:
    """The particles after `steps` steps towards a density; differentiable.

    Args:
        log_density: of one particle, up to a constant.
        particles: a pytree whose leaves lead with an axis of M.
        steps: number of steps.
        optimizer: a rule that begins with `stein(kernel)`; without it every particle climbs alone.
    """
    loss = lambda each: -jnp.sum(jax.vmap(log_density)(each))  # noqa: E731
    update = roots.safe(optimizer.update)

    def step(carry: PyTree, _: None) -> tuple[PyTree, None]:
        particles, state = carry
        updates, state = update(jax.grad(loss)(particles), state, particles)
        return (optax.apply_updates(particles, updates), state), None

    carry, _ = jax.lax.scan(step, (particles, optimizer.init(particles)), length=steps)
    return carry[0]


def _parts(particles: PyTree) -> tuple[list[Array], Callable[[list[Array]], PyTree]]:
    """Every particle as several vectors, and the way back.

    A leaf is one; those so small that an operation takes longer to start than to run are joined.
    """
    leaves, structure = jax.tree.flatten(particles)
    count = _count(leaves)
    small = [i for i, leaf in enumerate(leaves) if leaf.size < SMALL * count]
    large = [i for i in range(len(leaves)) if i not in small]
    groups = [[i] for i in large] + [small] * bool(small)
    ways = [_flatten([leaves[i] for i in group]) for group in groups]

    def join(parts: list[Array]) -> PyTree:
        new = [leaf for part, (_, way) in zip(parts, ways) for leaf in way(part)]
        at = dict(zip(itertools.chain(*groups), new))
        return jax.tree.unflatten(structure, [at[i] for i in range(len(leaves))])

    return [part for part, _ in ways], join


def _flatten(particles: PyTree) -> tuple[Float[Array, "m d"], Callable[[Array], PyTree]]:
    """Every particle as a vector, and the way back."""
    leaves, structure = jax.tree.flatten(particles)
    count = _count(leaves)
    flat = jnp.concatenate([wide(leaf).reshape(count, -1) for leaf in leaves], axis=1)
    ends = [0]
    for leaf in leaves:
        ends.append(ends[-1] + leaf.size // count)

    def unflatten(flat: Array) -> PyTree:
        parts = (flat[:, a:b] for a, b in itertools.pairwise(ends))
        new = [part.reshape(leaf.shape).astype(leaf.dtype) for part, leaf in zip(parts, leaves)]
        return jax.tree.unflatten(structure, new)

    return flat, unflatten


def _count(leaves: list[Array]) -> int:
    """M, the axis that all lead with."""
    counts = {leaf.shape[:1] for leaf in leaves}
    if len(counts) != 1 or counts <= {(), (0,)}:
        raise ValueError(
            "particles are a pytree of arrays that all lead with the same axis of 1 or more, and "
            f"these lead with {sorted(counts)}"
        )
    ((count,),) = counts
    return count


def _centred(x: Float[Array, "m d"]) -> Float[Array, "m d"]:
    """About their mean, so that no digits are lost when they are close together and far out.

    All that is made of them depends on differences alone, so that the derivative through the mean
    is zero and need not be computed.
    """
    return x - jax.lax.stop_gradient(jnp.mean(x, axis=0))


def _squares(parts: list[Array]) -> Float[Array, "m m"]:
    """`‖x_i − x_j‖²`, of vectors in parts `(M, D_l)` that average to zero."""
    gram: Any = sum(_gram(x) for x in parts)
    norms = jnp.diagonal(gram)
    return norms[:, None] + norms[None, :] - 2 * gram


@jax.custom_jvp
def _gram(x: Float[Array, "m d"]) -> Float[Array, "m m"]:
    """`x xᵀ`, whose derivative is one product and its transpose, not two products."""
    return jnp.matmul(x, x.T, precision="highest")


@_gram.defjvp
def _gram_jvp(at: tuple[Array], along: tuple[Array]) -> tuple[Array, Array]:
    half = jnp.matmul(*along, at[0].T, precision="highest")
    return _gram(*at), half + half.T


def _root(squares: Float[Array, " pairs"]) -> Float[Array, " pairs"]:
    """Distances, without the infinite derivative of the root at zero."""
    positive = squares > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, squares, 1.0)), 0.0)

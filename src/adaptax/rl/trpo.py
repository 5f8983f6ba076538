"""Trust-region policy optimisation of the meta-parameters, through the adaptation."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PyTree

from .. import modes, roles, tree
from ..engine.mapping import Across, Mapping, chunk_size, map_over, sum_over
from ..losses import Loss
from ..task import Batch
from .advantages import masked_mean
from .frozen import Collected, adapt, collect_all, returns
from .objectives import importance
from .outer import OnRollOuts


class TRPO(OnRollOuts):
    """The outer step of MAML's reinforcement learning: TRPO (Schulman et al. 2015,
    arXiv:1502.05477) on the *post-update* policies.

    Every task is rolled out before adaptation (D) and after (D'). With D and D' held fixed,
    `θ'(θ) = U_k(θ; D)` is a differentiable function, and

        minimise   L(θ)  = −mean over tasks and steps of π_θ'(θ)(a|s) / π_old'(a|s) Â    on D'
        such that  KL(θ) = mean over tasks and steps of KL(π_old' ‖ π_θ'(θ)) ≤ δ         on D'

    by one step along `F⁻¹∇L`, F the Hessian of KL at the old θ, whose length makes the quadratic
    model of KL equal δ, shortened until L has improved and KL itself is at most δ. If it never
    is, θ stays.

    `F v` is exact: since KL and its derivative vanish where the two policies are equal,
    `F = Jᵀ (∂²KL/∂π²) J` with J the derivative of the adapted policies' distributions with
    respect to θ. It is linearised once, and conjugate gradient applies it and its transpose. The
    paper's code takes finite differences of ∇KL instead.

    As `fit(..., outer=TRPO())`. A learner with `first_order=True` has a J without the Hessians of
    the inner loss.

    Args:
        max_kl: δ.
        cg_steps: conjugate-gradient iterations.
        damping: added to the diagonal of F.
        curvature: fraction of the trajectories that F is estimated from, of D and of D', of each
            policy. The products with F are most of the work. What is accepted is judged on all.
        backtrack: factor between trial steps.
        max_backtracks: trial steps, the full one included.
        objective: L, of adapted policy and D'.
        mapping: over tasks, of all but the roll-outs, which run together; see
            `adaptax.engine.mapping.Mapping`.
    """

    max_kl: float = eqx.field(static=True, default=0.01)
    cg_steps: int = eqx.field(static=True, default=10)
    damping: float = eqx.field(static=True, default=1e-5)
    curvature: float = eqx.field(static=True, default=1.0)
    backtrack: float = eqx.field(static=True, default=0.8)
    max_backtracks: int = eqx.field(static=True, default=15)
    objective: Loss = eqx.field(static=True, default=importance)
    mapping: Mapping = eqx.field(static=True, default="auto")

    def __check_init__(self) -> None:
        if not self.max_kl > 0:
            raise ValueError(f"max_kl is a positive bound, not {self.max_kl}")
        if self.cg_steps < 1 or self.max_backtracks < 1 or not 0 < self.backtrack < 1:
            raise ValueError(
                "cg_steps and max_backtracks are at least 1 and backtrack lies between 0 and 1; "
                f"they are {self.cg_steps}, {self.max_backtracks} and {self.backtrack}"
            )

        if not 0 < self.curvature <= 1:
            raise ValueError(f"curvature is a fraction, above 0 and up to 1, not {self.curvature}")

    def on_device(self, across: Across, common: PyTree, mine: PyTree) -> PyTree:
        """The step; see `OnRollOuts`.

        The metrics are the mean returns before and after adaptation, the KL that was accepted,
        and which fraction of the full step (0: none improved).
        """
        learner, meta, state = common
        trained, fixed = eqx.partition(meta, learner.trained(meta))
        theta, flat_to_tree = ravel_pytree(jax.tree.map(tree.wide, trained))
        unravel = lambda theta: tree.in_types_of(trained, flat_to_tree(theta))  # noqa: E731
        tasks, keys = mine
        found = collect_all(learner, meta, tasks, keys, self.mapping)
        rolled_out, rest = eqx.partition(found, eqx.is_array)
        count = len(jax.tree.leaves(rolled_out)[0])

        def law(theta: Array, one: PyTree) -> PyTree:
            """The adapted policy's distribution of actions on D'."""
            one = eqx.combine(one, rest)
            with modes.forward_mode():
                policy = adapt(learner, eqx.combine(unravel(theta), fixed), one)
            return roles.apply(policy, one.query.x)

        def loss(law: PyTree, one: PyTree) -> Array:
            return self.objective(lambda x: law, one.query)

        def divergence(old: PyTree, new: PyTree, one: PyTree) -> Array:
            return masked_mean(old.kl(new), one.query.y.mask)

        size = chunk_size(self.mapping, count, lambda one: law(theta, one), (rolled_out,))

        def mean(function: Callable[..., PyTree], *xs: PyTree) -> PyTree:
            return across(jax.tree.map(lambda total: total / count, sum_over(function, xs, size)))

        def slope(one: PyTree) -> tuple[tuple[Array, PyTree], Array]:
            def surrogate(theta: Array) -> tuple[Array, PyTree]:
                at = law(theta, one)
                return loss(at, one), at

            return jax.value_and_grad(surrogate, has_aux=True)(theta)

        (values, old), gradients = map_over(slope, rolled_out, size)
        before, gradient = across((jnp.mean(values), jnp.mean(gradients, axis=0)))

        # Once for each task; what F v needs of it is kept.
        thin = _thinned(rolled_out, self.curvature)
        linearise = lambda one: jax.linearize(lambda theta: law(theta, one), theta)  # noqa: E731
        laws, pushes = map_over(linearise, thin, size)

        def fisher(v: Array) -> Array:
            def each(one: PyTree, law: PyTree, push: Any) -> Array:
                curvature = jax.grad(lambda new: divergence(law, new, one))
                curved = jax.jvp(curvature, (law,), (push(v),))[1]
                return jax.linear_transpose(push, theta)(curved)[0]

            return mean(each, thin, laws, pushes) + self.damping * v

        def judge(theta: Array) -> tuple[Array, Array]:
            def each(one: PyTree, old: PyTree) -> tuple[Array, Array]:
                new = law(theta, one)
                return loss(new, one), divergence(old, new, one)

            return mean(each, rolled_out, old)

        theta, value, kl, fraction = line_search(
            judge, theta, natural_step(fisher, gradient, self.max_kl, self.cg_steps), before,
            max_kl=self.max_kl, backtrack=self.backtrack, tries=self.max_backtracks,
        )  # fmt: skip
        metrics = {"kl": kl, "step_fraction": fraction, "gradient_norm": jnp.linalg.norm(gradient)}
        metrics |= across(returns(eqx.combine(rolled_out, rest)))
        return unravel(theta), state, value, metrics


def _thinned(rolled_out: Collected, fraction: float) -> Collected:
    """The first trajectories of every roll-out of every task and policy."""

    def first(batch: Batch) -> Batch:
        # After the axes of tasks, of inner steps and of policies, as far as there are.
        axis = batch.y.mask.ndim - 2
        keep = math.ceil(fraction * batch.y.mask.shape[axis])
        return jax.tree.map(lambda leaf: jax.lax.slice_in_dim(leaf, 0, keep, axis=axis), batch)

    query, batches = first(rolled_out.query), first(rolled_out.support.batches)
    parts = lambda collected: (collected.query, collected.support.batches)  # noqa: E731
    return eqx.tree_at(parts, rolled_out, (query, batches))


def conjugate_gradient(
    product: Callable[[Array], Array], b: Float[Array, " p"], steps: int, tolerance: float = 1e-10
) -> tuple[Float[Array, " p"], Float[Array, " p"]]:
    """`x ≈ A⁻¹b` and the residual `b − A x`, A symmetric positive definite, known by `A v`.

    Args:
        product: `v ↦ A v`.
        b: right-hand side.
        steps: iterations at most; as many as dimensions are exact.
        tolerance: squared norm of the residual at which it is done.
    """

    def unfinished(carry: tuple[Array, ...]) -> Array:
        _, _, _, squared, i = carry
        return (squared > tolerance) & (i < steps)

    def step(carry: Any) -> Any:
        x, residual, along, squared, i = carry
        image = product(along)
        rate = squared / jnp.dot(along, image)
        x, residual = x + rate * along, residual - rate * image
        now = jnp.dot(residual, residual)
        return x, residual, residual + now / squared * along, now, i + 1

    start = (jnp.zeros_like(b), b, b, jnp.dot(b, b), jnp.array(0))
    return jax.lax.while_loop(unfinished, step, start)[:2]


def natural_step(
    fisher: Callable[[Array], Array], gradient: Float[Array, " p"], max_kl: float, cg_steps: int
) -> Float[Array, " p"]:
    """`√(2δ / gᵀF⁻¹g) F⁻¹g`: the step to subtract, where the quadratic model of KL is δ.

    Args:
        fisher: `v ↦ F v`.
        gradient: g.
        max_kl: δ.
        cg_steps: conjugate-gradient iterations for `F⁻¹g`.
    """
    direction, residual = conjugate_gradient(fisher, gradient, cg_steps)
    curvature = jnp.dot(direction, gradient - residual)  # xᵀF x, and one product less
    return jnp.sqrt(2 * max_kl / (curvature + 1e-8)) * direction


def line_search(
    evaluate: Callable[[Array], tuple[Array, Array]],
    theta: Float[Array, " p"],
    step: Float[Array, " p"],
    before: Float[Array, ""],
    *,
    max_kl: float,
    backtrack: float,
    tries: int,
) -> tuple[Float[Array, " p"], Float[Array, ""], Float[Array, ""], Float[Array, ""]]:
    """The first of `θ − ρ^i step`, i = 0, 1, …, with less loss and KL within its bound.

    Args:
        evaluate: `θ ↦ (loss, KL)`.
        theta: where to start.
        step: the full step, to be subtracted.
        before: the loss at `theta`.
        max_kl: bound on KL.
        backtrack: ρ.
        tries: how many trial steps.

    Returns:
        θ, its loss and KL, and the fraction `ρ^i`; for none accepted the old θ, `before`, 0, 0.
    """

    def unfinished(carry: tuple[Array, ...]) -> Array:
        i, fraction = carry[0], carry[-1]
        return (fraction == 0) & (i < tries)

    def trial(carry: Any) -> Any:
        i = carry[0]
        fraction = jnp.asarray(backtrack, theta.dtype) ** i
        there = theta - fraction * step
        loss, kl = evaluate(there)
        accepted = (loss < before) & (kl <= max_kl)  # false for NaN
        values = ((there, theta), (loss, before), (kl, 0.0), (fraction, 0.0))
        return i + 1, *(jnp.where(accepted, new, old) for new, old in values)

    zero = jnp.zeros((), theta.dtype)
    return jax.lax.while_loop(unfinished, trial, (jnp.array(0), theta, before, zero, zero))[1:]

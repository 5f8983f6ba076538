"""The expansion of meta-gradients in the inner step size (Nichol et al. 2018, section 5)."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from .. import io, program, roles, tree
from ..algorithms.maml import MAML
from ..algorithms.reptile import Reptile
from ..engine import feed
from ..engine.mapping import meta_value_and_grad
from ..learner import MetaLearner
from ..task import Batch, Frozen, Minibatches, Model, Task, TaskDistribution

RATES = (8e-4, 4e-4, 2e-4, 1e-4)
"""Inner step sizes of an expansion, unless others are given."""


@dataclasses.dataclass(frozen=True)
class Expansion:
    """A meta-gradient measured against `E[g] = a·AvgGrad + b·AvgGradInner + O(α²)`.

    R denotes the step sizes, p the parameters of the model, all in one vector.

    Args:
        learner: what its `describe` says.
        minibatches: of every task.
        orderings: `"all"` or the number drawn for every task.
        tasks: how many were sampled.
        rates: step sizes α, `(R,)`.
        gradients: `E[g]` at each of them, `(R, p)`; of Reptile `E[(θ − φ)/α]`.
        avg_grad: `E[ḡ_1]`, the gradient of a minibatch at θ, `(p,)`.
        avg_grad_inner: `E[H̄_2 ḡ_1]`, the Hessian of one minibatch times the gradient of another,
            `(p,)`: half the gradient of their inner product.
        coefficients: a and b, by least squares, `(R, 2)`; NaN where the two vectors are parallel.
        errors: standard errors of the coefficients, by leaving out a task at a time, `(R, 2)`;
            NaN for a single task.
        predicted: a and b as the paper has them, `(R, 2)`; `None` where it says nothing.
        residuals: `‖E[g] − a·AvgGrad − b·AvgGradInner‖ / ‖AvgGrad‖` with the predicted
            coefficients, or the measured ones where there are none, `(R,)`.
        order: slope of `log residual` by `log α`: 2 where the expansion holds; NaN where the
            residual is no more than rounding.
    """

    learner: dict[str, Any]
    minibatches: int
    orderings: int | str
    tasks: int
    rates: np.ndarray
    gradients: np.ndarray
    avg_grad: np.ndarray
    avg_grad_inner: np.ndarray
    coefficients: np.ndarray
    errors: np.ndarray
    predicted: np.ndarray | None
    residuals: np.ndarray
    order: float

    def to_json(self) -> dict[str, Any]:
        """Everything but the vectors, as JSON values: `None` for what is not finite."""
        vectors = ("gradients", "avg_grad", "avg_grad_inner")
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        plain = {n: v.tolist() if isinstance(v, np.ndarray) else v for n, v in fields.items()}
        return io.strict({name: plain[name] for name in plain if name not in vectors})


def taylor_coefficients(
    learner: MetaLearner,
    model: Model,
    tasks: TaskDistribution,
    *,
    key: PRNGKeyArray,
    rates: Sequence[float] = RATES,
    count: int = 8,
    minibatches: int | None = None,
    orderings: int | None = None,
) -> Expansion:
    """Measure the two leading terms of a meta-gradient in the inner step size.

    With `L_1 … L_k` the losses of k minibatches of a task, drawn alike, and their gradients and
    Hessians at the initialisation θ written with a bar, every meta-gradient of the family is

        E[g] = a·E[ḡ_1] + b·E[H̄_2 ḡ_1] + O(α²)

    with coefficients that `predicted_coefficients` lists. The support of each sampled task is cut
    into n minibatches; the learner meets them in an order, one at each inner step, and the last one
    as the query. The mean over all n! orders is the expectation over minibatches, exactly, as are
    the two vectors, from n Hessian-vector products a task.

    Use float64 (`jax.enable_x64(True)`, and a model made under it), a loss that is smooth in the
    parameters, and step sizes well below the inverse curvature: the coefficients carry an error of
    first order in α.

    Args:
        learner: any with a step size `inner_lr` of gradient descent; it is tried with each rate.
        model: the initialisation θ.
        tasks: whose supports are `Batch`es of at least n examples; queries are not used.
        key: names the tasks, minibatches and orders.
        rates: step sizes α.
        count: number of tasks.
        minibatches: n, of a task; as many as one meta-gradient of MAML, FOMAML or Reptile sees if
            `None`.
        orderings: how many orders to draw for each task; all if `None`. Each comes with its
            rotations and their reversals, so that every minibatch takes every place and, where
            the learner sees all of them, every pair both orders: only the residual is noisy then.

    Raises:
        ValueError: if the learner has no step size or more steps than minibatches, the support is
            too small, or a count makes no sense.

    Example:
        `taylor_coefficients(ax.FOMAML(loss, inner_steps=2), model, tasks.train, key=key)`
    """
    n, model = _count(learner, minibatches), roles.deduplicate(model)
    if count < 1 or (orderings is not None and orderings < 1) or not len(rates):
        raise ValueError(
            f"count={count}, orderings={orderings} and rates={list(rates)} should be at least one "
            "task, order and step size"
        )
    if not min(rates) > 0:
        raise ValueError(f"rates={list(rates)} should be positive step sizes")
    every = orderings is None or math.factorial(n) <= 2 * n * orderings
    loaded = feed.load(tasks, key, jnp.arange(count, dtype=jnp.uint32))
    keys = jax.random.split(key, count)
    rate = jnp.asarray(rates, float)
    drawn = None if every else orderings
    firsts, inners, means = (
        np.asarray(part, np.float64)
        for part in program.call(_measure, learner, model, tasks, loaded, keys, rate, n, drawn)
    )
    predicted = [predicted_coefficients(learner, r, model) for r in rates]
    known = None if predicted[0] is None else np.array(predicted, float)
    return _expansion(
        means,
        firsts,
        inners,
        learner=learner.describe(),
        minibatches=n,
        orderings="all" if every else orderings or 0,
        rates=np.array(rates, float),
        predicted=known,
        rounding=_rounding(model, rates, firsts),
    )


def predicted_coefficients(
    learner: MetaLearner, rate: float, model: Model | None = None
) -> tuple[float, float] | None:
    """The coefficients of `AvgGrad` and `AvgGradInner` in the expected meta-gradient.

    | learner | sees | AvgGrad | AvgGradInner |
    |---|---|---|---|
    | MAML with no inner step (joint training) | 1 | 1 | 0 |
    | MAML, m inner steps | k = m + 1 | 1 | −2(k − 1)α |
    | FOMAML | k = m + 1 | 1 | −(k − 1)α |
    | Reptile, k inner steps | k | k | −½k(k − 1)α |
    | Reptile with `skip=s` | k | k − s | −½(k − s)(k + s − 1)α |

    The last line follows from the paper's `g_i = ḡ_i − αH̄_i Σ_{j<i} ḡ_j + O(α²)`, summed over
    i > s; the others are printed in its section 5.

    Args:
        learner: any.
        rate: α.
        model: what it adapts; without, all parameters are taken to be adapted.

    Returns:
        `None` for other learners, and for those that adapt some parameters only.
    """
    if not isinstance(learner, MAML | Reptile) or getattr(learner, "include_query", False):
        return None
    chosen = learner.adapt_only
    if isinstance(learner, Reptile):
        chosen = chosen or tree.every
    if model is None:
        partly = chosen not in (None, tree.every)
    else:
        mask, whole = tree.adaptable(model, chosen), tree.adaptable(model, tree.every)
        partly = jax.tree.leaves(mask) != jax.tree.leaves(whole)
    if partly:
        return None
    if isinstance(learner, Reptile):
        k, s = learner.inner_steps, learner.skip
        return float(k - s), -(k - s) * (k + s - 1) / 2 * rate
    return 1.0, -(1 if learner.first_order else 2) * learner.inner_steps * rate


def _count(learner: MetaLearner, minibatches: int | None) -> int:
    """Minibatches of a task."""
    if not hasattr(learner, "inner_lr") or getattr(learner, "inner_optimizer", None) is not None:
        raise ValueError(
            "the expansion is in the step size of gradient descent, and this learner has no "
            "`inner_lr`, or an `inner_optimizer` in its place"
        )
    seen = None
    if isinstance(learner, MAML | Reptile):
        seen = learner.inner_steps + (not isinstance(learner, Reptile))
    if minibatches is None and seen is None:
        raise ValueError(
            f"say how many minibatches {type(learner).__name__} sees in a task: minibatches=2"
        )
    n = seen if minibatches is None else minibatches
    if n is None or n < max(seen or 1, 1):
        raise ValueError(f"minibatches={n}, but the learner sees {seen} of a task")
    return n


def _measure(
    learner: MetaLearner,
    model: Model,
    tasks: TaskDistribution,
    loaded: PyTree,
    keys: Array,
    rates: Float[Array, " rates"],
    n: int,
    orderings: int | None,
) -> tuple[Float[Array, "count p"], Float[Array, "count p"], Float[Array, "rates count p"]]:
    """For every task: the mean of `ḡ_i`, the mean of `H̄_j ḡ_i`, and the mean meta-gradient."""
    params, rest = eqx.partition(model, roles.trained(model))
    loss = roles.pure(learner.loss)

    def one(loaded: PyTree, key: PRNGKeyArray) -> tuple[Array, Array, Array]:
        cut_key, order_key, learner_key = jax.random.split(key, 3)
        batches = _cut(feed.task(tasks, loaded).support, n, cut_key)
        slope = lambda p, b: jax.grad(lambda p: loss(eqx.combine(p, rest), b))(p)  # noqa: E731
        each = jax.lax.map(lambda b: slope(params, b), batches)
        total = jax.tree.map(lambda leaf: jnp.sum(leaf, axis=0), each)

        def product(xs: tuple[Batch, PyTree]) -> PyTree:
            batch, own = xs
            others = jax.tree.map(jnp.subtract, total, own)
            return jax.jvp(lambda p: slope(p, batch), (params,), (others,))[1]

        products = jax.lax.map(product, (batches, each))
        pairs = max(n * (n - 1), 1)
        orders = _orders(n, orderings, order_key)
        sets = jax.tree.map(lambda leaf: leaf[orders], batches)
        ordered = Task(Frozen(sets), jax.tree.map(lambda leaf: leaf[:, -1], sets))

        def meta_gradient(rate: Float[Array, ""]) -> Float[Array, " p"]:
            tried = eqx.tree_at(lambda learner: learner.inner_lr, learner, rate)
            meta = tried.init(model, key=learner_key)
            _, grads = meta_value_and_grad(tried, meta, ordered, key=learner_key)
            grads = grads["model"] if isinstance(grads, dict) and "model" in grads else grads
            scale = rate if isinstance(learner, Reptile) else 1.0
            return ravel_pytree(grads)[0] / scale

        first = ravel_pytree(total)[0] / n
        inner = ravel_pytree(jax.tree.map(lambda leaf: jnp.sum(leaf, axis=0) / pairs, products))[0]
        return first, inner, jax.lax.map(meta_gradient, rates)

    firsts, inners, means = jax.lax.map(lambda xs: one(*xs), (loaded, keys))
    return firsts, inners, jnp.moveaxis(means, 0, 1)


def _cut(support: Any, n: int, key: PRNGKeyArray) -> Batch:
    """The support as n minibatches of one size, at random: `(n, size, ...)`."""
    if not isinstance(support, Batch) or support.weight is not None or support.size < n:
        raise ValueError(
            f"the support of a task should be a Batch of {n} or more examples without weights, to "
            f"be cut into {n} minibatches, and is "
            f"{getattr(support, 'size', type(support).__name__)}"
        )
    cut = Minibatches(support, support.size // n, key)
    parts = [cut.at(i).draw(None, key) for i in range(n)]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts)


def _orders(n: int, orderings: int | None, key: PRNGKeyArray) -> Int[Array, "orders n"]:
    """All orders of n minibatches; or some at random, with their rotations and reversals."""
    if orderings is None:
        return jnp.array(list(itertools.permutations(range(n))))
    turned = (jnp.arange(n)[:, None] + jnp.arange(n)) % n
    turns = jnp.concatenate([turned, turned[:, ::-1]])
    drawn = jax.vmap(lambda k: jax.random.permutation(k, n))(jax.random.split(key, orderings))
    return drawn[:, turns].reshape(-1, n)


def _expansion(
    means: np.ndarray,
    firsts: np.ndarray,
    inners: np.ndarray,
    *,
    rounding: np.ndarray,
    predicted: np.ndarray | None,
    rates: np.ndarray,
    **described: Any,
) -> Expansion:
    first, inner, mean = firsts.mean(0), inners.mean(0), means.mean(1)
    found = np.array([_fit(m, first, inner) for m in mean])
    basis = np.stack([first, inner])
    coefficients = found if predicted is None else predicted
    left = mean - np.where(np.isfinite(coefficients), coefficients, 0.0) @ basis
    residuals = np.linalg.norm(left, axis=1) / np.linalg.norm(first)
    return Expansion(
        tasks=len(firsts),
        rates=rates,
        gradients=mean,
        avg_grad=first,
        avg_grad_inner=inner,
        coefficients=found,
        errors=_errors(means, firsts, inners),
        predicted=predicted,
        residuals=residuals,
        order=_order(rates, residuals, rounding),
        **described,
    )


def _fit(gradient: np.ndarray, first: np.ndarray, inner: np.ndarray) -> np.ndarray:
    """The coefficients of two vectors, by least squares; NaN where they are parallel."""
    sizes = np.linalg.norm(first), np.linalg.norm(inner)
    if min(sizes) == 0 or len(first) < 2:
        return np.full(2, np.nan)
    # Scaled, so that the rank does not depend on units.
    basis = np.stack([first / sizes[0], inner / sizes[1]], axis=1)
    found, _, rank, _ = np.linalg.lstsq(basis, gradient, rcond=1e-9)
    return found / sizes if rank == 2 else np.full(2, np.nan)


def _errors(means: np.ndarray, firsts: np.ndarray, inners: np.ndarray) -> np.ndarray:
    """The jackknife over tasks."""
    count = len(firsts)
    if count < 2:
        return np.full((len(means), 2), np.nan)
    keep = ~np.eye(count, dtype=bool)
    found = np.array([
        [_fit(m[kept].mean(0), firsts[kept].mean(0), inners[kept].mean(0)) for kept in keep]
        for m in means
    ])  # fmt: skip
    return np.sqrt((count - 1) * np.var(found, axis=1))


def _order(rates: np.ndarray, residuals: np.ndarray, rounding: np.ndarray) -> float:
    clear = residuals > 10 * rounding
    if len(set(rates[clear])) < 2:
        return math.nan
    return float(np.polyfit(np.log(rates[clear]), np.log(residuals[clear]), 1)[0])


def _rounding(model: Model, rates: Sequence[float], firsts: np.ndarray) -> np.ndarray:
    """Relative error of `E[g]`: a step of rate α changes θ, and is known to the bits of θ alone."""
    params = tree.parameters(model)
    epsilon = max(float(jnp.finfo(leaf.dtype).eps) for leaf in jax.tree.leaves(params))
    ratio = float(tree.norm(params)) / np.linalg.norm(firsts.mean(0))
    return epsilon * (1 + ratio / np.array(rates, float))

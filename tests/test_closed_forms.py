"""The learners against formulas: quadratics, expansions in the inner rate, fixed points."""

import itertools
import math
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adaptax as ax

KEY = jax.random.key(0)
pytestmark = pytest.mark.usefixtures("x64")


def quadratic(model, batch):
    """`½ (θ − a)ᵀ A (θ − a)`, the mean over the examples `(A, a)` of a batch."""
    d = model.params - batch.y
    return jnp.mean(jnp.einsum("ni,nij,nj->n", d, batch.x, d)) / 2


def point(theta):
    return ax.Functional(jnp.atleast_1d(jnp.asarray(theta, float)), lambda params, x: params)


def well(matrix, centre):
    a = jnp.atleast_1d(jnp.asarray(centre, float))
    return ax.Batch(jnp.reshape(jnp.asarray(matrix, float), (1, len(a), len(a))), a[None])


def gradient(learner, theta, *tasks, key=KEY):
    """Meta-gradient at θ, the mean over the tasks."""
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *tasks)
    run = jax.jit(lambda: ax.meta_value_and_grad(learner, point(theta), stacked, key=key)[1].params)
    return run()


def random_well(seed, d=3):
    rng = np.random.default_rng(seed)
    root = rng.normal(size=(d, d))
    return root @ root.T / d + np.eye(d) / 4, rng.normal(size=d)


# MAML and FOMAML (Finn et al. 2017)


@pytest.mark.parametrize(
    ("steps", "theta", "maml", "fomaml"), [(1, 0.6, 3.84, 4.80), (3, 0.744, 2.678784, 5.232)]
)
def test_golden_values_of_a_scalar_quadratic(steps, theta, maml, fomaml):
    task = ax.Task(well(2, 1), well(3, -1))
    learner = ax.MAML(quadratic, 0.1, steps)
    adapted = learner.adapt(point(0.5), task.support, key=KEY)
    assert np.allclose(adapted.params, theta, rtol=1e-14)
    assert np.allclose(gradient(learner, 0.5, task), maml, rtol=1e-14)
    assert np.allclose(gradient(ax.FOMAML(quadratic, 0.1, steps), 0.5, task), fomaml, rtol=1e-14)
    reptile = ax.Reptile(quadratic, 0.1, steps)
    assert np.allclose(gradient(reptile, 0.5, task), 0.5 - theta, rtol=1e-12)


@pytest.mark.parametrize("steps", [0, 1, 4])
def test_matrix_quadratic(steps):
    (a_matrix, a), (b_matrix, b), theta = random_well(1), random_well(2), np.array([0.3, -1, 2])
    contraction = np.linalg.matrix_power(np.eye(3) - 0.2 * a_matrix, steps)
    end = a + contraction @ (theta - a)
    outer = b_matrix @ (end - b)
    task = ax.Task(well(a_matrix, a), well(b_matrix, b))
    for learner, expected in (
        (ax.MAML(quadratic, 0.2, steps), contraction @ outer),
        (ax.FOMAML(quadratic, 0.2, steps), outer),
        (ax.Reptile(quadratic, 0.2, steps), theta - end),
    ):
        assert np.allclose(gradient(learner, theta, task), expected, rtol=1e-12, atol=1e-14)


def test_the_iterates_follow_the_formula():
    matrix, a = random_well(3)
    theta = np.array([1.0, 2.0, -1.0])
    path = ax.MAML(quadratic, 0.1, 5).iterates(point(theta), well(matrix, a), key=KEY, steps=7)
    for k, params in enumerate(path.params):
        expected = a + np.linalg.matrix_power(np.eye(3) - 0.1 * matrix, k) @ (theta - a)
        assert np.allclose(params, expected, rtol=1e-12)


def test_derivative_by_the_inner_rate():
    (a_matrix, a), (b_matrix, b), theta = random_well(4), random_well(5), np.array([0.5, 0, -1])
    task = ax.Task(well(a_matrix, a), well(b_matrix, b))
    value = lambda rate: ax.MAML(quadratic, rate).meta_loss(point(theta), task, key=KEY)[0]
    slope = a_matrix @ (theta - a)
    expected = -slope @ (b_matrix @ (theta - 0.15 * slope - b))
    assert np.allclose(jax.grad(value)(0.15), expected, rtol=1e-12)


def test_learned_rates_of_every_step():
    task = ax.Task(well(2, 1), well(3, -1))

    def value(theta, rates):
        learner = ax.MAML(quadratic, lambda step: rates[step], 2)
        return learner.meta_loss(ax.Functional(theta, lambda p, x: p), task, key=KEY)[0]

    theta, rates = jnp.array([0.5]), jnp.array([0.1, 0.2])
    assert np.allclose(value(theta, rates), 4.6464, rtol=1e-14)
    by_theta, by_rates = jax.grad(value, (0, 1))(theta, rates)
    assert np.allclose(by_theta, 2.5344, rtol=1e-13)
    assert np.allclose(by_rates, [3.168, 4.224], rtol=1e-13)


def test_minimiser_of_the_expected_loss_after_adaptation():
    wells = [random_well(seed) for seed in (6, 7, 8)]
    weights = [np.linalg.matrix_power(np.eye(3) - 0.1 * m, 4) @ m for m, _ in wells]
    best = np.linalg.solve(sum(weights), sum(w @ a for w, (_, a) in zip(weights, wells)))
    tasks = [ax.Task(well(m, a), well(m, a)) for m, a in wells]
    assert np.abs(gradient(ax.MAML(quadratic, 0.1, 2), best, *tasks)).max() < 1e-14
    assert np.abs(gradient(ax.FOMAML(quadratic, 0.1, 2), best, *tasks)).max() > 1e-4


def test_first_order_is_exact_when_the_support_loss_is_linear():
    def loss(model, batch):  # curved where y is not 0: in the query
        theta = model.params
        return jnp.mean(batch.x @ theta + batch.y * jnp.sum(jnp.sin(theta)))

    x = jax.random.normal(KEY, (4, 3))
    straight = ax.Task(ax.Batch(x, jnp.zeros(4)), ax.Batch(x, jnp.ones(4)))
    curved = ax.Task(ax.Batch(x, jnp.ones(4)), ax.Batch(x, jnp.ones(4)))
    theta = jnp.array([0.2, 1.0, -0.4])
    both = [ax.MAML(loss, 0.3, 3), ax.FOMAML(loss, 0.3, 3)]
    assert np.allclose(*(gradient(one, theta, straight) for one in both), rtol=1e-14)
    assert not np.allclose(*(gradient(one, theta, curved) for one in both), rtol=1e-2)


def test_a_rectified_net_has_curvature():
    model = ax.models.MLP(1, 1, (8, 8), key=KEY)
    tasks = jax.vmap(ax.tasks.sinusoid().train.sample)(jax.random.split(KEY, 2))
    norms = []
    for learner in (ax.MAML(ax.losses.mse, 0.05), ax.FOMAML(ax.losses.mse, 0.05)):
        run = eqx.filter_jit(ax.meta_value_and_grad)
        norms.append(run(learner, model, tasks, key=KEY)[1])
    exact, first = (jax.flatten_util.ravel_pytree(g)[0] for g in norms)
    assert jnp.linalg.norm(exact - first) > 1e-3 * jnp.linalg.norm(exact)


def _work(learner):
    """Matrix products in the meta-gradient, and its temporary memory."""
    model = ax.models.MLP(1, 1, (32, 32), key=KEY, activation=jnp.tanh)
    task = ax.tasks.sinusoid(shot=64).train.sample(KEY)

    def loss(model):
        return learner.meta_loss(model, task, key=KEY)[0]

    def products(jaxpr):
        total = 0
        for equation in jaxpr.eqns:
            total += equation.primitive.name == "dot_general"
            for inner in jax.tree.leaves(list(equation.params.values())):
                inner = getattr(inner, "jaxpr", inner)
                total += products(inner) if hasattr(inner, "eqns") else 0
        return total

    grad = eqx.filter_grad(loss)
    params, rest = eqx.partition(model, eqx.is_inexact_array)
    flat = lambda params: eqx.filter(grad(eqx.combine(params, rest)), eqx.is_array)
    memory = jax.jit(flat).lower(params).compile().memory_analysis().temp_size_in_bytes
    return products(jax.make_jaxpr(flat)(params).jaxpr), memory


def test_fomaml_builds_no_second_order_graph():
    # Three layers: 3 products forward, 5 back. Once for the inner step, once for the query.
    count, memory = _work(ax.FOMAML(ax.losses.mse, 0.01, 2))
    assert count == 16
    count, more = _work(ax.FOMAML(ax.losses.mse, 0.01, 40))
    assert count == 16
    assert more < 1.1 * memory + 1000
    count, memory = _work(ax.MAML(ax.losses.mse, 0.01, 2))
    assert count > 16
    assert _work(ax.MAML(ax.losses.mse, 0.01, 40))[1] > 5 * memory


# Reptile (Nichol et al. 2018), section 5 of the paper


class InOrder(eqx.Module):
    """A source of given batches, one for each inner step."""

    batches: ax.Batch
    step: jax.Array | int = 0

    def at(self, step):
        return InOrder(self.batches, step)

    def draw(self, model, key):
        return jax.tree.map(lambda leaf: leaf[self.step], self.batches)


def log_cosh(model, batch):
    return jnp.mean(jnp.log(jnp.cosh(batch.x @ model.params - batch.y)))


def orders(batches, k, held_out):
    """Every ordering of the minibatches as a task: the first of them support, the last query."""
    pick = lambda rows: jax.tree.map(lambda leaf: leaf[np.array(rows)], batches)
    return [
        ax.Task(InOrder(pick(o[:-1] if held_out else o)), pick(o[-1]))
        for o in itertools.permutations(range(k))
    ]


def estimators(loss, batches, k, alpha):
    """For each estimator: learner, tasks, factor, and the coefficients that the paper gives."""
    exact, tail = ax.MAML(loss, alpha, k - 1), orders(batches, k, True)
    every = orders(batches, k, False)
    return {
        "MAML": (exact, tail, 1, 1, -2 * (k - 1) * alpha),
        "FOMAML": (ax.FOMAML(loss, alpha, k - 1), tail, 1, 1, -(k - 1) * alpha),
        "Reptile": (ax.Reptile(loss, alpha, k), every, 1 / alpha, k, -k * (k - 1) * alpha / 2),
        "joint": (ax.MAML(loss, alpha, 0), tail, 1, 1, 0),
    }


def averages(loss, batches, theta, k):
    """`AvgGrad` and `AvgGradInner`, exact expectations over the finite set of minibatches."""
    rows = [jax.tree.map(lambda leaf, i=i: leaf[i], batches) for i in range(k)]
    value = lambda t, row: loss(point(t), row)
    g = [jax.grad(value)(theta, row) for row in rows]
    h = [jax.hessian(value)(theta, row) for row in rows]
    pairs = list(itertools.permutations(range(k), 2))
    return sum(g) / k, sum(h[j] @ g[i] for i, j in pairs) / len(pairs)


@pytest.mark.parametrize("k", [2, 3])
@pytest.mark.parametrize("name", ["MAML", "FOMAML", "Reptile", "joint"])
def test_expansion_in_the_inner_rate(name, k):
    keys = jax.random.split(jax.random.key(9), 3)
    theta = jax.random.normal(keys[0], (3,))
    x = jax.random.normal(keys[1], (k, 4, 3))
    batches = ax.Batch(x, jax.random.normal(keys[2], (k, 4)))
    first, second = averages(log_cosh, batches, theta, k)
    residuals = []
    for alpha in (0.02, 0.01, 0.005):
        learner, tasks, scale, a, b = estimators(log_cosh, batches, k, alpha)[name]
        found = scale * gradient(learner, theta, *tasks)
        residuals.append((found - a * first - b * second) / alpha**2)
    if name == "joint":
        assert np.abs(residuals).max() * 0.005**2 < 1e-14
        return
    changes = [np.linalg.norm(residuals[i + 1] - residuals[i]) for i in (0, 1)]
    size = np.linalg.norm(residuals[-1])
    assert size > 1e-3
    assert changes[1] < 0.6 * changes[0]  # first order in alpha: halves with it
    assert changes[1] < 0.1 * size


def test_golden_expansion_of_two_quadratics():
    batches = ax.Batch(jnp.array([1.0, 3.0]).reshape(2, 1, 1, 1), jnp.ones((2, 1, 1)))
    first, second = averages(quadratic, batches, jnp.zeros(1), 2)
    assert np.allclose([first[0], second[0]], [-2, -3], rtol=1e-14)
    golden = {"MAML": -1.9406, "FOMAML": -1.97, "Reptile": -3.97, "joint": -2.0}
    for name, expected in golden.items():
        learner, tasks, scale, a, b = estimators(quadratic, batches, 2, 0.01)[name]
        found = scale * gradient(learner, 0.0, *tasks)
        assert np.allclose(found, expected, rtol=1e-12), name
        residual = -0.0006 if name == "MAML" else 0.0
        assert np.allclose(found - (a * first + b * second), residual, atol=1e-13), name


def test_one_step_of_reptile_is_joint_training():
    wells, theta = [random_well(seed) for seed in range(4)], np.array([1.0, 0.0, -2.0])
    tasks = [ax.Task(well(m, a), well(m, a)) for m, a in wells]
    joint = np.mean([m @ (theta - a) for m, a in wells], axis=0)
    learner = ax.Reptile(quadratic, 0.3, 1)
    grads = gradient(learner, theta, *tasks)
    assert np.allclose(grads, 0.3 * joint, rtol=1e-12)
    rule = optax.sgd(0.25)
    updates, _ = rule.update(grads, rule.init(grads))
    assert np.allclose(theta + updates, theta - 0.25 * 0.3 * joint, rtol=1e-13)


def test_outer_step_of_one_replaces_and_of_zero_keeps():
    matrix, a = random_well(11)
    theta, task = jnp.array([1.0, -1.0, 0.5]), ax.Task(well(matrix, a), well(matrix, a))
    learner = ax.Reptile(quadratic, 0.1, 4)
    adapted = learner.adapt(point(theta), task.support, key=KEY).params
    grads = gradient(learner, theta, task)
    assert np.allclose(theta - 1.0 * grads, adapted, rtol=1e-15, atol=1e-15)
    assert jnp.array_equal(theta - 0.0 * grads, theta)
    assert np.allclose(gradient(learner, theta, task, task, task), grads, rtol=1e-14)


def test_first_step_of_adam_without_momentum():
    matrix, a = random_well(12)
    theta, task = np.array([1.0, -1.0, 0.5]), ax.Task(well(matrix, a), well(matrix, a))
    g = matrix @ (theta - a)
    rule = ax.inner.adam(0.01)
    found = gradient(ax.Reptile(quadratic, inner_steps=1, inner_optimizer=rule), theta, task)
    assert np.allclose(found, 0.01 * g / (np.abs(g) + 1e-8), rtol=1e-9)
    larger = ax.Reptile(
        lambda m, b: 25 * quadratic(m, b), inner_steps=5, inner_optimizer=ax.inner.adam(0.01)
    )
    smaller = ax.Reptile(quadratic, inner_steps=5, inner_optimizer=ax.inner.adam(0.01))
    assert np.allclose(*(gradient(one, theta, task) for one in (larger, smaller)), rtol=1e-6)


def test_adam_carries_its_second_moments():
    matrix, a = random_well(13)
    theta, task = np.array([1.0, -1.0, 0.5]), ax.Task(well(matrix, a), well(matrix, a))
    learner = ax.Reptile(
        quadratic, inner_steps=2, inner_optimizer=ax.inner.adam(0.01), carry_state=True
    )
    meta = learner.init(point(theta), key=KEY)
    rule = learner.optimizer(100)
    opt_state = rule.init(meta)
    w, v, n = theta.copy(), np.zeros(3), 0
    for i in range(3):
        tasks = jax.tree.map(lambda leaf: leaf[None], task)
        _, grads = ax.meta_value_and_grad(learner, meta, tasks, key=KEY)
        updates, opt_state = rule.update(grads, opt_state, meta)
        meta = eqx.apply_updates(meta, updates)
        start = w.copy()
        for _ in range(2):
            g, n = matrix @ (w - a), n + 1
            v = 0.999 * v + 0.001 * g**2
            w = w - 0.01 * g / (np.sqrt(v / (1 - 0.999**n)) + 1e-8)
        w = start + (1 - i / 100) * (w - start)
        assert np.allclose(meta["model"].params, w, rtol=1e-9)


def test_fixed_points_of_reptile_and_maml_differ():
    wells = [random_well(seed) for seed in (21, 22, 23)]
    for k in (1, 3):
        pulls = [np.eye(3) - np.linalg.matrix_power(np.eye(3) - 0.2 * m, k) for m, _ in wells]
        fixed = np.linalg.solve(sum(pulls), sum(p @ a for p, (_, a) in zip(pulls, wells)))
        tasks = [ax.Task(well(m, a), well(m, a)) for m, a in wells]
        assert np.abs(gradient(ax.Reptile(quadratic, 0.2, k), fixed, *tasks)).max() < 1e-14
        assert np.abs(gradient(ax.MAML(quadratic, 0.2, k), fixed, *tasks)).max() > 1e-3


def test_reptile_with_full_convergence_descends_the_distance_to_the_solutions():
    rng = np.random.default_rng(31)
    rows, theta = rng.normal(size=(4, 1, 3)), np.array([1.0, 2.0, -1.0])
    target = rng.normal(size=(4, 1))
    tasks, projections = [], []
    for row, c in zip(rows, target):
        solution = np.linalg.pinv(row) @ c
        tasks.append(ax.Task(well(row.T @ row, solution), well(row.T @ row, solution)))
        projections.append(theta - np.linalg.pinv(row) @ (row @ theta - c))
    found = gradient(ax.Reptile(quadratic, 0.2, 2000), theta, *tasks)
    assert np.allclose(found, theta - np.mean(projections, axis=0), rtol=1e-10)
    half = lambda t: np.mean(
        [(row @ t - c) ** 2 / (row @ row.T)[0] for row, c in zip(rows, target)]
    )
    slope = [(half(theta + h) - half(theta - h)) / 2e-5 / 2 for h in 1e-5 * np.eye(3)]
    assert np.allclose(found, slope, rtol=1e-8)


def test_the_outer_rate_falls_linearly_to_zero():
    rule = ax.Reptile(quadratic, outer_lr=0.5).optimizer(20)
    state, seen = rule.init(jnp.zeros(1)), []
    for _ in range(20):
        update, state = rule.update(jnp.ones(1), state)
        seen.append(-float(update[0]))
    assert np.allclose(seen, 0.5 * (1 - np.arange(20) / 20), rtol=1e-6)
    assert math.isclose(seen[0], 0.5)
    assert math.isclose(seen[-1], 0.5 / 20, rel_tol=1e-5)


def test_a_sum_over_shots_scales_the_rate_by_the_ways():
    tasks = jnp.array([0, 1, 2, 3, 4, 0, 1, 2, 3, 4])
    x = jax.random.normal(KEY, (10, 6))
    batch = ax.Batch(x, tasks)
    model = ax.models.MLP(6, 5, (7,), key=KEY, activation=jnp.tanh)
    by_shot = partial(ax.losses.cross_entropy, reduction="sum/shot")
    by_sum = partial(ax.losses.cross_entropy, reduction="sum")
    adapted = [
        ax.MAML(loss, rate, 3).adapt(model, batch, key=KEY)(x)
        for loss, rate in ((ax.losses.cross_entropy, 2.0), (by_shot, 0.4), (by_sum, 0.2))
    ]
    assert np.allclose(adapted[0], adapted[1], rtol=1e-12)
    assert np.allclose(adapted[0], adapted[2], rtol=1e-12)

"""Stein variational gradient descent against formulas and known Gaussians."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from adaptax import svgd
from adaptax.svgd import RBF

KEY = jax.random.key(0)
pytestmark = pytest.mark.usefixtures("x64")


def normal(theta, mean=0.0, std=1.0):
    return -0.5 * jnp.sum(((theta - mean) / std) ** 2)


def column(*values):
    return jnp.array(values, float)[:, None]


direction = jax.jit(svgd.direction, static_argnums=2)


@partial(jax.jit, static_argnums=(1, 2))
def phi(particles, kernel, density=normal):
    return svgd.direction(particles, jax.vmap(jax.grad(density))(particles), kernel)


def settled(particles, kernel, density=normal, lr=0.5, steps=3000):
    rule = optax.chain(svgd.stein(kernel), optax.sgd(lr))
    return jax.jit(lambda p: svgd.run(density, p, steps=steps, optimizer=rule))(particles)


# Golden values


def test_one_step_with_a_fixed_bandwidth():
    particles = column(0.5, 1.5)
    matrix, _ = RBF(1.0)(particles)
    assert np.allclose(matrix, [[1, math.exp(-1)], [math.exp(-1), 1]], rtol=1e-14)
    found = phi(particles, RBF(1.0))
    assert np.allclose(found[:, 0], [-0.89378902, -0.47409042], atol=5e-9)
    moved = settled(particles, RBF(1.0), lr=0.1, steps=1)
    assert np.allclose(moved[:, 0], [0.4106211, 1.45259096], atol=5e-8)


def test_one_step_with_the_full_median():
    particles, kernel = column(0.5, 1.5), RBF("median-all")
    squares = jnp.array([[0.0, 1.0], [1.0, 0.0]])
    assert np.isclose(kernel.width(squares), 0.72134752, atol=5e-9)
    assert np.allclose(kernel(particles)[0][0, 1], 0.25, rtol=1e-14)
    assert np.allclose(phi(particles, kernel)[:, 0], [-0.78407359, -0.46592641], atol=5e-9)


@pytest.mark.parametrize(
    ("rule", "width"),
    [
        ("median", 9 / math.log(4)),
        ("median-all", 1 / math.log(3)),
        ("median-distance", 9 / math.log(3)),
        ("mean-distance", (8 / 3) ** 2 / math.log(3)),
    ],
)
def test_bandwidths_by_hand(rule, width):
    # Distances 1, 3 and 4: squares 1, 9 and 16, each twice in the matrix, beside three zeros.
    x = column(0, 1, 4)
    squares = (x - x.T) ** 2
    assert np.isclose(RBF(rule).width(squares), width, rtol=1e-14)


@pytest.mark.parametrize(
    ("kernel", "position"),
    [
        (RBF(1.0), math.sqrt(math.log(5) / 4)),
        (RBF(1.0, half=True), math.sqrt(math.log(3) / 4)),
        (RBF("median-all"), math.sqrt(2 * math.log(2) / 3)),
        (RBF("median-all", half=True), math.sqrt(math.log(2) / 3)),
        (RBF("median-distance"), math.sqrt(math.log(2))),
        (RBF("mean-distance"), math.sqrt(math.log(2))),
        (RBF("median"), math.sqrt(math.log(3) / 2)),
    ],
)
def test_where_two_particles_come_to_rest(kernel, position):
    end = jnp.sort(settled(column(-0.3, 1.1), kernel)[:, 0])
    assert np.allclose(end, [-position, position], atol=1e-9)


@pytest.mark.parametrize("std", [0.5, 2.0])
def test_two_particles_of_a_wider_normal(std):
    h = 1.5
    end = settled(column(-0.3, 1.1), RBF(h), lambda t: normal(t, std=std), lr=0.2, steps=6000)
    position = math.sqrt(h / 4 * math.log(1 + 4 * std**2 / h))
    assert np.allclose(jnp.sort(end[:, 0]), [-position, position], atol=1e-8)


@pytest.mark.parametrize(
    ("count", "kernel", "std"),
    [
        (10, RBF("median-all"), 0.8822),
        (10, RBF("median-all", half=True), 0.6238),
        (10, RBF("median"), 0.8881),
        (50, RBF("median-all"), 0.967),
        (50, RBF("median-all", half=True), 0.684),
        (50, RBF("median"), 0.968),
    ],
)
def test_spread_over_a_standard_normal(count, kernel, std):
    start = jax.random.normal(KEY, (count, 1)) + 0.3
    end = settled(start, kernel, lr=1.0, steps=1200)
    # Fifty particles creep at the end, which moves the third digit.
    assert np.abs(phi(end, kernel)).max() < (1e-5 if count == 10 else 1e-3)
    assert abs(jnp.mean(end)) < 1e-4
    assert abs(jnp.std(end) - std) < (1e-4 if count == 10 else 2e-3)
    if not kernel.half:
        assert abs(jnp.std(end) - 1) < (0.05 if count == 50 else 0.12)


def test_a_linear_kernel_has_the_moments_of_a_normal():
    """`k(x, y) = 1 + xᵀy`: mean and biased variance are exact at the fixed point."""

    def linear(x):
        return 1 + x @ x.T, len(x) * x

    end = settled(
        jax.random.normal(KEY, (7, 1)), linear, lambda t: normal(t, 1.3, math.sqrt(0.7)),
        lr=0.05, steps=4000,
    )  # fmt: skip
    assert np.allclose([jnp.mean(end), jnp.var(end)], [1.3, 0.7], rtol=1e-9)


def test_a_correlated_normal_in_three_dimensions():
    root = jnp.array([[1.0, 0.0, 0.0], [0.8, 0.6, 0.0], [0.0, 0.5, 0.5]])
    precision, mean = jnp.linalg.inv(root @ root.T), jnp.array([1.0, -2.0, 0.5])

    def density(t):
        d = t["a"] - mean[:2], t["b"] - mean[2:]
        d = jnp.concatenate(d)
        return -0.5 * d @ precision @ d

    start = jax.random.normal(KEY, (60, 3))
    start = {"a": start[:, :2], "b": start[:, 2:]}
    end = settled(start, RBF(), density, lr=0.1, steps=1000)
    end = jnp.concatenate([end["a"], end["b"]], axis=1)
    assert np.allclose(jnp.mean(end, axis=0), mean, atol=0.02)
    # Of so few particles the variances are too small, by a sixth, and the correlations right.
    assert np.all(jnp.var(end, axis=0) < jnp.diagonal(root @ root.T))
    assert np.all(jnp.var(end, axis=0) > 0.8 * jnp.diagonal(root @ root.T))
    correlation = jnp.corrcoef(end.T)
    scale = jnp.sqrt(jnp.diagonal(root @ root.T))
    assert np.allclose(correlation, root @ root.T / jnp.outer(scale, scale), atol=0.03)


# Identities


@pytest.mark.parametrize("rule", svgd.RULES)
@pytest.mark.parametrize("half", [False, True])
def test_repulsion_is_the_derivative_of_the_kernel(rule, half):
    x = jax.random.normal(KEY, (6, 4))
    h = RBF(rule).width(jnp.sum((x[:, None] - x) ** 2, axis=-1))
    k = lambda a, b: jnp.exp(-jnp.sum((a - b) ** 2) / h)
    by_first = jax.vmap(jax.grad(k), (0, None))
    slopes = jax.jit(jax.vmap(lambda y: by_first(x, y)))(x)  # of k(x_j, x_i), at [i, j]
    matrix, found = jax.jit(RBF(rule, half=half))(x)
    closed = -2 / h * (x[None] - x[:, None]) * matrix[:, :, None]
    assert np.allclose(slopes, closed, rtol=1e-12, atol=1e-15)
    assert np.allclose(found, jnp.sum(slopes, axis=1) / (2 if half else 1), rtol=1e-12)
    assert np.allclose(jnp.sum(found, axis=0), 0, atol=1e-14)


@pytest.mark.parametrize("rule", [*svgd.RULES, 0.7])
def test_one_particle_climbs(rule):
    theta = jnp.array([[0.3, -2.0]])
    assert np.array_equal(phi(theta, RBF(rule)), -theta)
    rule = optax.chain(svgd.stein(RBF(rule)), optax.sgd(0.1))
    end = svgd.run(normal, theta, steps=3, optimizer=rule)
    assert np.allclose(end, 0.9**3 * theta, rtol=1e-14)
    slope = jax.jit(jax.grad(lambda t: jnp.sum(phi(t, RBF()))))(theta)
    assert np.array_equal(slope, -jnp.ones((1, 2)))


@pytest.mark.parametrize("rule", svgd.RULES)
def test_symmetries(rule):
    kernel, keys = RBF(rule), jax.random.split(KEY, 2)
    x, scores = jax.random.normal(keys[0], (5, 3)), jax.random.normal(keys[1], (5, 3))
    found = direction(x, scores, kernel)
    order = jnp.array([3, 0, 4, 1, 2])
    assert np.allclose(direction(x[order], scores[order], kernel), found[order], rtol=1e-12)
    far = direction(x + 1000.0, scores, kernel)
    assert np.allclose(far, found, rtol=1e-9)
    rotation, _ = jnp.linalg.qr(jax.random.normal(KEY, (3, 3)))
    turned = direction(x @ rotation, scores @ rotation, kernel)
    assert np.allclose(turned, found @ rotation, rtol=1e-11)


def test_particles_may_be_any_pytree():
    x = jax.random.normal(KEY, (4, 7))
    as_tree = lambda v: {"a": v[:, :4].reshape(4, 2, 2), "b": (v[:, 4], None, v[:, 5:])}
    found = direction(as_tree(x), as_tree(-x), RBF())
    assert jax.tree.structure(found) == jax.tree.structure(as_tree(x))
    expected = as_tree(direction(x, -x, RBF()))
    # Sums over parts are in another order.
    pairs = zip(*map(jax.tree.leaves, (found, expected)), strict=True)
    assert all(np.allclose(a, b, rtol=1e-5, atol=1e-7) for a, b in pairs)


@pytest.mark.parametrize("rule", [*svgd.RULES, 2.0])
def test_derivatives_agree_with_differences(rule):
    x, weight = jax.random.normal(KEY, (5, 2)), jax.random.normal(jax.random.key(1), (5, 2))
    value = jax.jit(lambda t: jnp.sum(weight * phi(t, RBF(rule))))
    along = jax.random.normal(jax.random.key(2), (5, 2))
    slope = (value(x + 1e-5 * along) - value(x - 1e-5 * along)) / 2e-5
    assert np.isclose(jnp.sum(jax.jit(jax.grad(value))(x) * along), slope, rtol=1e-8)


def test_a_stopped_bandwidth_is_a_number():
    x = jax.random.normal(KEY, (5, 2))
    h = float(RBF().width(jnp.sum((x[:, None] - x) ** 2, axis=-1)))
    slopes = [jax.jit(jax.jacobian(phi), static_argnums=1)(x, k)
              for k in (RBF(stop=True), RBF(h), RBF())]  # fmt: skip
    assert np.allclose(slopes[0], slopes[1], rtol=1e-12)
    assert not np.allclose(slopes[0], slopes[2], rtol=1e-2)


@pytest.mark.parametrize("rule", svgd.RULES)
def test_particles_that_coincide(rule):
    x = jnp.ones((4, 3)) / 3
    value = jax.jit(jax.value_and_grad(lambda t: jnp.sum(phi(t, RBF(rule)) ** 2)))
    found, slope = value(x)
    assert np.isclose(found, 12 / 9, rtol=1e-12)
    assert np.all(np.isfinite(slope))
    some = jnp.array([[0.0], [0.0], [0.0], [1.0]]) * jnp.ones((4, 3))
    assert all(np.all(np.isfinite(part)) for part in value(some))


def test_close_particles_far_from_the_origin_in_single_precision():
    with jax.enable_x64(False):
        x = jax.random.normal(KEY, (6, 3), dtype=jnp.float32)
        near = 1000 + 0.1 * x
        matrix, expected = RBF()(near)[0], RBF()(x)[0]
        assert matrix.dtype == jnp.float32
        assert np.allclose(matrix, expected, atol=5e-3)


@pytest.mark.parametrize("wrong", [0.0, -1.0, float("nan"), "medium"])
def test_wrong_bandwidths_are_refused(wrong):
    with pytest.raises(ValueError, match="bandwidth is a positive number or one of median"):
        RBF(wrong)


@pytest.mark.parametrize(
    "particles",
    [jnp.zeros((0, 2)), {}, {"a": jnp.zeros((2, 1)), "b": jnp.zeros((3, 1))}, jnp.ones(())],
)
def test_what_are_no_particles(particles):
    with pytest.raises(ValueError, match="lead with the same axis of 1 or more"):
        svgd.direction(particles, particles)

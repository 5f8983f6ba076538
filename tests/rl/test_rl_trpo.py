"""The trust-region step: conjugate gradient, line search, natural step, and the whole."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from test_rl_objectives import Point, Quadrature

import adaptax as ax
from adaptax import rl
from adaptax.rl.frozen import collect_all

KEY = jax.random.key(0)


def test_conjugate_gradient_solves(x64):
    root = jax.random.normal(jax.random.key(0), (10, 10))
    matrix = root @ root.T / 10 + 0.1 * jnp.eye(10)
    b = jax.random.normal(jax.random.key(1), (10,))
    x, residual = rl.conjugate_gradient(lambda v: matrix @ v, b, 10, tolerance=1e-24)
    np.testing.assert_allclose(matrix @ x, b, atol=1e-8)
    np.testing.assert_allclose(residual, b - matrix @ x, atol=1e-10)
    early, left = rl.conjugate_gradient(lambda v: matrix @ v, b, 3)
    np.testing.assert_allclose(left, b - matrix @ early, atol=1e-10)
    assert jnp.linalg.norm(left) > 1e-3


def test_natural_step_of_the_bandit(x64):
    """σ = 1, δ = 0.01, g = 2: `√(2δ / gᵀF⁻¹g) F⁻¹g = 0.141421`."""
    step = rl.natural_step(lambda v: v, jnp.array([2.0]), 0.01, 10)
    np.testing.assert_allclose(step, 0.141421, atol=1e-6)
    np.testing.assert_allclose(rl.natural_step(lambda v: v, jnp.zeros(1), 0.01, 10), 0.0)


@pytest.mark.parametrize("scale", [0.05, 0.3, 2.0, 30.0])
def test_line_search_never_accepts_more_divergence(scale):
    calls = lambda theta: (jnp.sum(theta), jnp.sum(theta**2))
    theta, loss, kl, fraction = rl.line_search(
        calls, jnp.zeros(2), jnp.full(2, scale), jnp.array(0.0),
        max_kl=0.01, backtrack=0.8, tries=15,
    )  # fmt: skip
    assert kl <= 0.01
    tried = 0.8 ** np.arange(15)
    allowed = tried[2 * (tried * scale) ** 2 <= 0.01]
    np.testing.assert_allclose(fraction, allowed[0] if len(allowed) else 0.0, rtol=1e-5)
    np.testing.assert_allclose(theta, -fraction * scale, rtol=1e-6)
    np.testing.assert_allclose([loss, kl], [theta.sum(), (theta**2).sum()], rtol=1e-6)


@pytest.mark.parametrize("loss", [1.0, 0.0, jnp.nan])
def test_line_search_stays_where_nothing_improves(loss):
    theta, value, kl, fraction = rl.line_search(
        lambda theta: (jnp.array(loss), jnp.zeros(())), jnp.ones(2), jnp.ones(2), jnp.array(0.0),
        max_kl=0.01, backtrack=0.8, tries=15,
    )  # fmt: skip
    np.testing.assert_array_equal(theta, 1.0)
    assert (value, kl, fraction) == (0, 0, 0)


def test_the_step_of_the_bandit(x64):
    """All of it, expectations exact, without adaptation: θ − g = 1 and σ = 1 move by 0.141421."""
    policy = Point(jnp.array(0.5), sigma=1.0)
    learner = ax.MAML(rl.log_prob, inner_steps=0)
    tasks = ax.Task(Held(jnp.zeros(1)), Held(jnp.zeros(1)))
    new, _, loss, metrics = rl.TRPO().step(
        learner, policy, (), tasks, key=jax.random.key(0), progress=0.0
    )
    np.testing.assert_allclose(new.theta, 0.5 - 0.141421, atol=2e-6)
    np.testing.assert_allclose(metrics["gradient_norm"], 2.0, rtol=1e-9)
    assert metrics["step_fraction"] == 1.0
    assert metrics["kl"] <= 0.01
    assert loss < 0


class Held(eqx.Module):
    """Exact roll-outs of the bandit with an array to lead with the task axis."""

    task: jax.Array

    def draw(self, model, key):
        return Quadrature(True).draw(model, key)


@pytest.mark.parametrize(("steps", "mapping"), [(1, "scan"), (2, "vmap")])
def test_the_step_against_dense_linear_algebra(steps, mapping, x64):
    """Direction, length and trust region, with the Hessian of KL by `jax.hessian`."""
    tasks = rl.Tasks(rl.Navigation(), trajectories=3, horizon=4)
    policy = rl.GaussianMLP(2, 2, (3,), key=jax.random.key(0), activation=jnp.tanh)
    learner = ax.MAML(rl.dice, inner_lr=0.1, inner_steps=steps)
    outer = rl.TRPO(damping=0.1, cg_steps=40, mapping=mapping)
    key = jax.random.key(1)
    batch = eqx.filter_vmap(tasks.sample)(jax.random.split(key, 2))
    theta, unravel = ravel_pytree(policy)

    @eqx.filter_jit
    def both(theta):
        new, _, loss, metrics = outer.step(
            learner, unravel(theta), (), batch, key=key, progress=0.0
        )
        keys = jax.random.split(key, 2)
        data, rest = eqx.partition(collect_all(learner, unravel(theta), batch, keys), eqx.is_array)

        def per_task(theta, function):
            def one(data):
                whole = eqx.combine(data, rest)
                adapted = rl.adapt(learner, unravel(theta), whole)
                old = rl.adapt(learner, unravel(start), whole)
                return function(adapted, old, whole.query)

            return jnp.mean(jax.vmap(one)(data))

        start = theta
        loss_of = lambda t: per_task(t, lambda new, old, batch: rl.importance(new, batch))
        kl_of = lambda t: per_task(
            t,
            lambda new, old, batch: rl.masked_mean(old(batch.x).kl(new(batch.x)), batch.y.mask),
        )
        gradient, fisher = jax.grad(loss_of)(theta), jax.hessian(kl_of)(theta)
        there = ravel_pytree(new)[0]
        return there, loss, metrics, gradient, fisher, loss_of(there), kl_of(there)

    there, loss, metrics, gradient, fisher, loss_there, kl_there = both(theta)
    damped = fisher + 0.1 * jnp.eye(len(theta))
    direction = jnp.linalg.solve(damped, gradient)
    full = jnp.sqrt(0.02 / (direction @ gradient)) * direction
    np.testing.assert_allclose(metrics["gradient_norm"], jnp.linalg.norm(gradient), rtol=1e-8)
    fraction = metrics["step_fraction"]
    assert fraction > 0
    wrong = jnp.linalg.norm(theta - there - fraction * full)
    assert wrong < 1e-3 * fraction * jnp.linalg.norm(full)
    np.testing.assert_allclose([loss, metrics["kl"]], [loss_there, kl_there], rtol=1e-8)
    assert loss < 0
    assert metrics["kl"] <= 0.01
    assert jnp.linalg.norm(fisher) > 0.05, "damping would hide a wrong Fisher matrix"


class Twice(eqx.Module):
    """Every trajectory a second time, after all."""

    source: rl.RollOut

    def draw(self, model, key):
        batch, axis = self.source.draw(model, key), int(isinstance(model, rl.Policies))
        return jax.tree.map(lambda leaf: jnp.concatenate([leaf, leaf], axis), batch)


@pytest.mark.parametrize("particles", [None, 2])
def test_half_of_the_trajectories_say_the_same_if_the_others_repeat_them(particles, x64):
    """With `curvature=0.5`; and something else if they do not."""
    source = rl.Tasks(rl.Navigation(), trajectories=2, horizon=3).sample(jax.random.key(0)).support
    policy = rl.GaussianMLP(2, 2, (3,), key=jax.random.key(1))
    learner, meta = ax.MAML(rl.lvc, 0.1), policy
    if particles is not None:
        learner = rl.BayesianMAML(rl.lvc, 0.1, particles=particles)
        meta = learner.init(policy, key=jax.random.key(2))

    def stepped(source, curvature):
        one = ax.Task(source, source)
        tasks = jax.tree.map(lambda leaf: leaf[None], one)
        outer = rl.TRPO(curvature=curvature, damping=0.1, backtrack=0.99, max_backtracks=100)
        step = lambda meta: outer.step(learner, meta, (), tasks, key=KEY, progress=0.0)[0]
        return ravel_pytree(eqx.filter(eqx.filter_jit(step)(meta), eqx.is_inexact_array))[0]

    np.testing.assert_allclose(stepped(Twice(source), 0.5), stepped(Twice(source), 1.0), atol=1e-6)
    assert jnp.abs(stepped(source, 0.5) - stepped(source, 1.0)).max() > 1e-3


def test_a_step_that_cannot_improve_changes_nothing():
    """At the goal there is no gradient, and no step."""
    policy = Point(jnp.array(-0.5), sigma=1.0)
    learner = ax.MAML(rl.log_prob, inner_steps=0)
    tasks = ax.Task(Held(jnp.zeros(1)), Held(jnp.zeros(1)))
    new, _, _, metrics = rl.TRPO().step(
        learner, policy, (), tasks, key=jax.random.key(0), progress=0.0
    )
    assert metrics["kl"] <= 0.01
    np.testing.assert_allclose(new.theta, -0.5, atol=1e-3)


def test_ppo_is_flat_outside_its_clip(x64):
    """The gradient of a step counts unless its ratio has left the clip the way it pays."""
    batch = Quadrature(True).draw(Point(jnp.array(0.3)), jax.random.key(0))
    ppo = rl.PPO(clip=0.2)
    at = lambda theta: ppo.loss(Point(theta), batch)
    same = jax.grad(lambda theta: rl.importance(Point(theta), batch))
    np.testing.assert_allclose(jax.grad(at)(0.3), same(0.3), rtol=1e-10)
    far = jnp.array(-0.4)
    steps, ratio = (
        batch.y,
        jnp.exp(Point(far)(batch.x).log_prob(batch.y.actions) - batch.y.log_probs),
    )
    counts = jnp.where(steps.advantages > 0, ratio <= 1.2, ratio >= 0.8)
    assert 0 < counts.sum() < counts.size
    kept = eqx.tree_at(lambda b: b.y.advantages, batch, steps.advantages * counts)
    expected = jax.grad(lambda theta: rl.importance(Point(theta), kept))(far)
    np.testing.assert_allclose(jax.grad(at)(far), expected, rtol=1e-10)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: rl.TRPO(max_kl=0.0), "max_kl is a positive bound"),
        (lambda: rl.TRPO(cg_steps=0), "at least 1"),
        (lambda: rl.TRPO(backtrack=1.0), "between 0 and 1"),
        (lambda: rl.PPO(epochs=0), "epochs is at least 1"),
    ],
)
def test_settings_that_make_no_sense(make, message):
    with pytest.raises(ValueError, match=message):
        make()


OUTER = {
    "TRPO": lambda: (ax.MAML(rl.log_prob, 0.1, 1), rl.TRPO(max_kl=0.05)),
    "PPO": lambda: (ax.MetaSGD(rl.log_prob, 0.1, 1), rl.PPO(epochs=2)),
    "a region each": lambda: (rl.BayesianMAML(rl.log_prob, 0.1, 1, particles=2),
                              rl.ParticleTRPO(rl.TRPO(max_kl=0.05))),
    "independent": lambda: (rl.BayesianMAML(rl.log_prob, 0.1, 1, particles=2, kernel=None),
                            rl.ParticleTRPO(rl.TRPO(max_kl=0.05))),
}  # fmt: skip


@pytest.mark.parametrize("name", OUTER)
def test_what_is_not_to_be_trained_stays(name):
    learner, outer = OUTER[name]()
    learner = dataclasses.replace(learner, train_only=lambda path: "layers" not in path)
    tasks = rl.Tasks(rl.Navigation(), horizon=3, trajectories=2)
    policy = rl.GaussianMLP(2, 2, (4,), key=KEY)
    start = learner.init(policy, key=jax.random.split(KEY, 4)[2])
    result = ax.fit(learner, policy, tasks, outer=outer, steps=2, meta_batch=2, key=KEY, devices=1)
    before, after = ax.tree.by_path(start), ax.tree.by_path(result.meta)
    moved = [p for p in before if not np.array_equal(before[p], after[p])]
    assert moved
    assert all("layers" not in path for path in moved), moved
    assert any("layers" in path for path in before)

"""Policy-gradient objectives against the closed forms of the horizon-1 Gaussian bandit."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array

import adaptax as ax
from adaptax import rl

THETA, GOAL, SIGMA, RATE = 0.3, -0.5, 0.7, 0.1
NODES, WEIGHTS = np.polynomial.hermite_e.hermegauss(12)
WEIGHTS = WEIGHTS / WEIGHTS.sum()


class Point(eqx.Module):
    """The policy N(θ, σ²)."""

    theta: Array
    sigma: float = eqx.field(static=True, default=SIGMA)

    def __call__(self, x):
        mean = jnp.broadcast_to(self.theta, (*x.shape[:-1], 1))
        return rl.Gaussian(mean, jnp.full(1, np.log(self.sigma)))


class Quadrature(eqx.Module):
    """Roll-outs of the Gaussian bandit whose mean is the exact expectation.

    The actions are the nodes of Gauss–Hermite quadrature, and their advantages, in which every
    objective is linear, bear its weights.
    """

    centred: bool = eqx.field(static=True)

    def draw(self, model, key):
        policy = ax.inner.stop(model)
        actions = policy.theta + policy.sigma * jnp.asarray(NODES)[:, None]
        rewards = -((actions - GOAL) ** 2)
        advantages = rewards - self.centred * jnp.sum(WEIGHTS[:, None] * rewards)
        x, one = jnp.ones((len(NODES), 1, 1)), jnp.ones((len(NODES), 1))
        logs = policy(x).log_prob(actions[..., None])
        weighed = len(NODES) * jnp.asarray(WEIGHTS)[:, None] * advantages
        return ax.Batch(x, rl.Steps(actions[..., None], rewards, one, logs, rewards, weighed))


def derivatives(objective, centred):
    """First and second derivative of −loss at the policy that took the actions."""
    batch = Quadrature(centred).draw(Point(jnp.array(THETA)), jax.random.key(0))
    gain = lambda theta: -objective(Point(theta), batch)
    return jax.grad(gain)(THETA), jax.hessian(gain)(THETA)


@pytest.mark.parametrize("name", list(rl.OBJECTIVES))
@pytest.mark.parametrize("centred", [False, True])
def test_the_gradient_is_that_of_the_expected_return(name, centred, x64):
    gradient, _ = derivatives(rl.OBJECTIVES[name], centred)
    np.testing.assert_allclose(gradient, -2 * (THETA - GOAL), rtol=1e-10)


@pytest.mark.parametrize("centred", [False, True])
def test_second_derivatives(centred, x64):
    """DiCE, LVC and the importance ratio know the curvature −2; the log-prob surrogate does not."""
    for objective in (rl.dice, rl.lvc, rl.importance):
        np.testing.assert_allclose(derivatives(objective, centred)[1], -2.0, rtol=1e-10)
    expected = 0.0 if centred else ((THETA - GOAL) ** 2 + SIGMA**2) / SIGMA**2
    np.testing.assert_allclose(derivatives(rl.log_prob, centred)[1], expected, atol=1e-10)


@pytest.mark.parametrize("objective", [rl.dice, rl.lvc, rl.log_prob])
def test_meta_gradient_of_maml(objective, x64):
    """`−2(θ' − g)(1 − 2α)` for an ascent step of rate α; without the curvature `−2(θ' − g)`."""
    learner = ax.MAML(objective, inner_lr=RATE)
    task = ax.Task(Quadrature(True), Quadrature(True))
    loss = lambda theta: learner.meta_loss(Point(theta), task, key=jax.random.key(0))[0]
    after = THETA - 2 * RATE * (THETA - GOAL)
    curvature = 1.0 if objective is rl.log_prob else 1 - 2 * RATE
    np.testing.assert_allclose(jax.grad(loss)(THETA), 2 * (after - GOAL) * curvature, rtol=1e-10)


class Slope(eqx.Module):
    """The policy N(θ·x, 1)."""

    theta: Array

    def __call__(self, x):
        return rl.Gaussian((x @ self.theta)[..., None], jnp.zeros(1))


def test_dice_with_returns_is_dice_with_rewards(x64):
    """Summed by parts, value and all derivatives: `Σ_t [□(c_t) − □(c_{t−1})] R_t = Σ_t □(c_t) r_t`
    but for a constant."""
    keys = jax.random.split(jax.random.key(3), 4)
    x = jax.random.normal(keys[0], (5, 4, 2))
    actions, rewards = jax.random.normal(keys[1], (2, 5, 4))
    theta = jax.random.normal(keys[2], (2,))
    mask = jnp.ones((5, 4)).at[0, 2:].set(0.0)
    rewards = rewards * mask
    logs = Slope(theta)(x).log_prob(actions[..., None])
    returns = rl.discounted(rewards, 1.0)
    steps = rl.Steps(actions[..., None], rewards, mask, logs, returns, returns)

    def with_rewards(theta):
        so_far = jnp.cumsum(Slope(theta)(x).log_prob(actions[..., None]) * mask, axis=1)
        return -jnp.sum(jnp.exp(so_far - jax.lax.stop_gradient(so_far)) * rewards) / jnp.sum(mask)

    with_returns = lambda theta: rl.dice(Slope(theta), ax.Batch(x, steps))
    for derivative in (jax.grad, jax.hessian):
        np.testing.assert_allclose(
            derivative(with_returns)(theta), derivative(with_rewards)(theta), rtol=1e-9
        )
    # LVC leaves out the terms across time steps, and the test would see it.
    lvc = jax.hessian(lambda theta: rl.lvc(Slope(theta), ax.Batch(x, steps)))(theta)
    assert not np.allclose(lvc, jax.hessian(with_rewards)(theta), rtol=1e-2)


def test_kl_and_its_gradient_vanish_at_the_old_policy_and_fisher_is_the_inverse_variance(x64):
    x = jnp.ones((3, 1))
    old = Point(jnp.array(THETA))(x)
    kl = lambda theta: jnp.mean(old.kl(Point(theta)(x)))
    np.testing.assert_allclose(kl(THETA), 0.0, atol=1e-15)
    np.testing.assert_allclose(jax.grad(kl)(THETA), 0.0, atol=1e-15)
    np.testing.assert_allclose(jax.hessian(kl)(THETA), 1 / SIGMA**2, rtol=1e-12)


def test_gaussian_laws_against_quadrature(x64):
    p = rl.Gaussian(jnp.array([[0.3]]), jnp.array([np.log(0.7)]))
    q = rl.Gaussian(jnp.array([[-0.2]]), jnp.array([np.log(1.3)]))
    actions = jnp.asarray(0.3 + 0.7 * NODES)[:, None]
    kl = np.sum(WEIGHTS * (p.log_prob(actions) - q.log_prob(actions)))
    np.testing.assert_allclose(p.kl(q)[0], kl, rtol=1e-10)
    np.testing.assert_allclose(p.entropy()[0], -np.sum(WEIGHTS * p.log_prob(actions)), rtol=1e-10)
    grid = jnp.linspace(-8, 8, 4001)[:, None]
    np.testing.assert_allclose(jnp.sum(jnp.exp(p.log_prob(grid))) * 0.004, 1.0, rtol=1e-8)


def test_categorical_laws_against_sums(x64):
    logits = jax.random.normal(jax.random.key(4), (2, 3, 5))
    p, q = rl.Categorical(logits[0]), rl.Categorical(logits[1])
    a, b = jax.nn.softmax(logits[0]), jax.nn.softmax(logits[1])
    np.testing.assert_allclose(p.kl(q), jnp.sum(a * jnp.log(a / b), -1), rtol=1e-10)
    np.testing.assert_allclose(p.entropy(), -jnp.sum(a * jnp.log(a), -1), rtol=1e-10)
    every = jnp.stack([p.log_prob(jnp.full(3, action)) for action in range(5)], axis=-1)
    np.testing.assert_allclose(jnp.exp(every), a, rtol=1e-10)


def test_samples_follow_the_law():
    gaussian = rl.Gaussian(jnp.full((20000, 1), 2.0), jnp.array([np.log(0.5)]))
    drawn = gaussian.sample(jax.random.key(5))
    assert abs(drawn.mean() - 2) < 5 * 0.5 / 20000**0.5
    assert abs(drawn.std() - 0.5) < 5 * 0.5 / 40000**0.5
    probability = jnp.array([0.2, 0.5, 0.3])
    chosen = rl.Categorical(jnp.broadcast_to(jnp.log(probability), (20000, 3)))
    counts = jnp.bincount(chosen.sample(jax.random.key(6)), length=3)
    np.testing.assert_allclose(counts / 20000, probability, atol=5 * 0.5 / 20000**0.5)


def test_the_standard_deviation_has_a_floor():
    policy = rl.GaussianMLP(2, 1, (3,), key=jax.random.key(0), std=0.25)
    np.testing.assert_allclose(jnp.exp(policy(jnp.ones((1, 2))).log_std), 0.25, rtol=1e-6)
    tiny = eqx.tree_at(lambda p: p.log_std, policy, jnp.full(1, -100.0))
    np.testing.assert_allclose(jnp.exp(tiny(jnp.ones((1, 2))).log_std), 1e-6, rtol=1e-5)

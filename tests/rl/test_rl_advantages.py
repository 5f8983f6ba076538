"""Returns, generalised advantages, standardisation and the linear baseline."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adaptax import rl

GAMMA = 0.9


@pytest.fixture
def episodes(x64):
    """Rewards and values of three episodes of five steps; the last ends after two."""
    rewards, values = jax.random.normal(jax.random.key(0), (2, 3, 5), float)
    mask = jnp.ones((3, 5)).at[2, 2:].set(0.0)
    return rewards * mask, values * mask, mask


def test_discounted_returns(episodes):
    rewards, _, _ = episodes
    totals = rl.discounted(rewards, GAMMA)
    for t in range(5):
        expected = sum(GAMMA ** (s - t) * rewards[:, s] for s in range(t, 5))
        np.testing.assert_allclose(totals[:, t], expected, rtol=1e-12)


def test_lambda_one_is_return_minus_baseline(episodes):
    rewards, values, _ = episodes
    expected = rl.discounted(rewards, GAMMA) - values
    np.testing.assert_allclose(rl.gae(rewards, values, GAMMA, 1.0), expected, atol=1e-12)


def test_lambda_zero_is_the_one_step_error(episodes):
    rewards, values, _ = episodes
    after = np.pad(values[:, 1:], ((0, 0), (0, 1)))
    expected = rewards + GAMMA * after - values
    np.testing.assert_allclose(rl.gae(rewards, values, GAMMA, 0.0), expected, atol=1e-12)


def test_lambda_between_is_the_mean_of_the_n_step_errors(episodes):
    """`Â = (1 − λ) Σ_n λ^{n−1} Â^{(n)}`, the definition; the tail repeats the whole return."""
    rewards, values, _ = episodes
    decay = 0.6
    estimates = rl.gae(rewards, values, GAMMA, decay)
    padded = np.pad(values, ((0, 0), (0, 1)))
    for t in range(5):
        left = 5 - t
        n_step = [
            sum(GAMMA**i * rewards[:, t + i] for i in range(n)) + GAMMA**n * padded[:, t + n]
            for n in range(1, left + 1)
        ]
        weights = [(1 - decay) * decay ** (n - 1) for n in range(1, left)] + [decay ** (left - 1)]
        expected = sum(w * e for w, e in zip(weights, n_step)) - values[:, t]
        np.testing.assert_allclose(estimates[:, t], expected, rtol=1e-10)


def test_standardised(episodes):
    rewards, values, mask = episodes
    out = np.asarray(rl.standardise(5 + rewards + values, mask))
    counted = out[np.asarray(mask) > 0]
    assert abs(counted.mean()) < 1e-12
    assert abs(counted.std() - 1) < 1e-7
    assert not out[np.asarray(mask) == 0].any()


def test_constant_advantages_are_standardised_to_zero():
    assert not rl.standardise(jnp.full((2, 3), 7.0), jnp.ones((2, 3))).any()


@pytest.mark.parametrize("kind", ["time", "linear", "square"])
def test_baseline_reproduces_polynomials(kind, x64):
    observations = jax.random.normal(jax.random.key(1), (20, 100, 2))
    tau = jnp.broadcast_to(jnp.arange(100) / 100, (20, 100))
    returns = {
        "time": 1 - 2 * tau + 3 * tau**2 - 4 * tau**3,
        "linear": observations @ jnp.array([2.0, -1.0]) + 3,
        "square": observations**2 @ jnp.array([0.5, 2.0]),
    }[kind]
    values = rl.fitted_values(observations, returns, jnp.ones((20, 100)))
    assert jnp.max(jnp.abs(values - returns)) < 1e-4 * jnp.max(jnp.abs(returns))


def test_baseline_is_the_ridge_regression_of_the_steps_that_count(x64):
    for_seen, for_returns = jax.random.split(jax.random.key(2))
    observations = 20 * jax.random.normal(for_seen, (4, 6, 1))
    returns = jax.random.normal(for_returns, (4, 6))
    mask = jnp.ones((4, 6)).at[1, 3:].set(0.0)
    kept = np.asarray(mask) > 0
    o = np.clip(np.asarray(observations), -10, 10)[kept][:, 0]
    t = np.broadcast_to(np.arange(6) / 100, (4, 6))[kept]
    phi = np.stack([o, o**2, t, t**2, t**3, np.ones_like(t)], axis=1)
    weights = np.linalg.solve(phi.T @ phi + 1e-5 * np.eye(6), phi.T @ np.asarray(returns)[kept])
    values = np.asarray(rl.fitted_values(observations, returns, mask))
    np.testing.assert_allclose(values[kept], phi @ weights, atol=1e-6)
    assert not values[~kept].any()


def test_baseline_survives_a_singular_fit():
    """In float32, of constant and huge observations: the ridge grows until the fit is finite."""
    observations = jnp.full((2, 3, 4), 1e9)
    values = rl.fitted_values(observations, jnp.ones((2, 3)), jnp.ones((2, 3)))
    np.testing.assert_allclose(values, 1.0, atol=1e-2)

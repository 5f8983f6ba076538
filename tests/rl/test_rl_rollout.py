"""Environments and roll-outs: dynamics, masks, derivatives, errors."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import adaptax as ax
from adaptax import rl
from adaptax.rl.navigation import Place

KEY = jax.random.key(0)


def draw(env, policy, **how):
    tasks = rl.Tasks(env, **{"trajectories": 3, "horizon": 5, **how})
    return eqx.filter_jit(lambda p: tasks.sample(KEY).support.draw(p, jax.random.key(1)))(policy)


class Countdown(eqx.Module):
    """Pays 1 a step and ends after two; what comes then is NaN."""

    observation_size = 1
    action_size = 1
    discrete = False

    def sample_task(self, key):
        return jnp.zeros(())

    def reset(self, key, task):
        return task

    def step(self, state, action, key):
        return state + 1, jnp.where(state >= 2, jnp.nan, 1.0), state >= 1

    def observe(self, state):
        return jnp.where(state >= 2, jnp.nan, state)[None]


def policy_for(env, *, key=KEY, hidden=(4,)):
    kind = rl.CategoricalMLP if env.discrete else rl.GaussianMLP
    return kind(env.observation_size, env.action_size, hidden, key=key)


def test_nothing_counts_after_the_end():
    env = Countdown()
    batch = draw(env, policy_for(env), discount=0.5)
    steps = batch.y
    for row in range(3):
        np.testing.assert_array_equal(steps.mask[row], [1, 1, 0, 0, 0])
        np.testing.assert_array_equal(steps.rewards[row], [1, 1, 0, 0, 0])
        np.testing.assert_allclose(steps.returns[row], [1.5, 1, 0, 0, 0])
        np.testing.assert_array_equal(steps.advantages[row, 2:], 0)
    assert steps.total == 2
    for objective in rl.OBJECTIVES.values():
        loss, grads = eqx.filter_value_and_grad(objective)(policy_for(env), batch)
        assert jnp.isfinite(loss)
        assert ax.tree.finite(grads)


def test_the_horizon_cuts_what_never_ends():
    env = rl.TabularMDP(states=4, actions=3)
    batch = draw(env, policy_for(env), horizon=6)
    assert batch.x.shape == (3, 6, 4)
    assert batch.size == 3
    np.testing.assert_array_equal(batch.y.mask, 1)
    np.testing.assert_array_equal(batch.x.sum(-1), 1)
    np.testing.assert_array_equal(batch.x[:, 0, 0], 1)


@pytest.mark.parametrize("reward", ["distance", "squared"])
def test_navigation(reward):
    env = rl.Navigation(reward)
    goal = jnp.array([0.3, -0.4])
    state = env.reset(KEY, goal)
    np.testing.assert_array_equal(env.observe(state), 0)
    after, paid, done = env.step(state, jnp.array([5.0, -0.5]), KEY)  # in [−1, 1], scaled to ±0.1
    np.testing.assert_allclose(env.observe(after), [0.1, -0.05])
    away = np.hypot(0.2, 0.35)
    np.testing.assert_allclose(paid, -(away**2) if reward == "squared" else -away, rtol=1e-6)
    assert not done
    near = Place(goal + jnp.array([0.095, 0.0]), goal)
    assert env.step(near, jnp.array([-1.0, 0.0]), KEY)[2]
    assert not env.step(near, jnp.array([-0.8, 0.0]), KEY)[2]
    goals = jax.vmap(env.sample_task)(jax.random.split(KEY, 4000))
    assert jnp.abs(goals).max() <= 0.5
    np.testing.assert_allclose(goals.std(0), 1 / 12**0.5, atol=0.02)


def test_actions_that_are_velocities():
    env = rl.Navigation(normalised=False)
    state = env.reset(KEY, jnp.zeros(2))
    after = env.step(state, jnp.array([5.0, -0.05]), KEY)[0]
    np.testing.assert_allclose(env.observe(after), [0.1, -0.05])


def test_navigation_with_the_goal_in_sight():
    env = rl.Navigation(see_goal=True)
    batch = draw(env, policy_for(env))
    np.testing.assert_allclose(batch.x[..., 2:], jnp.broadcast_to(env.sample_task(KEY), (3, 5, 2)))


def test_the_batch_retells_the_episode():
    """Actions and observations replayed give the same rewards; log-probs are the policy's."""
    env = rl.Navigation()
    policy = policy_for(env)
    batch = draw(env, policy)
    np.testing.assert_allclose(
        batch.y.log_probs, policy(batch.x).log_prob(batch.y.actions), rtol=1e-5
    )
    state = env.reset(KEY, env.sample_task(KEY))
    for t in range(5):
        np.testing.assert_allclose(batch.x[0, t], env.observe(state), rtol=1e-6)
        state, reward, _ = env.step(state, batch.y.actions[0, t], KEY)
        np.testing.assert_allclose(batch.y.rewards[0, t], reward, rtol=1e-6)
    assert not np.allclose(batch.y.actions[0], batch.y.actions[1])
    assert not np.allclose(batch.y.actions[0, 0], batch.y.actions[0, 1])


def test_bandits():
    arms = jnp.array([0.0, 1.0, 0.25])
    env = rl.Bandit(3)
    pull = jax.vmap(lambda key, arm: env.step(arms, arm, key)[1], in_axes=(0, None))
    keys = jax.random.split(KEY, 4000)
    rates = [float(pull(keys, jnp.array(arm)).mean()) for arm in range(3)]
    np.testing.assert_allclose(rates, arms, atol=5 * (0.25 * 0.75 / 4000) ** 0.5)
    _, reward, done = rl.GaussianBandit().step(jnp.array(0.5), jnp.array([-1.0]), KEY)
    assert (reward, done) == (-2.25, True)
    batch = draw(rl.GaussianBandit(), policy_for(rl.GaussianBandit()), horizon=3)
    np.testing.assert_array_equal(batch.y.mask[:, 1:], 0)


def test_tabular_tables_and_steps():
    env = rl.TabularMDP(states=3, actions=2)
    tables = env.sample_task(KEY)
    np.testing.assert_allclose(jnp.exp(tables.log_transition).sum(-1), 1, rtol=1e-5)
    here = rl.tabular.Cell(jnp.array(1, jnp.int32), tables)
    keys = jax.random.split(KEY, 4000)
    after, rewards, done = jax.vmap(lambda key: env.step(here, jnp.array(0), key))(keys)
    seen = jnp.bincount(after.at, length=3) / 4000
    np.testing.assert_allclose(seen, jnp.exp(tables.log_transition[1, 0]), atol=0.04)
    np.testing.assert_allclose(rewards.mean(), tables.reward[1, 0], atol=5 / 4000**0.5)
    np.testing.assert_allclose(rewards.std(), 1, atol=0.06)
    assert not done.any()


class TwoWays(Countdown):
    """Has but two tasks."""

    all_tasks = jnp.array([2, 5])


def test_of_a_few_tasks_each_has_its_turn():
    tasks = rl.Tasks(TwoWays(), trajectories=2, horizon=3)
    keys = jax.random.split(jax.random.key(0), 6)
    episodes = jax.vmap(lambda key, i: tasks.episode(key, i).query.task)(keys, jnp.arange(6))
    np.testing.assert_array_equal(episodes, [2, 5, 2, 5, 2, 5])
    many = rl.Tasks(rl.Navigation(), trajectories=2, horizon=3)
    for key in keys:
        one, same = many.episode(key, 7), many.sample(key)
        np.testing.assert_array_equal(one.query.task, same.query.task)


def test_a_roll_out_carries_no_derivative():
    env = rl.Navigation()
    source = rl.Tasks(env, trajectories=2, horizon=3).sample(KEY).support

    def total(policy):
        batch = source.draw(policy, KEY)
        return sum(jnp.sum(leaf) for leaf in jax.tree.leaves(batch))

    grads = eqx.filter_jit(eqx.filter_grad(total))(policy_for(env))
    assert all(not leaf.any() for leaf in jax.tree.leaves(grads))


def test_objectives_share_their_gradient_where_the_actions_were_taken(x64):
    env = rl.Navigation()
    policy = policy_for(env)
    batch = draw(env, policy)
    grads = [eqx.filter_grad(objective)(policy, batch) for objective in rl.OBJECTIVES.values()]
    assert ax.tree.norm(grads[0]) > 1e-3
    for other in grads[1:]:
        assert ax.tree.squared_distance(grads[0], other) < 1e-20


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"horizon": 0}, "horizon and trajectories are at least 1, not 0 and 20"),
        ({"trajectories": 0}, "at least 1, not 100 and 0"),
        ({"discount": 1.5}, "between 0 and 1"),
        ({"gae_lambda": -0.1}, "between 0 and 1"),
    ],
)
def test_tasks_that_make_no_sense(how, message):
    with pytest.raises(ValueError, match=message):
        rl.Tasks(rl.Navigation(), **how)


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (rl.GaussianMLP(2, 3, (2,), key=KEY), "has actions of size 2 and the policy actions of si"),
        (rl.CategoricalMLP(2, 2, (2,), key=KEY), "the policy 2 actions to choose from"),
        (rl.GaussianMLP(5, 2, (2,), key=KEY), "observations of size 5 and was given size 2"),
    ],
)
def test_policies_that_do_not_fit(policy, message):
    with pytest.raises(ValueError, match=message):
        draw(rl.Navigation(), policy)


def test_an_unknown_reward():
    with pytest.raises(Exception, match=r"reward"):
        rl.Navigation("cubed")

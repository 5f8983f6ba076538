"""Locomotion: rewards and tasks for a body whose motion is known, and in brax itself."""

import builtins
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adaptax import rl
from adaptax.rl import locomotion

KEY = jax.random.key(0)
SPEED = 1.25


class Glider:
    """What brax's environments answer, for a body that moves at a known speed."""

    observation_size, action_size = 4, 3

    def reset(self, key):
        return types.SimpleNamespace(obs=jnp.zeros(4), done=jnp.zeros(()), metrics={})

    def step(self, state, action):
        fallen = jnp.where(action[0] >= 1, 1.0, 0.0)
        return types.SimpleNamespace(
            obs=state.obs + 1, done=fallen, metrics={"x_velocity": jnp.array(SPEED)}, action=action
        )


@pytest.fixture
def glider(monkeypatch):
    monkeypatch.setattr(locomotion, "_made", lambda name, backend: Glider())


@pytest.mark.parametrize(
    ("robot", "goal", "task", "alive", "effort"),
    [
        ("half-cheetah", "velocity", 0.5, 0.0, 0.05),
        ("half-cheetah", "direction", -1.0, 0.0, 0.05),
        ("ant", "velocity", 2.0, 1.05, 0.005),
        ("ant", "direction", 1.0, 0.05, 0.005),
    ],
)
def test_rewards(glider, robot, goal, task, alive, effort):
    """Of the actions as they were clipped."""
    env = rl.Locomotion(robot, goal)
    state = env.reset(KEY, jnp.array(task))
    after, reward, done = env.step(state, jnp.array([7.0, -0.5, 0.25]), KEY)
    np.testing.assert_array_equal(after.state.action, [1, -0.5, 0.25])
    gain = -abs(SPEED - task) if goal == "velocity" else task * SPEED
    np.testing.assert_allclose(reward, gain + alive - effort * (1 + 0.25 + 0.0625), rtol=1e-6)
    assert done
    np.testing.assert_array_equal(env.observe(after), 1)
    assert after.goal == task
    assert not env.step(state, jnp.array([0.5, 0.0, 0.0]), KEY)[2]


@pytest.mark.parametrize(("robot", "most"), [("half-cheetah", 2), ("ant", 3)])
def test_goals(glider, robot, most):
    keys = jax.random.split(KEY, 4000)
    speeds = jax.vmap(rl.Locomotion(robot, "velocity").sample_task)(keys)
    assert speeds.min() >= 0
    assert speeds.max() < most
    np.testing.assert_allclose(speeds.mean(), most / 2, atol=5 * most / (12 * 4000) ** 0.5)
    signs = jax.vmap(rl.Locomotion(robot, "direction").sample_task)(keys)
    assert set(np.unique(signs)) == {-1, 1}
    assert abs(signs.mean()) < 5 / 4000**0.5


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"robot": "horse"}, "robot is one of half-cheetah, ant, not 'horse'"),
        ({"goal": "height"}, "goal is one of velocity, direction, not 'height'"),
        ({"backend": "warp"}, "backend is one of spring, positional, generalized, mjx, not 'warp'"),
    ],
)
def test_what_is_not_known(glider, how, message):
    # Under the tests' type checker it is that which refuses the names.
    with pytest.raises(Exception, match=rf"{message}|Literal"):
        rl.Locomotion(**how)


def test_without_brax(monkeypatch):
    found = builtins.__import__

    def missing(name, *rest, **more):
        if name.startswith("brax"):
            raise ModuleNotFoundError(name="brax")
        return found(name, *rest, **more)

    locomotion._made.cache_clear()
    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ModuleNotFoundError, match=r"needs brax.*pip install 'adaptax\[rl\]'"):
        rl.Locomotion()


@pytest.fixture(scope="module")
def cheetah():
    pytest.importorskip("brax")
    locomotion._made.cache_clear()
    return rl.Locomotion("half-cheetah", "direction")


def test_sizes(cheetah):
    assert (cheetah.observation_size, cheetah.action_size) == (17, 6)
    ant = rl.Locomotion("ant")
    assert (ant.observation_size, ant.action_size) == (27, 8)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # brax's own
def test_a_cheetah_in_brax(cheetah):
    """What is paid is the way that the torso made, in the direction of the task."""
    actions = 2 * jax.random.normal(KEY, (3, 2, 6))

    @jax.jit
    def run(keys, goals):
        def step(state, action):
            after, reward, done = jax.vmap(cheetah.step)(state, action, keys)
            return after, (place(after), jax.vmap(cheetah.observe)(after), reward, done)

        place = lambda body: body.state.pipeline_state.x.pos[:, 0, 0]
        start = jax.vmap(cheetah.reset)(keys, goals)
        return place(start), jax.lax.scan(step, start, actions)[1]

    goals = jnp.array([1.0, -1.0])
    start, (places, seen, rewards, done) = run(jax.random.split(KEY), goals)
    assert seen.shape == (3, 2, 17)
    assert jnp.isfinite(seen).all()
    assert not done.any()
    speed = np.diff(np.concatenate([start[None], places]), axis=0) / 0.05
    assert np.abs(speed).min() > 1e-3
    effort = 0.05 * jnp.sum(jnp.clip(actions, -1, 1) ** 2, axis=-1)
    np.testing.assert_allclose(rewards, goals * speed - effort, rtol=1e-4, atol=1e-5)

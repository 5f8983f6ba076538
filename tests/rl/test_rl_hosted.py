"""Environments of the gymnasium interface: the same roll-outs, learners and numbers as native."""

import builtins
import inspect
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import adaptax as ax
from adaptax import rl

gymnasium = pytest.importorskip("gymnasium")
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary  # noqa: E402

KEY = jax.random.key(0)
PLANE = Box(-np.inf, np.inf, (2,))


class PointMass(gymnasium.Env):
    """Navigation, as its user would write it for gymnasium; the docs show it."""

    observation_space = PLANE
    action_space = Box(-1, 1, (2,))

    def __init__(self, goal):
        self.goal = goal

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.position = np.zeros(2, np.float32)
        return self.position, {}

    def step(self, action):
        self.position = self.position + 0.1 * action
        away = self.position - self.goal
        arrived = bool(np.all(np.abs(away) < 0.01))
        return self.position, -float(np.linalg.norm(away)), arrived, False, {}


class Dice(gymnasium.Env):
    """Throws of a die with as many sides as the task says; two, then over or cut."""

    observation_space = Box(-1, 1, (1, 2))
    action_space = Discrete(3, start=5)

    def __init__(self, sides):
        self.sides, self.closed = sides, False

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.left = 2
        return np.zeros((1, 2)), {}

    def step(self, action):
        assert self.left > 0, "stepped after its end"
        assert action in self.action_space
        self.left -= 1
        throw = self.np_random.integers(self.sides)
        even = self.sides % 2 == 0
        return np.zeros((1, 2)), throw, self.left == 0 and even, self.left == 0 and not even, {}

    def close(self):
        self.closed = True


def goal(key):
    return jax.random.uniform(key, (2,), minval=-0.5, maxval=0.5)


def sides(key):
    return jax.random.randint(key, (), 100, 200)


HOSTED, NATIVE = rl.Gymnasium(PointMass, goal), rl.Navigation()
TASKS = rl.Tasks(HOSTED, trajectories=2, horizon=4)
POLICY = rl.GaussianMLP(2, 2, (4,), key=KEY)
MAML = ax.MAML(rl.log_prob, 0.1)


@eqx.filter_jit
def draw(tasks, policy, keys):
    each = lambda key: tasks.sample(key).support.draw(policy, key)
    return eqx.filter_vmap(each)(keys) if keys.ndim else each(keys)


def test_returns_are_those_of_the_environment_in_jax():
    """Three tasks at once: same observations and rewards for the same actions."""
    keys = jax.random.split(KEY, 3)
    batch = draw(TASKS, POLICY, keys)

    def replay(key, actions):
        def step(state, action):
            after, reward, _ = NATIVE.step(state, action, key)
            return after, (NATIVE.observe(state), reward)

        return jax.lax.scan(step, NATIVE.reset(key, NATIVE.sample_task(key)), actions)[1]

    seen, rewards = jax.vmap(jax.vmap(replay, (None, 0)))(keys, batch.y.actions)
    assert jnp.abs(batch.y.actions).max() > 1  # some were clipped
    np.testing.assert_allclose(batch.x, seen, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(batch.y.rewards, rewards, rtol=1e-5)
    np.testing.assert_array_equal(batch.y.mask, 1)  # never ends: the horizon cuts
    assert not np.allclose(batch.y.rewards[0], batch.y.rewards[1])
    assert HOSTED.host._running == {}


def test_a_roll_out_is_a_function_of_its_key():
    """With chance in the environment too, which is used again; and whatever is mapped."""
    env = rl.Gymnasium(Dice, sides)
    tasks = rl.Tasks(env, trajectories=3, horizon=4, standardised=False, baseline="none")
    policy = rl.CategoricalMLP(2, 3, (4,), key=KEY)
    keys = jax.random.split(KEY, 2)
    batch, again = draw(tasks, policy, keys), draw(tasks, policy, keys)
    assert eqx.tree_equal(batch, again)
    for i, key in enumerate(keys):
        alone = draw(tasks, policy, key)
        np.testing.assert_array_equal(alone.y.rewards, batch.y.rewards[i])
    assert batch.x.shape == (2, 3, 4, 2)
    np.testing.assert_array_equal(
        batch.y.mask, jnp.broadcast_to(jnp.array([1, 1, 0, 0]), (2, 3, 4))
    )
    assert len(np.unique(batch.y.rewards[..., :2])) > 6


def test_a_step_can_be_repeated_only_from_the_start():
    """A compiler may repeat a first step; what it may not do is noticed."""
    env = rl.Gymnasium(PointMass, goal)
    start = env.reset(KEY, jnp.array([0.1, 0.2]))
    push, pull = jnp.array([1.0, 0.0]), jnp.array([-1.0, 0.0])
    one, two = env.step(start, push, KEY)[0], env.step(start, pull, KEY)[0]
    np.testing.assert_allclose([one.observation, two.observation], [0.1 * push, 0.1 * pull])
    env.step(one, push, KEY)
    with pytest.raises(Exception, match="stepped at time 1 that is not there"):
        env.step(one, push, KEY)
    for i in range(40):  # nobody ends these
        env.reset(jax.random.key(i), jnp.array([0.1, 0.2]))
    assert len(env.host._running) == rl.hosted.ABANDONED


def test_environments_are_kept_for_their_task():
    made = []

    def make(sides):
        made.append(Dice(sides))
        return made[-1]

    env = rl.Gymnasium(make, sides, keep=4)
    policy = rl.CategoricalMLP(2, 3, (4,), key=KEY)
    tasks = rl.Tasks(env, trajectories=3, horizon=2)
    draw(tasks, policy, KEY)
    assert [one.closed for one in made] == [True, False, False, False]  # the first: for its spaces
    draw(tasks, policy, KEY)
    assert len(made) == 4
    draw(tasks, policy, jax.random.key(1))
    assert len(made) == 7
    assert sum(not one.closed for one in made) == 4
    assert not any(one.closed for one in made[4:])


@pytest.mark.parametrize("outer", [None, rl.TRPO()], ids=["Adam", "TRPO"])
def test_learners_train_unchanged(outer):
    """Derivatives of the adaptation included."""
    how = {"steps": 2, "meta_batch": 2, "chunk": 1, "outer": outer, "devices": 1, "key": KEY}
    result = ax.fit(MAML, POLICY, TASKS, **how)
    assert result.step == 2
    assert ax.tree.finite(result.last)
    assert not eqx.tree_equal(result.last, POLICY)


def test_returns_by_gradient_step():
    """As in the native environment, where the same keys sample the same actions."""
    tasks = rl.Tasks(HOSTED, trajectories=10, horizon=5)
    small = rl.GaussianMLP(2, 2, (), key=KEY, std=0.1)
    how = {"goals": 4, "steps": 2, "trajectories": 10, "batch": 4, "lr": (0.3,), "key": KEY}
    hosted = rl.evaluate(MAML, small, tasks, **how)
    native = rl.evaluate(MAML, small, rl.Tasks(NATIVE, trajectories=10, horizon=5), **how)
    np.testing.assert_allclose(hosted.values["return"], native.values["return"], rtol=1e-3)
    assert hosted.mean(step=2) > hosted.mean(step=0)


def test_the_docs_show_this_environment():
    text = (Path(__file__).parents[2] / "docs" / "rl-environments.md").read_text()
    shown = text[text.index("class PointMass") : text.index("env     = rl.Gymnasium(PointMass")]
    code = lambda text: [
        line.split("  #")[0].rstrip() for line in text.splitlines() if line.strip()
    ]
    mine = code(inspect.getsource(PointMass) + inspect.getsource(goal))
    mine.remove('    """Navigation, as its user would write it for gymnasium; the docs show it."""')
    wide = {"observation_space = PLANE": "observation_space = Box(-np.inf, np.inf, (2,))"}
    mine = [line.replace(*pair) for line in mine for pair in wide.items()]
    assert code(shown) == mine
    assert (
        len(code(text[text.index("import adaptax as ax, gymnasium") : text.index("`make(task)`")]))
        <= 36
    )


class Slow(PointMass):
    """The same, for actions that are velocities."""

    action_space = Box(-0.1, 0.1, (2,))

    def step(self, action):
        return super().step(10 * action)


def test_bounds_far_from_one_are_rescaled():
    rescale = lambda goal: gymnasium.wrappers.RescaleAction(
        Slow(goal), np.float32(-1), np.float32(1)
    )
    env, task, action = rl.Gymnasium(rescale, goal), jnp.array([0.1, 0.2]), jnp.array([0.5, -3.0])
    moved, reward, _ = env.step(env.reset(KEY, task), action, KEY)
    np.testing.assert_allclose(moved.observation, [0.05, -0.1], atol=1e-6)
    np.testing.assert_allclose(reward, -np.hypot(0.05, 0.3), rtol=1e-5)


class Broken(PointMass):
    """Pays what is not a number."""

    def step(self, action):
        return self.position, np.nan, False, False, {}


def test_rewards_that_are_not_numbers():
    tasks = rl.Tasks(rl.Gymnasium(Broken, goal), trajectories=2, horizon=2)
    with pytest.raises(ValueError, match="paid rewards that are not finite in 2 of 2 tasks"):
        rl.evaluate(MAML, POLICY, tasks, goals=2, steps=0, key=KEY)


def with_spaces(sight=PLANE, acts=PLANE):
    class Odd(PointMass):
        observation_space, action_space = sight, acts

    return Odd


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda task: 3, "makes a gymnasium.Env, and made int"),
        (with_spaces(sight=Discrete(3)), "of a Box, and those of Odd are of Discrete"),
        (with_spaces(sight=Dict(a=PLANE)), "of a Box, and those of Odd are of Dict"),
        (with_spaces(acts=MultiBinary(3)), "Box or Discrete space, and those of Odd of MultiBi"),
    ],
)
def test_what_is_no_environment_for_a_policy(make, message):
    with pytest.raises(TypeError, match=message):
        rl.Gymnasium(make, goal)


def test_a_policy_that_does_not_fit():
    with pytest.raises(ValueError, match="actions of size 2 and the policy actions of size 3"):
        draw(TASKS, rl.GaussianMLP(2, 3, (2,), key=KEY), KEY)


def test_observations_that_do_not_fit_their_space():
    env = rl.Gymnasium(with_spaces(sight=Box(-1, 1, (3,))), goal)
    with pytest.raises(Exception, match=r"Odd gave an observation of size 2.*says 3"):
        env.reset(KEY, jnp.zeros(2))


def test_without_gymnasium(monkeypatch):
    found = builtins.__import__

    def missing(name, *rest, **more):
        if name == "gymnasium":
            raise ModuleNotFoundError(name=name)
        return found(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'adaptax\[rl\]'"):
        rl.Gymnasium(PointMass, goal)

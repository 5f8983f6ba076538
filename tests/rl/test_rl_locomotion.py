"""Locomotion: rewards and tasks for a body whose motion is known, and in brax itself."""

import builtins

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import adaptax as ax
from adaptax import rl
from adaptax.report.frames import frames
from adaptax.rl import locomotion
from gliders import GLIDER, SECONDS, SPEED

KEY = jax.random.key(0)


@pytest.fixture
def glider(monkeypatch):
    monkeypatch.setattr(locomotion, "_made", lambda name, backend: GLIDER)


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
    np.testing.assert_array_equal(rl.Locomotion(robot, "direction").all_tasks, [1, -1])
    assert rl.Locomotion(robot, "velocity").all_tasks is None


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


def test_where_the_body_is(glider):
    """Capsules go with their links: moved, and turned about the axis that points away."""
    env = rl.Locomotion()
    state = env.reset(KEY, jnp.array(1.0))
    ends = [[[-0.5, 0, 1], [0.5, 0, 1]], [[0.5, 0, 1], [0.5, 0, 0.6]]]
    np.testing.assert_allclose(env.capsules(state), ends, atol=1e-6)
    after = env.step(state, jnp.zeros(3), KEY)[0]
    moved = env.capsules(after) - env.capsules(state)
    np.testing.assert_allclose(moved, np.broadcast_to([SPEED * SECONDS, 0, 0], moved.shape),
                               atol=1e-6)  # fmt: skip
    assert env.seconds == SECONDS


class Reckless(ax.Adapter):
    """Falls after adaptation, in the first step."""

    loss: ax.Loss = eqx.field(static=True, default=rl.log_prob)

    def iterates(self, meta, support, *, key, steps=None):
        bias = lambda i: meta.net.head.bias.at[0].set(100.0 * i)
        each = [eqx.tree_at(lambda m: m.net.head.bias, meta, bias(i)) for i in range(steps + 1)]
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)


def capsules_of(axes):
    return [patch for patch in axes.patches if patch.get_boxstyle()]


@pytest.mark.parametrize("goal", ["direction", "velocity"])
def test_frames(glider, goal, tmp_path):
    """The rows are the lowest and the highest goal; what happened after the fall is faint."""
    tasks = rl.Tasks(rl.Locomotion("half-cheetah", goal), trajectories=2, horizon=11)
    still = rl.GaussianMLP(4, 3, (), key=KEY, std=1e-6)
    still = jax.tree.map(lambda leaf: leaf * 0 - 20 if leaf.ndim == 1 else leaf * 0, still)
    figure = frames(Reckless(), still, tasks, key=KEY, steps=1, shown=3)
    assert len(figure.axes) == 12
    assert [ax_.get_title() for ax_ in figure.axes[:3]] == ["0.0 s", "0.5 s", "1.0 s"]
    labels = [figure.axes[3 * row].get_ylabel().split("\n") for row in range(4)]
    assert [label[1] for label in labels] == ["before", "after 1 step"] * 2
    if goal == "direction":
        assert [label[0] for label in labels] == ["direction -1"] * 2 + ["direction +1"] * 2
        # Before, two of the three actions are clipped to −1; after, all act, and the robot falls.
        expected = [
            total for sign in (-1, 1) for total in (11 * (sign * SPEED - 0.1), sign * SPEED - 0.15)
        ]
        found = [float(label[2].split()[1]) for label in labels]
        np.testing.assert_allclose(found, expected, atol=0.06)
    for row in range(4):
        for column, time in enumerate((0, 5, 10)):
            ax_ = figure.axes[3 * row + column]
            assert ax_.get_xlabel() == f"{time * SPEED * SECONDS:+.1f} m"
            bodies = capsules_of(ax_)
            assert len(bodies) == 2
            assert {body.get_alpha() for body in bodies} == {0.25 if row % 2 and time else 1.0}
            low, high = ax_.get_xlim()
            np.testing.assert_allclose((low + high) / 2 - time * SPEED * SECONDS, 0.25, atol=1e-5)
    figure.savefig(tmp_path / "frames.png")


def test_frames_of_several_policies_are_of_the_first(glider):
    tasks = rl.Tasks(rl.Locomotion(), trajectories=2, horizon=3)
    policy = rl.GaussianMLP(4, 3, (), key=KEY)
    learner = rl.BayesianMAML(rl.log_prob, 0.1, particles=2)
    meta = learner.init(policy, key=KEY)
    alone = ax.MAML(rl.log_prob, 0.1)
    several = frames(learner, meta, tasks, key=KEY, shown=2)
    one = frames(alone, policy, tasks, key=KEY, shown=2)
    before = lambda figure: figure.axes[0].get_ylabel()
    assert before(several) == before(one)


def test_frames_that_make_no_sense(glider):
    draw = lambda tasks, **how: frames(Reckless(), None, tasks, key=KEY, **how)
    with pytest.raises(ValueError, match="the tasks are of Navigation"):
        draw(rl.Tasks(rl.Navigation()))
    with pytest.raises(ValueError, match="steps is at least 1 and shown at least 2"):
        draw(rl.Tasks(rl.Locomotion()), shown=1)


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
    assert (cheetah.seconds, ant.seconds) == (0.05, 0.05)
    assert len(cheetah.radii) == 8


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
        return (
            place(start),
            jax.vmap(cheetah.capsules)(start),
            jax.lax.scan(step, start, actions)[1],
        )

    goals = jnp.array([1.0, -1.0])
    start, body, (places, seen, rewards, done) = run(jax.random.split(KEY), goals)
    # MuJoCo's model: a torso a metre long, and feet that touch the ground but for the noise.
    lengths = jnp.linalg.norm(body[:, :, 1] - body[:, :, 0], axis=-1)
    np.testing.assert_allclose(lengths[:, 0], 1.0, rtol=1e-4)
    np.testing.assert_allclose(lengths[0], lengths[1], rtol=1e-4)
    np.testing.assert_allclose(body[..., 1], 0.0, atol=1e-5)
    low = (body[..., 2] - np.asarray(cheetah.radii)[:, None]).min((1, 2))
    assert (jnp.abs(low) < 0.15).all()
    assert seen.shape == (3, 2, 17)
    assert jnp.isfinite(seen).all()
    assert not done.any()
    speed = np.diff(np.concatenate([start[None], places]), axis=0) / 0.05
    assert np.abs(speed).min() > 1e-3
    effort = 0.05 * jnp.sum(jnp.clip(actions, -1, 1) ** 2, axis=-1)
    np.testing.assert_allclose(rewards, goals * speed - effort, rtol=1e-4, atol=1e-5)

"""Pictures of returns and trajectories: what they show, and what they refuse."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import adaptax as ax
from adaptax import rl
from adaptax.report import returns as pictures

KEY = jax.random.key(0)


def texts(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_returns_by_step(tmp_path):
    values = np.array([[-40.0, -12.0, -3.0], [-42.0, -10.0, -5.0], [-38.0, -11.0, -4.0]])
    of = lambda values: rl.Returns({}, [0, 1, 2], {"return": values})
    given = {"MAML": of(values), "random": of(values - 30)}
    paper = {"MAML": {0: -40.41, 1: -11.68}, "oracle": {0: -2.3}}
    figure = pictures.returns_by_step(given, paper=paper, title="navigation")
    ax = figure.axes[0]
    ours, random, published, oracle, _ = ax.get_lines()
    np.testing.assert_array_equal(ours.get_xdata(), [0, 1, 2])
    np.testing.assert_allclose(ours.get_ydata(), [-40, -11, -4])
    np.testing.assert_allclose(random.get_ydata(), [-70, -41, -34])
    np.testing.assert_allclose(published.get_ydata(), [-40.41, -11.68])
    assert published.get_color() == ours.get_color() != random.get_color() != oracle.get_color()
    edges = ax.collections[0].get_paths()[0].vertices
    at_start = edges[edges[:, 0] == 0, 1]
    half = 1.96 * 2 / 3**0.5
    np.testing.assert_allclose([at_start.min(), at_start.max()], [-40 - half, -40 + half])
    assert texts(figure) == ["MAML", "random", "oracle, published", "published"]
    assert ax.get_title(loc="left") == "navigation"
    figure.savefig(tmp_path / "returns.png")


class Straight(eqx.Module):
    """Always the same velocity, without noise."""

    velocity: jax.Array

    def __call__(self, x):
        mean = jnp.broadcast_to(self.velocity, (*x.shape[:-1], 2))
        return rl.Gaussian(mean, jnp.full(2, -30.0))


class Leap(ax.Adapter):
    """Adapts to another velocity, whatever the task; one more with every step."""

    loss: ax.Loss = eqx.field(static=True, default=rl.log_prob)

    def iterates(self, meta, support, *, key, steps=None):
        return jax.tree.map(lambda v: jnp.stack([i * v for i in range(steps + 1)]), meta)


def test_trajectories(tmp_path):
    tasks = rl.Tasks(rl.Navigation(normalised=False), trajectories=3, horizon=5, split="test")
    meta = Straight(jnp.array([0.02, -0.03]))
    figure = pictures.trajectories(Leap(), meta, tasks, key=KEY, goals=2, steps=2, shown=2)
    assert len(figure.axes) == 4
    goals = [tasks.sample(jax.random.split(k, 3)[0]).query.task for k in jax.random.split(KEY, 2)]
    for column in range(2):
        for row, ax_ in enumerate((figure.axes[column], figure.axes[2 + column])):
            walks = [line for line in ax_.get_lines() if len(line.get_xdata()) == 5]
            assert len(walks) == 2
            t = np.arange(5)
            np.testing.assert_allclose(walks[0].get_xdata(), row * 0.04 * t, atol=1e-6)
            np.testing.assert_allclose(walks[0].get_ydata(), -row * 0.06 * t, atol=1e-6)
            star = next(line for line in ax_.get_lines() if line.get_marker() == "*")
            np.testing.assert_allclose(
                [star.get_xdata()[0], star.get_ydata()[0]], goals[column], rtol=1e-6
            )
            places = row * np.stack([0.04 * (t + 1), -0.06 * (t + 1)], -1)
            total = -np.linalg.norm(places - np.asarray(goals[column]), axis=-1).sum()
            assert ax_.texts[0].get_text() == f"{total:.1f}"
    assert figure.axes[2].get_ylabel() == "after 2 steps"
    assert texts(figure) == ["start", "goal", "policy"]
    figure.savefig(tmp_path / "trajectories.png")


def test_trajectories_of_several_policies():
    tasks = rl.Tasks(rl.Navigation(normalised=False), trajectories=2, horizon=3)
    meta = rl.Policies(Straight(jnp.array([[0.02, 0.0], [0.0, 0.05]])))
    figure = pictures.trajectories(Leap(), meta, tasks, key=KEY, goals=1, steps=1)
    walks = [line for line in figure.axes[1].get_lines() if len(line.get_xdata()) == 3]
    assert [walk.get_xdata()[-1] > 0.01 for walk in walks] == [True, True, False, False]
    assert [walk.get_color() for walk in walks] == 2 * [pictures.COLOURS[0]] + 2 * [
        pictures.COLOURS[1]
    ]
    assert texts(figure) == ["start", "goal", "policy 1", "policy 2"]


def test_pictures_that_make_no_sense():
    with pytest.raises(ValueError, match="no returns to draw"):
        pictures.returns_by_step({})
    draw = lambda tasks, **how: pictures.trajectories(Leap(), None, tasks, key=KEY, **how)
    with pytest.raises(ValueError, match="the tasks are of GaussianBandit"):
        draw(rl.Tasks(rl.GaussianBandit(), horizon=1))
    with pytest.raises(ValueError, match="goals, steps and shown are at least 1"):
        draw(rl.Tasks(rl.Navigation()), steps=0)

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import kstest

from adaptax.task import episode_key
from adaptax.tasks import DataError, sinusoid

KEY = jax.random.key(3)


@pytest.mark.parametrize("paper", ["maml", "reptile"])
def test_points_lie_on_the_true_function(paper):
    tasks = sinusoid(shot=7, query=9, paper=paper).train
    task = tasks.sample(KEY)
    for batch, n in ((task.support, 7), (task.query, 9)):
        assert batch.x.shape == batch.y.shape == (n, 1)
        assert batch.x.dtype == batch.y.dtype == jnp.float32
        assert jnp.array_equal(batch.y, tasks.function(KEY)(batch.x))
    amplitude, shift = tasks.parameters(KEY)
    assert np.allclose(task.query.y, amplitude * np.sin(task.query.x + shift), atol=1e-5)


@pytest.mark.parametrize(
    ("paper", "low", "width"), [("maml", -np.pi, np.pi), ("reptile", 0, 2 * np.pi)]
)
def test_laws_of_amplitude_shift_and_points(paper, low, width):
    tasks = sinusoid(paper=paper).test
    keys = jax.random.split(KEY, 4000)
    amplitude, shift = jax.vmap(tasks.parameters)(keys)
    x = jax.vmap(tasks.sample)(keys).support.x[:, 0, 0]
    for values, law in ((amplitude, (0.1, 4.9)), (shift, (low, width)), (x, (-5, 10))):
        assert kstest(np.asarray(values), "uniform", law).pvalue > 1e-4


def test_reptiles_waves_average_to_zero():
    tasks = sinusoid(paper="reptile").train
    waves = jax.vmap(lambda key: tasks.function(key)(jnp.linspace(-5, 5, 9)))
    # Standard error: sqrt(E[A²]/2/n) = 0.021.
    assert float(jnp.abs(waves(jax.random.split(KEY, 10_000)).mean(0)).max()) < 0.09


def test_the_grid_is_drawn_without_replacement():
    task = sinusoid(shot=30, query=20, paper="reptile", grid=True).train.sample(KEY)
    x = np.sort(np.concatenate([task.support.x, task.query.x]).ravel())
    assert np.allclose(x, np.linspace(-5, 5, 50), atol=1e-6)
    whole = sinusoid(shot=10, query=40, train_shot=50, train_query=0, grid=True)
    assert whole.train.sample(KEY).support.x.shape == (50, 1)
    assert whole.test.sample(KEY).query.x.shape == (40, 1)


def test_splits_name_different_tasks_for_one_seed():
    splits = sinusoid()
    drawn = {
        float(s.parameters(episode_key(s.split, KEY, 0))[0])
        for s in (splits.train, splits.val, splits.test)
    }
    assert len(drawn) == 3
    assert [s.split for s in (splits.train, splits.val, splits.test)] == ["train", "val", "test"]
    assert splits.test.describe()["paper"] == "maml"


def test_doubles_when_jax_is_told_so():
    with jax.enable_x64(True):
        assert sinusoid().train.sample(KEY).query.y.dtype == jnp.float64


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shot": 0}, "shot=0"),
        ({"query": -1}, "query=-1"),
        ({"paper": "leo"}, "paper='leo'; expected"),
        ({"shot": 30, "query": 30, "grid": True}, "30 \\+ 30 points of a grid of 50"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(DataError, match=message):
        sinusoid(**arguments)

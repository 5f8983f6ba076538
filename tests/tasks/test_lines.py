import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import binomtest, kstest, norm

from adaptax.task import episode_key
from adaptax.tasks import DataError, SinusoidOrLine, sinusoid_or_line

KEY = jax.random.key(3)
KEYS = jax.random.split(KEY, 4000)


def test_shapes_and_types():
    task = sinusoid_or_line(shot=7, query=9).train.sample(KEY)
    for batch, n in ((task.support, 7), (task.query, 9)):
        assert batch.x.shape == batch.y.shape == (n, 1)
        assert batch.x.dtype == batch.y.dtype == jnp.float32
    assert sinusoid_or_line().val.sample(KEY).support.size == 5
    assert sinusoid_or_line(train_query=0).train.sample(KEY).query.size == 0


def test_laws_of_the_parameters_and_points():
    tasks = sinusoid_or_line().test
    curves = jax.vmap(tasks.parameters)(KEYS)
    x = jax.vmap(tasks.sample)(KEYS).query.x[:, 0, 0]
    laws = {
        "amplitude": (0.1, 4.9), "phase": (0, np.pi), "slope": (-3, 6), "intercept": (-3, 6),
    }  # fmt: skip
    for name, law in laws.items():
        assert kstest(np.asarray(getattr(curves, name)), "uniform", law).pvalue > 1e-4, name
    assert kstest(np.asarray(x), "uniform", (-5, 10)).pvalue > 1e-4
    assert binomtest(int(curves.is_line.sum()), len(KEYS), 0.5).pvalue > 1e-4


def test_the_family_decides_which_function_it_is():
    tasks, x = sinusoid_or_line().train, jnp.linspace(-5, 5, 11)
    families = set()
    for key in KEYS[:20]:
        curve, y = tasks.parameters(key), tasks.function(key)(x)
        line = curve.slope * x + curve.intercept
        wave = curve.amplitude * jnp.sin(x - curve.phase)
        assert jnp.allclose(y, line if curve.is_line else wave, atol=1e-5)
        families.add(bool(curve.is_line))
    assert families == {True, False}


@pytest.mark.parametrize("noise", [0.3, 1.5])
def test_the_noise_is_gaussian_in_support_and_query_alike(noise):
    tasks = sinusoid_or_line(shot=2, query=2, noise=noise).train

    def residuals(key):
        task, f = tasks.sample(key), tasks.function(key)
        return jnp.stack([b.y - f(b.x) for b in (task.support, task.query)])

    support, query = np.asarray(jax.vmap(residuals)(KEYS)).reshape(-1, 2, 2).swapaxes(0, 1)
    for of in (support, query):
        assert kstest(of.ravel(), norm(scale=noise).cdf).pvalue > 1e-4
    # Standard error of a correlation of 8000 pairs: 0.011.
    assert abs(np.corrcoef(support.ravel(), query.ravel())[0, 1]) < 0.05


def test_without_noise_points_lie_on_the_function():
    tasks = sinusoid_or_line(noise=0.0).train
    task = tasks.sample(KEY)
    assert jnp.array_equal(task.query.y, tasks.function(KEY)(task.query.x))


def test_ranges_are_those_asked_for_and_reported():
    tasks = sinusoid_or_line(amplitude=[1.0, 5.0], slope=[-1.0, 1.0]).train
    curves = jax.vmap(tasks.parameters)(KEYS)
    assert 1 <= float(curves.amplitude.min()) < 1.1
    assert float(jnp.abs(jnp.stack([curves.slope, curves.intercept])).max()) <= 1
    described = tasks.describe()
    assert described["amplitude"] == (1, 5)
    assert described["slope"] == (-1, 1)
    assert described["noise"] == 0.3


def test_a_key_names_one_task_and_splits_share_none():
    splits = sinusoid_or_line()
    assert jnp.array_equal(splits.train.sample(KEY).query.y, splits.test.sample(KEY).query.y)
    drawn = {
        float(s.parameters(episode_key(s.split, KEY, 0)).amplitude)
        for s in (splits.train, splits.val, splits.test)
    }
    assert len(drawn) == 3
    assert isinstance(splits.val, SinusoidOrLine)


def test_doubles_when_jax_is_told_so(x64):
    assert sinusoid_or_line().train.sample(jax.random.key(0)).query.y.dtype == jnp.float64


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shot": 0}, "shot=0; expected at least 1"),
        ({"query": -1}, "query=-1"),
        ({"train_shot": 0}, "train_shot=0"),
        ({"noise": -0.1}, "noise=-0.1; expected a standard deviation, 0 or more"),
        ({"noise": float("nan")}, "noise=nan"),
        (
            {"amplitude": (5.0, 1.0)},
            r"amplitude=\(5.0, 1.0\); expected two finite numbers, low and high",
        ),
        ({"amplitude": (-1.0, 1.0)}, "low and high, at least 0"),
        ({"slope": (1.0,)}, "slope="),
        ({"slope": (0.0, float("inf"))}, "slope="),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(DataError, match=message):
        sinusoid_or_line(**arguments)

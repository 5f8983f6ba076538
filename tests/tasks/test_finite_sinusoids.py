import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import chi2, kstest, norm

from adaptax.tasks import DataError, FiniteSinusoids, finite_sinusoids

KEY = jax.random.key(8)
KEYS = jax.random.split(KEY, 4000)


def test_training_has_so_many_tasks_with_fixed_data():
    tasks = finite_sinusoids(shot=5, tasks=20).train
    sampled = jax.vmap(tasks.sample)(KEYS)
    index = np.asarray(jax.vmap(tasks.index)(KEYS))
    seen = np.bincount(index, minlength=20)
    assert len(seen) == 20
    assert ((seen - 200) ** 2 / 200).sum() < chi2.isf(1e-4, 19)
    everything = np.concatenate([np.asarray(leaf) for leaf in jax.tree.leaves(sampled)], axis=1)
    assert len(np.unique(everything, axis=0)) == 20
    for i in range(20):
        assert (everything[index == i] == everything[index == i][0]).all()


def test_the_seed_names_the_set_and_a_larger_set_begins_with_a_smaller_one():
    draw = lambda **how: finite_sinusoids(**how).train
    one, other = draw(tasks=1), draw(tasks=1, seed=1)
    assert not eqx.tree_equal(one.sample(KEY), other.sample(KEY))
    larger = draw(tasks=1000)
    first = next(key for key in jax.random.split(KEY, 20_000) if larger.index(key) == 0)
    assert eqx.tree_equal(larger.sample(first), one.sample(KEY))


@pytest.mark.parametrize("split", ["train", "test"])
def test_laws_of_the_parameters(split):
    tasks = getattr(finite_sinusoids(tasks=10**6), split)
    drawn = jax.vmap(tasks.parameters)(KEYS)
    for values, law in zip(drawn, ((0.1, 4.9), (0.5, 1.5), (0, 2 * np.pi))):
        assert kstest(np.asarray(values), "uniform", law).pvalue > 1e-4


def test_noise_is_a_share_of_the_amplitude_and_test_queries_have_none():
    splits = finite_sinusoids(shot=2, tasks=10**6, noise=0.05)
    for tasks in (splits.train, splits.val, splits.test):

        def residuals(key, tasks=tasks):
            task, f = tasks.sample(key), tasks.function(key)
            share = [(b.y - f(b.x)) / tasks.parameters(key)[0] for b in (task.support, task.query)]
            return jnp.stack(share)

        support, query = np.asarray(jax.vmap(residuals)(KEYS)).reshape(-1, 2, 2).swapaxes(0, 1)
        assert kstest(support.ravel(), norm(scale=0.05).cdf).pvalue > 1e-4
        if tasks.split == "train":
            assert kstest(query.ravel(), norm(scale=0.05).cdf).pvalue > 1e-4
        else:
            assert np.abs(query).max() < 1e-5


def test_test_tasks_are_fresh():
    splits = finite_sinusoids(shot=10, tasks=3)
    amplitudes = jax.vmap(lambda key: splits.test.parameters(key)[0])(KEYS)
    assert len(np.unique(np.asarray(amplitudes))) > 3990
    task = splits.test.sample(KEY)
    assert task.support.x.shape == task.query.x.shape == (10, 1)
    with pytest.raises(ValueError, match="the test tasks are fresh for every key"):
        splits.test.index(KEY)
    assert isinstance(splits.val, FiniteSinusoids)
    assert splits.train.describe()["set"] == "3 of seed 0"
    assert splits.test.describe()["set"] == "fresh"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shot": 0}, "shot=0"),
        ({"query": -1}, "query=-1"),
        ({"tasks": 0}, "tasks=0; expected at least 1 task"),
        ({"noise": -1.0}, "noise=-1.0"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(DataError, match=message):
        finite_sinusoids(**arguments)

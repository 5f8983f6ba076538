import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import chi2

from adaptax.task import episode_key
from adaptax.tasks import from_arrays
from adaptax.tasks.episodes import Design, distinct, rotate

KEY = jax.random.key(7)
draw = eqx.filter_jit(lambda tasks, key: tasks.sample(key))


def bytes_of(x):
    return np.rint(np.asarray(x) * 255).astype(int)


def sample_many(tasks, n, key=KEY):
    return jax.jit(jax.vmap(tasks.sample))(jax.random.split(key, n))


@pytest.mark.parametrize(("m", "count"), [(3, 6), (5, 5), (1, 9)])
def test_every_ordered_choice_is_equally_likely(m, count):
    draws = 30_000
    chosen = np.asarray(
        jax.jit(jax.vmap(lambda key: distinct(key, m, count)))(jax.random.split(KEY, draws))
    )
    assert chosen.min() >= 0
    assert chosen.max() < count
    assert all(len(set(row)) == m for row in chosen)
    code = chosen @ count ** np.arange(m)
    outcomes = int(np.prod(np.arange(count - m + 1, count + 1)))
    seen = np.unique(code, return_counts=True)[1]
    expected = draws / outcomes
    statistic = ((seen - expected) ** 2).sum() / expected + (outcomes - len(seen)) * expected
    assert statistic < chi2.isf(1e-4, outcomes - 1)


def test_the_looped_choice_is_distinct_and_uniform_too():
    chosen = np.asarray(jax.vmap(lambda k: distinct(k, 40, 50))(jax.random.split(KEY, 3000)))
    assert all(len(set(row)) == 40 for row in chosen)
    for place in (0, 20, 39):
        seen = np.bincount(chosen[:, place], minlength=50)
        assert ((seen - 60) ** 2 / 60).sum() < chi2.isf(1e-4, 49)


def test_choosing_all_is_a_permutation_and_none_is_empty():
    assert sorted(np.asarray(distinct(KEY, 33, 33))) == list(range(33))
    assert distinct(KEY, 0, 5).shape == (0,)


def test_the_count_may_be_traced():
    assert jnp.array_equal(jax.jit(distinct, static_argnums=1)(KEY, 4, 9), distinct(KEY, 4, 9))


def test_shapes_types_and_range(labelled):
    task = draw(from_arrays(*labelled, way=4, shot=2, query=3).train, KEY)
    assert task.support.x.shape == (8, 4, 4, 1)
    assert task.query.x.shape == (12, 4, 4, 1)
    assert task.support.x.dtype == jnp.zeros(()).dtype
    assert task.support.y.dtype == jnp.int32
    assert task.support.y.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert 0 <= float(task.query.x.min()) <= float(task.query.x.max()) <= 1


def test_episodes_are_n_distinct_classes_with_disjoint_support_and_query(labelled):
    x, labels = labelled
    tasks = from_arrays(x, labels, way=4, shot=5, query=7).train
    episodes = sample_many(tasks, 200)
    support, query = bytes_of(episodes.support.x), bytes_of(episodes.query.x)
    support, query = support.reshape(200, 4, 5, 16), query.reshape(200, 4, 7, 16)
    both = np.concatenate([support, query], 2)
    classes = both[..., 0]
    assert (classes == classes[:, :, :1]).all()
    assert all(len(set(episode)) == 4 for episode in classes[:, :, 0])
    rows = both[..., 6] + 256 * both[..., 13]
    assert all(len(set(episode.ravel())) == 48 for episode in rows)
    # Unequal classes: a row always belongs to the class that it was drawn for.
    assert (labels[rows] == classes).all()
    of_split = np.flatnonzero(np.isin(labels, [int(name) for name in tasks.classes]))
    assert set(rows.ravel()) == set(of_split)


def test_labels_are_permuted_uniformly(labelled):
    tasks = from_arrays(*labelled, way=4, shot=1, query=0).val
    first = bytes_of(sample_many(tasks, 5000).support.x)[:, 0, 0, 0, 0]
    seen = np.unique(first, return_counts=True)[1]
    assert len(seen) == len(tasks.classes) == 5
    assert ((seen - 1000) ** 2 / 1000).sum() < chi2.isf(1e-4, 4)


def test_a_key_names_one_episode_and_splits_share_none(labelled):
    splits = from_arrays(*labelled, way=4, shot=1, query=2)
    a, b = draw(splits.train, KEY), splits.train.sample(KEY)
    assert eqx.tree_equal(a, b)
    assert not eqx.tree_equal(a, splits.train.sample(jax.random.key(8)))
    keys = [episode_key(tasks.split, KEY, 0) for tasks in (splits.train, splits.val, splits.test)]
    assert len({tuple(jax.random.key_data(key).tolist()) for key in keys}) == 3
    classes = [set(s.classes) for s in (splits.train, splits.val, splits.test)]
    assert sum(map(len, classes)) == len(set.union(*classes)) == 30


def test_no_query_and_other_counts_in_training(labelled):
    splits = from_arrays(*labelled, way=3, shot=1, query=1, train_shot=10, train_query=0)
    assert draw(splits.train, KEY).support.x.shape[0] == 30
    assert draw(splits.train, KEY).query.x.shape == (0, 4, 4, 1)
    assert draw(splits.test, KEY).query.x.shape[0] == 3
    assert draw(splits.test, KEY).support.x.shape[0] == 3


def test_rotate_is_numpys(labelled):
    x = np.random.default_rng(0).integers(0, 256, (2, 4, 3, 5, 5, 2), dtype=np.uint8)
    turns = np.array([[0, 1, 2, 3], [3, 3, 0, 1]])
    turned = rotate(jnp.asarray(x), jnp.asarray(turns))
    for e, w in np.ndindex(turns.shape):
        assert np.array_equal(turned[e, w], np.rot90(x[e, w], turns[e, w], axes=(1, 2)))


def corner(x):
    """Where the mark of class images (top left) went: the number of quarter turns."""
    marks = bytes_of(x)[..., [0, -1, -1, 0], [0, 0, -1, -1], 0]
    return marks.argmax(-1)


def test_rotations_as_classes_and_at_random():
    labels = np.repeat(np.arange(20), 6)
    x = np.zeros((120, 4, 4, 1), np.uint8)
    x[:, 0, 0, 0] = labels + 1
    splits = from_arrays(
        x, labels, way=5, shot=2, query=1, splits=(0.25, 0.25, 0.5), rotations=("classes", "random")
    )
    assert splits.train.describe()["classes"] == 20
    assert splits.test.describe()["classes"] == 10
    for tasks, distinct_bases in ((splits.train, False), (splits.test, True)):
        images = sample_many(tasks, 2000).support.x.reshape(2000, 5, 2, 4, 4, 1)
        turns, base = corner(images), bytes_of(images).max((-1, -2, -3))
        assert (turns[..., 0] == turns[..., 1]).all()  # one turn a class and episode
        assert np.bincount(turns[..., 0].ravel()).min() > 2200  # of 10,000, 2,500 expected
        pairs = turns[..., 0] + 4 * base[..., 0]
        assert all(len(set(episode)) == 5 for episode in pairs)
        assert all(len(set(episode)) == 5 for episode in base[..., 0]) == distinct_bases


@pytest.mark.parametrize(
    ("rotations", "lead"), [("none", ()), ("classes", (3,)), ("random", (2, 3))]
)
def test_streamed_episodes_are_the_device_episodes_to_the_bit(labelled, rotations, lead):
    asked = {"way": 3, "shot": 2, "query": 4, "rotations": (rotations, "none"), "invert": True}
    here = from_arrays(*labelled, **asked).train
    there = from_arrays(*labelled, **asked, memory_budget=0).train
    assert (here.on_host, there.on_host) == (False, True)
    keys = jax.random.split(KEY, lead) if lead else KEY
    plan, sample = there.plan, here.sample
    for _ in lead:
        plan, sample = eqx.filter_vmap(plan), eqx.filter_vmap(sample)
    fetched = there.fetch(eqx.filter_jit(plan)(keys))
    assert eqx.tree_equal(fetched, eqx.filter_jit(sample)(keys))
    assert there.describe() == here.describe()


def test_a_plan_is_compiled_without_the_bank(labelled):
    tasks = from_arrays(*labelled, way=3, query=4, memory_budget=0).train
    plan = eqx.filter_jit(lambda tasks, key: tasks.plan(key))
    assert eqx.tree_equal(plan(tasks, KEY), tasks.plan(KEY))
    assert all(leaf.size <= 30 for leaf in jax.tree.leaves(tasks))


def test_normalisation():
    x = jnp.arange(24, dtype=jnp.uint8).reshape(1, 2, 2, 2, 3) * 10
    design = Design(1, 1, 1, mean=(0.1, 0.2, 0.3), std=(2.0, 3.0, 4.0))
    inputs = design.task(x, jnp.zeros(1, int)).support.x
    expected = (np.asarray(x)[0, :1] / 255 - [0.1, 0.2, 0.3]) / [2, 3, 4]
    assert np.allclose(inputs, expected, atol=1e-6)


def test_doubles_when_jax_is_told_so(labelled):
    with jax.enable_x64(True):
        tasks = from_arrays(*labelled, way=3, query=2).train
        task = draw(tasks, KEY)
        assert task.support.x.dtype == jnp.float64
        assert task.support.y.dtype == jnp.int32
        rows = tasks.plan(KEY).rows
    assert jnp.array_equal(rows, from_arrays(*labelled, way=3, query=2).train.plan(KEY).rows)

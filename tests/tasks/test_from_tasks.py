"""Lists of tasks of unequal sizes: no row in two roles, nothing lost, padding without weight."""

import math
import warnings

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import adaptax as ax
from adaptax.tasks import DataError, from_tasks
from adaptax.tasks.ragged import Draw

KEY = jax.random.key(0)


def lists(sizes=(30, 8, 12, 5, 40, 9, 17, 22, 11, 6), seed=0):
    """Tasks whose first input tells task and row: `1000·task + row`."""
    rng = np.random.default_rng(seed)
    made = {}
    for i, n in enumerate(sizes):
        x = np.stack([1000 * i + np.arange(n), rng.normal(size=n)], axis=1).astype("f4")
        made[f"task {i}"] = (x, rng.normal(size=n).astype("f4"))
    return made


def drawn(tasks, count=40):
    sample = eqx.filter_jit(lambda key: tasks.sample(key))
    return [sample(key).unpadded() for key in jax.random.split(KEY, count)]


def parts(names):
    return {"train": names[:-2], "val": names[-2:-1], "test": names[-1:]}


def test_no_row_is_in_two_roles_and_all_rows_come_up():
    given = lists()
    splits = from_tasks(given, shot=(2, 6), splits=parts([*given]))
    seen = set()
    for task in drawn(splits.train, 150):
        rows = np.asarray(jnp.concatenate([task.support.x, task.query.x])[:, 0]).astype(int)
        (own,) = set(rows // 1000)
        assert len(set(rows.tolist())) == len(rows) == len(given[f"task {own}"][0])
        assert 2 <= task.support.size <= 6
        _x, y = given[f"task {own}"]
        assert np.array_equal(task.support.y[:, 0], y[rows[: task.support.size] % 1000])
        seen |= set(rows.tolist())
    assert seen == {1000 * i + j for i in range(8) for j in range(len(given[f"task {i}"][0]))}


def test_every_support_size_is_as_likely():
    splits = from_tasks(lists(), shot=(2, 6), query=2, splits=(0.8, 0.1, 0.1))
    sizes = jax.vmap(lambda key: splits.train.plan(key).sizes)(jax.random.split(KEY, 4000))
    large = [i for i, n in enumerate(splits.train.count) if n > 6]
    rows = jax.vmap(lambda key: splits.train.rows(large[0], key).sizes)(jax.random.split(KEY, 2000))
    counts = np.bincount(np.asarray(rows[:, 0]), minlength=7)[2:]
    assert stats.chisquare(counts).pvalue > 1e-4
    assert (np.asarray(sizes[:, 1]) >= 1).all()


def test_shares_and_fixed_sizes():
    given = lists()
    names = [*given]
    half = from_tasks(given, shot=0.5, splits=parts(names))
    for i, name in enumerate(half.train.names):
        n = len(given[name][0])
        task = half.train.member(i, KEY).unpadded()
        assert task.support.size == min(max(round(0.5 * n), 1), n - 1)
        assert task.support.size + task.query.size == n
    fixed = from_tasks(given, shot=3, query=2, splits=parts(names))
    task = fixed.train.sample(KEY)
    assert task.support.weight is None
    assert task.query.weight is None
    more = from_tasks(given, shot=3, query=10, splits=parts(names)).train.sample(KEY)
    assert more.support.weight is None
    assert more.query.weight is not None


def test_padding_is_a_copy_of_a_row_that_is_there():
    given = lists()
    splits = from_tasks(given, shot=(1, 20), splits=parts([*given]))
    small = splits.train.names.index("task 3")
    for key in jax.random.split(KEY, 10):
        task = splits.train.member(small, key)
        for batch in (task.support, task.query):
            assert (batch.x[:, 0] // 1000 == 3).all()
            there = np.asarray(batch.weight) > 0
            assert np.isin(batch.x[~there, 0], batch.x[there, 0]).all()


def test_gaps_of_several_targets_do_not_count_and_rows_without_any_are_left_out():
    rng = np.random.default_rng(1)
    given = {}
    for name in "abcdef":
        y = rng.normal(size=(12, 2)).astype("f4")
        y[1, 0], y[2], y[5, 1] = np.nan, np.nan, np.nan
        given[name] = (np.arange(12.0)[:, None], y)
    splits = from_tasks(given, shot=4, splits=(0.5, 0.2, 0.3))
    for task in drawn(splits.train, 20):
        rows = np.concatenate([task.support.x, task.query.x])[:, 0]
        assert sorted(rows.tolist()) == [0, 1, *range(3, 12)]
        y = np.concatenate([task.support.y, task.query.y])
        assert np.isnan(y[rows == 1]).tolist() == [[True, False]]
        assert np.isnan(y).sum() == 2
    one = {
        name: (x, np.where(np.arange(12) == 3, np.nan, y[:, 0])) for name, (x, y) in given.items()
    }
    task = from_tasks(one, shot=4, splits=(0.5, 0.2, 0.3)).train.sample(KEY)
    assert task.query.size == 12 - 3 - 4


def test_supports_standardise_what_they_have():
    given = lists()
    splits = from_tasks(given, shot=(3, 6), standardise="support", splits=parts([*given]))
    for i, key in enumerate(jax.random.split(KEY, 5)):
        task = splits.train.member(i, key).unpadded()
        y = given[f"task {i}"][1]
        rows = [np.asarray(s.x[:, 0]).astype(int) % 1000 for s in (task.support, task.query)]
        mean, scale = y[rows[0]].mean(), y[rows[0]].std()
        assert np.allclose(task.query.y[:, 0], (y[rows[1]] - mean) / scale, rtol=1e-4, atol=1e-4)


def classified(ways=(2, 3, 2, 4, 2, 3)):
    rng = np.random.default_rng(2)
    given = {}
    for i, way in enumerate(ways):
        labels = np.repeat(np.array(["left", "right", "up", "down"])[:way], [18, 6, 6, 6][:way])
        x = np.stack([np.arange(len(labels)), rng.normal(size=len(labels))], axis=1)
        given[f"t{i}"] = (x.astype("f4"), labels)
    return given


def test_classes_mean_the_same_in_all_tasks_or_are_each_tasks_own():
    given = classified()
    shared = from_tasks(given, shot=6, splits=parts([*given])).train
    assert shared.way == 4
    order = sorted(["left", "right", "up", "down"])
    task = shared.member(1, KEY).unpadded()
    due = [order.index(given["t1"][1][int(row)]) for row in task.support.x[:, 0]]
    assert task.support.y.tolist() == due
    own = from_tasks(given, shot=6, classes="task", splits=parts([*given])).train
    assert own.way == 4
    assert set(own.member(0, KEY).unpadded().query.y.tolist()) == {0, 1}
    assert own.describe()["way"] == 4


@pytest.mark.parametrize("shot", [4, 8, 12])
def test_stratified_supports_hold_the_classes_in_proportion(shot):
    given = classified((3, 3, 3, 3))
    splits = from_tasks(given, shot=shot, splits=parts([*given]))
    for key in jax.random.split(KEY, 30):
        task = splits.train.member(0, key).unpadded()
        due = shot * np.array([18, 6, 6]) / 30
        labels = ["left", "right", "up"]
        order = [sorted(["left", "right", "up"]).index(label) for label in labels]
        assert (np.abs(np.bincount(task.support.y, minlength=3)[order] - due) <= 2).all()
        rows = np.concatenate([task.support.x, task.query.x])[:, 0]
        assert len(set(rows.tolist())) == 30
    first = jax.vmap(lambda key: splits.train.member(0, key).support.x[0, 0])
    rows = np.asarray(first(jax.random.split(KEY, 600))).astype(int)
    assert stats.chisquare(np.bincount(rows[rows < 18])).pvalue > 1e-4  # those of one class


def test_in_order_of_time_the_support_comes_before_the_queries():
    given = lists()
    rng = np.random.default_rng(3)
    order = {name: rng.permutation(len(x)) for name, (x, _) in given.items()}
    splits = from_tasks(given, shot=(2, 4), query=3, order=order, splits=parts([*given]))
    cuts = set()
    for task in drawn(splits.train, 60):
        own = int(task.support.x[0, 0]) // 1000
        when = order[f"task {own}"]
        before, after = (
            when[np.asarray(b.x[:, 0]).astype(int) % 1000] for b in (task.support, task.query)
        )
        assert (np.diff(np.concatenate([before, after])) == 1).all()
        cuts.add((own, int(after[0])))
    assert len(cuts) > 30
    dates = {name: np.datetime64("2026-01-01") + when for name, when in order.items()}
    again = from_tasks(given, shot=(2, 4), query=3, order=dates, splits=parts([*given]))
    assert eqx.tree_equal(again.train.sample(KEY), splits.train.sample(KEY))


def test_series_of_unequal_length_have_their_length():
    rng = np.random.default_rng(4)
    given = [
        ([rng.normal(size=(int(t), 2)) for t in rng.integers(3, 9, 7)], rng.normal(size=7))
        for _ in range(6)
    ]
    splits = from_tasks(given, shot=3, splits=(0.5, 0.2, 0.3))
    x = splits.train.sample(KEY).support.x
    assert x["series"].shape == (3, max(len(s) for x, _ in given for s in x), 2)
    for series, length in zip(x["series"], x["length"], strict=True):
        assert (series[int(length) :] == 0).all()
        assert (series[: int(length)] != 0).all()


def test_a_bank_on_the_host_gives_the_same_episodes_and_scores():
    given = lists()
    how = {"shot": (2, 6), "standardise": "support", "splits": parts([*given])}
    device, host = from_tasks(given, **how), from_tasks(given, **how, memory_budget=0)
    assert host.train.on_host
    assert not device.train.on_host
    for key in jax.random.split(KEY, 5):
        a, b = device.train.sample(key), host.train.sample(key)
        assert all(np.allclose(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)))
    model = ax.models.MLP(2, 1, (8,), key=KEY)
    learner = ax.MAML(ax.losses.mse, 0.01, 2)
    reports, metas = [], []
    for tasks in (device, host):
        result = ax.fit(learner, model, tasks.train, steps=4, meta_batch=3, key=KEY)
        metas.append(result.meta)
        reports.append(ax.evaluate(learner, model, tasks.train, episodes=9, key=KEY))
    assert np.allclose(metas[0].head.weight, metas[1].head.weight, atol=1e-6)
    assert np.allclose(reports[0].values["r2"], reports[1].values["r2"], atol=1e-4)


def test_episodes_in_order_are_each_task_once():
    given = lists((9,) * 12)
    test = from_tasks(given, shot=3, splits=(0.4, 0.3, 0.3)).test
    keys = jax.random.split(KEY, 8)
    own = [int(test.episode(k, i).support.x[0, 0]) // 1000 for i, k in enumerate(keys)]
    assert own[:4] == own[4:]
    assert {f"task {i}" for i in own} == set(test.names)


def test_the_score_of_a_ragged_task_is_that_of_its_rows():
    given = lists()
    tasks = from_tasks(given, shot=(2, 6), splits=parts([*given])).train
    model = ax.models.MLP(2, 1, (8,), key=KEY)
    learner = ax.MAML(ax.losses.mse, 0.01, 1)
    report = ax.evaluate(learner, model, tasks, episodes=6, key=KEY)
    for i in range(6):
        key = ax.task.episode_key("train", KEY, i)
        task = tasks.episode(key, i).unpadded()
        adapted = learner.adapt(model, task.support, key=KEY)
        due = ax.losses.mse(adapted, task.query)
        assert np.isclose(report.values["mse"][i, -1], due, rtol=1e-4)


def test_small_tasks_are_left_out_and_named():
    given = lists()
    with pytest.warns(
        UserWarning, match=r"2 of 10 tasks are too small .*task 3 \(5\), task 9 \(6\)"
    ):
        splits = from_tasks(given, shot=(6, 8), splits=(0.6, 0.2, 0.2))
    left = {*splits.train.names, *splits.val.names, *splits.test.names}
    assert left == {*given} - {"task 3", "task 9"}
    assert splits.train.describe()["left_out"] == 2


def test_splits_follow_the_names_and_the_seed():
    given = lists((9,) * 20)
    one, two = (from_tasks(given, shot=2, seed=s) for s in (0, 1))
    assert one.train.names != two.train.names
    assert from_tasks(dict(reversed(given.items())), shot=2).train.names == one.train.names
    assert (len(one.train.names), len(one.val.names), len(one.test.names)) == (13, 3, 4)


def nan_y(x, y):
    return x, np.where(np.arange(len(y)) >= 0, np.nan, y)


BAD = {
    r"shot=0; expected a number of examples": {"shot": 0},
    r"shot=1\.5; expected": {"shot": 1.5},
    r"shot=\(5, 2\); expected": {"shot": (5, 2)},
    r"query=0; expected an integer, at least 1": {"query": 0},
    r"kind='rank'; expected one of auto": {"kind": "rank"},
    r"standardise='yes'; expected one of none, support": {"standardise": "yes"},
    r"least_spread=0\.0; expected a deviation above 0": {"least_spread": 0.0},
    r"splits=\(0\.5, 0\.9, 0\.1\); expected the fractions of the tasks": {
        "splits": (0.5, 0.9, 0.1)
    },
    r"given the splits train; expected train, val and test": {"splits": {"train": []}},
    r"the val split names 1 tasks that are not there, such as 'x'": {
        "splits": {"train": ["task 0"], "val": ["x"], "test": ["task 1"]}
    },
    r"splits share 1 classes|share 1": {
        "splits": {"train": ["task 0"], "val": ["task 0"], "test": ["task 1"]}
    },
    r"no task of the \w+ split has more than 100 examples": {"shot": 100},
    r"order is given for 1 tasks, and there are 10": {"order": {"task 0": np.arange(30)}},
}


@pytest.mark.parametrize("sentence", BAD)
def test_arguments_that_make_no_sense_are_one_sentence(sentence):
    with pytest.raises(DataError, match=sentence):
        from_tasks(lists(), **{"shot": 3, **BAD[sentence]})


def spoilt(change):
    given = lists()
    given["task 2"] = change(*given["task 2"])
    return given


FAULTY = {
    r"task 2: given a tuple; expected the pair": lambda x, y: (x, y, y),
    r"task 2 has 12 examples and targets of shape \(11,\)": lambda x, y: (x, y[:-1]),
    r"x of task task 2: 1 of 12 examples are not finite": lambda x, y: (
        np.where(np.arange(24).reshape(12, 2) == 5, np.nan, x),
        y,
    ),
    r"y of task task 2 is infinite, or beyond float32, in row 3": lambda x, y: (
        x,
        np.where(np.arange(12) == 3, np.inf, y),
    ),
    r"x of task task 2 is floats \(3,\), and of task task 0 floats \(2,\)": lambda x, y: (
        np.concatenate([x, x[:, :1]], axis=1),
        y,
    ),
    r"some tasks have floats for targets and others labels": lambda x, y: (x, ["a"] * 12),
    r"tasks have targets of shapes \[\(1,\), \(2,\)\]": lambda x, y: (x, np.stack([y, y], axis=1)),
    r"x of task task 2 has shapes": lambda x, y: ({"a": x, "b": x[:3]}, y),
}


@pytest.mark.parametrize("sentence", FAULTY)
def test_faulty_tasks_are_named(sentence):
    with pytest.raises(DataError, match=sentence):
        from_tasks(spoilt(FAULTY[sentence]), shot=3)


def test_tasks_without_any_target_or_with_one_row_are_left_out():
    given = spoilt(nan_y)
    given["one"] = (np.ones((1, 2), "f4"), np.ones(1, "f4"))
    with pytest.warns(UserWarning, match=r"2 of 11 tasks .*too small"):
        splits = from_tasks(given, shot=(1, 4), splits=(0.6, 0.2, 0.2))
    assert "task 2" not in splits.train.names + splits.val.names + splits.test.names


def test_labels_that_are_no_classes_are_refused():
    given = {
        name: (x, np.arange(len(y)) + 200 * i) for i, (name, (x, y)) in enumerate(lists().items())
    }
    with pytest.raises(DataError, match=r'integers of .* values; say kind="regression"'):
        from_tasks(given, shot=3)
    as_numbers = from_tasks(given, shot=3, kind="regression", splits=parts([*given]))
    assert as_numbers.train.way is None
    fractions = {name: (x, y) for name, (x, y) in lists().items()}
    with pytest.raises(DataError, match="holds fractions or NaN, which are no classes"):
        from_tasks(fractions, shot=3, kind="classification")
    same = {name: (x, np.zeros(len(y), int)) for name, (x, y) in lists().items()}
    with pytest.raises(DataError, match="all labels are the same"):
        from_tasks(same, shot=3)


def test_a_large_draw_sorts():
    draw = Draw((1, 800), 300, 1000)
    support, query, left = jax.jit(draw.places, static_argnums=3)(
        KEY, jnp.int32(700), jnp.int32(900), None
    )
    assert left == 200
    rows = np.concatenate([support[:700], query[:200]])
    assert sorted(rows.tolist()) == list(range(900))
    assert math.isclose(Draw(0.5, 3, 9).support, 4)


def test_a_constant_target_stays_finite():
    given = {name: (x, np.full(len(y), 3.0)) for name, (x, y) in lists().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tasks = from_tasks(given, shot=3, standardise="support", splits=parts([*given]))
    task = tasks.train.sample(KEY)
    assert bool(jnp.isfinite(task.query.y).all())
    assert (task.query.y == 0).all()

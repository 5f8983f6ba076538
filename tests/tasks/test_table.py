"""Tables as tasks: which rows, columns and splits, and that FS-Mol's are those of `fsmol`."""

import jax
import numpy as np
import pytest

import adaptax as ax
from adaptax.tasks import DataError, table
from adaptax.tasks.table import kind_of, prepared

pytest.importorskip("narwhals")
arrow = pytest.importorskip("pyarrow")
KEY = jax.random.key(0)


def rows(tasks=12, each=20, seed=0):
    """Lines of a slope and a height of their own, in tasks of unequal sizes."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(each // 2, each + 1, tasks)
    task = np.repeat(np.arange(tasks), sizes)
    x = rng.normal(size=(len(task), 3))
    slope, height = rng.normal(size=tasks), 5 * rng.normal(size=tasks)
    y = slope[task] * x[:, 0] + height[task] + 0.1 * rng.normal(size=len(task))
    order = rng.permutation(len(task))
    columns = {"task": [f"t{i}" for i in task], "y": y, "a": x[:, 0], "b": 50 + 9 * x[:, 1]}
    columns |= {"kind": np.array(["u", "v"])[(x[:, 2] > 0).astype(int)], "when": np.arange(len(y))}
    return {name: np.asarray(values)[order] for name, values in columns.items()}


def test_rows_of_a_value_are_a_task():
    data = rows()
    splits = table(data, "task", "y", shot=(3, 6), ignore="when")
    assert splits.preparation.width == 4
    parts = prepared(data, "task", "y", ignore="when")
    assert sum(map(len, parts.splits.values())) == 12
    for name, (x, y) in parts.tasks.items():
        own = data["task"] == name
        np.testing.assert_allclose(
            y[:, 0] * parts.preparation.spread + parts.preparation.centre,
            data["y"][own],
            rtol=1e-5,
            atol=1e-5,
        )
        assert len(x) == own.sum()
    training = np.isin(data["task"], parts.splits["train"])
    x = parts.preparation.inputs(data)
    np.testing.assert_allclose(x[training, :2].mean(axis=0), 0, atol=1e-6)
    np.testing.assert_allclose(x[training, :2].std(axis=0), 1, atol=1e-6)
    for split in (splits.train, splits.val, splits.test):
        task = split.sample(KEY).unpadded()
        assert 3 <= task.support.size <= 6
        np.testing.assert_allclose(np.mean(task.support.y), 0, atol=1e-5)


def test_splits_by_names_by_a_column_and_by_shares():
    data = rows()
    names = [f"t{i}" for i in range(12)]
    fold = {
        name: ("train", "valid", "test")[min(i // 6 + i // 9, 2)] for i, name in enumerate(names)
    }
    by = {"train": names[:6], "val": names[6:9], "test": names[9:]}
    one = prepared(data, "task", "y", splits=by)
    two = prepared({**data, "fold": [fold[t] for t in data["task"]]}, "task", "y", split="fold")
    assert {s: sorted(of) for s, of in two.splits.items()} == {
        s: sorted(of) for s, of in by.items()
    }
    assert "fold" not in two.preparation.kinds
    np.testing.assert_array_equal(one.tasks["t3"][0], two.tasks["t3"][0])
    three = prepared(data, "task", "y", splits=(0.5, 0.25, 0.25), seed=1)
    assert {s: len(of) for s, of in three.splits.items()} == {"train": 6, "val": 3, "test": 3}
    assert three.splits != prepared(data, "task", "y", splits=(0.5, 0.25, 0.25), seed=2).splits


def test_missing_targets_are_left_out_or_gaps():
    data = rows()
    y = data["y"].copy()
    y[::3] = np.nan
    parts = prepared({**data, "y": y}, "task", "y")
    assert parts.dropped == len(y[::3])
    assert sum(len(y) for _, y in parts.tasks.values()) == np.isfinite(y).sum()
    two = {**data, "y": y, "y2": data["y"]}
    splits = table(two, "task", "y*", shot=4)
    task = splits.train.sample(KEY)
    assert task.support.y.shape == (4, 2)
    assert (np.asarray(task.support.weight) == 0).any() or np.isfinite(task.support.y).all()
    learner = ax.MAML(ax.losses.mse, inner_lr=0.05)
    model = ax.models.MLP(splits.preparation.width, 2, (4,), key=KEY)
    assert np.isfinite(learner.meta_loss(model, task, key=KEY)[0])


def test_support_comes_before_queries_in_time():
    data = rows()
    data["clock"] = data["when"]
    splits = table(data, "task", "y", shot=4, order="when", features="clock", scale=False)
    for i in range(5):
        task = splits.train.sample(jax.random.key(i)).unpadded()
        assert np.max(task.support.x) < np.min(task.query.x)


def test_classes_are_those_of_the_column():
    data = rows()
    data["y"] = np.where(data["y"] > np.median(data["y"]), "high", "low")
    splits = table(data, "task", "y", shot=6)
    assert list(splits.preparation.classes) == ["high", "low"]
    task = splits.train.sample(KEY)
    assert np.issubdtype(task.support.y.dtype, np.integer)
    assert kind_of(data, "y") == "classification"
    with pytest.raises(DataError, match="has 1 of the 2 classes of training"):
        prepared(
            {**data, "y": ["low"] * (len(data["y"]) - 1) + [None]},
            "task",
            "y",
            fitted=splits.preparation,
        )


def test_a_preparation_is_applied_instead_of_fitted(tmp_path):
    data = rows()
    fitted = prepared(data, "task", "y", ignore="when").preparation
    fitted.save(tmp_path / "preparation.safetensors")
    other = {**rows(seed=1), "a": rows(seed=1)["a"] + 0.5}
    again = prepared(other, "task", "y", fitted=tmp_path)
    np.testing.assert_array_equal(again.preparation.mean, fitted.mean)
    with pytest.raises(DataError, match="the preparation is of y by task, not of a by task"):
        prepared(data, "task", "a", fitted=fitted)


@pytest.mark.parametrize(
    ("change", "how", "said"),
    [
        ({}, {"task": "assay"}, "lacks columns of the tasks: assay; there are task, y"),
        ({}, {"target": "z"}, "target='z': there is no such column"),
        ({}, {"features": "kind_*"}, r"features='kind_\*': there is no such column"),
        ({}, {"features": ["a", "y"]}, "features= chooses y, which"),
        ({}, {"ignore": ["a", "b", "kind", "when"]}, "no column is left for inputs"),
        ({"y": np.nan}, {}, "'y' is missing in all"),
        ({"y": 2.0}, {}, "'y' is 2 in every row; there is nothing to predict"),
        ({"y": "a"}, {}, "'y' is a in every row; expected two classes"),
        ({"y": "a"}, {"kind": "regression"}, "'y' is a category; expected a number"),
        ({}, {"kind": "both"}, "expected one of auto, regression, classification"),
        ({}, {"target": ["y", "a"], "kind": "classification"}, "has one target, not 2"),
        ({"a": np.inf}, {}, "'a' has .* infinite values"),
        ({"y": np.inf}, {}, "'y' has .* infinite values"),
        ({"task": "one"}, {}, "1 tasks leave none for"),
        ({}, {"splits": (0.5, 0.6, 0.1)}, "three numbers that sum to at most 1"),
        ({}, {"splits": {"train": ["t1"], "val": ["t2"], "test": ["t99"]}}, "not there, t99"),
        ({}, {"splits": {"train": ["t1"]}}, "expected the names of tasks for each of"),
        ({}, {"split": "kind"}, "says u of task|says u and v of task"),
        ({}, {"order": "kind"}, "is a column of text; expected dates or numbers"),
        ({}, {"least_spread": 0.0}, "expected a spread above 0"),
        ({}, {"standardise": "all"}, "expected one of support, train, none"),
    ],
)
def test_what_makes_no_sense_is_said_in_one_sentence(change, how, said):
    data = rows()
    data |= {name: np.full(len(data["y"]), value) for name, value in change.items()}
    with pytest.raises(DataError, match=said) as caught:
        table(data, **{"task": "task", "target": "y", **how})
    assert "\n" not in str(caught.value)


def test_tasks_of_one_row_are_left_out_and_named():
    data = rows()
    data["task"] = np.where(np.arange(len(data["y"])) == 0, "alone", data["task"])
    with pytest.warns(UserWarning, match=r"1 of 13 tasks are too small .* alone \(1\)"):
        splits = table(data, "task", "y", shot=4)
    names = [*splits.train.names, *splits.val.names, *splits.test.names]
    assert len(names) == 12
    assert "alone" not in names


def test_a_target_of_zeros_and_ones_is_asked_about():
    data = rows()
    data["y"] = (data["y"] > 0).astype(int)
    with pytest.warns(UserWarning, match="0 or 1, and taken for a number"):
        assert prepared(data, "task", "y").preparation.classes is None
    assert prepared(data, "task", "y", kind="classification").preparation.classes == ["0", "1"]


def fsmol_as_a_table(path, count=8):
    """A few assays of every split of FS-Mol, as `fsmol` sees them, in one Parquet file."""
    import pyarrow.parquet

    from adaptax.tasks.assays import FOLDS, load
    from adaptax.tasks.files import data_folder

    try:
        data = load(data_folder())
    except FileNotFoundError:
        pytest.skip("FS-Mol is not here")
    columns = {"assay": [], "split": [], "activity": []}
    bits = []
    for fold in FOLDS.values():
        large = np.flatnonzero((data.split == fold) & (np.diff(data.offsets) >= 90))
        for i in large[:count]:
            own = slice(data.offsets[i], data.offsets[i + 1])
            y, active = data.log_activity[own], data.active[own]
            if np.isfinite(y).sum() < 90:
                continue
            known = np.isfinite(y)
            turned = known & active, known & ~active
            if all(of.any() for of in turned) and y[turned[0]].mean() < y[turned[1]].mean():
                y = -y
            columns["assay"] += [str(data.task[i])] * len(y)
            columns["split"] += [fold] * len(y)
            columns["activity"] += [None if np.isnan(v) else float(v) for v in y]
            bits.append(np.unpackbits(data.fingerprint_bits[own], axis=1))
    bits = np.concatenate(bits)
    columns |= {f"bit_{j}": bits[:, j] for j in range(bits.shape[1])}
    pyarrow.parquet.write_table(arrow.table(columns), path)
    return set(columns["assay"])


def test_fs_mol_as_one_parquet_file_has_the_scores_of_fsmol(tmp_path):
    names = fsmol_as_a_table(tmp_path / "fsmol.parquet")
    splits = table(
        tmp_path / "fsmol.parquet",
        "assay",
        "activity",
        shot=16,
        query=64,
        split="split",
        features="bit_*",
        scale=False,
        least_spread=0.1,
    )
    assert splits.preparation.width == 2048
    theirs = ax.tasks.fsmol(shot=16, query=64).test
    learner = ax.RidgeRegression(penalty=100.0)
    meta = learner.init(None, key=KEY)
    same = {}
    for place, name in enumerate(theirs.names):
        if name in names:
            same[name] = place
    assert set(splits.test.names) == set(same)
    # The same rows of the same assays: the key of an episode names them.
    for i, name in enumerate(splits.test.names):
        own = ax.task.episode_key("test", KEY, i)
        ours, other = splits.test.member(i, own), theirs.member(same[name], own)
        for a, b in ((ours.support, other.support), (ours.query, other.query)):
            np.testing.assert_array_equal(a.x, b.x)
            np.testing.assert_allclose(a.y, b.y, rtol=1e-4, atol=1e-5)
        scores = [
            float(ax.losses.mse(learner.adapt(meta, task.support, key=KEY), task.query))
            for task in (ours, other)
        ]
        np.testing.assert_allclose(*scores, rtol=1e-3)

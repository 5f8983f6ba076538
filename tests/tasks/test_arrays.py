import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adaptax.tasks import DataError, StreamedEpisodes, from_arrays
from adaptax.tasks.bank import split_by_fraction

KEY = jax.random.key(0)
draw = eqx.filter_jit(lambda tasks, key: tasks.sample(key))


def features(classes=20, each=20, dtype=np.float32):
    labels = np.repeat(np.arange(classes), each)
    x = np.random.default_rng(0).normal(size=(len(labels), 6)).astype(dtype)
    return x, labels


def test_features_are_kept_as_they_are():
    x, labels = features()
    task = draw(from_arrays(x, labels, way=3, shot=2, query=2).train, KEY)
    rows = {row.tobytes() for row in x}
    assert all(np.asarray(row).tobytes() in rows for row in task.support.x)


@pytest.mark.parametrize("dtype", [np.float64, np.int64, np.float16, bool])
def test_other_numbers_become_float32(dtype):
    x, labels = features(dtype=dtype)
    assert from_arrays(x, labels, way=3).train.bank.dtype == jnp.float32


def test_string_labels_in_any_order():
    x, labels = features()
    order = np.random.default_rng(1).permutation(len(x))
    named = np.array([f"class {c}" for c in labels])
    a = from_arrays(x, named, way=3).train
    b = from_arrays(x[order], named[order], way=3).train
    assert a.classes == b.classes
    assert {r.tobytes() for r in np.asarray(a.bank)} == {r.tobytes() for r in np.asarray(b.bank)}
    assert from_arrays(x, list(named), way=3).val.classes[0].startswith("class")


def test_ready_made_splits():
    x, labels = features()
    parts = {"train": labels < 10, "val": (labels >= 10) & (labels < 14), "test": labels >= 14}
    given = {split: (x[of], labels[of]) for split, of in parts.items()}
    splits = from_arrays(given, way=3)
    assert splits.val.classes == ("10", "11", "12", "13")
    for split, of in parts.items():
        assert np.array_equal(np.asarray(getattr(splits, split).bank), x[of])


def test_a_memory_mapped_array_is_streamed_without_a_copy(tmp_path):
    x, labels = features()
    np.save(tmp_path / "x.npy", x)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    tasks = from_arrays(mapped, labels, way=3, memory_budget=1000).train
    assert isinstance(tasks, StreamedEpisodes)
    assert tasks.bank.array is mapped
    assert jnp.array_equal(
        tasks.sample(KEY).query.x, draw(from_arrays(x, labels, way=3).train, KEY).query.x
    )


def test_fractions_of_classes():
    parts = split_by_fraction([str(i) for i in range(100)], (0.64, 0.16, 0.2), seed=0)
    assert [len(p) for p in parts.values()] == [64, 16, 20]
    assert len(set().union(*parts.values())) == 100
    assert parts != split_by_fraction([str(i) for i in range(100)], (0.64, 0.16, 0.2), seed=1)


X, Y = features()
EARLY, LATE = (X[Y < 10], Y[Y < 10]), (X[Y >= 10], Y[Y >= 10])


@pytest.mark.parametrize(
    ("x", "labels", "arguments", "message"),
    [
        (X, None, {}, "labels are None; expected one label an example"),
        (X, Y[:-1], {}, r"shape \(400, 6\) and labels of shape \(399,\); expected"),
        (X[:, 0], Y, {}, r"examples of shape \(400,\)"),
        (X, Y / 2, {}, "labels of type float64; expected integers or strings"),
        (X.astype(complex), Y, {}, "examples of type complex128"),
        (X, Y, {"way": 5}, "way=5, but the val split has 3 classes; lower way"),
        (X, Y, {"way": 3, "shot": 10}, r"class \d+ of the train split has 20 .* = 10 \+ 15"),
        (X, Y, {"way": 3, "train_query": 20}, r"of the train split has 20 examples.* 1 \+ 20"),
        (X, Y, {"shot": 0}, "shot=0; expected at least 1"),
        (X, Y, {"query": -1}, "query=-1; expected at least 0"),
        (X, Y, {"train_shot": 0}, "train_shot=0"),
        (X, Y, {"way": 3, "splits": (0.5, 0.5)}, "three numbers that sum to at most 1"),
        (X, Y, {"way": 3, "splits": (0.5, 0.5, 0.5)}, "three numbers that sum to at most 1"),
        (X, Y, {"way": 3, "rotations": ("random", "none")}, r"'random' of examples of .* \(6,\)"),
        ({"train": EARLY, "test": LATE}, None, {}, "the splits test, train; expected"),
        (
            {"train": EARLY, "val": LATE, "test": LATE}, None, {},
            r"the val and test splits share 10 classes \(10, 11, 12, 13, 14, \.\.\.\)",
        ),
        ({"train": EARLY, "val": (X[:5, :3], Y[:5])}, None, {}, "examples of several kinds"),
        ({"train": EARLY}, Y, {}, "put them inside the dict"),
    ],
)  # fmt: skip
def test_errors_are_one_clear_sentence(x, labels, arguments, message):
    with pytest.raises(DataError, match=message) as caught:
        from_arrays(x, labels, **arguments)
    assert "\n" not in str(caught.value)

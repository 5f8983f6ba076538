import equinox as eqx
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

import adaptax as ax
from adaptax.tasks import DataError, arrays, from_arrays
from adaptax.tasks.bank import shuffled

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


@pytest.mark.parametrize("dtype", [np.float64, np.float16, jnp.bfloat16, ">f4", bool])
def test_other_numbers_become_float32(dtype):
    x, labels = features()
    x = x.astype(dtype)
    found = from_arrays(x, labels, way=3).train.bank
    assert found.dtype == jnp.float32
    assert {row.tobytes() for row in np.asarray(found)} <= {
        row.tobytes() for row in x.astype(np.float32)
    }


INTEGERS = [(np.int64, jnp.int32), (np.int16, jnp.int16), (np.uint32, jnp.uint32),
            (np.uint64, jnp.uint32), (">i4", jnp.int32)]  # fmt: skip


@pytest.mark.parametrize(("dtype", "expected"), INTEGERS)
@pytest.mark.parametrize("budget", [2**30, 0])
def test_integers_stay_integers(dtype, expected, budget):
    labels = np.repeat(np.arange(20), 20)
    ids = np.random.default_rng(0).integers(0, 200, (400, 7)).astype(dtype)
    splits = from_arrays(ids, labels, way=3, memory_budget=budget)
    task = splits.train.sample(KEY)
    assert task.support.x.dtype == expected
    assert {tuple(row) for row in np.asarray(task.query.x)} <= {tuple(row) for row in ids.tolist()}


def test_integers_are_as_wide_as_jax_has_them(x64):
    labels = np.repeat(np.arange(20), 20)
    ids = np.full((400, 2), 2**40, np.int64) + labels[:, None]
    task = from_arrays(ids, labels, way=3).train.sample(jax.random.key(0))
    assert task.support.x.dtype == jnp.int64
    assert int(task.support.x.min()) >= 2**40


INPUTS = {
    "ids": np.arange(800).reshape(400, 2),
    "mask": np.arange(800).reshape(400, 2) % 3 > 0,
    "picture": np.random.default_rng(0).integers(0, 256, (400, 2, 2, 3), np.uint8),
    "more": {"length": np.arange(400), "size": np.linspace(0, 1, 400)},
}


@pytest.mark.parametrize("budget", [2**30, 0])
def test_several_inputs_go_together(budget):
    labels = np.repeat(np.arange(20), 20)
    splits = from_arrays(INPUTS, labels, way=3, query=4, memory_budget=budget, invert=True)
    assert splits.train.on_host == (budget == 0)
    task = splits.train.sample(KEY)
    x = task.query.x
    kinds = jax.tree.map(lambda a: a.dtype.name, x)
    assert kinds == {"ids": "int32", "mask": "bool", "picture": "float32",
                     "more": {"length": "int32", "size": "float32"}}  # fmt: skip
    rows = np.asarray(x["more"]["length"])
    assert x["ids"].shape == (12, 2)
    assert np.array_equal(x["ids"], INPUTS["ids"][rows])
    assert np.array_equal(x["mask"], INPUTS["mask"][rows])
    assert np.allclose(x["picture"], (255 - INPUTS["picture"][rows]) / 255)
    assert np.allclose(x["more"]["size"], INPUTS["more"]["size"][rows])
    for way in range(3):
        assert len({*labels[rows[4 * way : 4 * way + 4]]}) == 1
    pair = from_arrays((INPUTS["ids"], INPUTS["mask"]), labels, way=3).train.sample(KEY)
    assert [a.shape for a in pair.support.x] == [(3, 2), (3, 2)]
    early = labels < 10
    take = lambda of: jax.tree.map(lambda a: a[of], INPUTS)
    parts = {"train": early, "val": (labels >= 10) & (labels < 15), "test": labels >= 15}
    split = from_arrays({s: (take(of), labels[of]) for s, of in parts.items()}, way=3)
    assert np.array_equal(np.asarray(split.val.bank["ids"]), INPUTS["ids"][parts["val"]])


def test_a_picture_in_two_splits_is_reported():
    labels = np.repeat(np.arange(20), 20)
    picture = INPUTS["picture"].copy()
    picture[::20] = picture[0]  # one of every class
    for x in (picture, {"ids": INPUTS["ids"], "picture": picture}):
        with pytest.warns(UserWarning, match="the same picture is in two splits of arrays"):
            from_arrays(x, labels, way=3)


def test_several_inputs_are_learned_from_and_predicted():
    labels = np.repeat(np.arange(20), 20)
    splits = from_arrays({k: INPUTS[k] for k in ("ids", "mask")}, labels, way=3, query=4)
    net = ax.Functional(
        jnp.zeros((800, 3)), lambda p, x: (p[x["ids"]] * x["mask"][..., None]).sum(axis=1)
    )
    learner = ax.MAML(ax.losses.cross_entropy, 0.1, 1)
    result = ax.fit(learner, net, splits.train, steps=2, meta_batch=2, key=KEY)
    for transductive in (True, False):
        report = ax.evaluate(
            learner, result.meta, splits.test, episodes=2, key=KEY, transductive=transductive
        )
        assert np.isfinite(report.mean("nll"))


class Categorical:
    """What NumPy makes of pandas' columns: an array of objects."""

    def __init__(self, values):
        self.values = values

    def __array__(self, dtype=None, copy=None):
        return np.array(self.values, object)


@pytest.mark.parametrize(
    "kind",
    [
        list,
        tuple,
        Categorical,
        lambda values: np.array(values, object),
        lambda values: np.ma.array(values),
        pytest.param(
            lambda values: np.array(values, np.dtypes.StringDType()),
            marks=pytest.mark.skipif(not hasattr(np.dtypes, "StringDType"), reason="NumPy 1"),
        ),
        lambda values: pytest.importorskip("pandas").Series(values, dtype="category"),
        lambda values: pytest.importorskip("pandas").Series(values, dtype="string"),
    ],
)
def test_labels_of_any_kind(kind):
    x, labels = features()
    named = [f"class {c}" for c in labels]
    expected = from_arrays(x, np.array(named), way=3)
    found = from_arrays(x, kind(named), way=3)
    assert found.train.classes == expected.train.classes
    assert np.array_equal(found.test.bank, expected.test.bank)
    numbers = from_arrays(x, [np.int64(c) for c in labels], way=3)
    assert np.array_equal(numbers.test.bank, from_arrays(x, labels, way=3).test.bank)


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
    assert tasks.on_host
    assert tasks.bank.array is mapped
    assert jnp.array_equal(
        tasks.sample(KEY).query.x, draw(from_arrays(x, labels, way=3).train, KEY).query.x
    )


def test_fractions_of_classes():
    parts = shuffled([str(i) for i in range(100)], 0, (0.64, 0.16, 0.2))
    assert [len(p) for p in parts.values()] == [64, 16, 20]
    assert len(set().union(*parts.values())) == 100
    assert parts != shuffled([str(i) for i in range(100)], 1, (0.64, 0.16, 0.2))


X, Y = features()

IMAGES = np.zeros((400, 4, 4, 1))


def changed(value, *rows, dtype=np.float64):
    x = abs(X).astype(dtype)
    x[list(rows), 1] = value
    return x


EARLY, LATE = (X[Y < 10], Y[Y < 10]), (X[Y >= 10], Y[Y >= 10])


@pytest.mark.parametrize(
    ("x", "labels", "arguments", "message"),
    [
        (X, None, {}, "labels are None; expected one label an example"),
        (X, Y[:-1], {}, r"shape \(400, 6\) and labels of shape \(399,\); expected"),
        (X[:, 0], Y, {}, r"examples of shape \(400,\)"),
        (X, Y / 2, {}, "labels of type float64; expected integers or strings"),
        (X.astype(complex), Y, {}, "examples of type complex128"),
        (X, Y, {"way": 5, "splits": (0.64, 0.16, 0.2)},
         "way=5, but the val split has 3 classes and the test split has 4; lower way to 3 or give"),
        (X, Y, {"way": 11}, "way=11, but the train split has 10 classes and .*; lower way to 10"),
        (X, Y, {"way": 3, "shot": 10, "query": 15},
         r"class \d+ of the train split has 20 .* = 10 \+ 15"),
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
        # Values that the device would not hold, or no values at all.
        (changed(np.nan, 3, 17), Y, {}, r"x: 2 of 400 examples are not finite .* 3, 17; leave"),
        (changed(-np.inf, *range(9)), Y, {}, r"9 of 400 .* in rows 0, 1, 2, 3, 4, …;"),
        ({"a": X, "b": changed(np.nan, 5)}, Y, {}, "x/b: 1 of 400 examples are not finite"),
        (changed(1e39, 2), Y, {}, "x: 1 of 400 examples are beyond float32, in rows 2; scale"),
        (changed(2**31, 7, dtype=np.int64), Y, {}, "beyond int32, in rows 7; number them anew"),
        (changed(2**32, 7, dtype=np.uint64), Y, {}, "beyond uint32, in rows 7"),
        (changed(2**80, 7, dtype=object), Y, {}, "x: examples of type object; expected numbers"),
        (np.ma.masked_less(X, -2), Y, {}, r"examples are masked, in rows \d+, .*; leave them out"),
        (X[:, :0], Y, {}, r"examples of shape \(400, 0\) hold nothing"),
        (X[:0], Y[:0], {}, r"examples of shape \(0, 6\) hold nothing"),
        (np.float32(1), Y, {}, r"examples of shape \(\) and labels of shape \(400,\); expected"),
        (None, Y, {}, "examples of shape none"),
        ({}, Y, {}, "examples of shape none"),
        ({}, None, {}, "found no splits; expected train, val and test"),
        ({1: X, "a": X}, Y, {}, "inputs cannot be put in order"),
        ("text", Y, {}, r"examples of shape \(\)"),
        ([[1, 2], [3]], [0, 1], {}, r"x: a list is no array \(.*inhomogeneous.*as many in each"),
        ({"a": X, "b": X[:9]}, Y, {}, r"shape \(400, 6\) and \(9, 6\) and labels of"),
        ({"train": (*EARLY, 1)}, None, {}, r"train: given a tuple of 3; expected the pair \(x,"),
        ({"ids": X}, None, {}, r"ids: given a ndarray; expected the pair .* or labels= beside"),
        ({"train": EARLY, "val": (X.astype(int), Y)}, None, {},
         r"several kinds, floats \(6,\) and integers \(6,\); expected one"),
        ({"train": EARLY, "val": ({"a": X}, Y)}, None, {}, "several kinds"),
        # Labels that are none.
        (X, [*Y[:-1], None], {}, r"1 of 400 .* without a label \(None\), in rows 399; give"),
        (X, np.array([np.nan, *map(str, Y[1:])], object), {}, r"without a label \(nan\), in rows"),
        (X, [*Y[:-1], "a"], {}, "labels are integers and text; expected one kind"),
        (X, np.ma.masked_equal(Y, 3), {}, "labels of x: 20 of 400 examples are masked"),
        (X, np.eye(20, dtype=int)[Y], {}, r"labels of shape \(400, 20\); expected"),
        (X, 3, {}, r"labels of shape \(\)"),
        # What only images have.
        (X, Y, {"invert": True}, "invert=True of examples of type float32; only images of bytes"),
        ({"a": IMAGES}, Y, {"rotations": ("random", "none")}, "one array of square"),
        (IMAGES[:, 1:], Y, {"rotations": ("none", "classes")}, "array of square images"),
    ],
)  # fmt: skip
def test_errors_are_one_clear_sentence(x, labels, arguments, message):
    with pytest.raises(DataError, match=message) as caught:
        from_arrays(x, labels, **{"way": 3, **arguments})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seed": None}, "seed=None; expected an integer"),
        ({"seed": "0"}, "seed='0'; expected an integer"),
        (
            {"rotations": "random"},
            r"rotations='random'; expected two of none, random, ",
        ),
        ({"rotations": ("random", "often")}, "expected two of none, random, classes"),
        ({"rotations": None}, "rotations=None; expected two"),
        ({"way": "5"}, "way='5'; expected an integer, at least 1"),
        ({"shot": 1.5}, "shot=1.5; expected an integer"),
        ({"query": "all"}, "query='all'; expected an integer"),
        ({"memory_budget": "1GB"}, "memory_budget='1GB'; expected a number of bytes"),
        ({"splits": 0.5}, "splits=0.5; expected the fractions"),
        ({"splits": (0.5, "a", 0.1)}, "expected the fractions"),
        ({"splits": (0.5, float("nan"), 0.1)}, "expected the fractions"),
    ],
)
def test_arguments_of_another_type(arguments, message, monkeypatch):
    # The tests' own check of types would be first.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(DataError, match=message):
        from_arrays(X, Y, **{"way": 3, **arguments})


def test_a_memory_mapped_array_of_doubles_is_checked_and_streamed(tmp_path, monkeypatch):
    monkeypatch.setattr(arrays, "BLOCK", 1000)
    x, labels = features(dtype=np.float64)
    np.save(tmp_path / "x.npy", x)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r+")
    tasks = from_arrays(mapped, labels, way=3, memory_budget=1000).train
    assert tasks.bank.array is mapped
    task = tasks.sample(KEY)
    assert task.query.x.dtype == jnp.float32
    assert jnp.array_equal(task.query.x, draw(from_arrays(x, labels, way=3).train, KEY).query.x)
    mapped[399] = np.nan
    with pytest.raises(DataError, match=r"1 of 400 examples are not finite .* in rows 399"):
        from_arrays(mapped, labels, way=3, memory_budget=1000)

"""The file of embeddings and the episodes drawn from it."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from adaptax import io
from adaptax.tasks import DataError
from adaptax.tasks.embeddings import embeddings, read, write

KEY = jax.random.key(0)
COUNTS = {"train": 6, "val": 3, "test": 4}


def features(each=7, width=5, counts=COUNTS, seed=0):
    """For each split as many classes; the classes are told by their names alone."""
    rng = np.random.default_rng(seed)
    return {
        split: (rng.normal(size=(each * n, width)).astype(np.float32),
                np.repeat(np.arange(n), each), [f"{split}-{i}" for i in range(n)])
        for split, n in counts.items()
    }  # fmt: skip


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("embeddings") / "e.safetensors"
    write(path, features(), backbone="conv4", source={"run": "runs/x", "accuracy": float("nan")})
    return path


def raw(path, **how):
    write(path, features(), normalise=False, backbone="conv4", source={}, **how)
    return path


def rewritten(path, tensors=None, about=None):
    """The file with tensors or metadata replaced, or left out where `None`."""
    arrays, metadata = load_file(path), io.read_metadata(path)
    arrays |= tensors or {}
    metadata |= about or {}
    save_file({k: v for k, v in arrays.items() if v is not None}, path,
              {"adaptax": json.dumps(metadata)})  # fmt: skip


def test_the_file_holds_what_the_documentation_says(file):
    arrays = load_file(file)
    about = io.read_metadata(file)
    assert set(arrays) == {f"{s}/{w}" for s in COUNTS for w in ("embeddings", "labels")}
    for split, (x, labels, names) in features().items():
        unit = x / np.linalg.norm(x, axis=1, keepdims=True)
        np.testing.assert_allclose(arrays[f"{split}/embeddings"], unit, 1e-6, 1e-7)
        np.testing.assert_array_equal(arrays[f"{split}/labels"], labels)
        assert arrays[f"{split}/labels"].dtype == np.int32
        assert about["classes"][split] == names
    assert {k: about[k] for k in ("format", "version", "normalised", "backbone", "source")} == {
        "format": "embeddings", "version": 1, "normalised": True, "backbone": "conv4",
        "source": {"run": "runs/x", "accuracy": None},
    }  # fmt: skip


def rows_of(x):
    """Split, class and number of each embedding: of the one in the file that it equals."""
    where, units = [], []
    for split, (rows, labels, _) in features().items():
        where += [(split, int(label), i) for i, label in enumerate(labels)]
        units.append(rows / np.linalg.norm(rows, axis=1, keepdims=True))
    cosines = np.asarray(x) @ np.concatenate(units).T
    assert (cosines.max(axis=1) > 1 - 1e-5).all()
    return [where[i] for i in cosines.argmax(axis=1)]


@pytest.mark.parametrize("split", list(COUNTS))
def test_episodes_are_of_the_split(file, split):
    tasks = getattr(embeddings(file, way=3, shot=2, query=4), split)
    task = tasks.sample(KEY)
    assert task.support.x.shape == (6, 5)
    assert task.query.x.shape == (12, 5)
    support, query = rows_of(task.support.x), rows_of(task.query.x)
    assert {s for s, _, _ in support + query} == {split}
    assert len({i for _, _, i in support + query}) == 18  # none twice
    for rows, y in ((support, task.support.y), (query, task.query.y)):
        pairs = {(label, name) for (_, name, _), label in zip(rows, np.asarray(y).tolist())}
        assert len(pairs) == 3  # one class, one label
    assert [name for _, name, _ in support[::2]] == [name for _, name, _ in query[::4]]


def test_description(file):
    assert embeddings(file, way=3, shot=1, query=2).val.describe() == {
        "tasks": "embeddings", "split": "val", "way": 3, "shot": 1, "query": 2, "classes": 3,
        "rotations": "none", "width": 5, "backbone": "conv4", "normalised": "in the file",
        "train_and_val": False,
    }  # fmt: skip


def test_all_others_are_queries(file):
    splits = embeddings(file, way=2, shot=2, query="all", train_query=3)
    queries = {s: getattr(splits, s).describe()["query"] for s in COUNTS}
    assert queries == {"train": 3, "val": 5, "test": 5}
    task = splits.test.sample(KEY)
    rows = rows_of(task.support.x) + rows_of(task.query.x)
    chosen = {name for _, name, _ in rows}
    assert sorted(i for _, _, i in rows) == sorted(
        i for c in chosen for i in range(7 * c, 7 * c + 7)
    )
    with pytest.raises(DataError, match=r"has 7 examples, but shot \+ query = 2 \+ 15"):
        embeddings(file, way=2, shot=2, query="all")  # LEO's 15 in meta-training


def test_all_others_want_classes_of_equal_size(tmp_path):
    found = features()
    x, labels, names = found["test"]
    found["test"] = (x[:-2], labels[:-2], names)
    write(tmp_path / "e", found, backbone="conv4", source={})
    with pytest.raises(DataError, match="test split have 5 to 7 embeddings; ask for query=4"):
        embeddings(tmp_path / "e", way=2, shot=1, query="all", train_query=2)
    assert embeddings(tmp_path / "e", way=2, shot=1, query=4).test.describe()["query"] == 4


def test_train_and_val_draws_from_both(file):
    splits = embeddings(file, way=3, shot=1, query=1, train_and_val=True)
    assert splits.train.classes == tuple(features()["train"][2] + features()["val"][2])
    assert splits.train.describe()["classes"] == 9
    assert splits.train.describe()["train_and_val"] is True
    draw = jax.jit(lambda key: splits.train.sample(key))
    seen = {(s, c) for i in range(40)
            for s, c, _ in rows_of(draw(jax.random.fold_in(KEY, i)).support.x)}  # fmt: skip
    assert {s for s, _ in seen} == {"train", "val"}
    assert len(seen) == 9
    for split in ("val", "test"):
        assert {s for s, _, _ in rows_of(getattr(splits, split).sample(KEY).query.x)} == {split}


def test_a_large_file_stays_on_the_host(file):
    streamed = embeddings(file, way=2, shot=1, query=2, memory_budget=0).test
    assert streamed.on_host
    device = embeddings(file, way=2, shot=1, query=2).test
    np.testing.assert_array_equal(streamed.sample(KEY).query.x, device.sample(KEY).query.x)


def test_lengths_other_than_one_are_refused_or_divided_by(file, tmp_path):
    path = raw(tmp_path / "raw")
    with pytest.raises(DataError, match=r"train split are not normalised.*say normalise=True"):
        embeddings(path)
    a, b = (embeddings(p, way=3, shot=2, query=1, normalise=True) for p in (path, file))
    np.testing.assert_allclose(
        a.test.sample(KEY).support.x, b.test.sample(KEY).support.x, 1e-6, 1e-7
    )
    assert a.test.describe()["normalised"] == "in reading"
    assert b.test.describe()["normalised"] == "in the file"


def broken(path, name):
    """Spoil a sound file in one way."""
    x = load_file(path)["val/embeddings"]
    match name:
        case "nan":
            x[3, 1] = np.nan
            rewritten(path, {"val/embeddings": x})
        case "zero":
            x[2] = 0
            rewritten(path, {"val/embeddings": x})
        case "width":
            rewritten(path, {"val/embeddings": x[:, :4].copy()})
        case "missing split":
            rewritten(path, {"val/embeddings": None, "val/labels": None})
        case "missing labels":
            rewritten(path, {"val/labels": None})
        case "missing classes":
            rewritten(path, about={"classes": {"train": list("abcdef")}})
        case "labels":
            rewritten(path, {"val/labels": np.full(21, 3, np.int32)})
        case "label count":
            rewritten(path, {"val/labels": np.zeros(5, np.int32)})
        case "integers":
            rewritten(path, {"val/embeddings": x.astype(np.int32)})
        case "shared class":
            classes = {s: names for s, (_, _, names) in features().items()}
            rewritten(path, about={"classes": {**classes, "val": ["test-1", "b", "c"]}})
        case "format":
            rewritten(path, about={"format": "checkpoint"})
        case "version":
            rewritten(path, about={"version": 2})
        case "class names":
            rewritten(path, about={"classes": dict.fromkeys(COUNTS, "abcdef")})
        case "class twice":
            rewritten(path, about={"classes": dict.fromkeys(COUNTS, ["a"] * 6)})
        case "backbone":
            rewritten(path, about={"backbone": ["conv4"]})
        case "deep":
            save_file(load_file(path), path, {"adaptax": "[" * 10**6})
        case "flipped bit":
            data = bytearray(path.read_bytes())
            data[-9] ^= 1
            path.write_bytes(data)
        case "truncated":
            path.write_bytes(path.read_bytes()[:-100])
        case "cut in the header":
            path.write_bytes(path.read_bytes()[:50])
        case "text":
            path.write_text("no safetensors")
        case "empty":
            path.write_bytes(b"")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nan", "1 of the 21 embeddings of the val split are not finite"),
        ("zero", "1 of the 21 embeddings of the val split are all zero"),
        ("width", r"mixed width \(train 5, val 4, test 5\)"),
        ("missing split", "lack the split val; expected train, val and test"),
        ("missing labels", "lacks 'val/labels' of the val split"),
        ("missing classes", "lacks 'val'"),
        ("labels", "labels are not numbers of its 3 classes"),
        ("label count", r"float32\[21, 5\] and labels int32\[5\]"),
        ("integers", r"embeddings int32\[21, 5\]"),
        ("shared class", r"val and test splits share 1 classes \(test-1\)"),
        ("format", "holds no embeddings"),
        ("version", "version 2 of the format, and this is for 1"),
        ("class names", "classes of the train split are no list of names"),
        ("class twice", "train split has two classes of one name"),
        ("backbone", "its backbone is no text"),
        ("deep", "truncated or not a safetensors file .*recursion"),
        ("flipped bit", "is damaged: what it holds does not agree with its checksum"),
        ("truncated", "truncated or not a safetensors file"),
        ("cut in the header", "truncated or not a safetensors file"),
        ("text", "truncated or not a safetensors file"),
        ("empty", "truncated or not a safetensors file"),
    ],
)
def test_bad_files_are_told_in_a_sentence(tmp_path, name, said):
    path = tmp_path / "e"
    write(path, features(), backbone="conv4", source={})
    embeddings(path, query=1, way=2)
    broken(path, name)
    with pytest.raises(DataError, match=said) as caught:
        embeddings(path, query=1, way=2, normalise=True)
    assert str(path) in str(caught.value) or name == "shared class"


def test_arguments_that_do_not_fit(file, tmp_path):
    for how, said in (
        ({"query": "rest"}, "query='rest'; expected a number, or \"all\""),
        ({"way": 7, "query": 1}, "way=7, but the train split has 6 classes"),
        ({"shot": 0}, "shot=0; expected at least 1"),
    ):
        with pytest.raises(DataError, match=said):
            embeddings(file, **{"way": 2, **how})
    with pytest.raises(FileNotFoundError, match=r"no embeddings at .*nowhere.*`adaptax embed`"):
        embeddings(tmp_path / "nowhere")


def test_what_cannot_be_written(tmp_path):
    path = tmp_path / "e"
    for split, change, said in (
        ("val", lambda x: x[:, :3], r"mixed width \(train 5, val 3, test 5\)"),
        ("test", lambda x: x * np.inf, "28 of the 28 embeddings of the test split are not finite"),
        ("train", lambda x: x * 0, "42 of the 42 embeddings of the train split are all zero"),
    ):
        found = features()
        found[split] = (change(found[split][0]), *found[split][1:])
        with pytest.raises(DataError, match=said), np.errstate(invalid="ignore"):
            write(path, found, backbone="conv4", source={})
    with pytest.raises(DataError, match="lack the split test"):
        write(path, {s: features()[s] for s in ("train", "val")}, backbone="c", source={})
    assert list(tmp_path.iterdir()) == []  # nothing half-written


def test_reading_gives_the_file(file):
    pairs, about = read(file)
    assert list(pairs) == list(COUNTS)
    assert pairs["val"][0].shape == (21, 5)
    assert about["backbone"] == "conv4"

import gzip
import io
import json
import os
import struct
import zipfile

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from adaptax.cli import main
from adaptax.engine.report import Report
from adaptax.recipes import COMPARED, book, comparable
from adaptax.task import Batch
from adaptax.tasks import DataError, FSMol, assays, fsmol

KEY = jax.random.key(6)
ASKED = {"shot": 3, "query": 4, "train_query": 2}
SIZES = {"train": (12, 4, 30), "valid": (9, 15), "test": (8, 20, 11)}


def molecules(sizes=SIZES, bits=64):
    """Assays whose molecules tell their own row by the first 16 bits of the fingerprint."""
    rng = np.random.default_rng(0)
    split = [fold for fold, of in sizes.items() for _ in of]
    counts = [size for of in sizes.values() for size in of]
    n = sum(counts)
    prints = rng.random((n, bits)) < 0.2
    prints[:, :16] = np.unpackbits(np.arange(n, dtype=">u2").view(np.uint8)).reshape(n, 16)
    offsets = np.cumsum([0, *counts])
    activity = (rng.normal(size=n) + np.repeat(rng.normal(6, 1, len(counts)), counts)).astype("f4")
    active = np.concatenate([part > np.median(part) for part in np.split(activity, offsets[1:-1])])
    return {
        "task": np.array([f"CHEMBL{i}" for i in range(len(counts))]),
        "split": np.array(split),
        "offsets": offsets.astype(np.int32),
        "fingerprint_bits": np.packbits(prints, axis=1),
        "log_activity": activity,
        "active": active,
    }


@pytest.fixture
def data(tmp_path):
    (tmp_path / "fsmol").mkdir()
    made = molecules()
    np.savez(tmp_path / "fsmol" / "fsmol.npz", **made)
    return made


def rows_of(x):
    return np.packbits(np.asarray(x)[..., :16].astype(bool), axis=-1) @ np.array([256, 1])


def both(task):
    return jax.tree.map(lambda a, b: np.concatenate([a, b]), task.support, task.query)


def test_tasks_are_molecules_of_one_assay_with_their_activities(data, tmp_path):
    splits = fsmol(**ASKED, standardise="none", orient=False, data_root=tmp_path)
    for tasks, fold in ((splits.train, "train"), (splits.val, "valid"), (splits.test, "test")):
        assert isinstance(tasks, FSMol)
        draw = eqx.filter_jit(lambda tasks, key: tasks.sample(key))
        drawn = set()
        for key in jax.random.split(KEY, 40):
            task = draw(tasks, key)
            assert task.support.x.shape == (3, 64)
            assert task.support.y.shape == (3, 1)
            whole = both(task)
            rows = rows_of(whole.x)
            assert len(set(rows)) == len(rows) == (5 if fold == "train" else 7)
            assert set(np.unique(whole.x)) == {0, 1}
            assert (
                np.packbits(whole.x.astype(bool), axis=1) == data["fingerprint_bits"][rows]
            ).all()
            assert (whole.y[:, 0] == data["log_activity"][rows]).all()
            (assay,) = set(np.searchsorted(data["offsets"], rows, side="right") - 1)
            assert data["split"][assay] == fold
            drawn.add(str(data["task"][assay]))
        assert drawn == set(tasks.names)


def test_small_assays_are_left_out_of_training_alone(data, tmp_path):
    splits = fsmol(**ASKED, data_root=tmp_path)
    assert splits.train.names == ("CHEMBL0", "CHEMBL2")
    assert splits.train.describe()["left_out"] == 1
    assert splits.test.describe()["assays"] == 3
    with pytest.raises(
        DataError, match=r"assay CHEMBL5 of the test split has 8 molecules.*3 \+ 6 were asked"
    ):
        fsmol(shot=3, query=6, train_query=2, data_root=tmp_path)
    with pytest.raises(DataError, match=r"no assay of the train split has .*= 3 \+ 40 molecules"):
        fsmol(shot=3, query=4, train_query=40, data_root=tmp_path)


def test_episodes_go_through_all_assays_once_and_again(data, tmp_path):
    tasks = fsmol(**ASKED, data_root=tmp_path).test
    episode = eqx.filter_jit(tasks.episode)
    keys = jax.random.split(KEY, 7)
    rows = [rows_of(both(episode(key, jnp.uint32(i))).x) for i, key in enumerate(keys)]
    of = [int(np.searchsorted(data["offsets"], r[0], side="right")) - 1 for r in rows]
    assert of == [5, 6, 7, 5, 6, 7, 5]
    assert set(rows[1]) != set(rows[4])
    assert eqx.tree_equal(episode(keys[1], jnp.uint32(1)), tasks.member(1, keys[1]))
    assert tasks.describe()["order"] == "each assay in turn"
    free = fsmol(**ASKED, in_order=False, data_root=tmp_path).test
    assert eqx.tree_equal(free.episode(KEY, 2), free.sample(KEY))
    assert free.describe()["order"] == "at random"
    training = fsmol(**ASKED, data_root=tmp_path).train
    assert eqx.tree_equal(training.episode(KEY, 2), training.sample(KEY))


def test_every_assay_is_sampled_equally_often(data, tmp_path):
    tasks = fsmol(**ASKED, data_root=tmp_path).test
    x = jax.jit(jax.vmap(lambda key: tasks.sample(key).support.x[0]))(jax.random.split(KEY, 3000))
    seen = np.bincount(np.searchsorted(data["offsets"], rows_of(x), side="right") - 1)[5:]
    # Six standard deviations of Binomial(3000, 1/3).
    assert np.abs(seen - 1000).max() < 155


def test_activities_are_standardised_by_the_support_alone(data, tmp_path):
    plain = fsmol(**ASKED, standardise="none", data_root=tmp_path).test
    tasks = fsmol(**ASKED, data_root=tmp_path).test
    for key in jax.random.split(KEY, 5):
        raw, task = plain.sample(key), tasks.sample(key)
        assert np.isclose(task.support.y.mean(), 0, atol=1e-5)
        assert np.isclose(task.support.y.std(), 1, atol=1e-5)
        expected = (raw.query.y - raw.support.y.mean()) / raw.support.y.std()
        assert np.allclose(task.query.y, expected, atol=1e-4)


def test_activities_are_standardised_by_the_assay(data, tmp_path):
    tasks = fsmol(**ASKED, standardise="assay", data_root=tmp_path).test
    ends = np.cumsum(np.asarray(tasks.count))[:-1]
    for part in np.split(np.asarray(tasks.bank[1])[:, 0], ends):
        assert np.isclose(part.mean(), 0, atol=1e-5)
        assert np.isclose(part.std(), 1, atol=1e-5)


@pytest.mark.parametrize("standardise", ["support", "assay"])
def test_activities_without_spread_stay_finite(tmp_path, standardise):
    made = molecules()
    made["log_activity"][:] = 4.6
    np.savez(tmp_path / "data.npz", **made)
    task = fsmol(**ASKED, standardise=standardise, data_root=tmp_path).test.sample(KEY)
    assert np.allclose(both(task).y, 0, atol=1e-4)


def test_assays_are_turned_so_that_more_is_more_active(tmp_path):
    made = molecules()
    made["active"][made["offsets"][5] : made["offsets"][6]] ^= True
    np.savez(tmp_path / "data.npz", **made)
    how = {**ASKED, "standardise": "none", "data_root": tmp_path}
    turned, plain = fsmol(**how).test, fsmol(**how, orient=False).test
    for i, sign in enumerate((-1, 1, 1)):
        a, b = turned.member(i, KEY), plain.member(i, KEY)
        assert jnp.array_equal(a.query.y, sign * b.query.y)
        active = made["active"][rows_of(both(a).x)]
        y = both(a).y[:, 0]
        assert y[active].min() > y[~active].max()


def test_molecules_without_a_number_are_left_out_of_the_regression(tmp_path):
    made = molecules()
    gone = np.arange(made["offsets"][6], made["offsets"][6] + 9)
    made["log_activity"][gone] = np.nan
    np.savez(tmp_path / "data.npz", **made)
    tasks = fsmol(**ASKED, data_root=tmp_path).test
    assert tasks.count.tolist() == [8, 11, 11]
    for key in jax.random.split(KEY, 10):
        task = both(tasks.member(1, key))
        assert np.isfinite(task.y).all()
        assert not set(rows_of(task.x)) & set(gone)
    labelled = fsmol(**ASKED, target="active", data_root=tmp_path).test
    assert labelled.count.tolist() == [8, 20, 11]


def test_labels_are_whether_a_molecule_is_active(data, tmp_path):
    tasks = fsmol(**ASKED, target="active", data_root=tmp_path).test
    task = both(tasks.sample(KEY))
    assert task.y.dtype == np.int32
    assert (task.y == data["active"][rows_of(task.x)]).all()
    assert "standardise" not in tasks.describe()


def test_doubles_when_jax_is_told_so(data, tmp_path, x64):
    task = fsmol(**ASKED, data_root=tmp_path).test.sample(jax.random.key(0))
    assert task.support.x.dtype == task.support.y.dtype == jnp.float64


def write_release(root, made, counts=True):
    """The same assays in FS-Mol's own format."""
    prints = np.unpackbits(made["fingerprint_bits"], axis=1).astype(int)
    if counts:
        prints *= np.random.default_rng(1).integers(1, 5, prints.shape)
    for i, (name, fold) in enumerate(zip(made["task"], made["split"])):
        path = root / fold / f"{name}.jsonl.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        with gzip.open(path, "wt") as file:
            for row in range(made["offsets"][i], made["offsets"][i + 1]):
                value = made["log_activity"][row]
                molecule = {
                    "SMILES": "C",
                    "Assay_ID": str(name),
                    "Property": str(float(made["active"][row])),
                    "LogRegressionProperty": None if np.isnan(value) else str(value),
                    "fingerprints": prints[row].tolist(),
                    "graph": {"adjacency_lists": [[], [], []]},
                }
                file.write(json.dumps(molecule) + "\n")


def test_the_release_and_the_packed_file_agree_and_the_release_is_read_once(tmp_path, monkeypatch):
    made = molecules()
    made["log_activity"][3] = np.nan
    write_release(tmp_path / "fsmol", made)
    np.savez(tmp_path / "packed.npz", **made)
    monkeypatch.setenv("ADAPTAX_CACHE", str(tmp_path / "cache"))
    read = assays.load(tmp_path)
    packed = assays.read_packed(tmp_path / "packed.npz")
    for name in assays.NAMES:
        a, b = getattr(read, name), getattr(packed, name)
        assert np.array_equal(a, b, equal_nan=name == "log_activity"), name
    with monkeypatch.context() as patch:
        patch.setattr(assays, "_read_release", None)
        again = assays.load(tmp_path)
    assert np.array_equal(again.fingerprint_bits, read.fingerprint_bits)
    (kept,) = (tmp_path / "cache").glob("fsmol-*.npz")
    kept.write_bytes(kept.read_bytes()[:-200])
    assert np.array_equal(assays.load(tmp_path).active, read.active)
    assert np.array_equal(assays.read_packed(kept).active, read.active)


def test_the_list_of_the_release_says_which_assays_count(tmp_path, monkeypatch):
    monkeypatch.setenv("ADAPTAX_CACHE", str(tmp_path / "cache"))
    write_release(tmp_path, molecules())
    listed = {"train": ["CHEMBL2", "CHEMBL0"], "valid": ["CHEMBL3"], "test": ["CHEMBL7"]}
    (tmp_path / "fsmol-0.1.json").write_text(json.dumps(listed))
    assert assays.load(tmp_path).task.tolist() == ["CHEMBL0", "CHEMBL2", "CHEMBL3", "CHEMBL7"]
    (tmp_path / "fsmol-0.1.json").write_text('{"train": []')
    with pytest.raises(DataError, match=r"fsmol-0.1.json is not the list of FS-Mol's assays"):
        assays.load(tmp_path)


def line(active, bit=1):
    return f'{{"fingerprints": [0, {bit}], "Property": {active}, "LogRegressionProperty": 1}}'


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "JSONDecodeError"),
        ('{"fingerprints": [0, 1]}', "KeyError: 'LogRegressionProperty'"),
        (
            '{"fingerprints": [0, "x"], "Property": 1, "LogRegressionProperty": 1}',
            "ValueError",
        ),
        ("[]", "TypeError"),
        ("", "ValueError|AxisError"),
        pytest.param("[" * 10**6, "RecursionError", id="lists in lists"),
        pytest.param('{"a":' * 10**6, "RecursionError", id="objects in objects"),
        pytest.param(line(10**400), "OverflowError", id="a huge number"),
        (line("null"), "lacks its Property"),
        (line(1, "null"), "lacks its Property or a part"),
        pytest.param(line(1, f'"{"x" * 10**6}"'), "ValueError", id="a long text"),
    ],
)
def test_broken_lines_of_the_release(tmp_path, line, message):
    write_release(tmp_path, molecules())
    path = tmp_path / "valid" / "CHEMBL3.jsonl.gz"
    with gzip.open(path, "wt") as file:
        file.write(line)
    with pytest.raises(DataError, match=rf"CHEMBL3.jsonl.gz cannot be read .*({message})"):
        assays.load(tmp_path)
    (tmp_path / "fsmol-0.1.json").write_text("[" * 10**6)
    with pytest.raises(DataError, match=r"fsmol-0.1.json is not the list of FS-Mol's assays"):
        assays.load(tmp_path)


def test_a_file_of_the_release_that_unpacks_to_more_than_it_may(tmp_path, monkeypatch):
    write_release(tmp_path, molecules())
    monkeypatch.setattr(assays, "MAX_BYTES", 1000)
    with pytest.raises(DataError, match="unpacks to more than 1000 bytes"):
        assays.load(tmp_path)


def test_broken_files_of_the_release(tmp_path):
    write_release(tmp_path, molecules())
    path = tmp_path / "test" / "CHEMBL5.jsonl.gz"
    whole = path.read_bytes()
    for broken in (whole[:-30], b"no gzip", whole[:40] + b"xx" + whole[42:]):
        path.write_bytes(broken)
        with pytest.raises(DataError, match=r"CHEMBL5.jsonl.gz cannot be read as an assay"):
            assays.load(tmp_path)
    path.unlink()
    narrow = {**molecules(), "fingerprint_bits": molecules()["fingerprint_bits"][:, :4]}
    write_release(tmp_path / "narrow", narrow)
    (tmp_path / "narrow" / "test" / "CHEMBL5.jsonl.gz").rename(path)
    with pytest.raises(DataError, match="fingerprints have 32 and 64 bits"):
        assays.load(tmp_path)


def broken(**changes):
    return {**molecules(), **changes}


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (broken(offsets=np.array([0, 5, 9])), "the arrays do not fit one another"),
        (broken(offsets=molecules()["offsets"][::-1]), "do not fit one another"),
        (broken(active=np.zeros(3, bool)), "do not fit one another"),
        (broken(fingerprint_bits=molecules()["fingerprint_bits"][:-1]), "do not fit"),
        (broken(fingerprint_bits=np.zeros((109, 8))), "cannot be read as assays|do not fit"),
        (broken(split=np.array(8 * ["train"])), "has the splits train; expected train, valid"),
        (broken(task=np.array(8 * ["CHEMBL1"])), r"share 1 classes \(CHEMBL1\)"),
        (broken(task=np.array(8 * [{}], object)), "cannot be read as assays .*pickle"),
        ({"task": np.zeros(3)}, "cannot be read as assays"),
    ],
)
def test_broken_packed_files(tmp_path, arrays, message):
    np.savez(tmp_path / "data.npz", **arrays)
    with pytest.raises(DataError, match=message) as caught:
        fsmol(**ASKED, data_root=tmp_path)
    assert "\n" not in str(caught.value)


def member(path, name, data):
    """The packed file with other bytes for one of its arrays."""
    whole = path.read_bytes()
    with zipfile.ZipFile(io.BytesIO(whole)) as old, zipfile.ZipFile(path, "w") as new:
        for info in old.infolist():
            new.writestr(info.filename, data if info.filename == name else old.read(info))


def header(text):
    body = text.encode().ljust(118) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(body)) + body


def declares(shape, descr="|u1"):
    return header(f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}}}")


@pytest.mark.parametrize(
    "data",
    [
        declares((2**40, 256)),  # more than there is memory
        declares((2**31, 2**31, 2**31)),
        declares((-1, -64)) + bytes(64),
        declares((3,)) + bytes(2),
        declares((3,)) + bytes(9),
        declares((1,), "|O") + b"cos\nsystem\n.",
        declares((1,), "|V1") + bytes(1),
        declares((4,), "<f4") + bytes(16),
        header("(" * 110),
        header("{}"),
        b"\x93NUMPY\x09\x00" + bytes(200),
        b"no array",
        b"",
    ],
)
def test_arrays_that_do_not_fill_what_they_declare(data, tmp_path):
    path = tmp_path / "fsmol.npz"
    np.savez(path, **molecules())
    member(path, "fingerprint_bits.npy", data)
    with pytest.raises(DataError, match="cannot be read as assays") as caught:
        assays.read_packed(path)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize(
    ("at", "value", "said"),
    [(8, 1, "encrypted"), (10, 99, "compression|NotImplemented"), (6, 99, "version|Bad|NotImpl")],
)
def test_archives_that_cannot_be_unpacked(at, value, said, tmp_path):
    """Flags, compression and version of every member, in the directory and before its data."""
    path = tmp_path / "fsmol.npz"
    np.savez(path, **molecules())
    data = bytearray(path.read_bytes())
    for mark, shift in ((b"PK\x01\x02", 0), (b"PK\x03\x04", -2)):
        start = data.find(mark)
        while start >= 0:
            data[start + at + shift] = value
            start = data.find(mark, start + 4)
    path.write_bytes(data)
    with pytest.raises(DataError, match=f"cannot be read as assays .*({said})"):
        assays.read_packed(path)


def test_a_flipped_bit_is_found(data, tmp_path):
    path = tmp_path / "fsmol" / "fsmol.npz"
    whole = bytearray(path.read_bytes())
    at = whole.find(data["log_activity"].tobytes()) + 40
    assert at >= 40
    whole[at] ^= 1
    path.write_bytes(whole)
    with pytest.raises(DataError, match=r"cannot be read as assays .*CRC"):
        fsmol(**ASKED, data_root=tmp_path)


def test_two_assays_of_one_name(tmp_path):
    names = molecules()["task"]
    names[1] = names[0]
    np.savez(tmp_path / "data.npz", **broken(task=names))
    with pytest.raises(DataError, match="has two assays of one name"):
        fsmol(**ASKED, data_root=tmp_path)


def test_a_truncated_packed_file(data, tmp_path):
    path = tmp_path / "fsmol" / "fsmol.npz"
    for broken in (path.read_bytes()[:-100], path.read_bytes()[:50], b""):
        path.write_bytes(broken)
        with pytest.raises(DataError, match="cannot be read as assays"):
            fsmol(**ASKED, data_root=tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shot": 0}, "shot=0"),
        ({"query": -1}, "query=-1"),
        ({"target": "logp"}, "target='logp'; expected one of activity, active"),
        ({"standardise": "z"}, "standardise='z'; expected one of support, assay, none"),
    ],
)
def test_errors(data, tmp_path, arguments, message):
    with pytest.raises(DataError, match=message):
        fsmol(**{**ASKED, **arguments}, data_root=tmp_path)


def test_nothing_there(tmp_path):
    for fold in SIZES:
        (tmp_path / "empty" / fold).mkdir(parents=True)
    with pytest.raises(DataError, match=r"FS-Mol's folders hold no .jsonl.gz files"):
        fsmol(data_root=tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match=r"no FS-Mol under .* fetch https://figshare"):
        fsmol(data_root=tmp_path)


def test_learners_are_compared_with_ridge_assay_by_assay(data, tmp_path, capsys, monkeypatch):
    tiny = {
        "task": {"query": 4, "train_query": 2},
        "network": {"mlp": [4], "in_size": 64},
        "steps": 2,
        "meta_batch": 1,
        "evaluation": {"episodes": 3},
        "tune_noise": [1.0],
    }
    monkeypatch.setitem(book.BOOK["family"]["fsmol"], "short", tiny)
    monkeypatch.setenv("XLA_FLAGS", os.environ.get("XLA_FLAGS", ""))
    words = ["compare", "fsmol", "--algorithms", "maml", "ridge", "--shot", "3", "--steps", "2",
             "--data-root", str(tmp_path), "--out", str(tmp_path / "out")]  # fmt: skip
    assert main(words) == 0
    assert "minus" in capsys.readouterr().out
    maml, ridge = json.loads((tmp_path / "out" / "comparison.json").read_text())["rows"]
    assert ridge["r2_minus_ridge"] == {"mean": 0, "ci95": 0}
    of = [row["scores"]["curve"][-1]["r2"] for row in (maml, ridge)]
    assert maml["r2_minus_ridge"]["mean"] == pytest.approx(of[0] - of[1], abs=1e-6)
    assert maml["r2_minus_ridge"]["ci95"] > 0


@pytest.mark.parametrize("algorithm", COMPARED["fsmol"])
def test_all_that_are_compared_learn_by_one_loss_and_are_chosen_by_r2(algorithm):
    experiment = comparable(algorithm, "fsmol")
    assert experiment.learner["loss"] == "relative_mse"
    assert experiment.evaluation == {"episodes": 157, "select": "r2"}
    task = Batch(jnp.zeros((2, 3)), jnp.array([[30.0], [-40.0]]))
    assert np.isclose(experiment.build_learner().loss(lambda x: 0 * x[:, :1], task), 1)


def test_the_interval_of_a_difference_is_of_pairs():
    easy = np.random.default_rng(0).normal(size=(50, 1))

    def report(r2):
        return Report({}, [None], {"r2": r2, "mse": r2}, None)

    a, b = report(easy + 0.25), report(easy)
    assert a.difference(b, "r2") == (pytest.approx(0.25), pytest.approx(0, abs=1e-12))
    assert a.ci95("r2") > 0.2
    noisy = easy + np.random.default_rng(1).normal(size=(50, 1))
    mean, half = report(noisy).difference(b, "r2")
    assert 1.96 * mean / half == pytest.approx(stats.ttest_rel(noisy, easy).statistic[0])
    mean, half = report(easy[:1]).difference(report(easy[:1]), "r2")
    assert mean == 0
    assert np.isnan(half)


def test_real_assays(real_data):
    if not (real_data / "fsmol").is_dir():
        pytest.skip(f"no FS-Mol at {real_data / 'fsmol'}")
    splits = fsmol(data_root=real_data)
    tasks = splits.test
    assert len(tasks.names) == 157
    assert not set(tasks.names) & (set(splits.train.names) | set(splits.val.names))
    data = assays.load(real_data)
    assert set(tasks.names) == set(data.task[data.split == "test"].tolist())
    task = eqx.filter_jit(tasks.episode)(KEY, jnp.uint32(156))
    assert task.support.x.shape == (16, 2048)
    assert task.query.y.shape == (64, 1)
    assert 10 < float(task.query.x.sum(1).mean()) < 150
    every = eqx.filter_vmap(tasks.episode)(jax.random.split(KEY, 157), jnp.arange(157))
    y = np.asarray(every.support.y)
    assert np.allclose(y.mean(1), 0, atol=1e-4)
    assert np.median(y.std(1)) == pytest.approx(1, abs=1e-4)
    labels = fsmol(data_root=real_data, target="active").test
    assert 0.3 < float(labels.bank[1].mean()) < 0.6

"""The reader of pickles that can build data and nothing else."""

import importlib
import os
import pickle
import struct
import sys
import time
import zipfile

import numpy as np
import pytest

from adaptax.tasks import DataError, embedding_archive
from adaptax.tasks.embedding_archive import read_archive, read_pickle

RNG = np.random.default_rng(0)


def content(classes=3, each=4, width=5, seed=0):
    """As the released files: keys `number-class-file`, padded to one length."""
    names = [f"n0{c}" for c in range(classes) for _ in range(each)]
    keys = [f"{i}-{name}-{name}_{i}.JPEG" for i, name in enumerate(names)]
    x = np.random.default_rng(seed).normal(size=(len(names), width)).astype(np.float32)
    return {"embeddings": x, "labels": np.repeat(np.arange(classes), each),
            "keys": np.array(keys, "S")}  # fmt: skip


def write(folder, protocol=2, view="miniImageNet/center", **contents):
    where = folder / "embeddings" / view
    where.mkdir(parents=True, exist_ok=True)
    for split in ("train", "val", "test"):
        held = contents.get(split, content(seed=len(split)))
        (where / f"{split}_embeddings.pkl").write_bytes(
            held if isinstance(held, bytes) else pickle.dumps(held, protocol)
        )
    return folder


@pytest.mark.parametrize("protocol", range(5))
def test_reads_what_pickle_writes(protocol):
    value = {
        "a": [1, -1, 255, 65536, 2**40, -(2**70), True, False, None, 1.5, -0.0],
        "text": ("", "x", "\u1234\n'\"", b"", b"\x00\xff\n", (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)),
        5: {"f4": np.arange(6, dtype="f4").reshape(2, 3), "big": np.arange(3, dtype=">i8"),
            "fortran": np.asfortranarray(RNG.normal(size=(2, 3))), "text": np.array(["ab", "c"]),
            "bytes": np.array([b"a", b"bcd"]), "bool": np.array([True, False]),
            "objects": np.array([["a", 1.5], [None, b"x"]], object), "scalar": np.float64(2.5),
            "empty": np.zeros((0, 3)), "none": []},
    }  # fmt: skip
    found = read_pickle(pickle.dumps(value, protocol), "here")
    assert found["a"] == value["a"]
    assert [type(x) for x in found["a"]] == [type(x) for x in value["a"]]
    assert found["text"] == value["text"]
    for name, expected in value[5].items():
        np.testing.assert_array_equal(found[5][name], expected)
        kind = np.asarray(expected).dtype.newbyteorder("=")
        assert np.asarray(found[5][name]).dtype == kind, name


def test_reads_what_python_2_writes():
    """Byte strings, where Python 3 has text: the raw data of arrays, names and keys of dicts."""
    raw = np.arange(4, dtype="<f4").tobytes()
    two = (
        b"\x80\x02}q\x00U\x01xq\x01cnumpy.core.multiarray\n_reconstruct\nq\x02cnumpy\nndarray\nq\x03"
        b"K\x00\x85q\x04U\x01bq\x05\x87q\x06Rq\x07(K\x01K\x02K\x02\x86q\x08cnumpy\ndtype\nq\x09"
        b"U\x02f4q\nK\x00K\x01\x87q\x0bRq\x0c(K\x03U\x01<q\rNNNJ\xff\xff\xff\xffJ\xff\xff\xff\xff"
        b"K\x00tq\x0eb\x89U\x10" + raw + b"q\x0ftq\x10bs."
    )
    zero = (
        b"(dp0\nS'x'\np1\ncnumpy.core.multiarray\n_reconstruct\np2\n(cnumpy\nndarray\np3\n(I0\ntp4\n"
        b"S'b'\np5\ntp6\nRp7\n(I1\n(I2\nI2\ntp8\ncnumpy\ndtype\np9\n(S'f4'\np10\nI0\nI1\ntp11\nRp12\n"
        b"(I3\nS'<'\np13\nNNNI-1\nI-1\nI0\ntp14\nbI00\nS"
        + repr(raw).encode()[1:] + b"\np15\ntp16\nbs."
    )  # fmt: skip
    for data in (two, zero):
        assert pickle.loads(data, encoding="latin1")["x"].shape == (2, 2)  # the pickles are sound
        found = read_pickle(data, "here")["x"]
        np.testing.assert_array_equal(found, [[0, 1], [2, 3]])
        assert found.dtype == np.float32


class Call:
    def __init__(self, function, *arguments):
        self.reduced = (function, arguments)

    def __reduce__(self):
        return self.reduced


HOSTILE = {
    "os.system": (lambda mark: Call(os.system, f"touch {mark}"), "system"),
    "eval": (lambda mark: Call(eval, f"open({str(mark)!r}, 'w')"), "eval"),
    "open": (lambda mark: Call(open, str(mark), "w"), "open"),
    "getattr": (lambda mark: Call(getattr, Call(__import__, "os"), "system"), "getattr|__import__"),
    "numpy.save": (lambda mark: Call(np.save, str(mark), [1]), "save"),
    "numpy.load": (lambda mark: Call(np.load, str(mark), None, True), "load"),
    "numpy.memmap": (lambda mark: Call(np.memmap, str(mark), "u1", "w+", 0, (9,)), "memmap"),
    "numpy.ndarray": (lambda mark: Call(np.ndarray, (2**40,)), "ndarray"),
    "numpy.fromfile": (lambda mark: Call(np.fromfile, "/etc/hostname"), "fromfile"),
    "object": (lambda mark: Exception("state"), "Exception"),
}


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("name", HOSTILE)
def test_pickles_that_ask_for_more_are_refused(name, protocol, tmp_path):
    make, said = HOSTILE[name]
    data = pickle.dumps({"embeddings": [make(tmp_path / "mark")]}, protocol)
    with pytest.raises(DataError, match=f"refused: it asks for .*({said})"):
        read_pickle(data, "here")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "data",
    [
        b"cos\nsystem\n(S'true'\ntR.",
        b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x04true\x85R.",
        b"cnumpy\ncore.multiarray._reconstruct\n.",  # a dotted name reaches into attributes
        b"\x80\x04\x8c\x05numpy\x8c\x08f2py.sys\x93.",
        b"(S'true'\nios\nsystem\n.",  # instances, persistent objects, extensions, __new__
        b"(cnumpy\nndarray\n(K\x01to.",
        b"Pid\n.",
        b"\x82\x01.",
        b"cnumpy\nndarray\n)\x81.",
        b"cnumpy\nndarray\n(I9\ntR.",
        b"}}S'__class__'\ncnumpy\nndarray\nsb.",
        b"cnumpy\nndarray\n}b.",
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\ndtype\nb.",
    ],
)  # fmt: skip
def test_every_door_is_shut(data, monkeypatch):
    def opened(*args, **kwargs):
        raise AssertionError(args)

    for module, name in ((os, "system"), (importlib, "import_module"), (pickle, "loads")):
        monkeypatch.setattr(module, name, opened)
    before = set(sys.modules)
    with pytest.raises(DataError, match="refused: it asks for"):
        read_pickle(data, "here")
    assert set(sys.modules) == before


def array_pickle(dtype=b"f4", shape=b"K\x02\x85", raw=b"\0" * 8, kind=b"cnumpy\nndarray\n"):
    return (b"\x80\x02cnumpy.core.multiarray\n_reconstruct\n" + kind + b"K\x00\x85U\x01b\x87R(K\x01"
            + shape + b"cnumpy\ndtype\nU" + struct.pack("B", len(dtype)) + dtype
            + b"K\x00K\x01\x87R\x89U" + struct.pack("B", len(raw)) + raw + b"tb.")  # fmt: skip


def test_arrays_that_lie_are_broken_files():
    assert read_pickle(array_pickle(), "here").shape == (2,)
    bomb = b"".join(b"\x86q" + bytes([i]) + b"h" + bytes([i]) for i in range(1, 250))
    for data in (
        array_pickle(shape=b"K\x03\x85"),
        array_pickle(shape=b"J\xff\xff\xff\xff\x85"),
        array_pickle(shape=b"\x8a\x06\xff\xff\xff\xff\xff\x7f\x85"),  # 2^47 numbers
        array_pickle(dtype=b"V8", shape=b"K\x01\x85"),
        array_pickle(dtype=b"S0"),
        array_pickle(dtype=b"O"),
        array_pickle(kind=b"cnumpy\ndtype\n"),
        b"", b".", b"\x80\x02", b"]", b"]]e.", b"h\x05.", b"Ix\n.", b"U\xffab.", b"S'a\n.",
        b"K\x01K\x02.", b"(K\x01d.", b"}(]K\x01u.", b"T\xff\xff\xff\xffab.",
        b"}K\x01K\x01h\x00" + bomb + b"K\x01s.",
        b"(" * 5000 + b"t" * 5000 + b".",
    ):  # fmt: skip
        with pytest.raises(DataError, match="here is truncated or no pickle of arrays"):
            read_pickle(data, "here")


def endless(steps):
    """A tuple of itself twice, and again: 2^steps leaves in a few bytes a step."""
    return b"K\x01" + b"".join(b"q%ch%c\x86" % (i, i) for i in range(steps))


@pytest.mark.parametrize(
    "data",
    [
        # Time, memory or text that double with every step.
        b"\x80\x02" + endless(40) + b".",
        b"\x80\x02}" + endless(40) + b"K\x01s.",
        b"\x80\x02}U\x0aembeddings" + endless(18) + b"s.",
        b"\x80\x02](" + endless(40) + b"e.",
        b"\x80\x02cnumpy\ndtype\n" + endless(40) + b"\x85R.",
        b"\x80\x02cnumpy.core.multiarray\n_reconstruct\n" + endless(30) + b"\x85R.",
        # Tuples too deep for the stack of C.
        b"\x80\x02}K\x01" + b"\x85" * 10**6 + b"K\x01s.",
        b"(" * 5000 + b"t" * 5000 + b".",
        # A place of the memory that does not follow, for which all places before it are made.
        b"\x80\x02K\x01r\xff\xff\xff\x7f.",
        b"K\x01p99999999999\n.",
        # Lengths beyond the file, numbers beyond sense.
        b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7fabc.",
        b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7fK\x01.",
        b"L" + b"9" * 10**6 + b"L\n.",
        b"c" + b"o" * 10**6 + b"\nsystem\n.",
        # Keys of a dict whose hashes agree: quadratic time.
        b"\x80\x02}(" + b"".join(
            b"\x8a\x0a" + (i * (2**61 - 1)).to_bytes(10, "little") + b"N" for i in range(20_000)
        ) + b"u.",
        b"(" + b"]" * 10**5,
        # Broken stacks.
        b"\x80\x02(K\x01\x86.", b"0.", b"e.", b"t.", b"R.", b"b.", b"K\x01a.", b"(((.", b"h\x00.",
    ],
    ids=lambda data: f"{len(data)} bytes",
)  # fmt: skip
def test_what_small_files_ask_too_much_for(data):
    began = time.perf_counter()
    with pytest.raises(DataError, match=r"here is (truncated or no|refused)") as caught:
        read_pickle(data, "here")
    assert len(str(caught.value)) < 400
    assert time.perf_counter() - began < 20


def test_lists_that_hold_themselves_are_not_gone_through(tmp_path):
    inner = [1.0]
    for _ in range(40):
        inner = [inner, inner]
    for name in ("embeddings", "labels", "keys"):
        held = {**content(), name: [inner] * 12}
        with pytest.raises(DataError, match=f"{name} are .*list") as caught:
            read_archive(write(tmp_path, train=held))
        assert len(str(caught.value)) < 400


def test_a_large_file_is_read_in_seconds():
    """As many keys as tieredImageNet has classes' images, in proportion."""
    held = {**content(classes=400, each=50, width=64)}
    held["keys"] = [key.decode() for key in held["keys"].tolist()]
    began = time.perf_counter()
    found = read_pickle(pickle.dumps(held, 2), "here")
    assert time.perf_counter() - began < 20
    assert len(found["keys"]) == 20_000


def test_every_truncation_is_told():
    data = pickle.dumps(content(), 2)
    for end in range(0, len(data), 7):
        with pytest.raises(DataError, match="here is truncated"):
            read_pickle(data[:end], "here")


@pytest.mark.parametrize("name", ["embeddings", "labels", "keys"])
@pytest.mark.parametrize(
    "value",
    [
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R",  # no state
        b"cnumpy\ndtype\nU\x02f4K\x00K\x01\x87R",
        b"](cnumpy\ndtype\ncnumpy\ndtype\ne",
    ],
)
def test_parts_of_arrays_are_no_data(value, name, tmp_path):
    held = content()
    del held[name]
    data = pickle.dumps(held, 2)[:-1] + b"U" + bytes([len(name)]) + name.encode() + value + b"s."
    with pytest.raises(DataError, match=r"train_embeddings\.pkl"):
        read_archive(write(tmp_path, train=data))


@pytest.mark.parametrize("zipped", [False, True])
def test_an_archive_is_read(tmp_path, zipped):
    write(tmp_path, train=content(classes=4), val=content(seed=3))
    path = tmp_path
    if zipped:
        path = tmp_path / "embeddings.zip"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as out:
            for file in sorted((tmp_path / "embeddings").rglob("*.pkl")):
                out.write(file, file.relative_to(tmp_path))
    found = read_archive(path)
    assert list(found) == ["train", "val", "test"]
    x, labels, names = found["train"]
    np.testing.assert_array_equal(x, content(classes=4)["embeddings"])
    np.testing.assert_array_equal(labels, np.repeat(np.arange(4), 4))
    assert names == ["n00", "n01", "n02", "n03"]


def test_labels_name_the_class_where_keys_do_not(tmp_path):
    held = {**content(), "keys": [f"image {i}" for i in range(12)]}
    held["embeddings"] = list(held["embeddings"])
    _, labels, names = read_archive(write(tmp_path, train=held))["train"]
    assert names == ["0", "1", "2"]
    np.testing.assert_array_equal(labels, np.repeat(np.arange(3), 4))


def test_bad_archives(tmp_path):
    mixed = {**content(), "embeddings": [np.ones(3), np.ones(4)] * 6}
    for held, said in (
        (pickle.dumps(content(), 2)[:-50], "train_embeddings.pkl is truncated"),
        (pickle.dumps(Call(os.system, "true"), 2), "is refused: it asks for .*system"),
        ([1, 2], "holds list; expected a dict of embeddings, labels and keys"),
        ({"embeddings": 1}, r"holds \['embeddings'\]; expected a dict"),
        ({**content(), "keys": 5}, "not all lists or arrays"),
        (mixed, r"rows of f\[3\], f\[4\]; expected floats of one width"),
        ({**content(), "labels": [1]}, "12 embeddings, 1 labels and 12 keys"),
    ):
        write(tmp_path, train=held)
        with pytest.raises(DataError, match=said):
            read_archive(tmp_path)
    write(tmp_path)
    with pytest.raises(DataError, match="holds 0 files tieredImageNet/center/train_embed"):
        read_archive(tmp_path, "tieredImageNet/center")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_archive(tmp_path / "nowhere.zip")


def test_archives_with_unsafe_names_or_sizes(tmp_path, monkeypatch):
    for name in ("../train_embeddings.pkl", "/abs.pkl", "C:/x.pkl", "a/../../b.pkl"):
        with zipfile.ZipFile(tmp_path / "bad.zip", "w") as out:
            out.writestr(name, b"")
        with pytest.raises(DataError, match="unsafe member name"):
            read_archive(tmp_path / "bad.zip")
    with zipfile.ZipFile(tmp_path / "large.zip", "w", zipfile.ZIP_DEFLATED) as out:
        out.writestr("miniImageNet/center/train_embeddings.pkl", bytes(10_000))
    monkeypatch.setattr(embedding_archive, "MAX_BYTES", 9_999)
    with pytest.raises(DataError, match="unpacks to 10000 bytes, more than the 9999"):
        read_archive(tmp_path / "large.zip")

import os
import zipfile
import zlib

import numpy as np
import pytest

from adaptax.tasks import sources
from adaptax.tasks.cache import cache_root, cached
from adaptax.tasks.sources import DataError, data_root, open_files


def archive(path, members):
    with zipfile.ZipFile(path, "w") as out:
        for name, data in members.items():
            out.writestr(name, data)
    return path


def test_the_root_is_the_argument_else_the_environment_else_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ADAPTAX_DATA", str(tmp_path))
    (tmp_path / "other").mkdir()
    assert data_root() == tmp_path
    assert data_root(tmp_path / "other") == tmp_path / "other"
    monkeypatch.delenv("ADAPTAX_DATA")
    assert data_root().name == "data"


def test_a_root_that_does_not_exist(tmp_path, monkeypatch):
    with pytest.raises(
        FileNotFoundError, match=r"data_root names .*nowhere, which is not a folder"
    ):
        data_root(tmp_path / "nowhere")
    monkeypatch.setenv("ADAPTAX_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match="variable ADAPTAX_DATA names"):
        data_root()


def test_folder_and_archive_read_alike(tmp_path):
    (tmp_path / "in" / "b").mkdir(parents=True)
    (tmp_path / "in" / "b" / "x").write_bytes(b"one")
    (tmp_path / "in" / "a").write_bytes(b"two")
    packed = archive(tmp_path / "in.zip", {"b/x": b"one", "a": b"two", "__MACOSX/a": b"junk"})
    with open_files(tmp_path / "in") as folder, open_files(packed) as zipped:
        assert folder.names == zipped.names == ("a", "b/x")
        assert folder.read("b/x") == zipped.read("b/x") == b"one"


def test_fingerprints_follow_content(tmp_path):
    def print_of(path):
        with open_files(path) as files:
            return files.fingerprint

    one = archive(tmp_path / "1.zip", {"a": b"one"})
    again = archive(tmp_path / "2.zip", {"a": b"one"})
    other = archive(tmp_path / "3.zip", {"a": b"two"})
    assert print_of(one) == print_of(again) != print_of(other)
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "a").write_bytes(b"one")
    before = print_of(tmp_path / "d")
    os.utime(tmp_path / "d" / "a", ns=(1, 1))
    assert print_of(tmp_path / "d") != before


@pytest.mark.parametrize("name", ["../a", "/etc/a", "a/../../b", "..\\a", "C:/a"])
def test_members_that_would_escape_are_refused(tmp_path, name):
    with (
        pytest.raises(DataError, match="unsafe member name"),
        open_files(archive(tmp_path / "evil.zip", {name: b""})),
    ):
        pass


def test_members_that_unpack_too_far_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "MAX_MEMBER", 10)
    bomb = archive(tmp_path / "bomb.zip", {"a": bytes(11)})
    message = "a unpacks to 11 bytes, more than the 10"
    with open_files(bomb) as files, pytest.raises(DataError, match=message):
        files.read("a")


def test_broken_archives(tmp_path):
    (tmp_path / "junk.zip").write_bytes(b"not a zip")
    with (
        pytest.raises(DataError, match="not a readable zip archive"),
        open_files(tmp_path / "junk.zip"),
    ):
        pass
    with (
        pytest.raises(FileNotFoundError, match="does not exist"),
        open_files(tmp_path / "none.zip"),
    ):
        pass


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_broken_member(tmp_path, method):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w", method) as out:
        out.writestr("a", b"hello hello hello hello hello")
    raw = bytearray(path.read_bytes())
    raw[31:36] = b"\xff\xff\xff\xff\xff"
    path.write_bytes(bytes(raw))
    with open_files(path) as files, pytest.raises(DataError, match="a cannot be unpacked"):
        files.read("a")


class Fill:
    def __init__(self):
        self.calls = 0

    def __call__(self, out):
        self.calls += 1
        out[:] = np.arange(out.size).reshape(out.shape)


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ADAPTAX_CACHE", str(tmp_path / "c"))
    return tmp_path / "c"


def test_filled_once_and_mapped(own_cache):
    fill = Fill()
    first, second = (cached("x", ["key"], (4, 3), fill) for _ in range(2))
    assert fill.calls == 1
    assert isinstance(second, np.memmap)
    assert np.array_equal(first, np.arange(12).reshape(4, 3))
    cached("x", ["other"], (4, 3), fill)
    assert fill.calls == 2
    assert sorted({p.suffix for p in own_cache.iterdir()}) == [".crc", ".npy"]
    assert cache_root() == own_cache


def flip(path):
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(bytes(raw))


@pytest.mark.parametrize(
    "damage",
    [
        lambda p: p.write_bytes(b""),
        lambda p: p.write_bytes(p.read_bytes()[:-3]),
        lambda p: p.write_bytes(b"garbage" * 50),
        flip,
        lambda p: np.save(p, np.zeros(5)),
        lambda p: np.save(p, np.array([{}], dtype=object)),
        lambda p: p.with_suffix(".crc").unlink(),
        lambda p: p.with_suffix(".crc").write_text("?"),
    ],
)
def test_a_broken_cache_file_is_built_again(own_cache, damage):
    fill = Fill()
    cached("x", [], (4, 3), fill)
    (path,) = own_cache.glob("*.npy")
    damage(path)
    assert np.array_equal(cached("x", [], (4, 3), fill), np.arange(12).reshape(4, 3))
    assert fill.calls == 2


def test_a_failed_fill_leaves_nothing(own_cache):
    def fail(out):
        raise DataError("broken image")

    with pytest.raises(DataError, match="broken image"):
        cached("x", [], (4, 3), fail)
    assert list(own_cache.iterdir()) == []


def test_without_a_place_to_write_there_is_a_warning(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ADAPTAX_CACHE", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="not cached"):
        images = cached("x", [], (4, 3), Fill())
    assert zlib.crc32(images.data) == zlib.crc32(bytes(range(12)))

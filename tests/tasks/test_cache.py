import os
import subprocess
import sys
import time
import zlib

import numpy as np
import pytest

from adaptax.tasks import cache
from adaptax.tasks.cache import cache_root, cached
from adaptax.tasks.files import DataError


class Fill:
    def __init__(self):
        self.calls = 0

    def __call__(self, out):
        self.calls += 1
        out[:] = np.arange(out.size).reshape(out.shape)
        return 7


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ADAPTAX_CACHE", str(tmp_path / "c"))
    return tmp_path / "c"


WHOLE = np.arange(12, dtype=np.uint8).reshape(4, 3)


def test_filled_once_and_mapped(own_cache):
    fill = Fill()
    first, second = (cached("x", ["key"], (4, 3), fill) for _ in range(2))
    assert fill.calls == 1
    assert isinstance(second.images, np.memmap)
    for found in (first, second):
        assert np.array_equal(found.images, WHOLE)
        assert found.checksums.tolist() == [zlib.crc32(row) for row in WHOLE]
        assert found.noted == 7
    cached("x", ["other"], (4, 3), fill)
    assert fill.calls == 2
    assert sorted(p.suffix for p in own_cache.iterdir()) == [".npy", ".npy", ".npz", ".npz"]
    assert cache_root() == own_cache


def test_files_follow_the_umask(own_cache):
    before = os.umask(0o027)
    try:
        cached("x", [], (4, 3), Fill())
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in own_cache.glob("*.npy")} == {0o640}


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
        lambda p: p.with_suffix(".npz").unlink(),
        lambda p: p.with_suffix(".npz").write_text("?"),
        lambda p: np.savez(p.with_suffix(".npz"), checksums=np.zeros(4, np.uint32), noted=7),
    ],
)
def test_a_broken_cache_file_is_built_again(own_cache, damage):
    fill = Fill()
    cached("x", [], (4, 3), fill)
    (path,) = own_cache.glob("*.npy")
    damage(path)
    assert np.array_equal(cached("x", [], (4, 3), fill).images, WHOLE)
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
    with pytest.warns(
        UserWarning, match="not cached in .*; free some room there or set ADAPTAX_CA"
    ):
        found = cached("x", [], (4, 3), Fill())
    assert np.array_equal(found.images, WHOLE)


def full(*args):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("where", ["posix_fallocate", "replace"])
def test_a_full_disk_is_a_warning_and_leaves_nothing(own_cache, monkeypatch, where):
    monkeypatch.setattr(os, where, full)
    with pytest.warns(UserWarning, match=r"not cached in .* \(No space left on device\)"):
        found = cached("x", [], (4, 3), Fill())
    assert np.array_equal(found.images, WHOLE)
    assert found.checksums.tolist() == [zlib.crc32(row) for row in WHOLE]
    assert not list(own_cache.glob("*.npy"))
    assert not list(own_cache.glob("*.tmp"))


def test_without_room_in_memory_either(own_cache, monkeypatch):
    monkeypatch.setattr(os, "posix_fallocate", full)
    monkeypatch.setattr(np, "empty", lambda *a: (_ for _ in ()).throw(MemoryError()))
    with (
        pytest.warns(UserWarning, match="not cached"),
        pytest.raises(DataError, match=r"4 images of 9 x 9 x 3 take 972 bytes, for which neither"),
    ):
        cached("x", [], (4, 9, 9, 3), Fill())


def test_file_systems_that_reserve_nothing_are_written_to(own_cache, monkeypatch):
    def unsupported(*args):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "posix_fallocate", unsupported)
    assert np.array_equal(cached("x", [], (4, 3), Fill()).images, WHOLE)
    assert np.array_equal(np.load(next(own_cache.glob("*.npy"))), WHOLE)


LIMITED = """
import resource, warnings
import numpy as np
from adaptax.tasks.cache import cached
resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, 2**16))
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    found = cached("x", [], (2**10, 2**10), lambda out: out.fill(3) or 0)
assert (found.images == 3).all()
assert len(caught) == 1 and "not cached" in str(caught[0].message), caught
"""


def test_a_limit_of_the_system_on_files(own_cache):
    subprocess.run([sys.executable, "-c", LIMITED], check=True)
    assert list(own_cache.iterdir()) == []


KILLED = """
import os
from adaptax.tasks.cache import cached
cached("x", [], (4, 3), lambda out: os.kill(os.getpid(), 9))
"""


def test_what_killed_processes_left_is_deleted(own_cache):
    assert subprocess.run([sys.executable, "-c", KILLED]).returncode == -9
    (left,) = own_cache.iterdir()
    old, young = own_cache / "old.tmp", own_cache / "young.tmp"
    for path in (old, young):
        path.write_bytes(b"")
    os.utime(old, (time.time() - 4000,) * 2)
    file, alive = cache._reserved(own_cache / "y.npy", (4, 3))
    with file:
        assert np.array_equal(cached("x", [], (4, 3), Fill()).images, WHOLE)
        assert not left.exists()
        assert not old.exists()
        assert young.exists()
        assert alive.exists()

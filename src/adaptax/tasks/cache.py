"""Decoded images kept on disk, so that a data set is decoded once."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import math
import os
import secrets
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from jaxtyping import UInt8

from adaptax import caches
from adaptax.io import is_stale, write_atomic
from adaptax.tasks.content import Checksums, row_checksums
from adaptax.tasks.files import DataError
from adaptax.text import shown

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

VERSION = 2
"""Part of every key: raise it when decoding changes."""

CHECKED_BYTES = 4 * 2**30
"""Files up to this size have their checksums verified at every load, 0.8 s a GB; larger ones, which
are not brought into memory whole, their length."""

UNFINISHED = ".decoded.tmp"
"""Names of files end so that are being filled; their process holds a lock on them."""

Bytes = UInt8[np.ndarray, "..."]
Fill = Callable[[Bytes], int]


class Cached(NamedTuple):
    """An array and what is known of it.

    Args:
        images: memory-mapped from the cache.
        checksums: of its rows.
        noted: the number that `fill` returned.
    """

    images: Bytes
    checksums: Checksums
    noted: int


def cache_root() -> Path:
    """Return the folder of decoded images: `ADAPTAX_CACHE`, else the user's cache folder."""
    return caches.folder("decoded")


def cached(name: str, key: Sequence[Any], shape: Sequence[int], fill: Fill) -> Cached:
    """Return the array that `fill` writes, memory-mapped; from the cache if it is there.

    Written to a file of its own first, whose room on the disk is reserved before it is mapped (to
    write to a mapped file on a full disk kills the process), and renamed when it is whole: a
    reader never sees half a file. What a killed process left is deleted by the next one. Where
    there is no room, a warning says so, and the array is in memory alone.

    Args:
        name: what the file name begins with.
        key: everything that the content depends on; anything JSON can hold.
        shape: of the array; its type is uint8.
        fill: writes the rows of the array it is given, and returns a number to keep with it.

    Raises:
        DataError: if neither disk nor memory have room.
    """
    text = json.dumps([VERSION, name, list(key), list(shape)])
    digest = hashlib.sha256(text.encode()).hexdigest()[:24]
    path = cache_root() / f"{name}-{digest}.npy"
    found = _load(path, tuple(shape))
    if found is not None:
        return found
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _sweep(path.parent)
        file, temporary = _reserved(path, tuple(shape))
    except OSError as error:
        _warn(error)
        try:
            images = np.empty(shape, np.uint8)
        except MemoryError:
            raise DataError(
                f"{shape[0]} images of {' x '.join(map(str, shape[1:]))} take {math.prod(shape)} "
                f"bytes, for which neither {shown(path.parent)} nor the memory has room; lower "
                "image_size"
            ) from None
        noted = fill(images)
        return Cached(images, row_checksums(images), noted)
    try:
        with file:
            images = np.memmap(file, np.uint8, "r+", file.tell(), tuple(shape))
            noted = fill(images)
            made = Cached(images, row_checksums(images), noted)
            try:
                images.flush()
                beside = io.BytesIO()
                np.savez(beside, checksums=made.checksums, noted=np.int64(noted))
                write_atomic(path.with_suffix(".npz"), beside.getvalue())
                os.replace(temporary, path)
            except OSError as error:
                _warn(error)  # the mapped file loses its name, and goes with the array
    finally:
        temporary.unlink(missing_ok=True)
    images.flags.writeable = False
    return made


def _load(path: Path, shape: tuple[int, ...]) -> Cached | None:
    """Return the cached array, or `None` where it is absent or broken and must be built again."""
    try:
        images = np.load(path, mmap_mode="r", allow_pickle=False)
        with np.load(path.with_suffix(".npz"), allow_pickle=False) as beside:
            found = Cached(images, beside["checksums"], int(beside["noted"]))
    except Exception:  # a file that is damaged raises what NumPy, zipfile or zlib has
        return None
    if images.shape != shape or images.dtype != np.uint8 or len(found.checksums) != len(images):
        return None
    if images.nbytes <= CHECKED_BYTES and not np.array_equal(
        row_checksums(images), found.checksums
    ):
        return None
    return found


def _reserved(path: Path, shape: tuple[int, ...]) -> tuple[IO[bytes], Path]:
    """Open a new file with the header of an array and room for all of it; return file and path."""
    header = io.BytesIO()
    form = {"descr": "|u1", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(header, form)
    while True:
        temporary = path.with_name(f".{path.stem}.{secrets.token_hex(8)}{UNFINISHED}")
        file = temporary.open("x+b")  # with the permissions that the umask leaves
        try:
            if fcntl is not None:
                with suppress(OSError):  # file systems without locks
                    fcntl.flock(file, fcntl.LOCK_EX)
            if not temporary.exists():  # taken for a dead process's before it was locked
                file.close()
                continue
            _reserve(file, len(header.getvalue()) + math.prod(shape))
            file.write(header.getvalue())
            file.flush()
        except BaseException:
            file.close()
            temporary.unlink(missing_ok=True)
            raise
        return file, temporary


def _reserve(file: IO[bytes], size: int) -> None:
    """Reserve so many bytes on the disk, or raise OSError."""
    try:
        os.posix_fallocate(file.fileno(), 0, size)
        return
    except AttributeError:
        pass  # macOS and Windows
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
    zeros = bytes(2**20)
    for start in range(0, size, len(zeros)):
        file.write(zeros[: size - start])
    file.flush()
    file.seek(0)


def _sweep(folder: Path) -> None:
    """Delete what processes left that are no more; other temporary files after an hour."""
    for path in folder.glob("*.tmp"):
        with suppress(OSError), path.open("rb") as file:
            if fcntl is not None and path.name.endswith(UNFINISHED):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            elif not is_stale(path):
                continue
            path.unlink()


def _warn(error: OSError) -> None:
    warnings.warn(
        f"decoded images are not cached in {shown(cache_root())} ({error.strerror or error}); free "
        "some room there or set ADAPTAX_CACHE to another folder",
        stacklevel=4,
    )

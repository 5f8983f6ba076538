"""Decoded images kept on disk, so that a data set is decoded once."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import tempfile
import warnings
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pooch
from jaxtyping import UInt8

VERSION = 1
"""Part of every key: raise it when decoding changes."""

CHECKED_BYTES = 256 * 2**20
"""Files up to this size have their checksum verified at every load; larger ones their length."""

Bytes = UInt8[np.ndarray, "..."]
Fill = Callable[[Bytes], None]


def cache_root() -> Path:
    """The folder of decoded images: `ADAPTAX_CACHE`, else the user's cache folder."""
    given = os.environ.get("ADAPTAX_CACHE")
    return Path(given).expanduser() if given else Path(pooch.os_cache("adaptax")) / "decoded"


def cached(name: str, key: Sequence[Any], shape: Sequence[int], fill: Fill) -> Bytes:
    """The array that `fill` writes, from the cache where it is there, memory-mapped.

    Written to a temporary file first and renamed, so that a reader never sees half a file and a
    killed process leaves nothing that is taken for whole.

    Args:
        name: what the file name begins with.
        key: everything that the content depends on; anything JSON can hold.
        shape: of the array; its type is uint8.
        fill: writes the rows of the array it is given.
    """
    text = json.dumps([VERSION, name, list(key), list(shape)])
    digest = hashlib.sha256(text.encode()).hexdigest()[:24]
    path = cache_root() / f"{name}-{digest}.npy"
    found = _load(path, tuple(shape))
    if found is not None:
        return found
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Asked beforehand: writing to a mapped file on a full disk kills the process.
        if shutil.disk_usage(path.parent).free < math.prod(shape) + 2**20:
            raise OSError(f"no room for {math.prod(shape)} bytes in {path.parent}")
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=name, suffix=".tmp")
        os.close(handle)
    except OSError as error:
        warnings.warn(f"decoded images are not cached: {error}", stacklevel=2)
        images = np.empty(shape, np.uint8)
        fill(images)
        return images
    try:
        mapped = np.lib.format.open_memmap(temporary, "w+", np.uint8, tuple(shape))
        fill(mapped)
        mapped.flush()
        checksum = zlib.crc32(mapped.data)
        del mapped
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)
    _replace_text(path.with_suffix(".crc"), str(checksum))
    return np.load(path, mmap_mode="r", allow_pickle=False)


def _load(path: Path, shape: tuple[int, ...]) -> np.ndarray | None:
    """The cached array, or `None` where it is absent or broken and must be built again."""
    try:
        images = np.load(path, mmap_mode="r", allow_pickle=False)
        checksum = int(path.with_suffix(".crc").read_text())
    except (OSError, ValueError, EOFError):
        return None
    if images.shape != shape or images.dtype != np.uint8:
        return None
    if images.nbytes <= CHECKED_BYTES and zlib.crc32(images.data) != checksum:
        return None
    return images


def _replace_text(path: Path, text: str) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    with os.fdopen(handle, "w") as file:
        file.write(text)
    os.replace(temporary, path)

"""Arrays from npz files that may be broken or hostile: nothing is allocated unchecked."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from adaptax.tasks.files import DataError

MAX_BYTES = 4 * 2**30
"""Largest array that is read."""


def read_npz(path: Path, kinds: Mapping[str, str], what: str) -> dict[str, np.ndarray]:
    """Return the arrays of an npz file by their names.

    Args:
        path: the file.
        kinds: the arrays that it should have, and what kinds of NumPy types they may be of, such
            as `"iu"`.
        what: what the file is said to hold, for the error.

    Raises:
        DataError: if it is no npz file, lacks an array, or one is of another type, encrypted,
            compressed in an unknown way, or does not fill the shape that it declares.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return {name: _read(archive, f"{name}.npy", kind) for name, kind in kinds.items()}
    except Exception as error:  # an archive and its headers may hold anything
        raise DataError(
            f"{path} cannot be read as {what} ({type(error).__name__}: {str(error)[:200]}); "
            f"expected an npz file of {', '.join(kinds)}, without pickles; fetch it again"
        ) from error


def _read(archive: zipfile.ZipFile, name: str, kinds: str) -> np.ndarray:
    size = archive.getinfo(name).file_size
    with archive.open(name) as file:
        shape, dtype = _header(file)
        declared = math.prod(shape) * dtype.itemsize
        if dtype.kind not in kinds:
            raise ValueError(f"{name} is of type {dtype}")
        if declared > MAX_BYTES or min(shape, default=0) < 0 or file.tell() + declared != size:
            raise ValueError(f"{name} of shape {shape} has {declared} bytes, in a file of {size}")
    with archive.open(name) as file:
        array = np.lib.format.read_array(file, allow_pickle=False)
        file.read(1)  # past the end, where the checksum is verified
    return array


def _header(file: Any) -> tuple[tuple[int, ...], np.dtype]:
    version = np.lib.format.read_magic(file)
    read = {(1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0}  # fmt: skip
    if version not in read:
        raise ValueError(f"version {version} of the npy format")
    shape, _, dtype = read[version](file)
    return shape, dtype

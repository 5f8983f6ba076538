"""FS-Mol's assays, read from its own files or from one packed file."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import math
import warnings
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped, UInt8

from adaptax.io import write_atomic
from adaptax.tasks import bank
from adaptax.tasks.cache import cache_root
from adaptax.tasks.files import DataError

URL = "https://figshare.com/ndownloader/files/31345321"
FOLDS = {"train": "train", "val": "valid", "test": "test"}
"""What FS-Mol calls the splits."""


@dataclass(frozen=True)
class Assays:
    """Assays one after another: assay i has the rows `offsets[i]` to `offsets[i+1]`.

    Args:
        task: name of every assay.
        split: `"train"`, `"valid"` or `"test"`, of every assay.
        offsets: where assays begin, and where the last one ends.
        fingerprint_bits: ECFP bits of every molecule, eight a byte, the first one highest.
        log_activity: measured activity of every molecule, in decades; NaN where there is none.
        active: whether the molecule counts as active in this assay.
    """

    task: Shaped[np.ndarray, " assays"]
    split: Shaped[np.ndarray, " assays"]
    offsets: Int[np.ndarray, " ends"]
    fingerprint_bits: UInt8[np.ndarray, "molecules bytes"]
    log_activity: Float[np.ndarray, " molecules"]
    active: Bool[np.ndarray, " molecules"]


NAMES = tuple(field.name for field in fields(Assays))

KINDS = {"task": "U", "split": "U", "offsets": "iu", "fingerprint_bits": "u", "log_activity": "f",
         "active": "b"}  # fmt: skip
"""Kinds of NumPy types of the arrays."""

MAX_BYTES = 2**29
"""Largest file of an assay, unpacked; those of the release are a tenth of that."""

MAX_ARRAY = 4 * 2**30
"""Largest array of a packed file."""


def load(root: Path) -> Assays:
    """Return all assays of all splits.

    Raises:
        FileNotFoundError: if there are none.
        DataError: if files are broken.
    """
    for folder in (root / "fsmol", root / "FS-Mol", root):
        packed = sorted(folder.glob("*.npz")) if folder.is_dir() else []
        if packed:
            return read_packed(packed[0])
        if all((folder / fold).is_dir() for fold in FOLDS.values()):
            return _release(folder)
    raise FileNotFoundError(
        f"no FS-Mol under {root}: expected fsmol/*.npz, or the folders fsmol/train, fsmol/valid "
        f"and fsmol/test with a .jsonl.gz for every assay; fetch {URL} and unpack it there, or "
        "point data_root or ADAPTAX_DATA at a folder that has it"
    )


def read_packed(path: Path) -> Assays:
    """Return the assays in one npz file, with the fields of `Assays` for arrays; no pickles.

    Nothing is allocated for an array that does not fill the shape that it declares.

    Raises:
        DataError: if it is broken or hostile, or the arrays do not fit one another.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            arrays = {name: _array(archive, f"{name}.npy", kind) for name, kind in KINDS.items()}
    except Exception as error:  # an archive and its headers may hold anything
        raise DataError(
            f"{path} cannot be read as assays ({type(error).__name__}: {str(error)[:200]}); "
            f"expected an npz file of {', '.join(KINDS)}, without pickles; fetch it again"
        ) from error
    return _checked(arrays, path)


def _array(archive: zipfile.ZipFile, name: str, kinds: str) -> np.ndarray:
    size = archive.getinfo(name).file_size
    with archive.open(name) as file:
        shape, dtype = _header(file)
        declared = math.prod(shape) * dtype.itemsize
        if dtype.kind not in kinds:
            raise ValueError(f"{name} is of type {dtype}")
        if declared > MAX_ARRAY or min(shape, default=0) < 0 or file.tell() + declared != size:
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


def _checked(arrays: Mapping[str, np.ndarray], path: Path) -> Assays:
    """Check that arrays fit one another, and that all splits are there and share no assay."""
    bits, ends = arrays["fingerprint_bits"], arrays["offsets"]
    names, folds = arrays["task"], arrays["split"]
    sound = (
        all(arrays[name].dtype.kind in kind for name, kind in KINDS.items())
        and bits.ndim == 2
        and bits.dtype == np.uint8
        and ends.ndim == 1
        and arrays["log_activity"].shape == arrays["active"].shape == (len(bits),)
        and names.shape == folds.shape == (len(ends) - 1,)
        and ends[0] == 0
        and ends[-1] == len(bits)
        and bool((ends[1:] >= ends[:-1]).all())
    )
    if not sound:
        raise DataError(
            f"{path}: the arrays do not fit one another; expected rows offsets[i] to offsets[i+1] "
            "of fingerprint_bits (uint8), log_activity (float) and active (bool) for every task"
        )
    there = sorted(set(folds.tolist()))
    if set(there) != set(FOLDS.values()):
        raise DataError(
            f"{path} has the splits {', '.join(there) or 'none'}; expected train, valid and test"
        )
    bank.check_disjoint({split: names[folds == fold].tolist() for split, fold in FOLDS.items()})
    if len(set(names.tolist())) < len(names):
        raise DataError(f"{path} has two assays of one name; give every assay its own")
    return Assays(**arrays)


def _release(folder: Path) -> Assays:
    """Return FS-Mol's own files, from the cache where they have been read before."""
    files = {fold: _listed(folder, fold) for fold in FOLDS.values()}
    state = [(str(f), f.stat().st_size, f.stat().st_mtime_ns) for of in files.values() for f in of]
    digest = hashlib.sha256(json.dumps(state).encode()).hexdigest()[:24]
    kept = cache_root() / f"fsmol-{digest}.npz"
    if kept.is_file():
        try:
            return read_packed(kept)
        except DataError:
            pass  # broken: the files are read again
    data = _checked(_read_release(files), folder)
    packed = io.BytesIO()
    np.savez_compressed(packed, **{name: getattr(data, name) for name in NAMES})
    try:
        write_atomic(kept, packed.getvalue())
    except OSError as error:
        warnings.warn(f"assays are not cached: {error}", stacklevel=2)
    return data


def _listed(folder: Path, fold: str) -> list[Path]:
    """Return the files of a fold, those alone that the list of the release names if it is there."""
    found = sorted((folder / fold).glob("*.jsonl.gz"))
    table = folder / "fsmol-0.1.json"
    if not table.is_file():
        return found
    try:
        names = json.loads(table.read_text(encoding="utf-8"))[fold]
        if not isinstance(names, list):
            raise TypeError(f"{fold} is no list")
        names = set(names)
    except (ValueError, KeyError, TypeError, RecursionError, OSError) as error:
        raise DataError(
            f"{table} is not the list of FS-Mol's assays, names by fold ({error}); fetch it again"
        ) from error
    return [path for path in found if _name(path) in names]


def _read_release(files: Mapping[str, Sequence[Path]]) -> dict[str, np.ndarray]:
    """Return the arrays of `Assays`."""
    read = [(fold, path, _molecules(path)) for fold, of in files.items() for path in of]
    if not read:
        raise DataError("FS-Mol's folders hold no .jsonl.gz files; fetch it again")
    bits, activity, active = zip(*(molecules for _, _, molecules in read))
    widths = sorted({of.shape[1] for of in bits})
    if len(widths) > 1:
        raise DataError(
            f"fingerprints have {' and '.join(str(8 * width) for width in widths)} bits; "
            "expected the same number in every assay; fetch FS-Mol again"
        )
    return {
        "task": np.array([_name(path) for _, path, _ in read], str),
        "split": np.array([fold for fold, _, _ in read], str),
        "offsets": np.cumsum([0, *map(len, bits)]),
        "fingerprint_bits": np.concatenate(bits),
        "log_activity": np.concatenate(activity),
        "active": np.concatenate(active),
    }


def _molecules(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return packed fingerprints, activities and labels of one assay."""
    try:
        with gzip.open(path) as file:
            text = file.read(MAX_BYTES + 1)
        if len(text) > MAX_BYTES:
            raise ValueError(f"it unpacks to more than {MAX_BYTES} bytes")
        molecules = [
            (m["fingerprints"], _number(m["LogRegressionProperty"]), _number(m["Property"]))
            for m in (json.loads(line) for line in text.splitlines() if line.strip())
        ]
        counts = np.array([prints for prints, _, _ in molecules], np.float32)
        activity, active = np.array([rest for _, *rest in molecules]).T
        if not np.isfinite(counts).all() or np.isnan(active).any():
            raise ValueError("a molecule lacks its Property or a part of its fingerprint")
        bits = np.packbits(counts > 0, axis=1)
    except (OSError, EOFError, zlib.error, ValueError, KeyError, TypeError, OverflowError,
            RecursionError, MemoryError) as error:  # fmt: skip
        raise DataError(
            f"{path} cannot be read as an assay ({type(error).__name__}: {str(error)[:200]}); "
            "expected gzipped lines of JSON with fingerprints, Property and "
            "LogRegressionProperty; fetch it again"
        ) from error
    return bits, activity.astype(np.float32), active > 0.5


def _name(path: Path) -> str:
    return path.name.removesuffix(".jsonl.gz")


def _number(value: Any) -> float:
    """Return a number or the text of one; NaN for nothing."""
    return math.nan if value in (None, "") else float(value)

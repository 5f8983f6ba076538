"""Save and load pytrees: no pickle, no code, atomic, checked against what they are loaded into."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import secrets
import time
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as to_bytes

from . import roles, tree


def write_atomic(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a file that is there whole or not at all, also if the process or the machine dies."""
    path = Path(path)
    make_folder(path.parent)
    temporary = path.with_name(f".{path.name[:50]}.{secrets.token_hex(8)}.tmp")
    try:
        with temporary.open("xb") as file:  # with the permissions that the umask leaves
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync(path.parent)


TEMPORARY = re.compile(r"\.(.+)\.[0-9a-f]{16}\.tmp")
"""Name of a file that `write_atomic` has not finished; the group is the name it is to have."""


STALE = 3600.0
"""Seconds after which nobody is at work on a temporary file any more."""


def is_stale(path: Path) -> bool:
    """Return whether a temporary file is older than any write takes, and may be removed."""
    return time.time() - path.stat().st_mtime > STALE


def make_folder(path: Path) -> None:
    """Create a folder, with its parents, that is still there after a power cut."""
    if not path.is_dir():
        make_folder(path.parent)
        path.mkdir(exist_ok=True)
        _sync(path.parent)


def _sync(folder: Path) -> None:
    """Have the names in a folder on disk: without it a renamed file may be lost with the power."""
    if os.name != "posix":
        return  # elsewhere a folder cannot be opened
    try:
        handle = os.open(folder, os.O_RDONLY)
    except PermissionError:
        return  # may be written and not be read
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems that have no need
            raise
    finally:
        os.close(handle)


def strict(value: Any) -> Any:
    """A JSON value in which numbers that are not finite, which JSON lacks, are `None`."""
    if isinstance(value, dict):
        return {name: strict(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [strict(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def save(path: str | os.PathLike[str], value: PyTree, **metadata: Any) -> None:
    """Save the arrays of a pytree in the safetensors format, named by their paths.

    The file holds a checksum of them and of the metadata, which `load` and `read` check.

    Args:
        path: a file; replaced atomically if it exists.
        value: any pytree, such as `result.meta`. Leaves that are not arrays are not saved: they
            come back from the tree that `load` is given. A variable in several places is saved
            once; see `adaptax.roles`.
        metadata: JSON values to keep beside the arrays; see `read_metadata`.
    """
    named = _named(roles.deduplicate(value))
    arrays = {name: np.asarray(plain(leaf)) for name, leaf in named.items()}
    text = json.dumps(metadata)
    data = to_bytes(arrays, metadata={"adaptax": text, "crc32": _checksum(text, arrays)})
    # The library writes metadata in an order that varies; equal values are to be equal files.
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    start = json.dumps(header, separators=(",", ":")).encode()
    start += b" " * (-len(start) % 8)
    write_atomic(path, b"".join([len(start).to_bytes(8, "little"), start, data[end:]]))


def load(path: str | os.PathLike[str], like: PyTree) -> PyTree:
    """Load what `save` wrote into the structure of another pytree.

    Args:
        path: a file that `save` wrote.
        like: a pytree of the same structure, for instance `learner.init(model, key=key)`; its
            arrays' values are replaced, everything else is kept.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is damaged or no checkpoint, or holds another tree: names,
            shapes or dtypes differ.
    """
    found, _ = read(path)
    return roles.kept(lambda once: fill(path, found, once), like)


def fill(path: str | os.PathLike[str], found: Mapping[str, np.ndarray], like: PyTree) -> PyTree:
    """A pytree with the arrays of a file in the place of its own; see `load`.

    Args:
        path: of the file, for the message of an error.
        found: its arrays by their names.
        like: as in `load`.

    Raises:
        ValueError: if names, shapes or dtypes differ.
    """
    wanted = _named(like)
    missing, extra = wanted.keys() - found.keys(), found.keys() - wanted.keys()
    if missing or extra:
        raise ValueError(
            f"{path} is a checkpoint of another model: "
            + "; ".join(
                f"{what} {', '.join(sorted(names)[:3])}{' …' if len(names) > 3 else ''}"
                for what, names in (("it lacks", missing), ("it also has", extra))
                if names
            )
        )
    for name, leaf in wanted.items():
        expected = plain(leaf)
        if found[name].shape != expected.shape or found[name].dtype != expected.dtype:
            raise ValueError(
                f"{path} is a checkpoint of another model: {name} is {found[name].dtype}"
                f"{list(found[name].shape)} there and {expected.dtype}{list(expected.shape)} here"
            )
    leaves, structure = jax.tree.flatten(like)
    names = jax.tree.leaves(tree.paths(like))
    new = [_like(found[n], leaf) if n in found else leaf for n, leaf in zip(names, leaves)]
    return jax.tree.unflatten(structure, new)


def read(path: str | os.PathLike[str]) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The arrays that `save` wrote, by their names, and its metadata, checked by their checksum.

    Files that other programs wrote have no checksum, and only their form is checked.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is truncated, damaged or not in the safetensors format.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no checkpoint at {path}")
    try:
        with safe_open(path, framework="numpy") as file:
            header = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in sorted(file.keys())}
        text = header.get("adaptax", "{}")
        metadata = json.loads(text)
    except (SafetensorError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"{path} is truncated or not a checkpoint ({error})") from None
    ours = header.keys() & {"adaptax", "crc32"}
    # `save` writes these two keys alone, so that a change in one of their letters is seen, too.
    if (ours and ours != header.keys()) or (
        "crc32" in header and header["crc32"] != _checksum(text, arrays)
    ):
        raise ValueError(
            f"{path} is damaged: what it holds does not agree with its checksum; restore it from a "
            "copy, or make it again"
        )
    if not isinstance(metadata, dict):
        raise ValueError(f"{path} is not a checkpoint: its metadata are no JSON object")
    return arrays, metadata


def read_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The metadata that `save` kept beside the arrays; raises as `read` does."""
    return read(path)[1]


def _checksum(text: str, arrays: Mapping[str, np.ndarray]) -> str:
    """CRC-32 of metadata and arrays with their names, types and shapes, as eight digits."""
    value = zlib.crc32(text.encode())
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        value = zlib.crc32(f"{name} {array.dtype} {arrays[name].shape}".encode(), value)
        value = zlib.crc32(array.reshape(-1).view(np.uint8).data, value)
    return f"{value:08x}"


def _named(value: PyTree) -> dict[str, Any]:
    names, leaves = jax.tree.leaves(tree.paths(value)), jax.tree.leaves(value)
    return {name: leaf for name, leaf in zip(names, leaves) if eqx.is_array_like(leaf)
            and hasattr(leaf, "dtype")}  # fmt: skip


def plain(leaf: Any) -> Any:
    """An array that numpy knows: typed PRNG keys become their data."""
    return jax.random.key_data(leaf) if roles.is_key(leaf) else leaf


def _like(array: np.ndarray, leaf: Any) -> Any:
    if roles.is_key(leaf):
        return jax.random.wrap_key_data(jnp.asarray(array), impl=jax.random.key_impl(leaf))
    return jnp.asarray(array) if isinstance(leaf, jax.Array) else array

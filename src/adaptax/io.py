"""Save and load pytrees: no pickle, no code, atomic, checked against what they are loaded into."""

from __future__ import annotations

import json
import math
import os
import tempfile
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as to_bytes

from . import tree


def write_atomic(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a file that is there whole or not at all, also if the process is killed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # temporary files are for their owner alone
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def strict(value: Any) -> Any:
    """A JSON value in which numbers that are not finite, which JSON lacks, are `None`."""
    if isinstance(value, dict):
        return {name: strict(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [strict(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def save(path: str | os.PathLike[str], value: PyTree, **metadata: Any) -> None:
    """Save the arrays of a pytree in the safetensors format, named by their paths.

    Args:
        path: a file; replaced atomically if it exists.
        value: any pytree, such as `result.meta`. Leaves that are not arrays are not saved: they
            come back from the tree that `load` is given.
        metadata: JSON values to keep beside the arrays; see `read_metadata`.
    """
    arrays = {name: np.asarray(plain(leaf)) for name, leaf in _named(value).items()}
    header = {"adaptax": json.dumps(metadata)}
    write_atomic(path, to_bytes(arrays, metadata=header))


def load(path: str | os.PathLike[str], like: PyTree) -> PyTree:
    """Load what `save` wrote into the structure of another pytree.

    Args:
        path: a file that `save` wrote.
        like: a pytree of the same structure, for instance `learner.init(model, key=key)`; its
            arrays' values are replaced, everything else is kept.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is truncated or no checkpoint, or holds another tree: names,
            shapes or dtypes differ.
    """
    wanted = _named(like)
    with _open(path) as file:
        missing, extra = wanted.keys() - file.keys(), file.keys() - wanted.keys()
        if missing or extra:
            raise ValueError(
                f"{path} is a checkpoint of another model: "
                + "; ".join(
                    f"{what} {', '.join(sorted(names)[:3])}{' …' if len(names) > 3 else ''}"
                    for what, names in (("it lacks", missing), ("it also has", extra))
                    if names
                )
            )
        found = {name: file.get_tensor(name) for name in wanted}
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


def read_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The metadata that `save` kept beside the arrays."""
    with _open(path) as file:
        return json.loads((file.metadata() or {}).get("adaptax", "{}"))


def _open(path: str | os.PathLike[str]) -> Any:
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no checkpoint at {path}")
    try:
        return safe_open(path, framework="numpy")
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or not a checkpoint ({error})") from None


def _named(value: PyTree) -> dict[str, Any]:
    names, leaves = jax.tree.leaves(tree.paths(value)), jax.tree.leaves(value)
    return {name: leaf for name, leaf in zip(names, leaves) if eqx.is_array_like(leaf)
            and hasattr(leaf, "dtype")}  # fmt: skip


def plain(leaf: Any) -> Any:
    """An array that numpy knows: typed PRNG keys become their data."""
    return jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf


def _like(array: np.ndarray, leaf: Any) -> Any:
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(jnp.asarray(array), impl=jax.random.key_impl(leaf))
    return jnp.asarray(array) if isinstance(leaf, jax.Array) else array

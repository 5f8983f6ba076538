"""Episodes of any labelled arrays: images, features, token ids, or several inputs together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree, Shaped

from adaptax import tree
from adaptax.roles import path_name
from adaptax.task import Splits
from adaptax.tasks import bank
from adaptax.tasks.bank import MEMORY_BUDGET, NAMES
from adaptax.tasks.episodes import Rotations, kept
from adaptax.tasks.files import DataError

Array = Shaped[np.ndarray, "..."]

BLOCK = 2**24
"""Bytes that are looked through at once."""

SHOWN = 5
"""Rows that an error names."""


def from_arrays(
    x: PyTree,
    labels: Any = None,
    *,
    way: int = 5,
    shot: int = 1,
    query: int | None = None,
    train_shot: int | None = None,
    train_query: int | None = None,
    splits: Sequence[float] | None = None,
    seed: int = 0,
    rotations: tuple[Rotations, Rotations] = ("none", "none"),
    invert: bool = False,
    name: str = "arrays",
    memory_budget: int = MEMORY_BUDGET,
) -> Splits:
    """Return episodes of labelled examples.

    | x is | the model is given |
    |---|---|
    | uint8 | float in [0, 1]: images |
    | floats | float32 |
    | other integers | integers, as wide as JAX has them: token ids, categories |
    | booleans | float32; as one of several inputs booleans: masks |
    | a dict or tuple of these, or any other pytree | the same, each as above: several inputs |

    A list is one array.

    Args:
        x: examples, `(n, ...)`; or, already split by class,
            `{"train": (x, labels), "val": ..., "test": ...}`.
        labels: integers or strings, `(n,)`: a list, an array of any kind, a pandas column.
        way: classes an episode.
        shot: support examples a class.
        query: query examples a class; 15 if `None`, or as many as the smallest class leaves.
        train_shot: support examples a class in meta-training, if not `shot`.
        train_query: query examples a class in meta-training, if not `query`.
        splits: fractions of the classes for train, val and test, when `x` is not split; if `None`,
            (0.64, 0.16, 0.2), or others where these give a split fewer classes than `way`, see
            `describe()["splits"]`.
        seed: of that split.
        rotations: of square images in meta-training, and in validation and test.
        invert: turn bytes b into 255 − b.
        name: what reports call the data.
        memory_budget: in bytes; larger data stay on the host, memory-mapped if they were.

    Raises:
        DataError: if lengths differ, labels are missing or no labels, examples are no numbers, not
            finite, masked or beyond what the device holds, splits share classes or are absent, or
            there are too few classes or examples.

    Example:
        `from_arrays(features, names, way=5, shot=1, query=15)`
    """
    designs = partial(
        bank.designs, way, shot, train_shot=train_shot, train_query=train_query,
        rotations=rotations, invert=invert,
    )  # fmt: skip
    designs(query=query)  # bad counts are told first
    x = dict(x) if isinstance(x, Mapping) else x
    if isinstance(x, dict) and labels is None:
        array, rows = _from_splits(x)
    elif isinstance(x, dict) and x and set(x) <= set(NAMES):
        raise DataError("labels were given beside a dict of splits; put them inside the dict")
    elif labels is None:
        raise DataError("labels are None; expected one label an example, or a dict of splits")
    else:
        array, names = _pair("x", x, labels)
        rows = {"": bank.group(names)}
    classes, design, how, shared = bank.settle(rows, splits, seed, query, designs)
    return bank.make_splits(
        array, classes, design, name=name, details=how, memory_budget=memory_budget, shared=shared
    )


def _from_splits(x: dict[Any, Any]) -> tuple[PyTree, dict[str, dict[str, np.ndarray]]]:
    """Return the examples of all splits in one array, and the rows of every class."""
    for split, pair in x.items():
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            held = f" of {len(pair)}" if isinstance(pair, list | tuple) else ""
            raise DataError(
                f"{split}: given a {type(pair).__name__}{held}; expected the pair (x, labels) of "
                "each of train, val and test, or labels= beside a dict of inputs"
            )
    if not x:
        raise DataError("found no splits; expected train, val and test")
    pairs = {split: _pair(str(split), *pair) for split, pair in x.items()}
    kinds = {(jax.tree.structure(inputs), _described(inputs)) for inputs, _ in pairs.values()}
    if len(kinds) > 1:
        said = " and ".join(sorted({text for _, text in kinds}))
        raise DataError(f"splits hold examples of several kinds, {said}; expected one")
    array = jax.tree.map(lambda *leaves: np.concatenate(leaves), *(a for a, _ in pairs.values()))
    first, classes = 0, {}
    for split, (_, names) in pairs.items():
        classes[split] = bank.group(names, first)
        first += len(names)
    return array, classes


def _described(inputs: PyTree) -> str:
    """Return names, types and shapes of an example."""
    kinds = {"f": "floats", "b": "booleans", "i": "integers", "u": "unsigned integers"}
    return ", ".join(
        f"{path} {'bytes' if leaf.dtype == np.uint8 else kinds[kept(leaf.dtype).kind]} "
        f"{leaf.shape[1:]}".strip()
        for path, leaf in tree.by_path(inputs).items()
    )


def _pair(what: str, x: PyTree, labels: Any) -> tuple[PyTree, np.ndarray]:
    """Return examples and labels, checked; memory-mapped arrays as they are."""
    labels = to_labels(what, labels)
    try:
        leaves, structure = jax.tree_util.tree_flatten_with_path(x, is_leaf=is_array)
    except (TypeError, ValueError) as error:  # keys that have no order
        raise DataError(f"{what}: inputs cannot be put in order ({str(error)[:100]})") from None
    single = is_array(x)
    names = [what if single else f"{what}/{path_name(path)}" for path, _ in leaves]
    arrays = [to_array(name, leaf) for name, (_, leaf) in zip(names, leaves)]
    shapes = [array.shape for array in arrays]
    fit = all(len(shape) > single and shape[:1] == labels.shape for shape in shapes)
    if not shapes or not fit:
        raise DataError(
            f"{what}: examples of shape {' and '.join(map(str, shapes)) or 'none'} and labels of "
            f"shape {labels.shape}; expected (n, ...) and (n,)"
        )
    if len(labels) == 0 or any(0 in shape for shape in shapes):
        raise DataError(
            f"{what}: examples of shape {' and '.join(map(str, shapes))} hold nothing; expected "
            "one or more examples, each of one or more numbers"
        )
    for name, array in zip(names, arrays):
        check_values(name, array)
    if single and arrays[0].dtype == bool:
        arrays = [arrays[0].astype(np.float32)]
    return jax.tree.unflatten(structure, arrays), labels


def is_array(value: Any) -> bool:
    """Return whether this is one array, or a pytree of inputs."""
    if isinstance(value, tuple):
        return not any(hasattr(each, "shape") for each in value)
    return isinstance(value, list | str | bytes) or hasattr(value, "__array__")


def to_array(what: str, value: Any) -> np.ndarray:
    """Return an array of what is one, masks refused; memory-mapped as it is."""
    try:
        array = value if isinstance(value, np.memmap | np.ma.MaskedArray) else np.asarray(value)
    except Exception as error:  # of any library
        raise DataError(
            f"{what}: a {type(value).__name__} is no array ({str(error)[:100]}); expected numbers, "
            "as many in each row"
        ) from None
    if isinstance(array, np.ma.MaskedArray):
        if array.ndim:
            masked = _rows(np.ma.getmaskarray(array), lambda block: block)
            _refuse(what, masked, len(array), "masked", "leave them out or fill them in")
        array = array.data
    return array


def to_labels(what: str, labels: Any) -> np.ndarray:
    """Return labels as an array of one kind, none missing."""
    if isinstance(labels, list | tuple):  # as they are: NumPy would make 1 and "1" the same text
        array = np.fromiter(labels, object, len(labels))
    else:
        array = to_array(f"labels of {what}", labels)
    if array.dtype.kind == "T":
        array = array.astype(object)
    if array.dtype.kind not in "iubUSO":
        raise DataError(
            f"{what}: labels of type {array.dtype}; expected integers or strings, one a class"
        )
    if array.dtype == object and array.ndim == 1:
        kinds = np.array([_kind(label) for label in array], object)
        bad = np.flatnonzero(kinds == "")
        if len(bad):
            held = ", ".join(dict.fromkeys(repr(label)[:20] for label in array[bad[:SHOWN]]))
            _refuse(what, bad, len(array), f"without a label ({held})", "give each an integer or "
                    "a string, or leave them out")  # fmt: skip
        if len(set(kinds)) > 1:
            raise DataError(
                f"{what}: labels are {' and '.join(sorted(set(kinds)))}; expected one kind"
            )
    return array


def _kind(label: Any) -> str:
    """Return the kind of a label, or "" if it is missing, as pandas has it."""
    if isinstance(label, str | bytes):
        return "text" if isinstance(label, str) else "bytes"
    return "integers" if isinstance(label, int | np.integer | np.bool_) else ""


def check_values(what: str, array: np.ndarray) -> None:
    """Raise DataError for numbers that are not finite or that the device does not hold."""
    try:
        to = kept(array.dtype)
    except DataError as error:
        raise DataError(f"{what}: {error}") from None
    if to.kind == "f":
        with np.errstate(all="ignore"):
            bad = _rows(array, lambda block: ~np.isfinite(block.astype(to, copy=False)))
            lost = _rows(array[bad], lambda block: ~np.isfinite(block.astype(float)))
        fill = "leave them out or fill them in"
        _refuse(what, bad[lost], len(array), "not finite (NaN or infinity)", fill)
        _refuse(what, bad, len(array), f"beyond {to}", "scale them")
    elif to.kind in "iu" and to != array.dtype:
        low, high = np.iinfo(to).min, np.iinfo(to).max
        bad = _rows(array, lambda block: (block < low) | (block > high))
        how = "number them anew, or switch JAX to 64 bits (jax_enable_x64)"
        _refuse(what, bad, len(array), f"beyond {to}", how)


def _rows(array: np.ndarray, bad: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Return the rows in which something is bad, block by block."""
    size = max(BLOCK // max(array[:1].nbytes, 1), 1)
    found = [np.zeros(0, int)]
    for first in range(0, len(array), size):
        block = array[first : first + size]
        found.append(first + np.flatnonzero(bad(block).reshape(len(block), -1).any(axis=1)))
    return np.concatenate(found)


def _refuse(what: str, rows: np.ndarray, count: int, why: str, advice: str) -> None:
    if len(rows):
        some = ", ".join(map(str, rows[:SHOWN])) + (", …" if len(rows) > SHOWN else "")
        raise DataError(
            f"{what}: {len(rows)} of {count} examples are {why}, in rows {some}; {advice}"
        )

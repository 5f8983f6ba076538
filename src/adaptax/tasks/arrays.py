"""Episodes of any labelled arrays: images or feature vectors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Shaped

from adaptax.task import Splits
from adaptax.tasks import bank
from adaptax.tasks.bank import MEMORY_BUDGET
from adaptax.tasks.episodes import Rotations
from adaptax.tasks.sources import DataError

Arrays = Shaped[np.ndarray, "..."]


def from_arrays(
    x: Arrays | Mapping[str, tuple[Arrays, Arrays]],
    labels: Arrays | Sequence[int] | Sequence[str] | None = None,
    *,
    way: int = 5,
    shot: int = 1,
    query: int = 15,
    train_shot: int | None = None,
    train_query: int | None = None,
    splits: Sequence[float] = (0.64, 0.16, 0.2),
    seed: int = 0,
    rotations: tuple[Rotations, Rotations] = ("none", "none"),
    invert: bool = False,
    name: str = "arrays",
    memory_budget: int = MEMORY_BUDGET,
) -> Splits:
    """Episodes of labelled examples.

    Args:
        x: examples, `(n, ...)`: uint8 is taken for images and scaled to [0, 1], floats are kept
            as float32, other integers and booleans are made so. Or, already split by class,
            `{"train": (x, labels), "val": ..., "test": ...}`.
        labels: integers or strings, `(n,)`.
        way: classes an episode.
        shot: support examples a class.
        query: query examples a class.
        train_shot: support examples a class in meta-training, if not `shot`.
        train_query: query examples a class in meta-training, if not `query`.
        splits: fractions of the classes for train, val and test, when `x` is one array.
        seed: of that split.
        rotations: of square images in meta-training, and in validation and test.
        invert: turn bytes b into 255 − b.
        name: what reports call the data.
        memory_budget: in bytes; larger data stay on the host, memory-mapped if they were.

    Raises:
        DataError: if lengths differ, labels are not labels, splits share classes or are absent,
            or there are too few classes or examples.

    Example:
        `from_arrays(features, names, way=5, shot=1, query=15)`
    """
    design = bank.designs(way, shot, query, train_shot, train_query, rotations, invert=invert)
    if isinstance(x, Mapping):
        if labels is not None:
            raise DataError("labels were given beside a dict of splits; put them inside the dict")
        pairs = {split: _pair(split, *pair) for split, pair in x.items()}
        shapes = {(a.shape[1:], a.dtype.name) for a, _ in pairs.values()}
        if len(shapes) > 1:
            raise DataError(
                f"splits hold examples of several kinds, {sorted(shapes)}; expected one"
            )
        array = np.concatenate([a for a, _ in pairs.values()])
        first, classes = 0, {}
        for split, (a, names) in pairs.items():
            classes[split] = group(names, first)
            first += len(a)
        how: tuple[tuple[str, object], ...] = ()
    else:
        if labels is None:
            raise DataError("x is one array, but labels are None; expected one label an example")
        array, names = _pair("x", x, labels)
        rows = group(names)
        parts = bank.split_by_fraction(list(rows), splits, seed)
        classes = {split: {name: rows[name] for name in part} for split, part in parts.items()}
        how = (("splits", tuple(splits)), ("split_seed", seed))
    return bank.make_splits(
        array, classes, design, name=name, details=how, memory_budget=memory_budget
    )


def group(labels: Arrays, first: int = 0) -> dict[str, np.ndarray]:
    """Rows of every label, counted from `first`, in order of the labels."""
    values, where = np.unique(labels, return_inverse=True)
    order = np.argsort(where, kind="stable")
    ends = np.cumsum(np.bincount(where, minlength=len(values)))[:-1]
    return {str(value): rows + first for value, rows in zip(values, np.split(order, ends))}


def _pair(what: str, x: Arrays, labels: Arrays | Sequence[object]) -> tuple[np.ndarray, np.ndarray]:
    x, labels = np.asanyarray(x), np.asarray(labels)
    if x.ndim < 2 or labels.ndim != 1 or len(x) != len(labels):
        raise DataError(
            f"{what}: examples of shape {x.shape} and labels of shape {labels.shape}; expected "
            "(n, ...) and (n,)"
        )
    if labels.dtype.kind not in "iubUS":
        raise DataError(
            f"{what}: labels of type {labels.dtype}; expected integers or strings, one a class"
        )
    if x.dtype.kind not in "iubf":
        raise DataError(f"{what}: examples of type {x.dtype}; expected uint8 images or floats")
    if x.dtype not in (np.uint8, np.float32):
        x = x.astype(np.float32)
    return x, labels

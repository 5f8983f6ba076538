"""Episodes of embeddings: features of images, extracted once by a fixed network.

The file is in the safetensors format, arrays and JSON, no code:

    train/embeddings   float32 (images, width), class by class
    train/labels       int32 (images,), numbers of the classes of this split
    val/…, test/…      likewise

Its metadata hold, under `"adaptax"`, a JSON object with `"format": "embeddings"`, `"version": 1`,
`"classes"` (for each split the names of its classes, in the order of their numbers), `"normalised"`
(whether every row has length 1), `"backbone"` and `"source"` (where the features come from).
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Shaped

from adaptax import io
from adaptax.task import Splits
from adaptax.tasks import bank
from adaptax.tasks.bank import MEMORY_BUDGET, NAMES
from adaptax.tasks.files import DataError

FORMAT, VERSION = "embeddings", 1

TOLERANCE = 1e-3
"""By which the length of a normalised embedding may differ from 1."""

TRAIN_QUERY = 15
"""Queries a class in meta-training where all others are asked for: as LEO's paper."""

Features = Float[np.ndarray, "n width"]
Rows = Shaped[np.ndarray, "..."]


def embeddings(
    path: str | os.PathLike[str],
    way: int = 5,
    shot: int = 1,
    query: int | str = 15,
    *,
    train_shot: int | None = None,
    train_query: int | None = None,
    train_and_val: bool = False,
    normalise: bool = False,
    memory_budget: int = MEMORY_BUDGET,
) -> Splits:
    """Return episodes of the embeddings in a file, x `(n, width)` of length 1.

    Written by `adaptax embed`, from a pretrained network or from the embeddings that LEO's authors
    released. LEO's paper predicts all images of a class that are not in the support: `query="all"`;
    and trains its final models on the classes of train and validation: `train_and_val=True`.

    Args:
        path: the file.
        way: classes an episode.
        shot: support embeddings a class.
        query: query embeddings a class; `"all"` are those that remain, in validation and test.
        train_shot: support embeddings a class in meta-training, if not `shot`.
        train_query: query embeddings a class in meta-training, if not `query`, or 15 for `"all"`.
        train_and_val: `.train` draws from the classes of both splits. `.val` is as ever, so that
            its scores are then of classes that were trained on.
        normalise: divide embeddings by their length if the file has them as they were extracted.
        memory_budget: in bytes; a larger data set is streamed from the host.

    Raises:
        FileNotFoundError: if there is no such file.
        DataError: if the file is broken or no embeddings, a split is missing, embeddings are not
            finite, not of one width or not normalised, or the counts do not fit.

    Example:
        `embeddings("runs/features.safetensors", way=5, shot=1, query="all").test`
    """
    found, about = read(path)
    for split, (x, _) in found.items():
        _check_finite(path, split, x)
    found = {split: (_unit(path, split, x, normalise), y) for split, (x, y) in found.items()}
    array = np.concatenate([x for x, _ in found.values()])
    first, classes = 0, {}
    for split, (x, labels) in found.items():
        names = about["classes"][split]
        classes[split] = {
            names[int(label)]: rows for label, rows in bank.group(labels, first).items()
        }
        first += len(x)
    bank.check_disjoint(classes)
    if train_and_val:
        classes["train"] = {**classes["train"], **classes["val"]}
    if query == "all":
        each = {split: _rest(split, classes[split], shot) for split in ("val", "test")}
        train_query = TRAIN_QUERY if train_query is None else train_query
    elif isinstance(query, int):
        each = {"val": query, "test": query}
    else:
        raise DataError(f'query={query!r}; expected a number, or "all"')
    designs = bank.designs(way, shot, each["test"], train_shot, train_query)
    designs["val"] = dataclasses.replace(designs["val"], query=each["val"])
    details: tuple[tuple[str, Hashable], ...] = (
        ("width", array.shape[1]),
        ("backbone", about.get("backbone")),
        ("normalised", "in reading" if normalise and not about["normalised"] else "in the file"),
        ("train_and_val", train_and_val),
    )
    return bank.make_splits(
        array, classes, designs, name="embeddings", details=details, memory_budget=memory_budget,
        shared=[("train", "val")] if train_and_val else (),
    )  # fmt: skip


def width(path: str | os.PathLike[str]) -> int:
    """Return the length of the embeddings in a file.

    Raises:
        FileNotFoundError: if there is no such file.
        DataError: as `read` has it.
    """
    return int(next(iter(read(path)[0].values()))[0].shape[1])


def write(
    path: str | os.PathLike[str],
    splits: Mapping[str, tuple[Features, Rows, list[str]]],
    *,
    normalise: bool = True,
    backbone: str,
    source: Mapping[str, Any],
) -> None:
    """Write embeddings to a file, whole or not at all.

    Args:
        path: the file; replaced if it exists.
        splits: for train, val and test the features, their class numbers, and the classes' names.
        normalise: divide each by its length.
        backbone: the network.
        source: JSON of where they come from.

    Raises:
        DataError: if a split is missing, features are not finite, all zero, or not of one width.
    """
    _check_splits(path, splits)
    arrays, classes = {}, {}
    widths = {split: x.shape[1:] for split, (x, _, _) in splits.items()}
    _check_widths(path, widths)
    for split in NAMES:
        x, labels, names = splits[split]
        _check_finite(path, split, x)
        x = _divided(path, split, x) if normalise else x
        arrays[split] = {"embeddings": np.asarray(x, np.float32),
                         "labels": np.asarray(labels, np.int32)}  # fmt: skip
        classes[split] = list(names)
    io.save(
        path, arrays, format=FORMAT, version=VERSION, classes=classes, normalised=normalise,
        backbone=backbone, source=io.strict(dict(source)),
    )  # fmt: skip


def read(path: str | os.PathLike[str]) -> tuple[dict[str, tuple[Features, Rows]], dict[str, Any]]:
    """Return for each split features and class numbers as in the file, and its metadata.

    Raises:
        FileNotFoundError: if there is no such file.
        DataError: if it is truncated, no embeddings, lacks a split, or its arrays do not fit.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"there are no embeddings at {path}; `adaptax embed` writes such a file from a "
            "pretrained network"
        )
    try:
        arrays, about = io.read(path)
    except ValueError as error:
        said = str(error).replace("a checkpoint", "a safetensors file")
        raise DataError(f"{said}; `adaptax embed` writes such a file") from None
    if about.get("format") != FORMAT:
        raise DataError(f"{path} holds no embeddings; expected a file that `adaptax embed` wrote")
    if about.get("version") != VERSION:
        raise DataError(
            f"{path} is of version {about.get('version')} of the format, and this is for "
            f"{VERSION}; write it again with this version of adaptax"
        )
    _check_splits(path, {name.split("/")[0] for name in arrays})
    if not isinstance(about.get("backbone"), str | None):
        raise DataError(f"{path}: its backbone is no text; write it again")
    pairs = {}
    for split in NAMES:
        try:
            x, labels = arrays[f"{split}/embeddings"], arrays[f"{split}/labels"]
            names = about["classes"][split]
        except (KeyError, TypeError) as error:
            raise DataError(f"{path} lacks {error} of the {split} split; write it again") from None
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise DataError(
                f"{path}: the classes of the {split} split are no list of names; write it again"
            )
        if len(set(names)) < (count := len(names)):
            raise DataError(f"{path}: the {split} split has two classes of one name; rename one")
        if (
            x.ndim != 2
            or x.dtype.kind != "f"
            or labels.shape != x.shape[:1]
            or (labels.dtype.kind not in "iu")
        ):
            raise DataError(
                f"{path}: the {split} split has embeddings {x.dtype}{list(x.shape)} and labels "
                f"{labels.dtype}{list(labels.shape)}; expected floats (n, width) and integers (n,)"
            )
        if len(x) == 0 or not 0 <= labels.min() <= labels.max() < count:
            raise DataError(
                f"{path}: the {split} split has {len(x)} embeddings whose labels are not numbers "
                f"of its {count} classes; write it again"
            )
        pairs[split] = (x.astype(np.float32), labels)
    _check_widths(path, {split: x.shape[1:] for split, (x, _) in pairs.items()})
    return pairs, {**about, "normalised": bool(about.get("normalised"))}


def _check_splits(path: str | os.PathLike[str], found: Any) -> None:
    missing = [split for split in NAMES if split not in found]
    if missing:
        raise DataError(
            f"{path}: the embeddings lack the split {' and '.join(missing)}; expected train, val "
            "and test"
        )


def _check_widths(path: str | os.PathLike[str], widths: Mapping[str, tuple[int, ...]]) -> None:
    if len(set(widths.values())) > 1:
        said = ", ".join(f"{split} {'×'.join(map(str, w))}" for split, w in widths.items())
        raise DataError(
            f"{path}: embeddings of mixed width ({said}); extract all splits by one network"
        )


def _check_finite(path: str | os.PathLike[str], split: str, x: Features) -> None:
    bad = int(np.sum(~np.isfinite(x).all(axis=1)))
    if bad:
        raise DataError(
            f"{path}: {bad} of the {len(x)} embeddings of the {split} split are not finite; "
            "extract them again from a network whose training did not diverge"
        )


def _unit(path: str | os.PathLike[str], split: str, x: Features, normalise: bool) -> Features:
    length = np.linalg.norm(x, axis=1)
    if np.abs(length - 1).max() <= TOLERANCE:
        return x
    if not normalise:
        raise DataError(
            f"{path}: the embeddings of the {split} split are not normalised, their lengths are "
            f"{length.min():.3g} to {length.max():.3g} instead of 1; say normalise=True to have "
            "them divided by their lengths"
        )
    return _divided(path, split, x)


def _divided(path: str | os.PathLike[str], split: str, x: Features) -> Features:
    length = np.linalg.norm(x.astype(np.float64), axis=1, keepdims=True)
    if length.min() == 0:
        raise DataError(
            f"{path}: {int(np.sum(length == 0))} of the {len(x)} embeddings of the {split} split "
            "are all zero and have no direction; leave their images out or train the network longer"
        )
    divided: Features = (x / length).astype(np.float32)
    return divided


def _rest(split: str, classes: Mapping[str, np.ndarray], shot: int) -> int:
    counts = {len(rows) for rows in classes.values()}
    least = min(counts) - shot
    if len(counts) > 1:
        raise DataError(
            f'query="all" wants classes of equal size, and those of the {split} split have '
            f"{min(counts)} to {max(counts)} embeddings; ask for query={least} at most"
        )
    return max(least, 0)

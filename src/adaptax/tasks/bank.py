"""From an array and lists of classes to three distributions of episodes."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int, PyTree, Shaped

from adaptax.task import Splits, TaskDistribution
from adaptax.tasks.content import Checksums, row_checksums, warn_of_shared
from adaptax.tasks.episodes import (
    Design,
    Details,
    Episodes,
    HostRows,
    Rotations,
    StreamedEpisodes,
    kept,
)
from adaptax.tasks.sources import DataError, shown

MEMORY_BUDGET = 4 * 2**30
"""Data sets beyond this many bytes stay on the host."""

NAMES = ("train", "val", "test")

MOST_LISTED = 100
"""Classes that an error lists."""

Classes = Mapping[str, Int[np.ndarray, " rows"]]
"""Rows of every class, by the name of the class."""


def designs(
    way: int,
    shot: int,
    query: int,
    train_shot: int | None,
    train_query: int | None,
    rotations: tuple[Rotations, Rotations] = ("none", "none"),
    **treatment: Any,
) -> dict[str, Design]:
    """The designs of the three splits; the train split may use other counts.

    Args:
        way: classes an episode.
        shot: support examples a class.
        query: query examples a class.
        train_shot: support examples a class in meta-training; `None` for `shot`.
        train_query: query examples a class in meta-training; `None` for `query`.
        rotations: in meta-training, and in validation and test.
        treatment: other fields of `Design`.

    Raises:
        DataError: if a count is not a number of things, or rotations are not two that are known.
    """
    asked = {"way": way, "shot": shot, "query": query,
             "train_shot": train_shot, "train_query": train_query}  # fmt: skip
    for what, number in asked.items():
        least = 0 if what.endswith("query") else 1
        if number is None and what.startswith("train_"):
            continue
        if not isinstance(number, int | np.integer):
            raise DataError(f"{what}={number!r}; expected an integer, at least {least}")
        if number < least:
            raise DataError(f"{what}={number}; expected at least {least}")
    known = get_args(Rotations)
    if (
        not isinstance(rotations, tuple | list)
        or len(rotations) != 2
        or not all(isinstance(each, str) and each in known for each in rotations)
    ):
        raise DataError(
            f"rotations={rotations!r}; expected two of {', '.join(known)}: one for meta-training "
            'and one for validation and test, such as ("random", "none")'
        )
    train = Design(
        way,
        shot if train_shot is None else train_shot,
        query if train_query is None else train_query,
        rotations[0],
        **treatment,
    )
    test = Design(way, shot, query, rotations[1], **treatment)
    return {"train": train, "val": test, "test": test}


def make_splits(
    array: PyTree[Shaped[np.ndarray, "n ..."]],
    splits: Mapping[str, Classes],
    design: Mapping[str, Design],
    *,
    name: str,
    details: Details = (),
    memory_budget: int = MEMORY_BUDGET,
    shared: Sequence[tuple[str, str]] = (),
    checksums: Checksums | None = None,
    names: Sequence[str] | None = None,
    leave_out: str = "leave such classes out",
) -> Splits:
    """Distributions of episodes over classes of one array.

    Args:
        array: all examples, `(n, ...)`, or of several inputs a tree of such; may be
            memory-mapped, and is then not read beyond need.
        splits: for train, val and test, the rows of every class.
        design: for each of them, what an episode is made of.
        name: of the data set.
        details: what else a report says of it.
        memory_budget: in bytes; a larger data set is streamed from the host.
        shared: pairs of splits that have classes in common on purpose.
        checksums: of the examples, if they are known; else they are computed, for pictures that
            do not exceed the budget.
        names: of the examples.
        leave_out: what to do with classes that are too small, for the error.

    Raises:
        DataError: if a split is missing, splits share classes, classes are too small, there are
            fewer classes than ways, or rotations or `invert` are asked of examples that cannot be
            turned or inverted.

    Warns:
        UserWarning: if a picture is in two splits.
    """
    if set(splits) != set(NAMES):
        raise DataError(
            f"found the splits {', '.join(sorted(splits)) or 'none'}; expected train, val and test"
        )
    check_disjoint(splits, shared)
    _check_sizes(splits, design, leave_out)
    for split, classes in splits.items():
        _check(array, split, classes, design[split])
    rows = sum(len(r) for classes in splits.values() for r in classes.values())
    if not isinstance(memory_budget, int | float | np.integer):
        raise DataError(f"memory_budget={memory_budget!r}; expected a number of bytes")
    leaves = jax.tree.leaves(array)
    each = sum(math.prod(a.shape[1:]) * kept(a.dtype).itemsize for a in leaves)
    streamed = rows * each > memory_budget
    if checksums is not None or not streamed:
        held = {split: np.concatenate(list(splits[split].values())) for split in NAMES}
        for a in _pictures(array):
            sums = row_checksums(a) if checksums is None else checksums
            warn_of_shared(a, sums, held, name=name, names=names, shared=shared)
    made: dict[str, TaskDistribution] = {}
    for split, classes in splits.items():
        index = np.concatenate(list(classes.values()))
        count = np.array([len(r) for r in classes.values()], np.int32)
        start = jnp.asarray(np.cumsum(count, dtype=np.int32) - count)
        rest: dict[str, Any] = {
            "start": start,
            "count": jnp.asarray(count),
            "design": design[split],
            "split": split,
            "name": name,
            "classes": tuple(classes),
            "details": details,
        }
        if streamed:
            made[split] = StreamedEpisodes(bank=HostRows(array, index), **rest)
        else:
            bank = jax.tree.map(lambda a, index=index: jnp.asarray(_take(a, index)), array)
            made[split] = Episodes(bank=bank, **rest)
    return Splits(made["train"], made["val"], made["test"])


def _take(array: np.ndarray, index: np.ndarray) -> np.ndarray:
    """`array[index]` as it is kept, without a copy where the rows are consecutive."""
    first = int(index[0])
    consecutive = np.array_equal(index, np.arange(first, first + len(index)))
    rows = array[first : first + len(index)] if consecutive else array[index]
    return rows.astype(kept(array.dtype), copy=False)


def _pictures(array: PyTree[np.ndarray]) -> list[np.ndarray]:
    """What of the examples is pictures: the one array, or of several inputs the bytes."""
    if isinstance(array, np.ndarray):
        return [array] if array.ndim > 2 else []
    return [a for a in jax.tree.leaves(array) if a.ndim > 3 and a.dtype == np.uint8]


def check_disjoint(splits: Mapping[str, Classes], shared: Sequence[tuple[str, str]] = ()) -> None:
    """Refuse splits that have classes in common.

    Raises:
        DataError: naming the classes.
    """
    for a, b in combinations([split for split in NAMES if split in splits], 2):
        common = sorted(set(splits[a]) & set(splits[b]))
        if common and (a, b) not in shared:
            some = ", ".join(common[:5]) + (", ..." if len(common) > 5 else "")
            raise DataError(
                f"the {a} and {b} splits share {len(common)} classes ({some}); "
                "every class must belong to one split"
            )


def split_by_fraction(
    names: Sequence[str], fractions: Sequence[float], seed: int
) -> dict[str, list[str]]:
    """Classes split at random: sorted, shuffled by `random.Random(seed)`, cut in three.

    Raises:
        DataError: if the fractions are not three that sum to at most 1, or the seed is no integer.
    """
    if not isinstance(seed, int | np.integer):
        raise DataError(f"seed={seed!r}; expected an integer, which names the split")
    try:
        sound = all(part >= 0 for part in fractions) and sum(fractions) <= 1 + 1e-6
    except TypeError:
        sound = False
    if not sound or len(fractions) != 3:
        raise DataError(
            f"splits={fractions!r}; expected the fractions of the classes for train, val and "
            "test, three numbers that sum to at most 1"
        )
    shuffled = sorted(names)
    random.Random(int(seed)).shuffle(shuffled)
    ends = [round(sum(fractions[:i]) * len(shuffled)) for i in range(4)]
    return {split: sorted(shuffled[a:b]) for split, a, b in zip(NAMES, ends, ends[1:])}


def _check_sizes(
    splits: Mapping[str, Classes], design: Mapping[str, Design], leave_out: str
) -> None:
    small = [
        (split, name, len(rows))
        for split, classes in splits.items()
        for name, rows in classes.items()
        if len(rows) < design[split].shot + design[split].query
    ]
    if not small:
        return
    split, name, count = small[0]
    how = design[split]
    listed = ", ".join(f"{shown(name)} ({count})" for _, name, count in small[:MOST_LISTED])
    more = len(small) - MOST_LISTED
    raise DataError(
        f"class {shown(name)} of the {split} split has {count} examples, but shot + query = "
        f"{how.shot} + {how.query} were asked; "
        + (f"{len(small)} classes have too few: {listed}; " if len(small) > 1 else "")
        + (f"and {more} more; " if more > 0 else "")
        + f"lower shot or query, or {leave_out}"
    )


def _check(array: PyTree[np.ndarray], split: str, classes: Classes, design: Design) -> None:
    times = 4 if design.rotations == "classes" else 1
    if design.way > times * len(classes):
        raise DataError(
            f"way={design.way}, but the {split} split has {times * len(classes)} classes; "
            "lower way or give the split more classes"
        )
    leaves = jax.tree.leaves(array)
    single = isinstance(array, np.ndarray)
    square = single and array.ndim == 4 and array.shape[1] == array.shape[2]
    if design.rotations != "none" and not square:
        raise DataError(
            f"rotations={design.rotations!r} of examples of shape "
            f"{' and '.join(str(a.shape[1:]) for a in leaves)}; expected one array of square "
            "images, (side, side, channels)"
        )
    if design.invert and not any(a.dtype == np.uint8 for a in leaves):
        raise DataError(
            f"invert=True of examples of type {' and '.join(str(a.dtype) for a in leaves)}; only "
            "images of bytes, uint8, can be inverted"
        )

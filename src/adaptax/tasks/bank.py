"""From an array and lists of classes to three distributions of episodes."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from itertools import combinations, pairwise
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int, PyTree, Shaped

from adaptax.task import Splits
from adaptax.tasks.content import Checksums, row_checksums, warn_of_shared
from adaptax.tasks.episodes import Design, Details, Episodes, HostRows, Rotations, kept
from adaptax.tasks.files import DataError
from adaptax.text import shown

MEMORY_BUDGET = 4 * 2**30
"""Data sets beyond this many bytes stay on the host."""

NAMES = ("train", "val", "test")

SPLITS = (0.64, 0.16, 0.2)
"""Fractions of the classes for train, val and test, where there are enough of them."""

QUERY, LEAST_QUERY = 15, 5
"""Queries a class if they are not given, and how few they may become where classes are small."""

MOST_LISTED = 100
"""Classes that an error lists."""

Classes = Mapping[str, Int[np.ndarray, " _"]]
"""Rows of every class, by the name of the class."""


def designs(
    way: int,
    shot: int,
    query: int | None,
    train_shot: int | None,
    train_query: int | None,
    rotations: tuple[Rotations, Rotations] = ("none", "none"),
    **treatment: Any,
) -> dict[str, Design]:
    """Return the designs of the three splits; the train split may use other counts.

    Args:
        way: classes an episode.
        shot: support examples a class.
        query: query examples a class; `None` for `QUERY`.
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
        if number is None and what not in ("way", "shot"):
            continue
        if not isinstance(number, int | np.integer):
            raise DataError(f"{what}={number!r}; expected an integer, at least {least}")
        if number < least:
            raise DataError(f"{what}={number}; expected at least {least}")
    known = get_args(Rotations)
    pair = isinstance(rotations, tuple | list) and len(rotations) == 2
    if not pair or not all(isinstance(each, str) and each in known for each in rotations):
        raise DataError(
            f"rotations={rotations!r}; expected two of {', '.join(known)}: one for meta-training "
            'and one for validation and test, such as ("random", "none")'
        )
    query = QUERY if query is None else query
    in_training = (
        shot if train_shot is None else train_shot,
        query if train_query is None else train_query,
    )
    train = Design(way, *in_training, rotations[0], **treatment)
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
    """Return distributions of episodes over classes of one array.

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
    check_names("found the splits", splits)
    check_disjoint(splits, shared)
    _check_counts(splits, design, leave_out)
    leaves = jax.tree.leaves(array)
    for how in dict.fromkeys(design.values()):
        _check_treatment(array, leaves, how)
    rows = sum(len(r) for classes in splits.values() for r in classes.values())
    if not isinstance(memory_budget, int | float | np.integer):
        raise DataError(f"memory_budget={memory_budget!r}; expected a number of bytes")
    each = sum(math.prod(a.shape[1:]) * kept(a.dtype).itemsize for a in leaves)
    streamed = rows * each > memory_budget
    index = {split: np.concatenate(list(splits[split].values())) for split in NAMES}
    if checksums is not None or not streamed:
        for a in _pictures(array):
            sums = row_checksums(a) if checksums is None else checksums
            warn_of_shared(a, sums, index, name=name, names=names, shared=shared)

    def episodes(split: str) -> Episodes:
        rows, classes = index[split], splits[split]
        count = np.array([len(r) for r in classes.values()], np.int32)
        start = jnp.asarray(np.cumsum(count, dtype=np.int32) - count)
        if streamed:
            bank: Any = HostRows(array, rows)
        else:
            bank = jax.tree.map(lambda a: jnp.asarray(_take(a, rows)), array)
        return Episodes(
            bank=bank,
            start=start,
            count=jnp.asarray(count),
            design=design[split],
            split=split,
            name=name,
            classes=tuple(classes),
            details=details,
        )

    return Splits.of(episodes)


def _take(array: np.ndarray, index: np.ndarray) -> np.ndarray:
    """Return `array[index]` as it is kept, without a copy where the rows are consecutive."""
    first = int(index[0])
    consecutive = np.array_equal(index, np.arange(first, first + len(index)))
    rows = array[first : first + len(index)] if consecutive else array[index]
    return rows.astype(kept(array.dtype), copy=False)


def _pictures(array: PyTree[np.ndarray]) -> list[np.ndarray]:
    """Return what of the examples is pictures: the array, or of several inputs the bytes."""
    if isinstance(array, np.ndarray):
        return [array] if array.ndim > 2 else []
    return [a for a in jax.tree.leaves(array) if a.ndim > 3 and a.dtype == np.uint8]


def group(labels: np.ndarray, first: int = 0) -> dict[str, np.ndarray]:
    """Return the rows of every label, counted from `first`, in order of the labels."""
    values, where = np.unique(labels, return_inverse=True)
    order = np.argsort(where, kind="stable")
    ends = np.cumsum(np.bincount(where, minlength=len(values)))[:-1]
    return {str(value): rows + first for value, rows in zip(values, np.split(order, ends))}


def check_names(found: str, splits: Collection[str]) -> None:
    """Raise DataError unless these are train, val and test."""
    if set(splits) != set(NAMES):
        raise DataError(
            f"{found} {', '.join(sorted(splits)) or 'none'}; expected train, val and test"
        )


def check_disjoint(
    splits: Mapping[str, Collection[str]], shared: Sequence[tuple[str, str]] = ()
) -> None:
    """Raise DataError if splits have classes in common."""
    for a, b in combinations([split for split in NAMES if split in splits], 2):
        common = sorted(set(splits[a]) & set(splits[b]))
        if common and (a, b) not in shared:
            some = ", ".join(common[:5]) + (", ..." if len(common) > 5 else "")
            raise DataError(
                f"the {a} and {b} splits share {len(common)} classes ({some}); "
                "every class must belong to one split"
            )


def check_fractions(what: str, fractions: Sequence[float], of: str) -> None:
    """Raise DataError unless these are three numbers that sum to at most 1."""
    try:
        sound = all(part >= 0 for part in fractions) and sum(fractions) <= 1 + 1e-6
    except TypeError:
        sound = False
    if not sound or len(fractions) != 3:
        raise DataError(
            f"{what}={fractions!r}; expected the fractions of the {of} for train, val and test, "
            "three numbers that sum to at most 1"
        )


def cut(count: int, parts: Sequence[float | int], total: float | int = 1) -> dict[str, slice]:
    """Return where each split lies among so many things, of which it has `part / total`."""
    ends = [round(sum(parts[:i]) * count / total) for i in range(4)]
    return {split: slice(a, b) for split, (a, b) in zip(NAMES, pairwise(ends))}


def shuffled(
    names: Iterable[str], seed: int, parts: Sequence[float | int], total: float | int = 1
) -> dict[str, list[str]]:
    """Return the names of each split: sorted, shuffled by `random.Random(seed)`, and cut.

    Raises:
        DataError: if the seed is no integer.
    """
    if not isinstance(seed, int | np.integer):
        raise DataError(f"seed={seed!r}; expected an integer, which names the split")
    order = sorted(names)
    random.Random(int(seed)).shuffle(order)
    return {split: sorted(order[of]) for split, of in cut(len(order), parts, total).items()}


def settle(
    splits: Mapping[str, Classes],
    fractions: Sequence[float] | None,
    seed: int,
    query: int | None,
    designs: Callable[..., dict[str, Design]],
) -> tuple[Mapping[str, Classes], dict[str, Design], Details, list[tuple[str, str]]]:
    """Choose what the user left open: how many queries, and which classes are of which split.

    A class too small for `LEAST_QUERY` queries is told later, and does not make them fewer.
    Where `SPLITS` leave a split fewer classes than an episode has ways, validation and test get
    as many as they need; and where that leaves too few for training, validation draws from the
    training classes, and the test classes alone are new.

    Args:
        splits: rows of every class of every split, or of all classes under `""`.
        fractions: of the classes for train, val and test, if they were given.
        seed: of the split.
        query: queries a class; if `None`, `QUERY`, or as many as the smallest class leaves.
        designs: of this many queries.

    Returns:
        The splits, the designs, what a report says of it, and splits that have classes in common.
    """
    design = designs(query=query)
    if query is None:
        taken = max(how.shot for how in design.values())
        left = [len(rows) - taken for of in splits.values() for rows in of.values()]
        design = designs(query=min([QUERY, *(n for n in left if n >= LEAST_QUERY)]))
    if "" not in splits:
        return splits, design, (), []
    classes, given = splits[""], SPLITS if fractions is None else fractions
    check_fractions("splits", given, "classes")
    parts = shuffled(classes, seed, given)
    details: Details = (("splits", tuple(given)),)
    shared: list[tuple[str, str]] = []
    count, least = len(classes), -(-design["test"].way // _turned(design["test"]))
    if fractions is None and min(map(len, parts.values())) < least:
        test = min(max(least, len(parts["test"])), count // 2)
        val = max(least, len(parts["val"])) if count >= 2 * least + test else 0
        parts = shuffled(classes, seed, (count - val - test, val, test), count)
        how = f"{count - val - test} / {val or '–'} / {test} of {count} classes"
        if not val:
            parts["val"], shared = parts["train"], [("train", "val")]
            how += ", validation on those of training"
        details = (("splits", how),)
    found = {split: {name: classes[name] for name in of} for split, of in parts.items()}
    return found, design, (*details, ("split_seed", seed)), shared


def _turned(design: Design) -> int:
    """Return how many classes each class makes by rotation."""
    return 4 if design.rotations == "classes" else 1


def _check_counts(
    splits: Mapping[str, Classes], design: Mapping[str, Design], leave_out: str
) -> None:
    """Raise DataError, with every cure, if classes are too small or too few."""
    need = {split: design[split].shot + design[split].query for split in splits}
    sizes = {name: len(rows) for of in splits.values() for name, rows in of.items()}
    small: dict[str, str] = {}
    for split, of in splits.items():
        small |= {name: split for name in of if sizes[name] < need[split] and name not in small}
    ways = {split: _turned(design[split]) * len(of) for split, of in splits.items()}
    few = [split for split in splits if ways[split] < design[split].way]
    wrong, cures = [], []
    if small:
        (name, split), how = next(iter(small.items())), design[next(iter(small.values()))]
        wrong.append(
            f"class {shown(name)} of the {split} split has {sizes[name]} examples, but shot + "
            f"query = {how.shot} + {how.query} were asked"
        )
        if len(small) > 1:
            listed = ", ".join(f"{shown(n)} ({sizes[n]})" for n in list(small)[:MOST_LISTED])
            wrong.append(f"{len(small)} classes have too few: {listed}")
        if len(small) > MOST_LISTED:
            wrong.append(f"and {len(small) - MOST_LISTED} more")
        enough = sum(size >= max(need.values()) for size in sizes.values()) >= 2 * how.way
        cures.append("lower shot or query" + (f", or {leave_out}" if enough else ""))
        if min(sizes.values()) > max(design[split].shot for split in splits):
            cures.append(f"shot + query = {min(sizes.values())} fits every class")
    if few:
        said = [f"{split} split has {ways[split]} classes" for split in few]
        said[1:] = [each.removesuffix(" classes") for each in said[1:]]
        wrong.append(f"way={design[split].way}, but the {' and the '.join(said)}")
        fits = f" to {min(ways.values())}" if min(ways.values()) else ""
        cures.append(f"lower way{fits} or give the split more classes")
    if wrong:
        raise DataError("; ".join([*wrong, *cures]))


def _check_treatment(array: PyTree, leaves: Sequence[np.ndarray], design: Design) -> None:
    square = isinstance(array, np.ndarray) and array.ndim == 4 and len({*array.shape[1:3]}) == 1
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

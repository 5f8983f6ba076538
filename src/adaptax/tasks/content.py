"""What examples hold: checksums of them, and the same one in two splits."""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Mapping, Sequence
from itertools import combinations

import numpy as np
from jaxtyping import Int, Shaped, UInt32

from adaptax.text import shown

Checksums = UInt32[np.ndarray, " n"]


def row_checksums(array: Shaped[np.ndarray, "n ..."]) -> Checksums:
    """Return the CRC-32 of every row."""
    rows = np.ascontiguousarray(array).view(np.ndarray)
    return np.fromiter(map(zlib.crc32, rows), np.uint32, len(rows))


def warn_of_shared(
    array: Shaped[np.ndarray, "n ..."],
    sums: Checksums,
    splits: Mapping[str, Int[np.ndarray, " rows"]],
    *,
    name: str,
    names: Sequence[str] | None = None,
    shared: Sequence[tuple[str, str]] = (),
) -> None:
    """Warn if an example is in two splits, byte by byte the same.

    Args:
        array: all examples.
        sums: their checksums, by which the few pairs are found that are compared.
        splits: rows of every split.
        name: of the data set.
        names: of the examples.
        shared: pairs of splits that have examples in common on purpose.

    Warns:
        UserWarning: with counts and an example.
    """
    counts, example = [], ""
    for a, b in combinations(splits, 2):
        if (a, b) in shared:
            continue
        common = np.intersect1d(sums[splits[a]], sums[splits[b]])
        known: dict[int, list[int]] = {}
        for row in splits[a][np.isin(sums[splits[a]], common)].tolist():
            known.setdefault(int(sums[row]), []).append(row)
        found = [
            (same, row)
            for row in splits[b][np.isin(sums[splits[b]], common)].tolist()
            if (same := _equal(array, known[int(sums[row])], row)) is not None
        ]
        if found:
            counts.append(f"{len(found)} of {b} are in {a}")
            pair = [shown(names[row]) if names else f"row {row}" for row in found[0]]
            example = example or f"{pair[0]} and {pair[1]}"
    if counts:
        warnings.warn(
            f"the same picture is in two splits of {shown(name)}: {', '.join(counts)}, such as "
            f"{example}; scores on them are of what was trained on; remove one of each",
            stacklevel=4,
        )


def _equal(array: np.ndarray, rows: Sequence[int], row: int) -> int | None:
    """Return the first of these rows that equals another."""
    return next((other for other in rows if np.array_equal(array[other], array[row])), None)

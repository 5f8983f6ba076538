"""From rows and their groups to tasks, and from held-out tasks to the width of intervals."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import Int, Shaped

from ..task import Splits
from ..tasks.from_tasks import from_tasks
from .prior import LEAST, Adapted, Prior

SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
"""Of supports that held-out tasks are adapted to, two of each task, to calibrate by."""

FEWEST = 10
"""Supports of a size that tell enough of it."""

MOST = 64
"""Queries of an episode at most, in training and calibration."""


@dataclasses.dataclass(frozen=True)
class Rows:
    """Rows of all tasks.

    Args:
        x: inputs of the learner.
        y: numbers, or indices of classes.
        tasks: rows of every task, by its index.
    """

    x: Any
    y: Shaped[np.ndarray, " n"]
    tasks: Mapping[int, Int[np.ndarray, " _"]]

    @classmethod
    def of(cls, x: Any, y: np.ndarray, groups: np.ndarray) -> Rows:
        """Return rows by their groups."""
        order = np.argsort(groups, kind="stable")
        names, first = np.unique(groups[order], return_index=True)
        return cls(x, y, dict(zip(names.tolist(), np.split(order, first[1:]))))

    def inputs(self, at: np.ndarray) -> Any:
        """Return the inputs of some rows."""
        return jax.tree.map(lambda a: a[at], self.x)


def splits_of(
    rows: Rows,
    train: np.ndarray,
    held: np.ndarray,
    shot: int | tuple[int, int],
    seed: int,
    classes: Any,
) -> tuple[Splits, float, float]:
    """Return the tasks to train and to validate on, the spread of targets in them, and their mean.

    Args:
        rows: of all tasks.
        train: tasks to train on.
        held: tasks that are held out.
        shot: rows of a support, or the ends of a range.
        seed: names all randomness.
        classes: of a classification; `None` of a regression.

    Raises:
        ValueError: if no task has two rows.
    """
    y = rows.y if classes is not None else rows.y.astype(np.float64)
    low, high = (shot, shot) if isinstance(shot, int) else shot
    sizes = {name: len(of) for name, of in rows.tasks.items()}
    # Where most tasks are smaller, so are the supports; the others of that size are left out.
    low = min(low, max(int(np.median([sizes[name] for name in train.tolist()])) - 1, 1))
    used = [name for name in train.tolist() if sizes[name] > low]
    kept = [name for name in held.tolist() if sizes[name] > low] or used
    if not used:
        raise ValueError(
            f"n_samples={len(rows.y)} in {len(rows.tasks)} tasks, none of which has 2 rows or "
            "more, some to learn from and some to be judged on; give groups= that are larger"
        )
    if classes is not None:
        seen = np.unique(np.concatenate([y[rows.tasks[name]] for name in {*used, *kept}]))
        if len(seen) < len(classes):
            raise ValueError(
                f"{len(classes) - len(seen)} of the {len(classes)} classes are only in tasks of "
                f"{low} rows or fewer; leave these tasks out"
            )
    spread, centre = 1.0, 0.0
    if classes is None:
        means = np.array([y[rows.tasks[name]].mean() for name in used])
        inside = np.array([y[rows.tasks[name]].var() for name in used])
        spread, centre = float(np.sqrt(inside.mean())) or 1.0, float(means.mean())
    find = lambda names: [  # noqa: E731
        (rows.inputs(of), _column(y[of], spread, centre, classes))
        for of in (rows.tasks[name] for name in names)
    ]
    # With too few tasks to hold some out, the same ones are validated on, by other rows.
    parts = {"train": find(used), "val": find(kept), "test": find(kept)}
    names = {s: [f"{s} {i}" for i in range(len(of))] for s, of in parts.items()}
    tasks = {n: one for s, of in parts.items() for n, one in zip(names[s], of)}
    found = from_tasks(
        tasks,
        shot=(low, max(high, low)),
        query=MOST,
        splits=names,
        kind="regression" if classes is None else "classification",
        standardise="support" if classes is None else "none",
        least_spread=LEAST,
        seed=seed,
    )
    return found, spread, centre


def _column(y: np.ndarray, spread: float, centre: float, classes: Any) -> np.ndarray:
    if classes is not None:
        return y.astype(np.int32)
    return ((y - centre) / spread).astype(np.float32)[:, None]


def calibrated(prior: Prior, rows: Rows, held: np.ndarray, seed: int) -> Prior:
    """Return a prior with the noise and the residuals of held-out tasks, by sizes of supports.

    Args:
        prior: that is trained.
        rows: of all tasks.
        held: tasks that are held out.
        seed: names the supports.
    """
    rng = np.random.default_rng(seed)
    noise, residuals, sizes, most = [], [], [], 0
    for size in SIZES:
        twice = [(i, name) for i, name in enumerate(held.tolist()) for _ in range(2)]
        both = [(i, rng.permutation(rows.tasks[name])) for i, name in twice]
        both = [(i, own) for i, own in both if len(own) > size]
        task, drawn = [i for i, _ in both], [own for _, own in both]
        most = max(most, len(drawn))
        if not drawn or len(drawn) < min(FEWEST, most / 2):
            break
        known, asked = [own[:size] for own in drawn], [own[size : size + MOST] for own in drawn]
        adapted = prior.adapt([(rows.inputs(of), rows.y[of]) for of in known])
        find = _sets if prior.classes is not None else _intervals
        width, missed = find(
            adapted, [rows.inputs(of) for of in asked], [rows.y[of] for of in asked]
        )
        sizes.append(size)
        noise.append(width)
        residuals.append(_by_task(task, missed, len(held)))
    if not sizes:
        return prior
    return dataclasses.replace(
        prior,
        sizes=np.array(sizes),
        noise=np.array(noise, float),
        residuals=np.stack(residuals),
    )


def _by_task(task: list[int], missed: list[np.ndarray], count: int) -> np.ndarray:
    """Return the residuals of two draws of every task in a row of its own, NaN where are fewer."""
    table = np.full((count, 2 * MOST), np.nan, np.float32)
    filled = np.zeros(count, int)
    for i, own in zip(task, missed, strict=True):
        table[i, filled[i] : filled[i] + len(own)] = own
        filled[i] += len(own)
    return table


def _sets(adapted: Adapted, x: list[Any], y: list[np.ndarray]) -> tuple[float, list[np.ndarray]]:
    """Return 1 − p of the true classes."""
    return 1.0, [1 - p[np.arange(len(of)), of] for p, of in zip(adapted.probabilities(x), y)]


def _intervals(
    adapted: Adapted, x: list[Any], y: list[np.ndarray]
) -> tuple[float, list[np.ndarray]]:
    """Return the noise that an ensemble's disagreement leaves, and residuals in units of both."""
    still = dataclasses.replace(adapted.prior, noise=np.zeros_like(adapted.prior.noise))
    found = dataclasses.replace(adapted, prior=still).numbers(x)
    units = [scale for _, scale in adapted.standards]
    parts = [((of - f) / unit, d / unit) for of, (f, d), unit in zip(y, found, units)]
    gaps, spread = (np.concatenate(of) for of in zip(*parts))
    # A few targets that are far off say little of the others.
    noise = float(np.sqrt(max(np.mean(np.minimum(gaps**2, 25.0) - spread**2), 1e-4)))
    return noise, [np.abs(gap) / np.sqrt(own**2 + noise**2) for gap, own in parts]

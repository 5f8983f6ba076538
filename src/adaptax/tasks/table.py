"""Tables: every row an example, a column that says of which task it is, and others to predict."""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Int, Shaped

from adaptax.task import Splits
from adaptax.tasks import bank, frames, preparation
from adaptax.tasks.files import DataError
from adaptax.tasks.frames import Columns
from adaptax.tasks.from_tasks import from_tasks
from adaptax.tasks.layout import split_named
from adaptax.tasks.preparation import Encoding, Preparation
from adaptax.tasks.ragged import Shot
from adaptax.text import shown

Standard = Literal["support", "train", "none"]
SHARES = (0.7, 0.15, 0.15)
"""Of the tasks, for training, validation and test."""

MOST_CLASSES = 1000
LEAST = 0.2
"""Smallest spread of a support, as a share of the usual one within a task."""


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A table as tasks, before anything is drawn from it.

    Args:
        preparation: what made inputs and targets.
        tasks: inputs and targets of every task, by name.
        splits: names of the tasks of every split.
        order: times of every task's rows, by name, if there is such a column.
        dropped: rows without a target.
    """

    preparation: Preparation
    tasks: Mapping[str, tuple[Any, Any]]
    splits: Mapping[str, Sequence[str]]
    order: Mapping[str, np.ndarray] | None
    dropped: int


def table(
    source: Any,
    task: str,
    target: Columns,
    *,
    shot: Shot = (4, 64),
    query: int | None = None,
    features: Columns = (),
    ignore: Columns = (),
    categories: Columns = (),
    encoding: Encoding = "onehot",
    kind: str = "auto",
    splits: Sequence[float] | Mapping[str, Sequence[str]] | None = None,
    split: str | None = None,
    order: str | None = None,
    standardise: str = "support",
    least_spread: float | None = None,
    scale: bool = True,
    seed: int = 0,
    fitted: Preparation | str | os.PathLike[str] | None = None,
) -> Splits:
    """Return the tasks of a table: the rows that have the same value in one of its columns.

        tasks = ax.tasks.table("assays.parquet", task="assay", target="activity")

    Tasks may be of any size. The preparation of inputs (see `adaptax.tasks.Preparation`) is fitted
    on the rows of the meta-training tasks and is the `preparation` of the result. Rows without a
    target are left out; of several targets, single ones may be missing.

    Args:
        source: a pandas, Polars or PyArrow data frame, a dict of columns, or the path of a CSV,
            Parquet or Arrow file.
        task: the column that names the task of a row.
        target: the column to predict, or several of numbers: names or patterns, such as `"y_*"`.
        shot: support rows: a number, the ends of a range from which every episode draws one, or a
            share below 1.
        query: query rows; all others if `None`.
        features: the columns that inputs are made of, names or patterns; all others if empty.
        ignore: columns to leave out.
        categories: columns that are categories although they look like numbers.
        encoding: of categories: one input for each value (`"onehot"`), or its index for an
            embedding: x is then `{"numbers": (n, width), "categories": (n, columns)}`.
        kind: `"regression"`, `"classification"`, or by the type of the target.
        splits: shares of the tasks for train, val and test, or the names of their tasks; 70, 15 and
            15 % if `None`.
        split: a column that says of every task whether it is of train, val or test, instead.
        order: a column of times or numbers: the support of a task is of earlier rows than its
            queries.
        standardise: numbers to predict minus mean over spread of the task's `"support"`, or of all
            training tasks (`"train"`), or not (`"none"`).
        least_spread: smaller spreads of a support count as this, in units of the target; a fifth of
            the usual spread within a training task if `None`.
        scale: standardise the numbers among the features.
        seed: of the split of the tasks.
        fitted: a preparation to apply instead of fitting one, or the file or run folder of one.

    Raises:
        FileNotFoundError: if there is no such file.
        DataError: naming the column that is missing or not as it has to be.
        ModuleNotFoundError: if the extra `table` is not installed.
    """
    if standardise not in ("support", "train", "none"):
        raise DataError(f"standardise={standardise!r}; expected one of support, train, none")
    own = prepared(
        source,
        task,
        target,
        features=features,
        ignore=ignore,
        categories=categories,
        encoding=encoding,
        kind=kind,
        splits=splits,
        split=split,
        order=order,
        scale=scale,
        standardise=standardise,
        least_spread=least_spread,
        seed=seed,
        fitted=fitted,
    )
    whole = isinstance(shot, float) and shot >= 1 and shot.is_integer()
    found = from_tasks(
        own.tasks,
        shot=int(shot) if isinstance(shot, float) and whole else shot,
        query=query,
        splits=own.splits,
        order=own.order,
        kind="regression" if own.preparation.classes is None else "classification",
        standardise="support" if own.preparation.least else "none",
        least_spread=own.preparation.least or 1.0,
        seed=seed,
        name="table",
    )
    return dataclasses.replace(found, preparation=own.preparation)


def prepared(
    source: Any,
    task: str,
    target: Columns,
    *,
    features: Columns = (),
    ignore: Columns = (),
    categories: Columns = (),
    encoding: Encoding = "onehot",
    kind: str = "auto",
    splits: Sequence[float] | Mapping[str, Sequence[str]] | None = None,
    split: str | None = None,
    order: str | None = None,
    scale: bool = True,
    standardise: str = "support",
    least_spread: float | None = None,
    seed: int = 0,
    fitted: Preparation | str | os.PathLike[str] | None = None,
) -> Prepared:
    """Return a table as tasks; the arguments are those of `table`."""
    frame = read(source)
    names = list(frame.columns)
    targets = frames.choose(names, target, "target")
    rows = preparation.rows_of(frame, task)
    parts = _splits(frame, rows, splits, split, seed)
    if fitted is None:
        numbers, classes = _targets(frame, targets, kind)
        apart = {task, *targets, *filter(None, (split, order))}
        chosen = _features(names, features, ignore, apart)
        training = [rows[name] for name in parts["train"]]
        units = _units(frame, targets, training, standardise, least_spread) if numbers else {}
        own = preparation.fit(
            frame,
            chosen,
            np.concatenate(training),
            task=task,
            target=targets,
            order=order,
            classes=classes,
            categories=frames.choose(chosen, categories, "categories") if categories else (),
            encoding=encoding,
            standardise=scale,
            **units,
        )
    else:
        own = fitted if isinstance(fitted, Preparation) else load(fitted)
        if own.task != task or list(own.target) != targets:
            raise DataError(
                f"the preparation is of {', '.join(own.target)} by {own.task}, not of "
                f"{', '.join(targets)} by {task}"
            )
    x, y = own.inputs(frame, quiet=fitted is None), own.targets(frame)
    if own.classes is not None and (n := len(np.unique(y[y >= 0]))) < len(own.classes):
        raise DataError(
            f"the table has {n} of the {len(own.classes)} classes of training, "
            f"{', '.join(map(shown, own.classes[:10]))}; give one with all of them"
        )
    there = y >= 0 if own.classes is not None else ~np.isnan(y).all(axis=1)
    rows = {name: of[there[of]] for name, of in rows.items()}
    times = None if order is None else _times(frame, order, there)
    part = lambda of: {n: a[of] for n, a in x.items()} if isinstance(x, dict) else x[of]  # noqa: E731
    return Prepared(
        own,
        {name: (part(of), y[of]) for name, of in rows.items()},
        parts,
        None if times is None else {name: times[of] for name, of in rows.items()},
        int(len(there) - there.sum()),
    )


def kind_of(source: Any, target: Columns) -> str:
    """Return `"classification"` for a target of text or truth values, else `"regression"`."""
    frame = read(source)
    names = frames.choose(list(frame.columns), target, "target")
    return "regression" if len(names) > 1 else _kind(frame[names[0]], names[0])


def load(path: str | os.PathLike[str]) -> Preparation:
    """Return the preparation in a file, or in a run folder."""
    where = Path(path)
    return Preparation.load(where / preparation.FILE if where.is_dir() else where)


def read(source: Any) -> Any:
    """Return a table as a narwhals data frame; of the same file again, the one read before."""
    if isinstance(source, str | os.PathLike) and Path(source).expanduser().is_file():
        state = Path(source).expanduser().stat()
        return _kept(os.fspath(source), state.st_size, state.st_mtime_ns)
    return frames.frame_of(source)


@lru_cache(maxsize=1)
def _kept(path: str, size: int, time: int) -> Any:
    return frames.frame_of(path)


def _kind(column: Any, name: str) -> str:
    values = column.to_list()
    text = all(isinstance(v, str | bool) for v in values if v is not None and v == v)
    return "classification" if text else "regression"


def _features(
    names: Sequence[str], features: Columns, ignore: Columns, apart: set[str]
) -> list[str]:
    """Return the columns that inputs are made of.

    Raises:
        DataError: if there are none, or one that is the target or the like.
    """
    if features and (both := apart.intersection(frames.choose(names, features, "features"))):
        raise DataError(
            f"features= chooses {', '.join(map(shown, sorted(both)))}, which names the tasks, is "
            "to be predicted, or says the split or the order; leave it out"
        )
    left_out = set(frames.choose(names, ignore, "ignore")) if ignore else set()
    chosen = frames.choose(names, features, "features") if features else names
    found = [name for name in chosen if name not in left_out | apart]
    if not found:
        raise DataError(f"no column is left for inputs; {frames.there_are(names)}")
    return found


def _targets(frame: Any, names: Sequence[str], kind: str) -> tuple[bool, list[str] | None]:
    """Return whether targets are numbers, and the classes where they are not.

    Raises:
        DataError: if they are missing, all alike, or not of the kind that was asked for.
    """
    if kind not in ("auto", "regression", "classification"):
        raise DataError(f"kind={kind!r}; expected one of auto, regression, classification")
    auto = kind == "auto"
    if auto:
        kind = "regression" if len(names) > 1 else _kind(frame[names[0]], names[0])
    if kind == "classification":
        if len(names) > 1:
            raise DataError(
                f"a classification has one target, not {len(names)} ({', '.join(names[:5])})"
            )
        return False, _classes(frame, names[0])
    values = preparation.targets_of(frame, names)
    for name, column in zip(names, values.T):
        seen = np.unique(column[~np.isnan(column)])
        if len(seen) == 1:
            raise DataError(
                f"target {shown(name)!r} is {seen[0]:g} in every row; there is nothing to predict"
            )
        if auto and seen.tolist() == [0, 1]:
            warnings.warn(
                f'target {shown(name)!r} is 0 or 1, and taken for a number; say kind="regression" '
                'if it is one, or kind="classification"',
                stacklevel=4,
            )
    return True, None


def _units(
    frame: Any,
    names: Sequence[str],
    training: Sequence[Int[np.ndarray, " _"]],
    standardise: str,
    least_spread: float | None,
) -> dict[str, Any]:
    """Return the units of the targets: of all training tasks, or of the spread within one.

    Raises:
        DataError: if the smallest spread is not positive.
    """
    y = preparation.targets_of(frame, names)
    if standardise == "none":
        return {}
    if standardise == "train":
        centre, spread = preparation.moments(y[np.concatenate(training)])
        return {"centre": centre, "spread": spread}
    if least_spread is not None:
        if not least_spread > 0:
            raise DataError(f"least_spread={least_spread}; expected a spread above 0")
        return {"least": float(least_spread)}
    # The mean variance within a task, of each target by itself.
    parts = [preparation.moments(y[of]) for of in training if len(of) > 1]
    parts = parts or [preparation.moments(y[np.concatenate(training)])]
    centre = np.mean([mean for mean, _ in parts], axis=0)
    spread = np.sqrt(np.mean([scale**2 for _, scale in parts], axis=0))
    return {"centre": centre, "spread": spread, "least": LEAST}


def _classes(frame: Any, name: str) -> list[str]:
    found = frames.words(frame[name])
    seen = sorted({value for value in found if value is not None})
    if len(seen) < 2:
        said = f"{shown(seen[0])} in every row" if seen else f"missing in all {len(found)} rows"
        raise DataError(f"target {shown(name)!r} is {said}; expected two classes or more")
    if len(seen) > MOST_CLASSES:
        raise DataError(
            f"target {shown(name)!r} has {len(seen):,} classes; expected {MOST_CLASSES} at most, "
            'or kind="regression" for numbers'
        )
    # Numbers in their own order.
    return sorted(seen, key=float) if all(map(frames.is_number, seen)) else seen


def _times(frame: Any, name: str, there: Shaped[np.ndarray, " n"]) -> Shaped[np.ndarray, " n"]:
    """Return the times of rows as numbers.

    Raises:
        DataError: if there is no such column, it is neither dates nor numbers, or has gaps.
    """
    (name,) = frames.choose(list(frame.columns), [name], "order")
    column, kind = frame[name], frames.kind_of(frame[name], name)
    if kind == "category":
        raise DataError(f"order={shown(name)!r} is a column of text; expected dates or numbers")
    found = frames.numbers(column, name) if kind == "number" else frames.date_parts(column)[:, 0]
    if gaps := int(np.isnan(found[there]).sum()):
        raise DataError(f"order={shown(name)!r} is empty in {gaps} rows; fill it in")
    return found


def _splits(
    frame: Any,
    rows: Mapping[str, Int[np.ndarray, " _"]],
    splits: Sequence[float] | Mapping[str, Sequence[str]] | None,
    split: str | None,
    seed: int,
) -> Mapping[str, Sequence[str]]:
    """Return the names of the tasks of every split.

    Raises:
        DataError: if tasks are of two splits or of none, or a split has none.
    """
    if split is not None:
        if splits is not None:
            raise DataError("splits= and split= both say which tasks are of which split; give one")
        found = _splits_by(frame, rows, split)
    elif isinstance(splits, Mapping):
        found = {name: [str(task) for task in of] for name, of in splits.items()}
        unknown = sorted({task for of in found.values() for task in of} - rows.keys())
        if unknown or found.keys() != set(bank.NAMES):
            said = f"tasks that are not there, {', '.join(map(shown, unknown[:5]))}"
            raise DataError(
                f"splits= names {said if unknown else ', '.join(found) or 'nothing'}; expected "
                "the names of tasks for each of train, val and test"
            )
        bank.check_disjoint(found)
    else:
        shares = SHARES if splits is None else tuple(splits)
        bank.check_fractions("splits", shares, "tasks")
        names = [*rows]
        order = np.random.default_rng(seed).permutation(len(names))
        held = [max(round(share * len(names)), 1) for share in shares[1:]]
        first = min(round(shares[0] * len(names)), len(names) - sum(held))
        ends = np.cumsum([first, *held])
        parts = [order[a:b] for a, b in zip([0, *ends], ends)]
        found = {s: [names[i] for i in sorted(of)] for s, of in zip(bank.NAMES, parts)}
    if bare := [name for name in bank.NAMES if not found.get(name)]:
        raise DataError(
            f"{len(rows)} tasks leave none for {' and '.join(bare)}; expected one or more for each "
            "of train, val and test"
        )
    return found


def _splits_by(
    frame: Any, rows: Mapping[str, Int[np.ndarray, " _"]], split: str
) -> dict[str, list[str]]:
    (split,) = frames.choose(list(frame.columns), [split], "split")
    said = np.array([value or "" for value in frames.words(frame[split])], dtype=np.str_)
    found: dict[str, list[str]] = {name: [] for name in bank.NAMES}
    for task, of in rows.items():
        words = sorted(set(said[of].tolist()))
        own = split_named(words[0])
        if len(words) > 1 or own is None:
            raise DataError(
                f"column {shown(split)!r} says {' and '.join(map(shown, words[:3])) or 'nothing'} "
                f"of task {shown(task)}; expected one of train, val and test for every task"
            )
        found[own].append(task)
    return found

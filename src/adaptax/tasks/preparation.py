"""What makes inputs and targets of the rows of a table: fitted once, saved, applied ever after.

Everything is fitted on the rows of the meta-training tasks alone. What is kept are numbers and
names, in one safetensors file with its JSON header, so that a run folder holds no pickle; that is
why scikit-learn's transformers, whose only saved form is one, are not used here.
"""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from adaptax import io
from adaptax.tasks import frames
from adaptax.tasks.files import DataError
from adaptax.text import shown

Encoding = Literal["onehot", "embedding"]
FILE = "preparation.safetensors"
"""Its name in a run folder."""

MOST_LEVELS = 32
"""Inputs that a category has at most by one-hot coding; rarer values share the last one."""

MISSING = None
"""The level of a category that stands for a missing value."""

Inputs = Float[np.ndarray, "n width"] | dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True, eq=False)
class Preparation:
    """What makes inputs and targets of the rows of a table.

    Numbers are standardised; a date becomes `adaptax.tasks.frames.DATE_PARTS`; a column with gaps
    in training has one more input that says where they are, and the mean in them. A category is
    one input for each of its `levels` (`"onehot"`), all of them 0 for a value that training had
    not, or its index, 0 for such a value (`"embedding"`).

    Args:
        kinds: `"number"`, `"date"` or `"category"` of every column, by name.
        levels: values of every category, the most frequent first; `None` is a missing one.
        encoding: of categories.
        mean: of every number and every part of a date.
        scale: likewise.
        low: smallest value of every number in training.
        high: largest, likewise.
        gaps: whether a number or a date had gaps in training.
        task: column of the tasks' names.
        target: columns of the targets.
        order: column of the order in which the rows came, if any.
        classes: of a classification, in the order of their labels; `None` of a regression.
        centre: subtracted from every target.
        spread: by which it is divided then.
        least: of the spread by which the targets of a task's support are divided, the smallest
            that counts, in these units; 0 where the support is not asked.
        others: columns that no input is made of.
    """

    kinds: Mapping[str, str]
    levels: Mapping[str, Sequence[str | None]]
    encoding: Encoding
    mean: Float[np.ndarray, " parts"]
    scale: Float[np.ndarray, " parts"]
    low: Float[np.ndarray, " numbers"]
    high: Float[np.ndarray, " numbers"]
    gaps: Bool[np.ndarray, " columns"]
    task: str
    target: Sequence[str]
    order: str | None
    classes: Sequence[str] | None
    centre: Float[np.ndarray, " targets"]
    spread: Float[np.ndarray, " targets"]
    least: float
    others: Sequence[str]

    @property
    def width(self) -> int:
        """Numbers that an input has, indices of categories not counted."""
        one_hot = self.encoding == "onehot"
        return len(self.mean) + int(self.gaps.sum()) + one_hot * sum(map(len, self.levels.values()))

    @property
    def sizes(self) -> tuple[int, ...]:
        """Indices that every category has, for embeddings; none by one-hot coding."""
        if self.encoding == "onehot":
            return ()
        return tuple(len(levels) + 1 for levels in self.levels.values())

    def inputs(self, table: Any, *, quiet: bool = False) -> Inputs:
        """Return the inputs of rows, `(n, width)`, and with embeddings `{"numbers", "categories"}`.

        Args:
            table: see `adaptax.tasks.frames.frame_of`.
            quiet: warn neither of further columns, nor of values that training would not expect.

        Raises:
            DataError: if columns are missing or of another type than in training.
        """
        frame = frames.frame_of(table)
        _need(frame.columns, self.kinds, "features")
        values = {name: _numbers(frame, name, kind) for name, kind in self._parts()}
        if not quiet:
            self._warn(frame, values)
        columns = _joined(values.values(), len(frame))
        standard = (columns - self.mean) / self.scale
        flags = [np.isnan(v[:, :1]) for v, gap in zip(values.values(), self.gaps) if gap]
        found = [np.nan_to_num(standard), *flags]
        known = {n: _indices(frame, n, of) for n, of in self.levels.items()}
        if self.encoding == "embedding":
            count = np.zeros((len(frame), 0), np.int32)
            categories = np.stack([*known.values()], axis=1) if known else count
            return {"numbers": _single(found), "categories": categories.astype(np.int32)}
        found += [np.eye(len(self.levels[n]) + 1)[i][:, 1:] for n, i in known.items()]
        return _single(found)

    def targets(self, table: Any) -> Shaped[np.ndarray, "n ..."]:
        """Return standardised targets, `(n, targets)` with NaN for gaps, or labels, `(n,)`.

        A missing label is −1.

        Args:
            table: see `adaptax.tasks.frames.frame_of`.

        Raises:
            DataError: if columns are missing, or a class is none of training's.
        """
        frame = frames.frame_of(table)
        _need(frame.columns, self.target, "targets")
        if self.classes is None:
            return ((targets_of(frame, self.target) - self.centre) / self.spread).astype(np.float32)
        index = {name: i for i, name in enumerate(self.classes)}
        found = frames.words(frame[self.target[0]])
        if new := sorted({value for value in found if value is not None and value not in index}):
            raise DataError(
                f"column {shown(self.target[0])!r} has classes that training did not have, "
                f"{', '.join(map(shown, new[:5]))}; expected {', '.join(map(shown, self.classes))}"
            )
        return np.array([-1 if v is None else index[v] for v in found], np.int32)

    def rows(self, table: Any) -> dict[str, Int[np.ndarray, " _"]]:
        """Return the rows of every task by its name."""
        frame = frames.frame_of(table)
        return rows_of(frame, self.task)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it to a safetensors file."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        arrays = {n: v for n, v in fields.items() if isinstance(v, np.ndarray)}
        rest: dict[str, Any] = {n: v for n, v in fields.items() if n not in arrays}
        rest["levels"] = {name: list(levels) for name, levels in self.levels.items()}
        io.save(path, arrays, version=1, **rest)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Preparation:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it is damaged or no preparation.
        """
        arrays, metadata = io.read(path)
        names = {field.name for field in dataclasses.fields(cls)}
        if metadata.pop("version", None) != 1 or arrays.keys() | metadata.keys() != names:
            raise ValueError(f"{path} holds no preparation of a table; train the run again")
        fields: dict[str, Any] = {**arrays, **metadata}
        return cls(**fields)

    def _parts(self) -> list[tuple[str, str]]:
        return [(name, kind) for name, kind in self.kinds.items() if kind != "category"]

    def _warn(self, frame: Any, values: Mapping[str, np.ndarray]) -> None:
        """Warn of further columns, numbers far out of the range of training, and new gaps."""
        own = {self.task, *self.target, self.order, *self.kinds, *self.others}
        if extra := [name for name in frame.columns if name not in own]:
            warnings.warn(
                f"the table has columns that training had not, which are left out: "
                f"{', '.join(map(shown, extra[:5]))}{', …' if len(extra) > 5 else ''}",
                stacklevel=4,
            )
        plain = [name for name, kind in self._parts() if kind == "number"]
        for name, low, high in zip(plain, self.low, self.high):
            seen = values[name][~np.isnan(values[name])]
            reach = high - low or abs(high) or 1.0
            far = (seen < low - reach) | (seen > high + reach)
            if far.any():
                warnings.warn(
                    f"column {shown(name)!r}: {far.sum()} of {len(seen)} values are far out of the "
                    f"range of training, {low:g} to {high:g}, the farthest "
                    f"{seen[np.argmax(np.abs(seen - (low + high) / 2))]:g}; is it in another unit?",
                    stacklevel=4,
                )
        for (name, _), gap in zip(self._parts(), self.gaps):
            if not gap and (count := int(np.isnan(values[name][:, 0]).sum())):
                warnings.warn(
                    f"column {shown(name)!r} has {count} gaps, and had none in training; the mean "
                    "stands for them",
                    stacklevel=4,
                )


def fit(
    frame: Any,
    features: Sequence[str],
    rows: Int[np.ndarray, " rows"],
    *,
    task: str,
    target: Sequence[str],
    order: str | None = None,
    classes: Sequence[str] | None = None,
    categories: Sequence[str] = (),
    encoding: Encoding = "onehot",
    standardise: bool = True,
    centre: Float[np.ndarray, " targets"] | None = None,
    spread: Float[np.ndarray, " targets"] | None = None,
    least: float = 0.0,
) -> Preparation:
    """Fit a preparation on some rows of a table.

    Args:
        frame: a narwhals data frame.
        features: its columns that inputs are made of.
        rows: of the meta-training tasks.
        task: column of the tasks' names.
        target: columns of the targets.
        order: column of the order in which the rows came.
        classes: of a classification.
        categories: columns that are categories whatever their type.
        encoding: of categories.
        standardise: numbers; else they stay as they are.
        centre: of the targets.
        spread: of the targets.
        least: spread of the targets of a support.

    Raises:
        DataError: if a column holds what no input can be made of.
    """
    kinds = {
        name: "category" if name in categories else frames.kind_of(frame[name], name)
        for name in features
    }
    values = {n: _numbers(frame, n, k)[rows] for n, k in kinds.items() if k != "category"}
    columns = _joined(values.values(), len(rows))
    angles = np.concatenate(
        [np.arange(v.shape[1]) > 0 for v in values.values()] or [np.zeros(0, bool)]
    )
    kept = angles if standardise else np.ones(len(angles), bool)
    mean, scale = moments(columns)
    numbers = [values[name][:, 0] for name, kind in kinds.items() if kind == "number"]
    low, high = np.array([_ends(v) for v in numbers], float).reshape(-1, 2).T
    return Preparation(
        kinds=kinds,
        levels={n: _levels(frame[n], rows, encoding) for n, k in kinds.items() if k == "category"},
        encoding=encoding,
        mean=np.where(kept, 0.0, mean),
        scale=np.where(kept, 1.0, scale),
        low=np.ascontiguousarray(low),
        high=np.ascontiguousarray(high),
        gaps=np.array([bool(np.isnan(v).any()) for v in values.values()], bool),
        task=task,
        target=list(target),
        order=order,
        classes=None if classes is None else list(classes),
        centre=np.zeros(len(target)) if centre is None else centre,
        spread=np.ones(len(target)) if spread is None else spread,
        least=least,
        others=[name for name in frame.columns if name not in kinds],
    )


def targets_of(frame: Any, names: Sequence[str]) -> Float[np.ndarray, "n targets"]:
    """Return the columns of numbers that are predicted, NaN for gaps.

    Raises:
        DataError: if they are no numbers, infinite, or all missing.
    """
    found = []
    for name in names:
        if (kind := frames.kind_of(frame[name], name)) != "number":
            raise DataError(
                f"target {shown(name)!r} is a {kind}; expected a number for a regression"
            )
        found.append(frames.numbers(frame[name], name))
        if np.isnan(found[-1]).all():
            raise DataError(f"target {shown(name)!r} is missing in all {len(frame)} rows")
    return np.stack(found, axis=1)


def rows_of(frame: Any, task: str) -> dict[str, Int[np.ndarray, " _"]]:
    """Return the rows of every task by its name, in the order of the names.

    Raises:
        DataError: if there is no such column, or a row names no task.
    """
    _need(frame.columns, [task], "tasks")
    names = frames.words(frame[task])
    if missing := sum(name is None for name in names):
        raise DataError(
            f"column {shown(task)!r}, which names the tasks, is empty in {missing} of {len(names)} "
            "rows; fill it in, or leave these rows out"
        )
    found, index = np.unique(np.array(names, dtype=np.str_), return_inverse=True)
    order = np.argsort(index, kind="stable")
    ends = np.cumsum(np.bincount(index, minlength=len(found)))[:-1]
    return dict(zip(found.tolist(), np.split(order, ends)))


def _need(names: Sequence[str], wanted: Any, what: str) -> None:
    if lacking := [name for name in wanted if name not in names]:
        more = f" and {len(lacking) - 5} more" if len(lacking) > 5 else ""
        raise DataError(
            f"the table lacks columns of the {what}: {', '.join(map(shown, lacking[:5]))}{more}; "
            f"{frames.there_are(names)}"
        )


def _numbers(frame: Any, name: str, kind: str) -> Float[np.ndarray, "n parts"]:
    """Return the values of a number or the parts of a date.

    Raises:
        DataError: if the column is of another kind.
    """
    column = frame[name]
    if (own := frames.kind_of(column, name)) != kind and not column.is_null().all():
        raise DataError(
            f"column {shown(name)!r} is a {own}, and a {kind} in training; give it as in training"
        )
    if kind == "number" or own == "number":
        found = frames.numbers(column, name)[:, None]
        return found if kind == "number" else np.repeat(found, len(frames.DATE_PARTS), axis=1)
    return frames.date_parts(column)


def _joined(parts: Any, count: int) -> Float[np.ndarray, "n parts"]:
    return np.concatenate([np.zeros((count, 0)), *parts], axis=1)


def _single(parts: Sequence[np.ndarray]) -> Float[np.ndarray, "n width"]:
    return np.concatenate(parts, axis=1).astype(np.float32)


def moments(columns: Float[np.ndarray, "n parts"]) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and standard deviation of what is there; 0 and 1 where there is nothing.

    A constant column is divided by 1.
    """
    there = ~np.isnan(columns)
    count = np.maximum(there.sum(axis=0), 1)
    mean = np.where(there, columns, 0).sum(axis=0) / count
    variance = (np.where(there, columns - mean, 0) ** 2).sum(axis=0) / count
    scale = np.sqrt(variance)
    # Rounding leaves a constant column a spread of its own last bits.
    return mean, np.where(scale > 1e-12 * np.maximum(np.abs(mean), 1e-300), scale, 1.0)


def _ends(values: Float[np.ndarray, " n"]) -> tuple[float, float]:
    seen = values[~np.isnan(values)]
    return (float(seen.min()), float(seen.max())) if len(seen) else (0.0, 0.0)


def _levels(column: Any, rows: Int[np.ndarray, " rows"], encoding: Encoding) -> list[str | None]:
    """Return the values of a category that have a place, the most frequent first."""
    values = frames.words(column)
    counted = Counter(values[row] for row in rows)
    ranked = sorted(counted, key=lambda value: (-counted[value], value is None, str(value)))
    if encoding == "embedding" or len(ranked) <= MOST_LEVELS:
        return ranked
    return [*ranked[: MOST_LEVELS - 1], OTHER]


OTHER = "\0other"
"""The level of the values that are too rare for one of their own, and of those not seen."""


def _indices(frame: Any, name: str, levels: Sequence[str | None]) -> Int[np.ndarray, " n"]:
    """Return 1 + the place of every value among the levels; that of `OTHER`, or 0, for others."""
    index = {level: i + 1 for i, level in enumerate(levels)}
    other = index.get(OTHER, 0)
    return np.array([index.get(value, other) for value in frames.words(frame[name])], np.int32)

"""Tables as the tasks of experiments: what a file says of them, and what of it a run keeps."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy.stats import norm

from ..engine import together
from ..engine.conformal import Scores, conformal, fewest
from ..learner import Meta
from ..task import Batch, Splits, TaskDistribution
from ..tasks import frames, preparation
from ..tasks import table as tables
from ..tasks.files import DataError
from ..tasks.preparation import Encoding, Preparation
from ..tasks.ragged import Shot, centre_and_scale
from ..tasks.table import Standard, kind_of, load, prepared
from ..tasks.table import read as tables_read
from ..text import shown
from .experiment import Experiment, changed

CALIBRATION, CALIBRATED = "calibration.safetensors", 2**30
"""What a run keeps of its validation tasks, and what names their episodes."""

NUMBERS, CLASSES = "table", "table_classes"
"""The task families: tables with numbers to predict, and with classes."""


def numbers(
    path: str,
    task: str,
    target: str | Sequence[str],
    *,
    shot: Shot = (4, 64),
    query: int | None = None,
    features: str | Sequence[str] = (),
    ignore: str | Sequence[str] = (),
    categories: str | Sequence[str] = (),
    encoding: Encoding = "onehot",
    splits: Sequence[float] | Mapping[str, Sequence[str]] | None = None,
    split: str | None = None,
    order: str | None = None,
    standardise: Standard = "support",
    least_spread: float | None = None,
    scale: bool = True,
    split_seed: int = 0,
    fitted: str | None = None,
) -> Splits:
    """Return the tasks of a file in which numbers are to be predicted; see `adaptax.tasks.table`.

    Args:
        path: of the file.
        task: see `adaptax.tasks.table`, as all that follow.
        target: one or several.
        shot: a number, a range or a share.
        query: of support and queries.
        features: columns.
        ignore: columns.
        categories: columns.
        encoding: of them.
        splits: shares or names.
        split: column.
        order: column.
        standardise: the targets.
        least_spread: of supports.
        scale: the features.
        split_seed: of the split.
        fitted: the run folder of the preparation.
    """
    return tables(
        path,
        task,
        target,
        shot=shot,
        query=query,
        features=features,
        ignore=ignore,
        categories=categories,
        encoding=encoding,
        kind="regression",
        splits=splits,
        split=split,
        order=order,
        standardise=standardise,
        least_spread=least_spread,
        scale=scale,
        seed=split_seed,
        fitted=fitted,
    )


def classes(
    path: str,
    task: str,
    target: str,
    *,
    classes: int = 2,
    shot: Shot = (4, 64),
    query: int | None = None,
    features: str | Sequence[str] = (),
    ignore: str | Sequence[str] = (),
    categories: str | Sequence[str] = (),
    encoding: Encoding = "onehot",
    splits: Sequence[float] | Mapping[str, Sequence[str]] | None = None,
    split: str | None = None,
    order: str | None = None,
    scale: bool = True,
    split_seed: int = 0,
    fitted: str | None = None,
) -> Splits:
    """Return the tasks of a file in which classes are to be predicted; see `numbers`.

    Args:
        path: of the file.
        task: column.
        target: column.
        classes: how many there are, all tasks together.
        shot: a number, a range or a share.
        query: of support and queries.
        features: columns.
        ignore: columns.
        categories: columns.
        encoding: of them.
        splits: shares or names.
        split: column.
        order: column.
        scale: the features.
        split_seed: of the split.
        fitted: the run folder of the preparation.

    Raises:
        ValueError: if there are more classes.
    """
    found = tables(
        path,
        task,
        target,
        shot=shot,
        query=query,
        features=features,
        ignore=ignore,
        categories=categories,
        encoding=encoding,
        kind="classification",
        splits=splits,
        split=split,
        order=order,
        scale=scale,
        seed=split_seed,
        fitted=fitted,
    )
    if (count := len(found.preparation.classes)) > classes:
        raise ValueError(
            f"{path} has {count} classes in {target}, and task.classes is {classes}; train anew"
        )
    return found


def family_of(path: str | None, target: Sequence[str]) -> str:
    """Return the family of a table: `NUMBERS`, or `CLASSES` for a target of text or truth values.

    Args:
        path: of the file.
        target: columns.
    """
    if path is None or not target:
        return NUMBERS  # what is missing is said elsewhere
    return CLASSES if kind_of(path, target) == "classification" else NUMBERS


def completed(experiment: Experiment) -> Experiment:
    """Return an experiment on a table with what its file says: width of inputs, classes.

    Raises:
        ValueError: if no column is named for the tasks or the targets, and as `prepared`.
    """
    for name, example in (("task", "assay"), ("target", "activity")):
        if not experiment.task.get(name):
            raise ValueError(
                f"a table wants --{name}, the column of its {name}s, such as --{name} {example}; "
                f"{frames.there_are(tables_read(experiment.task['path']).columns)}"
            )
    own = preparation_of(experiment)
    changes: dict[str, Any] = {}
    if own.sizes and "model" not in experiment.network:
        raise ValueError(
            "task.encoding=embedding gives indices, for a network of your own; name it by --model, "
            "or leave categories one-hot"
        )
    if "mlp" in experiment.network:
        changes["network"] = {"in_size": own.width}
    if own.classes is not None:
        changes["task"] = {"classes": len(own.classes)}
    return changed(experiment, changes)


def preparation_of(experiment: Experiment) -> Preparation:
    """Return the preparation that the file of an experiment gives."""
    task = dict(experiment.task)
    for name in ("shot", "query", "classes"):
        task.pop(name, None)
    how = {"seed": task.pop("split_seed", 0), **task}
    how["kind"] = "regression" if experiment.tasks == NUMBERS else "classification"
    return prepared(how.pop("path"), how.pop("task"), how.pop("target"), **how).preparation


def keep(splits: Splits, folder: Path) -> None:
    """Write the preparation of tasks, if they have one, into a run folder that has none yet."""
    file = folder / preparation.FILE
    if splits.preparation is not None and not file.exists():
        splits.preparation.save(file)


def calibrate(experiment: Experiment, meta: Meta, tasks: TaskDistribution, folder: Path) -> None:
    """Write how far off validation tasks are predicted; it sizes the intervals of `predicted`.

    Args:
        experiment: of a run.
        meta: what it learned.
        tasks: for validation; only those of a table with numbers to predict are scored.
        folder: of the run.
    """
    if experiment.tasks != NUMBERS:
        return
    noise = experiment.evaluation.get("noise", 1.0)
    learner, key = experiment.build_learner(), jax.random.key(CALIBRATED)
    conformal(learner, meta, tasks, key=key, noise=noise).scores.save(folder / CALIBRATION)


def _halves(folder: Path, targets: int, coverage: float) -> np.ndarray:
    """Return how many standard deviations the intervals of every target reach to both sides."""
    file = folder / CALIBRATION
    if not file.is_file():
        return np.full(targets, norm.ppf((1 + coverage) / 2))
    found = Scores.load(file)
    count, least = len(found.score), fewest(coverage)
    if count < least:
        warnings.warn(
            f"intervals of {coverage:g} are Gaussian: ones that hold for new tasks want {least} "
            f"tasks for validation, and the run had {count}",
            stacklevel=2,
        )
        return np.full(targets, norm.ppf((1 + coverage) / 2))
    return found.threshold(coverage)


@dataclasses.dataclass(frozen=True)
class Predictions:
    """What a run predicts of the rows of tables.

    Args:
        columns: values by name, as long as the queries: the task, and for each target the value,
            its standard deviation and the ends of its interval; or the class, how probable it is,
            and the probability of every class.
        tasks: that were predicted.
        coverage: that intervals should have.
    """

    columns: dict[str, list[Any]]
    tasks: int
    coverage: float


def predicted(
    experiment: Experiment, meta: Meta, folder: Path, support: Any, query: Any, coverage: float
) -> Predictions:
    """Adapt a run to every task of one table, and predict the rows of another.

    Args:
        experiment: of the run, on a table.
        meta: its meta-parameters.
        folder: of the run, where its preparation is.
        support: a table with the targets.
        query: a table; the tasks of its rows are among those of the support.
        coverage: of the intervals.

    Raises:
        DataError: if columns are missing, or a task has no support.
    """
    own = load(folder)
    known, asked = tables_read(support), tables_read(query)
    rows, wanted = own.rows(known), own.rows(asked)
    x, y = own.inputs(known), own.targets(known)
    there = y >= 0 if own.classes is not None else np.isfinite(y).any(axis=1)
    rows = {name: of[there[of]] for name, of in rows.items()}
    if bare := [name for name in wanted if not len(rows.get(name, ()))]:
        raise DataError(
            f"{len(bare)} of {len(wanted)} tasks of the queries have no support with a target, "
            f"such as {shown(bare[0])}; give rows of each"
        )
    new, names = own.inputs(asked), list(wanted)
    units = [_units(own, y[rows[name]]) for name in names]
    adapted = together.adapt(
        experiment.build_learner(),
        meta,
        [(_some(x, rows[n]), _scaled(y[rows[n]], unit)) for n, unit in zip(names, units)],
    )
    found = adapted.predict([_some(new, wanted[name]) for name in names])
    task = np.empty(len(asked), object)
    for name in names:
        task[wanted[name]] = name
    columns: dict[str, list[Any]] = {own.task: task.tolist()}
    if own.classes is not None:
        columns |= _labels(own, found, [wanted[name] for name in names], len(asked))
        return Predictions(columns, len(names), coverage)
    noise = experiment.evaluation.get("noise", 1.0)
    noises = adapted.noise() if noise == "learned" else [np.asarray(noise)] * len(names)
    halves = _halves(folder, len(own.target), coverage)
    sure = adapted.deviations([_some(new, wanted[name]) for name in names])
    mean, deviation = (np.full((len(asked), len(own.target)), np.nan) for _ in range(2))
    for i, (name, f, (centre, scale)) in enumerate(zip(names, found, units)):
        f = (f if f.ndim == 3 else f[None]).astype(float)
        squares = np.mean(noises[i] ** 2)
        if sure is not None:
            squares = (sure[i] if sure[i].ndim == 3 else sure[i][None]).astype(float) ** 2
            squares = squares.mean(axis=0)
        spread = np.sqrt(f.var(axis=0) + squares)
        mean[wanted[name]] = own.centre + own.spread * (centre + scale * f.mean(axis=0))
        deviation[wanted[name]] = own.spread * scale * spread
    if not np.isfinite(mean).all():
        raise DataError(
            "adaptation diverged for some tasks, and predictions are not finite; take fewer --steps"
        )
    for j, target in enumerate(own.target):
        columns[target] = mean[:, j].tolist()
        columns[f"{target}_std"] = deviation[:, j].tolist()
        columns[f"{target}_low"] = (mean[:, j] - halves[j] * deviation[:, j]).tolist()
        columns[f"{target}_high"] = (mean[:, j] + halves[j] * deviation[:, j]).tolist()
    return Predictions(columns, len(names), coverage)


def _units(own: Preparation, y: np.ndarray) -> tuple[Any, Any]:
    """Return what the targets of a support are centred and divided by, as in training."""
    if own.classes is not None or not own.least:
        return 0.0, 1.0
    there = np.isfinite(y).astype(np.float32)
    batch = Batch(jnp.zeros(len(y)), jnp.asarray(np.nan_to_num(y)), jnp.asarray(there))
    centre, scale = centre_and_scale(batch, own.least)
    return np.asarray(centre, float), np.asarray(scale, float)


def _scaled(y: np.ndarray, units: tuple[Any, Any]) -> np.ndarray:
    if np.issubdtype(y.dtype, np.integer):
        return y
    return ((y - units[0]) / units[1]).astype(np.float32)


def _some(x: Any, at: np.ndarray) -> Any:
    return {name: a[at] for name, a in x.items()} if isinstance(x, dict) else x[at]


def _labels(
    own: Preparation, found: Sequence[np.ndarray], places: Sequence[np.ndarray], count: int
) -> dict[str, list[Any]]:
    """Return the most probable class of every row, how probable it is, and all probabilities."""
    assert own.classes is not None
    p = np.zeros((count, len(own.classes)))
    for logits, at in zip(found, places):
        logits = (logits if logits.ndim == 3 else logits[None]).astype(float)
        odds = np.exp(logits - logits.max(axis=-1, keepdims=True))
        p[at] = (odds / odds.sum(axis=-1, keepdims=True)).mean(axis=0)[:, : len(own.classes)]
    return {
        own.target[0]: [own.classes[i] for i in p.argmax(axis=1)],
        "probability": p.max(axis=1).tolist(),
        **{f"p_{name}": p[:, i].tolist() for i, name in enumerate(own.classes)},
    }

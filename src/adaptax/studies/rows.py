"""Comparisons on tables: learners beside models of every task alone and one of all, pooled."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from matplotlib.figure import Figure

from .. import report
from ..engine import together
from ..recipes import COMPARED, changed, comparable, rows
from ..recipes.runs import Trained, nothing_lost
from ..recipes.settings import known_algorithms, with_path
from ..report.tables import Cell, Score
from . import hosted
from .study import Lab, Row, Study, difference, sheet

TEST = 2**31
"""Names the test episodes, as `Experiment.test` does."""

PICTURED = 40
"""Test episodes whose predictions are drawn."""

COLUMNS: dict[str, str] = {
    "mse": "MSE",
    "r2": "R²",
    "accuracy": "accuracy",
    "nll": "NLL",
    "brier": "Brier",
    "coverage_50": "in 50 %",
    "coverage_90": "in 90 %",
}
"""Metrics of the table, those of them that all reports have."""


def compare_rows(
    lab: Lab,
    family: str,
    algorithms: Sequence[str],
    changes: Mapping[str, Any],
    path: str | None,
) -> Study:
    """Compare learners on a table with the baselines of `hosted`, on the same episodes.

    Args:
        lab: where to train.
        family: `"table"` or `"table_classes"`.
        algorithms: names; some of each kind if empty.
        changes: of their experiments.
        path: of the file.
    """
    experiments = {}
    for name in known_algorithms(algorithms or COMPARED[family]):
        experiment = changed(with_path(comparable(name, family), path), changes)
        experiments[name] = rows.completed(experiment)
    lab.check(experiments)
    found: list[Row] = []
    for name, experiment in experiments.items():
        trained = lab.fit(experiment, name, validate_every=max(experiment.steps // 10, 1))
        scores = lab.test(trained.experiment, trained.meta, trained.test, experiment.title)
        found.append(Row(experiment.title, [scores], trained=[trained]))
    found += _baselines(lab, found[0])
    return _study(lab, family, found)


def _baselines(lab: Lab, first: Row) -> list[Row]:
    """Return the rows of the baselines, scored on the episodes of a learner."""
    trained = first.trained[0]
    count, key = trained.experiment.episodes, jax.random.key(TEST)
    message = f"interrupted; what is trained is kept, go on with: {lab.command}"
    found = []
    with nothing_lost(message):
        models = hosted.baselines(trained.test, jax.random.key(0))
        for name, predict in models.items():
            with lab.progress.scoring(name, count) as watch:
                scores = hosted.score(name, predict, trained.test.test, count, key, watch)
            found.append(Row(name, [scores]))
    return found


def _study(lab: Lab, family: str, found: Sequence[Row]) -> Study:
    first, own = found[0], [row for row in found if row.trained]
    shape, metric = first.report.protocol, first.report.primary
    best = _best([row for row in found if not row.trained], metric)
    title = f"{family}, {shape['episodes']} test episodes"
    columns: dict[str, Callable[[Row], Cell]] = {"learner": lambda row: row.name}
    shared = set.intersection(*(set(row.report.values) for row in found))
    for name in filter(shared.__contains__, COLUMNS):
        columns[COLUMNS[name]] = functools.partial(_score, name)
    columns[f"{COLUMNS.get(metric, metric)} − {best.name}"] = lambda row: (
        "" if row is best else difference(row, best)
    )
    columns["trained in"] = lambda row: f"{row.seconds:.0f} s" if row.trained else ""
    record = {
        "title": title,
        "rows": [
            {
                "name": row.name,
                "scores": row.report.to_json(),
                "difference": difference(row, best).to_json(),
                **(
                    {"seconds": row.seconds, "experiment": row.experiment.to_json()}
                    if row.trained
                    else {}
                ),
            }
            for row in found
        ],
        "best_baseline": best.name,
    }
    notes = [
        "± is the 95 % confidence interval over episodes; all see the same ones. The last column "
        f"is the paired difference to the best baseline, {best.name}."
    ]
    notes += [f"{row.name}: {report.summary(row.report)}" for row in own]
    draw = functools.partial(_figures, found, title)
    return Study("comparison", lab, found, sheet(title, columns, found), draw, record, notes)


def _best(found: Sequence[Row], metric: str) -> Row:
    sign = -1 if metric == "accuracy" else 1
    return min(found, key=lambda row: sign * row.report.mean(metric))


def _score(metric: str, row: Row) -> Cell:
    return Score(metric, row.report.mean(metric), row.report.ci95(metric))


def _figures(found: Sequence[Row], title: str) -> dict[str, Figure]:
    return pictures(
        {row.name: row.report for row in found},
        {row.name: row.trained[0] for row in found if row.trained},
        title,
    )


def pictures(
    reports: Mapping[str, Any], trained: Mapping[str, Trained], title: str
) -> dict[str, Figure]:
    """Return pictures of a test on a table: errors by size of support, calibration, and parity.

    Args:
        reports: of the same episodes, by name.
        trained: the learners among them, by name.
        title: of the pictures.
    """
    first = next(iter(reports.values()))
    metric, count = first.primary, len(first.values[first.primary])
    tasks = next(iter(trained.values())).test.test
    drawn = hosted.episodes(tasks, count, jax.random.key(TEST))
    sizes = np.array([task.support.size for task in drawn])
    figures: dict[str, Figure] = {}
    if len(np.unique(sizes)) > 1:
        errors = {name: one.values[metric][:, -1] for name, one in reports.items()}
        figures["support"] = report.error_by_support(errors, sizes, metric=metric, title=title)
    if metric == "accuracy":
        return figures | {"calibration": report.reliability(reports, title=title)}
    points = {name: predicted(one) for name, one in trained.items()}
    return {
        **figures,
        "calibration": report.coverage_diagram(reports, title=title),
        "parity": report.parity(points, title=title),
    }


def predicted(trained: Trained) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return targets of test episodes, what a learner predicts, and its standard deviation.

    Args:
        trained: a learner of numbers.
    """
    experiment = trained.experiment
    drawn = list(
        hosted.episodes(trained.test.test, min(PICTURED, experiment.episodes), jax.random.key(TEST))
    )
    supports = [(task.support.x, task.support.y) for task in drawn]
    models = together.adapt(experiment.build_learner(), trained.meta, supports)
    noise = experiment.evaluation.get("noise", 1.0)
    noises = models.noise() if noise == "learned" else [np.asarray(noise)] * len(drawn)
    found: list[Any] = []
    for task, f, own in zip(drawn, models.predict([task.query.x for task in drawn]), noises):
        f = f if f.ndim == 3 else f[None]
        deviation = np.sqrt(f.var(axis=0) + np.mean(own**2))
        there = np.isfinite(task.query.y)
        found.append((task.query.y[there], f.mean(axis=0)[there], deviation[there]))
    target, value, deviation = (np.concatenate(parts) for parts in zip(*found))
    return target, value, deviation

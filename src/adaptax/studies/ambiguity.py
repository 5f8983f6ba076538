"""Comparisons where uncertainty counts: errors, likelihoods and calibration."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from .. import metrics, report
from ..engine.run import Run
from ..recipes import (
    COMPARED,
    CURVES,
    REGRESSIONS,
    Experiment,
    changed,
    comparable,
    with_noise,
)
from ..recipes.runs import Trained
from ..recipes.settings import known_algorithms
from ..report.tables import Cell, Score
from ..task import episode_key
from ..tasks.lines import SinusoidOrLine
from .study import PICTURED, Lab, Row, Study, difference, sheet

NOISY = "MAML + noise"
NOISED = ("sinusoid_or_line", "circles", "celeba")
"""Families that MAML with noise is shown on, as in PLATIPUS's paper."""

COLUMNS: dict[str, str] = {
    "mse": "MSE",
    "r2": "R²",
    "accuracy": "accuracy",
    "nll": "NLL",
    "coverage_50": "in 50 %",
    "coverage_90": "in 90 %",
    "brier": "Brier",
    "readings": "readings",
    "reading_accuracy": "accuracy on its reading",
    "joint_nll": "joint NLL",
}
"""Metrics of the table, those of them that a report has."""


def compare_uncertainty(
    lab: Lab, family: str, algorithms: Sequence[str], changes: Mapping[str, Any]
) -> Study:
    """Compare learners on a family in `adaptax.recipes.AMBIGUOUS`; see `compare`.

    Args:
        lab: where to train.
        family: its name.
        algorithms: names; those that the papers compare if empty.
        changes: of their experiments.
    """
    experiments = {}
    for name in known_algorithms(algorithms or COMPARED[family]):
        experiment = changed(comparable(name, family), changes)
        if experiment.init_from:
            first = changed(Experiment.from_json(experiment.init_from), changes)
            experiment = dataclasses.replace(experiment, init_from=first.to_json())
        experiments[name] = experiment
    lab.check(experiments)
    rows: list[Row] = []
    for name, experiment in experiments.items():
        maml = lab.folder / "maml"
        copied = experiment.init_from and Run(maml).checkpoint_file.exists()
        every = max(experiment.steps // 10, 1)
        trained = lab.fit(experiment, name, start=maml if copied else None, validate_every=every)
        rows.append(_row(lab, experiment.title, trained))
        if experiment.row.noised and family in NOISED:
            noisy, meta = with_noise(trained.experiment, trained.meta, trained.test)
            rows.append(_row(lab, NOISY, dataclasses.replace(trained, experiment=noisy, meta=meta)))
    return _study(lab, family, rows)


def _row(lab: Lab, name: str, trained: Trained) -> Row:
    found = lab.test(trained.experiment, trained.meta, trained.test, name)
    found = dataclasses.replace(found, protocol={**found.protocol, "algorithm": name})
    return Row(name, [found], {"families": families(found, trained.test.test)}, [trained])


def families(scores: Any, tasks: Any) -> dict[str, dict[str, Any]]:
    """Return squared errors of waves and of lines, where the tasks are either."""
    if not isinstance(tasks, SinusoidOrLine):
        return {}
    mse = scores.values["mse"][:, -1]
    # The episodes of `Experiment.test`.
    key_of = functools.partial(episode_key, tasks.split, jax.random.key(2**31))
    is_line = jax.jit(jax.vmap(lambda i: tasks.parameters(key_of(i)).is_line))
    lines = np.asarray(is_line(jnp.arange(len(mse), dtype=jnp.uint32)))
    found = {}
    for name, some in (("waves", mse[~lines]), ("lines", mse[lines])):
        mean, half = map(float, metrics.interval(some))
        median = float(np.median(some)) if len(some) else math.nan
        found[name] = {"episodes": len(some), "mse": mean, "mse_ci95": half, "median_mse": median}
    return found


def _study(lab: Lab, family: str, rows: Sequence[Row]) -> Study:
    first = rows[0]
    shape = first.report.protocol
    title = f"{family}, {shape['shot']}-shot, {shape['episodes']} test episodes"
    ridge = next((r for r in rows if r.experiment.row.baseline and "r2" in r.report.values), None)
    columns: dict[str, Callable[[Row], Cell]] = {"learner": lambda row: row.name}
    for metric in filter(first.report.values.__contains__, COLUMNS):
        columns[COLUMNS[metric]] = functools.partial(_score, metric)
    if ridge is not None:
        columns["R² minus ridge's"] = lambda row: difference(row, ridge, "r2")
    else:
        columns[f"− {first.name}"] = lambda row: "" if row is first else difference(row, first)
    for kind in first.record["families"]:
        columns[f"MSE, {kind}"] = functools.partial(_family, kind)
    if first.report.bins is not None:
        columns["ECE"] = lambda row: f"{row.report.ece():.3f}"
    columns["trained in"] = lambda row: f"{row.seconds:.0f} s"

    def said(row: Row) -> dict[str, Any]:
        about = {"difference": difference(row, first).to_json()}
        if ridge is not None:
            about["r2_minus_ridge"] = difference(row, ridge, "r2").to_json()
        return {
            "name": row.name,
            "seconds": row.seconds,
            "best_step": row.trained[0].step,
            "scores": row.report.to_json(),
            **({"families": row.record["families"]} if row.record["families"] else {}),
            **about,
            "experiment": row.experiment.to_json(),
        }

    notes = ["± is the 95 % confidence interval over episodes; every learner sees the same ones."]
    notes += [f"{row.name}: {report.summary(row.report)}" for row in rows]
    record = {"title": title, "rows": [said(row) for row in rows]}
    draw = functools.partial(_figures, rows, family, title)
    return Study("comparison", lab, rows, sheet(title, columns, rows), draw, record, notes)


def _score(metric: str, row: Row) -> Cell:
    return Score(metric, row.report.mean(metric), row.report.ci95(metric))


def _family(kind: str, row: Row) -> Cell:
    one = row.record["families"][kind]
    return Score("mse", one["mse"], one["mse_ci95"])


def _figures(rows: Sequence[Row], family: str, title: str) -> dict[str, Figure]:
    draw = report.coverage_diagram if family in REGRESSIONS else report.reliability
    figures = {"calibration": draw({row.name: row.report for row in rows}, title=title)}
    learners = {row.name: (row.experiment.build_learner(), row.trained[0].meta) for row in rows}
    tasks, key = rows[0].trained[0].test.test, jax.random.key(PICTURED)
    if family in CURVES:
        noise = rows[0].experiment.evaluation.get("noise", 0.0)
        figures["functions"] = report.sampled_functions(learners, tasks, key=key, noise=noise)
    if family == "circles":
        figures["boundaries"] = report.decision_boundaries(learners, tasks, key=key)
    if family == "celeba":
        for name, one in learners.items():
            figures[f"faces-{name.lower().replace(' ', '')}"] = report.attribute_sheet(
                *one, tasks, key=key
            )
    return figures

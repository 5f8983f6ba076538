"""`adaptax compare` where uncertainty counts: every learner's error, likelihood and calibration."""

from __future__ import annotations

import dataclasses
import functools
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from .. import io, metrics, report
from ..engine.report import Report
from ..engine.run import Run
from ..process import Interrupted
from ..recipes import (
    COMPARED_ON,
    CURVES,
    REGRESSIONS,
    TITLES,
    Experiment,
    changed,
    compared,
    with_noise,
)
from ..recipes.runs import Trained, fit_or_resume
from ..report import calibration, number, uncertainty
from ..task import episode_key
from ..tasks.lines import SinusoidOrLine
from . import settings
from .commands import Compare
from .console import consoles, free_folder, save_figure
from .facts import command, dump, facts, keep
from .progress import Shown, scoring
from .training import PICTURED

NOISY = "MAML + noise"

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


@dataclasses.dataclass(frozen=True)
class Entry:
    """A row of the comparison.

    Args:
        name: as it is written.
        trained: what was trained for it.
        report: its scores.
    """

    name: str
    trained: Trained
    report: Report

    def score(self, metric: str) -> tuple[float, float]:
        """Mean and half the 95 % interval over test episodes, after the last step."""
        return self.report.mean(metric), self.report.ci95(metric)


def families(entry: Entry) -> dict[str, dict[str, Any]]:
    """Squared error of waves and of lines, where the tasks are either."""
    tasks = entry.trained.test.test
    if not isinstance(tasks, SinusoidOrLine):
        return {}
    mse = entry.report.values["mse"][:, -1]
    # The episodes of `Experiment.test`.
    key_of = functools.partial(episode_key, tasks.split, jax.random.key(2**31))
    is_line = jax.jit(jax.vmap(lambda i: tasks.parameters(key_of(i)).is_line))
    lines = np.asarray(is_line(jnp.arange(len(mse), dtype=jnp.uint32)))
    found = {}
    for name, some in (("waves", mse[~lines]), ("lines", mse[lines])):
        mean, half = map(float, metrics.interval(some))
        found[name] = {
            "episodes": len(some),
            "mse": mean,
            "mse_ci95": half,
            "median_mse": float(np.median(some)) if len(some) else math.nan,
        }
    return found


def compare(asked: Compare) -> None:
    """Train, test, and write the comparison."""
    family = "sinusoid_or_line" if asked.tasks == "ambiguous" else str(asked.tasks)
    experiments = _experiments(asked, family)
    next(iter(experiments.values())).splits(asked.data_root, test=True)
    path = Path(asked.out) if asked.out else free_folder(f"compare-{asked.tasks}")
    go_on = command(asked, "compare", str(asked.tasks), out=path)
    out, progress = consoles()
    entries: list[Entry] = []
    try:
        for name, experiment in experiments.items():
            first = path / "maml"
            copied = experiment.init_from and Run(first).checkpoint_file.exists()
            trained = fit_or_resume(
                experiment, path / name, go_on, Shown(progress), data_root=asked.data_root,
                start=first if copied else None,
                validate_every=max(experiment.steps // 10, 1),
            )  # fmt: skip
            entries.append(_entry(TITLES[name], trained, trained.experiment, progress))
            if name == "maml" and family in NOISED:
                noisy, meta = with_noise(trained.experiment, trained.meta, trained.test)
                entries.append(
                    _entry(NOISY, dataclasses.replace(trained, meta=meta), noisy, progress)
                )
        _finish(entries, asked, family, path, out)
    except KeyboardInterrupt:
        raise Interrupted(f"interrupted; what is trained is kept, go on with: {go_on}") from None


NOISED = ("sinusoid_or_line", "circles", "celeba")
"""Families that MAML with noise is shown on, as in PLATIPUS's paper."""


def _experiments(asked: Compare, family: str) -> dict[str, Experiment]:
    if asked.way is not None or asked.seeds != 1 or asked.path is not None:
        raise ValueError(f"{asked.tasks} has no --way, --seeds or --path; leave them out")
    names = settings.known(asked.algorithms or COMPARED_ON[family])
    changes = {
        "task": {"shot": asked.shot},
        "steps": asked.steps,
        "evaluation": {"episodes": asked.episodes},
    }
    found = {}
    for name in names:
        experiment = changed(compared(name, family), changes)
        if experiment.init_from:
            first = changed(Experiment.from_json(experiment.init_from), changes)
            experiment = dataclasses.replace(experiment, init_from=first.to_json())
        found[name] = experiment
    return found


def _entry(name: str, trained: Trained, experiment: Experiment, console: Console) -> Entry:
    trained = dataclasses.replace(trained, experiment=experiment)
    with scoring(f"{name}, test", experiment.episodes, console) as watch:
        found = experiment.test(trained.meta, trained.test, watch=watch)
    found = dataclasses.replace(found, protocol={**found.protocol, "algorithm": name})
    return Entry(name, trained, found)


def _finish(entries: list[Entry], asked: Compare, family: str, path: Path, out: Console) -> None:
    shape = entries[0].report.protocol
    title = f"{family}, {shape['shot']}-shot, {shape['episodes']} test episodes"
    plots = [
        save_figure(figure, path / f"{name}.png")
        for name, figure in _figures(entries, family, title).items()
    ]
    of = {entry.name: families(entry) for entry in entries}
    result = {
        "title": title,
        "rows": [
            {
                "name": entry.name,
                "seconds": entry.trained.seconds,
                "best_step": entry.trained.step,
                "scores": entry.report.to_json(),
                **({"families": of[entry.name]} if of[entry.name] else {}),
                **_beyond_ridge(entry, entries),
                "experiment": entry.trained.experiment.to_json(),
            }
            for entry in entries
        ],
        "command": command(asked, "compare", str(asked.tasks), out=path),
        "plots": [str(plot) for plot in plots],
        **facts(),
    }
    keep(path / "comparison.json", result)
    if asked.json:
        print(dump(result))
        return
    out.print(_table(entries, of, title))
    out.print("± is the 95 % confidence interval over episodes; every learner sees the same ones.")
    for entry in entries:
        out.print(f"{entry.name}: {report.summary(entry.report)}", soft_wrap=True)
    names = ", ".join(plot.name for plot in plots)
    out.print(f"results: {path} (comparison.json, {names})", soft_wrap=True)


def _ridge(entries: list[Entry]) -> Entry | None:
    """The baseline, where it is among those compared and R² is a score."""
    found = (e for e in entries if e.name == TITLES["ridge"] and "r2" in e.report.values)
    return next(found, None)


def _beyond_ridge(entry: Entry, entries: list[Entry]) -> dict[str, Any]:
    """What the results say of an entry beside the baseline."""
    ridge = _ridge(entries)
    if ridge is None:
        return {}
    gain, half = entry.report.difference(ridge.report, "r2")
    return {"r2_minus_ridge": io.strict({"mean": gain, "ci95": half})}


def _table(entries: list[Entry], of: dict[str, dict[str, Any]], title: str) -> Table:
    shown = [name for name in COLUMNS if name in entries[0].report.values]
    table = Table(title=title, title_justify="left")
    table.add_column("learner")
    for name in shown:
        table.add_column(COLUMNS[name], justify="right")
    ridge = _ridge(entries)
    if ridge is not None:
        table.add_column("R² minus ridge's", justify="right")
    for name in of[entries[0].name]:
        table.add_column(f"MSE, {name}", justify="right")
    if entries[0].report.bins is not None:
        table.add_column("ECE", justify="right")
    table.add_column("trained in", justify="right")
    for entry in entries:
        cells = [number(name, *entry.score(name)) for name in shown]
        if ridge is not None:
            cells.append(number("r2", *entry.report.difference(ridge.report, "r2")))
        cells += [number("mse", one["mse"], one["mse_ci95"]) for one in of[entry.name].values()]
        cells += [f"{entry.report.ece():.3f}"] if entry.report.bins is not None else []
        table.add_row(entry.name, *cells, f"{entry.trained.seconds:.0f} s")
    return table


def _figures(entries: list[Entry], family: str, title: str) -> dict[str, Figure]:
    reports = {entry.name: entry.report for entry in entries}
    draw = calibration.coverage_diagram if family in REGRESSIONS else calibration.reliability
    figures = {"calibration": draw(reports, title=title)}
    learners = {
        entry.name: (entry.trained.experiment.build_learner(), entry.trained.meta)
        for entry in entries
    }
    tasks, key = entries[0].trained.test.test, jax.random.key(PICTURED)
    if family in CURVES:
        noise = entries[0].trained.experiment.evaluation.get("noise", 0.0)
        figures["functions"] = uncertainty.sampled_functions(learners, tasks, key=key, noise=noise)
    if family == "circles":
        figures["boundaries"] = uncertainty.decision_boundaries(learners, tasks, key=key)
    if family == "celeba":
        for entry in entries:
            name = entry.name.lower().replace(" ", "")
            figures[f"faces-{name}"] = uncertainty.attribute_sheet(
                *learners[entry.name], tasks, key=key
            )
    return figures

"""`adaptax compare`: several algorithms on the same episodes, the papers' numbers beside."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from scipy.special import stdtrit

from .. import report
from ..engine.report import Report
from ..process import Interrupted
from ..recipes import (
    CELLS,
    COMPARED,
    ENVIRONMENTS,
    PAPER_CURVES,
    RECIPES,
    TITLES,
    Experiment,
    changed,
    comparable,
)
from ..recipes.runs import Trained, fit_or_resume
from . import reinforcement, settings, uncertainty
from .commands import Compare
from .console import consoles, free_folder, save_figure
from .facts import command, dump, facts, keep
from .progress import Shown, scoring
from .training import PICTURED

STEPS = {"sinusoid": 70_000, "glyphs": 300}
EPISODES = {"sinusoid": 2_000, "glyphs": 150}
SHORT = 2_000
"""Meta-steps of families that are not in `STEPS`."""

SHOWN = (0, 1, 5, 10)
"""Adaptation steps in the table, beside those of each algorithm's own protocol."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """An algorithm in a comparison: a training and a report for each seed."""

    algorithm: str
    trained: list[Trained]
    reports: list[Report]

    @property
    def name(self) -> str:
        """As it is written."""
        return TITLES[self.algorithm]

    def score(self, position: int) -> tuple[float, float]:
        """Mean and half the 95 % interval after the step at this position.

        Of the episodes that did not diverge: `diverged` counts the others.
        Over episodes for one seed; over seeds, by Student's t, for several.
        """
        metric = self.reports[0].primary
        means = [scores.mean(metric, position, diverged=False) for scores in self.reports]
        if len(means) == 1:
            return means[0], self.reports[0].ci95(metric, position, diverged=False)
        error = float(np.std(means, ddof=1)) / math.sqrt(len(means))
        return float(np.mean(means)), float(stdtrit(len(means) - 1, 0.975)) * error

    def diverged(self, position: int) -> int:
        """Episodes whose adaptation diverged by then, in all seeds."""
        return sum(scores.diverged(position) for scores in self.reports)


def compare(asked: Compare) -> None:
    """Train, test, and write the comparison."""
    if asked.tasks == "ambiguous" or asked.tasks in CELLS:
        uncertainty.compare(asked)
        return
    if asked.tasks in ENVIRONMENTS:
        reinforcement.compare(asked)
        return
    experiments = _experiments(asked)
    first = next(iter(experiments.values()))
    first.splits(asked.data_root, test=True)  # so that bad data are told before anything is written
    path = Path(asked.out) if asked.out else free_folder(f"compare-{asked.tasks}")
    go_on = command(asked, "compare", str(asked.tasks), out=path)
    out, progress = consoles()
    try:
        entries = [
            _entry(name, experiment, asked, path, go_on, progress)
            for name, experiment in experiments.items()
        ]
        _finish(entries, asked, path, out)
    except KeyboardInterrupt:
        raise Interrupted(f"interrupted; what is trained is kept, go on with: {go_on}") from None


def _experiments(asked: Compare) -> dict[str, Experiment]:
    if asked.tasks is None:
        raise ValueError("name a task family to compare on, such as sinusoid")
    sinusoid = asked.tasks == "sinusoid"
    if sinusoid and (asked.way is not None or asked.shot is not None):
        raise ValueError("sinusoids are compared as in MAML's paper; leave out --way and --shot")
    names = settings.known(asked.algorithms or COMPARED["sinusoid" if sinusoid else "images"])
    changes = {
        "steps": settings.or_else(asked.steps, STEPS.get(asked.tasks, SHORT)),
        "evaluation": {
            "episodes": settings.or_else(asked.episodes, EPISODES.get(asked.tasks, 600))
        },
    }
    way, shot = settings.or_else(asked.way, 5), settings.or_else(asked.shot, 1)
    return {
        name: changed(
            settings.with_path(comparable(name, asked.tasks, way, shot), asked.path), changes
        )
        for name in names
    }


def _entry(
    name: str,
    experiment: Experiment,
    asked: Compare,
    path: Path,
    go_on: str,
    console: Console,
) -> Entry:
    trained, reports = [], []
    for seed in range(asked.seeds):
        one = dataclasses.replace(experiment, seed=seed)
        folder = path / (name if asked.seeds == 1 else f"{name}-seed{seed}")
        every = None if asked.tasks == "sinusoid" else max(one.steps // 4, 1)
        result = fit_or_resume(
            one,
            folder,
            go_on,
            Shown(console),
            data_root=asked.data_root,
            validate_every=every,
        )
        trained.append(result)
        reports.append(_report(result, console))
    return Entry(name, trained, reports)


def _report(trained: Trained, console: Console) -> Report:
    experiment = trained.experiment
    own = experiment.eval_steps
    fixed = experiment.algorithm in ("meta-sgd", "leo") or own == 0
    most = own if fixed else max(own, max(SHOWN))
    at = sorted({step for step in (0, 1, 2, 3, 4, 5, 7, 10, 20, 30, 50, own) if step <= most})
    with scoring(f"{TITLES[experiment.algorithm]}, test", experiment.episodes, console) as watch:
        return experiment.test(trained.meta, trained.test, steps=most, at=at, watch=watch)


def _finish(entries: list[Entry], asked: Compare, path: Path, out: Console) -> None:
    rows = [_row(entry) for entry in entries]
    first = entries[0].reports[0]
    sinusoid = asked.tasks == "sinusoid"
    paper = {entry.name: PAPER_CURVES.get(entry.algorithm, {}) for entry in entries}
    shape = first.protocol
    cell = f"{shape['way']}-way " if "way" in shape else ""
    title = f"{asked.tasks}, {cell}{shape['shot']}-shot, {shape['episodes']} test episodes"
    figure = report.comparison(
        {entry.name: entry.reports[0] for entry in entries},
        paper=paper if sinusoid else None,
        title=title,
    )
    plots = [save_figure(figure, path / "comparison.png")]
    if sinusoid:
        learners = {
            entry.name: (entry.trained[0].experiment.build_learner(), entry.trained[0].meta)
            for entry in entries
        }
        tasks = entries[0].trained[0].test.test
        figure = report.adaptations(learners, tasks, key=jax.random.key(PICTURED))
        plots.append(save_figure(figure, path / "adaptation.png"))
    result = {
        "title": title,
        "algorithms": [
            {
                "algorithm": entry.algorithm,
                "paper": row["paper"],
                "scores": {h: {"mean": m, "ci95": c} for h, (m, c) in row["scores"].items()},
                "seconds": row["seconds"],
                "reports": [scores.to_json() for scores in entry.reports],
                "experiment": entry.trained[0].experiment.to_json(),
            }
            for entry, row in zip(entries, rows)
        ],
        "ci95": "over episodes" if asked.seeds == 1 else f"over {asked.seeds} seeds",
        "command": command(asked, "compare", str(asked.tasks), out=path),
        "plots": [str(plot) for plot in plots],
        **facts(),
    }
    keep(path / "comparison.json", result)
    if asked.json:
        print(dump(result))
        return
    out.print(report.comparison_table(rows, f"{title}: {rows[0]['metric']}"))
    out.print(
        f"± is the 95 % confidence interval {result['ci95']}; every algorithm sees the same ones."
        if asked.seeds == 1
        else f"± is the 95 % confidence interval {result['ci95']} (Student's t)."
    )
    out.print(report.summary(first), soft_wrap=True)
    tuned = [e for e in entries if e.trained[0].experiment.tune]
    for entry in tuned:
        rate = entry.trained[0].experiment.learner["inner_lr"]
        out.print(f"{entry.name}: fine-tuned with step size {rate}, chosen on validation tasks")
    out.print(f"results: {path} (comparison.json, {', '.join(plot.name for plot in plots)})",
              soft_wrap=True)  # fmt: skip


def _row(entry: Entry) -> dict[str, Any]:
    scores, diverged, experiment = {}, {}, entry.trained[0].experiment
    own = experiment.eval_steps
    for position, step in enumerate(entry.reports[0].at):
        if step in SHOWN:
            heading = f"{step} step{'s' * (step != 1)}"
            scores[heading], diverged[heading] = entry.score(position), entry.diverged(position)
    if experiment.tasks != "sinusoid":
        at = entry.reports[0].at
        scores["own protocol"] = entry.score(at.index(own) if own in at else -1)
    return {
        "name": entry.name if "own protocol" not in scores else f"{entry.name} ({own} steps)",
        "metric": entry.reports[0].primary,
        "scores": scores,
        "diverged": diverged,
        "paper": _paper(experiment),
        "seconds": float(np.mean([one.seconds for one in entry.trained])),
    }


def _paper(experiment: Experiment) -> str:
    """The published number of this cell."""
    if experiment.tasks == "sinusoid":
        curve = PAPER_CURVES.get(experiment.algorithm, {})
        return " / ".join(f"{value:.2f}" for value in curve.values()) or "no number"
    task = experiment.task
    name = f"{experiment.algorithm}-{experiment.tasks}-{task['way']}w{task['shot']}s"
    return RECIPES[name].paper if name in RECIPES else "no number"

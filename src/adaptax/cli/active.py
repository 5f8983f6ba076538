"""`adaptax analyze active`: does it help a learner to choose what it is told?"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
from rich.table import Table

from .. import report
from ..recipes import ENVIRONMENTS, TITLES, changed
from ..recipes.runs import load_run
from ..report.uncertainty import active_curves
from ..studies.active import ActiveCurves, active_learning
from ..text import shown
from .commands import AnalyzeActive
from .console import consoles, free_folder, save_figure
from .facts import command, dump, facts, keep
from .progress import scoring
from .settings import with_settings


def active(asked: AnalyzeActive) -> None:
    """Play the game with every run, on the same episodes, and write the curves."""
    out, progress = consoles()
    curves: dict[str, ActiveCurves] = {}
    families = set()
    for folder in asked.runs:
        run = load_run(folder, data_root=asked.data_root)
        experiment = with_settings(run.experiment, asked.set)
        if experiment.tasks in ENVIRONMENTS:
            raise ValueError(f"{folder} is of {experiment.tasks}, where there are no labels to ask")
        families.add(experiment.tasks)
        if len(families) > 1:
            raise ValueError(
                f"the runs are of {' and '.join(sorted(families))}; compare runs on the same tasks"
            )
        pooled = dataclasses.replace(
            experiment,
            task={**experiment.task, "train_shot": experiment.task.get("shot")},
            test_task={**experiment.test_task, "shot": asked.pool, "train_shot": None},
        )
        if asked.query is not None:
            pooled = changed(pooled, {"test_task": {"query": asked.query, "train_query": None}})
        splits = pooled.splits(run.config["data_root"], test=True)
        tasks = splits.test if asked.split == "test" else splits.val
        name = TITLES[experiment.algorithm]
        name = name if name not in curves else f"{name} ({shown(folder)})"
        noise = experiment.evaluation.get("noise", 1.0)
        with scoring(f"{name}, active", asked.episodes, progress) as watch:
            curves[name] = active_learning(
                experiment.build_learner(), run.meta, tasks,
                start=asked.start, queries=asked.labels,
                episodes=asked.episodes, key=jax.random.key(2**31 + asked.seed),
                noise=noise if isinstance(noise, float) else 1.0, watch=watch,
                strategies=asked.strategies, at_once=asked.at_once,
            )  # fmt: skip
    path = Path(asked.out) if asked.out else free_folder(f"active-{families.pop()}")
    path.mkdir(parents=True, exist_ok=True)
    plot = save_figure(active_curves(curves), path / "active.png")
    result = {
        "learners": [{"learner": name, **one.to_json()} for name, one in curves.items()],
        "command": command(asked, "analyze", "active", *asked.runs, out=path),
        "plots": [str(plot)],
        **facts(),
    }
    keep(path / "active.json", result)
    if asked.json:
        print(dump(result))
        return
    out.print(_table(curves))
    out.print("± is the 95 % confidence interval over episodes; gains are over random, in pairs.")
    out.print(f"results: {path} (active.json, {plot.name})", soft_wrap=True)


def _table(curves: dict[str, ActiveCurves]) -> Table:
    metric = next(iter(curves.values())).primary
    table = Table(title=f"{metric} by labels", title_justify="left")
    table.add_column("labels", justify="right")
    for name, one in curves.items():
        for strategy in one.values:
            table.add_column(f"{name}, {strategy}", justify="right")
        for strategy in one.informed:
            table.add_column(f"gain of {strategy}", justify="right")
    for i, labels in enumerate(next(iter(curves.values())).labels):
        cells = []
        for one in curves.values():
            cells += [
                report.number(metric, float(one.mean(strategy)[i]), float(one.ci95(strategy)[i]))
                for strategy in one.values
            ]
            for strategy in one.informed:
                gain, half = one.difference(of=strategy)
                sign = 1 if metric == "accuracy" else -1
                cells.append(report.number(metric, float(sign * gain[i]), float(half[i])))
        table.add_row(str(labels), *cells)
    return table

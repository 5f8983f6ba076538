"""Whether it helps runs to choose which examples they are told the labels of: `analyze_active`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np

from .. import report
from ..recipes import ENVIRONMENTS
from ..recipes.runs import load_run
from ..recipes.settings import with_settings
from ..report.tables import Cell, Score, Sheet
from ..text import shown
from .active import ActiveCurves, active_learning
from .study import Lab, Row, Study


def analyze_active(
    runs: Sequence[str],
    *,
    start: int = 1,
    labels: int = 10,
    at_once: int = 1,
    pool: int = 20,
    query: int | None = None,
    strategies: Sequence[str] = ("random", "entropy"),
    episodes: int = 300,
    split: Literal["test", "val"] = "test",
    set: Sequence[str] = (),
    trust: Sequence[str] = (),
    seed: int = 0,
    **where: Any,
) -> Study:
    """Let every one of several runs choose its labels, on the same episodes.

    Args:
        runs: run folders.
        start: labelled examples to start from, of each class where there are classes.
        labels: examples to label after those.
        at_once: how many of them to label at once.
        pool: examples in the pool, of each class where there are classes.
        query: examples that are scored, likewise; as many as in the run's own test if `None`.
        strategies: any of `STRATEGIES`.
        episodes: test tasks.
        split: whose tasks.
        set: settings of how the runs adapt, such as `"learner.reduction=balanced"`.
        trust: modules of your own that the runs name and may import.
        seed: names the tasks.
        where: `out`, `data_root` and `progress` of `Lab.at`.

    Raises:
        FileNotFoundError: if there is no run.
        ValueError: if the runs are of different tasks, or of such as have no labels.
    """
    loaded = [load_run(folder, data_root=where.get("data_root"), trust=trust) for folder in runs]
    families = sorted({run.experiment.tasks for run in loaded})
    for folder, run in zip(runs, loaded):
        if run.experiment.tasks in ENVIRONMENTS:
            raise ValueError(
                f"{folder} is of {run.experiment.tasks}, where there are no labels to ask"
            )
    if len(families) > 1:
        raise ValueError(
            f"the runs are of {' and '.join(families)}; compare runs on the same tasks"
        )
    lab = Lab.at(f"active-{families[0]}", **where)
    curves: dict[str, ActiveCurves] = {}
    for folder, run in zip(runs, loaded):
        experiment = with_settings(run.experiment, set)
        asked: dict[str, Any] = {"shot": pool}
        asked |= {} if query is None else {"query": query, "train_query": None}
        pooled = dataclasses.replace(
            experiment,
            task={**experiment.task, "train_shot": experiment.task.get("shot")},
            test_task={**experiment.test_task, "train_shot": None, **asked},
        )
        splits = pooled.splits(run.config["data_root"], test=True)
        name = experiment.title
        name = name if name not in curves else f"{name} ({shown(folder)})"
        noise = experiment.evaluation.get("noise", 1.0)
        with lab.progress.scoring(f"{name}, active", episodes) as watch:
            curves[name] = active_learning(
                experiment.build_learner(),
                run.meta,
                splits.test if split == "test" else splits.val,
                start=start,
                queries=labels,
                at_once=at_once,
                strategies=strategies,
                episodes=episodes,
                key=jax.random.key(2**31 + seed),
                noise=noise if isinstance(noise, float) else 1.0,
                watch=watch,
            )
    rows = [Row(name, [one], {"learner": name, **one.to_json()}) for name, one in curves.items()]
    return Study(
        "active",
        lab,
        rows,
        _sheet(curves),
        lambda: {"active": report.active_curves(curves)},
        {"learners": [row.record for row in rows]},
        ["± is the 95 % confidence interval over episodes; gains are over random, in pairs."],
    )


def _sheet(curves: Mapping[str, ActiveCurves]) -> Sheet:
    """Return scores and gains by the number of labels."""
    first = next(iter(curves.values()))
    metric = first.primary
    columns: dict[str, list[Cell]] = {"labels": [str(count) for count in first.labels]}
    for name, one in curves.items():
        for strategy in one.values:
            columns[f"{name}, {strategy}"] = _scores(metric, one.mean(strategy), one.ci95(strategy))
        for strategy in one.informed:
            sign = 1 if metric == "accuracy" else -1
            gain, half = one.difference(of=strategy)
            own = f"gain of {strategy}" if len(curves) == 1 else f"{name}, gain of {strategy}"
            columns[own] = _scores(metric, sign * gain, half)
    return Sheet(list(columns), list(zip(*columns.values())), f"{metric} by labels")


def _scores(metric: str, means: np.ndarray, halves: np.ndarray) -> list[Cell]:
    return [Score(metric, float(mean), float(half)) for mean, half in zip(means, halves)]

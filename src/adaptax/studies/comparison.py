"""Several learners on the same episodes, the papers' numbers beside: `compare`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from .. import report
from ..recipes import (
    PAPER_CURVES,
    RECIPES,
    Experiment,
    changed,
    comparable,
    default_learners,
    rows,
    table,
)
from ..recipes.runs import Trained
from ..recipes.settings import known_algorithms, with_path
from ..report.tables import Cell, Mean, Score
from .ambiguity import compare_uncertainty
from .reinforcement import compare_returns
from .rows import compare_rows
from .study import PICTURED, Lab, Row, Study, difference, sheet

SHOWN = (0, 1, 5, 10)
"""Adaptation steps in the table, beside those of each learner's own protocol."""

DRAWN = (0, 1, 2, 3, 4, 5, 7, 10, 20, 30, 50)
"""Adaptation steps in the figure, likewise."""


def compare(
    tasks: str,
    algorithms: Sequence[str] = (),
    *,
    way: int | None = None,
    shot: int | None = None,
    steps: int | None = None,
    seeds: int = 1,
    episodes: int | None = None,
    path: str | None = None,
    task: str | None = None,
    target: Sequence[str] = (),
    features: Sequence[str] = (),
    ignore: Sequence[str] = (),
    order: str | None = None,
    split: str | None = None,
    **where: Any,
) -> Study:
    """Train several algorithms, test them on the same episodes, and set the papers' numbers beside.

    Images and sinusoids are scored after several numbers of adaptation steps. Where uncertainty
    counts, there are likelihoods and the coverage of intervals beside the errors, and of
    environments returns by gradient step.

    Args:
        tasks: a name in `adaptax.recipes.FAMILIES`, one's own, `my_module:my_tasks`, or
            `"ambiguous"`, which is `sinusoid_or_line`.
        algorithms: names in `adaptax.recipes.LEARNERS`, or one's own, `my_module:MyLearner`; those
            that the papers compare if empty.
        way: classes an episode; 5 if `None`.
        shot: support examples a class; 1 if `None`.
        steps: meta-steps; short ones if `None`.
        seeds: trainings of each algorithm.
        episodes: of the test.
        path: the images of the task family `folder`, or the file of a table.
        task: of a table, the column that names the task of a row.
        target: of a table, the columns to predict.
        features: of a table, the columns to predict from; all others if empty.
        ignore: of a table, columns to leave out.
        order: of a table, a column of times.
        split: of a table, a column that says which split a task is of.
        where: `out`, `data_root` and `progress` of `Lab.at`.

    Raises:
        ValueError: for what the tasks do not have, or an algorithm that cannot do them.

    Example:
        `print(adaptax.studies.compare("sinusoid", ["maml", "reptile"], steps=1000, episodes=200))`
    """
    family = "sinusoid_or_line" if tasks == "ambiguous" else tasks
    columns = {"task": task, "target": target, "features": features, "ignore": ignore,
               "order": order, "split": split}  # fmt: skip
    family = rows.family_of(path, target) if family == rows.NUMBERS else family
    lab = Lab.at(f"compare-{tasks}", **where)
    changes: dict[str, Any] = {"steps": steps, "evaluation": {"episodes": episodes}}
    table.trust(*table.own(family))
    row = table.family(family)
    acts = row.kind == "environment"
    if row.has("rows"):
        return _compare_rows(lab, family, algorithms, changes, columns, path, way, shot, seeds)
    if chosen := [name for name, value in columns.items() if value]:
        raise ValueError(f"{tasks} is no table; leave out --{' and --'.join(chosen)}")
    if acts or row.has("ambiguous"):
        if any(value is not None for value in (way, path, shot if acts else None)) or seeds != 1:
            options = "--way, --shot, --path or --seeds" if acts else "--way, --seeds or --path"
            raise ValueError(f"{tasks} has no {options}; leave them out")
        if acts:
            changes["evaluation"] = {"goals": episodes}
            return compare_returns(lab, family, algorithms, changes)
        return compare_uncertainty(lab, family, algorithms, {"task": {"shot": shot}, **changes})
    sinusoid = tasks == "sinusoid"
    if sinusoid and (way is not None or shot is not None):
        raise ValueError("sinusoids are compared as in MAML's paper; leave out --way and --shot")
    experiments = {}
    for name in known_algorithms(algorithms or default_learners(tasks)):
        experiment = comparable(name, tasks, way or 5, 1 if shot is None else shot)
        experiments[name] = changed(with_path(experiment, path), changes)
    lab.check(experiments)
    found = [_row(lab, name, experiment, seeds) for name, experiment in experiments.items()]
    return _study(lab, tasks, found)


def _compare_rows(
    lab: Lab,
    family: str,
    algorithms: Sequence[str],
    changes: dict[str, Any],
    columns: Mapping[str, Any],
    path: str | None,
    way: int | None,
    shot: int | None,
    seeds: int,
) -> Study:
    if way is not None or seeds != 1:
        raise ValueError("a table has no --way or --seeds; leave them out")
    said = {n: v[0] if n == "target" and len(v) == 1 else v for n, v in columns.items() if v}
    task = {n: list(v) if isinstance(v, tuple) else v for n, v in said.items()}
    return compare_rows(lab, family, algorithms, {**changes, "task": {**task, "shot": shot}}, path)


def _row(lab: Lab, name: str, experiment: Experiment, seeds: int) -> Row:
    trained, reports = [], []
    for seed in range(seeds):
        folder = name if seeds == 1 else f"{name}-seed{seed}"
        every = None if experiment.tasks == "sinusoid" else max(experiment.steps // 4, 1)
        one = lab.fit(dataclasses.replace(experiment, seed=seed), folder, validate_every=every)
        trained.append(one)
        reports.append(_report(lab, one))
    return Row(experiment.title, reports, trained=trained)


def _report(lab: Lab, trained: Trained) -> Any:
    """Score after every number of steps that is drawn, and after those of its own protocol."""
    experiment = trained.experiment
    own = experiment.eval_steps
    fixed = "eval_steps" not in experiment.settings or own == 0
    most = own if fixed else max(own, max(SHOWN))
    at = sorted({step for step in (*DRAWN, own) if step <= most})
    return lab.test(experiment, trained.meta, trained.test, experiment.title, steps=most, at=at)


def _study(lab: Lab, tasks: str, rows: Sequence[Row]) -> Study:
    sinusoid, seeds = tasks == "sinusoid", len(rows[0].reports)
    first = rows[0].report
    shape, metric = first.protocol, first.primary
    cell = f"{shape['way']}-way " if "way" in shape else ""
    title = f"{tasks}, {cell}{shape['shot']}-shot, {shape['episodes']} test episodes"
    over = "over episodes" if seeds == 1 else f"over {seeds} seeds"
    means = {row.name: Mean(row.reports) for row in rows}
    paper = {row.name: PAPER_CURVES.get(row.experiment.algorithm, {}) for row in rows}
    scores = {row.name: _scores(row) for row in rows}
    headings = dict.fromkeys(heading for one in scores.values() for heading in one)

    def named(row: Row) -> str:
        return row.name if sinusoid else f"{row.name} ({row.experiment.eval_steps} steps)"

    def scored(heading: str) -> Callable[[Row], Cell]:
        return lambda row: scores[row.name].get(heading, "")

    columns: dict[str, Callable[[Row], Cell]] = {
        "algorithm": named,
        **{heading: scored(heading) for heading in headings},
        f"− {rows[0].name}": lambda row: "" if row is rows[0] else difference(row, rows[0]),
        "paper": _paper,
        "trained in": lambda row: f"{row.seconds:.0f} s",
    }

    def draw() -> Mapping[str, Any]:
        figures = {
            "comparison": report.comparison(means, paper=paper if sinusoid else None, title=title)
        }
        if sinusoid:
            learners = {r.name: (r.experiment.build_learner(), r.trained[0].meta) for r in rows}
            test = rows[0].trained[0].test.test
            figures["adaptation"] = report.adaptations(learners, test, key=jax.random.key(PICTURED))
        return figures

    record = {
        "title": title,
        "algorithms": [
            {
                "algorithm": row.experiment.algorithm,
                "paper": _paper(row),
                "scores": {
                    h: {"mean": s.mean, "ci95": s.ci95} for h, s in scores[row.name].items()
                },
                "difference": difference(row, rows[0]).to_json(),
                "seconds": row.seconds,
                "reports": [one.to_json() for one in row.reports],
                "experiment": row.experiment.to_json(),
            }
            for row in rows
        ],
        "ci95": over,
    }
    same = "every algorithm sees the same ones." if seeds == 1 else "(Student's t)."
    notes = [
        f"± is the 95 % confidence interval {over}{';' if seeds == 1 else ''} {same}",
        report.summary(first),
        *(f"{row.name}: fine-tuned with step size {row.experiment.learner['inner_lr']}, chosen on "
          "validation tasks" for row in rows if row.experiment.tune),
    ]  # fmt: skip
    table = sheet(f"{title}: {metric}", columns, rows)
    return Study("comparison", lab, rows, table, draw, record, notes)


def _scores(row: Row) -> dict[str, Score]:
    """Return scores by their headings."""
    mean, own = Mean(row.reports), row.experiment.eval_steps
    at = list(mean.at)
    scores = {f"{step} step{'s' * (step != 1)}": mean.score(step=i)
              for i, step in enumerate(at) if step in SHOWN}  # fmt: skip
    if row.experiment.tasks != "sinusoid":
        scores["own protocol"] = mean.score(step=at.index(own) if own in at else -1)
    return scores


def _paper(row: Row) -> str:
    """Return the published number of this cell."""
    experiment = row.experiment
    if experiment.tasks == "sinusoid":
        curve = PAPER_CURVES.get(experiment.algorithm, {})
        return " / ".join(f"{value:.2f}" for value in curve.values()) or "no number"
    task = experiment.task
    cell = f"{task.get('way')}w{task.get('shot')}s"
    name = f"{experiment.algorithm}-{experiment.tasks}-{cell}"
    return RECIPES[name].paper if name in RECIPES else "no number"

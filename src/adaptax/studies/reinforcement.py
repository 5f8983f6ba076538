"""Comparisons on environments: returns by gradient step, beside baselines and the paper's."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from matplotlib.figure import Figure

from .. import report
from ..recipes import BODIES, COMPARED, RETURNS, changed, comparable, oracle
from ..recipes.runs import Trained
from ..recipes.settings import known_algorithms
from ..report.frames import frames
from .study import PICTURED, Lab, Row, Study, difference

RANDOM, ORACLE = "Random policy", "Oracle"
STOPPED = "Pretrained, stopped early"
"""By the returns after adaptation on validation goals, as the meta-learners are; joint training
itself has nothing to stop by, and the row `Pretrained` is of its end, as in MAML's paper."""


def compare_returns(
    lab: Lab, family: str, algorithms: Sequence[str], changes: Mapping[str, Any]
) -> Study:
    """Compare learners on a family in `adaptax.recipes.ENVIRONMENTS`; see `compare`.

    Args:
        lab: where to train.
        family: its name.
        algorithms: names; those that the papers compare if empty.
        changes: of their experiments.
    """
    names = known_algorithms(algorithms or COMPARED.get(family, COMPARED["navigation"]))
    experiments = {name: changed(comparable(name, family), changes) for name in names}
    if family == "navigation":
        experiments[ORACLE] = oracle(next(iter(experiments.values())))
    # All of them first, so that a run that cannot be resumed is told before any test.
    trained = {name: lab.fit(one, name.lower()) for name, one in experiments.items()}
    rows = []
    for name, one in trained.items():
        oracles = name == ORACLE
        title = name if oracles else one.experiment.title
        last = one.experiment.row.joint and not oracles
        meta, step = (one.last, one.experiment.steps) if last else (one.meta, one.step)
        rows.append(_row(lab, title, one, meta, step))
        if last:
            rows.append(_row(lab, STOPPED, one, one.meta, one.step))
    first = rows[0].trained[0]
    untrained = first.experiment.untrained()
    rows.append(Row(RANDOM, [lab.test(first.experiment, untrained, first.test, RANDOM)]))
    return _study(lab, family, rows)


def _row(lab: Lab, name: str, trained: Trained, meta: Any, step: int) -> Row:
    found = lab.test(trained.experiment, meta, trained.test, name)
    about = {"seconds": trained.seconds, "step": step, "experiment": trained.experiment.to_json()}
    return Row(name, [found], about, [trained])


def _study(lab: Lab, family: str, rows: Sequence[Row]) -> Study:
    paper, first = RETURNS.get(family, {}), rows[0]
    title = f"{family}, return by gradient step, {first.report.protocol['goals']} test tasks"
    found = {row.name: row.report for row in rows}

    def said(row: Row) -> dict[str, Any]:
        gap = {"difference": difference(row, first).to_json()} if paired(row) else {}
        return {
            "name": row.name,
            "paper": paper.get(row.name, {}),
            **row.record,
            **gap,
            **row.report.to_json(),
        }

    def paired(row: Row) -> bool:
        """Whether it took as many steps as the first."""
        return len(row.report.at) == len(first.report.at)

    table = report.returns_table(found, title, paper)
    gaps = [difference(row, first) if paired(row) and row is not first else "" for row in rows]
    table = dataclasses.replace(
        table,
        headings=[*table.headings, f"− {first.name}"],
        rows=[[*cells, gap] for cells, gap in zip(table.rows, gaps)],
    )
    notes = ["± is the 95 % confidence interval over tasks; every learner sees the same ones."]
    notes += [f"{row.name}: of meta-iteration {row.record['step']}, {row.seconds:.0f} s"
              for row in rows if row.trained]  # fmt: skip
    notes += [f"{name}: {report.protocol_line(one.protocol)}" for name, one in found.items()]
    record = {"title": title, "rows": [said(row) for row in rows]}

    def draw() -> dict[str, Figure]:
        returns = report.returns_by_step(found, paper=paper, title=title)
        return {"returns": returns, **behaviour(first.trained[0])}

    return Study("comparison", lab, rows, table, draw, record, notes)


def behaviour(trained: Trained) -> dict[str, Figure]:
    """Draw what policies do before and after adaptation, where that can be drawn.

    Args:
        trained: on environments.
    """
    tasks: Any = trained.test.test
    draw = {"navigation": report.trajectories, **dict.fromkeys(BODIES, frames)}
    name = trained.experiment.tasks
    if name not in draw:
        return {}
    figure = draw[name](
        trained.experiment.build_learner(), trained.meta, tasks, key=jax.random.key(PICTURED)
    )
    return {"trajectories" if name == "navigation" else "frames": figure}

"""`adaptax predict` of a run on a table: any number of tasks in one file."""

from __future__ import annotations

import dataclasses
from typing import Any

from rich.table import Table

from .. import io
from ..recipes import rows
from ..recipes.runs import LoadedRun
from ..report.record import dump
from ..text import shown
from .commands import Predict
from .console import consoles

SHOWN = 20
"""Rows that are printed; the file holds all."""


def predict(run: LoadedRun, options: Predict, write: Any) -> None:
    """Adapt a run to every task of a table, predict the rows of another, and show them.

    Args:
        run: on a table.
        options: of the command.
        write: makes the bytes of the file of a list of rows; `None` without one.

    Raises:
        ValueError: for options of images, or more than one file of queries.
    """
    if options.invert or options.transductive or len(options.query) != 1:
        raise ValueError(
            "a table is predicted from --support and --query, one file each; leave out --invert, "
            "--transductive and further files"
        )
    experiment = run.experiment
    if options.steps is not None:
        name = "eval_steps" if "eval_steps" in experiment.settings else "inner_steps"
        learner = {**experiment.learner, name: options.steps}
        experiment = dataclasses.replace(experiment, learner=learner)
    found = rows.predicted(
        experiment, run.meta, run.path, options.support, options.query[0], options.coverage
    )
    names = list(found.columns)
    lines = [dict(zip(names, values)) for values in zip(*found.columns.values())]
    if write is not None:
        io.write_atomic(options.out or "", write(lines))
    if options.json:
        about = {"run": options.run, "tasks": found.tasks, "coverage": found.coverage}
        print(dump({**about, "predictions": lines}))
        return
    table = Table()
    for name in names[:5]:
        table.add_column(shown(name), justify="left" if name == names[0] else "right")
    for line in lines[:SHOWN]:
        table.add_row(*(_cell(line[name]) for name in names[:5]))
    out = consoles()[0]
    out.print(table)
    if len(lines) > SHOWN:
        out.print(f"{SHOWN} of {len(lines):,} rows, of {found.tasks:,} tasks")
    if write is not None:
        out.print(f"predictions: {shown(options.out)}", soft_wrap=True)


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else shown(value)

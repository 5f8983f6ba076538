"""What all studies do alike: train in folders, test, and show what was found.

A study is a function, such as `compare`, that trains and tests by a `Lab` and answers with a
`Study`. What is trained is kept, so that the same call goes on where it was interrupted.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from io import StringIO
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console

from .. import io, report
from ..engine.run import Run
from ..learner import Meta
from ..recipes import Experiment
from ..recipes.runs import Progress, Silent, Trained, fit_or_resume, free_folder, nothing_lost
from ..report.record import facts, keep
from ..report.style import Format
from ..report.tables import Cell, Score, Sheet, students
from ..task import Splits

PICTURED = 3
"""Names the test task of figures."""


@dataclasses.dataclass(frozen=True)
class Lab:
    """Where a study keeps its trainings, and how it shows its progress.

    Args:
        folder: of the study; each training has a folder of its own in it.
        data_root: folder of the data sets, else ADAPTAX_DATA, else the user's cache.
        command: what goes on with an interrupted study, in words.
        progress: shows trainings and tests.
    """

    folder: Path
    data_root: str | None
    command: str
    progress: Progress

    @classmethod
    def at(
        cls,
        name: str,
        *,
        out: str | os.PathLike[str] | None = None,
        data_root: str | None = None,
        progress: Progress | None = None,
        command: Callable[[Path], str] = lambda folder: "the same call",
    ) -> Lab:
        """Return the lab in a folder.

        Args:
            name: of the folder in `runs` if `out` is `None`.
            out: the folder.
            data_root: folder of the data sets, else ADAPTAX_DATA, else the user's cache.
            progress: shows trainings and tests; nothing if `None`.
            command: says what goes on with an interrupted study in a folder.
        """
        folder = free_folder(name) if out is None else Path(out)
        return cls(folder, data_root, command(folder), progress or Silent())

    def check(self, experiments: Mapping[str, Experiment]) -> None:
        """Raise if the data are bad, before anything is written."""
        next(iter(experiments.values())).splits(self.data_root, test=True)

    def fit(self, experiment: Experiment, name: str, **how: Any) -> Trained:
        """Train, or go on with the training of this name.

        Args:
            experiment: what to train.
            name: of its folder.
            how: further arguments of `adaptax.recipes.runs.fit_or_resume`.
        """
        how = {"data_root": self.data_root, **how}
        return fit_or_resume(experiment, self.folder / name, self.command, self.progress, **how)

    def test(
        self, experiment: Experiment, meta: Meta, splits: Splits, title: str, **how: Any
    ) -> Any:
        """Return the report of meta-parameters on the test episodes.

        Args:
            experiment: whose.
            meta: meta-parameters.
            splits: of the test.
            title: of the progress.
            how: further arguments of `Experiment.test`.
        """
        message = f"interrupted; what is trained is kept, go on with: {self.command}"
        shown = self.progress.scoring(f"{title}, test", experiment.episodes)
        with nothing_lost(message), shown as watch:
            return experiment.test(meta, splits, watch=watch, **how)

    def kept(self, experiment: Experiment, name: str) -> Any:
        """Return what `keep` kept of an experiment; `None` if it kept nothing.

        Raises:
            ValueError: if the folder holds a run of another experiment.
        """
        run = Run(self.folder / name)
        if not run.checkpoint_file.exists() or not (run.path / "test.json").is_file():
            return None
        if run.config().get("experiment") != experiment.to_json():
            raise ValueError(
                f"{run.path} holds a run with other settings; choose another folder with --out"
            )
        return json.loads((run.path / "test.json").read_text())

    def keep(self, name: str, scores: Any) -> None:
        """Keep JSON values beside the training of a name."""
        keep(self.folder / name / "test.json", scores)


@dataclasses.dataclass(frozen=True)
class Row:
    """A line of a study: what was trained or measured, and what came out.

    Args:
        name: as it is written.
        reports: its scores: one report, or one for each seed.
        record: what the JSON says of it.
        trained: what was trained for it, for each seed.
    """

    name: str
    reports: Sequence[Any] = ()
    record: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    trained: Sequence[Trained] = ()

    @property
    def report(self) -> Any:
        """The report of the first seed."""
        return self.reports[0]

    @property
    def experiment(self) -> Experiment:
        """What was trained, of the first seed."""
        return self.trained[0].experiment

    @property
    def seconds(self) -> float:
        """Of meta-training, the mean over seeds."""
        return sum(one.seconds for one in self.trained) / len(self.trained)


@dataclasses.dataclass(frozen=True)
class Study:
    """A finished study. It prints as its table and the notes to it.

    Args:
        name: of its files.
        lab: where it was made.
        rows: what was trained or measured.
        table: of them.
        draw: draws the figures, by the names of their files.
        record: what the JSON says of it.
        notes: lines below the table.
    """

    name: str
    lab: Lab
    rows: Sequence[Row]
    table: Sheet
    draw: Callable[[], Mapping[str, Figure]]
    record: Mapping[str, Any]
    notes: Sequence[str] = ()

    @property
    def reports(self) -> dict[str, Any]:
        """The report of each row, of the first seed, by the names of the rows."""
        return {row.name: row.report for row in self.rows}

    @functools.cached_property
    def figures(self) -> Mapping[str, Figure]:
        """The figures, drawn when they are first asked for."""
        return self.draw()

    def to_json(self) -> dict[str, Any]:
        """Return settings and scores as JSON values, with what they depend on."""
        return io.strict({**self.record, "command": self.lab.command, **facts()})

    def save(
        self, folder: str | os.PathLike[str] | None = None, format: Format = "png"
    ) -> dict[str, Any]:
        """Write figures, `table.csv`, `table.tex` and `NAME.json`.

        Args:
            folder: where to; that of the trainings if `None`.
            format: of figures, beside PNG.

        Returns:
            The content of the JSON file.
        """
        where = self.lab.folder if folder is None else Path(folder)
        result = self.to_json() | {"plots": report.save(self.figures, where, format)}
        io.write_atomic(where / "table.csv", self.table.csv().encode())
        io.write_atomic(where / "table.tex", self.table.latex().encode())
        keep(where / f"{self.name}.json", result)
        return result

    def __str__(self) -> str:
        text = StringIO()
        console = Console(width=140, file=text, markup=False, highlight=False, emoji=False)
        console.print(self.table, *self.notes, sep="\n", soft_wrap=True)
        return text.getvalue()


def sheet(title: str, columns: Mapping[str, Callable[[Row], Cell]], rows: Sequence[Row]) -> Sheet:
    """Return the table of rows, its columns functions of them by their headings."""
    cells = [[column(row) for column in columns.values()] for row in rows]
    return Sheet(list(columns), cells, title)


def difference(row: Row, first: Row, metric: str | None = None) -> Score:
    """Return what a row scores more than the first one, with the interval of the pairs.

    Episodes are paired, or seeds if there are several.

    Args:
        row: of a study.
        first: another.
        metric: the primary one if `None`.
    """
    metric = metric or row.report.primary
    pairs = [a.difference(b, metric) for a, b in zip(row.reports, first.reports)]
    return Score(metric, *(pairs[0] if len(pairs) == 1 else students([gap for gap, _ in pairs])))

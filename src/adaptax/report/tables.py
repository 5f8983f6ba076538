"""Tables of scores: for the terminal, as CSV and as LaTeX."""

from __future__ import annotations

import csv
import dataclasses
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from rich.table import Table


@runtime_checkable
class Curve(Protocol):
    """Scores after several numbers of adaptation steps: a report, or a `Mean` of reports."""

    @property
    def primary(self) -> str:
        """The metric that stands for all."""
        ...

    @property
    def at(self) -> Sequence[int | None]:
        """Numbers of steps that were scored."""
        ...

    def mean(self, metric: str, step: int = -1) -> float:
        """Return the mean at one of the steps, by position."""
        ...

    def ci95(self, metric: str, step: int = -1) -> float:
        """Return half the 95 % confidence interval of that mean."""
        ...


class Score(NamedTuple):
    """A cell of a table: a mean, and half its 95 % confidence interval if it has one.

    Args:
        metric: accuracies are shown in per cent.
        mean: the score.
        ci95: half its interval.
        note: what is written behind it.
    """

    metric: str
    mean: float
    ci95: float | None = None
    note: str = ""

    def to_json(self) -> dict[str, float | None]:
        """Return mean and interval."""
        return {"mean": self.mean, "ci95": self.ci95}

    def __str__(self) -> str:
        return number(self.metric, self.mean, self.ci95) + self.note


Cell = str | Score


@dataclasses.dataclass(frozen=True)
class Sheet:
    """A table, which Rich prints: its headings, and in each row as many cells.

    Args:
        headings: of the columns; the first is that of names.
        rows: cells.
        title: above it.
        left: further headings of columns that are of words.
    """

    headings: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    title: str = ""
    left: Sequence[str] = ("paper",)

    def __rich__(self) -> Table:
        table = Table(title=self.title or None, title_justify="left")
        for heading in self.headings:
            words = heading in (self.headings[0], *self.left)
            table.add_column(heading, justify="left" if words else "right")
        for row in self.rows:
            table.add_row(*map(str, row))
        return table

    def csv(self) -> str:
        """Return it as comma-separated values: scores in full, their intervals in columns."""
        scores = [any(isinstance(cell, Score) for cell in column) for column in zip(*self.rows)]
        text = io.StringIO(newline="")
        writer = csv.writer(text)
        for row in (self.headings, *self.rows):
            cells: list[object] = []
            for cell, wide in zip(row, scores):
                one, ci95 = (cell.mean, cell.ci95) if isinstance(cell, Score) else (cell, None)
                cells += [one, f"{cell} ci95" if row is self.headings else ci95][: 1 + wide]
            writer.writerow(cells)
        return text.getvalue()

    def latex(self) -> str:
        """Return it as a `tabular` of LaTeX with the rules of `booktabs`."""
        kinds = "".join("l" if h in (self.headings[0], *self.left) else "r" for h in self.headings)
        lines = [f"% {self.title}"] if self.title else []
        lines += [rf"\begin{{tabular}}{{{kinds}}}", r"\toprule", _latex(self.headings), r"\midrule"]
        lines += [*map(_latex, self.rows), r"\bottomrule", r"\end{tabular}"]
        return "\n".join(lines) + "\n"


@dataclasses.dataclass(frozen=True)
class Mean:
    """The mean of reports over seeds, with its interval by Student's t.

    Of one report it is the mean over episodes, and the interval of that. Episodes that diverged are
    left out.

    Args:
        reports: one for each seed, of the same protocol.
    """

    reports: Sequence[Any]

    @property
    def primary(self) -> str:
        """The metric that stands for all."""
        return self.reports[0].primary

    @property
    def at(self) -> Sequence[int | None]:
        """Numbers of adaptation steps that were scored."""
        return self.reports[0].at

    def mean(self, metric: str, step: int = -1) -> float:
        """Return the mean over seeds.

        Args:
            metric: one of the reports'.
            step: position in `at`.
        """
        return float(np.mean([r.mean(metric, step, diverged=False) for r in self.reports]))

    def ci95(self, metric: str, step: int = -1) -> float:
        """Return half the 95 % confidence interval of that mean: over seeds if there are several.

        Args:
            metric: one of the reports'.
            step: position in `at`.
        """
        if len(self.reports) == 1:
            return self.reports[0].ci95(metric, step, diverged=False)
        return students([r.mean(metric, step, diverged=False) for r in self.reports])[1]

    def score(self, metric: str | None = None, step: int = -1) -> Score:
        """Return the cell of a table, with how many episodes diverged.

        Args:
            metric: the primary one if `None`.
            step: position in `at`.
        """
        metric = metric or self.primary
        lost = sum(report.diverged(step) for report in self.reports)
        note = f" ({lost} diverged)" if lost else ""
        return Score(metric, self.mean(metric, step), self.ci95(metric, step), note)


def students(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean, and half its 95 % confidence interval by Student's t."""
    from scipy.special import stdtrit

    error = float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return float(np.mean(values)), float(stdtrit(len(values) - 1, 0.975)) * error


def scale(metric: str) -> float:
    """Return what a metric is multiplied by to be shown: accuracies are in per cent."""
    return 100.0 if metric == "accuracy" else 1.0


def number(metric: str, mean: float, ci95: float | None = None) -> str:
    """Return a score as it is printed: `98.72 ± 0.31 %`, `0.351 ± 0.012`.

    Args:
        metric: accuracies are shown in per cent; they and returns with two digits, others three.
        mean: the score.
        ci95: half its confidence interval, if there is one.
    """
    factor, unit = scale(metric), " %" if metric == "accuracy" else ""
    if not math.isfinite(mean) or abs(mean) > 1e6:
        return f"{mean:.2g}"
    digits = 2 if metric in ("accuracy", "return") else 3
    shown = f"{factor * mean:.{digits}f}"
    if ci95 is not None and math.isfinite(ci95):
        shown += f" ± {factor * ci95:.{digits}f}"
    return shown + unit


def report_table(report: Any, title: str = "") -> Sheet:
    """Return the metrics of a report after each of the scored steps.

    Args:
        report: what `adaptax.evaluate` answered.
        title: of the table.
    """
    primary, steps = report.primary, range(len(report.at))
    names = [name for name in report.values if name != primary]
    columns: dict[str, list[Cell]] = {
        "steps": ["–" if step is None else str(step) for step in report.at],
        f"{primary} ± 95 % CI": [
            Score(primary, report.mean(primary, i), report.ci95(primary, i)) for i in steps
        ],
    }
    columns |= {name: [Score(name, report.mean(name, i)) for i in steps] for name in names}
    if report.bins is not None:
        columns["ece"] = [f"{report.ece(i):.3f}" for i in steps]
    if any(map(report.diverged, steps)):
        columns["diverged"] = [str(report.diverged(i)) for i in steps]
        columns[f"{primary} of the others"] = [
            Score(primary, report.mean(primary, i, diverged=False)) for i in steps
        ]
    return Sheet(list(columns), list(zip(*columns.values())), title)


def summary(report: Any) -> str:
    """Return the protocol that a score belongs to, in one line."""
    bad = report.diverged()
    return protocol_line(report.protocol) + (f"; {bad} episodes diverged" if bad else "")


def protocol_line(protocol: Mapping[str, Any]) -> str:
    """Return what numbers depend on, in one line."""
    return ", ".join(f"{name} {_plain(value)}" for name, value in protocol.items())


def comparison_table(rows: Sequence[Mapping[str, Any]], title: str = "") -> Sheet:
    """Return a row for each algorithm, the paper's number beside ours.

    Args:
        rows: each with `name`, `metric`, `scores` (`{heading: (mean, ci95)}`), `diverged`
            (`{heading: episodes}` that the scores leave out), `paper` and `seconds` of training.
        title: of the table.
    """
    headings = list(dict.fromkeys(heading for row in rows for heading in row["scores"]))

    def cell(row: Mapping[str, Any], heading: str) -> Cell:
        if heading not in row["scores"]:
            return ""
        mean, ci95 = row["scores"][heading]
        lost = row.get("diverged", {}).get(heading, 0)
        return Score(row["metric"], mean, ci95, f" ({lost} diverged)" if lost else "")

    return Sheet(
        ["algorithm", *headings, "paper", "trained in"],
        [[row["name"], *(cell(row, heading) for heading in headings), row["paper"],
          f"{row['seconds']:.0f} s"] for row in rows],
        title,
    )  # fmt: skip


def returns_table(
    returns: Mapping[str, Any],
    title: str = "",
    paper: Mapping[str, Mapping[int, float]] | None = None,
) -> Sheet:
    """Return a row for each learner: its return after every number of gradient steps.

    Args:
        returns: what `adaptax.rl.evaluate` answered, for each name.
        title: of the table.
        paper: published returns, `{name: {steps: return}}`.
    """
    steps = [range(len(one.at)) for one in returns.values()]
    most = max(map(len, steps))
    rows: list[list[Cell]] = []
    for (name, one), own in zip(returns.items(), steps):
        scores = [Score("return", one.mean("return", i), one.ci95("return", i)) for i in own]
        rows.append([name, *scores, *[""] * (most - len(own))])
        if paper:
            rows[-1].append(" / ".join(f"{value:g}" for value in paper.get(name, {}).values()))
    headings = [f"{step} step{'s' * (step != 1)}" for step in range(most)]
    return Sheet(["learner", *headings, *(["paper"] if paper else [])], rows, title)


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)


_TEX = {**{c: f"\\{c}" for c in "&%$#_{}"}, "\\": r"\textbackslash{}", "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}", "±": r"$\pm$", "−": "$-$", "–": "--", "α": r"$\alpha$",
        "ε": r"$\varepsilon$", "²": r"$^2$", "…": r"\dots{}"}  # fmt: skip


def _latex(cells: Sequence[Cell]) -> str:
    """Return a row of a `tabular`."""
    return " & ".join("".join(_TEX.get(c, c) for c in str(cell)) for cell in cells) + r" \\"

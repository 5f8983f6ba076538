"""Tables of scores for the terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from ..engine.report import Report
from .style import scale


def number(metric: str, mean: float, ci95: float | None = None) -> str:
    """A score as it is printed: `98.72 ± 0.31 %`, `0.351 ± 0.012`.

    Args:
        metric: accuracies are shown in per cent.
        mean: the score.
        ci95: half its confidence interval, if there is one.
    """
    factor, unit = scale(metric), " %" if metric == "accuracy" else ""
    if not math.isfinite(mean) or abs(mean) > 1e6:
        return f"{mean:.2g}"
    digits = 2 if metric == "accuracy" else 3
    shown = f"{factor * mean:.{digits}f}"
    if ci95 is not None and math.isfinite(ci95):
        shown += f" ± {factor * ci95:.{digits}f}"
    return shown + unit


def report_table(report: Report, title: str = "") -> Table:
    """The metrics of a report after each of the scored steps."""
    table = Table(title=title or None, title_justify="left")
    table.add_column("steps", justify="right")
    names = [report.primary, *(name for name in report.values if name != report.primary)]
    for name in names:
        table.add_column(name if name != report.primary else f"{name} ± 95 % CI", justify="right")
    if report.bins is not None:
        table.add_column("ece", justify="right")
    last, diverged = len(report.at) - 1, any(map(report.diverged, range(len(report.at))))
    if diverged:
        table.add_column("diverged", justify="right")
        table.add_column(f"{report.primary} of the others", justify="right")
    for i, step in enumerate(report.at):
        cells = [
            number(report.primary, report.mean(report.primary, i), report.ci95(report.primary, i))
        ]
        cells += [number(name, report.mean(name, i)) for name in names[1:]]
        cells += [f"{report.ece(i):.3f}"] if report.bins is not None else []
        if diverged:
            others = report.mean(report.primary, i, diverged=False)
            cells += [str(report.diverged(i)), number(report.primary, others)]
        table.add_row(
            "–" if step is None else str(step), *cells, style="bold" if i == last else None
        )
    return table


def summary(report: Report) -> str:
    """The protocol that the score belongs to, in one line."""
    bad = report.diverged()
    return protocol_line(report.protocol) + (f"; {bad} episodes diverged" if bad else "")


def protocol_line(protocol: Mapping[str, Any]) -> str:
    """What numbers depend on, in one line."""
    return ", ".join(f"{name} {_plain(value)}" for name, value in protocol.items())


def comparison_table(rows: Sequence[Mapping[str, Any]], title: str = "") -> Table:
    """A row for each algorithm, the paper's number beside ours.

    Args:
        rows: each with `name`, `metric`, `scores` (`{heading: (mean, ci95)}`), `diverged`
            (`{heading: episodes}` that the scores leave out), `paper` and `seconds` of training.
        title: of the table.
    """
    metric = rows[0]["metric"]
    headings = list(dict.fromkeys(heading for row in rows for heading in row["scores"]))
    table = Table(title=title or None, title_justify="left")
    table.add_column("algorithm")
    for heading in headings:
        table.add_column(heading, justify="right")
    table.add_column("paper")
    table.add_column("trained in", justify="right")
    for row in rows:
        cells = [
            number(metric, *row["scores"][heading]) + _counted(row, heading)
            if heading in row["scores"]
            else ""
            for heading in headings
        ]
        table.add_row(row["name"], *cells, row["paper"], f"{row['seconds']:.0f} s")
    return table


def returns_table(
    returns: Mapping[str, Report],
    title: str = "",
    paper: Mapping[str, Mapping[int, float]] | None = None,
) -> Table:
    """A row for each learner: its return after every number of gradient steps.

    Args:
        returns: what `adaptax.rl.evaluate` answered, for each name.
        title: of the table.
        paper: published returns, `{name: {steps: return}}`.
    """
    paper = paper or {}
    most = max(len(one.at) for one in returns.values())
    table = Table(title=title or None, title_justify="left")
    table.add_column("learner")
    for step in range(most):
        table.add_column(f"{step} step{'s' * (step != 1)}", justify="right")
    if paper:
        table.add_column("paper")
    for name, one in returns.items():
        cells = [
            f"{one.mean(step=step):.2f} ± {one.ci95(step=step):.2f}" for step in range(len(one.at))
        ]
        cells += [""] * (most - len(cells))
        if paper:
            cells.append(" / ".join(f"{value:g}" for value in paper.get(name, {}).values()))
        table.add_row(name, *cells)
    return table


def _counted(row: Mapping[str, Any], heading: str) -> str:
    count = row.get("diverged", {}).get(heading, 0)
    return f" ({count} diverged)" if count else ""


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)

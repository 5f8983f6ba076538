"""Whether predictions are as sure as they are right: reliability and coverage diagrams."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..engine.report import Report
from .style import GREY, canvas, check_some, marks, styled


@styled
def reliability(reports: Mapping[str, Report], *, step: int = -1, title: str = "") -> Figure:
    """Draw accuracy by confidence, of the queries of all episodes; below, where confidences lie.

    Of a calibrated classifier the points are on the diagonal; below it, it is too sure. The
    expected calibration error of each, weighted by the bars below, is in the legend.

    Args:
        reports: a report of classification for each name.
        step: position in the reports' `at`.
        title: of the plot.

    Raises:
        ValueError: if there are no reports, or one is of regression.

    Example:
        `adaptax.report.reliability({"MAML": maml, "BMAML": bmaml}).savefig("reliability.png")`
    """
    _check(reports, "bins", "classification", "coverage_diagram")
    figure, axes = canvas(2, 1, (4.2, 2.2), gridspec_kw={"height_ratios": [3, 1]}, sharex=True)
    above, below = axes[:, 0]
    _diagonal(above, title)
    for (name, report), how in zip(reports.items(), marks(len(reports))):
        assert report.bins is not None
        count, confidence, right = report.bins[step].T
        some = count > 0
        above.plot(confidence[some] / count[some], right[some] / count[some],
                   label=f"{name}, ECE {report.ece(step):.3f}", **how)  # fmt: skip
        edges = np.linspace(0, 1, len(count) + 1)
        below.stairs(count / count.sum(), edges, color=how["color"], fill=True, alpha=0.3)
    above.set_ylabel("accuracy")
    below.set(ylim=(0, None), xlabel="confidence", ylabel="share")
    above.legend(loc="upper left")
    return figure


@styled
def coverage_diagram(reports: Mapping[str, Report], *, step: int = -1, title: str = "") -> Figure:
    """Draw how many targets fall in the central intervals of a regression, by how many should.

    Of a calibrated regressor the line is the diagonal; below it, its intervals are too narrow. The
    intervals are those of the mixture under the noise that the report names.

    Args:
        reports: a report of regression for each name.
        step: position in the reports' `at`.
        title: of the plot.

    Raises:
        ValueError: if there are no reports, or one is of classification.

    Example:
        `adaptax.report.coverage_diagram({"BMAML": report})`
    """
    _check(reports, "quantiles", "regression", "reliability")
    figure, axes = canvas(size=(4.2, 3.4))
    ax = axes[0, 0]
    _diagonal(ax, title)
    for (name, report), how in zip(reports.items(), marks(len(reports))):
        assert report.quantiles is not None
        levels = np.arange(1, report.quantiles.shape[1] // 2 + 1) / (report.quantiles.shape[1] // 2)
        found = [report.coverage(level, step) for level in levels]
        ax.plot([0, *levels], [0, *found], markevery=2, label=name, **how)
    ax.set(xlabel="nominal coverage", ylabel="observed coverage")
    ax.legend(loc="upper left")
    return figure


def _diagonal(ax: Axes, title: str) -> None:
    ax.plot([0, 1], [0, 1], color=GREY, linestyle=":", linewidth=1)
    ax.set(xlim=(0, 1), ylim=(0, 1))
    ax.set_title(title, loc="left")


def _check(reports: Mapping[str, Report], field: str, kind: str, other: str) -> None:
    """Raise unless there are reports and all are of a kind."""
    check_some(reports, "reports")
    wrong = [name for name, report in reports.items() if getattr(report, field) is None]
    if wrong:
        raise ValueError(f"{', '.join(wrong)}: no report of {kind}; draw it with {other}")

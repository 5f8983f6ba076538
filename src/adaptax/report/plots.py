"""Curves: of meta-training over meta-steps, and of algorithms over adaptation steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..engine.scoring import known_sign
from .style import (
    COLOURS,
    GREY,
    METRICS,
    band,
    by_steps,
    canvas,
    check_some,
    logarithmic,
    marks,
    stroke,
    styled,
)
from .tables import Curve, scale

SEVERAL = 20
"""Points of a curve from which on they are not marked."""


@styled
def learning_curve(history: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw meta-loss and validation score over the meta-steps of a training.

    Args:
        history: records of `fit`: `result.history`, or `Run(path).metrics()`.

    Raises:
        ValueError: if there are no records.

    Example:
        `adaptax.report.learning_curve(result.history).savefig("curve.png")`
    """
    if not history:
        raise ValueError("the history holds no records; train at least one step")
    validated = [r for r in history if any("_ci95" not in n for n in r.get("validation", {}))]
    figure, axes = canvas(1, 2 if validated else 1)
    _losses(axes[0, 0], history)
    if validated:
        _validation(axes[0, 1], validated)
    return figure


@styled
def comparison(
    reports: Mapping[str, Curve],
    *,
    paper: Mapping[str, Mapping[int, float]] | None = None,
    title: str = "",
    steps: str = "adaptation steps",
) -> Figure:
    """Draw the score of several learners on the same episodes, by the number of adaptation steps.

    Args:
        reports: a report for each name, or a `Mean` of reports over seeds.
        paper: published scores, `{name: {steps: score}}`, drawn as crosses; in the colour of the
            learner of that name, or in grey.
        title: of the plot.
        steps: label of the x axis.

    Raises:
        ValueError: if there is nothing to draw.
    """
    check_some(reports, "reports")
    figure, axes = canvas(size=(6.4, 3.6))
    ax, metric = axes[0, 0], next(iter(reports.values())).primary
    factor, colours = scale(metric), {}
    for (name, report), how in zip(reports.items(), marks(len(reports))):
        at = [step or 0 for step in report.at]
        mean = [factor * report.mean(metric, i) for i in range(len(at))]
        half = [factor * report.ci95(metric, i) for i in range(len(at))]
        band(ax, at, mean, half, label=name, **how)
        colours[name] = how["color"]
    longest = int(ax.dataLim.x1)
    cross: dict[str, Any] = {
        "linestyle": "",
        "marker": "x",
        "markersize": 8,
        "markeredgewidth": 1.8,
        "zorder": 4,
    }
    for name, points in (paper or {}).items():
        label = None if name in colours else f"{name}, published"
        scores = [factor * score for score in points.values()]
        ax.plot(list(points), scores, color=colours.get(name, GREY), label=label, **cross)
    if any(points for name, points in (paper or {}).items() if name in colours):
        ax.add_line(stroke(GREY, label="published", **cross))
    if longest > 15:
        ax.set_xscale("symlog", linthresh=1, linscale=0.5)
        ticks = [t for t in (0, 1, 2, 5, 10, 20, 50, 100) if t <= longest]
        ax.set_xticks(ticks, [str(t) for t in ticks])
        ax.minorticks_off()
    else:
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set(xlabel=steps, ylabel=METRICS.get(metric, metric))
    if metric == "mse":
        logarithmic(ax)
    ax.set_title(title, loc="left")
    figure.legend(loc="outside right center", title="mean and 95 % CI", fontsize=9)
    return figure


@styled
def ablation(rows: Sequence[Mapping[str, Any]], title: str = "") -> Figure:
    """Draw scores with their intervals: a line for each row and a mark for each kind of score.

    Args:
        rows: as for `adaptax.report.comparison_table`.
        title: of the plot.
    """
    figure, axes = canvas(size=(6.4, 0.42 * len(rows) + 1.1))
    ax, metric = axes[0, 0], rows[0]["metric"]
    factor, kinds = scale(metric), list(rows[0]["scores"])
    for i, (kind, how) in enumerate(zip(kinds, marks(len(kinds)))):
        means, halves = ([factor * row["scores"][kind][which] for row in rows] for which in (0, 1))
        places = np.arange(len(rows)) + 0.16 * (i - (len(kinds) - 1) / 2)
        ax.errorbar(means, places, xerr=halves, linestyle="", capsize=2.5, label=kind, **how)
    ax.set_yticks(range(len(rows)), [row["name"] for row in rows])
    ax.invert_yaxis()
    ax.set_xlabel(f"{METRICS[metric]}, 95 % CI")
    ax.legend(loc="best")
    ax.set_title(title, loc="left", wrap=True)
    return figure


def _losses(ax: Axes, history: Sequence[Mapping[str, Any]]) -> None:
    steps = np.array([record["step"] for record in history])
    loss = np.array([record["loss"] for record in history], float)
    many, finite = len(loss) >= 40, loss[np.isfinite(loss)]
    ax.plot(
        steps, loss, color=COLOURS[0], alpha=0.3 if many else 1.0, linewidth=0.9 if many else 1.6,
        marker="o" if len(finite) <= SEVERAL else None, label="meta-training" if many else None,
    )  # fmt: skip
    if many:
        width = len(loss) // 20
        smooth = np.convolve(loss, np.ones(width) / width, mode="valid")
        ax.plot(steps[width - 1 :], smooth, color=COLOURS[0], label=f"mean of {width} records")
        ax.legend()
    by_steps(ax)
    ax.set_ylabel("meta-loss")
    if len(finite) < 2:
        said = "no finite loss" if len(finite) == 0 else f"one record, of step {steps[-1]:,}"
        ax.text(0.5, 0.95, said, transform=ax.transAxes, ha="center", va="top", fontsize=8)
    elif finite.min() > 0 and finite.max() > 20 * finite.min():
        logarithmic(ax)


def _validation(ax: Axes, records: Sequence[Mapping[str, Any]]) -> None:
    metric = next(name for name in records[0]["validation"] if not name.endswith("_ci95"))
    steps = np.array([record["step"] for record in records])
    mean, half = (
        scale(metric) * np.array([r["validation"].get(name, missing) for r in records], float)
        for name, missing in ((metric, np.nan), (f"{metric}_ci95", 0.0))
    )
    band(ax, steps, mean, half, color=COLOURS[1], marker="o", markersize=3.5,
         label="validation, 95 % CI")  # fmt: skip
    sign = known_sign(metric)
    if sign and np.isfinite(mean).any():
        best = int(np.nanargmax(sign * mean))
        ax.plot(
            steps[best], mean[best], "*", color="black", markersize=10, zorder=4,
            label=f"best: {mean[best]:.3g} at step {steps[best]:,}",
        )  # fmt: skip
    by_steps(ax)
    if metric == "mse" and np.nanmax(mean) > 20 * max(np.nanmin(mean), 1e-12):
        logarithmic(ax)
    ax.set_ylabel(f"validation {METRICS.get(metric, metric)}")
    ax.legend()

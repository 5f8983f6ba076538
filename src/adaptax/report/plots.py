"""Curves: of meta-training over meta-steps, and of algorithms over adaptation steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..engine.report import Report
from ..engine.scoring import known_sign
from .style import COLOURS, MARKERS, METRICS, canvas, scale, styled


@styled
def learning_curve(history: Sequence[Mapping[str, Any]]) -> Figure:
    """Meta-loss and validation score over the meta-steps of a training.

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
    reports: Mapping[str, Report],
    *,
    paper: Mapping[str, Mapping[int, float]] | None = None,
    title: str = "",
) -> Figure:
    """The score of several learners on the same episodes, by the number of adaptation steps.

    Args:
        reports: a report for each name.
        paper: published scores, `{name: {steps: score}}`, drawn as crosses.
        title: of the plot.
    """
    figure, axes = canvas(size=(6.4, 3.6))
    ax = axes[0, 0]
    longest = 0
    metric = next(iter(reports.values())).primary
    for i, (name, report) in enumerate(reports.items()):
        factor, colour = scale(metric), COLOURS[i % len(COLOURS)]
        steps = np.array([0 if step is None else step for step in report.at])
        mean = factor * np.array([report.mean(metric, j) for j in range(len(steps))])
        half = factor * np.array([report.ci95(metric, j) for j in range(len(steps))])
        ax.plot(steps, mean, color=colour, marker=MARKERS[i % len(MARKERS)], label=name, zorder=3)
        ax.fill_between(steps, mean - half, mean + half, color=colour, alpha=0.2, linewidth=0)
        longest = max(longest, int(steps[-1]))
        points = (paper or {}).get(name, {})
        ax.plot(
            list(points), [factor * value for value in points.values()], "x", color=colour,
            markersize=8, markeredgewidth=1.8, zorder=4,
        )  # fmt: skip
    if any((paper or {}).values()):
        ax.plot([], [], "x", color="#555555", markersize=8, markeredgewidth=1.8, label="published")
    if longest > 15:
        ax.set_xscale("symlog", linthresh=1, linscale=0.5)
        ticks = [t for t in (0, 1, 2, 5, 10, 20, 50, 100) if t <= longest]
        ax.set_xticks(ticks, [str(t) for t in ticks])
        ax.minorticks_off()
    else:
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_xlabel("adaptation steps")
    ax.set_ylabel(METRICS.get(metric, metric))
    if metric == "mse":
        ax.set_yscale("log")
        _plain_log_ticks(ax)
    if title:
        ax.set_title(title, loc="left")
    figure.legend(loc="outside right center", title="mean and 95 % CI", title_fontsize=8)
    return figure


@styled
def ablation(rows: Sequence[Mapping[str, Any]], title: str = "") -> Figure:
    """Scores with their intervals, a line for each row and a mark for each kind of score.

    Args:
        rows: as for `adaptax.report.comparison_table`.
        title: of the plot.
    """
    figure, axes = canvas(size=(6.4, 0.42 * len(rows) + 1.1))
    ax, metric = axes[0, 0], rows[0]["metric"]
    factor, kinds = scale(metric), list(rows[0]["scores"])
    for i, kind in enumerate(kinds):
        means, halves = ([factor * row["scores"][kind][which] for row in rows] for which in (0, 1))
        places = np.arange(len(rows)) + 0.16 * (i - (len(kinds) - 1) / 2)
        ax.errorbar(
            means, places, xerr=halves, fmt=MARKERS[i], color=COLOURS[i], capsize=2.5, label=kind
        )
    ax.set_yticks(range(len(rows)), [row["name"] for row in rows])
    ax.invert_yaxis()
    ax.set_xlabel(f"{METRICS[metric]}, 95 % CI")
    ax.legend(loc="best")
    if title:
        ax.set_title(title, loc="left", wrap=True)
    return figure


def _losses(ax: Axes, history: Sequence[Mapping[str, Any]]) -> None:
    steps = np.array([record["step"] for record in history])
    loss = np.array([record["loss"] for record in history], float)
    many = len(loss) >= 40
    ax.plot(
        steps, loss, color=COLOURS[0], alpha=0.3 if many else 1.0, linewidth=0.9 if many else 1.6,
        marker="o" if len(loss) == 1 else None, label="meta-training" if many else None,
    )  # fmt: skip
    if many:
        width = len(loss) // 20
        smooth = np.convolve(loss, np.ones(width) / width, mode="valid")
        ax.plot(steps[width - 1 :], smooth, color=COLOURS[0], label=f"mean of {width} records")
        ax.legend(fontsize=8)
    positive = loss[np.isfinite(loss)]
    if len(positive) and positive.min() > 0 and positive.max() > 20 * positive.min():
        ax.set_yscale("log")
    _meta_steps(ax, steps)
    ax.set_ylabel("meta-loss")


def _validation(ax: Axes, records: Sequence[Mapping[str, Any]]) -> None:
    metric = next(name for name in records[0]["validation"] if not name.endswith("_ci95"))
    factor = scale(metric)
    steps = np.array([record["step"] for record in records])
    mean = factor * np.array([record["validation"].get(metric) for record in records], float)
    half = factor * np.array(
        [record["validation"].get(f"{metric}_ci95", 0.0) for record in records]
    )
    ax.fill_between(
        steps, mean - half, mean + half, color=COLOURS[1], alpha=0.2, linewidth=0, label="95 % CI"
    )
    ax.plot(steps, mean, color=COLOURS[1], marker="o", markersize=3.5, label="validation")
    sign = known_sign(metric)
    if sign and np.isfinite(mean).any():
        best = int(np.nanargmax(sign * mean))
        ax.plot(
            steps[best], mean[best], "*", color="black", markersize=10, zorder=4,
            label=f"best: {mean[best]:.3g} at step {steps[best]:,}",
        )  # fmt: skip
    if metric == "mse" and np.nanmax(mean) > 20 * max(np.nanmin(mean), 1e-12):
        ax.set_yscale("log")
        _plain_log_ticks(ax)
    _meta_steps(ax, steps)
    ax.set_ylabel(f"validation {METRICS.get(metric, metric)}")
    ax.legend(fontsize=8)


def _meta_steps(ax: Axes, steps: np.ndarray) -> None:
    ax.set_xlabel("meta-steps")
    ax.set_xlim(0, max(int(steps[-1]), 1) * 1.03)
    ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    ax.xaxis.set_major_formatter(lambda value, _: f"{int(value):,}")


def _plain_log_ticks(ax: Axes) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    ax.yaxis.set_major_locator(LogLocator(10, subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    ax.yaxis.set_minor_formatter(NullFormatter())

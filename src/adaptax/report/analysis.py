"""Figures and tables of the analysis of meta-gradients."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator, NullFormatter
from rich.table import Table

from ..studies.taylor import Expansion
from .style import COLOURS, MARKERS, canvas, styled
from .tables import number

KINDS: dict[str, tuple[Any, str]] = {
    "sum": ("-", "o"),
    "mean": ((0, (5, 1.5)), "s"),
    "last": ((0, (1, 1.2)), "^"),
}
"""Line and marker of a sum of inner gradients, of their mean, and of the last one."""

Row = Mapping[str, Any]
"""A training of a study: `name`, `inner_steps`, `kind` or `arm`, `accuracy`, `accuracy_ci95`."""


@styled
def gradient_combinations(rows: Sequence[Row]) -> Figure:
    """Learning curves by the combination of inner gradients, and the final test accuracies.

    Args:
        rows: with `name`, `inner_steps`, `kind` (in `KINDS`), `curve` (records with `step`,
            `accuracy` and `accuracy_ci95`), and the test's `accuracy` and `accuracy_ci95`.
    """
    figure, axes = canvas(1, 2, (4.6, 3.9), width_ratios=(1.5, 1))
    left, right = axes[0]
    for place, row in enumerate(reversed(rows)):
        colour = COLOURS[row["inner_steps"] - 1]
        line, marker = KINDS[row["kind"]]
        steps, mean = ([point[name] for point in row["curve"]] for name in ("step", "accuracy"))
        left.plot(steps, 100 * np.array(mean), color=colour, linestyle=line, marker=marker,
                  markersize=3.5, linewidth=1.3)  # fmt: skip
        right.errorbar(100 * row["accuracy"], place, xerr=100 * row["accuracy_ci95"], fmt=marker,
                       color=colour, capsize=2.5, linewidth=1.3)  # fmt: skip
    _meta_steps(left)
    left.set_ylabel("accuracy (%), training characters")
    left.set_title("learning curves", loc="left")
    for kind, label in (("sum", "sum"), ("mean", "mean"), ("last", "last alone")):
        line, marker = KINDS[kind]
        left.plot([], [], color="#555555", linestyle=line, marker=marker, label=label)
    left.legend(fontsize=8, handlelength=3.2)
    right.set_yticks(range(len(rows)), [row["name"] for row in reversed(rows)])
    for tick, row in zip(right.get_yticklabels(), reversed(rows)):
        tick.set_color(COLOURS[row["inner_steps"] - 1])
    right.set_xlabel("accuracy (%), test characters")
    right.set_title("at the end, 95 % CI", loc="left")
    return figure


@styled
def overlap(rows: Sequence[Row], overlapping: Sequence[int]) -> Figure:
    """Test accuracy by the number of inner steps, for tails that overlap and tails that do not.

    Args:
        rows: with `arm`, `name`, `inner_steps`, and the test's `accuracy` and `accuracy_ci95`.
        overlapping: numbers of inner steps whose last minibatch, if shared, overlaps others.
    """
    figure, axes = canvas(size=(5.6, 3.5))
    ax = axes[0, 0]
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    for i, arm in enumerate(arms):
        mine = sorted((r for r in rows if r["arm"] == arm), key=lambda r: r["inner_steps"])
        aside = 0.08 * (i - (len(arms) - 1) / 2)  # so that no bar hides another
        ax.errorbar(
            [row["inner_steps"] + aside for row in mine], [100 * row["accuracy"] for row in mine],
            yerr=[100 * row["accuracy_ci95"] for row in mine], color=COLOURS[i],
            marker=MARKERS[i], capsize=2.5, label=mine[0]["name"], zorder=3,
        )  # fmt: skip
    steps = sorted({row["inner_steps"] for row in rows})
    inside = [k for k in steps if k in overlapping]
    if inside:
        ax.axvspan(inside[0] - 0.5, steps[-1] + 0.5, color="#f0e6d2", zorder=0,
                   label="a shared tail overlaps")  # fmt: skip
        ax.set_xlim(steps[0] - 0.5, steps[-1] + 0.5)
    ax.set_xticks(steps)
    ax.set_xlabel("inner steps")
    ax.set_ylabel("accuracy (%), test characters")
    ax.legend(fontsize=8, title="mean and 95 % CI", title_fontsize=8)
    return figure


@styled
def expansions(measured: Mapping[str, Sequence[Expansion]]) -> Figure:
    """Measured coefficients of `AvgGradInner` and residuals of the expansion, by learner.

    Args:
        measured: for each name, expansions of one learner by number of minibatches.
    """
    figure, axes = canvas(1, 2, (4.2, 3.4))
    for i, (name, several) in enumerate(measured.items()):
        colour, marker = COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]
        _coefficients(axes[0, 0], several, name, colour, marker)
        last = max(several, key=lambda expansion: expansion.minibatches)
        if math.isfinite(last.order):
            axes[0, 1].plot(last.rates, last.residuals, color=colour, marker=marker,
                            label=f"{name}, order {last.order:.2f}")  # fmt: skip
    left, right = axes[0]
    left.plot([], [], color="#555555", linewidth=0.9, label="predicted")
    left.xaxis.set_major_locator(MaxNLocator(integer=True))
    left.set_xlabel("minibatches k")
    left.set_ylabel("coefficient of AvgGradInner, in α")
    left.legend(fontsize=8)
    if not right.lines:
        right.set_axis_off()
        return figure
    several = [one for each in measured.values() for one in each]
    most, rates = max(one.minibatches for one in several), several[0].rates
    high = max(float(np.max(line.get_ydata())) for line in right.lines)
    guide = 2 * high * (rates / rates.max()) ** 2
    right.plot(rates, guide, color="#888888", linestyle=":", label="slope 2", zorder=1)
    right.set_xscale("log")
    right.set_yscale("log")
    right.xaxis.set_major_locator(FixedLocator(sorted(rates)))
    right.xaxis.set_minor_formatter(NullFormatter())
    right.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    right.set_xlabel("inner step size α")
    right.set_ylabel(f"residual / ‖AvgGrad‖, k = {most}")
    right.legend(fontsize=8)
    return figure


def expansion_table(measured: Mapping[str, Sequence[Expansion]], title: str = "") -> Table:
    """Coefficients at the smallest step size, measured and predicted, and the residual's order.

    Args:
        measured: for each name, expansions of one learner by number of minibatches.
        title: of the table.
    """
    table = Table(title=title or None, title_justify="left")
    for heading in ("learner", "k", "AvgGrad", "predicted", "AvgGradInner / α", "predicted",
                    "order of residual"):  # fmt: skip
        table.add_column(heading, justify="left" if heading == "learner" else "right")
    for name, several in measured.items():
        for one in several:
            i = int(np.argmin(one.rates))
            unit = np.array([1.0, one.rates[i]])
            found, error = one.coefficients[i] / unit, one.errors[i] / unit
            said = None if one.predicted is None else one.predicted[i] / unit
            due = ["–", "–"] if said is None else [f"{value:g}" for value in said + 0.0]
            table.add_row(
                name, str(one.minibatches),
                f"{found[0]:.4f}", due[0],
                _with_error(found[1], error[1]), due[1],
                f"{one.order:.2f}" if math.isfinite(one.order) else "no residual",
            )  # fmt: skip
    return table


def study_table(rows: Sequence[Row], title: str = "") -> Table:
    """The test accuracy of every training of a study.

    Args:
        rows: with `name`, `inner_steps`, `outer_lr`, `accuracy`, `accuracy_ci95` and `seconds`.
        title: of the table.
    """
    table = Table(title=title or None, title_justify="left")
    for heading in ("outer update", "inner steps", "ε_0", "accuracy ± 95 % CI", "trained in"):
        table.add_column(heading, justify="left" if heading == "outer update" else "right")
    for row in rows:
        score = number("accuracy", row["accuracy"], row["accuracy_ci95"])
        table.add_row(row["name"], str(row["inner_steps"]), f"{row['outer_lr']:g}", score,
                      f"{row['seconds']:.0f} s")  # fmt: skip
    return table


def _coefficients(
    ax: Axes, several: Sequence[Expansion], name: str, colour: str, marker: str
) -> None:
    ordered = sorted(several, key=lambda expansion: expansion.minibatches)
    k = [one.minibatches for one in ordered]
    at = [int(np.argmin(one.rates)) for one in ordered]
    found, error, due = (
        [
            math.nan if values is None else values[i][1] / one.rates[i]
            for one, i, values in zip(ordered, at, each)
        ]
        for each in zip(*((one.coefficients, one.errors, one.predicted) for one in ordered))
    )
    ax.errorbar(k, found, yerr=np.nan_to_num(1.96 * np.array(error)), color=colour, fmt=marker,
                capsize=2.5, label=name, zorder=3)  # fmt: skip
    ax.plot(k, due, color=colour, linewidth=0.9)


def _meta_steps(ax: Axes) -> None:
    ax.set_xlabel("outer iterations")
    ax.set_xlim(left=0)
    ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    ax.xaxis.set_major_formatter(lambda value, _: f"{int(value):,}")


def _with_error(value: float, error: float) -> str:
    shown = f"{round(value, 3) + 0.0:.3f}"
    return f"{shown} ± {error:.3f}" if math.isfinite(error) else shown

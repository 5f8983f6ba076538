"""Figures and tables of the analysis of meta-gradients."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .style import GREY, by_steps, canvas, logarithmic, marks, stroke, styled
from .tables import Cell, Score, Sheet

KINDS: dict[str, dict[str, Any]] = {
    "sum": {"linestyle": "-", "marker": "o"},
    "mean": {"linestyle": (0, (5, 1.5)), "marker": "s"},
    "last": {"linestyle": (0, (1, 1.2)), "marker": "^"},
}
"""Line and marker of a sum of inner gradients, of their mean, and of the last one."""

Row = Mapping[str, Any]
"""A training of a study: `name`, `inner_steps`, `kind` or `arm`, `accuracy`, `accuracy_ci95`."""


Expanded = Any
"""An `adaptax.studies.Expansion`."""


@styled
def gradient_combinations(rows: Sequence[Row]) -> Figure:
    """Draw learning curves by the combination of inner gradients, and the final test accuracies.

    Args:
        rows: with `name`, `inner_steps`, `kind` (in `KINDS`), `curve` (records with `step`,
            `accuracy` and `accuracy_ci95`), and the test's `accuracy` and `accuracy_ci95`.
    """
    figure, axes = canvas(1, 2, (4.6, 3.9), width_ratios=(1.5, 1))
    left, right = axes[0]
    counts = sorted({row["inner_steps"] for row in rows})
    colours = {k: how["color"] for k, how in zip(counts, marks(len(counts)))}
    for place, row in enumerate(reversed(rows)):
        how = {"color": colours[row["inner_steps"]], "linewidth": 1.3}
        steps, mean = ([point[name] for point in row["curve"]] for name in ("step", "accuracy"))
        left.plot(steps, 100 * np.array(mean), markersize=3.5, **how, **KINDS[row["kind"]])
        right.errorbar(100 * row["accuracy"], place, xerr=100 * row["accuracy_ci95"], capsize=2.5,
                       marker=KINDS[row["kind"]]["marker"], **how)  # fmt: skip
    by_steps(left, "outer iterations")
    left.set_ylabel("accuracy (%), training characters")
    left.set_title("learning curves", loc="left")
    keys = [stroke(GREY, label="last alone" if kind == "last" else kind, **how)
            for kind, how in KINDS.items()]  # fmt: skip
    keys += [stroke(colour, label=f"k = {k}") for k, colour in colours.items()]
    left.legend(handles=keys, handlelength=3.2, ncols=2)
    right.set_yticks(range(len(rows)), [row["name"] for row in reversed(rows)])
    for tick, row in zip(right.get_yticklabels(), reversed(rows)):
        tick.set_color(colours[row["inner_steps"]])
    right.set_xlabel("accuracy (%), test characters")
    right.set_title("at the end, 95 % CI", loc="left")
    return figure


@styled
def overlap(rows: Sequence[Row], overlapping: Sequence[int]) -> Figure:
    """Draw test accuracy by the number of inner steps, for tails that overlap and that do not.

    Args:
        rows: with `arm`, `name`, `inner_steps`, and the test's `accuracy` and `accuracy_ci95`.
        overlapping: numbers of inner steps whose last minibatch, if shared, overlaps others.
    """
    figure, axes = canvas(size=(5.6, 3.5))
    ax = axes[0, 0]
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    for i, (arm, how) in enumerate(zip(arms, marks(len(arms)))):
        mine = sorted((r for r in rows if r["arm"] == arm), key=lambda r: r["inner_steps"])
        aside = 0.08 * (i - (len(arms) - 1) / 2)  # so that no bar hides another
        ax.errorbar(
            [row["inner_steps"] + aside for row in mine], [100 * row["accuracy"] for row in mine],
            yerr=[100 * row["accuracy_ci95"] for row in mine], capsize=2.5, label=mine[0]["name"],
            zorder=3, **how,
        )  # fmt: skip
    steps = sorted({row["inner_steps"] for row in rows})
    inside = [k for k in steps if k in overlapping]
    if inside:
        ax.axvspan(inside[0] - 0.5, steps[-1] + 0.5, color="#f0e6d2", zorder=0,
                   label="a shared tail overlaps")  # fmt: skip
        ax.set_xlim(steps[0] - 0.5, steps[-1] + 0.5)
    ax.set_xticks(steps)
    ax.set(xlabel="inner steps", ylabel="accuracy (%), test characters")
    ax.legend(title="mean and 95 % CI")
    return figure


@styled
def expansions(measured: Mapping[str, Sequence[Expanded]]) -> Figure:
    """Draw coefficients of `AvgGradInner`, measured and predicted, and the expansion's residuals.

    Args:
        measured: for each name, expansions of one learner by number of minibatches.
    """
    figure, axes = canvas(1, 2, (4.2, 3.4))
    left, right = axes[0]
    for (name, several), how in zip(measured.items(), marks(len(measured))):
        _coefficients(left, several, name, how)
        last = max(several, key=lambda expansion: expansion.minibatches)
        if math.isfinite(last.order):
            right.plot(last.rates, last.residuals, label=f"{name}, order {last.order:.2f}", **how)
    left.add_line(stroke(GREY, linewidth=0.9, label="predicted"))
    left.xaxis.set_major_locator(MaxNLocator(integer=True))
    left.set(xlabel="minibatches k", ylabel="coefficient of AvgGradInner, in α")
    left.legend()
    if not right.lines:
        right.set_axis_off()
        return figure
    several = [one for each in measured.values() for one in each]
    most, rates = max(one.minibatches for one in several), several[0].rates
    guide = 2 * right.dataLim.y1 * (rates / rates.max()) ** 2
    right.plot(rates, guide, color="#888888", linestyle=":", label="slope 2", zorder=1)
    logarithmic(right, "x", list(rates))
    logarithmic(right, "y")
    right.set(xlabel="inner step size α", ylabel=f"residual / ‖AvgGrad‖, k = {most}")
    right.legend()
    return figure


def expansion_table(measured: Mapping[str, Sequence[Expanded]], title: str = "") -> Sheet:
    """Return coefficients at the smallest step size, and the order of the residual.

    Args:
        measured: for each name, expansions of one learner by number of minibatches.
        title: of the table.
    """
    rows: list[list[Cell]] = []
    for name, one in ((name, one) for name, several in measured.items() for one in several):
        i = int(np.argmin(one.rates))
        unit = np.array([1.0, one.rates[i]])
        found, error = one.coefficients[i] / unit, one.errors[i] / unit
        said = None if one.predicted is None else one.predicted[i] / unit
        due = ["–", "–"] if said is None else [f"{value:g}" for value in said + 0.0]
        order = f"{one.order:.2f}" if math.isfinite(one.order) else "no residual"
        inner = Score("", round(found[1], 3) + 0.0, float(error[1]))
        rows.append([name, str(one.minibatches), f"{found[0]:.4f}", due[0], inner, due[1], order])
    headings = ["learner", "k", "AvgGrad", "predicted", "AvgGradInner / α", "predicted",
                "order of residual"]  # fmt: skip
    return Sheet(headings, rows, title)


def study_table(rows: Sequence[Row], title: str = "") -> Sheet:
    """Return the test accuracy of every training of a study.

    Args:
        rows: with `name`, `inner_steps`, `outer_lr`, `accuracy`, `accuracy_ci95` and `seconds`.
        title: of the table.
    """
    return Sheet(
        ["outer update", "inner steps", "ε_0", "accuracy ± 95 % CI", "trained in"],
        [[row["name"], str(row["inner_steps"]), f"{row['outer_lr']:g}",
          Score("accuracy", row["accuracy"], row["accuracy_ci95"]), f"{row['seconds']:.0f} s"]
         for row in rows],
        title,
    )  # fmt: skip


def _coefficients(ax: Axes, several: Sequence[Expanded], name: str, how: Mapping[str, Any]) -> None:
    ordered = sorted(several, key=lambda expansion: expansion.minibatches)
    at = [int(np.argmin(one.rates)) for one in ordered]
    found, error, due = (
        [
            math.nan if values is None else values[i][1] / one.rates[i]
            for one, i, values in zip(ordered, at, each)
        ]
        for each in zip(*((one.coefficients, one.errors, one.predicted) for one in ordered))
    )
    k = [one.minibatches for one in ordered]
    ax.errorbar(k, found, yerr=np.nan_to_num(1.96 * np.array(error)), linestyle="", capsize=2.5,
                label=name, zorder=3, **how)  # fmt: skip
    ax.plot(k, due, color=how["color"], linewidth=0.9)

"""Pictures of tables: errors by the size of the support, and predictions against targets."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from jaxtyping import Float, Int
from matplotlib.figure import Figure

from .. import metrics
from .style import GREY, METRICS, canvas, check_some, logarithmic, marks, styled

Points = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Targets, what was predicted of them, and its standard deviation."""


@styled
def error_by_support(
    errors: Mapping[str, Float[np.ndarray, " episodes"]],
    sizes: Int[np.ndarray, " episodes"],
    *,
    metric: str = "mse",
    title: str = "",
) -> Figure:
    """Draw the error of test episodes by the size of their support, with 95 % intervals.

    Episodes are gathered by the powers of two that their sizes lie between.

    Args:
        errors: of the same episodes for each name.
        sizes: support examples of each episode.
        metric: what the errors are.
        title: of the plot.

    Raises:
        ValueError: if there is nothing to draw.

    Example:
        `error_by_support({"MAML": report.values["mse"][:, -1]}, sizes)`
    """
    check_some(errors, "errors")
    figure, axes = canvas(size=(4.8, 3.2))
    ax = axes[0, 0]
    classes = np.floor(np.log2(np.maximum(sizes, 1))).astype(int)
    bins = np.unique(classes)
    middle = np.array([np.exp(np.mean(np.log(np.maximum(sizes[classes == b], 1)))) for b in bins])
    for i, ((name, values), how) in enumerate(zip(errors.items(), marks(len(errors)))):
        found = [metrics.interval(values[classes == b]) for b in bins]
        mean, half = (np.array([float(one[k]) for one in found]) for k in (0, 1))
        beside = middle * (1 + 0.02 * (i - len(errors) / 2))  # so that no bar hides another
        ax.errorbar(beside, mean, np.nan_to_num(half), label=name, capsize=2, **how)
    ax.set(xlabel="support examples", ylabel=METRICS.get(metric, metric))
    ax.set_title(title, loc="left")
    ticks = sorted({float(2**b) for b in bins} | {float(sizes.max())})
    logarithmic(ax, "x", at=ticks)
    ax.legend()
    return figure


@styled
def parity(points: Mapping[str, Points], *, title: str = "", most: int = 2000) -> Figure:
    """Draw predictions against targets, a panel for each learner.

    Args:
        points: for each name.
        title: of the plot.
        most: points in a panel; more are thinned out evenly.

    Raises:
        ValueError: if there is nothing to draw.
    """
    check_some(points, "predictions")
    figure, axes = canvas(1, len(points), (2.8, 2.8), sharex=True, sharey=True)
    known = np.concatenate([one[0].ravel() for one in points.values()])
    low, high = np.percentile(known, [0.5, 99.5])
    margin = 0.1 * max(high - low, 1e-6)
    for ax, (name, parts) in zip(axes[0], points.items()):
        target, value, deviation = (part.ravel() for part in parts)
        some = np.linspace(0, len(target) - 1, min(len(target), most)).astype(int)
        ax.errorbar(
            target[some],
            value[some],
            deviation[some],
            linestyle="",
            marker=".",
            markersize=3,
            elinewidth=0.4,
            alpha=0.35,
            color=marks(1)[0]["color"],
            rasterized=True,
        )
        ax.axline((low, low), slope=1, color=GREY, linestyle=":", linewidth=1)
        ax.set(xlim=(low - margin, high + margin), ylim=(low - margin, high + margin))
        ax.set(xlabel="target", aspect="equal")
        ax.set_title(name, loc="left")
    axes[0, 0].set_ylabel("prediction")
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=9)
    return figure

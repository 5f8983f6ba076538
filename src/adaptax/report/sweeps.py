"""A sweep in pictures: the score of every trial by each setting."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from .style import COLOURS, GREY, canvas, check_some, logarithmic, styled


@styled
def sweep(trials: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw the validation score of every trial of a sweep by each of its settings.

    Args:
        trials: each with `trial`, `score`, `settings` and `state`, as `adaptax sweep` writes them.

    Raises:
        ValueError: if none has a score.
    """
    done = [row for row in trials if row["score"] is not None]
    check_some({str(row["trial"]): row for row in done}, "trials")
    names = list(done[0]["settings"])
    figure, axes = canvas(1, 1 + len(names), (3.2, 2.8), sharey=True)
    done.sort(key=lambda row: row["trial"])
    score = np.array([row["score"] for row in done])
    order = [row["trial"] for row in done]
    axes[0, 0].plot(order, score, "o", color=COLOURS[0])
    axes[0, 0].step(order, np.maximum.accumulate(score), color=GREY, where="post", label="best")
    axes[0, 0].set(xlabel="trial", ylabel="validation score")
    axes[0, 0].legend()
    for ax, name in zip(axes[0, 1:], names):
        values = [row["settings"][name] for row in done]
        ax.plot(values, score, "o", color=COLOURS[0])
        ax.set_xlabel(name)
        if all(isinstance(v, float) and v > 0 for v in values) and max(values) / min(values) >= 10:
            logarithmic(ax, "x")
    return figure

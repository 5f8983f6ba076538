"""How every figure looks."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import matplotlib
import numpy as np
from matplotlib.figure import Figure

P = ParamSpec("P")
R = TypeVar("R")

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's palette, told apart with any colour vision."""

MARKERS = "osD^vPX"

_STYLE: Any = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "lines.markersize": 4.5,
    "savefig.dpi": 160,
    "figure.dpi": 120,
    "text.parse_math": False,  # a dollar sign in a name is a dollar sign
}

METRICS = {
    "accuracy": "accuracy (%)",
    "mse": "mean squared error",
    "nll": "negative log-likelihood (nats)",
}


def canvas(
    rows: int = 1,
    columns: int = 1,
    size: tuple[float, float] = (4.6, 3.2),
    layout: Any = "constrained",
    **how: Any,
) -> tuple[Figure, np.ndarray]:
    """A figure of `rows` by `columns` axes of `size` inches each, and the axes as an array.

    Made without pyplot: nothing is kept alive behind the caller's back.
    """
    figure = Figure(figsize=(size[0] * columns, size[1] * rows), layout=layout)
    return figure, figure.subplots(rows, columns, squeeze=False, **how)


def styled(function: Callable[P, R]) -> Callable[P, R]:
    """Draw in the style of this module, whatever the caller's."""

    @functools.wraps(function)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> R:
        with matplotlib.rc_context(_STYLE):
            return function(*args, **kwargs)

    return drawn


def scale(metric: str) -> float:
    """What a metric is multiplied by to be shown: accuracies are in per cent."""
    return 100.0 if metric == "accuracy" else 1.0

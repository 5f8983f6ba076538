"""How every figure looks, and what several of them draw."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, ParamSpec, TypeVar

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, LogLocator, MaxNLocator, NullFormatter

P = ParamSpec("P")
R = TypeVar("R")

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's palette, told apart with any colour vision."""

MORE = ("#999999", "#882255", "#999933", "#332288", "#44AA99", "#661100")
"""Six of Tol's muted palette, and grey, for figures with more than seven lines."""

MARKERS = "osD^vPX"
GREY = "#555555"
"""Of what is not a learner: guides, starts, and keys that stand for all colours."""

Format = Literal["png", "pdf", "svg"]
"""Of the files of figures; `"pdf"` and `"svg"` are written beside the PNG."""

METRICS = {
    "accuracy": "accuracy (%)",
    "mse": "mean squared error",
    "nll": "negative log-likelihood (nats)",
}
"""Axis labels of metrics that have one of their own."""

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
    "legend.fontsize": 8,
    "legend.title_fontsize": 8,
    "lines.linewidth": 1.6,
    "lines.markersize": 4.5,
    "savefig.dpi": 160,
    "figure.dpi": 120,
    "text.parse_math": False,  # a dollar sign in a name is a dollar sign
}


def canvas(
    rows: int = 1,
    columns: int = 1,
    size: tuple[float, float] = (4.6, 3.2),
    layout: Any = "constrained",
    **how: Any,
) -> tuple[Figure, np.ndarray]:
    """Return a figure of `rows` by `columns` axes of `size` inches each, and the axes as an array.

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


def save(figures: Mapping[str, Figure], folder: str | Path, format: Format = "png") -> list[str]:
    """Write figures as PNG, and beside it in another format; return the paths.

    Args:
        figures: by the names of their files.
        folder: where to, which is made.
        format: `"png"`, or what else to write of each.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    paths = [Path(folder, f"{name}.{kind}") for name in figures
             for kind in dict.fromkeys(("png", format))]  # fmt: skip
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # of names of classes
        for path in paths:
            figures[path.stem].savefig(path, dpi=160)
    return [str(path) for path in paths]


def marks(count: int) -> list[dict[str, Any]]:
    """Return colour and marker of each of so many lines; no two have the same colour."""
    colours = [*COLOURS, *MORE]
    missing = count - len(colours)
    if missing > 0:
        hues = matplotlib.colormaps["turbo"](np.linspace(0.02, 0.98, missing))
        colours += [to_hex(hue) for hue in hues]
    return [{"color": colours[i], "marker": MARKERS[i % len(MARKERS)]} for i in range(count)]


def band(ax: Axes, x: Any, mean: Any, half: Any, **how: Any) -> None:
    """Draw a line, and the band of its confidence interval."""
    mean, half = np.asarray(mean, float), np.asarray(half, float)
    ax.plot(x, mean, **{"zorder": 3, **how})
    ax.fill_between(x, mean - half, mean + half, color=how["color"], alpha=0.2, linewidth=0)


def stroke(color: str, **how: Any) -> Line2D:
    """Return a line for a legend."""
    return Line2D([], [], color=color, **how)


def by_steps(ax: Axes, label: str = "meta-steps") -> None:
    """Let the x axis count steps from 0."""
    ax.set_xlabel(label)
    ax.set_xlim(0, max(ax.dataLim.x1, 1) * 1.03)
    ax.xaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=4))
    ax.xaxis.set_major_formatter(lambda value, _: f"{int(value):,}")


def logarithmic(ax: Axes, which: Literal["x", "y"] = "y", at: Sequence[float] = ()) -> None:
    """Make an axis logarithmic, its ticks plain numbers and, if need be, closer than decades.

    Args:
        ax: holds all that it will.
        which: axis.
        at: ticks; found if empty.
    """
    ax.set(**{f"{which}scale": "log"})
    axis = ax.xaxis if which == "x" else ax.yaxis
    low, high = sorted(axis.get_view_interval())
    ticks = list(at)
    for locator in (LogLocator(10), LogLocator(10, (1, 2, 5)), MaxNLocator(5, min_n_ticks=4)):
        if len(ticks) < 4 and not at:
            ticks = [tick for tick in locator.tick_values(low, high) if low <= tick <= high]
    axis.set_major_locator(FixedLocator(sorted(ticks)))
    axis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_minor_formatter(NullFormatter())


def check_some(things: Mapping[str, object], what: str) -> None:
    """Raise if there is nothing to draw."""
    if not things:
        raise ValueError(f"there are no {what} to draw; give at least one")

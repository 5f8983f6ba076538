"""Pictures of uncertainty: what the samples of a learner say of one task, and what it asks for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import ndtr
from jaxtyping import Array, Float, PRNGKeyArray
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from .. import program
from ..engine.predict import learned_noise, predictions
from ..learner import Meta, MetaLearner
from ..studies.active import ActiveCurves
from ..task import Batch, Model, Task, TaskDistribution
from ..tasks import score_readings
from .style import COLOURS, MARKERS, METRICS, canvas, scale, styled

Learners = Mapping[str, tuple[MetaLearner, Meta]]
"""A learner and its meta-parameters for each title."""

GRID = 200
SIDE = 150
"""Points of the grids that predictions are drawn on: on a line, and on each side of a square."""

_LINES: dict[str, Any] = {"entropy": "-", "disagreement": (0, (1, 1)), "random": (0, (4, 1.5))}


@styled
def sampled_functions(
    learners: Learners,
    tasks: TaskDistribution,
    *,
    key: PRNGKeyArray,
    rows: int = 3,
    noise: float | str = 1.0,
    level: float = 0.9,
) -> Figure:
    """What each sample takes the function of a task to be: a row for each task.

    The band is where a new target should lie with probability `level`: the central interval of the
    mixture under the noise, solved for, as in `adaptax.metrics.coverage`.

    Args:
        learners: a learner and its meta-parameters for each column.
        tasks: of one input and one output; with `function(key)`, the true function is drawn.
        key: names the tasks.
        rows: how many tasks.
        noise: standard deviation of the targets, or `"learned"`: what each sample says it is.
        level: of the band.

    Raises:
        ValueError: if inputs or outputs are not numbers, or the noise or the level is none.

    Example:
        `sampled_functions({"MAML": (maml, a), "PLATIPUS": (platipus, b)}, tasks.test, key=key,
        noise=0.3)`
    """
    _demand(learners, rows)
    if noise != "learned" and (isinstance(noise, str) or not noise > 0):
        raise ValueError(f'noise is a positive standard deviation or "learned", not {noise!r}')
    if not 0 < level < 1:
        raise ValueError(f"level is between 0 and 1, not {level}")
    figure, axes = canvas(rows, len(learners), (2.9, 2.2), sharex=True, sharey="row")
    for row, own in zip(axes, jax.random.split(key, rows)):
        task = _sample(tasks, own)
        if task.support.x.shape[1:] != (1,) or task.support.y.shape[1:] != (1,):
            raise ValueError(
                "sampled functions are drawn of inputs and outputs of shape (n, 1), not "
                f"{task.support.x.shape} and {task.support.y.shape}"
            )
        x = _line(task)
        known = [np.asarray(task.support.y)]
        if hasattr(tasks, "function"):
            known.append(np.asarray(tasks.function(own)(jnp.asarray(x))))
        for ax, (learner, meta) in zip(row, learners.values()):
            model, f = _predictions(learner, meta, task.support, x, own)
            f = f if f.ndim == 3 else f[None]
            low, high = _interval(f[..., 0], _noise(model, noise), level)
            ax.fill_between(x[:, 0], low, high, color=COLOURS[5], alpha=0.3, linewidth=0, zorder=1)
            ax.plot(x[:, 0], f[..., 0].T, color=COLOURS[0], linewidth=0.8, alpha=0.7, zorder=2)
            if len(known) > 1:
                ax.plot(x[:, 0], known[1][:, 0], color="black", linestyle=(0, (4, 1.5)), zorder=3)
            ax.plot(
                np.asarray(task.support.x)[:, 0], known[0][:, 0], "^", color=COLOURS[1],
                markersize=7, markeredgecolor="white", zorder=5,
            )  # fmt: skip
        # A sample that goes astray far from the support should not flatten all the others.
        bottom, top = (float(f(np.concatenate(known))) for f in (np.min, np.max))
        margin = 0.35 * max(top - bottom, 1.0)
        row[0].set(ylim=(bottom - margin, top + margin), ylabel="y")
    _titles(axes, learners, "x")
    handles = [
        *([_stroke("black", linestyle=(0, (4, 1.5)))] if len(known) > 1 else []),
        _stroke(COLOURS[1], marker="^", linestyle="", markersize=7, markeredgecolor="white"),
        _stroke(COLOURS[0], linewidth=0.8),
        Patch(color=COLOURS[5], alpha=0.3, linewidth=0),
    ]
    names = ["truth", "support", "samples", f"{100 * level:g} % interval"]
    figure.legend(
        handles, names[-len(handles) :], loc="outside lower center", ncols=len(handles), fontsize=8
    )
    return figure


LINES = 20
"""Boundaries of samples in one picture: more of them hide what is under them."""


@styled
def decision_boundaries(
    learners: Learners, tasks: TaskDistribution, *, key: PRNGKeyArray, rows: int = 2
) -> Figure:
    """Where each sample draws the line between two classes in the plane: a row for each task.

    The shade is the mixture's probability of label 1. A sample that gives all points the same
    label has no boundary; how many do is written in the corner. Of more than `LINES` samples the
    first are drawn.

    Args:
        learners: a learner and its meta-parameters for each column.
        tasks: of points in the plane with labels 0 and 1; with `function(key)`, the true boundary
            is drawn.
        key: names the tasks.
        rows: how many tasks.

    Raises:
        ValueError: if the tasks are others.

    Example:
        `decision_boundaries({"BMAML": (learner, result.meta)}, adaptax.tasks.circles().test,
        key=key)`
    """
    _demand(learners, rows)
    figure, axes = canvas(rows, len(learners), (2.7, 2.5), sharex=True, sharey=True)
    shade: Any = None
    for row, own in zip(axes, jax.random.split(key, rows)):
        task = _sample(tasks, own)
        if task.support.x.shape[1:] != (2,) or task.support.y.dtype.kind not in "iu":
            raise ValueError(
                "decision boundaries are drawn of inputs of shape (n, 2) with integer labels, not "
                f"{task.support.x.shape} with {task.support.y.dtype}"
            )
        sides = _sides(task, SIDE)
        x = np.stack(np.meshgrid(*sides), axis=-1).reshape(-1, 2)
        for ax, (learner, meta) in zip(row, learners.values()):
            _, logits = _predictions(learner, meta, task.support, x, own)
            if logits.shape[-1] != 2:
                raise ValueError(
                    f"decision boundaries are drawn of two classes, not {logits.shape[-1]}"
                )
            p = np.asarray(jax.nn.softmax(logits)[..., 1]).reshape(-1, SIDE, SIDE)
            shade = ax.pcolormesh(
                *sides, p.mean(axis=0), cmap="Blues", vmin=0, vmax=1, shading="gouraud",
                rasterized=True,
            )  # fmt: skip
            width = 0.9 if len(p) < LINES else 0.6
            drawn = [_boundary(ax, sides, one, COLOURS[1], width, "solid") for one in p[:LINES]]
            if not all(drawn):
                ax.text(0.03, 0.03, f"{len(drawn) - sum(drawn)} of {len(drawn)} without boundary",
                        transform=ax.transAxes, fontsize=7)  # fmt: skip
            if hasattr(tasks, "function"):
                fine = _sides(task, 4 * SIDE)
                every = np.stack(np.meshgrid(*fine), axis=-1).reshape(-1, 2)
                labels = np.asarray(tasks.function(own)(jnp.asarray(every)), float)
                _boundary(ax, fine, labels.reshape(4 * SIDE, -1), "black", 1.4, "dashed")
            for label in (0, 1):
                mine = np.asarray(task.support.x)[np.asarray(task.support.y) == label]
                ax.plot(*mine.T, "o^"[label], color=COLOURS[4 if label else 3], markersize=5.5,
                        markeredgecolor="black", markeredgewidth=0.6, zorder=5)  # fmt: skip
            ax.set_aspect("equal")
            ax.grid(False)
        row[0].set_ylabel("x₂")
    _titles(axes, learners, "x₁")
    figure.colorbar(shade, ax=axes, label="probability of label 1", shrink=0.7, aspect=30)
    points: dict[str, Any] = {"linestyle": "", "markeredgecolor": "black", "markersize": 5.5}
    seen = {int(label) for label in np.asarray(task.support.y)}
    handles = {
        "truth": _stroke("black", linestyle="dashed"),
        "support, label 1": _stroke(COLOURS[4], marker="^", **points) if 1 in seen else None,
        "support, label 0": _stroke(COLOURS[3], marker="o", **points) if 0 in seen else None,
        "samples": _stroke(COLOURS[1], linewidth=0.9),
    }
    if not hasattr(tasks, "function"):
        handles["truth"] = None
    shown = {name: handle for name, handle in handles.items() if handle is not None}
    figure.legend(
        list(shown.values()), list(shown), loc="outside lower center", ncols=len(shown), fontsize=8
    )
    return figure


@styled
def attribute_sheet(
    learner: MetaLearner, meta: Meta, tasks: Any, *, key: PRNGKeyArray, per_label: int = 4
) -> Figure:
    """An ambiguous task of images, and which of its readings the samples of a learner chose.

    Above, the support. Below, a row for each reading: queries that fit it, framed by whether the
    mixture is right; and how likely each sample finds the queries of the reading, by the geometric
    mean of the probabilities of their labels. The reading that a sample finds most likely is the
    one it chose, as in `adaptax.tasks.score_readings`.

    Args:
        learner: any; a single model is one sample.
        meta: its meta-parameters.
        tasks: with `readings(key)`, as those of `adaptax.tasks.celeba`.
        key: names the task.
        per_label: images of a label to show of the support, and of each reading, at most.

    Raises:
        ValueError: if the tasks have no readings or no queries, or are not of images.

    Example:
        `attribute_sheet(learner, result.meta, adaptax.tasks.celeba().test, key=key)`
    """
    if not hasattr(tasks, "readings"):
        raise ValueError(
            f"an attribute sheet wants tasks with readings, not {type(tasks).__name__}; draw "
            "others with episode_sheet"
        )
    if per_label < 1:
        raise ValueError(f"per_label is 1 or more, not {per_label}")
    task, readings = _sample(tasks, key), tasks.readings(key)
    if task.query.size == 0 or task.support.x.ndim != 4:
        raise ValueError(
            "an attribute sheet wants images (n, height, width, channels), of support and of "
            f"queries, not {task.support.x.shape} and {task.query.x.shape}"
        )
    _, logits = _predictions(learner, meta, task.support, task.query.x, key)
    logits = logits if logits.ndim == 3 else logits[None]
    score = score_readings(jnp.asarray(logits), jnp.asarray(task.query.y), len(readings))
    y = np.asarray(task.query.y)
    log_p = np.asarray(jax.nn.log_softmax(logits))
    mixture = np.exp(log_p).mean(axis=0)
    likely = log_p[:, np.arange(len(y)), y].reshape(len(log_p), len(readings), -1).mean(axis=-1)
    chosen = likely.argmax(axis=1)

    images = _Sheet(task, per_label)
    size, gap, left, top, head = 0.85, 0.07, 1.25, 0.62, 0.42
    middle = left + images.width * (size + gap) + 0.25
    below = top + size + gap + head
    matrix = middle + images.width * (size + gap) + 0.3
    cells = max(0.24 * len(log_p), 0.9)
    width, height = matrix + cells + 0.75, below + len(readings) * (size + gap) + 0.5
    figure = Figure(figsize=(width, height), layout="none")  # type: ignore[arg-type]

    def place(x: float, y: float, wide: float, high: float) -> Axes:
        return figure.add_axes((x / width, 1 - (y + high) / height, wide / width, high / height))

    def write(x: float, y: float, text: str, **how: Any) -> None:
        how = {"fontsize": 9, "va": "center", **how}
        figure.text(x / width, 1 - y / height, text, **how)

    covered = int(score["coverage"])
    write(
        0.12, 0.17, f"{len(log_p)} sample{'s' * (len(log_p) != 1)}: {covered} of {len(readings)} "
        f"reading{'s' * (len(readings) != 1)} chosen, accuracy on them "
        f"{100 * float(score['accuracy']):.0f} %",
        fontsize=10, fontweight="bold",
    )  # fmt: skip
    write(left, top - 0.13, "support with all", fontweight="bold")
    write(middle, top - 0.13, "support with none", fontweight="bold")
    everything = dict.fromkeys(name for reading in readings for name in reading)
    text = "\n".join(name.replace("_", " ") for name in everything)
    write(left - 0.1, top + size / 2, text, ha="right", fontsize=7.5)
    for start, label in ((left, 1), (middle, 0)):
        for column, i in enumerate(images.support[label]):
            ax = place(start + column * (size + gap), top, size, size)
            _face(ax, task.support.x[i], "#888888")
    write(left, below - 0.13, "queries with both", fontweight="bold")
    write(middle, below - 0.13, "queries with neither", fontweight="bold")
    write(matrix, below - 0.13, "chosen by", fontweight="bold")
    for row, reading in enumerate(readings):
        y_at = below + row * (size + gap)
        text = "\nand ".join(name.replace("_", " ") for name in reading)
        write(left - 0.1, y_at + size / 2, text, ha="right", fontsize=7.5)
        for start, label in ((left, 1), (middle, 0)):
            for column, i in enumerate(images.queries(row, len(readings), label)):
                right = mixture[i].argmax() == label
                ax = place(start + column * (size + gap), y_at, size, size)
                _face(ax, task.query.x[i], COLOURS[2] if right else COLOURS[1])
                ax.text(0.96, 0.05, f"{mixture[i][label]:.0%}", transform=ax.transAxes, ha="right",
                        fontsize=6.5, color="white", bbox={"pad": 0.8, "facecolor": "black",
                        "alpha": 0.6, "linewidth": 0})  # fmt: skip
        write(matrix + cells + 0.08, y_at + size / 2, f"{np.sum(chosen == row)} of {len(log_p)}",
              fontsize=8)  # fmt: skip
    high = len(readings) * (size + gap) - gap
    ax = place(matrix, below, cells, high)
    ax.imshow(np.exp(likely.T), cmap="Blues", vmin=0, vmax=1, aspect="auto")
    ax.plot(np.arange(len(chosen)), chosen, "o", color=COLOURS[1], markeredgecolor="white",
            markersize=7)  # fmt: skip
    ax.set(xticks=[], yticks=[])
    ax.set_xlabel("samples", fontsize=8)
    ax.grid(False)
    write(
        left, height - 0.2, "frames and figures: whether the mixture is right, and its probability "
        "of being so; shade: likelihood of the reading's queries by each sample, 0 to 1",
        fontsize=7,
    )  # fmt: skip
    return figure


@styled
def active_curves(
    curves: ActiveCurves | Mapping[str, ActiveCurves], *, metric: str | None = None, title: str = ""
) -> Figure:
    """Scores by number of labels, asked for and at random, and the paired differences from random.

    Args:
        curves: of one learner, or of several by name.
        metric: the primary one if `None`.
        title: of the picture.

    Raises:
        ValueError: if there are no curves, or they do not have the metric.

    Example:
        `active_curves({"MAML": a, "BMAML": b}).savefig("active.png")`
    """
    several = {"": curves} if isinstance(curves, ActiveCurves) else dict(curves)
    if not several:
        raise ValueError("there are no curves to draw; give at least one")
    name = next(iter(several.values())).primary if metric is None else metric
    chosen = {s: None for one in several.values() for s in one.values if s != "random"}
    both = bool(chosen) and all("random" in one.values for one in several.values())
    figure, axes = canvas(1, 2 if both else 1, (4.0, 3.2))
    left, factor = axes[0, 0], scale(name)
    for i, (learner, one) in enumerate(several.items()):
        for j, strategy in enumerate(one.values):
            colour = COLOURS[(j if len(several) == 1 else i) % len(COLOURS)]
            marker = MARKERS[(j if len(several) == 1 else i) % len(MARKERS)]
            _band(
                left, one.labels, factor * one.mean(strategy, name),
                factor * one.ci95(strategy, name), color=colour, marker=marker,
                linestyle=_LINES[strategy], label=f"{learner}, {strategy}" if learner else strategy,
            )  # fmt: skip
        if both:
            for strategy in one.informed:
                j = list(one.values).index(strategy)
                mean, half = one.difference(name, of=strategy)
                _band(
                    axes[0, 1], one.labels, factor * mean, factor * half,
                    color=COLOURS[(j if len(several) == 1 else i) % len(COLOURS)],
                    marker=MARKERS[(j if len(several) == 1 else i) % len(MARKERS)],
                    linestyle=_LINES[strategy],
                    label=", ".join(filter(None, (learner, strategy if len(chosen) > 1 else ""))),
                )  # fmt: skip
    shown = METRICS.get(name, name)
    left.set(xlabel="labels", ylabel=shown)
    left.set_title(title or "mean and 95 % CI", loc="left")
    left.legend(fontsize=8, handlelength=3)
    if both:
        right = axes[0, 1]
        right.axhline(0, color="#555555", linestyle=":", linewidth=1)
        right.set(xlabel="labels", ylabel="difference in " + shown.replace("(%)", "(points)"))
        one_way = next(iter(chosen)) if len(chosen) == 1 else "chosen"
        right.set_title(f"{one_way} − random, paired", loc="left")
        if len(several) * len(chosen) > 1:
            right.legend(fontsize=8)
    for ax in axes.flat:
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


class _Sheet:
    """Which images to show: rows of support and queries, the first few of each label."""

    def __init__(self, task: Task, most: int):
        self._labels, self._most = np.asarray(task.query.y), most
        support = np.asarray(task.support.y)
        self.support = {label: np.flatnonzero(support == label)[:most] for label in (0, 1)}
        self.width = max(len(rows) for rows in self.support.values())

    def queries(self, reading: int, readings: int, label: int) -> np.ndarray:
        """Rows of the queries of a reading with a label."""
        each = len(self._labels) // readings
        mine = slice(reading * each, (reading + 1) * each)
        return reading * each + np.flatnonzero(self._labels[mine] == label)[: self.width]


def _predictions(
    learner: MetaLearner, meta: Meta, support: Batch, x: Any, key: PRNGKeyArray
) -> tuple[Model, np.ndarray]:
    """An adapted model, and its predictions, leading with particles if any."""
    model = learner.adapt(meta, support, key=key)
    x = jnp.asarray(x, support.x.dtype)
    return model, np.asarray(predictions(model, x, support.x, transductive=True))


def _sample(tasks: TaskDistribution, key: PRNGKeyArray) -> Task:
    if tasks.on_host:
        return tasks.sample(key)
    return program.call(tasks.sample, key)


def _noise(model: Model, noise: float | str) -> Float[np.ndarray, " _"]:
    if noise != "learned":
        return np.reshape(np.asarray(noise, float), (1,))
    return np.reshape(np.asarray(learned_noise(model)), (-1,))


def _interval(
    f: Float[np.ndarray, "m n"], noise: Float[np.ndarray, " _"], level: float
) -> tuple[np.ndarray, np.ndarray]:
    """Ends of the central interval of the mixture of `N(f_m, noise²)`, by bisection."""
    scales = jnp.asarray(noise)[:, None]
    reach = 10 * float(np.max(noise))

    def quantile(q: float) -> np.ndarray:
        low, high = jnp.min(jnp.asarray(f), axis=0) - reach, jnp.max(jnp.asarray(f), axis=0) + reach

        def halve(_: Any, ends: tuple[Array, Array]) -> tuple[Array, Array]:
            middle = (ends[0] + ends[1]) / 2
            under = jnp.mean(ndtr((middle - f) / scales), axis=0) < q
            return jnp.where(under, middle, ends[0]), jnp.where(under, ends[1], middle)

        return np.asarray(jax.lax.fori_loop(0, 40, halve, (low, high))[0])

    return quantile((1 - level) / 2), quantile((1 + level) / 2)


def _line(task: Task) -> np.ndarray:
    (x,) = _sides(task, GRID)
    return x[:, None]


def _sides(task: Task, count: int) -> list[np.ndarray]:
    """Evenly spaced points over each input's range in the task, and a little beyond."""
    seen = np.concatenate([np.asarray(task.support.x), np.asarray(task.query.x)])
    low, high = seen.min(axis=0), seen.max(axis=0)
    margin = 0.02 * (high - low)
    return [np.linspace(a, b, count, dtype=seen.dtype) for a, b in zip(low - margin, high + margin)]


def _boundary(
    ax: Axes, sides: Sequence[np.ndarray], p: np.ndarray, colour: str, width: float, style: str
) -> bool:
    """Draw where p is a half; whether it is so anywhere."""
    if not p.min() < 0.5 < p.max():
        return False
    ax.contour(*sides, p, levels=[0.5], colors=[colour], linewidths=width, linestyles=style)
    return True


def _band(ax: Axes, x: Sequence[int], mean: np.ndarray, half: np.ndarray, **how: Any) -> None:
    ax.plot(x, mean, zorder=3, **how)
    ax.fill_between(x, mean - half, mean + half, color=how["color"], alpha=0.18, linewidth=0)


def _face(ax: Axes, image: Array, frame: str) -> None:
    ax.imshow(np.clip(np.asarray(image, float), 0, 1).squeeze(), cmap="gray", vmin=0, vmax=1)
    ax.set(xticks=[], yticks=[])
    ax.grid(False)
    for spine in ax.spines.values():
        spine.set(visible=True, color=frame, linewidth=2.2)


def _titles(axes: np.ndarray, learners: Learners, below: str) -> None:
    for ax, title in zip(axes[0], learners):
        ax.set_title(title, loc="left")
    for ax in axes[-1]:
        ax.set_xlabel(below)


def _stroke(colour: str, **how: Any) -> Line2D:
    return Line2D([], [], color=colour, **how)


def _demand(learners: Learners, rows: int) -> None:
    if not learners:
        raise ValueError("there are no learners to draw; give at least one")
    if rows < 1:
        raise ValueError(f"rows is 1 or more, not {rows}")

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
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from ..engine.predict import deviations, is_predictive, learned_noise, predictions
from ..learner import Adapter, Meta
from ..task import Batch, Model, TaskDistribution
from .predictions import (
    GRID,
    RIGHT,
    WRONG,
    check_curves,
    draw_support,
    sampled,
    show_image,
    sides,
)
from .style import COLOURS, GREY, METRICS, band, canvas, check_some, marks, stroke, styled
from .tables import scale

Learners = Mapping[str, tuple[Adapter, Meta]]
"""A learner and its meta-parameters for each title."""

SIDE = 150
"""Points on each side of a square that predictions are drawn on."""

LINES = 20
"""Boundaries of samples in one picture: more of them hide what is under them."""
_LINES: dict[str, Any] = {"entropy": "-", "disagreement": (0, (1, 1)), "random": (0, (4, 1.5))}
_TRUTH: Any = (0, (4, 1.5))
_POINTS: tuple[dict[str, Any], ...] = tuple(
    {"color": colour, "marker": marker, "linestyle": "", "markersize": 5.5,
     "markeredgecolor": "black", "markeredgewidth": 0.6}
    for colour, marker in ((COLOURS[3], "o"), (COLOURS[4], "^"))
)  # fmt: skip
"""Of a support in the plane, by label."""


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
    """Draw what each sample takes the function of a task to be: a row for each task.

    The band is where a new target should lie with probability `level`: the central interval of the
    mixture under the noise, solved for, as in `adaptax.metrics.coverage`.

    Args:
        learners: a learner and its meta-parameters for each column.
        tasks: of one input and one output; with `function(key)`, the true function is drawn.
        key: names the tasks.
        rows: how many tasks.
        noise: standard deviation of the targets, or `"learned"`: what each sample says it is. A
            model that predicts one for every target, as a Gaussian process does, is drawn with it.
        level: of the band.

    Raises:
        ValueError: if inputs or outputs are not numbers, or the noise or the level is none.

    Example:
        `sampled_functions({"MAML": (maml, a), "PLATIPUS": (platipus, b)}, tasks.test, key=key,
        noise=0.3)`
    """
    _check(learners, rows)
    if noise != "learned" and (isinstance(noise, str) or not noise > 0):
        raise ValueError(f'noise is a positive standard deviation or "learned", not {noise!r}')
    if not 0 < level < 1:
        raise ValueError(f"level is between 0 and 1, not {level}")
    figure, axes = canvas(rows, len(learners), (2.9, 2.2), sharex=True, sharey="row")
    for row, own in zip(axes, jax.random.split(key, rows)):
        task = sampled(tasks, own)
        check_curves(task, "sampled functions are drawn of")
        x = sides(task, GRID)[0][:, None]
        known = [np.asarray(task.support.y)]
        if hasattr(tasks, "function"):
            known.append(np.asarray(tasks.function(own)(jnp.asarray(x))))
        for ax, (learner, meta) in zip(row, learners.values()):
            model, f = _predictions(learner, meta, task.support, x, own)
            f = f if f.ndim == 3 else f[None]
            low, high = _interval(f[..., 0], _noise(model, noise, x, task.support), level)
            ax.fill_between(x[:, 0], low, high, color=COLOURS[5], alpha=0.3, linewidth=0, zorder=1)
            ax.plot(x[:, 0], f[..., 0].T, color=COLOURS[0], linewidth=0.8, alpha=0.7, zorder=2)
            if len(known) > 1:
                ax.plot(x[:, 0], known[1][:, 0], color="black", linestyle=_TRUTH, zorder=3)
            draw_support(ax, task)
        # A sample that goes astray far from the support should not flatten all the others.
        bottom, top = (float(f(np.concatenate(known))) for f in (np.min, np.max))
        margin = 0.35 * max(top - bottom, 1.0)
        row[0].set(ylim=(bottom - margin, top + margin), ylabel="y")
    _titles(axes, learners, "x")
    truth = [stroke("black", linestyle=_TRUTH, label="truth")] if len(known) > 1 else []
    handles = [
        *truth,
        stroke(COLOURS[1], marker="^", linestyle="", markersize=7, markeredgecolor="white",
               label="support"),
        stroke(COLOURS[0], linewidth=0.8, label="samples"),
        Patch(color=COLOURS[5], alpha=0.3, linewidth=0, label=f"{100 * level:g} % interval"),
    ]  # fmt: skip
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    return figure


@styled
def decision_boundaries(
    learners: Learners, tasks: TaskDistribution, *, key: PRNGKeyArray, rows: int = 2
) -> Figure:
    """Draw the boundary of each sample between two classes in the plane: a row for each task.

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
    _check(learners, rows)
    figure, axes = canvas(rows, len(learners), (2.7, 2.5), sharex=True, sharey=True)
    shade: Any = None
    seen: set[int] = set()
    for row, own in zip(axes, jax.random.split(key, rows)):
        task = sampled(tasks, own)
        if task.support.x.shape[1:] != (2,) or task.support.y.dtype.kind not in "iu":
            raise ValueError(
                "decision boundaries are drawn of inputs of shape (n, 2) with integer labels, not "
                f"{task.support.x.shape} with {task.support.y.dtype}"
            )
        square = sides(task, SIDE)
        x = np.stack(np.meshgrid(*square), axis=-1).reshape(-1, 2)
        seen |= {int(label) for label in np.asarray(task.support.y)}
        for ax, (learner, meta) in zip(row, learners.values()):
            _, logits = _predictions(learner, meta, task.support, x, own)
            if logits.shape[-1] != 2:
                raise ValueError(
                    f"decision boundaries are drawn of two classes, not {logits.shape[-1]}"
                )
            p = np.asarray(jax.nn.softmax(logits)[..., 1]).reshape(-1, SIDE, SIDE)
            shade = ax.pcolormesh(
                *square, p.mean(axis=0), cmap="Blues", vmin=0, vmax=1, shading="gouraud",
                rasterized=True,
            )  # fmt: skip
            width = 0.9 if len(p) < LINES else 0.6
            drawn = [_boundary(ax, square, one, COLOURS[1], width, "solid") for one in p[:LINES]]
            if not all(drawn):
                ax.text(0.03, 0.03, f"{len(drawn) - sum(drawn)} of {len(drawn)} without boundary",
                        transform=ax.transAxes, fontsize=7)  # fmt: skip
            if hasattr(tasks, "function"):
                fine = sides(task, 4 * SIDE)
                every = np.stack(np.meshgrid(*fine), axis=-1).reshape(-1, 2)
                labels = np.asarray(tasks.function(own)(jnp.asarray(every)), float)
                _boundary(ax, fine, labels.reshape(4 * SIDE, -1), "black", 1.4, "dashed")
            for label in (0, 1):
                mine = np.asarray(task.support.x)[np.asarray(task.support.y) == label]
                ax.plot(*mine.T, zorder=5, **_POINTS[label])
            ax.set_aspect("equal")
            ax.grid(False)
        row[0].set_ylabel("x₂")
    _titles(axes, learners, "x₁")
    figure.colorbar(shade, ax=axes, label="probability of label 1", shrink=0.7, aspect=30)
    truth = (
        [stroke("black", linestyle="dashed", label="truth")] if hasattr(tasks, "function") else []
    )
    support = [
        stroke(**_POINTS[label], label=f"support, label {label}") for label in sorted(seen)[::-1]
    ]
    handles = [*truth, *support, stroke(COLOURS[1], linewidth=0.9, label="samples")]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    return figure


@styled
def attribute_sheet(
    learner: Adapter, meta: Meta, tasks: Any, *, key: PRNGKeyArray, per_label: int = 4
) -> Figure:
    """Draw an ambiguous task of images, and which of its readings the samples of a learner chose.

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
    task, readings = sampled(tasks, key), tasks.readings(key)
    if task.query.size == 0 or task.support.x.ndim != 4:
        raise ValueError(
            "an attribute sheet wants images (n, height, width, channels), of support and of "
            f"queries, not {task.support.x.shape} and {task.query.x.shape}"
        )
    _, logits = _predictions(learner, meta, task.support, task.query.x, key)
    logits = logits if logits.ndim == 3 else logits[None]
    y, count = np.asarray(task.query.y), len(readings)
    log_p = np.asarray(jax.nn.log_softmax(logits))
    mixture = np.exp(log_p).mean(axis=0)
    by_reading = (len(log_p), count, -1)
    likely = log_p[:, np.arange(len(y)), y].reshape(by_reading).mean(axis=-1)
    chosen = likely.argmax(axis=1)
    right = (logits.argmax(axis=-1) == y).reshape(by_reading).mean(axis=-1)
    accuracy = 100 * right[np.arange(len(chosen)), chosen].mean()

    # Rows of support and queries, the first few of each label.
    shown = {
        label: np.flatnonzero(np.asarray(task.support.y) == label)[:per_label] for label in (0, 1)
    }
    wide = max(map(len, shown.values()))
    size, gap, left, top, head = 0.85, 0.07, 1.25, 0.62, 0.42
    middle = left + wide * (size + gap) + 0.25
    below = top + size + gap + head
    matrix = middle + wide * (size + gap) + 0.3
    cells = max(0.24 * len(log_p), 0.9)
    width, height = matrix + cells + 0.75, below + count * (size + gap) + 0.5
    figure = Figure(figsize=(width, height), layout="none")  # type: ignore[arg-type]

    def place(x: float, y: float, wide: float, high: float) -> Axes:
        return figure.add_axes((x / width, 1 - (y + high) / height, wide / width, high / height))

    def write(x: float, y: float, text: str, **how: Any) -> None:
        how = {"fontsize": 9, "va": "center", **how}
        figure.text(x / width, 1 - y / height, text, **how)

    write(
        0.12, 0.17, f"{len(log_p)} sample{'s' * (len(log_p) != 1)}: {len(set(chosen))} of {count} "
        f"reading{'s' * (count != 1)} chosen, accuracy on them {accuracy:.0f} %",
        fontsize=10, fontweight="bold",
    )  # fmt: skip
    write(left, top - 0.13, "support with all", fontweight="bold")
    write(middle, top - 0.13, "support with none", fontweight="bold")
    everything = dict.fromkeys(name for reading in readings for name in reading)
    text = "\n".join(name.replace("_", " ") for name in everything)
    write(left - 0.1, top + size / 2, text, ha="right", fontsize=7.5)
    for start, label in ((left, 1), (middle, 0)):
        for column, i in enumerate(shown[label]):
            show_image(place(start + column * (size + gap), top, size, size), task.support.x[i])
    write(left, below - 0.13, "queries with both", fontweight="bold")
    write(middle, below - 0.13, "queries with neither", fontweight="bold")
    write(matrix, below - 0.13, "chosen by", fontweight="bold")
    for row, reading in enumerate(readings):
        y_at = below + row * (size + gap)
        text = "\nand ".join(name.replace("_", " ") for name in reading)
        write(left - 0.1, y_at + size / 2, text, ha="right", fontsize=7.5)
        for start, label in ((left, 1), (middle, 0)):
            fitting = np.flatnonzero((y == label) & (np.arange(len(y)) * count // len(y) == row))
            for column, i in enumerate(fitting[:wide]):
                ax = place(start + column * (size + gap), y_at, size, size)
                show_image(ax, task.query.x[i], RIGHT if mixture[i].argmax() == label else WRONG)
                ax.text(0.96, 0.05, f"{mixture[i][label]:.0%}", transform=ax.transAxes, ha="right",
                        fontsize=6.5, color="white", bbox={"pad": 0.8, "facecolor": "black",
                        "alpha": 0.6, "linewidth": 0})  # fmt: skip
        write(matrix + cells + 0.08, y_at + size / 2, f"{np.sum(chosen == row)} of {len(log_p)}",
              fontsize=8)  # fmt: skip
    ax = place(matrix, below, cells, count * (size + gap) - gap)
    ax.imshow(np.exp(likely.T), cmap="Blues", vmin=0, vmax=1, aspect="auto")
    ax.plot(np.arange(len(chosen)), chosen, "o", color=COLOURS[1], markeredgecolor="white",
            markersize=7)  # fmt: skip
    ax.set(xticks=[], yticks=[])
    ax.set_xlabel("samples", fontsize=8)
    ax.grid(False)
    write(
        left, height - 0.2, "green frame: the mixture is right, orange: wrong; figure: its "
        "probability of the label; shade: likelihood of the reading's queries by each sample, 0 to "
        "1; dot: the reading it chose", fontsize=7,
    )  # fmt: skip
    return figure


@styled
def active_curves(curves: Any, *, metric: str | None = None, title: str = "") -> Figure:
    """Draw scores by number of labels, and the paired differences from random choice.

    Args:
        curves: `adaptax.studies.ActiveCurves` of one learner, or of several by name.
        metric: the primary one if `None`.
        title: of the picture.

    Raises:
        ValueError: if there are no curves, or they do not have the metric.

    Example:
        `active_curves({"MAML": a, "BMAML": b}).savefig("active.png")`
    """
    several: dict[str, Any] = dict(curves) if isinstance(curves, Mapping) else {"": curves}
    check_some(several, "curves")
    name = next(iter(several.values())).primary if metric is None else metric
    drawn = [(learner, strategy) for learner, one in several.items() for strategy in one.values]
    chosen = dict.fromkeys(strategy for _, strategy in drawn if strategy != "random")
    both = bool(chosen) and all("random" in one.values for one in several.values())
    figure, axes = canvas(1, 2 if both else 1, (4.0, 3.2))
    left, factor = axes[0, 0], scale(name)
    for (learner, strategy), how in zip(drawn, marks(len(drawn))):
        one, how = several[learner], {**how, "linestyle": _LINES[strategy]}
        mean, half = one.mean(strategy, name), one.ci95(strategy, name)
        label = ", ".join(filter(None, (learner, strategy)))
        band(left, one.labels, factor * mean, factor * half, label=label, **how)
        if both and strategy in one.informed:
            mean, half = one.difference(name, of=strategy)
            label = ", ".join(filter(None, (learner, strategy if len(chosen) > 1 else "")))
            band(axes[0, 1], one.labels, factor * mean, factor * half, label=label, **how)
    shown = METRICS.get(name, name)
    left.set(xlabel="labels", ylabel=shown)
    left.set_title(title or "mean and 95 % CI", loc="left")
    left.legend(handlelength=3)
    if both:
        right = axes[0, 1]
        right.axhline(0, color=GREY, linestyle=":", linewidth=1)
        right.set(xlabel="labels", ylabel="difference in " + shown.replace("(%)", "(points)"))
        one_way = next(iter(chosen)) if len(chosen) == 1 else "chosen"
        right.set_title(f"{one_way} − random, paired", loc="left")
        if len(several) * len(chosen) > 1:
            right.legend()
    for ax in axes.flat:
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def _predictions(
    learner: Adapter, meta: Meta, support: Batch, x: Any, key: PRNGKeyArray
) -> tuple[Model, np.ndarray]:
    """Return an adapted model, and its predictions, leading with particles if any."""
    model = learner.adapt(meta, support, key=key)
    x = jnp.asarray(x, support.x.dtype)
    return model, np.asarray(predictions(model, x, support.x, transductive=True))


def _noise(model: Model, noise: float | str, x: Any, support: Batch) -> Float[np.ndarray, "a b"]:
    """Return the deviation of targets for each model and input, or for all of them alike."""
    if is_predictive(model):
        x = jnp.asarray(x, support.x.dtype)
        found = np.asarray(deviations(model, x, support.x, transductive=True))
        return found[..., 0].reshape(-1, len(x))
    if noise != "learned":
        return np.reshape(np.asarray(noise, float), (1, 1))
    return np.reshape(np.asarray(learned_noise(model)), (-1, 1))


def _interval(
    f: Float[np.ndarray, "m n"], noise: Float[np.ndarray, "a b"], level: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return the ends of the central interval of the mixture of `N(f_m, noise²)`, by bisection."""
    scales = jnp.asarray(noise)
    reach = 10 * float(np.max(noise))

    def quantile(q: float) -> np.ndarray:
        low, high = jnp.min(jnp.asarray(f), axis=0) - reach, jnp.max(jnp.asarray(f), axis=0) + reach

        def halve(_: Any, ends: tuple[Array, Array]) -> tuple[Array, Array]:
            middle = (ends[0] + ends[1]) / 2
            under = jnp.mean(ndtr((middle - f) / scales), axis=0) < q
            return jnp.where(under, middle, ends[0]), jnp.where(under, ends[1], middle)

        return np.asarray(jax.lax.fori_loop(0, 40, halve, (low, high))[0])

    return quantile((1 - level) / 2), quantile((1 + level) / 2)


def _boundary(
    ax: Axes, square: Sequence[np.ndarray], p: np.ndarray, colour: str, width: float, style: str
) -> bool:
    """Draw where p is a half; return whether it is so anywhere."""
    if not p.min() < 0.5 < p.max():
        return False
    ax.contour(*square, p, levels=[0.5], colors=[colour], linewidths=width, linestyles=style)
    return True


def _titles(axes: np.ndarray, learners: Learners, below: str) -> None:
    for ax, title in zip(axes[0], learners):
        ax.set_title(title, loc="left")
    for ax in axes[-1]:
        ax.set_xlabel(below)


def _check(learners: Learners, rows: int) -> None:
    """Raise if there is nothing to draw."""
    check_some(learners, "learners")
    if rows < 1:
        raise ValueError(f"rows is 1 or more, not {rows}")

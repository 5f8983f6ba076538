"""Pictures of what an adapted model predicts: curves of a regression, sheets of images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from .. import program
from ..learner import Adapter, Meta
from ..task import Batch, Model, Task, TaskDistribution
from ..text import shown
from .style import COLOURS, MORE, canvas, styled

GRID = 200
"""Points of a line that predictions are drawn on."""

SHOWN = (0, 1, 10)
PREDICTED = (*(COLOURS[i] for i in (5, 4, 0, 3, 2)), *MORE)
"""Of predictions after several numbers of steps; the truth is black, the support orange."""

RIGHT, WRONG = COLOURS[2], COLOURS[1]
"""Frames of queries by whether they were told right."""


def adaptation(
    learner: Adapter,
    meta: Meta,
    tasks: TaskDistribution,
    *,
    key: PRNGKeyArray,
    steps: Sequence[int] = SHOWN,
    title: str = "",
) -> Figure:
    """Draw one regression task: the true function, the support, and the adapted predictions.

    Args:
        learner: any.
        meta: its meta-parameters.
        tasks: of one input and one output; its `function(key)` is the true function, or else the
            query points are drawn.
        key: names the task.
        steps: numbers of adaptation steps to draw predictions after.
        title: of the plot.

    Raises:
        ValueError: if inputs or outputs are not numbers.

    Example:
        `adaptax.report.adaptation(learner, result.meta, tasks.test, key=jax.random.key(0))`
    """
    return adaptations({title: (learner, meta)}, tasks, key=key, steps=steps)


@styled
def adaptations(
    learners: Mapping[str, tuple[Adapter, Meta]],
    tasks: TaskDistribution,
    *,
    key: PRNGKeyArray,
    steps: Sequence[int] = SHOWN,
) -> Figure:
    """Draw `adaptation` of several learners to the same task, side by side.

    Args:
        learners: a learner and its meta-parameters for each title.
        tasks: as for `adaptation`.
        key: names the task.
        steps: numbers of adaptation steps to draw predictions after.
    """
    task = sampled(tasks, key)
    check_curves(task, "the adaptation picture wants")
    size = (4.6, 3.2) if len(learners) == 1 else (3.1, 2.9)
    figure, axes = canvas(1, len(learners), size, sharey=True)
    (x,) = sides(task, GRID)
    x = x[:, None]
    for ax, (title, (learner, meta)) in zip(axes[0], learners.items()):
        if hasattr(tasks, "function"):
            truth: Any = (x, np.asarray(tasks.function(key)(jnp.asarray(x))))
        else:
            truth = (np.asarray(task.query.x), np.asarray(task.query.y))
        mark = "-" if hasattr(tasks, "function") else "."
        ax.plot(*truth, mark, color="black", label="truth", zorder=2)
        _curves(ax, learner, meta, task, key, steps, x)
        ax.set_xlabel("x")
        ax.set_title(title, loc="left")
    axes[0, 0].set_ylabel("y")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    columns = 3 if len(learners) == 1 else len(labels)
    figure.legend(handles, labels, loc="outside lower center", ncols=columns)
    return figure


@styled
def episode_sheet(
    task: Task,
    predictions: Float[Array, "*particles n way"] | None = None,
    *,
    names: Sequence[str] | None = None,
    per_class: int = 5,
) -> Figure:
    """Draw the images of an episode, a row a class: support to the left, queries to the right.

    Args:
        task: of images `(n, height, width, channels)` in [0, 1], with integer labels.
        predictions: logits of the queries, `(n, way)`, or `(particles, n, way)` of an ensemble:
            queries are framed by whether they were told right, and captioned with what they were
            taken for and how surely.
        names: of the classes.
        per_class: queries, and support images, to show of a class at most.

    Example:
        `adaptax.report.episode_sheet(task, model(task.query.x))`
    """
    support, query = _images(task.support), _images(task.query)
    labels = sorted({*support.labels.tolist(), *query.labels.tolist()})
    names = [f"class {label}" for label in labels] if names is None else [
        shown(name, 24) for name in names]  # fmt: skip
    shots, queries = (
        min(per_class, max(int(np.sum(batch.labels == label)) for label in labels))
        for batch in (support, query)
    )
    probabilities = None if predictions is None else _probabilities(predictions)
    # An empty column keeps support and queries apart. Laid out by hand, in inches, since captions
    # may be wider than the images they belong to.
    widths = [1.0] * shots + [0.35] + [1.0] * queries
    cell, gap = 0.8, 0.15 if probabilities is None else 0.5
    left, top, bottom = 0.2 + 0.075 * max(map(len, names)), 0.55, 0.1 if gap < 0.5 else 0.35
    width = left + cell * 1.12 * sum(widths) + 0.15
    height = top + len(labels) * (cell + gap) + bottom - 0.1
    figure, axes = canvas(
        len(labels), len(widths), (width / len(widths), height / len(labels)),
        gridspec_kw={"width_ratios": widths}, layout="none",
    )  # fmt: skip
    figure.subplots_adjust(
        left=left / width, right=1 - 0.15 / width, top=1 - top / height, bottom=bottom / height,
        wspace=0.12, hspace=gap / cell,
    )  # fmt: skip
    for ax in axes.flat:
        ax.set_axis_off()
    for row, (label, name) in enumerate(zip(labels, names)):
        for column, i in enumerate(np.flatnonzero(support.labels == label)[:shots]):
            show_image(axes[row, column], support.pixels[i])
        axes[row, 0].text(
            -0.12, 0.5, name, transform=axes[row, 0].transAxes, ha="right", va="center", fontsize=8,
            parse_math=False,
        )  # fmt: skip
        for column, i in enumerate(np.flatnonzero(query.labels == label)[:queries]):
            ax = axes[row, shots + 1 + column]
            if probabilities is None:
                show_image(ax, query.pixels[i])
                continue
            taken = int(probabilities[i].argmax())
            right, said = taken == label, f"{probabilities[i].max():.0%}"
            show_image(ax, query.pixels[i], RIGHT if right else WRONG)
            ax.set_title(
                said if right else f"{names[taken]}?\n{said}", fontsize=7, pad=2, linespacing=1.0,
                color="black" if right else WRONG, parse_math=False,
            )  # fmt: skip
    narrow = predictions is None or axes.shape[1] - shots < 5
    caption = "queries" if narrow else "queries, and what they were taken for"
    for column, text in ((0, "support"), (shots + 1, caption)):
        x = axes[0, column].get_position().x0
        figure.text(x, 1 - 0.08 / height, text, va="top", fontsize=9, fontweight="bold")
    if probabilities is not None:
        handles = [Patch(color=RIGHT, label="told right"), Patch(color=WRONG, label="told wrong")]
        figure.legend(handles=handles, loc="lower right", ncols=2, fontsize=7)
    return figure


def sampled(tasks: TaskDistribution, key: PRNGKeyArray) -> Task:
    """Return the task that a key names."""
    if tasks.on_host:
        return tasks.sample(key)
    return program.call(tasks.sample, key)


def check_curves(task: Task, wants: str) -> None:
    """Raise unless inputs and outputs of a task are numbers."""
    if task.support.x.shape[1:] != (1,) or task.support.y.shape[1:] != (1,):
        raise ValueError(
            f"{wants} inputs and outputs of shape (n, 1), not {task.support.x.shape} and "
            f"{task.support.y.shape}"
        )


def sides(task: Task, count: int) -> list[np.ndarray]:
    """Return evenly spaced points over each input's range in the task, and a little beyond."""
    seen = np.concatenate([np.asarray(task.support.x), np.asarray(task.query.x)])
    low, high = seen.min(axis=0), seen.max(axis=0)
    margin = 0.02 * (high - low)
    return [np.linspace(a, b, count, dtype=seen.dtype) for a, b in zip(low - margin, high + margin)]


def draw_support(ax: Axes, task: Task) -> None:
    """Draw the support of a regression task of one input."""
    ax.plot(
        np.asarray(task.support.x)[:, 0], np.asarray(task.support.y)[:, 0], "^", color=COLOURS[1],
        markersize=7, markeredgecolor="white", label="support", zorder=5,
    )  # fmt: skip


def show_image(ax: Axes, image: Any, frame: str = "#888888") -> None:
    """Draw an image of pixels in [0, 1], in a frame of a colour."""
    image = np.clip(np.asarray(image, float), 0, 1).squeeze()
    ax.imshow(image, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    ax.set_axis_on()
    ax.set(xticks=[], yticks=[])
    ax.grid(False)
    for spine in ax.spines.values():
        spine.set(visible=True, color=frame, linewidth=2.0)


class _Images(eqx.Module):
    pixels: np.ndarray
    labels: np.ndarray


def _images(batch: Batch) -> _Images:
    pixels, labels = np.asarray(batch.x, float), np.asarray(batch.y)
    if pixels.ndim != 4 or pixels.shape[-1] not in (1, 3) or labels.dtype.kind not in "iu":
        raise ValueError(
            f"an episode sheet wants images (n, height, width, 1 or 3) with integer labels, not "
            f"{pixels.shape} with {labels.dtype}"
        )
    if pixels.size and (pixels.min() < 0 or pixels.max() > 1):  # normalised by mean and std
        pixels = (pixels - pixels.min()) / (pixels.max() - pixels.min())
    return _Images(pixels, labels)


def _probabilities(logits: Float[Array, "*particles n way"]) -> Float[np.ndarray, "n way"]:
    p = np.asarray(jax.nn.softmax(jnp.asarray(logits), axis=-1))
    return p.mean(axis=0) if p.ndim == 3 else p


def _curves(
    ax: Axes,
    learner: Adapter,
    meta: Meta,
    task: Task,
    key: PRNGKeyArray,
    steps: Sequence[int],
    x: np.ndarray,
) -> None:
    """Draw predictions after each of some numbers of steps, and the support."""
    path = learner.iterates(meta, task.support, key=key, steps=max(steps))
    predictions = np.asarray(program.call(_along, path, jnp.asarray(x)))
    length = len(predictions)
    drawn = [step for step in steps if step < length] if length > 1 else [0]
    styles: list[Any] = [":", (0, (5, 1.5)), "-", "-."]
    for i, step in enumerate(drawn):
        y = predictions[step]
        label = "adapted" if length == 1 else f"{step} step{'s' * (step != 1)}"
        colour = PREDICTED[i % len(PREDICTED)]
        if y.ndim == 3:
            low, high = y.mean(0) - 2 * y.std(0), y.mean(0) + 2 * y.std(0)
            ax.fill_between(x[:, 0], low[:, 0], high[:, 0], color=colour, alpha=0.2, linewidth=0)
            y = y.mean(0)
        ax.plot(x[:, 0], y[:, 0], color=colour, linestyle=styles[i % 4], label=label, zorder=3)
    draw_support(ax, task)


def _along(path: Model, x: Array) -> Array:
    """Predict with every model of a path."""
    arrays, rest = eqx.partition(path, eqx.is_array)
    return jax.lax.map(lambda one: eqx.combine(one, rest)(x), arrays)

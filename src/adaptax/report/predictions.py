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

from .. import program
from ..learner import Meta, MetaLearner
from ..task import Batch, Model, Task, TaskDistribution
from .style import COLOURS, canvas, styled

GRID = 200
SHOWN = (0, 1, 10)


def adaptation(
    learner: MetaLearner,
    meta: Meta,
    tasks: TaskDistribution,
    *,
    key: PRNGKeyArray,
    steps: Sequence[int] = SHOWN,
    title: str = "",
) -> Figure:
    """One regression task: the true function, the support points, and the adapted predictions.

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
    learners: Mapping[str, tuple[MetaLearner, Meta]],
    tasks: TaskDistribution,
    *,
    key: PRNGKeyArray,
    steps: Sequence[int] = SHOWN,
) -> Figure:
    """`adaptation` of several learners to the same task, side by side.

    Args:
        learners: a learner and its meta-parameters for each title.
        tasks: as for `adaptation`.
        key: names the task.
        steps: numbers of adaptation steps to draw predictions after.
    """
    task = program.call(tasks.sample, key)
    size = (4.6, 3.2) if len(learners) == 1 else (3.1, 2.9)
    figure, axes = canvas(1, len(learners), size, sharey=True)
    for ax, (title, (learner, meta)) in zip(axes[0], learners.items()):
        _curves(ax, learner, meta, task, key, steps)
        if hasattr(tasks, "function"):
            x = _grid(task)
            ax.plot(x, np.asarray(tasks.function(key)(x)), color="black", label="truth", zorder=2)
        else:
            x, y = np.asarray(task.query.x), np.asarray(task.query.y)
            ax.plot(x, y, ".", color="black", label="truth", zorder=2)
        ax.set_xlabel("x")
        if title:
            ax.set_title(title, loc="left")
    axes[0, 0].set_ylabel("y")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    order = np.argsort([label != "truth" for label in labels], kind="stable")
    figure.legend(
        [handles[i] for i in order], [labels[i] for i in order],
        loc="outside lower center", ncols=3 if len(learners) == 1 else len(labels), fontsize=8,
    )  # fmt: skip
    return figure


@styled
def episode_sheet(
    task: Task,
    predictions: Float[Array, "*particles n way"] | None = None,
    *,
    names: Sequence[str] | None = None,
    per_class: int = 5,
) -> Figure:
    """The images of an episode, a row a class: support to the left, queries to the right.

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
    names = [f"class {label}" for label in labels] if names is None else list(names)
    shots = min(per_class, max(int(np.sum(support.labels == label)) for label in labels))
    queries = min(per_class, max(int(np.sum(query.labels == label)) for label in labels))
    probabilities = None if predictions is None else np.asarray(_probabilities(predictions))
    # An empty column keeps support and queries apart. Laid out by hand, in inches, since captions
    # may be wider than the images they belong to.
    widths = [1.0] * shots + [0.35] + [1.0] * queries
    cell, gap = 0.8, 0.5 if probabilities is not None else 0.15
    left, top = 0.2 + 0.075 * max(map(len, names)), 0.55
    width, height = left + cell * 1.12 * sum(widths) + 0.15, top + len(labels) * (cell + gap)
    figure, axes = canvas(
        len(labels), len(widths), (width / len(widths), height / len(labels)),
        gridspec_kw={"width_ratios": widths}, layout="none",
    )  # fmt: skip
    figure.subplots_adjust(
        left=left / width, right=1 - 0.15 / width, top=1 - top / height, bottom=0.1 / height,
        wspace=0.12, hspace=gap / cell,
    )  # fmt: skip
    for ax in axes.flat:
        ax.set_axis_off()
    for row, (label, name) in enumerate(zip(labels, names)):
        for column, i in enumerate(np.flatnonzero(support.labels == label)[:shots]):
            _show(axes[row, column], support.pixels[i], "#888888")
        axes[row, 0].text(
            -0.12, 0.5, name, transform=axes[row, 0].transAxes, ha="right", va="center", fontsize=8
        )
        for column, i in enumerate(np.flatnonzero(query.labels == label)[:queries]):
            ax = axes[row, shots + 1 + column]
            if probabilities is None:
                _show(ax, query.pixels[i], "#888888")
                continue
            taken = int(probabilities[i].argmax())
            right = taken == label
            _show(ax, query.pixels[i], COLOURS[2] if right else COLOURS[1])
            said = f"{probabilities[i][taken]:.0%}"
            ax.set_title(
                said if right else f"{names[taken]}?\n{said}", fontsize=7, pad=2, linespacing=1.0,
                color="black" if right else COLOURS[1],
            )  # fmt: skip
    narrow = predictions is None or axes.shape[1] - shots < 5
    caption = "queries" if narrow else "queries, and what they were taken for"
    for column, text in ((0, "support"), (shots + 1, caption)):
        x = axes[0, column].get_position().x0
        figure.text(x, 1 - 0.08 / height, text, va="top", fontsize=9, fontweight="bold")
    return figure


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


def _probabilities(logits: Float[Array, "*particles n way"]) -> Float[Array, "n way"]:
    p = jax.nn.softmax(jnp.asarray(logits), axis=-1)
    return p.mean(axis=0) if p.ndim == 3 else p


def _show(ax: Axes, image: np.ndarray, frame: str) -> None:
    ax.imshow(image.squeeze(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    ax.set_axis_on()
    ax.set_xticks([])
    ax.set_yticks([])
    ax.grid(False)
    for spine in ax.spines.values():
        spine.set(visible=True, color=frame, linewidth=1.8)


def _grid(task: Task) -> np.ndarray:
    seen = np.concatenate([np.asarray(task.support.x), np.asarray(task.query.x)])
    margin = 0.02 * float(np.ptp(seen))
    return np.linspace(seen.min() - margin, seen.max() + margin, GRID)[:, None].astype(np.float32)


def _curves(
    ax: Axes, learner: MetaLearner, meta: Meta, task: Task, key: PRNGKeyArray, steps: Sequence[int]
) -> None:
    if task.support.x.shape[1:] != (1,) or task.support.y.shape[1:] != (1,):
        raise ValueError(
            "the adaptation picture wants inputs and outputs of shape (n, 1), not "
            f"{task.support.x.shape} and {task.support.y.shape}"
        )
    x = _grid(task)
    predictions, length = _predictions(learner, meta, task, key, max(steps), x)
    drawn = [step for step in steps if step < length] if length > 1 else [0]
    styles: list[Any] = [":", (0, (5, 1.5)), "-", "-."]
    for i, step in enumerate(drawn):
        y = predictions[step]
        label = "adapted" if length == 1 else f"{step} step{'s' * (step != 1)}"
        colour = (COLOURS[5], COLOURS[4], COLOURS[0], COLOURS[3])[i % 4]
        if y.ndim == 3:
            low, high = y.mean(0) - 2 * y.std(0), y.mean(0) + 2 * y.std(0)
            ax.fill_between(x[:, 0], low[:, 0], high[:, 0], color=colour, alpha=0.2, linewidth=0)
            y = y.mean(0)
        ax.plot(x[:, 0], y[:, 0], color=colour, linestyle=styles[i % 4], label=label, zorder=3)
    ax.plot(
        np.asarray(task.support.x)[:, 0], np.asarray(task.support.y)[:, 0], "^", color=COLOURS[1],
        markersize=7, markeredgecolor="white", label="support", zorder=5,
    )  # fmt: skip


def _predictions(
    learner: MetaLearner, meta: Meta, task: Task, key: PRNGKeyArray, steps: int, x: np.ndarray
) -> tuple[np.ndarray, int]:
    """Predictions `(steps, [particles,] n, 1)` after every step, and how many there are."""

    path = learner.iterates(meta, task.support, key=key, steps=steps)
    predictions = np.asarray(program.call(_along, path, jnp.asarray(x)))
    return predictions, len(predictions)


def _along(path: Model, x: Array) -> Array:
    arrays, rest = eqx.partition(path, eqx.is_array)
    return jax.lax.map(lambda one: eqx.combine(one, rest)(x), arrays)

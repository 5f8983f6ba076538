"""Pictures of reinforcement learning: returns by gradient step, and where policies go."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from ..engine.report import Report
from ..learner import Ensemble, Meta, MetaLearner
from ..rl import Navigation, Policies, Tasks
from ..task import Batch
from .style import COLOURS, MARKERS, canvas, styled

GREY = "#555555"
LINES = (*COLOURS, "#999999")
"""Colours of learners, one more than the palette has."""


@styled
def returns_by_step(
    returns: Mapping[str, Report],
    *,
    paper: Mapping[str, Mapping[int, float]] | None = None,
    title: str = "",
) -> Figure:
    """The mean return of several learners by the number of gradient steps, with its interval.

    Args:
        returns: what `adaptax.rl.evaluate` answered, for each name.
        paper: published returns, `{name: {steps: return}}`, drawn as crosses; in the colour of
            the learner of that name, or in grey.
        title: of the plot.

    Raises:
        ValueError: if there is nothing to draw.

    Example:
        `returns_by_step({"MAML": returns}, paper={"MAML": {0: -40.41, 1: -11.68}})`
    """
    if not returns:
        raise ValueError("there are no returns to draw; give one for each name")
    figure, axes = canvas(size=(6.4, 3.6))
    ax, colours = axes[0, 0], {}
    for i, (name, one) in enumerate(returns.items()):
        colour = colours[name] = LINES[i % len(LINES)]
        steps = range(len(one.at))
        mean = np.array([one.mean(step=step) for step in steps])
        half = np.array([one.ci95(step=step) for step in steps])
        ax.plot(steps, mean, color=colour, marker=MARKERS[i % len(MARKERS)], label=name, zorder=3)
        ax.fill_between(steps, mean - half, mean + half, color=colour, alpha=0.2, linewidth=0)
    for name, points in (paper or {}).items():
        ax.plot(
            list(points), list(points.values()), "x", color=colours.get(name, GREY),
            markersize=8, markeredgewidth=1.8, zorder=4, label=f"{name}, published",
        )  # fmt: skip
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_xlabel("gradient steps")
    ax.set_ylabel("return")
    if title:
        ax.set_title(title, loc="left")
    figure.legend(loc="outside right center", title="mean and 95 % CI", title_fontsize=8)
    return figure


@styled
def trajectories(
    learner: MetaLearner,
    meta: Meta,
    tasks: Tasks,
    *,
    key: PRNGKeyArray,
    goals: int = 4,
    steps: int = 1,
    shown: int = 5,
) -> Figure:
    """Where policies go in 2-D navigation: a column for each goal, before and after adaptation.

    A number in a corner is the mean return of all trajectories that were drawn. Of a learner of
    several policies, each has its colour.

    Args:
        learner: any.
        meta: its meta-parameters.
        tasks: of `adaptax.rl.Navigation`.
        key: names the goals.
        goals: how many.
        steps: gradient steps of adaptation.
        shown: trajectories in a panel, of each policy; as many as the tasks draw at most.

    Raises:
        ValueError: if the environment is not navigation, or there is nothing to draw.
    """
    if not isinstance(tasks.env, Navigation):
        raise ValueError(
            f"trajectories are drawn of Navigation, and the tasks are of {type(tasks.env).__name__}"
        )
    if goals < 1 or steps < 1 or shown < 1:
        raise ValueError(f"goals, steps and shown are at least 1, not {goals}, {steps}, {shown}")

    def walk(key: PRNGKeyArray) -> tuple[Batch, Array]:
        task_key, adapt_key, walk_key = jax.random.split(key, 3)
        task = tasks.sample(task_key)
        path = learner.iterates(meta, task.support, key=adapt_key, steps=steps)
        arrays, rest = eqx.partition(path, eqx.is_array)
        # Learners without a notion of a step have but the last policy.
        ends = jax.tree.map(lambda leaf: leaf[jnp.array([0, -1])], arrays)
        draw = lambda one: task.query.draw(eqx.combine(one, rest), walk_key)  # noqa: E731
        batch = jax.lax.map(draw, ends)
        if not isinstance(path, Ensemble | Policies):
            batch = jax.tree.map(lambda leaf: leaf[:, None], batch)
        return batch, task.query.task

    batch, places = jax.tree.map(np.asarray, jax.jit(jax.vmap(walk))(jax.random.split(key, goals)))
    figure, axes = canvas(2, goals, (2.1, 2.2), sharex=True, sharey=True)
    alive = batch.y.mask.astype(bool)
    seen = np.where(alive[..., None], batch.x[..., :2], np.nan)[:, :, :, :shown]
    total = batch.y.rewards.sum(-1).mean((-1, -2))
    policies = seen.shape[2]
    for column in range(goals):
        for row in range(2):
            ax = axes[row, column]
            for policy in range(policies):
                colour = COLOURS[policy % len(COLOURS)]
                x, y = np.moveaxis(seen[column, row, policy], -1, 0)
                ax.plot(x.T, y.T, color=colour, linewidth=0.9, alpha=0.6, zorder=2)
            ax.plot(0, 0, "o", color=GREY, markersize=4, zorder=3)
            ax.plot(*places[column], "*", color=COLOURS[1] if policies == 1 else "black",
                    markersize=11, markeredgecolor="white", zorder=4)  # fmt: skip
            ax.text(
                0.03, 0.97, f"{total[column, row]:.1f}", transform=ax.transAxes, va="top",
                fontsize=8, bbox={"facecolor": "white", "alpha": 0.8, "linewidth": 0, "pad": 1.5},
                zorder=5,
            )  # fmt: skip
            ax.set_aspect("equal", adjustable="box")
    side = 1.15 * max(np.nanmax(np.abs(seen)), np.abs(places).max())
    axes[0, 0].set_xlim(-side, side)
    axes[0, 0].set_ylim(-side, side)
    axes[0, 0].set_ylabel("before adaptation")
    axes[1, 0].set_ylabel(f"after {steps} step" + ("s" if steps > 1 else ""))
    marks: list[Any] = [
        Line2D([], [], color=GREY, marker="o", linestyle="", markersize=4, label="start"),
        Line2D([], [], color=COLOURS[1] if policies == 1 else "black", marker="*", linestyle="",
               markersize=10, label="goal"),
    ]  # fmt: skip
    if policies > 1:
        marks += [
            Line2D([], [], color=COLOURS[i % len(COLOURS)], label=f"policy {i + 1}")
            for i in range(policies)
        ]
    figure.legend(handles=marks, loc="outside right center")
    return figure

"""Pictures of reinforcement learning: returns by gradient step, and where policies go."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray, PyTree
from matplotlib.figure import Figure

from ..learner import Adapter, Meta
from ..protocols import Particles
from ..task import Batch
from .plots import comparison
from .style import COLOURS, GREY, canvas, check_some, marks, stroke, styled
from .tables import Curve


def returns_by_step(
    returns: Mapping[str, Curve],
    *,
    paper: Mapping[str, Mapping[int, float]] | None = None,
    title: str = "",
) -> Figure:
    """Draw the mean return of several learners by the number of gradient steps, with its interval.

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
    check_some(returns, "returns")
    return comparison(returns, paper=paper, title=title, steps="gradient steps")


@styled
def trajectories(
    learner: Adapter,
    meta: Meta,
    tasks: Any,
    *,
    key: PRNGKeyArray,
    goals: int = 4,
    steps: int = 1,
    shown: int = 5,
) -> Figure:
    """Draw where policies go in 2-D navigation: a column a goal, before and after adaptation.

    A number in a corner is the mean return of all trajectories that were drawn. Of a learner of
    several policies, each has its colour.

    Args:
        learner: any.
        meta: its meta-parameters.
        tasks: `adaptax.rl.Tasks` of `adaptax.rl.Navigation`.
        key: names the goals.
        goals: how many.
        steps: gradient steps of adaptation.
        shown: trajectories in a panel, of each policy; as many as the tasks draw at most.

    Raises:
        ValueError: if the environment is not navigation, or there is nothing to draw.
    """
    if not hasattr(tasks.env, "reach"):
        raise ValueError(
            f"trajectories are drawn of Navigation, and the tasks are of {type(tasks.env).__name__}"
        )
    if goals < 1 or steps < 1 or shown < 1:
        raise ValueError(f"goals, steps and shown are at least 1, not {goals}, {steps}, {shown}")

    def walk(key: PRNGKeyArray) -> tuple[Batch, Array]:
        task, ends, rest, walk_key = before_and_after(learner, meta, tasks, key, steps)
        draw = lambda one: task.query.draw(eqx.combine(one, rest), walk_key)  # noqa: E731
        batch = jax.lax.map(draw, ends)
        if not isinstance(eqx.combine(ends, rest), Particles):
            batch = jax.tree.map(lambda leaf: leaf[:, None], batch)
        return batch, task.query.task

    batch, places = jax.tree.map(np.asarray, jax.jit(jax.vmap(walk))(jax.random.split(key, goals)))
    figure, axes = canvas(2, goals, (2.1, 2.2), sharex=True, sharey=True)
    alive = batch.y.mask.astype(bool)
    seen = np.where(alive[..., None], batch.x[..., :2], np.nan)[:, :, :, :shown]
    total = batch.y.rewards.sum(-1).mean((-1, -2))
    policies = marks(seen.shape[2])
    goal = COLOURS[1] if len(policies) == 1 else "black"
    for column, row in np.ndindex(goals, 2):
        ax: Any = axes[row, column]
        for own, how in zip(seen[column, row], policies):
            x, y = np.moveaxis(own, -1, 0)
            ax.plot(x.T, y.T, color=how["color"], linewidth=0.9, alpha=0.6, zorder=2)
        ax.plot(0, 0, "o", color=GREY, markersize=4, zorder=3)
        ax.plot(*places[column], "*", color=goal, markersize=11, markeredgecolor="white", zorder=4)
        ax.text(
            0.03, 0.97, f"{total[column, row]:.1f}", transform=ax.transAxes, va="top", fontsize=8,
            bbox={"facecolor": "white", "alpha": 0.8, "linewidth": 0, "pad": 1.5}, zorder=5,
        )  # fmt: skip
        ax.set_aspect("equal", adjustable="box")
    side = 1.15 * max(np.nanmax(np.abs(seen)), np.abs(places).max())
    axes[0, 0].set(xlim=(-side, side), ylim=(-side, side), ylabel="before adaptation")
    axes[1, 0].set_ylabel(f"after {steps} step" + ("s" if steps > 1 else ""))
    handles = [
        stroke(GREY, marker="o", linestyle="", markersize=4, label="start"),
        stroke(goal, marker="*", linestyle="", markersize=10, label="goal"),
    ]
    names = [f"policy {i + 1}" for i in range(len(policies))] if len(policies) > 1 else ["policy"]
    handles += [stroke(how["color"], label=name) for name, how in zip(names, policies)]
    figure.legend(handles=handles, loc="outside right center", fontsize=9)
    return figure


def before_and_after(
    learner: Adapter, meta: Meta, tasks: Any, key: PRNGKeyArray, steps: int
) -> tuple[Any, PyTree, PyTree, PRNGKeyArray]:
    """Adapt to the task that a key names.

    Args:
        learner: any.
        meta: its meta-parameters.
        tasks: `adaptax.rl.Tasks`.
        key: names the task and the randomness.
        steps: gradient steps.

    Returns:
        The task; the arrays of the first and the last policy, stacked, and what is no array of
        them; and a key for roll-outs. Learners without a notion of a step have but the last policy.
    """
    task_key, adapt_key, walk_key = jax.random.split(key, 3)
    task = tasks.sample(task_key)
    path: Any = learner.iterates(meta, task.support, key=adapt_key, steps=steps)
    arrays, rest = eqx.partition(path, eqx.is_array)
    ends = jax.tree.map(lambda leaf: leaf[jnp.array([0, -1])], arrays)
    return task, ends, rest, walk_key

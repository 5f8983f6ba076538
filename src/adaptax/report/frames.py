"""Frames of robots that run: the body at several times, before adaptation and after."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray, PyTree
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from matplotlib.transforms import Affine2D

from ..learner import Adapter, Ensemble, Meta
from .returns import before_and_after
from .style import COLOURS, canvas, styled

SIDE = 1.4
"""Half the width of a frame, in metres."""

CANDIDATES = 16
"""Tasks of which the lowest and the highest goal are drawn."""


@styled
def frames(
    learner: Adapter,
    meta: Meta,
    tasks: Any,
    *,
    key: PRNGKeyArray,
    steps: int = 1,
    shown: int = 6,
) -> Figure:
    """Draw a robot from its side at several times of an episode: a column for each time.

    Two rows for each of two tasks, the lowest and the highest goal among several: before
    adaptation and after. The frame follows the robot; the grid, a line each metre, stays on the
    ground, the thick line where the robot started. Of a learner of several policies the first is
    shown.

    Args:
        learner: any.
        meta: its meta-parameters.
        tasks: `adaptax.rl.Tasks` of `adaptax.rl.Locomotion`.
        key: names the tasks.
        steps: gradient steps of adaptation.
        shown: frames of an episode, first and last included.

    Raises:
        ValueError: if the environment is not locomotion, or there is nothing to draw.
    """
    env = tasks.env
    if not hasattr(env, "capsules"):
        raise ValueError(
            f"frames are drawn of Locomotion, and the tasks are of {type(env).__name__}"
        )
    if steps < 1 or shown < 2:
        raise ValueError(f"steps is at least 1 and shown at least 2, not {steps} and {shown}")

    def walk(key: PRNGKeyArray) -> tuple[Array, Array, Array]:
        """Capsules, rewards and what counts, before adaptation and after."""
        task, ends, rest, walk_key = before_and_after(learner, meta, tasks, key, steps)

        def episode(one: PyTree) -> tuple[Array, Array, Array]:
            policy = eqx.combine(one, rest)
            policy = getattr(policy, "ensemble", policy)
            policy = policy.member(0) if isinstance(policy, Ensemble) else policy
            return _episode(env, policy, task.query.task, tasks.horizon, walk_key)

        return jax.lax.map(episode, ends)

    keys = jax.random.split(key, CANDIDATES)
    goals = np.asarray(jax.vmap(lambda key: env.sample_task(jax.random.split(key, 3)[0]))(keys))
    picked = np.array([goals.argmin(), goals.argmax()])
    bodies, rewards, alive = jax.tree.map(
        np.asarray, jax.jit(lambda keys: jax.lax.map(walk, keys))(keys[picked])
    )
    times = np.linspace(0, tasks.horizon - 1, shown).round().astype(int)
    figure, axes = canvas(4, shown, (1.55, 1.15), sharey=True)
    for row in range(4):
        goal, after = divmod(row, 2)
        start, total = bodies[goal, after, 0], (rewards * alive)[goal, after].sum()
        for column, time in enumerate(times):
            ax = axes[row, column]
            over = not alive[goal, after, time]
            _draw(ax, bodies[goal, after, time], env.radii, start, COLOURS[after], faint=over)
            if row == 0:
                ax.set_title(f"{time * env.seconds:.1f} s", fontsize=9)
        when = f"after {steps} step{'s' * (steps > 1)}" if after else "before"
        axes[row, 0].set_ylabel(
            f"{env.goal} {goals[picked[goal]]:+.3g}\n{when}\nreturn {total:.1f}", fontsize=8
        )
    return figure


def _episode(
    env: Any, policy: Any, task: Any, horizon: int, key: PRNGKeyArray
) -> tuple[Array, Array, Array]:
    """The capsules before each step, the reward for it, and whether the episode went on."""
    reset_key, step_key = jax.random.split(key)

    def step(carry: Any, t: Array) -> tuple[Any, tuple[Array, Array, Array]]:
        state, alive = carry
        act_key, env_key = jax.random.split(jax.random.fold_in(step_key, t))
        action = policy(env.observe(state)[None]).sample(act_key)[0]
        after, reward, done = env.step(state, action, env_key)
        return (after, alive & ~done), (env.capsules(state), reward, alive)

    start = (env.reset(reset_key, task), jnp.array(True))
    return jax.lax.scan(step, start, jnp.arange(horizon))[1]


def _draw(
    ax: Axes, body: np.ndarray, radii: np.ndarray, start: np.ndarray, colour: str, faint: bool
) -> None:
    """The capsules of a body on the x-z plane, the farthest first."""
    here, first = body[..., 0].mean(), start[..., 0].mean()
    for i in np.argsort(-body[..., 1].mean(axis=1), kind="stable"):
        (x0, z0), (x1, z1) = body[i][:, [0, 2]]
        length, angle = np.hypot(x1 - x0, z1 - z0), np.arctan2(z1 - z0, x1 - x0)
        r = radii[i]
        capsule = FancyBboxPatch(
            (-r, -r), length + 2 * r, 2 * r, boxstyle=f"round,pad=0,rounding_size={r}",
            facecolor=colour, edgecolor="white", linewidth=0.6, alpha=0.25 if faint else 1.0,
            zorder=3,
        )  # fmt: skip
        capsule.set_transform(Affine2D().rotate(angle).translate(x0, z0) + ax.transData)
        ax.add_patch(capsule)
    ax.axhline(0, color="#555555", linewidth=0.8, zorder=2)
    ax.axvline(first, color="#555555", linewidth=1.6, zorder=1)
    ax.set_xticks(np.arange(np.ceil(here - SIDE), here + SIDE))
    ax.set_xticklabels([])
    ax.set_yticks([0, 1])
    ax.set_yticklabels([])
    ax.tick_params(length=0)
    ax.set_xlim(here - SIDE, here + SIDE)
    ax.set_ylim(-0.15, 1.5)
    ax.set_aspect("equal", adjustable="box")
    ax.set_xlabel(f"{here - first:+.1f} m", fontsize=7, labelpad=1)

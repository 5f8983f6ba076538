"""Returns after 0, 1, 2, … gradient steps, over many tasks, with confidence intervals."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, PRNGKeyArray

from .. import io, metrics, program, roles, tree
from ..engine.mapping import everywhere, local_mesh, map_over
from ..learner import Meta, MetaLearner
from ..task import episode_key
from .rollout import Tasks


@dataclasses.dataclass(frozen=True)
class Returns:
    """Undiscounted returns of one learner on many tasks, with the protocol they belong to.

    Args:
        protocol: what the numbers depend on.
        values: `(goals, steps + 1)`: each task's mean return over its trajectories, after 0, 1, …
            gradient steps. NaN where adaptation made the policy infinite or NaN.
    """

    protocol: dict[str, Any]
    values: np.ndarray

    @property
    def primary(self) -> str:
        """`"return"`."""
        return "return"

    @property
    def score(self) -> float:
        """The mean return after 1, 2, … gradient steps, averaged over their number: by what
        `fit` selects. Late in training the first step may still get better and the next ones
        worse, or the other way round. Without gradient steps the return as it is."""
        mean = float(np.mean(self.values[:, 1:] if self.values.shape[1] > 1 else self.values))
        return mean if math.isfinite(mean) else -math.inf

    def mean(self, metric: str = "return", step: int = -1) -> float:
        """Mean over tasks after a number of gradient steps.

        Args:
            metric: `"return"`.
            step: gradient steps; −1 for the last.
        """
        return float(np.mean(self.values[:, step]))

    def ci95(self, metric: str = "return", step: int = -1) -> float:
        """Half the 95 % confidence interval of that mean: 1.96 standard errors over tasks.

        Args:
            metric: `"return"`.
            step: gradient steps; −1 for the last.
        """
        return float(metrics.ci95(self.values[:, step]))

    def gain(self, step: int = -1) -> tuple[float, float]:
        """What adaptation brings: mean over tasks of the difference to the return before, and half
        its 95 % confidence interval. Narrower than the intervals of the two, in which tasks differ.

        Args:
            step: gradient steps; −1 for the last.
        """
        apart = Returns({}, self.values - self.values[:, :1])
        return apart.mean(step=step), apart.ci95(step=step)

    def diverged(self, step: int = -1) -> int:
        """Tasks in which adaptation made the policy infinite or NaN by then."""
        return int(np.sum(~np.isfinite(self.values[:, step])))

    def to_json(self) -> dict[str, Any]:
        """The protocol and, for every number of steps, mean and interval, as JSON values."""
        curve = [
            {"step": step, "return": self.mean(step=step), "return_ci95": self.ci95(step=step),
             "diverged": self.diverged(step)}
            for step in range(self.values.shape[1])
        ]  # fmt: skip
        for step, row in enumerate(curve[1:], 1):
            row["gain"], row["gain_ci95"] = self.gain(step)
        return io.strict({"protocol": self.protocol, "result": curve[-1], "curve": curve})

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write `to_json` to a file."""
        text = json.dumps(self.to_json(), indent=2, allow_nan=False)
        io.write_atomic(path, f"{text}\n".encode())

    def __str__(self) -> str:
        """A line for each number of steps, and the protocol."""
        lines = ["gradient steps   return (mean, 95 % CI over tasks)"]
        for step in range(self.values.shape[1]):
            lost = self.diverged(step)
            note = f"   {lost} of {len(self.values)} tasks diverged" if lost else ""
            lines.append(
                f"{step:>14}   {self.mean(step=step):.2f} ± {self.ci95(step=step):.2f}{note}"
            )
        lines.append(", ".join(f"{name} {value}" for name, value in self.protocol.items()))
        return "\n".join(lines)


def evaluate(
    learner: MetaLearner, meta: Meta, tasks: Tasks, *, key: PRNGKeyArray, **how: Any
) -> Returns:
    """Adapt to each of 40 tasks by gradient steps on roll-outs and report the returns.

    Args:
        learner: any `MetaLearner`; it adapts by `learner.iterates`, as in meta-training.
        meta: its meta-parameters, `result.meta`.
        tasks: usually with `split="test"`.
        key: names the tasks.
        how: the arguments of `Evaluator`: `goals`, `steps`, `trajectories`, `lr`, `batch`.

    Raises:
        ValueError: if there is nothing to evaluate, the learner has no rate to replace, or the
            environment pays what is not a number.
    """
    return Evaluator(learner, tasks, **how)(meta, key=key)


class Evaluator:
    """`evaluate` for one learner and one split, compiled once and called as often as need be.

    Args:
        learner: any `MetaLearner`.
        tasks: the split.
        goals: how many tasks; 40 in MAML's paper.
        steps: gradient steps.
        trajectories: for each gradient step, and for each return; 40 in MAML's 2-D navigation.
        lr: step sizes of the first steps, of which the last is that of all further ones; the
            learner's own if `None`. MAML's paper takes `(0.1, 0.05)`.
        batch: tasks at once, on each of the local devices, which share the goals.
    """

    def __init__(
        self,
        learner: MetaLearner,
        tasks: Tasks,
        *,
        goals: int = 40,
        steps: int = 3,
        trajectories: int = 40,
        lr: Sequence[float] | None = None,
        batch: int = 10,
    ):
        if goals < 1 or steps < 0 or trajectories < 1 or batch < 1:
            raise ValueError(
                "goals, trajectories and batch are at least 1 and steps at least 0, not "
                f"{goals}, {trajectories}, {batch} and {steps}"
            )
        self.learner = learner if lr is None else _with_rates(learner, lr)
        self._about = learner.describe()
        self.tasks = dataclasses.replace(tasks, trajectories=trajectories)
        self.goals, self.steps, self.lr, self.batch = goals, steps, lr, batch
        self._mesh = local_mesh(goals)

    def __call__(self, meta: Meta, *, key: PRNGKeyArray) -> Returns:
        """Returns on the tasks that `key` names."""
        meta = everywhere(roles.deduplicate(meta), self._mesh)
        how = self.goals, self.steps, self.batch, self._mesh
        found = program.call(_all, self.learner, self.tasks, meta, key, *how)
        values, sound = jax.tree.map(np.asarray, found)
        wrong = sound & ~np.isfinite(values)
        if wrong.any():
            raise ValueError(
                f"{type(self.tasks.env).__name__} paid rewards that are not finite in "
                f"{wrong.any(axis=1).sum()} of {self.goals} tasks, first after "
                f"{np.argmax(wrong.any(axis=0))} gradient steps; check its step()"
            )
        values = np.where(sound, values, np.nan)
        protocol = {
            **self._about,
            **self.tasks.describe(),
            "goals": self.goals,
            "steps": self.steps,
            "ci": "1.96 standard errors over tasks",
        }
        if self.lr is not None:
            protocol["inner_lr"] = list(self.lr)
        return Returns(protocol, values)


def _all(
    learner: MetaLearner,
    tasks: Tasks,
    meta: Meta,
    key: PRNGKeyArray,
    goals: int,
    steps: int,
    batch: int,
    mesh: Mesh | None,
) -> tuple[Array, Array]:
    """Of every task, return and whether the policy is finite, after every number of steps."""

    def one(i: Array) -> tuple[Array, Array]:
        own = episode_key(tasks.split, key, i)
        task_key, adapt_key, judge_key = jax.random.split(own, 3)
        task = tasks.episode(task_key, i)
        path = learner.iterates(roles.fresh(meta, own), task.support, key=adapt_key, steps=steps)
        arrays, rest = eqx.partition(path, eqx.is_array)

        def judge(arrays: Any) -> tuple[Array, Array]:
            policy = eqx.combine(arrays, rest)
            return task.query.draw(policy, judge_key).y.total, tree.finite(policy)

        return jax.lax.map(judge, arrays)

    return map_over(one, jnp.arange(goals, dtype=jnp.uint32), batch, mesh)


def _with_rates(learner: MetaLearner, lr: Sequence[float]) -> MetaLearner:
    """The learner with other rates in its inner loop."""
    if len(lr) == 0 or not all(rate > 0 for rate in lr):
        raise ValueError(f"lr is one or more positive step sizes, not {lr!r}")
    # Meta-SGD's rates are meta-parameters, and an optimizer of one's own has its own.
    if not hasattr(learner, "inner_lr") or getattr(learner, "inner_optimizer", "none") is not None:
        raise ValueError(
            f"{type(learner).__name__} has no step size to replace by lr={lr!r}; leave lr out"
        )
    rates = tuple(lr)
    schedule = lambda step: jnp.array(rates)[jnp.minimum(step, len(rates) - 1)]  # noqa: E731
    return dataclasses.replace(learner, inner_lr=schedule)  # type: ignore[call-arg]

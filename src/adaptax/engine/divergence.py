"""Where meta-training diverged: the meta-step that was not finite, once more, task by task."""

from __future__ import annotations

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import PRNGKeyArray, PyTree

from .. import tree, watch
from ..learner import MetaLearner
from ..task import Batch, TaskDistribution
from . import feed
from .mapping import meta_gradient, task_gradient


@dataclasses.dataclass(frozen=True)
class Cause:
    """What of a meta-step was not finite first.

    Args:
        step: the meta-step, counted from 1.
        quantity: `"meta-parameters"`, before the step; of a task, in this order: `"support
            inputs"`, `"support targets"`, `"query inputs"`, `"query targets"`, `"support loss"`,
            `"inner gradient"`, `"adapted weights"`, `"query loss"`, `"meta-gradient"`; of all,
            `"outer loss"`, `"mean meta-gradient"`, `"outer update"`; `"loss or its gradient"`
            where the replay did not find it again.
        task: which of the meta-batch, from 0; `None` for a quantity of no single task.
        inner_step: after how many steps of the inner loop; `None` outside of it.
        tasks: how many tasks of the meta-batch had something that was not finite.
    """

    step: int
    quantity: str
    task: int | None = None
    inner_step: int | None = None
    tasks: int = 0

    def __str__(self) -> str:
        """One sentence of what happened, one of what to do."""
        where = "" if self.task is None else f" of task {self.task} of the meta-batch"
        if self.inner_step is not None:
            where += f", inner step {self.inner_step + 1},"
        more = f" (and something in {self.tasks - 1} other tasks)" if self.tasks > 1 else ""
        verb = "were" if self.quantity.endswith("s") and "loss" not in self.quantity else "was"
        return (
            f"the {self.quantity}{where} {verb} not finite{more} at meta-step {self.step}; the "
            f"state before it is kept. {self._advice()}"
        )

    def _advice(self) -> str:
        if self.quantity == "support loss" and not self.inner_step:
            return _ADVICE["meta-parameters far out"]
        if self.quantity == "support loss":
            return _ADVICE["adapted weights"]
        return _ADVICE.get(self.quantity, _ADVICE["data"])


_ADVICE = {
    "data": "There is nothing to learn from them: look for NaN in the data of that task, in what "
    "prepares them, and in the rewards of an environment",
    "meta-parameters": "The model to start from holds NaN or infinity; initialise it anew",
    "meta-parameters far out": "No inner step was taken yet: lower the outer step size or clip the "
    "meta-gradient (optax.clip), and look for a logarithm, root or quotient of 0 in loss and model",
    "inner gradient": "The loss is finite and its derivative is not: look for a root, a norm or a "
    "power at 0 in loss and model, whose argument jnp.where has to guard, not their result; after "
    "some inner steps, lower the inner step size",
    "adapted weights": "The inner loop diverges: lower the inner step size or clip its gradient, "
    "inner_optimizer=optax.chain(optax.clip_by_global_norm(10.0), optax.sgd(0.01))",
    "query loss": "The adapted weights are finite and the loss at them is not: lower the inner "
    "step size or take fewer inner steps, and look for a logarithm or quotient of 0 in the loss",
    "meta-gradient": "The query loss is finite and its derivative through the inner loop is not: "
    "lower the inner step size, clip its gradient, or try first_order=True; look for a root, a "
    "norm or a power at 0 in loss and model",
    "outer loss": "Each task is finite, the outer step is not: lower its step size",
    "mean meta-gradient": "Each task is finite and their sum is not: lower the inner step size",
    "outer update": "The meta-gradient is finite and the step made of it is not: lower the outer "
    "step size, and check the schedule and state of the outer optimizer",
    "loss or its gradient": "Task by task it was finite, so it is close to overflow: lower the "
    "inner or outer step size, clip the gradient (optax.clip), or look for NaN in the data",
}


def diagnose(
    learner: MetaLearner,
    trained: PyTree,
    fixed: PyTree,
    tasks: TaskDistribution,
    loaded: PyTree,
    at: int,
    *,
    key: PRNGKeyArray,
    step: int,
    steps: int,
    optimizer: Any,
    opt_state: PyTree,
) -> Cause:
    """What was not finite first in the meta-step from these meta-parameters.

    Every task of the meta-batch is done once more, alone, the inner loops of the learner reporting
    what they compute. A learner that does not use `adaptax.inner` has a query loss and a
    meta-gradient to report; of an outer step of its own kind, such as `adaptax.rl.TRPO`, the tasks
    are those, and the roll-outs others.

    Args:
        learner: with the loss as it was trained with.
        trained: the meta-parameters that are trained, before the step.
        fixed: the others.
        tasks: the distribution.
        loaded: what `feed.load` made of several meta-batches.
        at: which of them.
        key: of the learner, for all meta-steps.
        step: meta-steps done before.
        steps: of all training.
        optimizer: the outer rule, or an `Outer`.
        opt_state: its state.
    """
    one_device = jax.local_devices()[0]
    trained, fixed, tasks, loaded, key, opt_state = jax.tree.map(
        lambda leaf: jax.device_put(leaf, one_device) if eqx.is_array(leaf) else leaf,
        (trained, fixed, tasks, jax.tree.map(lambda leaf: leaf[at], loaded), key, opt_state),
    )
    if not tree.finite(trained):
        return Cause(step + 1, "meta-parameters")
    count = len(jax.tree.leaves(loaded)[0])
    step_key, progress = jax.random.fold_in(key, step), jnp.asarray(step / steps, float)
    causes = []
    with watch.watching() as seen:
        alone = eqx.filter_jit(_alone)
        for i, task_key in enumerate(jax.random.split(step_key, count)):
            mine = jax.tree.map(lambda leaf, i=i: leaf[i], loaded)
            sound = alone(learner, trained, fixed, tasks, mine, task_key, progress)
            inner, outside = seen.first(), _bad(sound)
            seen.found.clear()
            if outside and inner is not None and outside[0] not in _ORDER[:4]:
                causes.append(Cause(step + 1, inner[1], i, inner[0]))
            elif outside:
                causes.append(Cause(step + 1, outside[0], i))
    if causes:
        return dataclasses.replace(causes[0], tasks=len(causes))
    together = eqx.filter_jit(_outer if hasattr(optimizer, "step") else _together)
    sound = together(
        learner, trained, fixed, tasks, loaded, step_key, progress, optimizer, opt_state
    )
    return Cause(step + 1, [*_bad(sound), "loss or its gradient"][0])


_ORDER = (
    "support inputs", "support targets", "query inputs", "query targets", "query loss",
    "meta-gradient", "outer loss", "mean meta-gradient", "outer update",
)  # fmt: skip


def _bad(sound: dict[str, Any]) -> list[str]:
    return [name for name in _ORDER if name in sound and not sound[name]]


def _alone(
    learner: MetaLearner, trained: PyTree, fixed: PyTree, tasks: Any, loaded: PyTree, key: Any,
    progress: Any,
) -> dict[str, Any]:  # fmt: skip
    """What of one task is finite."""
    task = feed.task(tasks, loaded)
    sound: dict[str, PyTree] = {}
    for name, source in (("support", task.support), ("query", task.query)):
        if isinstance(source, Batch):
            sound |= {f"{name} inputs": source.x, f"{name} targets": source.y}
    (value, _), grads = task_gradient(
        learner, trained, fixed, lambda loaded: task, progress, loaded, key
    )
    sound |= {"query loss": value, "meta-gradient": grads}
    return {name: tree.finite(each) for name, each in sound.items()}


def _together(
    learner: MetaLearner, trained: PyTree, fixed: PyTree, tasks: Any, loaded: PyTree, key: Any,
    progress: Any, optimizer: Any, opt_state: PyTree,
) -> dict[str, Any]:  # fmt: skip
    """The same of the mean over tasks and the step made of it."""
    count = len(jax.tree.leaves(loaded)[0])
    (value, _), grads = meta_gradient(
        learner, eqx.combine(trained, fixed), loaded, lambda loaded: feed.task(tasks, loaded),
        key=key, count=count, progress=progress, mapping="scan", mesh=None,
    )  # fmt: skip
    updates, _ = optimizer.update(grads, opt_state, trained)
    sound = {"outer loss": value, "mean meta-gradient": grads,
             "outer update": optax.apply_updates(trained, updates)}  # fmt: skip
    return {name: tree.finite(each) for name, each in sound.items()}


def _outer(
    learner: MetaLearner, trained: PyTree, fixed: PyTree, tasks: Any, loaded: PyTree, key: Any,
    progress: Any, outer: Any, state: PyTree,
) -> dict[str, Any]:  # fmt: skip
    """The same of an outer step of its own kind."""
    meta, _, value, _ = outer.step(
        learner, eqx.combine(trained, fixed), state,
        eqx.filter_vmap(lambda loaded: feed.task(tasks, loaded))(loaded),
        key=key, progress=progress,
    )  # fmt: skip
    return {"outer loss": tree.finite(value), "outer update": tree.finite(meta)}

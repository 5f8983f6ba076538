"""Meta-training: many meta-steps in one compiled program, resumable to the bit."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Protocol, runtime_checkable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from .. import program, roles, tree
from ..conv import FastPath
from ..learner import Meta, MetaLearner
from ..process import check_not_forked, interruptible
from ..protocols import Acting
from ..task import Model, Splits, Task, TaskDistribution
from . import feed
from .divergence import Cause, diagnose
from .evaluate import Evaluator
from .fingerprint import fingerprint, made_by, settings
from .mapping import (
    Mapping,
    chunk_size,
    everywhere,
    local_mesh,
    meta_gradient,
    with_fast_path,
)
from .run import Facts, Resume, Run, as_run, differences, lets_go


class TrainingDiverged(FloatingPointError):
    """A meta-step gave a loss, a gradient or new meta-parameters that are not finite.

    Args:
        cause: what was not finite first, of which task; the message says it, and what to do.
        result: the outcome up to the last good step.
    """

    def __init__(self, cause: Cause, result: Result):
        super().__init__(str(cause))
        self.cause = cause
        self.result = result


class State(eqx.Module):
    """Everything that training depends on, besides its arguments: what a checkpoint holds.

    The best meta-parameters by validation lead with an axis of ranks, the best of all first, as
    do their scores (minus infinity where there are not so many yet) and steps.
    """

    step: Array
    meta: PyTree
    opt_state: PyTree
    best: PyTree
    best_score: Array
    best_step: Array
    stale: Array


@dataclasses.dataclass(frozen=True)
class Result:
    """The outcome of `fit`.

    Args:
        meta: the best meta-parameters by validation, or the last ones without validation.
        last: the meta-parameters after the last step.
        step: meta-steps done.
        best_step: the step that `meta` is from.
        best_score: its validation score, `None` without validation.
        kept: the best meta-parameters by validation, best first, stacked along a leading axis, for
            `adaptax.CheckpointEnsemble`; `None` without validation.
        history: a record for every chunk of steps: step, loss, seconds, and validation scores.
        stopped: why training ended: `"done"`, `"early"` or `"interrupted"`.
    """

    meta: Meta
    last: Meta
    step: int
    best_step: int
    best_score: float | None
    kept: Meta | None
    history: list[dict[str, Any]]
    stopped: str


@runtime_checkable
class Outer(Protocol):
    """An outer step of its own kind, where a gradient and an optax rule will not do.

    Both methods are pure and traceable; `fit` calls `step` inside its compiled program. See
    `adaptax.rl.TRPO`.
    """

    def init(self, trained: PyTree) -> PyTree:
        """The state to start from, for these trained meta-parameters."""
        ...

    def step(
        self,
        learner: MetaLearner,
        meta: Meta,
        state: PyTree,
        tasks: Task,
        *,
        key: PRNGKeyArray,
        progress: float | Array,
        mesh: Mesh | None = None,
    ) -> tuple[Meta, PyTree, Float[Array, ""], dict[str, Array]]:
        """New meta-parameters and state, a loss and metrics.

        Args:
            learner: any that it can do with.
            meta: the meta-parameters.
            state: its own.
            tasks: a meta-batch; arrays lead with the task axis.
            key: all the randomness there is.
            progress: in `[0, 1]`, how far meta-training has come.
            mesh: of devices to share the tasks among; see `adaptax.engine.mapping.over_devices`.
        """
        ...


@lets_go
def fit(
    learner: MetaLearner,
    model: Model,
    tasks: TaskDistribution,
    *,
    steps: int,
    key: PRNGKeyArray,
    meta_batch: int = 16,
    optimizer: optax.GradientTransformation | None = None,
    outer: Outer | None = None,
    validate: TaskDistribution | None = None,
    validate_every: int | None = None,
    validation: dict[str, Any] | None = None,
    patience: int | None = None,
    keep: int = 1,
    run: Run | str | os.PathLike[str] | None = None,
    resume: Resume = False,
    chunk: int | None = None,
    mapping: Mapping = "auto",
    devices: int | None = None,
    fast_path: FastPath = "auto",
    watch: Callable[[dict[str, Any]], None] | None = None,
) -> Result:
    """Meta-train a model: sample tasks, differentiate the meta-loss, step; `steps` times.

    Chunks of steps run in one compiled `scan`, tasks sampled inside it. Between chunks the host
    logs, validates and writes checkpoints. The state of training is a step counter, the
    meta-parameters and the optimizer's state, so a resumed run equals an uninterrupted one bit by
    bit. Ctrl-C or SIGTERM ends it after the current chunk, with the state saved. One process at a
    time works on a run folder; a folder without a checkpoint is begun anew.

    Args:
        learner: any `MetaLearner`.
        model: where to start: any callable pytree.
        tasks: the meta-training distribution.
        steps: number of meta-steps; the schedules of learner and optimizer span them.
        key: all the randomness there is.
        meta_batch: tasks a meta-step.
        optimizer: of the outer loop; the learner's own, as in its paper, if `None`.
        outer: an outer step instead of gradient and optimizer, such as `adaptax.rl.TRPO()`; it
            maps over tasks by itself.
        validate: distribution to select the best meta-parameters on; never the test split.
        validate_every: meta-steps between validations; a tenth of `steps` if `None`.
        validation: arguments of `evaluate` for it; 200 episodes unless told otherwise, of
            roll-outs 40.
        patience: stop after so many validations without improvement.
        keep: how many of the best meta-parameters by validation to keep.
        run: folder for checkpoints, metrics and TensorBoard events.
        resume: continue the run in that folder; `"auto"`: if there is one, else begin it.
        chunk: meta-steps in one compiled program; by default 500 of light tasks or 20 of heavy.
        mapping: how to map over tasks; see `adaptax.engine.mapping.Mapping`.
        devices: local devices to share the meta-batch, a divisor of it; by default as many as
            divide it for heavy tasks or with `outer`, and one for light ones.
        fast_path: see `adaptax.conv.fast`.
        watch: called with each new record of `history`.

    Raises:
        ValueError: for arguments that make no sense, a test split in `validate`, or a run that
            cannot be resumed with them.
        TrainingDiverged: when a loss, a gradient or a step is not finite. Its `cause` says which
            was first, of which task; its `result` holds the last good state, which the run folder
            keeps too.
    """
    check_not_forked()
    if isinstance(tasks, Splits) or isinstance(validate, Splits):
        raise ValueError("fit was given all splits of the tasks; give it tasks.train and tasks.val")
    if resume and run is None:
        raise ValueError(f"resume={resume!r} wants run=, the folder of the run to continue")
    run = as_run(run)
    recorded = {} if run is None else run.recorded(resume)
    before = recorded.get("plan", {})
    chunk, devices = chunk or before.get("chunk"), devices or before.get("devices")
    _check_counts(steps=steps, meta_batch=meta_batch, keep=keep, chunk=chunk, patience=patience,
                  validate_every=validate_every, devices=devices)  # fmt: skip
    if steps >= 2**31 or steps * meta_batch > 2**32:
        raise ValueError(
            f"{steps:,} steps of {meta_batch:,} tasks are more than are numbered: fewer than 2^31 "
            "steps and 2^32 tasks"
        )
    if validate is not None and validate.split == "test":
        raise ValueError(
            "validate= was given the test split, and a model selected on it has no honest test "
            "score; give it tasks.val"
        )
    if outer is not None and optimizer is not None:
        raise ValueError("outer= is the whole outer step; give no optimizer with it")
    judge = None if validate is None else _judge(learner, validate, fast_path, validation or {})
    rule, optimizer = outer or optimizer, optimizer or learner.optimizer(steps)
    task_key, learner_key, init_key, validation_key = jax.random.split(key, 4)
    state, fixed = initial_state(learner, model, outer or optimizer, init_key, keep)
    if judge is not None and {"select", "at"} & (validation or {}).keys():
        judge.check(eqx.combine(state.meta, fixed), key=validation_key)
    fast_learner = with_fast_path(learner, fast_path)
    heavy = _is_heavy(fast_learner, eqx.combine(state.meta, fixed), tasks, task_key)
    chunk = chunk or (20 if heavy else 500)
    validate_every = math.ceil((validate_every or max(steps // 10, 1)) / chunk) * chunk
    mesh = local_mesh(meta_batch, devices) if devices or heavy or outer is not None else None
    history: list[dict[str, Any]] = []
    facts: Facts = {}
    if run is not None:
        shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), state.meta)
        facts = {
            "plan": {
                "steps": steps, "meta_batch": meta_batch, "chunk": chunk, "keep": keep,
                "devices": 1 if mesh is None else mesh.size, "mapping": mapping,
                "fast_path": fast_path, **settings(),
                # Not the values that are trained: those of the checkpoint take their place.
                **fingerprint(learner=learner, model=eqx.combine(shapes, fixed), tasks=tasks,
                              outer=rule or "the learner's own", key=key),
            },
            "selection": fingerprint(validate=validate, validation=validation or {}),
            "made_by": made_by(),
        }  # fmt: skip
        state, history = run.begin(state, facts, resume, grows="steps")
        state = _reselect(state, recorded.get("selection"), facts["selection"])
    # Once, and not at every call of the program: the bank of images may be large.
    state, tasks, given_fixed = everywhere((state, tasks, fixed), mesh)
    steps_of = _program(fast_learner, optimizer, outer, meta_batch, steps, mapping, mesh)

    def outcome(stopped: str) -> Result:
        last, now = roles.reshare(eqx.combine(state.meta, fixed)), int(state.step)
        if validate is None:
            return Result(last, last, now, now, None, None, history, stopped)
        best, step, score, kept = best_of(state, fixed)
        return Result(best, last, now, step, score, kept, history, stopped)

    def exhausted() -> bool:
        return patience is not None and int(state.stale) >= patience

    def bounds(start: int) -> Iterator[tuple[int, int]]:
        while start < steps:
            # Ends at multiples of the chunk, so that a resumed run makes the same calls.
            end = min(start - start % chunk + chunk, steps)
            yield start, end
            start = end

    def job(start: int, end: int) -> tuple[int, int, PyTree]:
        episodes = np.arange(start * meta_batch, end * meta_batch).reshape(-1, meta_batch)
        return start, end, feed.load(tasks, task_key, jnp.asarray(episodes, jnp.uint32))

    stopped = "early" if exhausted() else "done"
    first = steps if exhausted() else int(state.step)
    jobs = (lambda b=b: job(*b) for b in bounds(first))
    if judge is not None and first == steps and not math.isfinite(state.best_score[0]):
        # Finished before it was validated in this way.
        state = _select(state, judge(eqx.combine(state.meta, fixed), key=validation_key).score)
    with interruptible() as interrupted:
        for start, end, loaded in feed.prefetch(tasks, jobs):
            began = time.perf_counter()
            state_arrays, good, logs = program.call(
                steps_of,
                (tasks, loaded, learner_key, given_fixed),
                (state.step, state.meta, state.opt_state),
                donate=[1],
            )
            step, trained, opt_state = state_arrays
            state = dataclasses.replace(state, step=step, meta=trained, opt_state=opt_state)
            logs = jax.tree.map(lambda leaf: np.asarray(leaf, float), logs)
            diverged = not bool(good)
            # The steps that counted; of a chunk that went wrong at once, the step that did.
            count = max(int(state.step) - start, 1)
            with np.errstate(all="ignore"):
                means = {name: float(np.mean(values[:count])) for name, values in logs.items()}
            seconds = time.perf_counter() - began
            record: dict[str, Any] = {"step": int(state.step), "seconds": seconds, **means}
            due = end % validate_every == 0 or end == steps
            if judge is not None and due and not diverged:
                report = judge(eqx.combine(state.meta, fixed), key=validation_key)
                name = report.primary
                record["validation"] = {name: report.mean(name), f"{name}_ci95": report.ci95(name)}
                state = _select(state, report.score)
            history.append(record)
            if run is not None:
                run.log(record)
                run.checkpoint(state, facts)
            if watch is not None:
                watch(record)
            if diverged:
                done, failed = int(state.step), None
                try:
                    cause = diagnose(
                        fast_learner, state.meta, fixed, tasks, loaded, done - start,
                        key=learner_key, step=done, steps=steps, optimizer=outer or optimizer,
                        opt_state=state.opt_state,
                    )  # fmt: skip
                except Exception as error:  # the replay is no reason to lose the result
                    cause, failed = Cause(done + 1, "loss or its gradient"), error
                raise TrainingDiverged(cause, outcome("diverged")) from failed
            if exhausted():
                stopped = "early"
                break
            if interrupted() and end < steps:
                stopped = "interrupted"
                break
    return outcome(stopped)


def initial_state(
    learner: MetaLearner,
    model: Model,
    optimizer: optax.GradientTransformation | Outer,
    key: PRNGKeyArray,
    keep: int = 1,
) -> tuple[State, PyTree]:
    """The state before the first meta-step, and what of the meta-parameters is not trained.

    Variables that the model shares are in one place, in both.
    """
    meta = roles.deduplicate(learner.init(model, key=key))
    trained, fixed = eqx.partition(meta, learner.trained(meta))
    zero = jnp.zeros((), jnp.int32)
    best = jax.tree.map(lambda leaf: jnp.repeat(leaf[None], keep, axis=0), trained)
    state = State(
        step=zero,
        meta=trained,
        opt_state=optimizer.init(trained),
        best=best,
        best_score=jnp.full(keep, -jnp.inf),
        best_step=jnp.zeros(keep, jnp.int32),
        stale=zero,
    )
    # Copies: the compiled program reuses the memory of its arguments, and the caller's stay. With
    # a dtype, as the program returns them: a weak one would have it compiled a second time.
    return jax.tree.map(lambda leaf: jnp.array(leaf, leaf.dtype, copy=True), state), fixed


def best_of(state: State, fixed: PyTree) -> tuple[Meta, int, float, Meta]:
    """The best meta-parameters of a state, their step and score, and all that are kept."""
    count = max(int(jnp.isfinite(state.best_score).sum()), 1)
    kept = jax.tree.map(lambda leaf: leaf[:count], state.best)
    best = jax.tree.map(lambda leaf: leaf[0], kept)
    stacked = jax.tree.map(
        lambda leaf: jnp.repeat(leaf[None], count, axis=0) if eqx.is_array(leaf) else leaf, fixed
    )
    best, kept = roles.reshare((eqx.combine(best, fixed), eqx.combine(kept, stacked)))
    return best, int(state.best_step[0]), float(state.best_score[0]), kept


def _program(
    learner: MetaLearner,
    optimizer: optax.GradientTransformation,
    outer: Outer | None,
    meta_batch: int,
    steps: int,
    mapping: Mapping,
    mesh: Mesh | None,
) -> Callable[..., Any]:
    """A chunk of meta-steps as one function.

    A step that is not finite does not change the state, and neither do those after it: the
    function ends with the last good state.
    """

    def descend(given: PyTree, state: PyTree, loaded: PyTree) -> Any:
        (tasks, key, fixed), (step, trained, opt_state) = given, state
        (loss, metrics), grads = meta_gradient(
            learner,
            eqx.combine(trained, fixed),
            loaded,
            jax.tree_util.Partial(feed.task, tasks),
            key=jax.random.fold_in(key, step),
            count=meta_batch,
            progress=step / steps,
            mapping=mapping,
            mesh=mesh,
        )
        updates, opt_state = optimizer.update(grads, opt_state, trained)
        logs = {"loss": loss, "gradient_norm": tree.norm(grads), **metrics}
        new = optax.apply_updates(trained, updates)
        return (new, opt_state), tree.finite((grads, new)), logs

    def given_step(outer: Outer, given: PyTree, state: PyTree, loaded: PyTree) -> Any:
        (tasks, key, fixed), (step, trained, opt_state) = given, state
        meta, opt_state, loss, metrics = outer.step(
            learner,
            eqx.combine(trained, fixed),
            opt_state,
            eqx.filter_vmap(lambda loaded: feed.task(tasks, loaded))(loaded),
            key=jax.random.fold_in(key, step),
            progress=step / steps,
            mesh=mesh,
        )
        trained = eqx.filter(meta, learner.trained(meta))
        return (trained, opt_state), tree.finite(meta), {"loss": loss, **metrics}

    def meta_step(given: PyTree, carry: PyTree, loaded: PyTree) -> tuple[PyTree, dict[str, Array]]:
        state, good = carry
        how = descend if outer is None else functools.partial(given_step, outer)
        new, finite, logs = how(given, state, loaded)
        good = good & jnp.isfinite(logs["loss"]) & finite
        kept = jax.tree.map(lambda new, old: jnp.where(good, new, old), (state[0] + 1, *new), state)
        return (kept, good), logs

    def meta_steps(
        given: tuple[TaskDistribution, PyTree, PRNGKeyArray, PyTree], state: PyTree
    ) -> tuple[PyTree, Array, dict[str, Array]]:
        tasks, loaded, key, fixed = given
        (state, good), logs = jax.lax.scan(
            lambda carry, loaded: meta_step((tasks, key, fixed), carry, loaded),
            (state, jnp.array(True)),
            loaded,
        )
        return state, good, logs

    return meta_steps


def _judge(
    learner: MetaLearner, tasks: TaskDistribution, fast_path: FastPath, how: dict[str, Any]
) -> Evaluator:
    """What validates, by 200 episodes unless told otherwise."""
    usual = {} if isinstance(tasks, Acting) or how.get("goals") else {"episodes": 200}
    return Evaluator(learner, tasks, **{**usual, "fast_path": fast_path, **how})


def _reselect(state: State, before: Any, now: dict[str, Any]) -> State:
    """The state, without what was selected by another validation, whose scores say nothing now."""
    if before is None or not (changed := differences(before, now)):
        return state
    warnings.warn(
        f"the run is validated in another way than before its break: {changed}; the best so far no "
        "longer counts, and the selection begins anew",
        stacklevel=4,
    )
    score, zero = jnp.full_like(state.best_score, -jnp.inf), jnp.zeros((), jnp.int32)
    best = jax.tree.map(lambda best, now: jnp.broadcast_to(now, best.shape), state.best, state.meta)
    return dataclasses.replace(
        state, best=best, best_score=score, best_step=jnp.zeros_like(state.best_step),
        stale=zero,
    )  # fmt: skip


def _select(state: State, score: float) -> State:
    """Keep the current meta-parameters if they are among the best so far."""
    score = -math.inf if math.isnan(score) else score
    score = float(np.asarray(score, state.best_score.dtype))  # as it was kept
    scores = np.append(state.best_score, score)
    # Stable: of equals the earlier stays ahead.
    order = np.argsort(-scores, kind="stable")[:-1]

    def ranked(best: Array, now: Array) -> Array:
        return jnp.concatenate([best, now[None]])[order]

    improved = score > float(state.best_score[0])
    return dataclasses.replace(
        state,
        best=jax.tree.map(ranked, state.best, state.meta),
        best_score=ranked(state.best_score, jnp.array(score, state.best_score.dtype)),
        best_step=ranked(state.best_step, state.step),
        stale=jnp.zeros((), jnp.int32) if improved else state.stale + 1,
    )


def _is_heavy(learner: MetaLearner, meta: Meta, tasks: TaskDistribution, key: PRNGKeyArray) -> bool:
    """Whether one task is enough work to be worth a loop iteration or a device of its own."""
    if jax.default_backend() != "cpu":
        return True
    loaded = feed.load(tasks, key, jnp.zeros(1, jnp.uint32))
    return program.call(_alone, learner, meta, tasks, loaded, key)


def _alone(
    learner: MetaLearner, meta: Meta, tasks: TaskDistribution, loaded: PyTree, key: PRNGKeyArray
) -> bool:
    """Whether tasks are better done one after another."""
    trained, fixed = eqx.partition(meta, learner.trained(meta))

    def one(loaded: PyTree, trained: PyTree) -> Any:
        loss = lambda t: learner.meta_loss(  # noqa: E731
            eqx.combine(t, fixed), feed.task(tasks, loaded), key=key, progress=jnp.array(0.0)
        )
        return jax.value_and_grad(loss, has_aux=True)(trained)

    tiled = jax.tree.map(lambda leaf: leaf[None], trained)
    return chunk_size("auto", 2, one, (loaded, tiled)) == 1


def _check_counts(**counts: int | None) -> None:
    for name, count in counts.items():
        if count is not None and (not isinstance(count, int | np.integer) or count < 1):
            raise ValueError(f"{name} is a whole number of at least 1, not {count!r}")

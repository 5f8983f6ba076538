"""Meta-training: many meta-steps in one compiled program, resumable to the bit."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import PRNGKeyArray, PyTree

from .. import processes, program, roles
from ..conv import FastPath
from ..learner import Meta, MetaLearner
from ..process import check_not_forked
from ..protocols import Acting
from ..task import Model, Splits, TaskDistribution, way_of
from . import feed
from .divergence import Cause, diagnose
from .evaluate import Evaluator
from .fingerprint import fingerprint, made_by, settings
from .loop import Loop, Means, averages
from .mapping import Mapping, everywhere, task_mesh, with_fast_path
from .run import Facts, Resume, Run, lets_go, opened
from .state import State, best_of, initial_state, reselect, select, shaped
from .steps import Outer, meta_steps, task_work
from .work import heavy, steps_at_once


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
        stopped: why training ended: `"done"`, `"early"`, `"interrupted"` or `"out of time"`.
    """

    meta: Meta
    last: Meta
    step: int
    best_step: int
    best_score: float | None
    kept: Meta | None
    history: list[dict[str, Any]]
    stopped: str


@lets_go
@processes.ends_with_the_others
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
        chunk: meta-steps in one compiled program; by default up to 500 of light tasks or 20 of
            heavy, and no more than some ten seconds' work.
        mapping: how to map over tasks; see `adaptax.engine.mapping.Mapping`.
        devices: local devices to share the meta-batch, a divisor of it; by default as many as
            divide it for heavy tasks or with `outer`, and one for light ones. Several processes
            (`adaptax.distributed`) always share it, with as many devices each as divide it.
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
    run, recorded = opened(run, resume)
    before = recorded.get("plan", {})
    chunk = chunk or before.get("chunk")
    moved = int(recorded.get("made_by", {}).get("processes", 1)) != 1 or processes.several()
    devices = devices or (None if moved else before.get("devices"))
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
    learner = learner.with_way(way_of(tasks))
    judge = None if validate is None else _judge(learner, validate, fast_path, validation or {})
    rule, optimizer = outer or optimizer, optimizer or learner.optimizer(steps)
    task_key, learner_key, init_key, validation_key = jax.random.split(key, 4)
    state, fixed = initial_state(learner, model, outer or optimizer, init_key, keep)
    if judge is not None and {"select", "at"} & (validation or {}).keys():
        judge.check(eqx.combine(state.meta, fixed), key=validation_key)
    fast_learner = with_fast_path(learner, fast_path)
    task = task_work(fast_learner, eqx.combine(state.meta, fixed), tasks, task_key)
    chunk = chunk or steps_at_once(task, meta_batch)
    validate_every = math.ceil((validate_every or max(steps // 10, 1)) / chunk) * chunk
    shares = devices or heavy(task) or outer is not None or processes.several()
    mesh = task_mesh(meta_batch, devices) if shares else None
    history: list[dict[str, Any]] = []
    facts: Facts = {}
    if run is not None:
        facts = {
            "plan": {
                "steps": steps, "meta_batch": meta_batch, "chunk": chunk, "keep": keep,
                "devices": 1 if mesh is None else mesh.size, "mapping": mapping,
                "fast_path": fast_path, **settings(),
                **fingerprint(learner=learner, model=shaped(state.meta, fixed), tasks=tasks,
                              outer=rule or "the learner's own", key=key),
            },
            "selection": fingerprint(validate=validate, validation=validation or {}),
            "made_by": made_by(),
        }  # fmt: skip
        processes.agree(**facts["plan"])
        free = ("devices",) if moved else ()
        state, history = run.begin(state, facts, resume, grows="steps", free=free)
        state = reselect(state, recorded.get("selection"), facts["selection"])
    # Once, and not at every call of the program: the bank of images may be large.
    placed, given_fixed = everywhere((tasks, fixed), mesh)
    state = state if processes.several() else everywhere(state, mesh)
    steps_of = meta_steps(fast_learner, optimizer, outer, meta_batch, steps, mapping, mesh)

    def outcome(state: State, stopped: str) -> Result:
        last, now = roles.reshare(eqx.combine(state.meta, fixed)), int(state.step)
        if validate is None:
            return Result(last, last, now, now, None, None, history, stopped)
        best, step, score, kept = best_of(state, fixed)
        return Result(best, last, now, step, score, kept, history, stopped)

    def load(start: int, end: int, mine: slice | None = None) -> PyTree:
        episodes = np.arange(start * meta_batch, end * meta_batch).reshape(-1, meta_batch)
        episodes = episodes[:, processes.own(meta_batch) if mine is None else mine]
        return feed.load(tasks, task_key, jnp.asarray(episodes, jnp.uint32))

    def advance(state: State, loaded: PyTree, start: int) -> tuple[State, Means, Any]:
        carried, shared = (state.step, state.meta, state.opt_state), loaded
        if processes.several():
            assert mesh is not None
            carried, shared = everywhere(carried, mesh), processes.sharded(loaded, mesh, 1)
        given = placed, shared, learner_key, given_fixed
        found = program.call(steps_of, given, carried, donate=[1])
        (step, trained, opt_state), good, logs = processes.here(found)
        state = dataclasses.replace(state, step=step, meta=trained, opt_state=opt_state)
        # The steps that counted; of a chunk that went wrong at once, the step that did.
        means = averages(logs, max(int(step) - start, 1))
        return state, means, None if bool(good) else lambda state: diverged(state, loaded, start)

    def diverged(state: State, loaded: PyTree, start: int) -> TrainingDiverged:
        done, failed = int(state.step), None
        try:
            if processes.several():  # all tasks, in each process
                loaded = load(start, done + 1, slice(None))
            cause = diagnose(
                fast_learner, state.meta, fixed, tasks, loaded, done - start,
                key=learner_key, step=done, steps=steps, optimizer=outer or optimizer,
                opt_state=state.opt_state,
            )  # fmt: skip
        except Exception as error:  # the replay is no reason to lose the result
            cause, failed = Cause(done + 1, "loss or its gradient"), error
        raised = TrainingDiverged(cause, outcome(state, "diverged"))
        raised.__cause__ = failed
        return raised

    def judged(state: State) -> tuple[State, Means]:
        assert judge is not None
        report = judge(eqx.combine(state.meta, fixed), key=validation_key)
        name = report.primary
        scores = {name: report.mean(name), f"{name}_ci95": report.ci95(name)}
        return select(state, report.score), scores

    def exhausted(state: State) -> bool:
        return patience is not None and int(state.stale) >= patience

    loop = Loop(
        steps, chunk, tasks, load, advance, judged if judge else None, validate_every, history, run,
        facts, watch=watch, exhausted=exhausted,
    )  # fmt: skip
    if judge is not None and int(state.step) == steps and not math.isfinite(state.best_score[0]):
        state, _ = judged(state)  # finished before it was validated in this way
    return outcome(*loop(state, int(state.step)))


def _judge(
    learner: MetaLearner, tasks: TaskDistribution, fast_path: FastPath, how: dict[str, Any]
) -> Evaluator:
    """What validates, by 200 episodes unless told otherwise."""
    usual = {} if isinstance(tasks, Acting) or how.get("goals") else {"episodes": 200}
    return Evaluator(learner, tasks, **{**usual, "fast_path": fast_path, **how})


def _check_counts(**counts: int | None) -> None:
    for name, count in counts.items():
        if count is not None and (not isinstance(count, int | np.integer) or count < 1):
            raise ValueError(f"{name} is a whole number of at least 1, not {count!r}")

"""The loop of a training: chunks of steps, each one compiled program, and what is done between."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

import jax
import numpy as np
from jaxtyping import Array, PyTree

from .. import processes
from ..process import interruptible, time_left
from ..task import TaskDistribution
from . import feed
from .run import Facts, Run


@runtime_checkable
class Stepped(Protocol):
    """A state that counts its steps."""

    @property
    def step(self) -> Array:
        """Steps done."""
        ...


State = TypeVar("State", bound=Stepped)
Means = dict[str, float]
Failure = Callable[[State], Exception]


@dataclasses.dataclass(frozen=True)
class Loop(Generic[State]):
    """What a training does chunk by chunk, between which it may stop and go on.

    Args:
        steps: of the whole training.
        chunk: steps in one program. Chunks end at its multiples, so that a resumed run makes the
            same calls.
        tasks: what is learned from; for data on the host the next chunk is loaded in a thread.
        load: what the program needs for the steps from one up to another.
        advance: the state after a chunk, the means of what was logged, and what to raise where a
            step went wrong, after the state before it is kept; `None` if none did.
        validate: the state with what is selected, and scores; asked after every `validate_every`
            steps and the last one.
        validate_every: steps.
        history: a record of every chunk is added to it.
        run: where records and checkpoints go, if anywhere.
        facts: what a checkpoint says beside the state.
        save_every: seconds between checkpoints, beside those after validation.
        watch: called with every record.
        exhausted: whether to stop early.
    """

    steps: int
    chunk: int
    tasks: TaskDistribution
    load: Callable[[int, int], PyTree]
    advance: Callable[[State, PyTree, int], tuple[State, Means, Failure[State] | None]]
    validate: Callable[[State], tuple[State, Means | None]] | None
    validate_every: int
    history: list[dict[str, Any]]
    run: Run | None
    facts: Facts
    save_every: float = 0.0
    watch: Callable[[dict[str, Any]], None] | None = None
    exhausted: Callable[[State], bool] = lambda state: False

    def __call__(self, state: State, start: int) -> tuple[State, str]:
        """The state at the end, and why it ended.

        `"done"`, `"early"`, `"interrupted"`, or `"out of time"`: no time is left for another chunk
        that takes as long as the longest so far (`adaptax.process.at_most`).

        Args:
            state: to start from.
            start: steps done before.
        """
        if self.exhausted(state):
            return state, "early"
        jobs = (lambda b=b: (*b, self.load(*b)) for b in self._bounds(start))
        saved, longest, last = -float("inf"), 0.0, time.monotonic()
        with interruptible() as interrupted:
            for start, end, loaded in feed.prefetch(self.tasks, jobs):
                began = time.perf_counter()
                state, means, failure = self.advance(state, loaded, start)
                seconds = time.perf_counter() - began
                record: dict[str, Any] = {"step": int(state.step), "seconds": seconds, **means}
                due = end // self.validate_every > start // self.validate_every or end == self.steps
                if self.validate is not None and due and failure is None:
                    state, scores = self.validate(state)
                    if scores is not None:
                        record["validation"] = scores
                self.history.append(record)
                if self.run is not None:
                    self.run.log(record)
                if keeps := due or time.monotonic() >= saved + self.save_every:
                    saved = self._save(state)
                if self.watch is not None:
                    self.watch(record)
                if failure is not None:
                    raise failure(state)
                if self.exhausted(state):
                    return state, "early"
                now = time.monotonic()
                longest, last = max(longest, now - last), now
                pressed, over = processes.anyone(interrupted(), time_left() < longest)
                if (pressed or over) and end < self.steps:
                    if not keeps:
                        self._save(state)
                    return state, "interrupted" if pressed else "out of time"
        return state, "done"

    def _bounds(self, start: int) -> Iterator[tuple[int, int]]:
        while start < self.steps:
            end = min(start - start % self.chunk + self.chunk, self.steps)
            yield start, end
            start = end

    def _save(self, state: State) -> float:
        if self.run is not None:
            self.run.checkpoint(state, self.facts)
        return time.monotonic()


def averages(logs: PyTree, count: int | None = None) -> Means:
    """The means of what was logged in a chunk.

    Args:
        logs: arrays by name that lead with the axis of steps.
        count: of the first steps alone.
    """
    logs = jax.tree.map(lambda leaf: np.asarray(leaf, float)[:count], logs)
    with np.errstate(all="ignore"):
        return {name: float(np.mean(values)) for name, values in logs.items()}

"""How long a run is: the work of its training, validation and test, and tests sized to it."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax

from ..conv import FastPath
from ..engine.mapping import with_fast_path
from ..engine.steps import task_work
from ..engine.work import Work
from ..learner import Meta
from ..task import Splits
from .experiment import Experiment

LEAST, FLOOR = 50, 2e12
"""Test episodes there are at least, and operations that a test may always take: a minute or so."""


@dataclasses.dataclass(frozen=True)
class Budget:
    """Operations of the parts of a run, estimated from shapes before it begins.

    Args:
        training: of all its meta-steps.
        validation: of all its validations.
        test: of its test.
        episodes: of the test.
    """

    training: float
    validation: float
    test: float
    episodes: int

    def sentence(self, rate: float) -> str:
        """Say how long it will take.

        Args:
            rate: operations a second, as the training has them.
        """
        names = [field.name for field in dataclasses.fields(self)][:3]
        parts = {name: getattr(self, name) / rate for name in names}
        said = ", ".join(f"{name} {duration(seconds)}" for name, seconds in parts.items())
        return f"about {duration(sum(parts.values()))} in all: {said}"


def duration(seconds: float) -> str:
    """Return a time in the unit that suits it."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def sized(experiment: Experiment, validation: dict[str, Any], training: float, episode: Work,
          times: int) -> tuple[dict[str, Any], int]:  # fmt: skip
    """Return how to validate, and how many episodes to test on, for a run of this length.

    Validation takes at most a quarter of the training's work, and at least 20 episodes; the test
    as much as the training, or `FLOOR`, and at least `LEAST` episodes.

    Args:
        experiment: what is trained.
        validation: how to validate a run of full length.
        training: operations of all meta-steps.
        episode: work of one episode of the test.
        times: validations.
    """
    one = max(episode.operations, 1.0)
    if "episodes" in validation:
        most = max(int(training / 4 / times / one), 20)
        validation = {**validation, "episodes": min(validation["episodes"], most)}
    most = max(int(max(training, FLOOR) / one), LEAST)
    return validation, min(experiment.episodes, most)


def budget(
    experiment: Experiment,
    meta: Meta,
    splits: Splits,
    test: Splits,
    validation: dict[str, Any],
    *,
    validate_every: int | None = None,
    fast_path: FastPath = "auto",
    fitting: bool = False,
) -> tuple[dict[str, Any], Budget]:
    """Return how to validate, and how long the run will be.

    Args:
        experiment: what is trained.
        meta: where it starts from.
        splits: of the tasks.
        test: those of the test.
        validation: how to validate.
        validate_every: meta-steps.
        fast_path: as in training.
        fitting: size validation and test to the training.
    """
    learner, key = with_fast_path(experiment.build_learner(), fast_path), jax.random.key(0)
    task = task_work(learner, meta, splits.train, key)
    episode = experiment.judge(test.test).work(meta, key=key)
    once = experiment.judge(splits.val, **validation).work(meta, key=key)
    training = task.operations * experiment.meta_batch * experiment.steps
    times = math.ceil(experiment.steps / (validate_every or max(experiment.steps // 10, 1)))
    episodes = experiment.episodes
    if fitting:
        validation, episodes = sized(experiment, validation, training, episode, times)
    validated = once.operations * validation.get("episodes", 0) * times
    return validation, Budget(training, validated, episode.operations * episodes, episodes)

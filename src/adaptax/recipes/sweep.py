"""Sweeps: many trainings of a recipe with other settings, by workers that share a storage."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from ..engine.scoring import known_sign
from ..engine.train import TrainingDiverged
from ..process import lock
from ..text import shown
from .book import Recipe, to_toml
from .budget import Budget
from .experiment import Experiment, changed
from .runs import Progress, Warn, Watch, fit, new_config
from .settings import with_settings

NAME = "adaptax"
"""Of the study in the storage."""

WHOLE = ("meta_batch", "keep")
"""Settings of an experiment that are in no section."""


@dataclasses.dataclass(frozen=True)
class Domain:
    """What a setting may be: a range of numbers, or choices.

    Args:
        name: of the setting, such as `learner.inner_lr`.
        low: of a range.
        high: of a range, itself included.
        choices: as they are written, in JSON or plain words.
    """

    name: str
    low: int | float = 0.0
    high: int | float = 0.0
    choices: tuple[str, ...] = ()

    def suggest(self, trial: Any) -> Any:
        """Return what a trial of Optuna has here: a number, or a choice as it is written.

        Floats whose range spans a factor of ten or more are drawn on a logarithmic scale.
        """
        if self.choices:
            return trial.suggest_categorical(self.name, self.choices)
        if isinstance(self.low, int) and isinstance(self.high, int):
            return trial.suggest_int(self.name, self.low, self.high)
        wide = self.low > 0 and self.high / self.low >= 10
        return trial.suggest_float(self.name, self.low, self.high, log=wide)


def domain(text: str) -> Domain:
    """Return what `name=low..high` or `name=one|another` says.

    Raises:
        ValueError: if it says neither.
    """
    name, equals, values = text.partition("=")
    section, dot, key = name.partition(".")
    if equals and ((dot and section and key) or name in WHOLE):
        if "|" in values and all(values.split("|")):
            return Domain(name, choices=tuple(values.split("|")))
        low, dots, high = values.partition("..")
        if dots:
            try:
                ends = [_number(low), _number(high)]
            except ValueError:
                ends = [1, 0]
            if ends[0] < ends[1]:
                return Domain(name, ends[0], ends[1])
    raise ValueError(
        f"--over {shown(text)} is neither section.name=low..high, such as "
        "learner.inner_lr=0.001..0.5, nor section.name=one|another"
    )


def _number(text: str) -> int | float:
    try:
        return int(text)
    except ValueError:
        value = float(text)
        if not np.isfinite(value):
            raise
        return value


def with_values(experiment: Experiment, values: Mapping[str, Any]) -> Experiment:
    """Return the experiment with these values of settings."""
    whole = {name: int(value) for name, value in values.items() if name in WHOLE}
    rest = [f"{name}={value}" for name, value in values.items() if name not in WHOLE]
    return with_settings(changed(experiment, whole), rest)


class Pruned(Exception):
    """A trial that validation gives up."""


@dataclasses.dataclass(frozen=True)
class Reporting:
    """`Progress` that tells Optuna the validation scores of a training, and ends it if need be."""

    progress: Progress
    trial: Any

    @contextmanager
    def training(
        self, title: str, steps: int, warn: Warn | None = None, budget: Budget | None = None
    ) -> Iterator[Watch]:
        """Follow a training."""
        with self.progress.training(title, steps, warn, budget) as watch:
            yield _Reported(watch, self.trial)

    def scoring(self, title: str, episodes: int) -> Any:
        """Follow a test."""
        return self.progress.scoring(title, episodes)


class _Reported:
    def __init__(self, watch: Watch, trial: Any):
        self.watch, self.trial = watch, trial

    def start(self, step: int) -> None:
        self.watch.start(step)

    def __call__(self, record: dict[str, Any]) -> None:
        self.watch(record)
        if self.trial is None or (score := score_of(record)) is None:
            return
        told = self.trial.study._storage.get_trial(self.trial._trial_id).intermediate_values
        if record["step"] not in told:
            self.trial.report(score, record["step"])
        if self.trial.should_prune():
            raise Pruned


def score_of(record: Mapping[str, Any]) -> float | None:
    """Return the validation score of a record, larger for what is better; `None` if it has none."""
    for name, value in record.get("validation", {}).items():
        if not name.endswith("_ci95"):
            return (known_sign(name) or 1) * float(value)
    return None


@dataclasses.dataclass(frozen=True)
class Sweep:
    """A sweep in a folder: a recipe, what is tried of it, and where the trials are known.

    Args:
        recipe: to start from.
        domains: what is tried.
        folder: of the runs.
        trials: how many, of all workers.
        seeds: trainings of each trial, whose mean counts.
        storage: URL of a database, or the file `trials.log` in the folder if `None`.
        config: further arguments of `new_config`.
    """

    recipe: Recipe
    domains: Sequence[Domain]
    folder: Path
    trials: int
    seeds: int = 1
    storage: str | None = None
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def study(self) -> Any:
        """Return Optuna's study, begun if there is none.

        Raises:
            ModuleNotFoundError: without Optuna.
            ValueError: if the storage holds another sweep.
        """
        try:
            import optuna
        except ModuleNotFoundError:
            raise ModuleNotFoundError(
                "sweeps are Optuna's, which is not installed: pip install 'adaptax[sweep]'"
            ) from None
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.storage is None:
            from optuna.storages.journal import JournalFileBackend

            # Optuna's own locks outlive a process that is killed while it holds one.
            held: Any = FileLock(self.folder / "trials.lock")
            backend = JournalFileBackend(str(self.folder / "trials.log"), lock_obj=held)
            storage: Any = optuna.storages.JournalStorage(backend)
        else:
            storage = self.storage
        with self._alone():
            study = optuna.create_study(
                storage=storage, study_name=NAME, direction="maximize", load_if_exists=True
            )
            asked = {
                "experiment": self.recipe.experiment.to_json(), "seeds": self.seeds,
                "over": [dataclasses.asdict(each) for each in self.domains],
            }  # fmt: skip
            asked = json.loads(json.dumps(asked))
            before = study.user_attrs.get("asked")
            if before is None:
                study.set_user_attr("asked", asked)
            elif before != asked:
                raise ValueError(
                    f"{self.storage or self.folder} holds a sweep of other settings; choose "
                    "another --out or --storage"
                )
        return study

    def work(self, study: Any, progress: Progress, command: str) -> None:
        """Do trials until there are as many as are asked for, beside other workers.

        A trial whose worker has died is gone on with from its checkpoint; each is told once.

        Args:
            study: of `study`.
            progress: shows it.
            command: that goes on.
        """
        while (found := self._next(study)) is not None:
            trial, release = found
            try:
                self._do(study, trial, progress, command)
            finally:
                release()

    def _next(self, study: Any) -> Any:
        """A trial that nobody works on, and what lets go of it; `None` if there is none to do."""
        import optuna

        running = optuna.trial.TrialState.RUNNING
        with self._alone():
            for one in study.get_trials(deepcopy=False, states=(running,)):
                if (release := self._held(one.number)) is not None:
                    return optuna.trial.Trial(study, one._trial_id), release
            if len(study.get_trials(deepcopy=False)) >= self.trials:
                return None
            trial = study.ask()
            return trial, self._held(trial.number)

    def _held(self, number: int) -> Any:
        folder = self.folder / f"trial-{number:03d}"
        folder.mkdir(exist_ok=True)
        try:
            return lock(folder)
        except BlockingIOError:
            return None

    def _do(self, study: Any, trial: Any, progress: Progress, command: str) -> None:
        import optuna

        states = optuna.trial.TrialState
        values = {each.name: each.suggest(trial) for each in self.domains}
        try:
            experiment = with_values(self.recipe.experiment, values)
            scores = [
                self._trained(experiment, seed, trial, progress, command)
                for seed in range(experiment.seed, experiment.seed + self.seeds)
            ]
        except Pruned:
            study.tell(trial, state=states.PRUNED)
        except (TrainingDiverged, ValueError) as error:  # of these settings, not of the sweep
            trial.set_user_attr("failed", str(error)[:500])
            study.tell(trial, state=states.FAIL)
        else:
            study.tell(trial, float(np.mean(scores)))

    def _trained(
        self, experiment: Experiment, seed: int, trial: Any, progress: Progress, command: str
    ) -> float:
        one = dataclasses.replace(experiment, seed=seed)
        path = self.folder / f"trial-{trial.number:03d}" / f"seed{seed}"
        first = seed == experiment.seed  # whose curve is compared with those of other trials
        shown = Reporting(progress, trial if first else None)
        trained = fit(new_config(one, **{"data_root": None, **self.config}), path, command, shown)
        scores = [s for record in trained.history if (s := score_of(record)) is not None]
        return max(scores, default=float("nan"))

    def _alone(self) -> FileLock:
        return FileLock(self.folder / "workers.lock")

    def result(self, study: Any) -> dict[str, Any]:
        """Return all trials, best first, as JSON values, and write the best as a recipe."""
        found = study.get_trials(deepcopy=False)
        rows = [
            {
                "trial": one.number,
                "state": one.state.name.lower(),
                "score": one.value,
                "settings": one.params,
                "steps": max(one.intermediate_values, default=0),
                **({"failed": one.user_attrs["failed"]} if "failed" in one.user_attrs else {}),
            }
            for one in found
        ]
        rows.sort(key=lambda row: (row["score"] is None, -(row["score"] or 0.0), row["trial"]))
        best = rows[0] if rows and rows[0]["score"] is not None else None
        if best is not None:
            self.best_file.write_text(to_toml(self._best(best)), encoding="utf-8")
        return {
            "recipe": self.recipe.name,
            "over": {each.name: _said(each) for each in self.domains},
            "seeds": self.seeds,
            "trials": rows,
            "best": None if best is None else str(self.best_file),
        }

    @property
    def best_file(self) -> Path:
        """The recipe of the best trial."""
        return self.folder / "best.toml"

    def _best(self, row: Mapping[str, Any]) -> Recipe:
        said = ", ".join(f"{name} {value}" for name, value in row["settings"].items())
        return Recipe(
            f"{self.recipe.name}-best",
            f"{self.recipe.about}, with the best of {self.trials} trials by validation: {said}",
            self.recipe.paper,
            with_values(self.recipe.experiment, row["settings"]),
        )


def _said(each: Domain) -> str:
    return "|".join(each.choices) if each.choices else f"{each.low:g}..{each.high:g}"

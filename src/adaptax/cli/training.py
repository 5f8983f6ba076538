"""Training runs: `adaptax train` and `adaptax recipes run`."""

from __future__ import annotations

import dataclasses
import os
import shlex
from pathlib import Path
from typing import Any

import jax
from matplotlib.figure import Figure
from rich.console import Console

from .. import report
from ..engine.report import Report
from ..engine.run import Run
from ..recipes import (
    CURVES,
    IMAGES,
    TITLES,
    Experiment,
    changed,
    origin,
)
from ..recipes.runs import (
    Trained,
    adapt_and_predict,
    experiment_in,
    fit,
    free_folder,
    new_config,
    nothing_lost,
    start_of,
)
from ..report import returns
from ..report.record import dump, facts, keep
from ..studies.reinforcement import behaviour
from ..studies.study import PICTURED
from . import settings
from .commands import RecipesRun, Train
from .console import consoles
from .progress import Shown, scoring


def train(asked: Train) -> None:
    """`adaptax train`."""
    if asked.resume is not None:
        _resume(asked)
        return
    experiment = settings.experiment_of(asked)
    path = Path(asked.run) if asked.run else free_folder(_name(experiment))
    start = None if asked.init_from is None else Path(asked.init_from)
    if start is not None:
        experiment = dataclasses.replace(experiment, init_from=start_of(start))
    config = new_config(
        experiment,
        data_root=asked.data_root,
        start=start,
        validate_every=asked.validate_every,
        patience=asked.patience,
        mapping=asked.mapping,
        fast_path="auto" if asked.fast_path else False,
    )
    config["settings"] = origin(experiment)
    _train_and_test(config, path, as_json=asked.json)


def run_recipe(asked: RecipesRun) -> None:
    """`adaptax recipes run`."""
    found = settings.recipe(asked.name)
    changes = {"seed": asked.seed, "steps": asked.steps}
    experiment = changed(found.experiment, changes)
    config = new_config(experiment, data_root=asked.data_root)
    config |= {"recipe": found.name, "about": found.about, "paper": found.paper}
    path = Path(asked.run) if asked.run else Path("runs", found.name)
    _train_and_test(config, path, as_json=asked.json)


def pictures(trained: Trained, scores: Report, path: Path) -> list[str]:
    """Write the plots of a run and its test scores; returns their paths."""
    experiment, learner = trained.experiment, trained.experiment.build_learner()
    key, figures = jax.random.key(PICTURED), {}
    if trained.history:  # or its file is lost
        figures["learning_curve"] = report.learning_curve(trained.history)
    if scores.primary == "return":
        figures |= _returns(trained, scores)
    elif experiment.tasks in CURVES and experiment.eval_steps:
        steps = (0, 1, experiment.eval_steps)
        figures["adaptation"] = report.adaptation(
            learner, trained.meta, trained.test.test, key=key, steps=steps,
            title=f"{TITLES[experiment.algorithm]}, {trained.test.test.describe()['shot']}-shot",
        )  # fmt: skip
    elif experiment.tasks in IMAGES:
        task = trained.test.test.sample(key)
        logits = adapt_and_predict(
            experiment, trained.meta, task.support, task.query.x, experiment.transductive
        )
        figures["episode"] = report.episode_sheet(task, logits)
    return report.save(figures, path)


def _returns(trained: Trained, found: Report) -> dict[str, Figure]:
    """Pictures of reinforcement learning."""
    title = TITLES[trained.experiment.algorithm]
    return {"returns": returns.returns_by_step({title: found}), **behaviour(trained)}


def _resume(asked: Train) -> None:
    mine = {"algorithm", "tasks", "resume", "data_root", "json"}
    for field in dataclasses.fields(Train):
        if field.name not in mine and getattr(asked, field.name) != field.default:
            raise ValueError(
                "a run goes on with its own settings; leave out "
                f"--{field.name.replace('_', '-')}, or start a new run"
            )
    path = Path(asked.resume or "")
    config = Run(path).config()
    experiment = experiment_in(config, path)
    for what in ("algorithm", "tasks"):
        if getattr(asked, what) not in (None, getattr(experiment, what)):
            raise ValueError(
                f"the run in {path} is of {experiment.algorithm} on {experiment.tasks}, not of "
                f"{asked.algorithm} on {asked.tasks}"
            )
    if asked.data_root is not None:
        config = {**config, "data_root": asked.data_root}
    _train_and_test(config, path, as_json=asked.json)


def _train_and_test(config: dict[str, Any], path: Path, *, as_json: bool) -> None:
    out, progress = consoles()
    resume_command = shlex.join(["adaptax", "train", "--resume", str(path)])
    trained = fit(config, path, resume_command, Shown(progress))
    experiment = trained.experiment
    with nothing_lost(
        f"interrupted after training, which is saved in {path}; test with: {resume_command}"
    ):
        reports = _test(trained, progress)
        plots = pictures(trained, reports["test"], path)
    result: dict[str, Any] = {
        **reports["test"].to_json(),
        "run": str(path),
        "command": config["command"],
        **{
            name: config[name]
            for name in ("recipe", "about", "paper", "settings")
            if name in config
        },
        **facts(),
        "training": {
            "seconds": trained.seconds,
            "steps": trained.steps,
            "best_step": trained.step,
            "stopped": trained.stopped,
        },
        "experiment": experiment.to_json(),
        "plots": plots,
    }
    for name, scores in reports.items():
        if name != "test":
            result[name] = scores.to_json()
    keep(path / "test.json", result)
    if as_json:
        print(dump(result))
        return
    for name, scores in reports.items():
        show(scores, out, name.replace("_", "-"))
    if "settings" in config:
        out.print(f"settings: {config['settings']}", soft_wrap=True)
    if "paper" in config:
        out.print(f"paper: {config['paper']}", soft_wrap=True)
    out.print(
        f"trained {trained.steps:,} meta-steps in {trained.seconds:.0f} s; the best "
        f"by validation is of step {trained.step:,}",
        soft_wrap=True,
    )
    out.print(f"run folder: {path} (test.json, {', '.join(os.path.basename(p) for p in plots)})",
              soft_wrap=True)  # fmt: skip


def show(scores: Report, out: Console, title: str) -> None:
    """Print scores and the protocol that they belong to."""
    if scores.primary == "return":
        out.print(report.returns_table({title: scores}))
        if len(scores.at) > 1:
            mean, half = scores.gain(1)
            out.print(f"gain of the first step, task by task: {mean:.2f} ± {half:.2f}")
        out.print(report.protocol_line(scores.protocol), soft_wrap=True)
        return
    out.print(report.report_table(scores, title))
    out.print(report.summary(scores), soft_wrap=True)


def _test(trained: Trained, console: Console) -> dict[str, Report]:
    """Scores under the protocol: both ways to predict for Reptile, whose paper reports both, and
    beside the single model the ensemble of the best, if they are kept."""
    experiment = trained.experiment
    ways: dict[str, dict[str, Any]] = {"test": {}}
    if experiment.algorithm == "reptile" and experiment.tasks in IMAGES:
        ways["non_transductive"] = {"transductive": False}
    if experiment.keep > 1:
        ways["ensemble"] = {"ensemble": True}
    reports: dict[str, Report] = {}
    for name, how in ways.items():
        meta = trained.kept if name == "ensemble" else trained.meta
        with scoring(name.replace("_", "-"), experiment.episodes, console) as watch:
            reports[name] = experiment.test(meta, trained.test, watch=watch, **how)
    return reports


def _name(experiment: Experiment) -> str:
    cell = (
        f"-{experiment.task['way']}w{experiment.task['shot']}s" if "way" in experiment.task else ""
    )
    return f"{experiment.algorithm}-{experiment.tasks}{cell}"

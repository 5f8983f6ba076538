"""Training runs: `adaptax train` and `adaptax recipes run`."""

from __future__ import annotations

import dataclasses
import os
import shlex
from pathlib import Path
from typing import Any

import jax
import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from .. import processes, report
from ..engine.report import Report
from ..engine.run import Run
from ..protocols import Named
from ..recipes import (
    Experiment,
    changed,
    origin,
    table,
)
from ..recipes.runs import (
    Trained,
    adapt_and_predict,
    experiment_in,
    extended,
    fit,
    free_folder,
    moved,
    new_config,
    nothing_lost,
    start_of,
)
from ..recipes.settings import with_path, with_settings
from ..report import returns
from ..report.record import dump, facts, keep
from ..report.style import Format
from ..studies import rows
from ..studies.reinforcement import behaviour
from ..studies.study import PICTURED
from . import settings
from .commands import RecipesRun, Train
from .console import consoles
from .progress import Shown, scoring


def train(options: Train) -> None:
    """`adaptax train`."""
    table.trust(*table.own(options.algorithm, options.tasks), *options.trust)
    if options.resume is not None:
        _resume(options)
        return
    experiment = settings.experiment_of(options)
    free = lambda: str(free_folder(_name(experiment)))  # noqa: E731
    path = Path(options.run or processes.from_first(free))
    start = None if options.init_from is None else Path(options.init_from)
    if start is not None:
        experiment = dataclasses.replace(experiment, init_from=start_of(start))
    config = new_config(
        experiment,
        data_root=options.data_root,
        start=start,
        validate_every=options.validate_every,
        patience=options.patience,
        mapping=options.mapping,
        fast_path="auto" if options.fast_path else False,
    )
    given = any(setting.startswith(("evaluation.episodes", "evaluation.goals"))
                for setting in options.set)  # fmt: skip
    config |= {"settings": origin(experiment), "sized": options.episodes is None and not given}
    _train_and_test_all(config, path, options)


def run_recipe(options: RecipesRun) -> None:
    """`adaptax recipes run`."""
    table.trust(*options.trust)
    found = settings.recipe(options.name)
    changes = {"seed": options.seed, "steps": options.steps}
    experiment = with_settings(changed(found.experiment, changes), options.set)
    if "path" not in experiment.task or options.path is not None:
        experiment = with_path(experiment, options.path)
    config = new_config(experiment, data_root=options.data_root)
    config |= {"recipe": found.name, "about": found.about, "paper": found.paper}
    if experiment != found.experiment:
        config["settings"] = origin(experiment)
    path = Path(options.run) if options.run else Path("runs", found.name)
    _train_and_test_all(config, path, options)


def _train_and_test_all(config: dict[str, Any], path: Path, options: Train | RecipesRun) -> None:
    """Train and test once, or for several seeds, and write the mean and spread of the scores."""
    if options.seeds == 1:
        _train_and_test(
            config, path, as_json=options.json, format=options.format, minutes=options.minutes
        )
        return
    first, found = config["experiment"]["seed"], []
    command = config["command"] + ("" if options.run else f" --run {shlex.quote(str(path))}")
    for seed in range(first, first + options.seeds):
        one = {**config, "experiment": {**config["experiment"], "seed": seed}}
        folder = path / f"seed{seed}"
        found.append(
            _train_and_test(
                one,
                folder,
                as_json=options.json,
                format=options.format,
                command=command,
                quiet=True,
            )
        )
    kinds = [name for name in ("result", *KINDS) if name in found[0]]
    scores = {
        kind: _spread([one[kind] if kind == "result" else one[kind]["result"] for one in found])
        for kind in kinds
    }
    result = {
        "seeds": [one["experiment"]["seed"] for one in found],
        "scores": {"test" if kind == "result" else kind: of for kind, of in scores.items()},
        "runs": [one["run"] for one in found],
        "command": command,
        **facts(),
    }
    keep(path / "seeds.json", result)
    if options.json:
        print(dump(result))
        return
    sheet = Table(title=f"{options.seeds} seeds", title_justify="left")
    for heading in ("scores", "metric", "mean", "standard deviation", "of each seed"):
        sheet.add_column(heading)
    for kind, of in result["scores"].items():
        for metric, one in of.items():
            number = [report.number(metric, value) for value in (one["mean"], one["std"])]
            each = ", ".join(report.number(metric, value) for value in one["each"])
            sheet.add_row(kind.replace("_", "-"), metric, *number, each)
    out = consoles()[0]
    out.print(sheet)
    names = ", ".join(Path(run).name for run in result["runs"])
    out.print(f"run folders: {path} (seeds.json, {names})", soft_wrap=True)


KINDS = ("non_transductive", "ensemble")
"""Further ways to score a run, beside that of its test."""


def _spread(results: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return mean and standard deviation over seeds of every score, NaN where one is missing."""
    found = {}
    for name in results[0]:
        each = [one.get(name) for one in results]
        if not name.endswith("_ci95") and all(isinstance(x, int | float | None) for x in each):
            values = np.array([np.nan if x is None else x for x in each], float)
            found[name] = {
                "mean": float(values.mean()),
                "std": float(values.std(ddof=1)),
                "each": values.tolist(),
            }
    return found


def pictures(trained: Trained, scores: Report, path: Path, format: Format = "png") -> list[str]:
    """Write the plots of a run and its test scores; return their paths."""
    experiment, learner = trained.experiment, trained.experiment.build_learner()
    key, figures = jax.random.key(PICTURED), {}
    if trained.history:  # or its file is lost
        figures["learning_curve"] = report.learning_curve(trained.history)
    if scores.primary == "return":
        figures |= _returns(trained, scores)
    elif experiment.family.has("curves") and experiment.eval_steps:
        steps = (0, 1, experiment.eval_steps)
        figures["adaptation"] = report.adaptation(
            learner, trained.meta, trained.test.test, key=key, steps=steps,
            title=f"{experiment.title}, {trained.test.test.describe()['shot']}-shot",
        )  # fmt: skip
    elif experiment.family.has("rows"):
        title = f"{experiment.title} on {experiment.tasks}"
        figures |= rows.pictures({experiment.title: scores}, {experiment.title: trained}, title)
    elif experiment.family.has("images"):
        task = trained.test.test.sample(key)
        logits = adapt_and_predict(
            experiment, trained.meta, task.support, task.query.x, experiment.transductive
        )
        tasks = trained.test.test
        names = tasks.named(key) if isinstance(tasks, Named) else None
        figures["episode"] = report.episode_sheet(task, logits, names=names)
    return report.save(figures, path, format)


def _returns(trained: Trained, found: Report) -> dict[str, Figure]:
    """Pictures of reinforcement learning."""
    title = trained.experiment.title
    return {"returns": returns.returns_by_step({title: found}), **behaviour(trained)}


def _resume(options: Train) -> None:
    mine = {"algorithm", "tasks", "resume", "steps", "minutes", "data_root", "path", "trust",
            "format", "json", "coordinator", "processes", "process_id"}  # fmt: skip
    for field in dataclasses.fields(Train):
        if field.name not in mine and getattr(options, field.name) != field.default:
            raise ValueError(
                "a run goes on with its own settings; leave out "
                f"--{field.name.replace('_', '-')}, or start a new run"
            )
    path = Path(options.resume or "")
    config = processes.from_first(Run(path).config)
    experiment = experiment_in(config, path)
    for what in ("algorithm", "tasks"):
        if getattr(options, what) not in (None, getattr(experiment, what)):
            raise ValueError(
                f"the run in {path} is of {experiment.algorithm} on {experiment.tasks}, not of "
                f"{options.algorithm} on {options.tasks}"
            )
    config = moved(config, path=options.path, data_root=options.data_root)
    if options.steps is not None and options.steps != experiment.steps:
        config = extended(config, path, options.steps)
        consoles()[1].print(
            f"extended from {experiment.steps:,} to {options.steps:,} meta-steps; what follows a "
            "schedule, of the learner or its outer optimizer, goes on as if it spanned all of "
            "these from here on",
            soft_wrap=True,
        )
    _train_and_test(
        config, path, as_json=options.json, format=options.format, minutes=options.minutes
    )


def _train_and_test(
    config: dict[str, Any],
    path: Path,
    *,
    as_json: bool,
    format: Format = "png",
    minutes: float | None = None,
    command: str | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Train, test, and write the result; prints it as a table, or as JSON unless `quiet`."""
    out, progress = consoles()
    own = sorted(table.own_modules(config["experiment"]))
    trusted = [word for module in own for word in ("--trust", module)]
    limit = [] if minutes is None else ["--minutes", f"{minutes:g}"]
    again = ["adaptax", "train", "--resume", str(path), *limit, *trusted]
    resume_command = command or shlex.join(again)
    trained = fit(config, path, resume_command, Shown(progress))
    experiment = trained.experiment
    with nothing_lost(f"after training, which is saved in {path}; test with: {resume_command}"):
        reports = _test(trained, progress, config.get("sized", False))
        drawn = processes.first()
        plots = pictures(trained, reports["test"], path, format) if drawn else []
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
        if not quiet:
            print(dump(result))
        return result
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
    if (tested := reports["test"].protocol.get("episodes", experiment.episodes)) < (
        all_of_them := experiment.episodes
    ):
        out.print(
            f"tested on {tested:,} episodes, which suit so short a training; on all "
            f"{all_of_them:,}: {shlex.join(['adaptax', 'evaluate', str(path), *trusted])}",
            soft_wrap=True,
        )
    out.print(f"run folder: {path} (test.json, {', '.join(os.path.basename(p) for p in plots)})",
              soft_wrap=True)  # fmt: skip
    return result


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


def _test(trained: Trained, console: Console, fitting: bool) -> dict[str, Report]:
    """Scores under the protocol: both ways to predict for Reptile, whose paper reports both, and
    beside the single model the ensemble of the best, if they are kept.

    Args:
        trained: what is tested.
        console: of the progress.
        fitting: on as many episodes as suit the length of the training.
    """
    experiment, episodes = trained.experiment, trained.experiment.episodes
    if fitting and trained.budget is not None:
        episodes = trained.budget.episodes
    ways: dict[str, dict[str, Any]] = {"test": {}}
    if experiment.row.alone and experiment.family.has("images"):
        ways["non_transductive"] = {"transductive": False}
    if experiment.keep > 1:
        ways["ensemble"] = {"ensemble": True}
    reports: dict[str, Report] = {}
    for name, how in ways.items():
        meta = trained.kept if name == "ensemble" else trained.meta
        if episodes != experiment.episodes:
            how["episodes"] = episodes
        with scoring(name.replace("_", "-"), episodes, console) as watch:
            reports[name] = experiment.test(meta, trained.test, watch=watch, **how)
    return reports


def _name(experiment: Experiment) -> str:
    cell = (
        f"-{experiment.task['way']}w{experiment.task['shot']}s" if "way" in experiment.task else ""
    )
    names = (name.rpartition(":")[2] for name in (experiment.algorithm, experiment.tasks))
    return f"{'-'.join(names)}{cell}"

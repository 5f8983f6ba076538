"""Training runs: `adaptax train` and `adaptax recipes run`."""

from __future__ import annotations

import dataclasses
import math
import os
import shlex
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
from jaxtyping import Array, PyTree
from matplotlib.figure import Figure
from rich.console import Console

from .. import report
from ..engine.evaluate import Report, predict
from ..engine.fingerprint import fingerprint
from ..engine.run import Run, differences
from ..engine.train import fit as ax_fit
from ..learner import Meta
from ..recipes import (
    BODIES,
    CURVES,
    ENVIRONMENTS,
    IMAGES,
    TITLES,
    Experiment,
    changed,
    origin,
    schema,
)
from ..report import frames, returns
from ..rl import Returns
from ..task import Batch, Model, Splits
from . import settings
from .commands import RecipesRun, Train
from .console import Interrupted, consoles, free_folder, save_figure
from .facts import dump, facts, keep
from .progress import scoring, watching

INIT = "init"
"""Folder, in that of a run, of the run that it starts from."""

VERSION = 1
"""Of config.json."""

PICTURED = 3
"""Names the test task of the plots."""


@dataclasses.dataclass(frozen=True)
class Trained:
    """A finished training.

    Args:
        experiment: with the tuned step size, if it had one to tune.
        meta: the best meta-parameters.
        kept: the best few, stacked.
        last: the last.
        step: the step they are from.
        steps: meta-steps done.
        stopped: why training ended.
        history: its records.
        test: distributions of the test protocol.
    """

    experiment: Experiment
    meta: Meta
    kept: Meta
    last: Meta
    step: int
    steps: int
    stopped: str
    history: list[dict[str, Any]]
    test: Splits

    @property
    def seconds(self) -> float:
        """Of meta-training, validation not counted."""
        return math.fsum(record["seconds"] for record in self.history)


def train(asked: Train) -> None:
    """`adaptax train`."""
    if asked.resume is not None:
        _resume(asked)
        return
    experiment = settings.experiment_of(asked)
    path = Path(asked.run) if asked.run else free_folder(_name(experiment))
    start = None if asked.init_from is None else Path(asked.init_from)
    if start is not None:
        experiment = dataclasses.replace(experiment, init_from=_of_start(start))
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


def new_config(
    experiment: Experiment, data_root: str | None, start: Path | None = None, **training: Any
) -> dict[str, Any]:
    """The content of config.json: all that a run needs to be resumed or evaluated.

    Args:
        experiment: what to train.
        data_root: folder of the data sets.
        start: folder of the run that it starts from, which is copied; none trains that itself.
        training: further arguments of `adaptax.fit`, and `None` for those not given.
    """
    root = None if data_root is None else os.path.realpath(Path(data_root).expanduser())
    return {
        "version": VERSION,
        "command": shlex.join(["adaptax", *sys.argv[1:]]),
        "data_root": root,
        "start": None if start is None else os.path.realpath(start),
        "training": {name: value for name, value in training.items() if value is not None},
        "experiment": experiment.to_json(),
    }


def experiment_in(config: dict[str, Any], path: Path) -> Experiment:
    """The experiment of a run, with the step size that was tuned in it.

    Raises:
        ValueError: if the configuration is not one of ours.
    """
    file = path / "config.json"
    if not isinstance(config, dict) or "experiment" not in config:
        raise ValueError(f"{file} was not written by `adaptax train`")
    by_experiment = ("steps", "meta_batch", "keep", "run", "resume")
    try:
        for name, kind in (("command", str), ("data_root", str | None), ("start", str | None)):
            schema.fitting(name, config.get(name), kind)
        schema.checked("training", config.get("training"), schema.taken(ax_fit, by_experiment))
        first = Experiment.from_json(config["experiment"])
        return Experiment.from_json(config["tuned"]) if "tuned" in config else first
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def fit(config: dict[str, Any], path: Path, go_on: str, console: Console) -> Trained:
    """Train in a folder as its configuration says, up to the choice of the step size.

    Goes on where a training of the same experiment was stopped there, before or after its first
    checkpoint. Nothing is written before the data are read, and a new folder is left only with a
    checkpoint.

    Args:
        config: content of config.json.
        path: the run folder.
        go_on: the command that resumes it.
        console: for progress.

    Raises:
        Interrupted: on Ctrl-C, with `go_on`.
        ValueError: if the folder holds a run of another experiment, and what `fit` raises.
        BlockingIOError: if another process works on the folder.
    """
    experiment, run = Experiment.from_json(config["experiment"]), Run(path)
    _held(run, config)  # complains now, not after the data are read
    splits = experiment.splits(config["data_root"])
    test = experiment.splits(config["data_root"], test=True) if experiment.test_task else splits
    experiment.check(test)
    title = f"{TITLES[experiment.algorithm]} on {experiment.tasks}"
    stop = f"interrupted, and saved in {path}; go on with: {go_on}"
    with nothing_half_written(run), run:
        config = _held(run, config)
        run.write_config(config)
        start = _start(experiment, config, path, go_on, console)
        warn = getattr(experiment.build_learner(), "collapsed", None)
        with watching(title, experiment.steps, console, warn) as watch:
            if run.checkpoint_file.exists():
                watch.start(max((record["step"] for record in run.metrics()), default=0))
            how = {"validation": _validation(experiment), **config["training"]}
            if experiment.tasks in ENVIRONMENTS:
                times = 10 if experiment.tasks in BODIES else 20
                how.setdefault("validate_every", max(experiment.steps // times, 1))
            result = experiment.train(
                splits, run, init_from=start, validate=splits.val, watch=watch, resume="auto", **how
            )
    if result.stopped == "interrupted":
        raise Interrupted(f"{stop} (meta-step {result.step:,} of {experiment.steps:,})")
    with _afterwards(stop):
        tuned = experiment_in(config, path) if "tuned" in config else (
            experiment.tuned(result.meta, test))  # fmt: skip
        if experiment.tune or experiment.tune_noise:
            run.write_config({**config, "tuned": tuned.to_json()})
    return Trained(
        tuned, result.meta, result.kept, result.last, result.best_step, result.step,
        result.stopped, result.history, test,
    )  # fmt: skip


def _held(run: Run, config: dict[str, Any]) -> dict[str, Any]:
    """The configuration to train by: with what a run of the same experiment has found out already.

    A folder without a checkpoint is of a run that was killed before its first one, and begun anew.

    Raises:
        ValueError: if the folder holds a run of another experiment.
    """
    if not run.checkpoint_file.exists():
        return config
    if not run.config_file.exists():
        raise ValueError(f"{run.path} already holds a run, which is not of the command line; "
                         "choose another folder")  # fmt: skip
    before = run.config()
    was, now = (fingerprint(experiment=c.get("experiment")) for c in (before, config))
    if changed := differences(was, now):
        raise ValueError(
            f"{run.path} already holds a run, with other settings ({changed}); choose another "
            "folder with --run or --out"
        )
    return {**before, **{name: config[name] for name in ("data_root", "training")}}


def _start(
    experiment: Experiment, config: dict[str, Any], path: Path, go_on: str, console: Console
) -> Meta:
    """What the experiment that this one starts from learned: trained in the folder `init`."""
    if not experiment.init_from:
        return None
    first = Experiment.from_json(experiment.init_from)
    if config.get("start") is not None and not Run(path / INIT).checkpoint_file.exists():
        _copy_start(Path(config["start"]), path / INIT)
    return fit_or_go_on(first, path / INIT, go_on, console, data_root=config["data_root"]).meta


def fit_or_go_on(
    experiment: Experiment, path: Path, go_on: str, console: Console, **config: Any
) -> Trained:
    """Train in a folder, or go on with the training that was begun there.

    Args:
        experiment: what to train.
        path: the run folder.
        go_on: the command that goes on.
        console: for progress.
        config: arguments of `new_config`.

    Raises:
        ValueError: if the folder holds a run of another experiment.
    """
    return fit(new_config(experiment, **config), path, go_on, console)


def pictures(trained: Trained, scores: Report | Returns, path: Path) -> list[str]:
    """Write the plots of a run and its test scores; returns their paths."""
    experiment, learner = trained.experiment, trained.experiment.build_learner()
    key, figures = jax.random.key(PICTURED), {}
    if trained.history:  # or its file is lost
        figures["learning_curve"] = report.learning_curve(trained.history)
    if isinstance(scores, Returns):
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
            experiment, trained.meta, task.support, task.query.x, _transductive(experiment)
        )
        figures["episode"] = report.episode_sheet(task, logits)
    return [str(save_figure(figure, path / f"{name}.png")) for name, figure in figures.items()]


def _returns(trained: Trained, found: Returns) -> dict[str, Figure]:
    """Pictures of reinforcement learning."""
    title = TITLES[trained.experiment.algorithm]
    return {"returns": returns.returns_by_step({title: found}), **behaviour(trained)}


def behaviour(trained: Trained) -> dict[str, Figure]:
    """What policies do before and after adaptation, where that can be drawn."""
    tasks: Any = trained.test.test
    draw = {"navigation": returns.trajectories, **dict.fromkeys(BODIES, frames.frames)}
    name = trained.experiment.tasks
    if name not in draw:
        return {}
    figure = draw[name](
        trained.experiment.build_learner(), trained.meta, tasks, key=jax.random.key(PICTURED)
    )
    return {"trajectories" if name == "navigation" else "frames": figure}


def adapt_and_predict(
    experiment: Experiment,
    meta: Meta,
    support: Batch,
    x: PyTree,
    transductive: bool,
    count: int | None = None,
) -> Array:
    """Predictions for queries.

    Args:
        experiment: of the run.
        meta: its meta-parameters.
        support: labelled examples.
        x: queries.
        transductive: predict them together.
        count: the classes there are, if fewer than the head has outputs: the others get no
            gradient and no probability.
    """
    learner: Any = experiment.build_learner()
    loss = learner.loss

    def of_these(model: Model, batch: Batch) -> Array:
        return loss(lambda x: model(x)[..., :count], batch)

    if count is not None and count != experiment.way:
        learner = dataclasses.replace(learner, loss=of_these)

    model = learner.adapt(meta, support, key=jax.random.key(0))
    return predict(model, x, support.x, transductive=transductive)[..., :count]


def _of_start(start: Path) -> dict[str, Any]:
    """The experiment, in JSON, of a run to start from.

    Raises:
        FileNotFoundError: if there is no run.
        ValueError: if it has no checkpoint.
    """
    run = Run(start)
    config = run.config()
    experiment_in(config, run.path)
    if not run.checkpoint_file.exists():
        raise ValueError(f"{start} has no checkpoint to start from; train it first")
    return config["experiment"]


def _copy_start(start: Path, copy: Path) -> None:
    """Copy a run, whole or not at all."""
    _of_start(start)
    half = copy.with_name(f".{copy.name}.copy")
    for folder in (half, copy):  # of a process that was killed
        shutil.rmtree(folder, ignore_errors=True)
    half.mkdir()
    for file in start.iterdir():
        if file.is_file() and not file.name.startswith("."):
            shutil.copy2(file, half / file.name)
    half.rename(copy)


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
    go_on = shlex.join(["adaptax", "train", "--resume", str(path)])
    trained = fit(config, path, go_on, progress)
    experiment = trained.experiment
    with _afterwards(f"interrupted after training, which is saved in {path}; test with: {go_on}"):
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


def show(scores: Report | Returns, out: Console, title: str) -> None:
    """Print scores and the protocol that they belong to."""
    if isinstance(scores, Returns):
        out.print(report.returns_table({title: scores}))
        if scores.values.shape[1] > 1:
            mean, half = scores.gain(1)
            out.print(f"gain of the first step, task by task: {mean:.2f} ± {half:.2f}")
        out.print(report.protocol_line(scores.protocol), soft_wrap=True)
        return
    out.print(report.report_table(scores, title))
    out.print(report.summary(scores), soft_wrap=True)


def _test(trained: Trained, console: Console) -> dict[str, Report | Returns]:
    """Scores under the protocol: both ways to predict for Reptile, whose paper reports both, and
    beside the single model the ensemble of the best, if they are kept."""
    experiment = trained.experiment
    ways: dict[str, dict[str, Any]] = {"test": {}}
    if experiment.algorithm == "reptile" and experiment.tasks in IMAGES:
        ways["non_transductive"] = {"transductive": False}
    if experiment.keep > 1:
        ways["ensemble"] = {"ensemble": True}
    reports: dict[str, Report | Returns] = {}
    for name, how in ways.items():
        meta = trained.kept if name == "ensemble" else trained.meta
        with scoring(name.replace("_", "-"), experiment.episodes, console) as watch:
            reports[name] = experiment.test(meta, trained.test, watch=watch, **how)
    return reports


def _validation(experiment: Experiment) -> dict[str, Any]:
    """How to validate: as in the test, but fewer episodes, and of episodes the last step alone."""
    if experiment.tasks in ENVIRONMENTS:
        how = dict(experiment.evaluation)
        most = 8 if experiment.tasks in BODIES else 40
        return {**how, "goals": min(how.get("goals", 40), most)}
    steps = experiment.eval_steps
    episodes = min(200, max(experiment.episodes // 3, 2))
    how = {name: experiment.evaluation[name] for name in ("noise", "select")
           if name in experiment.evaluation}  # fmt: skip
    return {
        **how, "episodes": episodes, "at": [steps], "transductive": _transductive(experiment)
    }  # fmt: skip


def _transductive(experiment: Experiment) -> bool:
    return experiment.evaluation.get("transductive", True)


def _name(experiment: Experiment) -> str:
    cell = (
        f"-{experiment.task['way']}w{experiment.task['shot']}s" if "way" in experiment.task else ""
    )
    return f"{experiment.algorithm}-{experiment.tasks}{cell}"


@contextmanager
def nothing_half_written(run: Run) -> Iterator[None]:
    """Removes a folder that was made here and has no checkpoint yet, when something fails."""
    new = [path for path in (run.path, *run.path.parents) if not path.exists()]
    try:
        yield
    except BaseException as error:
        if isinstance(error, BlockingIOError):
            raise  # the folder is another process's
        if new and not run.checkpoint_file.exists() and not (run.path / INIT).exists():
            shutil.rmtree(run.path, ignore_errors=True)
            for parent in new[1:]:
                if parent.is_dir() and not any(parent.iterdir()):
                    parent.rmdir()
        raise


@contextmanager
def _afterwards(message: str) -> Iterator[None]:
    """Ctrl-C after training: nothing is lost."""
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted(message) from None

"""Runs of experiments in folders: begun, resumed, loaded. Knows no console and no command line."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
from jaxtyping import Array, PRNGKeyArray, PyTree

from .. import processes
from ..engine.fingerprint import fingerprint
from ..engine.predict import predict
from ..engine.report import Report
from ..engine.run import Run, differences
from ..engine.train import fit as ax_fit
from ..learner import Meta, MetaLearner
from ..process import ProcessLost, TimeOver, ended
from ..task import Batch, Model, Source, Splits
from . import rows, schema, table
from .budget import Budget, budget
from .experiment import Experiment

INIT = "init"
"""Folder, in that of a run, of the run that it starts from."""

VERSION = 1
"""Of config.json."""

Warn = Callable[[dict[str, Any]], str | None]
"""A sentence if something is wrong with a record of training, such as `LEO.collapsed`."""


@runtime_checkable
class Watch(Protocol):
    """Follows a training."""

    def start(self, step: int) -> None:
        """Begin at a step, for a resumed run."""

    def __call__(self, record: dict[str, Any], /) -> None:
        """Show a record."""


@runtime_checkable
class Progress(Protocol):
    """Shows how far the work is."""

    def training(
        self, title: str, steps: int, warn: Warn | None = None, budget: Budget | None = None
    ) -> AbstractContextManager[Watch]:
        """Follow a training of so many meta-steps."""
        ...

    def scoring(self, title: str, episodes: int) -> AbstractContextManager[Callable[[int], None]]:
        """Follow a test: yields what is told how many episodes are done."""
        ...


class Silent:
    """Progress that is not shown."""

    def training(
        self, title: str, steps: int, warn: Warn | None = None, budget: Budget | None = None
    ) -> AbstractContextManager[Watch]:
        """Show nothing."""
        return nullcontext(_Unseen())

    def scoring(self, title: str, episodes: int) -> AbstractContextManager[Callable[[int], None]]:
        """Show nothing."""
        return nullcontext(lambda done: None)


class _Unseen:
    def start(self, step: int) -> None:
        pass

    def __call__(self, record: dict[str, Any]) -> None:
        pass


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
        budget: how long it is; `None` of environments.
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
    budget: Budget | None = None

    @property
    def seconds(self) -> float:
        """Of meta-training, validation not counted."""
        return math.fsum(record["seconds"] for record in self.history)


def new_config(
    experiment: Experiment, data_root: str | None, start: Path | None = None, **training: Any
) -> dict[str, Any]:
    """Return the content of config.json: all that a run needs to be resumed or evaluated.

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
    """Return the experiment of a run, with the step size that was tuned in it.

    Raises:
        ValueError: if the configuration is not one of ours.
    """
    file = path / "config.json"
    if not isinstance(config, dict) or "experiment" not in config:
        raise ValueError(f"{file} was not written by `adaptax train`")
    by_experiment = ("steps", "meta_batch", "keep", "run", "resume")
    config.setdefault("data_root", None)
    try:
        for name, kind in (("command", str), ("data_root", str | None), ("start", str | None)):
            schema.fitting(name, config.get(name), kind)
        schema.checked("training", config.get("training"), schema.taken(ax_fit, by_experiment))
        first = Experiment.from_json(config["experiment"])
        return Experiment.from_json(config["tuned"]) if "tuned" in config else first
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def free_folder(name: str) -> Path:
    """Return `runs/name`, or the first of `runs/name-2`, … that does not exist."""
    path, count = Path("runs", name), 1
    while path.exists():
        count += 1
        path = Path("runs", f"{name}-{count}")
    return path


def moved(
    config: dict[str, Any],
    *,
    path: str | os.PathLike[str] | None = None,
    data_root: str | os.PathLike[str] | None = None,
) -> dict[str, Any]:
    """Return the configuration of a run whose data lie elsewhere now.

    Args:
        config: content of config.json.
        path: where the images or embeddings are, if not where they were in training.
        data_root: folder of the data sets, likewise.

    Raises:
        ValueError: if the tasks are read from no path.
    """
    config = dict(config)
    if data_root is not None:
        config["data_root"] = os.path.realpath(Path(data_root).expanduser())
    if path is not None:
        where = os.path.realpath(Path(path).expanduser())
        for name in ("experiment", "tuned"):
            if name in config:
                config[name] = _with_path(config[name], where)
    return config


def _with_path(experiment: dict[str, Any], where: str | None) -> dict[str, Any]:
    """Return the description of an experiment, and of its start, with its data at this path."""
    task, start = experiment["task"], experiment.get("init_from", {})
    if where is not None and "path" not in task:
        raise ValueError(
            f"the run is of {experiment['tasks']}, which is read from no --path; leave it out, and "
            "use --data-root for data sets"
        )
    task = {**task, "path": where} if "path" in task else task
    return {**experiment, "task": task, "init_from": _with_path(start, where) if start else {}}


def extended(config: dict[str, Any], path: Path, steps: int) -> dict[str, Any]:
    """Return the configuration of a run that is to go on for more steps, in all.

    What was tuned after its training is tuned again.

    Raises:
        ValueError: if these are fewer than it was to have.
    """
    before = config["experiment"]["steps"]
    if steps < before:
        raise ValueError(
            f"the run in {path} is of {before:,} meta-steps; --steps {steps} would be fewer, and "
            "more extend it"
        )
    rest = {name: value for name, value in config.items() if name != "tuned"}
    experiment = {**config["experiment"], "steps": steps}
    return {**rest, "experiment": experiment, "extended_from": before}


def fit_or_resume(
    experiment: Experiment,
    path: str | os.PathLike[str],
    resume_command: str,
    progress: Progress | None = None,
    validation: dict[str, Any] | None = None,
    **config: Any,
) -> Trained:
    """Train in a folder, or resume the training that was begun there.

    Args:
        experiment: what to train.
        path: the run folder.
        resume_command: the command that resumes it.
        progress: shows it; nothing if `None`.
        validation: arguments of `adaptax.evaluate` for it; as the test, but shorter, if `None`.
        config: arguments of `new_config`.

    Raises:
        ValueError: if the folder holds a run of another experiment.
    """
    config = {"data_root": None, **config}
    content = new_config(experiment, **config)
    return fit(content, Path(path), resume_command, progress, validation)


def fit(
    config: dict[str, Any],
    path: Path,
    resume_command: str,
    progress: Progress | None = None,
    validation: dict[str, Any] | None = None,
) -> Trained:
    """Train in a folder as its configuration says, up to the choice of the step size.

    Resumes a training of the same experiment that was stopped there, before or after its first
    checkpoint. Nothing is written before the data are read, and a new folder is left only with a
    checkpoint.

    Args:
        config: content of config.json.
        path: the run folder.
        resume_command: the command that resumes it.
        progress: shows it; nothing if `None`.
        validation: arguments of `adaptax.evaluate` for it; as the test, but shorter, if `None`.

    Raises:
        Interrupted: on Ctrl-C, or in time (`adaptax.process.at_most`), with `resume_command`.
        ValueError: if the folder holds a run of another experiment, and what `fit` raises.
        BlockingIOError: if another process works on the folder.
    """
    progress = progress or Silent()
    experiment, run = Experiment.from_json(config["experiment"]), Run(path)
    # Complains now, not after the data are read.
    processes.from_first(lambda: _held(run, config))
    splits = experiment.splits(config["data_root"])
    test = experiment.splits(config["data_root"], test=True) if experiment.test_task else splits
    experiment.check(test)
    title = f"{experiment.title} on {experiment.tasks}"
    kept = f"and saved in {path}; go on with: {resume_command}"
    with nothing_half_written(run), run:
        config = processes.from_first(lambda: _held(run, config))
        run.write_config(config)
        rows.keep(splits, run.path)
        start = _start(experiment, config, path, resume_command, progress)
        warn = getattr(experiment.build_learner(), "collapsed", None)
        how = {"validation": validation or _validation(experiment), **config["training"]}
        long: Budget | None = None
        if not experiment.acts:
            how["validation"], long = budget(
                experiment, experiment.untrained(start), splits, test,
                how["validation"], fitting=config.get("sized", False) and validation is None,
                **{name: how[name] for name in ("validate_every", "fast_path") if name in how},
            )  # fmt: skip
        with progress.training(title, experiment.steps, warn, long) as watch:
            if run.checkpoint_file.exists():
                watch.start(max((record["step"] for record in run.metrics()), default=0))
            if experiment.acts:
                times = 10 if experiment.family.has("bodies") else 20
                how.setdefault("validate_every", max(experiment.steps // times, 1))
            try:
                result = experiment.train(
                    splits, run, init_from=start, validate=splits.val, watch=watch, resume="auto",
                    **how,
                )  # fmt: skip
            except ProcessLost as lost:
                raise ProcessLost(f"{lost}; the last state is kept, {kept}") from None
    if result.stopped in ("interrupted", "out of time"):
        done = f"(meta-step {result.step:,} of {experiment.steps:,})"
        raise ended(result.stopped == "out of time", f"{kept} {done}")
    with nothing_lost(kept):
        tuned = (
            experiment_in(config, path)
            if "tuned" in config
            else experiment.tuned(result.meta, test)
        )
        if experiment.tune or experiment.tune_noise:
            run.write_config({**config, "tuned": tuned.to_json()})
        processes.from_first(lambda: rows.calibrate(tuned, result.meta, test.val, run.path))
    return Trained(
        experiment=tuned,
        meta=result.meta,
        kept=result.kept,
        last=result.last,
        step=result.best_step,
        steps=result.step,
        stopped=result.stopped,
        history=result.history,
        test=test,
        budget=long,
    )


def _held(run: Run, config: dict[str, Any]) -> dict[str, Any]:
    """Return the configuration to train by: with what a run of the same experiment found already.

    A folder without a checkpoint is of a run that was killed before its first one, and begun anew.

    Raises:
        ValueError: if the folder holds a run of another experiment.
    """
    if not run.checkpoint_file.exists():
        return config
    if not run.config_file.exists():
        raise ValueError(
            f"{run.path} already holds a run, which is not of the command line; choose another "
            "folder"
        )
    before = run.config()
    was, now = (fingerprint(experiment=_placeless(c.get("experiment"))) for c in (before, config))
    if "extended_from" in config:
        was.pop("experiment['steps']", None)
        now.pop("experiment['steps']", None)
    if changes := differences(was, now):
        raise ValueError(
            f"{run.path} already holds a run, with other settings ({changes}); choose another "
            "folder with --run or --out"
        )
    new = ("data_root", "training", "experiment", "tuned", "extended_from")
    if config["experiment"]["steps"] != before["experiment"]["steps"]:
        before.pop("tuned", None)
    return {**before, **{name: config[name] for name in new if name in config}}


def _placeless(experiment: Any) -> Any:
    """Return an experiment without where its data lie: their content is compared elsewhere."""
    if not isinstance(experiment, dict) or not isinstance(experiment.get("task"), dict):
        return experiment
    task = {name: value for name, value in experiment["task"].items() if name != "path"}
    return {**experiment, "task": task, "init_from": _placeless(experiment.get("init_from"))}


def _start(
    experiment: Experiment,
    config: dict[str, Any],
    path: Path,
    resume_command: str,
    progress: Progress,
) -> Meta:
    """Return what the experiment to start from learned; it is trained in the folder `init`."""
    if not experiment.init_from:
        return None
    first = Experiment.from_json(experiment.init_from)
    copied = Run(path / INIT).checkpoint_file.exists() or not processes.first()
    if config.get("start") is not None and not copied:
        _copy_start(Path(config["start"]), path / INIT)
    root = config["data_root"]
    return fit_or_resume(first, path / INIT, resume_command, progress, data_root=root).meta


def start_of(path: Path) -> dict[str, Any]:
    """Return the experiment, in JSON, of a run to start from.

    Raises:
        FileNotFoundError: if there is no run.
        ValueError: if it has no checkpoint.
    """
    run = Run(path)
    config = run.config()
    experiment_in(config, run.path)
    if not run.checkpoint_file.exists():
        raise ValueError(f"{path} has no checkpoint to start from; train it first")
    return config["experiment"]


def _copy_start(start: Path, copy: Path) -> None:
    """Copy a run, whole or not at all."""
    start_of(start)
    half = copy.with_name(f".{copy.name}.copy")
    for folder in (half, copy):  # of a process that was killed
        shutil.rmtree(folder, ignore_errors=True)
    half.mkdir()
    for file in start.iterdir():
        if file.is_file() and not file.name.startswith("."):
            shutil.copy2(file, half / file.name)
    half.rename(copy)


def _validation(experiment: Experiment) -> dict[str, Any]:
    """How to validate: as in the test, but fewer episodes, and of episodes the last step alone."""
    if experiment.acts:
        how = dict(experiment.evaluation)
        most = 8 if experiment.family.has("bodies") else 40
        how.pop("episodes", None)
        return {**how, "goals": min(experiment.episodes, most)}
    kept = ("noise", "select")
    return {
        **{name: experiment.evaluation[name] for name in kept if name in experiment.evaluation},
        "episodes": min(200, max(experiment.episodes // 3, 2)),
        "at": [experiment.eval_steps],
        "transductive": experiment.transductive,
    }


@contextmanager
def nothing_half_written(run: Run) -> Iterator[None]:
    """Remove a folder that was made here and has no checkpoint yet, when something fails."""
    new = [path for path in (run.path, *run.path.parents) if not path.exists()]
    if not processes.first():
        new = []
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
def nothing_lost(kept: str) -> Iterator[None]:
    """Turn Ctrl-C after a training into `Interrupted`, which says what is kept; see `ended`."""
    try:
        yield
    except KeyboardInterrupt as stop:
        raise ended(isinstance(stop, TimeOver), kept) from None


@dataclasses.dataclass(frozen=True)
class LoadedRun:
    """A finished training, or one that was stopped, as its folder holds it; see `load_run`.

    Args:
        path: the run folder.
        config: content of its config.json.
        experiment: what was trained, with the tuned step size, if it had one to tune.
        meta: the best meta-parameters by validation, else the last.
        kept: the best few, stacked, best first.
        step: the meta-step that `meta` is from.
    """

    path: Path
    config: dict[str, Any]
    experiment: Experiment
    meta: Meta
    kept: Meta
    step: int

    @functools.cached_property
    def learner(self) -> MetaLearner:
        """The learner."""
        return self.experiment.build_learner()

    @functools.cached_property
    def model(self) -> Model:
        """The network as it was before meta-training; what was learned is `meta`."""
        return self.experiment.model()

    @functools.cached_property
    def tasks(self) -> Splits:
        """The task distributions of the test protocol, read when they are first asked for."""
        return self.experiment.splits(self.config["data_root"], test=True, fitted=str(self.path))

    def evaluate(self, *, split: str = "test", ensemble: bool = False, **how: Any) -> Report:
        """Score the run on episodes.

        Every run sees the same episodes.

        Args:
            split: whose episodes, `"test"` or `"val"`.
            ensemble: score the ensemble of the checkpoints that were kept.
            how: arguments of `adaptax.evaluate` in the place of the protocol's.

        Raises:
            ValueError: for an ensemble of a run that kept one checkpoint.
        """
        if ensemble and self.experiment.keep < 2:
            raise ValueError(
                f"{self.path} kept one checkpoint, which makes no ensemble; train with --keep 3, "
                "say"
            )
        meta = self.kept if ensemble else self.meta
        return self.experiment.test(meta, self.tasks, split=split, ensemble=ensemble, **how)

    def adapt(self, support: Source, *, key: PRNGKeyArray | None = None) -> Model:
        """Return the model, or `Ensemble`, that has learnt from `support`.

        Args:
            support: labelled examples.
            key: all the randomness there is; `jax.random.key(0)` if `None`.
        """
        key = jax.random.key(0) if key is None else key
        return self.learner.adapt(self.meta, support, key=key)

    def untrained(self) -> LoadedRun:
        """Return the run as it was before its first meta-step."""
        return dataclasses.replace(self, meta=self.experiment.untrained(), step=0)


def load_run(
    run: str | os.PathLike[str],
    *,
    path: str | os.PathLike[str] | None = None,
    data_root: str | os.PathLike[str] | None = None,
    trust: Sequence[str] = (),
) -> LoadedRun:
    """Load the run in a folder that `adaptax train` wrote.

        run = adaptax.load_run("runs/maml-omniglot-5w1s")
        model = run.adapt(adaptax.Batch(x, y))          # learns from a handful of examples
        print(run.evaluate(episodes=1000))

    Args:
        run: the run folder.
        path: where the images or embeddings are, if not where they were in training.
        data_root: folder of the data sets, if not the one that the run was trained from.
        trust: modules of your own that the run names and may import.

    Raises:
        FileNotFoundError: if there is no run.
        ValueError: if its files are broken or do not belong together.
    """
    table.trust(*trust)
    folder = Run(run)
    config = folder.config()
    experiment_in(config, folder.path)  # which complains, by the name of the file
    config = moved(config, path=path, data_root=data_root)
    experiment = experiment_in(config, folder.path)
    meta, step, kept = experiment.restore(folder)
    return LoadedRun(folder.path, {"data_root": None, **config}, experiment, meta, kept, step)


def adapt_and_predict(
    experiment: Experiment,
    meta: Meta,
    support: Batch,
    x: PyTree,
    transductive: bool,
    count: int | None = None,
) -> Array:
    """Predict queries.

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
    return predict(learner, meta, support, x, transductive=transductive)[..., :count]

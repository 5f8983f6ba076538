"""`adaptax analyze`: which inner gradients to follow, and the expansion of meta-gradients."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track

from .. import io, losses, models, tasks
from ..algorithms.maml import FOMAML, MAML
from ..algorithms.reptile import Reptile
from ..engine.run import Run
from ..learner import Functional, MetaLearner
from ..losses import Loss
from ..process import Interrupted
from ..recipes import Experiment
from ..recipes.runs import new_config
from ..report import analysis as report
from ..studies.gradients import (
    ARMS,
    COMBINATIONS,
    DRAWINGS,
    INNER_STEPS,
    SHOT,
    WAY,
    overlap,
    overlapping,
)
from ..studies.taylor import RATES, Expansion, taylor_coefficients
from ..task import Model, Splits, TaskDistribution
from .commands import AnalyzeGradients, AnalyzeTaylor
from .console import consoles, free_folder
from .facts import command, dump, facts, keep
from .progress import scoring, watching
from .settings import or_else

STEPS = {"combinations": 2_000, "overlap": 1_000}
"""Outer iterations of the short versions."""

POINTS = 10
"""Of a learning curve."""

CURVE_EPISODES = 60
"""Validation tasks of each point; the same for all points and curves."""

LEARNERS: dict[str, tuple[str, Callable[[Loss, int], MetaLearner]]] = {
    "sgd": ("joint SGD", lambda loss, k: MAML(loss, inner_steps=0)),
    "maml": ("MAML", lambda loss, k: MAML(loss, inner_steps=k - 1)),
    "fomaml": ("FOMAML", lambda loss, k: FOMAML(loss, inner_steps=k - 1)),
    "reptile": ("Reptile", lambda loss, k: Reptile(loss, inner_steps=k)),
}
"""How a learner is written, and the one that sees k minibatches."""


@dataclasses.dataclass(frozen=True)
class Arm:
    """A training of a study.

    Args:
        folder: its name in the study's folder.
        row: what a table says of it beside its score.
        experiment: what to train and how to test it.
    """

    folder: str
    row: dict[str, Any]
    experiment: Experiment


def gradients(asked: AnalyzeGradients) -> None:
    """`adaptax analyze gradients`."""
    arms = _arms(asked)
    # All at once, so that bad data are told before anything is written.
    splits = {_task(arm): arm.experiment.splits(asked.data_root) for arm in _distinct(arms)}
    path = Path(asked.out) if asked.out else free_folder(f"analyze-{asked.study}")
    go_on = command(asked, "analyze", "gradients", out=path)
    out, progress = consoles()
    try:
        rows = [
            _row(arm, asked, splits[_task(arm)], path / arm.folder, go_on, progress) for arm in arms
        ]
    except KeyboardInterrupt:
        raise Interrupted(f"interrupted; what is trained is kept, go on with: {go_on}") from None
    if asked.study == "combinations":
        name, figure = "gradient_combinations", report.gradient_combinations(rows)
    else:
        inside = overlapping([row["inner_steps"] for row in rows])
        name, figure = "overlap", report.overlap(rows, inside)
    experiment = arms[0].experiment
    result = {
        "study": asked.study,
        "steps": experiment.steps,
        "rows": rows,
        "command": go_on,
    }
    result |= facts()
    _write(path, name, result, figure)
    if asked.json:
        print(dump(result))
        return
    out.print(report.study_table(rows, f"5-way 5-shot Omniglot, {experiment.steps:,} iterations"))
    out.print(
        f"± is the 95 % confidence interval over {experiment.evaluation['episodes']} test "
        "episodes of held-out characters, the same for all; not transductive: each query is "
        "predicted in a batch of the support and itself.",
        soft_wrap=True,
    )
    out.print(f"results: {path} ({name}.json, {name}.png)", soft_wrap=True)


def taylor(asked: AnalyzeTaylor) -> None:
    """`adaptax analyze taylor`."""
    sinusoid = asked.tasks == "sinusoid"
    counts = asked.minibatches or ((2, 3, 4) if sinusoid else (2, 3))
    rates = asked.rates or RATES
    names = asked.learners or tuple(LEARNERS)
    _check(asked, names, counts)
    with jax.enable_x64(True):
        network, model, loss = _network(asked)
        sampled = {k: _tasks(asked, k) for k in counts}
        path = Path(asked.out) if asked.out else free_folder(f"analyze-taylor-{asked.tasks}")
        out, progress = consoles()
        measured: dict[str, list[Expansion]] = {LEARNERS[name][0]: [] for name in names}
        pairs = [(*LEARNERS[name], k) for k in counts for name in names]
        quiet = not progress.is_terminal
        for name, make, k in track(pairs, "expanding", console=progress, disable=quiet):
            expansion = taylor_coefficients(
                make(loss, k), model, sampled[k], key=jax.random.key(asked.seed), rates=rates,
                count=or_else(asked.count, 8 if sinusoid else 4), minibatches=k,
                orderings=asked.orderings,
            )  # fmt: skip
            measured[name].append(expansion)
    result = {
        "tasks": sampled[counts[0]].describe(),
        "network": network,
        "expansions": {name: [one.to_json() for one in each] for name, each in measured.items()},
        "command": command(asked, "analyze", "taylor", asked.tasks, out=path),
        **facts(),
    }
    _write(path, "taylor", result, report.expansions(measured))
    if asked.json:
        print(dump(result))
        return
    title = f"Expected meta-gradients of {asked.tasks}, α = {min(rates):g}"
    out.print(report.expansion_table(measured, title))
    out.print(
        f"{network}, not trained, float64; {expansion.tasks} tasks, ± is a standard error over "
        f"them; the order is that of the residual in α = {', '.join(f'{r:g}' for r in rates)}.",
        soft_wrap=True,
    )
    out.print(f"results: {path} (taylor.json, taylor.png)", soft_wrap=True)


def _arms(asked: AnalyzeGradients) -> list[Arm]:
    """The trainings of a study, in order."""
    steps = or_else(asked.steps, STEPS[asked.study])
    how = {"steps": steps, "episodes": asked.episodes, "seed": asked.seed}
    if asked.study == "combinations":
        if asked.inner_steps:
            raise ValueError("--inner-steps is for --study overlap; the combinations have theirs")
        return [
            _arm(f"{one.kind}-{one.inner_steps}", one.experiment(**how), name=one.name,
                 kind=one.kind)
            for one in COMBINATIONS
        ]  # fmt: skip
    return [
        _arm(f"{arm}-{k}", overlap(arm, k, **how), name=title, arm=arm)
        for k in sorted(set(asked.inner_steps or INNER_STEPS))
        for arm, title in ARMS.items()
    ]


def _arm(folder: str, experiment: Experiment, **row: Any) -> Arm:
    learner = {name: experiment.learner[name] for name in ("inner_steps", "outer_lr")}
    return Arm(folder, {**row, **learner}, experiment)


def _task(arm: Arm) -> str:
    """The settings of its tasks."""
    return json.dumps(arm.experiment.task, sort_keys=True)


def _distinct(arms: list[Arm]) -> list[Arm]:
    """One arm for every kind of task."""
    return list({_task(arm): arm for arm in arms}.values())


def _row(
    arm: Arm,
    asked: AnalyzeGradients,
    splits: Splits,
    folder: Path,
    go_on: str,
    console: Console,
) -> dict[str, Any]:
    """Train and test, as far as the folder does not hold the outcome."""
    experiment, run, file = arm.experiment, Run(folder), folder / "test.json"
    config = new_config(experiment, asked.data_root)
    resume = run.checkpoint_file.exists()
    if resume and run.config().get("experiment") != config["experiment"]:
        raise ValueError(
            f"{folder} holds a run with other settings; choose another folder with --out"
        )
    if resume and file.is_file():
        return {**arm.row, **json.loads(file.read_text())}
    curve = {**experiment.evaluation, "episodes": CURVE_EPISODES}
    title = f"{arm.row['name']}, k = {arm.row['inner_steps']}"
    with watching(title, experiment.steps, console) as watch:
        if resume:
            watch.start(max((record["step"] for record in run.metrics()), default=0))
        else:
            run.write_config(config)
        result = experiment.train(
            splits, run, resume=resume, watch=watch, validation=curve,
            validate=splits.val if asked.study == "combinations" else None,
            validate_every=max(experiment.steps // POINTS, 1),
        )  # fmt: skip
    if result.stopped == "interrupted":
        raise Interrupted(f"interrupted, and saved in {folder}; go on with: {go_on}")
    with scoring(f"{title}, test", asked.episodes, console) as watch:
        # The last meta-parameters: nothing is selected.
        scores = experiment.test(result.last, splits, watch=watch)
    found = {
        "accuracy": scores.mean("accuracy"),
        "accuracy_ci95": scores.ci95("accuracy"),
        "seconds": sum(record["seconds"] for record in result.history),
        "curve": [
            {"step": record["step"], **record["validation"]}
            for record in result.history
            if "validation" in record
        ],
        "report": scores.to_json(),
        "experiment": experiment.to_json(),
    }
    io.write_atomic(file, (dump(found) + "\n").encode())
    return {**arm.row, **found}


def _check(asked: AnalyzeTaylor, names: tuple[str, ...], counts: tuple[int, ...]) -> None:
    for name in names:
        if name not in LEARNERS:
            raise ValueError(f"{name!r} has no expansion here; there are {', '.join(LEARNERS)}")
    most = 6 if asked.tasks == "sinusoid" else DRAWINGS // SHOT
    if min(counts) < 2 or max(counts) > most:
        raise ValueError(
            f"--minibatches {' '.join(map(str, counts))} should be 2 to {most} of a task "
            f"of {asked.tasks}"
        )
    if asked.tasks == "sinusoid" and (asked.data_root is not None or asked.relu):
        raise ValueError("sinusoids have no data and a tanh network; leave out --data-root, --relu")


def _network(asked: AnalyzeTaylor) -> tuple[str, Model, Loss]:
    """What it is called, the untrained network, and its loss."""
    key = jax.random.key(asked.seed)
    if asked.tasks == "sinusoid":
        return "MLP 1-40-40-1, tanh", models.MLP(1, 1, key=key, activation=jnp.tanh), losses.mse
    net = models.Conv4(WAY, key=key, **models.CONV4["reptile omniglot"])
    if asked.relu:
        return "Reptile's Omniglot network", net, losses.cross_entropy
    smooth = Functional(net, functools.partial(_smooth, jax.nn.softplus))
    return "Reptile's Omniglot network with softplus for ReLU", smooth, losses.cross_entropy


def _smooth(activation: Callable[[Array], Array], net: models.Conv4, x: Array) -> Array:
    """The network with another activation: ReLU has kinks, where there is no expansion."""
    for conv, norm in net.blocks:
        x = activation(norm(conv(x)))
    return net.head(x.reshape(len(x), -1))


def _tasks(asked: AnalyzeTaylor, k: int) -> TaskDistribution:
    """Tasks whose support is k minibatches: of 10 points, or of 25 images."""
    if asked.tasks == "sinusoid":
        return tasks.sinusoid(shot=10 * k, query=0).train
    return tasks.omniglot(
        WAY, SHOT, 1, train_shot=SHOT * k, train_query=0, protocol="reptile",
        data_root=asked.data_root,
    ).train  # fmt: skip


def _write(path: Path, name: str, result: dict[str, Any], figure: Figure) -> None:
    picture = BytesIO()
    figure.savefig(picture, dpi=160, format="png")
    io.write_atomic(path / f"{name}.png", picture.getvalue())
    keep(path / f"{name}.json", result)

"""What a finished run can do: `adaptax evaluate` and `adaptax predict`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.table import Table

from ..learner import Meta
from ..recipes import ENVIRONMENTS, REGRESSIONS, Experiment, effective
from ..run import Run
from ..task import Batch
from ..tasks import images, sources
from ..tasks.episodes import Design
from ..tasks.mini_imagenet import IMAGENET_MEAN, IMAGENET_STD
from ..tasks.sources import DataError
from .commands import Evaluate, Predict
from .facts import dump
from .progress import scoring
from .training import adapt_and_predict, consoles, experiment_in, show


def evaluate(asked: Evaluate) -> None:
    """`adaptax evaluate`."""
    out, progress = consoles()
    if asked.untrained and asked.ensemble:
        raise ValueError("--untrained is of one network; leave out --ensemble")
    experiment, meta, step, config = load(asked.run, ensemble=asked.ensemble)
    if asked.untrained:
        meta, step = experiment.untrained(), 0
    root = asked.data_root if asked.data_root is not None else config.get("data_root")
    how: dict[str, Any] = {"transductive": asked.transductive, "ensemble": asked.ensemble}
    if asked.episodes is not None:
        how["episodes"] = asked.episodes
    if asked.steps is not None:
        how |= {"steps": asked.steps, "at": None}
    episodes = how.get("episodes", experiment.episodes)
    splits = experiment.splits(root, test=True)
    with scoring(asked.split, episodes, progress) as watch:
        scores = experiment.test(meta, splits, split=asked.split, watch=watch, **how)
    if asked.json:
        print(dump({**scores.to_json(), "run": asked.run, "meta_step": step}))
        return
    show(scores, out, f"{asked.run}, meta-step {step:,}")


def predict(asked: Predict) -> None:
    """`adaptax predict`."""
    experiment, meta, _, _ = load(asked.run)
    if ("conv4" not in experiment.network and "mlp" not in experiment.network) or (
        experiment.tasks in (*REGRESSIONS, *ENVIRONMENTS, "circles")
    ):
        raise ValueError(
            f"{asked.run} was trained on {experiment.tasks}; predict wants a run on images"
        )
    form = image_format(experiment, asked.invert)
    x, y, classes = _support(Path(asked.support), form, experiment.task["way"])
    names, queries = _decode(Path(asked.query), form)
    if asked.steps is not None:
        experiment = dataclasses.replace(
            experiment, learner={**experiment.learner, _steps_name(experiment): asked.steps}
        )
    logits = adapt_and_predict(experiment, meta, Batch(x, y), queries, asked.transductive)
    p = jax.nn.softmax(logits)
    found = np.asarray(p.mean(axis=0) if p.ndim == 3 else p)
    rows: list[dict[str, Any]] = [
        {
            "file": name,
            "label": classes[int(each.argmax())],
            "probability": float(each.max()),
            "probabilities": dict(zip(classes, map(float, each))),
        }
        for name, each in zip(names, found)
    ]
    if asked.json:
        print(dump({"run": asked.run, "classes": classes, "transductive": asked.transductive,
                    "predictions": rows}))  # fmt: skip
        return
    table = Table()
    for heading in ("file", "label", "probability"):
        table.add_column(heading, justify="right" if heading == "probability" else "left")
    for row in rows:
        table.add_row(row["file"], row["label"], f"{row['probability']:.3f}")
    consoles()[0].print(table)


def load(path: str, ensemble: bool = False) -> tuple[Experiment, Meta, int, dict[str, Any]]:
    """A run's experiment, its best meta-parameters and their step, and its configuration.

    For an ensemble, all the meta-parameters that were kept.

    Raises:
        FileNotFoundError: if there is no run.
        ValueError: if its files are broken or do not belong together.
    """
    run = Run(path)
    config = run.config()
    experiment = experiment_in(config, run.path)
    if ensemble and experiment.keep < 2:
        raise ValueError(
            f"{path} kept one checkpoint, which makes no ensemble; train with --keep 3, say"
        )
    best, step, kept = experiment.restore(run)
    return experiment, kept if ensemble else best, step, config


@dataclasses.dataclass(frozen=True)
class ImageFormat:
    """How images become inputs of a network.

    Args:
        size: side in pixels.
        channels: 1 or 3.
        resample: filter.
        design: scales, inverts and normalises.
    """

    size: int
    channels: int
    resample: str
    design: Design


def image_format(experiment: Experiment, invert: bool = False) -> ImageFormat:
    """The format that the images of an experiment had in training.

    Args:
        experiment: on images.
        invert: the other way round: for images that are light where those were dark.
    """
    task = effective(experiment)["task"]
    colour = experiment.tasks in ("mini_imagenet", "celeba")
    channels = task.get("channels", 3 if colour else 1)
    normal: dict[str, Any] = {}
    if task.get("normalise"):
        normal = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}
    inverted = task.get("invert", False) != invert
    design = Design(task.get("way", 2), 1, 0, invert=inverted, **normal)
    resample = task.get("resample", "lanczos")
    return ImageFormat(task.get("image_size", 28), channels, resample, design)


def _support(where: Path, form: ImageFormat, way: int) -> tuple[Any, Any, list[str]]:
    """Inputs, labels and class names of a folder of class folders."""
    if not where.is_dir():
        raise FileNotFoundError(f"--support {where} is not a folder; expected one folder a class")
    classes = sorted(p.name for p in where.iterdir() if p.is_dir() and p.name[0] != ".")
    if len(classes) != way:
        raise DataError(
            f"{where} has {len(classes)} class folders, but the run was trained for {way} ways; "
            f"give it {way}"
        )
    each = [_decode(where / name, form)[1] for name in classes]
    labels = np.repeat(np.arange(way, dtype=np.int32), [len(x) for x in each])
    return jnp.concatenate(each), jnp.asarray(labels), classes


def _decode(where: Path, form: ImageFormat) -> tuple[list[str], Any]:
    """Names and inputs of all images below a folder."""
    with sources.open_files(where) as files:
        names = [name for name in files.names if images.is_image(name)]
        if not names:
            raise DataError(f"{where} holds no images; expected files such as 01.png")
        pixels = np.empty((len(names), form.size, form.size, form.channels), np.uint8)
        images.decode_into(pixels, files, names, resample=form.resample)
    return names, form.design.inputs(jnp.asarray(pixels))


def _steps_name(experiment: Experiment) -> str:
    return "inner_steps" if experiment.algorithm == "meta-sgd" else "eval_steps"

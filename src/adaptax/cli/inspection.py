"""What a finished run can do: `adaptax evaluate` and `adaptax predict`."""

from __future__ import annotations

import csv
import dataclasses
import glob
import importlib.util
import os
import zipfile
from collections.abc import Callable
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from rich.table import Table

from .. import io, metrics
from ..recipes import Experiment, changed, effective
from ..recipes.runs import adapt_and_predict, load_run
from ..report.record import dump
from ..task import Batch
from ..tasks import images
from ..tasks.episodes import Design
from ..tasks.files import DataError, Files, is_hidden, open_files
from ..tasks.mini_imagenet import IMAGENET_MEAN, IMAGENET_STD
from ..text import shown
from .commands import Evaluate, Predict
from .console import consoles
from .progress import scoring
from .training import show


def evaluate(options: Evaluate) -> None:
    """`adaptax evaluate`."""
    out, console = consoles()
    if options.untrained and options.ensemble:
        raise ValueError("--untrained is of one network; leave out --ensemble")
    run = load_run(options.run, path=options.path, data_root=options.data_root, trust=options.trust)
    run = run.untrained() if options.untrained else run
    how: dict[str, Any] = {"transductive": options.transductive}
    if options.episodes is not None:
        how["episodes"] = options.episodes
    if options.steps is not None:
        how |= {"steps": options.steps, "at": None}
    episodes = how.get("episodes", run.experiment.episodes)
    with scoring(options.split, episodes, console) as watch:
        scores = run.evaluate(split=options.split, ensemble=options.ensemble, watch=watch, **how)
    if options.json:
        print(dump({**scores.to_json(), "run": options.run, "meta_step": run.step}))
        return
    show(scores, out, f"{options.run}, meta-step {run.step:,}")


def predict(options: Predict) -> None:
    """`adaptax predict`."""
    run = load_run(options.run, path=options.path, data_root=options.data_root, trust=options.trust)
    experiment = run.experiment
    if not experiment.family.has("images"):
        raise ValueError(
            f"{options.run} was trained on {experiment.tasks}; predict wants a run on images"
        )
    table = None if options.out is None else _table_format(Path(options.out))
    form = image_format(experiment, options.invert)
    x, y, classes = _support(Path(options.support), form)
    experiment = _for_classes(experiment, len(classes), options.support)
    names, queries = _queries(options.query, form)
    if options.steps is not None:
        learner = {**experiment.learner, _steps_name(experiment): options.steps}
        experiment = dataclasses.replace(experiment, learner=learner, evaluation={})
    logits = adapt_and_predict(
        experiment, run.meta, Batch(x, y), queries, options.transductive, len(classes)
    )
    if not bool(jnp.isfinite(logits).all()):
        raise ValueError(
            f"adaptation to {options.support} diverged, and the predictions are not finite; take "
            "fewer --steps"
        )
    rows = _rows(names, classes, logits)
    if table is not None:
        io.write_atomic(Path(options.out or ""), table(rows))
    if options.json:
        print(dump({"run": options.run, "classes": classes, "transductive": options.transductive,
                    "predictions": rows}))  # fmt: skip
        return
    shown_table = Table()
    for heading in ("file", "label", "probability", "entropy"):
        shown_table.add_column(heading, justify="left" if heading in ("file", "label") else "right")
    for row in rows:
        cells = (f"{row['probability']:.3f}", f"{row['entropy']:.3f}")
        shown_table.add_row(shown(row["file"]), shown(row["label"]), *cells)
    out = consoles()[0]
    out.print(shown_table)
    if table is not None:
        out.print(f"predictions: {shown(options.out)}", soft_wrap=True)


def _for_classes(experiment: Experiment, count: int, support: str) -> Experiment:
    """The experiment for as many classes as the support has.

    A head of n outputs can tell fewer classes apart, by its first outputs: they are as good as any,
    since training drew classes in random order. Nearest class means need no head.

    Raises:
        DataError: if there are too few, or more than the head has outputs.
    """
    way = experiment.way or 1
    if count < 2:
        raise DataError(f"{support} has {count} class folders; expected two or more")
    if experiment.row.untrained:
        return changed(experiment, {"task": {"way": count}})
    if count > way:
        raise DataError(
            f"{support} has {count} class folders, but the run was trained for {way} ways and its "
            f"head has {way} outputs; give it {way} or fewer, or train with --way {count}"
        )
    return experiment


def _rows(names: list[str], classes: list[str], logits: Array) -> list[dict[str, Any]]:
    """What is said of each query: the label, how probable, and how unsure the model is, in nats."""
    unsure = jax.vmap(lambda one: metrics.uncertainty(one[..., None, :]), in_axes=-2)(logits)
    p = jax.nn.softmax(logits)
    found = np.asarray(p.mean(axis=0) if p.ndim == 3 else p)
    return [
        {
            "file": name,
            "label": classes[int(each.argmax())],
            "probability": float(each.max()),
            **{of: float(values[i]) for of, values in unsure.items()},
            "probabilities": dict(zip(classes, map(float, each))),
        }
        for i, (name, each) in enumerate(zip(names, found))
    ]


def _table_format(file: Path) -> Callable[[list[dict[str, Any]]], bytes]:
    """What writes predictions into a file of this name: a column a class, `p_CLASS`.

    Raises:
        ValueError: if the name ends in no format that is known, or a library is missing.
    """

    def flat(row: dict[str, Any]) -> dict[str, Any]:
        rest = {name: value for name, value in row.items() if name != "probabilities"}
        return rest | {f"p_{name}": p for name, p in row["probabilities"].items()}

    def as_csv(rows: list[dict[str, Any]]) -> bytes:
        text = StringIO(newline="")
        writer = csv.DictWriter(text, list(flat(rows[0])))
        writer.writeheader()
        writer.writerows(map(flat, rows))
        return text.getvalue().encode("utf-8", "surrogateescape")  # names of files as they are

    def as_json(rows: list[dict[str, Any]]) -> bytes:
        return f"{dump(rows)}\n".encode()

    def as_parquet(rows: list[dict[str, Any]]) -> bytes:
        import pyarrow.parquet

        out = BytesIO()
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([*map(flat, rows)]), out)
        return out.getvalue()

    match file.suffix.lower():
        case ".csv":
            return as_csv
        case ".json":
            return as_json
        case ".parquet":
            if importlib.util.find_spec("pyarrow") is None:
                raise ValueError("a .parquet file wants pyarrow (pip install pyarrow); write .csv "
                                 "or .json instead")  # fmt: skip
            return as_parquet
    raise ValueError(f"--out {shown(file)} should end in .csv, .json or .parquet")


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
    channels = task.get("channels", experiment.family.channels)
    normal: dict[str, Any] = {}
    if task.get("normalise"):
        normal = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}
    inverted = task.get("invert", False) != invert
    design = Design(task.get("way", 2), 1, 0, invert=inverted, **normal)
    resample = task.get("resample", "lanczos")
    return ImageFormat(task.get("image_size", 28), channels, resample, design)


def _support(where: Path, form: ImageFormat) -> tuple[Any, Any, list[str]]:
    """Inputs, labels and class names of a folder of class folders."""
    if not where.is_dir():
        raise FileNotFoundError(f"--support {where} is not a folder; expected one folder a class")
    classes = sorted(p.name for p in where.iterdir() if p.is_dir() and not is_hidden(p.name))
    each = [_decode(where / name, form)[1] for name in classes]
    if not each:
        raise DataError(f"{where} has no class folders; expected one folder a class")
    labels = np.repeat(np.arange(len(classes), dtype=np.int32), [len(x) for x in each])
    return jnp.concatenate(each), jnp.asarray(labels), classes


def _queries(words: tuple[str, ...], form: ImageFormat) -> tuple[list[str], Any]:
    """Names and inputs of files, of the images below folders or in archives, and of patterns."""
    names: list[str] = []
    inputs = []
    for word in words:
        found = [word] if os.path.lexists(word) else sorted(glob.glob(word, recursive=True))
        if not found:
            raise FileNotFoundError(f"--query {word}: there is no such file or folder")
        for one in found:
            some, x = _decode(Path(one), form)
            # Of a single folder the names are those below it.
            alone = len(words) == len(found) == 1
            names += [one if name == "" else name if alone else f"{one}/{name}" for name in some]
            inputs.append(x)
    if not inputs:
        raise ValueError("--query wants files or folders of images")
    return names, jnp.concatenate(inputs)


def _decode(where: Path, form: ImageFormat) -> tuple[list[str], Any]:
    """Names and inputs of all images below a folder or in an archive, or of one file, named ""."""
    if where.is_file() and not zipfile.is_zipfile(where):
        one = Files(where.parent, ("",), "", lambda name: where.read_bytes())
        return [""], _pixels(one, [""], form)
    if where.exists() and not (where.is_dir() or where.is_file()):
        raise DataError(f"{where} is neither a file nor a folder")
    with open_files(where) as files:
        names = [name for name in files.names if images.is_image(name)]
        if not names:
            raise DataError(f"{where} holds no images; expected files such as 01.png")
        return names, _pixels(files, names, form)


def _pixels(files: Files, names: list[str], form: ImageFormat) -> Any:
    pixels = np.empty((len(names), form.size, form.size, form.channels), np.uint8)
    images.decode_into(pixels, files, names, resample=form.resample)
    return form.design.inputs(jnp.asarray(pixels))


def _steps_name(experiment: Experiment) -> str:
    return "eval_steps" if "eval_steps" in experiment.settings else "inner_steps"

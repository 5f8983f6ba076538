"""What a finished run can do: `adaptax evaluate` and `adaptax predict`."""

from __future__ import annotations

import csv
import dataclasses
import importlib.util
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
from ..recipes import Experiment, changed
from ..recipes.photos import image_format, queries_in, support_in
from ..recipes.runs import adapt_and_predict, load_run
from ..report.record import dump
from ..task import Batch
from ..text import shown
from . import rows
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
    if not (experiment.family.has("images") or experiment.family.has("rows")):
        raise ValueError(
            f"{options.run} was trained on {experiment.tasks}; predict wants a run on images or on "
            "a table"
        )
    table = None if options.out is None else _table_format(Path(options.out))
    if experiment.family.has("rows"):
        rows.predict(run, options, table)
        return
    form = image_format(experiment, options.invert)
    x, y, classes = support_in(Path(options.support), form)
    experiment = _for_classes(experiment, len(classes), options.support)
    names, queries = queries_in(options.query, form)
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
    found = _rows(names, classes, logits)
    if table is not None:
        io.write_atomic(Path(options.out or ""), table(found))
    if options.json:
        print(dump({"run": options.run, "classes": classes, "transductive": options.transductive,
                    "predictions": found}))  # fmt: skip
        return
    shown_table = Table()
    for heading in ("file", "label", "probability", "entropy"):
        shown_table.add_column(heading, justify="left" if heading in ("file", "label") else "right")
    for row in found:
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
        ValueError: if there are too few, or more than the head has outputs.
    """
    way = experiment.way or 1
    if count < 2:
        raise ValueError(f"{support} has {count} class folders; expected two or more")
    if experiment.row.untrained:
        return changed(experiment, {"task": {"way": count}})
    if count > way:
        raise ValueError(
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
        return rest | {f"p_{name}": p for name, p in row.get("probabilities", {}).items()}

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


def _steps_name(experiment: Experiment) -> str:
    return "eval_steps" if "eval_steps" in experiment.settings else "inner_steps"

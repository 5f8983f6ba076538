"""Feature extractors: `adaptax pretrain` and `adaptax embed`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from .. import processes, report
from ..engine.run import Run
from ..recipes.extractors import (
    FAMILIES,
    embed_archive,
    embed_run,
    extractor_config,
    extractor_config_in,
    fit_extractor,
)
from ..recipes.runs import free_folder
from ..report.record import dump, facts, keep
from .commands import Embed, Pretrain
from .console import consoles
from .progress import Shown

OF_THE_COMMAND = ("resume", "minutes", "json", "coordinator", "processes", "process_id")
"""Options of `pretrain` that are no settings of a run."""


def pretrain(options: Pretrain) -> None:
    """`adaptax pretrain`."""
    out, console = consoles()
    path, config = _resumed(options) if options.resume is not None else _begun(options)
    result, config = fit_extractor(config, path, Shown(console))
    seconds = sum(record["seconds"] for record in result.history)
    curve = {"learning_curve": report.learning_curve(result.history)} if result.history else {}
    summary: dict[str, Any] = {
        "run": str(path),
        "accuracy": result.accuracy,
        "command": config["command"],
        **facts(),
        "training": {"steps": result.step, "seconds": seconds, "stopped": result.stopped},
        "config": config,
        "plots": report.save(curve, path) if processes.first() else [],
    }
    keep(path / "pretrained.json", summary)
    if options.json:
        print(dump(summary))
        return
    if result.accuracy is not None:
        shown = report.number("accuracy", result.accuracy)
        out.print(f"accuracy on held-out images of the train classes: {shown}", soft_wrap=True)
    out.print(f"trained {result.step:,} steps in {seconds:.0f} s", soft_wrap=True)
    out.print(f"run folder: {path}; extract its features with: adaptax embed {path}",
              soft_wrap=True)  # fmt: skip


def embed(options: Embed) -> None:
    """`adaptax embed`."""
    if (options.run is None) == (options.archive is None):
        raise ValueError("embed wants the folder of a run, or --archive, one of them")
    out, console = consoles()
    if options.run is not None:
        summary = embed_run(
            options.run,
            options.out,
            batch=options.batch,
            layer=options.layer,
            data_root=options.data_root,
            progress=Shown(console),
        )
    elif options.out is None:
        raise ValueError("--archive wants --out, the file to write")
    else:
        summary = embed_archive(options.archive or "", options.out, options.view)
    if options.json:
        print(dump(summary))
        return
    counts = ", ".join(f"{split} {of['embeddings']:,} of {of['classes']} classes"
                       for split, of in summary["splits"].items())  # fmt: skip
    out.print(f"{summary['file']}: embeddings of width {summary['width']}, {counts}",
              soft_wrap=True)  # fmt: skip


def _begun(options: Pretrain) -> tuple[Path, dict[str, Any]]:
    """Return the folder and the configuration of a new run."""
    if options.data is None:
        raise ValueError(f"pretrain wants the data: {', '.join(FAMILIES)}; or --resume RUN")
    own = {n: v for n, v in vars(options).items() if n not in ("run", *OF_THE_COMMAND)}
    config = extractor_config(**own)
    name = f"pretrain-{options.backbone}-{options.data}"
    return Path(options.run or processes.from_first(lambda: str(free_folder(name)))), config


def _resumed(options: Pretrain) -> tuple[Path, dict[str, Any]]:
    """Return the folder and the configuration of a run that goes on."""
    for field in dataclasses.fields(Pretrain):
        if field.name not in ("data_root", *OF_THE_COMMAND) and (
            getattr(options, field.name) != field.default
        ):
            raise ValueError(
                "a run goes on with its own settings; leave out "
                f"--{field.name.replace('_', '-')}, or start a new run"
            )
    path = Path(options.resume or "")
    config = processes.from_first(lambda: extractor_config_in(Run(path)))
    return path, config if options.data_root is None else {**config, "data_root": options.data_root}

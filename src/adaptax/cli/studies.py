"""`adaptax compare`, `ablate` and `analyze`: run a study, print its table, keep its results."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .. import studies
from ..process import TimeOver, ended
from ..report.record import dump
from .commands import Ablate, AnalyzeActive, AnalyzeGradients, AnalyzeTaylor, Compare
from .console import consoles
from .progress import Shown


def compare(options: Compare) -> None:
    """`adaptax compare`."""
    if options.tasks is None:
        raise ValueError("name a task family to compare on, such as sinusoid")
    _run(studies.compare, options, ["compare", options.tasks], "tasks")


def ablate(options: Ablate) -> None:
    """`adaptax ablate`."""
    _run(studies.ablate, options, ["ablate", str(options.tasks)], "tasks")


def gradients(options: AnalyzeGradients) -> None:
    """`adaptax analyze gradients`."""
    _run(studies.analyze_gradients, options, ["analyze", "gradients"])


def taylor(options: AnalyzeTaylor) -> None:
    """`adaptax analyze taylor`."""
    _run(studies.analyze_taylor, options, ["analyze", "taylor", options.tasks], "tasks")


def active(options: AnalyzeActive) -> None:
    """`adaptax analyze active`."""
    _run(studies.analyze_active, options, ["analyze", "active", *options.runs], "runs")


def _run(
    study: Callable[..., studies.Study], options: Any, words: Sequence[str], positional: str = ""
) -> None:
    """Run a study with the options of its command, and show what it found.

    Args:
        study: takes the options by their names.
        options: of the command.
        words: of the command, with its positional ones.
        positional: the option that these are.
    """
    out, console = consoles()
    again: list[str] = []

    def go_on(folder: Path) -> str:
        again.append(command(options, words, positional, folder))
        return again[0]

    of_the_command = ("json", "format", "minutes")
    own = {name: v for name, v in vars(options).items() if name not in of_the_command}
    try:
        found = study(**own, progress=Shown(console), command=go_on)
        result = found.save(format=options.format)
    except KeyboardInterrupt as stop:
        line = again[0] if again else "the same command"
        kept = f"what is trained is kept; go on with: {line}"
        raise ended(isinstance(stop, TimeOver), kept) from None
    if options.json:
        print(dump(result))
        return
    out.print(found.table)
    for note in found.notes:
        out.print(note, soft_wrap=True)
    files = [f"{found.name}.json", *(Path(plot).name for plot in result["plots"])]
    out.print(f"results: {found.lab.folder} ({', '.join(files)}, table.csv, table.tex)",
              soft_wrap=True)  # fmt: skip


def command(options: Any, words: Sequence[str], positional: str, folder: Path) -> str:
    """Return the line that asks for the same in a folder.

    Args:
        options: of the command, a dataclass.
        words: of the command, with its positional ones.
        positional: the option that these are.
        folder: to write.
    """
    line = ["adaptax", *words]
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if field.name in (positional, "out", "json") or value == field.default:
            continue
        many = value if isinstance(value, tuple) else () if value is True else (value,)
        line += [f"--{field.name.replace('_', '-')}", *map(str, many)]
    return shlex.join([*line, "--out", str(folder)])

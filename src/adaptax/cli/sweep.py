"""`adaptax sweep`: a worker of a sweep, its table, figure and best recipe."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from .. import report
from ..recipes import Recipe, table
from ..recipes.settings import with_path, with_settings
from ..recipes.sweep import Sweep as Trials
from ..recipes.sweep import domain
from ..report.record import dump, facts, keep
from ..report.tables import Sheet
from . import settings
from .commands import Sweep
from .console import consoles
from .progress import Shown
from .studies import command


def sweep(options: Sweep) -> None:
    """`adaptax sweep`."""
    table.trust(*options.trust)
    found = settings.recipe(options.name)
    experiment = with_settings(found.experiment, options.set)
    if options.steps is not None:
        experiment = type(experiment).from_json({**experiment.to_json(), "steps": options.steps})
    if "path" not in experiment.task or options.path is not None:
        experiment = with_path(experiment, options.path)
    if not options.over:
        raise ValueError("name what to try: --over learner.inner_lr=0.001..0.5")
    folder = Path(options.out or f"runs/sweep-{found.name}")
    work = Trials(
        Recipe(found.name, found.about, found.paper, experiment),
        [domain(text) for text in options.over],
        folder,
        options.trials,
        options.seeds,
        options.storage,
        {"data_root": options.data_root, "validate_every": options.validate_every},
    )
    out, console = consoles()
    line = command(options, ["sweep", options.name], "name", folder)
    study = work.study()
    work.work(study, Shown(console), line)
    result: dict[str, Any] = {**work.result(study), "command": line, **facts()}
    sheet = _sheet(result)
    figures = {"sweep": report.sweep(result["trials"])} if result["best"] else {}
    result["plots"] = report.save(figures, folder, options.format)
    keep(folder / "sweep.json", result)
    (folder / "table.csv").write_text(sheet.csv(), encoding="utf-8")
    if options.json:
        print(dump(result))
        return
    out.print(sheet)
    states = [row["state"] for row in result["trials"]]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    out.print(f"{len(states)} trials: {counts}", soft_wrap=True)
    if result["best"]:
        out.print(f"train the best and test it: adaptax recipes run {shlex.quote(result['best'])}",
                  soft_wrap=True)  # fmt: skip
    out.print(f"sweep: {folder} (sweep.json, table.csv, sweep.png)", soft_wrap=True)


def _sheet(result: dict[str, Any]) -> Sheet:
    names = list(result["over"])
    rows = [
        [
            f"{row['trial']}",
            row["state"],
            "" if row["score"] is None else f"{row['score']:.4g}",
            f"{row['steps']:,}",
            *(_shown(row["settings"].get(name, "")) for name in names),
        ]
        for row in result["trials"]
    ]
    title = f"{result['recipe']}: validation score, larger is better"
    return Sheet(["trial", "state", "score", "meta-steps", *names], rows, title)


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)

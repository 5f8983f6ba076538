"""`adaptax compare` of environments: returns by gradient step, beside baselines and the paper's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console

from ..engine.report import Report
from ..process import Interrupted
from ..recipes import (
    COMPARED_IN,
    RETURNS,
    TITLES,
    Experiment,
    changed,
    oracle,
    shortened,
)
from ..recipes.runs import Trained, fit_or_resume
from ..report import protocol_line, returns, returns_table
from . import settings
from .commands import Compare
from .console import consoles, free_folder, save_figure
from .facts import command, dump, facts, keep
from .progress import Shown
from .training import behaviour

RANDOM, ORACLE = "Random policy", "Oracle"
STOPPED = "Pretrained, stopped early"
"""By the returns after adaptation on validation goals, as the meta-learners are; joint training
itself has nothing to stop by, and the row `Pretrained` is of its end, as in MAML's paper."""


def compare(asked: Compare) -> None:
    """Train, test, and write the comparison."""
    tasks = str(asked.tasks)
    experiments = _experiments(asked, tasks)
    path = Path(asked.out) if asked.out else free_folder(f"compare-{tasks}")
    go_on = command(asked, "compare", str(asked.tasks), out=path)
    out, progress = consoles()
    trained: dict[str, Trained] = {}
    try:
        for name, experiment in experiments.items():
            trained[name] = fit_or_resume(
                experiment, path / name.lower(), go_on, Shown(progress), data_root=None
            )
        found = {}
        for name, one in trained.items():
            meta = one.last if name == "pretrained" else one.meta
            found[TITLES.get(name, name)] = one.experiment.test(meta, one.test)
            if name == "pretrained":
                found[STOPPED] = one.experiment.test(one.meta, one.test)
        first = next(iter(trained.values()))
        found[RANDOM] = first.experiment.test(first.experiment.untrained(), first.test)
        _finish(found, trained, asked, tasks, path, out)
    except KeyboardInterrupt:
        raise Interrupted(f"interrupted; what is trained is kept, go on with: {go_on}") from None


def _experiments(asked: Compare, tasks: str) -> dict[str, Experiment]:
    if any(value is not None for value in (asked.way, asked.shot, asked.path)) or asked.seeds != 1:
        raise ValueError(f"{tasks} has no --way, --shot, --path or --seeds; leave them out")
    names = settings.known(asked.algorithms or COMPARED_IN[tasks])
    changes = {"steps": asked.steps, "evaluation": {"goals": asked.episodes}}
    found = {name: changed(shortened(name, tasks), changes) for name in names}
    if tasks == "navigation":
        found[ORACLE] = oracle(next(iter(found.values())))
    return found


def _finish(
    found: dict[str, Report],
    trained: dict[str, Trained],
    asked: Compare,
    tasks: str,
    path: Path,
    out: Console,
) -> None:
    paper = RETURNS.get(tasks, {})
    goals = next(iter(found.values())).protocol["goals"]
    title = f"{tasks}, return by gradient step, {goals} test tasks"
    figures = {"returns": returns.returns_by_step(found, paper=paper, title=title)}
    figures |= behaviour(next(iter(trained.values())))
    plots = [save_figure(figure, path / f"{name}.png") for name, figure in figures.items()]
    by_title = {TITLES.get(name, name): one for name, one in trained.items()}
    if "pretrained" in trained:
        by_title[STOPPED] = trained["pretrained"]
    rows: list[dict[str, Any]] = []
    for name, scores in found.items():
        one = by_title.get(name)
        about: dict[str, Any] = {}
        if one is not None:
            last = one.experiment.algorithm == "pretrained" and name not in (STOPPED, ORACLE)
            about = {
                "seconds": one.seconds,
                "step": one.experiment.steps if last else one.step,
                "experiment": one.experiment.to_json(),
            }
        rows.append({"name": name, "paper": paper.get(name, {}), **about, **scores.to_json()})
    result = {
        "title": title,
        "rows": rows,
        "command": command(asked, "compare", str(asked.tasks), out=path),
        "plots": [str(plot) for plot in plots],
        **facts(),
    }
    keep(path / "comparison.json", result)
    if asked.json:
        print(dump(result))
        return
    out.print(returns_table(found, title, paper))
    out.print("± is the 95 % confidence interval over tasks; every learner sees the same ones.")
    for row in rows:
        if "step" in row:
            out.print(f"{row['name']}: of meta-iteration {row['step']}, {row['seconds']:.0f} s")
    for name, scores in found.items():
        out.print(f"{name}: {protocol_line(scores.protocol)}", soft_wrap=True)
    names = ", ".join(plot.name for plot in plots)
    out.print(f"results: {path} (comparison.json, {names})", soft_wrap=True)

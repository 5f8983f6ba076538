"""`adaptax ablate`: what each part of MAML++ is worth, on the same episodes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from rich.console import Console

from .. import report
from ..engine.report import Report
from ..process import Interrupted
from ..recipes import ROWS, Experiment, ablated, changed
from ..recipes.runs import Trained, fit_or_resume
from .commands import Ablate
from .console import consoles, free_folder, save_figure
from .facts import command, dump, facts, keep
from .progress import Shown, scoring

UNVERIFIED = "the paper's numbers are quoted from memory, unverified"


@dataclasses.dataclass(frozen=True)
class Scored:
    """A row of the ablation: its training, and the scores of the single model and the ensemble."""

    row: str
    trained: Trained
    single: Report
    ensemble: Report

    def cells(self, paper: bool) -> dict[str, Any]:
        """As `report.comparison_table` and `report.ablation` want it."""
        metric = self.single.primary
        reports = {"single model": self.single, "ensemble of the best 3": self.ensemble}
        return {
            "name": ROWS[self.row].name,
            "metric": metric,
            "scores": {name: (r.mean(metric), r.ci95(metric)) for name, r in reports.items()},
            "paper": f"{ROWS[self.row].paper} %" if paper else "no number",
            "seconds": self.trained.seconds,
        }


def ablate(asked: Ablate) -> None:
    """Train every row, test, and write the table."""
    experiments = _experiments(asked)
    next(iter(experiments.values())).splits(asked.data_root)  # bad data are told first
    path = Path(asked.out) if asked.out else free_folder(f"ablate-{asked.tasks}")
    go_on = command(asked, "ablate", str(asked.tasks), out=path)
    out, progress = consoles()
    try:
        scored = [
            _score(row, experiment, asked, path, go_on, progress)
            for row, experiment in experiments.items()
        ]
        _finish(scored, asked, path, out)
    except KeyboardInterrupt:
        raise Interrupted(f"interrupted; what is trained is kept, go on with: {go_on}") from None


def _experiments(asked: Ablate) -> dict[str, Experiment]:
    if asked.tasks in (None, "sinusoid", "folder"):
        raise ValueError(
            "the ablation is of image classification; choose omniglot, mini_imagenet or glyphs"
        )
    for row in asked.rows:
        if row not in ROWS:
            raise ValueError(f"{row!r} is no row of the ablation; there are {', '.join(ROWS)}")
    changes = {
        "steps": asked.steps,
        "meta_batch": asked.meta_batch,
        "evaluation": {"episodes": asked.episodes},
        "seed": asked.seed,
    }
    return {
        row: changed(ablated(row, asked.tasks or "", asked.way, asked.shot), changes)
        for row in dict.fromkeys(asked.rows or ROWS)
    }


def _score(
    row: str,
    experiment: Experiment,
    asked: Ablate,
    path: Path,
    go_on: str,
    console: Console,
) -> Scored:
    trained = fit_or_resume(
        experiment, path / row, go_on, Shown(console), data_root=asked.data_root,
        validate_every=max(experiment.steps // 10, 1),
    )  # fmt: skip
    reports = []
    for name, meta in (("single model", trained.meta), ("ensemble", trained.kept)):
        with scoring(f"{ROWS[row].name}, {name}", asked.episodes, console) as watch:
            reports.append(
                experiment.test(meta, trained.test, ensemble=name == "ensemble", watch=watch)
            )
    return Scored(row, trained, *reports)


def _finish(scored: list[Scored], asked: Ablate, path: Path, out: Console) -> None:
    paper = (asked.tasks, asked.way, asked.shot) == ("omniglot", 20, 1)
    rows = [one.cells(paper) for one in scored]
    shape = scored[0].single.protocol
    title = (
        f"MAML++ on {asked.tasks}, {asked.way}-way {asked.shot}-shot, {asked.steps:,} meta-steps "
        f"of {asked.meta_batch} tasks, {shape['episodes']} test episodes"
    )
    plot = save_figure(report.ablation(rows, title=title), path / "ablation.png")
    result = {
        "title": title,
        "rows": [
            {
                "row": one.row,
                "name": cells["name"],
                "paper": cells["paper"],
                "seconds": cells["seconds"],
                "best_step": one.trained.step,
                "single": one.single.to_json(),
                "ensemble": one.ensemble.to_json(),
                "experiment": one.trained.experiment.to_json(),
            }
            for one, cells in zip(scored, rows)
        ],
        "note": UNVERIFIED,
        "command": command(asked, "ablate", str(asked.tasks), out=path),
        "plots": [str(plot)],
        **facts(),
    }
    keep(path / "ablation.json", result)
    if asked.json:
        print(dump(result))
        return
    out.print(report.comparison_table(rows, title))
    out.print("± is the 95 % confidence interval over episodes; every row sees the same ones.")
    if paper:
        out.print(f"{UNVERIFIED}; theirs are of 125,000 meta-steps, ± over 3 seeds")
    out.print(report.summary(scored[-1].single), soft_wrap=True)
    out.print(f"results: {path} (ablation.json, {plot.name})", soft_wrap=True)

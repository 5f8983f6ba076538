"""What each part of MAML++ is worth, on the same episodes: `ablate`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .. import report
from ..recipes import ROWS, ablated, changed
from .study import Lab, Row, Study

UNVERIFIED = "the paper's numbers are quoted from memory, unverified"
KINDS = {"single": "single model", "ensemble": "ensemble of the best 3"}


def ablate(
    tasks: str = "omniglot",
    rows: Sequence[str] = (),
    *,
    way: int = 20,
    shot: int = 1,
    steps: int = 1000,
    meta_batch: int = 4,
    episodes: int = 600,
    seed: int = 0,
    **where: Any,
) -> Study:
    """Train MAML, MAML with each part of MAML++, and MAML++, and test them on the same episodes.

    The single model is scored, and beside it the ensemble of the best 3 checkpoints by validation.

    Args:
        tasks: `"omniglot"`, `"mini_imagenet"` or `"glyphs"`.
        rows: names in `adaptax.recipes.ROWS`; all if empty.
        way: classes an episode.
        shot: support examples a class.
        steps: meta-steps.
        meta_batch: tasks a meta-step.
        episodes: of the test.
        seed: names all randomness.
        where: `out`, `data_root` and `progress` of `Lab.at`.

    Raises:
        ValueError: for other tasks or rows.
    """
    if tasks not in ("omniglot", "mini_imagenet", "glyphs"):
        raise ValueError(
            "the ablation is of image classification; choose omniglot, mini_imagenet or glyphs"
        )
    for row in rows:
        if row not in ROWS:
            raise ValueError(f"{row!r} is no row of the ablation; there are {', '.join(ROWS)}")
    lab = Lab.at(f"ablate-{tasks}", **where)
    changes = {
        "steps": steps,
        "meta_batch": meta_batch,
        "evaluation": {"episodes": episodes},
        "seed": seed,
    }
    experiments = {
        row: changed(ablated(row, tasks, way, shot), changes) for row in dict.fromkeys(rows or ROWS)
    }
    lab.check(experiments)
    found = []
    for row, experiment in experiments.items():
        trained = lab.fit(experiment, row, validate_every=max(steps // 10, 1))
        title, ensemble = ROWS[row].name, KINDS["ensemble"]
        single = lab.test(experiment, trained.meta, trained.test, f"{title}, single model")
        best = lab.test(
            experiment, trained.kept, trained.test, f"{title}, {ensemble}", ensemble=True
        )
        about = {"row": row, "reports": {"single": single, "ensemble": best}}
        found.append(Row(title, [single], about, [trained]))
    quoted = (tasks, way, shot) == ("omniglot", 20, 1)
    title = (
        f"MAML++ on {tasks}, {way}-way {shot}-shot, {steps:,} meta-steps of {meta_batch} tasks, "
        f"{episodes} test episodes"
    )
    return _study(lab, found, title, quoted)


def _study(lab: Lab, rows: Sequence[Row], title: str, quoted: bool) -> Study:
    metric = rows[0].report.primary
    cells = [
        {
            "name": row.name,
            "metric": metric,
            "scores": {
                KINDS[kind]: (one.mean(metric), one.ci95(metric))
                for kind, one in row.record["reports"].items()
            },
            "paper": f"{ROWS[row.record['row']].paper} %" if quoted else "no number",
            "seconds": row.seconds,
        }
        for row in rows
    ]
    record = {
        "title": title,
        "rows": [
            {
                "row": row.record["row"],
                "name": row.name,
                "paper": own["paper"],
                "seconds": row.seconds,
                "best_step": row.trained[0].step,
                **{kind: one.to_json() for kind, one in row.record["reports"].items()},
                "experiment": row.experiment.to_json(),
            }
            for row, own in zip(rows, cells)
        ],
        "note": UNVERIFIED,
    }
    theirs = [f"{UNVERIFIED}; theirs are of 125,000 meta-steps, ± over 3 seeds"] if quoted else []
    return Study(
        "ablation",
        lab,
        rows,
        report.comparison_table(cells, title),
        lambda: {"ablation": report.ablation(cells, title=title)},
        record,
        [
            "± is the 95 % confidence interval over episodes; every row sees the same ones.",
            *theirs,
            report.summary(rows[-1].report),
        ],
    )

"""Conformal intervals of every learner: what they promise for new tasks, and what they hold.

    python benchmarks/intervals.py --families sinusoid sinusoid_or_line fsmol

Each learner is meta-trained for `--steps`, calibrated over validation tasks, and checked on test
tasks. FS-Mol has 39 assays for validation, few to calibrate on: what is reported beside that is the
mean over `--halves` random halves of the validation and test assays together, calibrated on one and
checked on the other, so that the luck of one calibration is told from a promise that is not kept.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import jax
import measure
import numpy as np

import adaptax as ax
from adaptax.engine.conformal import LEVELS, Scores, quantile, scored
from adaptax.recipes import TITLES, Experiment, changed, comparable

OUT = Path(__file__).parent / "results" / "intervals.json"
LEARNERS = {
    "sinusoid": ("maml", "fomaml", "reptile", "anil", "meta-sgd", "maml++", "gp"),
    "sinusoid_or_line": ("maml", "platipus", "bmaml", "emaml"),
    "fsmol": ("ridge", "anil", "gp"),
}


def halves(found: Scores, times: int) -> dict[str, dict[str, float]]:
    """Calibrate on one random half of the tasks and check on the other, many times."""
    rng, count = np.random.default_rng(0), len(found.score)
    held: dict[str, list[float]] = {f"{level:g}": [] for level in LEVELS}
    score, weight = found.score[..., 0], found.weight[..., 0]
    for _ in range(times):
        order = rng.permutation(count)
        one, other = order[: count // 2], order[count // 2 :]
        for level in LEVELS:
            inside = (score[other] <= quantile(score[one], weight[one], level)) * weight[other]
            held[f"{level:g}"].append(float(np.mean(inside.sum(1) / weight[other].sum(1))))
    return {name: {"coverage": float(np.mean(v)), "std": float(np.std(v))}
            for name, v in held.items()}  # fmt: skip


def cell(family: str, name: str, steps: int, episodes: int, times: int) -> dict:
    """Train, calibrate and check one learner on one family."""
    experiment = changed(comparable(name, family), {"steps": steps})
    splits = experiment.splits(test=True)
    start = None
    if experiment.init_from:
        first = changed(Experiment.from_json(experiment.init_from), {"steps": steps})
        start = first.train(first.splits()).meta
    meta = experiment.train(experiment.splits(), init_from=start).meta
    learner = experiment.build_learner()
    how = {"noise": "support", "episodes": None if family == "fsmol" else episodes}
    found = ax.conformal(learner, meta, splits.val, key=jax.random.key(1), **how)
    rows = found.check(splits.test, key=jax.random.key(2), episodes=how["episodes"])
    out = {
        "family": family,
        "algorithm": name,
        "title": TITLES.get(name, name),
        "calibration_tasks": len(found.scores.score),
        "rows": [row.to_json() for row in rows],
        "experiment": experiment.to_json(),
    }
    if family == "fsmol":
        test = scored(learner, meta, splits.test, key=jax.random.key(2), noise="support")
        out["halves"] = halves(Scores.joined([found.scores, test]), times)
    for row in rows:
        print(f"{family} {name} {row}", flush=True)
    for level, of in out.get("halves", {}).items():
        print(f"{family} {name} halves {level}: {of['coverage']:.3f} ± {of['std']:.3f}", flush=True)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--families", nargs="+", default=[*LEARNERS], choices=[*LEARNERS])
    parser.add_argument("--learners", nargs="+")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--episodes", type=int, default=1000)
    parser.add_argument("--halves", type=int, default=200)
    parser.add_argument("--out", type=Path, default=OUT)
    asked = parser.parse_args()
    cells = []
    for family in asked.families:
        for name in asked.learners or LEARNERS[family]:
            cells.append(cell(family, name, asked.steps, asked.episodes, asked.halves))
            measure.save(asked.out, cells=cells, steps=asked.steps)


if __name__ == "__main__":
    main()

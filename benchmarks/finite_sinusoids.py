"""Bayesian MAML against an ensemble of MAMLs on finite sets of sine waves.

The four cells of section 4.3 of Bayesian MAML (arXiv:1806.03836): 100 or 1,000 training tasks, 5 or
10 shots, ten particles each, the same fresh test tasks. Scores are of the mean prediction (`mse`)
and the mean of the particles' errors (`particle_mse`, how that paper's code scores the ensemble).

    python benchmarks/finite_sinusoids.py --steps 10000

The released code compares at one number for both inner rates, which for Bayesian MAML is on a sum
weighted by a noise precision of about 100, and so some 25 times the other. `emaml@0.025` is the
ensemble at that rate.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import measure
from rich.console import Console
from rich.table import Table

from adaptax.recipes import TITLES, changed, comparable

OUT = Path(__file__).parent / "results" / "finite_sinusoids.json"


def cell(algorithm: str, tasks: int, shot: int, steps: int, every: int, seed: int) -> dict:
    """Train one learner in one cell; the best checkpoint by validation is tested."""
    name, _, rate = algorithm.partition("@")
    experiment = changed(
        comparable(name, "finite_sinusoids"),
        {"task": {"tasks": tasks, "shot": shot}, "steps": steps, "seed": seed,
         "learner": {"inner_lr": float(rate)} if rate else {}},
    )  # fmt: skip
    splits, test = experiment.splits(), experiment.splits(test=True)
    result = experiment.train(
        splits, validate=test.val, validate_every=every,
        validation={"episodes": 200, "at": [experiment.learner["inner_steps"]]},
    )  # fmt: skip
    report = experiment.test(result.meta, test)
    scores = {
        name: {"mean": report.mean(name), "ci95": report.ci95(name)}
        for name in ("mse", "particle_mse")
    }
    return {
        "algorithm": algorithm,
        "tasks": tasks,
        "shot": shot,
        "scores": scores,
        "diverged": report.diverged(),
        "best_step": result.best_step,
        "seconds": sum(record["seconds"] for record in result.history),
        "protocol": report.protocol,
        "experiment": experiment.to_json(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=10_000, help="meta-steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--algorithms", nargs="+", default=["emaml", "bmaml"],
                        help="a name, or name@inner_lr")  # fmt: skip
    parser.add_argument("--out", type=Path, default=OUT)
    asked = parser.parse_args()
    rows = []
    for tasks in (100, 1000):
        for shot in (5, 10):
            for algorithm in asked.algorithms:
                rows.append(
                    cell(algorithm, tasks, shot, asked.steps, max(asked.steps // 10, 1), asked.seed)
                )
                print(tasks, shot, algorithm, rows[-1]["scores"], f"{rows[-1]['seconds']:.0f} s",
                      flush=True)  # fmt: skip
    table = Table("tasks", "shots", "learner", "MSE", "mean MSE of particles", "best step")
    for row in rows:
        shown = [f"{s['mean']:.3f} ± {s['ci95']:.3f}" for s in row["scores"].values()]
        name, at, rate = row["algorithm"].partition("@")
        table.add_row(str(row["tasks"]), str(row["shot"]), TITLES[name] + at + rate, *shown,
                      f"{row['best_step']:,}")  # fmt: skip
    Console(width=120).print(table)
    measure.save(asked.out, rows=rows)


if __name__ == "__main__":
    main()

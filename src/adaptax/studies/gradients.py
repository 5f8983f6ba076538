"""Which of the inner gradients to follow: two studies of Reptile's paper (section 6).

Both are trainings on 5-way 5-shot Omniglot that differ in nothing but what the outer loop makes of
the gradients `g_1 … g_k` of a task's minibatches. Settings are those of the released code (Nichol
et al. 2018, arXiv:1803.02999): inner gradient descent of 0.003 on the summed loss, which for
minibatches of 25 is 0.075 on the mean; one task a meta-step; an outer rate that falls linearly
from ε_0 to 0; evaluation by 5 steps on all 25 support images, each query predicted with the
support alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from ..recipes import Experiment
from ..report import analysis
from .study import Lab, Row, Study

PAPER_STEPS = 40_000
"""Outer iterations of the paper."""

WAY, SHOT, DRAWINGS = 5, 5, 20
"""Ways and shots of a test task, and drawings that a class of Omniglot has."""

BATCH = WAY * SHOT
"""Images of a minibatch."""

OUTER_LR = 0.25
"""ε_0 for a sum of gradients or a single one."""

_MEAN_LR = {2: 0.125, 3: 0.08325, 4: 0.0625}
"""ε_0 for a mean, a k-th of the sum's: the released code's figures, with its rounding of 0.25/3."""

STEPS = {"combinations": 2_000, "overlap": 1_000}
"""Outer iterations of the short versions."""

POINTS = 10
"""Of a learning curve."""

CURVE_EPISODES = 60
"""Validation tasks of each point; the same for all points and curves."""

Kind = Literal["sum", "mean", "last"]


@dataclasses.dataclass(frozen=True)
class Combination:
    """A way to combine the gradients of k minibatches that do not overlap.

    Args:
        inner_steps: k.
        kind: the `"sum"` of all gradients (Reptile), their `"mean"` (Reptile with ε_0/k), or the
            `"last"` one alone (first-order MAML).
    """

    inner_steps: int
    kind: Kind

    @property
    def name(self) -> str:
        """As it is written: `g1+g2`, `(g1+g2)/2`, `g2`."""
        k = self.inner_steps
        total = "g1+…+g4" if k == 4 else "+".join(f"g{i}" for i in range(1, k + 1))
        return {"sum": total, "mean": f"({total})/{k}", "last": f"g{k}"}[self.kind]

    def experiment(self, steps: int, episodes: int, seed: int = 0) -> Experiment:
        """The training and its test.

        Args:
            steps: outer iterations; `PAPER_STEPS` in the paper.
            episodes: of the test.
            seed: names all randomness.
        """
        k = self.inner_steps
        learner: dict[str, Any] = {"inner_steps": k}
        learner["outer_lr"] = _MEAN_LR[k] if self.kind == "mean" else OUTER_LR
        if self.kind == "last":
            learner["skip"] = k - 1
        task = {"train_shot": SHOT * k, "train_query": 0}
        return _experiment(learner, task, steps, episodes, seed)


COMBINATIONS = (
    Combination(1, "sum"),
    *(Combination(k, kind) for k in (2, 3, 4) for kind in ("sum", "mean", "last")),
)  # fmt: skip
"""The ten of the paper."""

ARMS = {
    "reptile": "Reptile",
    "shared": "FOMAML, shared tail",
    "separate": "FOMAML, separate tail",
}
"""What the study of overlap compares, by the names of its folders."""

INNER_STEPS = (2, 4, 5, 6, 8)
"""Numbers of inner steps in the study of overlap. The paper's grid is not known to us."""


def overlap(arm: str, inner_steps: int, steps: int, episodes: int, seed: int = 0) -> Experiment:
    """A training of the study of overlap between the last minibatch and the earlier ones.

    A training task has all 20 drawings of its classes: four minibatches of 25. Reptile and the
    shared tail cycle through them, so that from the fifth inner step on the last minibatch holds
    images that earlier ones held. The separate tail keeps 5 drawings a class for the last step
    alone, and cycles through the other 15.

    Args:
        arm: a name in `ARMS`.
        inner_steps: k, 2 or more.
        steps: outer iterations.
        episodes: of the test.
        seed: names all randomness.

    Raises:
        ValueError: if there is no such arm, or no step before the last.
    """
    if arm not in ARMS:
        raise ValueError(f"{arm!r} is no arm of the study; there are {', '.join(ARMS)}")
    if inner_steps < 2:
        raise ValueError(
            f"inner_steps={inner_steps}, but the tail wants a step before it: 2 or more"
        )
    learner: dict[str, Any] = {"inner_steps": inner_steps, "outer_lr": OUTER_LR}
    if arm != "reptile":
        learner["skip"] = inner_steps - 1
    if arm == "separate":
        learner["separate_tail"] = True
    tail = SHOT if arm == "separate" else 0
    task = {"train_shot": DRAWINGS - tail, "train_query": tail}
    return _experiment(learner, task, steps, episodes, seed)


def overlapping(inner_steps: Sequence[int]) -> list[int]:
    """Those numbers of inner steps whose last minibatch, when cycling, overlaps earlier ones."""
    return [k for k in inner_steps if k * BATCH > WAY * DRAWINGS]


def analyze_gradients(
    study: Literal["combinations", "overlap"] = "combinations",
    *,
    steps: int | None = None,
    inner_steps: Sequence[int] = (),
    episodes: int = 400,
    seed: int = 0,
    **where: Any,
) -> Study:
    """Meta-train Reptile's network, once for each way to make an outer update of inner gradients.

    Args:
        study: `COMBINATIONS` of the gradients of up to four minibatches; or, by the number of inner
            steps, the `overlap` of the last minibatch with earlier ones.
        steps: outer iterations; `STEPS` if `None`.
        inner_steps: of the study of overlap; `INNER_STEPS` if empty.
        episodes: of the test.
        seed: names all randomness.
        where: `out`, `data_root` and `progress` of `Lab.at`.

    Raises:
        ValueError: for inner steps that the study does not have.
    """
    if study == "combinations" and inner_steps:
        raise ValueError("--inner-steps is for --study overlap; the combinations have theirs")
    how = {"steps": steps or STEPS[study], "episodes": episodes, "seed": seed}
    arms = _arms(study, sorted(set(inner_steps or INNER_STEPS)), how)
    lab = Lab.at(f"analyze-{study}", **where)
    for experiment, _ in arms.values():
        experiment.splits(lab.data_root)  # bad data are told before anything is written
    rows = [_row(lab, name, *arm) for name, arm in arms.items()]
    return _study(lab, study, how["steps"], rows)


Arm = tuple[Experiment, Mapping[str, Any]]
"""What to train, and what the results say of it."""


def _arms(study: str, inner_steps: Sequence[int], how: Mapping[str, int]) -> dict[str, Arm]:
    """Return the trainings of a study by the names of their folders."""
    if study == "combinations":
        return {
            f"{one.kind}-{one.inner_steps}": (
                one.experiment(**how),
                {"name": one.name, "kind": one.kind},
            )
            for one in COMBINATIONS
        }
    return {
        f"{arm}-{k}": (overlap(arm, k, **how), {"name": title, "arm": arm})
        for k in inner_steps
        for arm, title in ARMS.items()
    }


def _row(lab: Lab, folder: str, experiment: Experiment, about: Mapping[str, Any]) -> Row:
    """Train and test, as far as the folder does not hold the outcome."""
    chosen = {name: experiment.learner[name] for name in ("inner_steps", "outer_lr")}
    found = lab.kept(experiment, folder)
    if found is None:
        curve = {**experiment.evaluation, "episodes": CURVE_EPISODES}
        every = max(experiment.steps // POINTS, 1)
        trained = lab.fit(experiment, folder, validation=curve, validate_every=every)
        # The last meta-parameters: nothing is selected.
        scores = lab.test(experiment, trained.last, trained.test, about["name"])
        validated = [record for record in trained.history if "validation" in record]
        found = {
            "accuracy": scores.mean("accuracy"),
            "accuracy_ci95": scores.ci95("accuracy"),
            "seconds": trained.seconds,
            "curve": [{"step": record["step"], **record["validation"]} for record in validated],
            "report": scores.to_json(),
            "experiment": experiment.to_json(),
        }
        lab.keep(folder, found)
    return Row(about["name"], record={**about, **chosen, **found})


def _study(lab: Lab, study: str, steps: int, rows: Sequence[Row]) -> Study:
    records = [row.record for row in rows]
    title = f"5-way 5-shot Omniglot, {steps:,} iterations"
    if study == "combinations":
        name, draw = "gradient_combinations", lambda: analysis.gradient_combinations(records)
    else:
        inside = overlapping([record["inner_steps"] for record in records])
        name, draw = "overlap", lambda: analysis.overlap(records, inside)
    episodes = records[0]["report"]["protocol"]["episodes"]
    note = (
        f"± is the 95 % confidence interval over {episodes} test episodes of held-out characters, "
        "the same for all; not transductive: each query is predicted in a batch of the support and "
        "itself."
    )
    record = {"study": study, "steps": steps, "rows": records}
    table = analysis.study_table(records, title)
    return Study(name, lab, rows, table, lambda: {name: draw()}, record, [note])


def _experiment(
    learner: dict[str, Any], task: dict[str, Any], steps: int, episodes: int, seed: int
) -> Experiment:
    rule = {"inner_lr": 0.075, "inner_batch": BATCH, "eval_steps": 5, "eval_batch": BATCH}
    return Experiment(
        algorithm="reptile",
        tasks="omniglot",
        task={"way": WAY, "shot": SHOT, "query": 1, "protocol": "reptile", **task},
        network={"conv4": "reptile omniglot"},
        learner={**rule, **learner},
        steps=steps,
        meta_batch=1,
        evaluation={"episodes": episodes, "at": [5], "transductive": False},
        seed=seed,
    )

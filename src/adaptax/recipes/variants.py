"""What studies set beside recipes: rows of MAML++'s ablation, MAML with noise, an oracle; numbers
of the papers' figures."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax

from .. import tree
from ..engine.evaluate import Evaluator
from ..learner import Meta
from ..task import Splits
from .book import closest
from .experiment import Experiment

PAPER_CURVES: dict[str, dict[int, float]] = {
    "maml": {1: 0.67, 5: 0.38, 10: 0.35},
    "pretrained": {1: 2.41, 5: 2.23, 10: 2.19},
}
"""Errors that MAML's paper prints for 5-shot sinusoids, by the number of steps."""

RETURNS: dict[str, dict[str, dict[int, float]]] = {
    "navigation": {
        "MAML": {0: -40.41, 1: -11.68, 2: -3.33, 3: -3.23},
        "Pretrained": {0: -40.8, 1: -19.7, 2: -11.7, 3: -8.5},
        "Random policy": {0: -82.7, 1: -58.0, 2: -53.8, 3: -46.8},
        "Oracle": {0: -2.3},
    },
}
"""Average returns by gradient steps that MAML's paper and its plotted data have."""

OFF: dict[str, Any] = {
    "multi_step_loss": 0.0,
    "derivative_order_annealing": 0.0,
    "per_step_batch_norm_statistics": None,
    "per_step_batch_norm_weights": False,
    "learned_rates": False,
    "cosine_annealing": False,
}
"""MAML++ with all its parts off, which is MAML."""


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of the table.

    Args:
        name: as it is written.
        parts: arguments of the learner that are on; `None` stands for all of them.
        paper: accuracy on 20-way 1-shot Omniglot as we remember the paper's table: unverified.
        inner_lr: if it is not MAML++'s.
    """

    name: str
    parts: tuple[str, ...] | None
    paper: str
    inner_lr: float | None = None


ROWS: dict[str, Row] = {
    "maml-own-rate": Row("MAML, rate of its paper", (), "95.8 ± .3", inner_lr=2.0),
    "maml": Row("MAML", (), "91.27 ± 1.07"),
    "multi-step-loss": Row("+ multi-step loss", ("multi_step_loss",), "91.53 ± .69"),
    "learned-rates": Row("+ learned rates", ("learned_rates",), "95.77 ± .38"),
    "batch-norm": Row(
        "+ per-step batch norm",
        ("per_step_batch_norm_statistics", "per_step_batch_norm_weights"),
        "95.35 ± .23",
    ),
    "cosine": Row("+ cosine annealing", ("cosine_annealing",), "93.03 ± .44"),
    "derivative-order": Row(
        "+ derivative-order annealing", ("derivative_order_annealing",), "92.3 ± .55"
    ),
    "maml++": Row("MAML++", None, "97.65 ± .05"),
}
"""The rows by the names of their run folders, in the paper's order.

MAML's paper has a rate of 0.1 on a loss that is 20 times the mean one; MAML++'s rows, its
reimplementation of MAML among them, have 0.1 on the mean.
"""


def ablated(row: str, tasks: str, way: int, shot: int) -> Experiment:
    """Return the experiment of a row: MAML++ on these tasks, with the row's parts alone.

    Args:
        row: a name in `ROWS`.
        tasks: the name of a family of images.
        way: classes an episode.
        shot: support examples a class.
    """
    experiment = closest("maml++", tasks, way, shot)
    parts, rate = ROWS[row].parts, ROWS[row].inner_lr
    learner = dict(experiment.learner)
    learner |= {} if parts is None else {n: value for n, value in OFF.items() if n not in parts}
    learner |= {} if rate is None else {"inner_lr": rate}
    # The same network for all, with strides, which makes it cheaper.
    network = {**experiment.network, "down": "stride", "head": "mean"}
    return dataclasses.replace(experiment, learner=learner, network=network, keep=3)


STANDARD_DEVIATIONS: Sequence[float] = (0.003, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2)
"""Of the noise at the initialisation that `with_noise` chooses from."""


def with_noise(experiment: Experiment, meta: Meta, splits: Splits) -> tuple[Experiment, Meta]:
    """MAML with Gaussian noise at its initialisation, the baseline in PLATIPUS's paper.

    Ten models are adapted from `θ + s·ε`; nothing is trained for it. Its paper's noise is not
    known; s is the one of `STANDARD_DEVIATIONS` with the best likelihood on validation tasks.

    Args:
        experiment: MAML's.
        meta: what it learned, θ.
        splits: of the test tasks.
    """
    shared = ("inner_lr", "inner_steps", "eval_steps", "loss", "noise", "reduction")
    learner = {name: value for name, value in experiment.learner.items() if name in shared}
    noisy = dataclasses.replace(
        experiment, algorithm="platipus", learner={**learner, "samples": 10, "prior_lr": 0.0}
    )
    made = noisy.build_learner()
    around = made.init(meta, key=jax.random.key(0))

    def at(s: float) -> Meta:
        variance = tree.full_like(around["log_prior_variance"], 2 * math.log(s))
        return eqx.tree_at(lambda m: m["log_prior_variance"], around, variance)

    # A sixth of the test's episodes, after the last step: seven deviations of ten models each.
    how = {"episodes": min(200, experiment.episodes // 6 or 1), "at": [experiment.eval_steps]}
    judge = Evaluator(made, splits.val, **{**experiment.evaluation, **how})
    key = jax.random.key(2**31)
    scores = [judge(at(s), key=key).mean("nll") for s in STANDARD_DEVIATIONS]
    best = STANDARD_DEVIATIONS[scores.index(min(scores))]
    learner = {**noisy.learner, "prior_variance": best**2}
    return dataclasses.replace(noisy, learner=learner), at(best)


def oracle(experiment: Experiment) -> Experiment:
    """The same experiment for a policy that sees the goal, and does not adapt.

    Args:
        experiment: of navigation.
    """
    changes: dict[str, Any] = {
        "algorithm": "pretrained",
        "task": {**experiment.task, "see_goal": True},
        "learner": {"inner_lr": 0.1, "eval_steps": 0},
        "evaluation": {**experiment.evaluation, "steps": 0},
    }
    return dataclasses.replace(experiment, **changes)

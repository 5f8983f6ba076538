"""MAML++'s ablation: MAML, MAML with one part each, and all parts together."""

from __future__ import annotations

import dataclasses
from typing import Any

from .book import closest
from .experiment import Experiment

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
    """The experiment of a row: MAML++ on these tasks, with the row's parts alone.

    Args:
        row: a name in `ROWS`.
        tasks: a name in `TASKS`, of images.
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

"""Cells of LEO's table (arXiv:1807.05960): linear classifiers on embeddings of a fixed network."""

from __future__ import annotations

import dataclasses
from typing import Any

from .experiment import Experiment

PAPER: dict[str, dict[str, float]] = {
    cell: dict(zip(("outer_lr", "l2", "orthogonality", "dropout", "kl_weight", "encoder_penalty"),
                   values, strict=True))
    for cell, values in {
        "mini_imagenet 5w1s": (2.739071e-4, 3.623413e-10, .188103, .307651, .756143, 5.756821e-6),
        "mini_imagenet 5w5s": (4.102361e-4, 8.540338e-9, 1.523998e-3, .300299, .466387,
                               2.661608e-7),
        "tiered_imagenet 5w1s": (8.659053e-4, 4.148858e-10, 5.451078e-3, .475126, 2.034189e-3,
                                 8.302962e-5),
        "tiered_imagenet 5w5s": (6.110314e-4, 1.690399e-10, 2.481216e-2, .415158, 1.622811,
                                 2.672450e-5),
    }.items()
}  # fmt: skip
"""Arguments of `LEO` for the four cells of the paper's tables, as its code tuned them:
`LEO(loss, **PAPER["mini_imagenet 5w1s"])`."""

WIDTH = 640
"""Of the embeddings that LEO's authors released: a wide residual network's."""

_MAML = {"inner_lr": 10.0, "inner_steps": 5, "eval_steps": 5}
"""Ours: embeddings have length 1, so that small steps on the mean loss move no logit."""


def embedded(algorithm: str, way: int, shot: int, data: str = "mini_imagenet") -> Experiment:
    """The settings of an algorithm on embeddings, those of LEO as its paper's code has them.

    All images that are not in the support are queries, of 10,000 test tasks. The file is the
    task's `path`, and the network's width that of the file. MAML and Meta-SGD adapt the head, as
    the paper's comparison does; their settings are ours.

    Args:
        algorithm: a name in `ALGORITHMS`.
        way: classes an episode.
        shot: support examples a class.
        data: whose hyper-parameters, `"mini_imagenet"` or `"tiered_imagenet"`.
    """
    cell = f"{data} 5w{5 if shot > 2 else 1}s"
    task: dict[str, Any] = {"way": way, "shot": shot, "query": "all", "train_query": 15}
    base = Experiment(
        algorithm="maml",
        tasks="embeddings",
        task=task,
        network={"linear": WIDTH},
        learner=_MAML,
        outer={"adam": 1e-3},
        steps=100_000,
        meta_batch=12,
        evaluation={"episodes": 10_000},
    )
    if algorithm == "leo":
        return dataclasses.replace(base, algorithm="leo", learner=dict(PAPER[cell]), outer={})
    if algorithm == "class-mean":
        return dataclasses.replace(base, algorithm=algorithm, learner={}, outer={}, steps=1000)
    return base

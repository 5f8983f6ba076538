"""Tasks on which uncertainty counts: the cells of PLATIPUS, of Bayesian MAML, and FS-Mol.

PLATIPUS: arXiv:1806.02817, whose code was never released; settings marked "quoted" are from a
third party's port. Bayesian MAML: arXiv:1806.03836 and its code. Every family has one cell, that
of MAML, and `adapted` says what the other learners change.
"""

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
from .experiment import Experiment, changed
from .names import CURVES, demand

NOISES = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.2, 1.5, 2.0)
"""Standard deviations to choose from where nobody says how noisy targets are."""

CELLS: dict[str, Experiment] = {
    # Network, shots, queries, meta-batch, steps and inner steps are quoted; the inner rate is as
    # remembered of the paper. Twenty context parameters are the quoted "bias transform".
    "sinusoid_or_line": Experiment(
        algorithm="maml",
        tasks="sinusoid_or_line",
        task={"shot": 5, "query": 50},
        network={"mlp": [100, 100, 100], "context": 20},
        learner={"inner_lr": 0.001, "inner_steps": 5, "eval_steps": 10},
        outer={"adam": 1e-3, "clip": 10.0},
        steps=70_000,
        meta_batch=25,
        evaluation={"episodes": 1000, "noise": 0.3, "select": "nll"},
    ),
    # The quoted network has batch normalisation, which would take the place of the points away
    # from a support of positives alone; we leave it out.
    "circles": Experiment(
        algorithm="maml",
        tasks="circles",
        task={"shot": 10, "query": 50},
        network={"mlp": [100, 100, 100], "context": 20},
        learner={"inner_lr": 0.01, "inner_steps": 5, "eval_steps": 10},
        outer={"adam": 1e-3, "clip": 10.0},
        steps=70_000,
        meta_batch=25,
        evaluation={"episodes": 1000, "select": "nll"},
    ),
    "finite_sinusoids": Experiment(
        algorithm="maml",
        tasks="finite_sinusoids",
        task={"shot": 5, "tasks": 1000},
        test_task={"query": 100},
        network={"mlp": [40, 40, 40]},
        learner={"inner_lr": 0.001, "inner_steps": 1},
        outer={"adam": 1e-3},
        steps=100_000,
        meta_batch=10,
        evaluation={"episodes": 1000},
        tune_noise=(0.05, 0.1, 0.2, *NOISES, 3.0),
    ),
    "celeba": Experiment(
        algorithm="maml",
        tasks="celeba",
        task={"shot": 5, "query": 10},
        network={"conv4": "maml mini_imagenet"},
        learner={"inner_lr": 0.05, "inner_steps": 5, "eval_steps": 10},
        outer={"adam": 1e-3, "clip": 10.0},
        steps=60_000,
        meta_batch=4,
        evaluation={"episodes": 600, "select": "nll"},
    ),
    "fsmol": Experiment(
        algorithm="maml",
        tasks="fsmol",
        task={"shot": 16, "query": 64, "train_query": 32},
        network={"mlp": [256, 256]},
        learner={"loss": "relative_mse", "inner_lr": 0.03, "inner_steps": 5, "eval_steps": 10},
        outer={"adam": 1e-3, "clip": 10.0},
        steps=20_000,
        meta_batch=8,
        evaluation={"episodes": 157, "select": "r2"},
        tune_noise=NOISES,
    ),
}
"""MAML on every family, at the papers' length."""

BAYESIAN = ("platipus", "bmaml", "emaml")


def adapted(algorithm: str, maml: Experiment) -> Experiment:
    """The settings of an algorithm on tasks that those of MAML are known for.

    Args:
        algorithm: a name in `ALGORITHMS`.
        maml: MAML's experiment.
    """
    learner, tune = dict(maml.learner), list(maml.tune)
    network, outer = dict(maml.network), dict(maml.outer)
    rate, steps = learner["inner_lr"], learner["inner_steps"]
    eval_steps = learner.get("eval_steps", steps)
    loss: dict[str, Any] = {
        name: learner[name] for name in ("loss", "noise", "reduction") if name in learner
    }
    match algorithm:
        case "meta-sgd":
            learner.pop("eval_steps", None)
        case "maml++":
            outer = {}
        case "reptile":
            learner = {
                "inner_lr": rate,
                "inner_steps": max(2 * steps, 5),
                "eval_steps": max(eval_steps, 10),
                "include_query": True,
                **loss,
            }
            outer = {}
        case "pretrained":
            learner = {"inner_lr": rate, "eval_steps": max(eval_steps, 10), **loss}
            tune = [rate * factor for factor in (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)]
        case "ridge" | "class-mean" | "leo":
            learner, outer = loss, {}
            network.pop("context", None)  # that inner steps move; LEO generates what it adapts
            if algorithm == "leo" and maml.tasks in CURVES:
                # Three layers of 40, as remembered of LEO's paper; the rest is ours.
                network = {"mlp": [40, 40, 40]}
                learner = {**loss, "stochastic": False, "inner_lr": 0.003, "finetune_lr": 0.001}
        case "emaml":
            learner["particles"] = 5
        case "platipus":
            learner |= {"samples": 10, "kl_weight": KL_WEIGHTS.get(maml.tasks, 0.1)}
        case "bmaml":
            learner |= _bmaml(maml.tasks, rate)
    return dataclasses.replace(
        maml, algorithm=algorithm, learner=learner, network=network, outer=outer, tune=tune
    )


KL_WEIGHTS = {"sinusoid_or_line": 0.1, "circles": 0.1, "celeba": 0.15}
"""PLATIPUS's w where one is known: quoted, quoted, and as remembered of the paper."""


def _bmaml(tasks: str, rate: float) -> dict[str, Any]:
    """What Bayesian MAML changes. SVGD averages over particles, so that rates grow with M."""
    if tasks == "finite_sinusoids":
        # The released code's, whose rate of 1e-3 is for a sum over examples.
        return {"inner_lr": 1e-3, "particles": 10, "loss": "gaussian"}
    if tasks in CURVES or tasks == "fsmol":
        return {"inner_lr": 5 * rate, "particles": 5, "objective": "bfa"}
    if tasks == "circles":
        return {"inner_lr": 5 * rate, "particles": 5, "objective": "bfa"}
    # Heads on a shared extractor, as the paper has them for images.
    return {"inner_lr": 5 * rate, "particles": 10, "objective": "bfa", "adapt_only": "head"}


COMPARED_ON: dict[str, tuple[str, ...]] = {
    "sinusoid_or_line": ("maml", "emaml", "platipus", "bmaml"),
    "finite_sinusoids": ("emaml", "bmaml"),
    "circles": ("maml", "emaml", "platipus", "bmaml"),
    "celeba": ("maml", "platipus", "bmaml"),
    "fsmol": (
        "ridge", "pretrained", "maml", "fomaml", "anil", "meta-sgd", "maml++", "reptile", "emaml",
        "platipus", "bmaml",
    ),
}  # fmt: skip
"""What `compared` is for by default."""


def compared(algorithm: str, tasks: str) -> Experiment:
    """The experiment of one of several algorithms on a family in `CELLS`, for two CPU cores.

    Each takes under ten minutes. PLATIPUS starts from MAML, as its users advise.

    Args:
        algorithm: a name in `ALGORITHMS`.
        tasks: a name in `CELLS`.

    Raises:
        ValueError: for an algorithm that cannot do these tasks.
    """
    demand(algorithm, tasks)
    maml = changed(CELLS[tasks], SHORT[tasks])
    experiment = adapted(algorithm, maml)
    if algorithm == "platipus" and tasks != "finite_sinusoids":
        experiment = dataclasses.replace(experiment, init_from=maml.to_json())
    return changed(experiment, SHORTER.get((tasks, algorithm), {}))


SHORT: dict[str, dict[str, Any]] = {
    "sinusoid_or_line": {"network": {"mlp": [40, 40, 40]}, "steps": 30_000},
    "finite_sinusoids": {"steps": 20_000},
    "circles": {"network": {"mlp": [40, 40, 40]}, "steps": 10_000},
    "celeba": {
        "task": {"image_size": 42, "train_query": 5},
        # Strides instead of pooling: a quarter of the pixels in every block.
        "network": {"image": [42, 42, 3], "down": "stride", "head": "mean"},
        "learner": {"inner_lr": 0.2},
        "steps": 2500,
        # Ten models a task, at every step: only the last is scored.
        "evaluation": {"episodes": 300, "at": [10]},
    },
    "fsmol": {"network": {"mlp": [64, 64]}, "steps": 400},
}
"""What `compared` changes of `CELLS`, section by section."""

_PLATIPUS = {"samples": 100, "kl_weight": 0.002, "prior_variance": 0.002,
             "inference_variance": 0.001}  # fmt: skip
SHORTER: dict[tuple[str, str], dict[str, Any]] = {
    # Of 50 queries with the noise of 0.3 the log-likelihood is 50/(2·0.3²) times the mean squared
    # error, so that a weight of 0.0036 is the evidence bound. Half of it gives narrow intervals.
    ("sinusoid_or_line", "platipus"): {
        "steps": 15_000,
        "outer": {"adam": 2e-3, "clip": 1.0},
        "learner": {**_PLATIPUS, "kl_weight": 0.004, "prior_variance": 0.004,
                    "prior_lr": 0.001, "inference_lr": 0.001},
    },
    ("sinusoid_or_line", "emaml"): {
        "steps": 15_000, "meta_batch": 5, "learner": {"particles": 10},
    },
    ("sinusoid_or_line", "bmaml"): {
        "steps": 8000,
        "meta_batch": 3,
        "learner": {"particles": 20, "loss": "normal", "noise": 0.3, "inner_lr": 0.004},
    },
    ("celeba", "platipus"): {"steps": 1200},
    ("sinusoid_or_line", "leo"): {"steps": 20_000, "meta_batch": 8},
    ("circles", "platipus"): {"learner": _PLATIPUS},
    ("circles", "emaml"): {"meta_batch": 5},
    ("circles", "bmaml"): {"meta_batch": 5},
    ("fsmol", "anil"): {"learner": {"inner_lr": 0.3}},
    ("fsmol", "emaml"): {"meta_batch": 4},
    ("fsmol", "bmaml"): {"meta_batch": 4},
}  # fmt: skip
"""And what of single algorithms."""


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

"""Cells of reinforcement learning: section 5.3 of MAML (arXiv:1703.03400), and RL²'s tasks."""

from __future__ import annotations

import dataclasses
from typing import Any

from .experiment import Experiment, changed, demand

_EVALUATION = {"goals": 40, "steps": 3, "trajectories": 40, "lr": [0.1, 0.05]}

RETURNS: dict[str, dict[str, dict[int, float]]] = {
    "navigation": {
        "MAML": {0: -40.41, 1: -11.68, 2: -3.33, 3: -3.23},
        "Pretrained": {0: -40.8, 1: -19.7, 2: -11.7, 3: -8.5},
        "Random policy": {0: -82.7, 1: -58.0, 2: -53.8, 3: -46.8},
        "Oracle": {0: -2.3},
    },
}
"""Average returns by gradient steps that MAML's paper and its plotted data have."""

CELLS: dict[str, Experiment] = {
    # The paper's settings; the distance reward is that of its numbers.
    "navigation": Experiment(
        algorithm="maml",
        tasks="navigation",
        task={"reward": "distance", "trajectories": 20, "horizon": 100},
        network={"policy": [100, 100]},
        learner={"inner_lr": 0.1, "inner_steps": 1},
        outer={"trpo": 0.01},
        steps=500,
        meta_batch=20,
        evaluation=_EVALUATION,
    ),
    "bandit": Experiment(
        algorithm="maml",
        tasks="bandit",
        task={"arms": 5, "trajectories": 20, "horizon": 10},
        network={"policy": [32]},
        learner={"inner_lr": 2.0, "inner_steps": 1},
        outer={"trpo": 0.01},
        steps=200,
        meta_batch=40,
        evaluation={"goals": 400, "steps": 3, "trajectories": 20},
    ),
    "tabular_mdp": Experiment(
        algorithm="maml",
        tasks="tabular_mdp",
        task={"states": 10, "actions": 5, "trajectories": 20, "horizon": 10},
        network={"policy": [32]},
        learner={"inner_lr": 2.0, "inner_steps": 1},
        outer={"trpo": 0.01},
        steps=200,
        meta_batch=40,
        evaluation={"goals": 400, "steps": 3, "trajectories": 20},
    ),
}
"""MAML on every family of environments."""


def reinforced(algorithm: str, tasks: str) -> Experiment:
    """The settings of an algorithm on an environment's tasks.

    Args:
        algorithm: a name in `ALGORITHMS`.
        tasks: a name in `ENVIRONMENTS`.
    """
    maml = CELLS[tasks]
    learner, outer = dict(maml.learner), dict(maml.outer)
    match algorithm:
        case "pretrained":
            # One policy for all goals, which then adapts by policy gradient.
            learner = {"inner_lr": learner["inner_lr"], "eval_steps": 3}
        case "reptile":
            # Its meta-loss is a distance, which TRPO has no use for.
            learner = {"inner_lr": learner["inner_lr"], "inner_steps": 3, "outer_lr": 0.1}
            outer = {}
    return dataclasses.replace(maml, algorithm=algorithm, learner=learner, outer=outer)


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


COMPARED_IN = {
    "navigation": ("maml", "fomaml", "reptile", "pretrained"),
    "bandit": ("maml", "fomaml", "pretrained"),
    "tabular_mdp": ("maml", "fomaml", "pretrained"),
}
"""What is compared by default."""

SHORT: dict[str, dict[str, Any]] = {"navigation": {"steps": 400}}
"""What a comparison changes of `CELLS`, for two CPU cores."""

CURVATURE = 0.25
"""Of `adaptax.rl.TRPO` in comparisons: most of an outer step is products with the curvature."""


def shortened(algorithm: str, tasks: str) -> Experiment:
    """The experiment of one of several algorithms that are compared, for two CPU cores.

    Args:
        algorithm: a name in `ALGORITHMS`.
        tasks: a name in `ENVIRONMENTS`.

    Raises:
        ValueError: for an algorithm that is not for environments.
    """
    demand(algorithm, tasks)
    experiment = changed(reinforced(algorithm, tasks), SHORT.get(tasks, {}))
    if "trpo" in experiment.outer:
        experiment = changed(experiment, {"outer": {"curvature": CURVATURE}})
    return experiment

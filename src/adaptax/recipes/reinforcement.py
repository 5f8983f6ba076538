"""Cells of reinforcement learning: section 5.3 of MAML (arXiv:1703.03400), and RL²'s tasks."""

from __future__ import annotations

import dataclasses
from typing import Any

from .experiment import Experiment, changed
from .names import demand

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


def _locomotion(robot: str, goal: str, trajectories: int = 20) -> Experiment:
    return Experiment(
        algorithm="maml",
        tasks=robot,
        task={"goal": goal, "trajectories": trajectories, "horizon": 200},
        network={"policy": [100, 100]},
        learner={"inner_lr": 0.1, "inner_steps": 1},
        outer={"trpo": 0.01},
        steps=500,
        meta_batch=40,
        evaluation={**_EVALUATION, "trajectories": trajectories},
    )


CELLS: dict[str, Experiment] = {
    # The paper's settings; the distance reward is that of its numbers. The curvature is
    # estimated from a quarter of the trajectories, which is ours: products with it are most of
    # the work.
    "navigation": Experiment(
        algorithm="maml",
        tasks="navigation",
        task={"reward": "distance", "trajectories": 20, "horizon": 100},
        network={"policy": [100, 100]},
        learner={"inner_lr": 0.1, "inner_steps": 1},
        outer={"trpo": 0.01, "curvature": 0.25},
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
    "half_cheetah": _locomotion("half_cheetah", "direction"),
    "ant": _locomotion("ant", "direction", trajectories=40),
}
"""MAML on every family of environments."""

BODIES = ("half_cheetah", "ant")
"""Those of brax."""


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
        case "bmaml":
            return changed(maml, _SVPG_ON_BODIES if tasks in BODIES else _SVPG)
    return dataclasses.replace(maml, algorithm=algorithm, learner=learner, outer=outer)


_SVPG: dict[str, Any] = {
    "algorithm": "bmaml",
    "task": {"trajectories": 10},
    "learner": {"particles": 5, "kernel": "code"},
    "outer": {"each": True},
    "steps": 100,
}
_SVPG_ON_BODIES: dict[str, Any] = {
    "algorithm": "bmaml",
    "learner": {"particles": 2, "kernel": "code"},
    "outer": {"each": True},
    "steps": 300,
}
"""What BMAML's code for reinforcement learning has otherwise than MAML's: SVPG-TRPO."""

_OTHER_PHYSICS = "returns of MuJoCo 1.31, not to be compared with"


def named() -> list[tuple[str, str, str, Experiment]]:
    """Recipes: name, what it is, the published numbers, and the experiment."""
    navigation, cheetah = CELLS["navigation"], CELLS["half_cheetah"]
    points = "returns -40.41 / -11.68 / -3.33 / -3.23 after 0 / 1 / 2 / 3 steps (40 goals)"
    about = "MAML-TRPO, 2-D navigation, reward of the distance"
    quarter = "TRPO's curvature from a quarter of the trajectories, which is ours"
    script = {
        "learner": {"inner_lr": 0.5}, "meta_batch": 40, "steps": 100,
        "outer": {"curvature": 1.0},
        "evaluation": {"lr": [0.5, 0.25]},
    }  # fmt: skip
    runs = "MAML, half-cheetah in brax, forwards or backwards"
    away = f"-50.7 / 293.2 / 313.5 / 315.7; {_OTHER_PHYSICS}"
    return [
        ("maml-navigation", f"{about}, {quarter}", points, navigation),
        (
            "maml-navigation-script",
            f"{about}, as in the released script: steps of 0.5, then 0.25, 40 tasks, 100 "
            "meta-iterations, the curvature from all trajectories",
            points, changed(navigation, script),
        ),
        (
            "bmaml-navigation", "BMAML (SVPG-TRPO), 2-D navigation, a trust region for each of 5 "
            f"policies, {quarter}", "plots only", reinforced("bmaml", "navigation"),
        ),
        ("maml-half_cheetah-direction", runs, away, cheetah),
        (
            "maml-half_cheetah-direction-short", f"{runs}, for two CPU cores: {_SHORT_RUN}",
            away, changed(cheetah, SHORT["half_cheetah"]),
        ),
        (
            "maml-half_cheetah-velocity", "MAML-TRPO, half-cheetah in brax at a velocity up to 2",
            f"-129.5 / -78.6 / -66.6 / -60.8; {_OTHER_PHYSICS}",
            _locomotion("half_cheetah", "velocity"),
        ),
        (
            "maml-ant-direction", "MAML-TRPO, ant in brax, forwards or backwards",
            f"8.7 / 499.1 / 500.7 / 499.1; {_OTHER_PHYSICS}", CELLS["ant"],
        ),
        (
            "maml-ant-velocity", "MAML-TRPO, ant in brax at a velocity up to 3",
            f"30.6 / 96.7 / 100.1 / 101.4; {_OTHER_PHYSICS}", _locomotion("ant", "velocity"),
        ),
    ]  # fmt: skip


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
    "navigation": ("maml", "fomaml", "reptile", "bmaml", "pretrained"),
    "bandit": ("maml", "fomaml", "pretrained"),
    "tabular_mdp": ("maml", "fomaml", "pretrained"),
    "half_cheetah": ("maml", "pretrained"),
    "ant": ("maml", "pretrained"),
}
"""What is compared by default."""

_SHORT_RUN = (
    "400 meta-iterations of 8 tasks, 20 trajectories of 100 steps, discount .95, λ .9, steps of "
    "0.3, PPO"
)
# With so few roll-outs most of a trust region of the adapted policies goes to noise in their
# adaptation: after a hundred steps of TRPO nothing has been learned. Adam's momentum averages it.
_ON_BODIES: dict[str, Any] = {
    "task": {"trajectories": 20, "horizon": 100, "discount": 0.95, "gae_lambda": 0.9},
    "learner": {"inner_lr": 0.3},
    "outer": {"ppo": 0.003},
    "meta_batch": 8,
    "steps": 400,
    "evaluation": {"trajectories": 20, "lr": [0.3, 0.15]},
}
SHORT: dict[str, dict[str, Any]] = {
    "navigation": {"steps": 200},
    "half_cheetah": _ON_BODIES,
    "ant": _ON_BODIES,
}
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
    experiment, short = reinforced(algorithm, tasks), dict(SHORT.get(tasks, {}))
    if not experiment.outer:
        short.pop("outer", None)  # Reptile's is its own
    experiment = changed(experiment, short)
    if "trpo" in experiment.outer:
        experiment = changed(experiment, {"outer": {"curvature": CURVATURE}})
        if algorithm == "bmaml":
            # One trust region for all policies: one for each takes time that grows with its square.
            experiment = changed(experiment, {"outer": {"each": False}})
    return experiment

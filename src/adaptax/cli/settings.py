"""From the words of the command line to an experiment and how to train it."""

from __future__ import annotations

import difflib
from typing import Any

from ..recipes import (
    CELLS,
    ENVIRONMENTS,
    RECIPES,
    REGRESSIONS,
    Experiment,
    Recipe,
    changed,
    closest,
)
from ..recipes.settings import with_path, with_settings
from ..text import shown
from .commands import Train

FIRST_ORDER = {
    "reptile": "Reptile takes no second derivatives anyway; leave out --first-order",
    "maml++": "MAML++ is of first order for a part of meta-training; instead of --first-order, use "
    "--set learner.derivative_order_annealing=1",
    "leo": "LEO differentiates through its inner loop; leave out --first-order",
}
"""What is said to those who ask for it."""


def experiment_of(asked: Train) -> Experiment:
    """The closest recipe, changed as asked.

    Raises:
        ValueError: if something is asked that the task family or the algorithm does not have.
    """
    if asked.algorithm is None or asked.tasks is None:
        raise ValueError(
            "name an algorithm and a task family (adaptax train maml sinusoid), or a run to go on "
            "with (adaptax train --resume RUN)"
        )
    fixed = asked.tasks in ("sinusoid", *CELLS, *ENVIRONMENTS)
    if fixed and asked.way is not None:
        what = "are regressions and have no ways" if asked.tasks in REGRESSIONS else "have two ways"
        what = "are of reinforcement learning" if asked.tasks in ENVIRONMENTS else what
        raise ValueError(f"{asked.tasks} tasks {what}; leave out --way")
    way, shot = or_else(asked.way, 5), or_else(asked.shot, 1)
    experiment = with_path(closest(asked.algorithm, asked.tasks, way, shot), asked.path)
    task = {"shot": asked.shot, "query": asked.query} if fixed else {"query": asked.query}
    learner: dict[str, Any] = {"inner_steps": asked.inner_steps, "eval_steps": asked.eval_steps}
    learner["train_only"] = asked.train_only
    if asked.train_only is not None and asked.algorithm in ("ridge", "class-mean"):
        raise ValueError(f"{asked.algorithm} trains no network; leave out --train-only")
    learner["inner_adam" if "inner_adam" in experiment.learner else "inner_lr"] = asked.inner_lr
    outer: dict[str, Any] = {}
    if asked.algorithm == "ridge":
        learner, outer = {}, {"adam": asked.outer_lr}
        if any(value is not None for value in (asked.inner_lr, asked.inner_steps)):
            raise ValueError("ridge regression takes no inner steps; leave out --inner-lr and "
                             "--inner-steps")  # fmt: skip
    elif asked.algorithm in ("reptile", "maml++", "leo"):
        # They have an outer optimizer of their own.
        learner["outer_lr"] = asked.outer_lr
        if asked.first_order:
            raise ValueError(FIRST_ORDER[asked.algorithm])
    else:
        if "trpo" in experiment.outer:
            if asked.outer_lr is not None:
                raise ValueError("TRPO has no step size; bound its KL by --set outer.trpo=0.01")
        else:
            outer["adam"] = asked.outer_lr
        if asked.first_order and asked.algorithm != "fomaml":
            learner["first_order"] = True
    changes: dict[str, Any] = {
        "task": task,
        "test_task": {n: v for n, v in task.items() if n in experiment.test_task},
        "learner": learner,
        "outer": outer,
        "evaluation": {"goals" if asked.tasks in ENVIRONMENTS else "episodes": asked.episodes},
        "steps": asked.steps,
        "meta_batch": asked.meta_batch,
        "keep": asked.keep,
        "seed": asked.seed,
    }
    if asked.eval_steps is not None and "at" in experiment.evaluation:
        changes["evaluation"]["at"] = [0, asked.eval_steps]
    if asked.inner_lr is not None and experiment.tune:
        changes["tune"] = []
    return with_settings(changed(experiment, changes), asked.set)


def recipe(name: str) -> Recipe:
    """The recipe of that name.

    Raises:
        ValueError: if there is none; suggests names that are similar.
    """
    if name not in RECIPES:
        near = difflib.get_close_matches(name[:100], RECIPES, 3, 0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else "see `adaptax recipes list`"
        raise ValueError(f"there is no recipe {shown(name)!r}; {hint}")
    return RECIPES[name]


def or_else(value: Any, default: Any) -> Any:
    """The value, or the default where it was not given."""
    return default if value is None else value

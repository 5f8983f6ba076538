"""From the words of the command line to an experiment and how to train it."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Iterable
from pathlib import Path
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
from ..tasks.embeddings import width
from ..text import shown
from .commands import Train
from .options import ALGORITHMS

FIRST_ORDER = {
    "reptile": "Reptile takes no second derivatives anyway; leave out --first-order",
    "maml++": "MAML++ is of first order for a part of meta-training; instead of --first-order, use "
    "--set learner.derivative_order_annealing=1",
    "leo": "LEO differentiates through its inner loop; leave out --first-order",
}
"""What is said to those who ask for it."""

PATHS = {
    "folder": "a folder of images, a class a directory",
    "embeddings": "a file that `adaptax embed` wrote",
}
"""Families that want a path, and what is there."""

SECTIONS = ("task", "network", "learner", "outer", "evaluation", "test_task")


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


def known(names: Iterable[str]) -> list[str]:
    """The algorithms of these names, each once.

    Raises:
        ValueError: if one is none.
    """
    for name in names:
        if name not in ALGORITHMS:
            raise ValueError(f"{name!r} is no algorithm; there are {', '.join(ALGORITHMS)}")
    return list(dict.fromkeys(names))


def with_path(experiment: Experiment, path: str | None) -> Experiment:
    """The experiment on the images or embeddings at this path, if it is on such.

    Raises:
        FileNotFoundError: if there are no embeddings.
        ValueError: if the task family wants a path and has none, or the other way round.
    """
    if experiment.tasks not in PATHS:
        if path is not None:
            raise ValueError(
                f"--path is for the task families {' and '.join(PATHS)}, not for "
                f"{experiment.tasks}; use --data-root for data sets"
            )
        return experiment
    if path is None:
        raise ValueError(f"the task family {experiment.tasks} wants --path, "
                         f"{PATHS[experiment.tasks]}")  # fmt: skip
    where = Path(os.path.realpath(Path(path).expanduser()))
    changes: dict[str, Any] = {"task": {"path": str(where)}}
    if experiment.tasks == "embeddings":
        changes["network"] = {"linear": width(where)}
    return changed(experiment, changes)


def with_settings(experiment: Experiment, settings: Iterable[str]) -> Experiment:
    """The experiment with `section.name=value` settings, values in JSON or plain words.

    Raises:
        ValueError: if a setting is not of that form or names no section.
    """
    changes: dict[str, dict[str, Any]] = {}
    for setting in settings:
        name, equals, text = setting.partition("=")
        section, dot, key = name.partition(".")
        if not equals or not dot or not key or section not in SECTIONS:
            raise ValueError(
                f"--set {shown(setting)} is not section.name=value with a section of "
                f"{', '.join(SECTIONS)}"
            )
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):  # no JSON, or too long or deep to be a setting
            value = text
        changes.setdefault(section, {})[key] = value
    return changed(experiment, changes)


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

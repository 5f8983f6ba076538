"""From the words of the command line to an experiment and how to train it."""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..recipes import RECIPES, Experiment, Recipe, closest
from .commands import Train

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
    sinusoid = asked.tasks == "sinusoid"
    if sinusoid and asked.way is not None:
        raise ValueError("sinusoids are regressions and have no ways; leave out --way")
    way, shot = or_else(asked.way, 5), or_else(asked.shot, 1)
    experiment = with_path(closest(asked.algorithm, asked.tasks, way, shot), asked.path)
    task = {"shot": asked.shot, "query": asked.query} if sinusoid else {"query": asked.query}
    learner: dict[str, Any] = {"inner_steps": asked.inner_steps, "eval_steps": asked.eval_steps}
    learner["inner_adam" if "inner_adam" in experiment.learner else "inner_lr"] = asked.inner_lr
    outer: dict[str, Any] = {}
    if asked.algorithm in ("reptile", "maml++"):
        # They have an outer optimizer of their own.
        learner["outer_lr"] = asked.outer_lr
        if asked.first_order:
            raise ValueError(
                "Reptile takes no second derivatives anyway; leave out --first-order"
                if asked.algorithm == "reptile"
                else "MAML++ is of first order for a part of meta-training; instead of "
                "--first-order, use --set learner.derivative_order_annealing=1"
            )
    else:
        outer["adam"] = asked.outer_lr
        if asked.first_order and asked.algorithm != "fomaml":
            learner["first_order"] = True
    changes: dict[str, Any] = {
        "task": task,
        "test_task": {n: v for n, v in task.items() if n in experiment.test_task},
        "learner": learner,
        "outer": outer,
        "evaluation": {"episodes": asked.episodes},
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


def changed(experiment: Experiment, changes: dict[str, Any]) -> Experiment:
    """The experiment with other values; what is `None` stays, sections are merged."""
    new: dict[str, Any] = {}
    for name, value in changes.items():
        if isinstance(value, dict):
            given = {n: v for n, v in value.items() if v is not None}
            value = {**getattr(experiment, name), **given}
        if value is not None:
            new[name] = value
    return dataclasses.replace(experiment, **new)


def with_path(experiment: Experiment, path: str | None) -> Experiment:
    """The experiment on the images at this path, if it is on a folder's.

    Raises:
        ValueError: if the task family wants a path and has none, or the other way round.
    """
    if experiment.tasks != "folder":
        if path is not None:
            raise ValueError(
                f"--path names the images of the task family folder, not of {experiment.tasks}; "
                "use --data-root for data sets"
            )
        return experiment
    if path is None:
        raise ValueError("the task family folder wants --path, a folder of images, a class a "
                         "directory")  # fmt: skip
    where = str(Path(path).expanduser().resolve())
    return dataclasses.replace(experiment, task={"path": where, **experiment.task})


def with_settings(experiment: Experiment, settings: Iterable[str]) -> Experiment:
    """The experiment with `section.name=value` settings, values in JSON or plain words.

    Raises:
        ValueError: if a setting is not of that form or names no section.
    """
    for setting in settings:
        name, equals, text = setting.partition("=")
        section, dot, key = name.partition(".")
        if not equals or not dot or not key or section not in SECTIONS:
            raise ValueError(
                f"--set {setting} is not section.name=value with a section of {', '.join(SECTIONS)}"
            )
        try:
            value = json.loads(text)
        except json.JSONDecodeError:
            value = text
        experiment = changed(experiment, {section: {key: value}})
    return experiment


def recipe(name: str) -> Recipe:
    """The recipe of that name.

    Raises:
        ValueError: if there is none; suggests names that are similar.
    """
    if name not in RECIPES:
        near = difflib.get_close_matches(name, RECIPES, 3, 0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else "see `adaptax recipes list`"
        raise ValueError(f"there is no recipe {name!r}; {hint}")
    return RECIPES[name]


def or_else(value: Any, default: Any) -> Any:
    """The value, or the default where it was not given."""
    return default if value is None else value

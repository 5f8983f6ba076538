"""From the words of the command line to an experiment and how to train it."""

from __future__ import annotations

import dataclasses
import difflib
from pathlib import Path
from typing import Any

from ..recipes import RECIPES, Experiment, Recipe, changed, closest, parts, rows, table
from ..recipes.book import read_file
from ..recipes.settings import with_path, with_settings
from ..text import shown
from .commands import Train


def experiment_of(options: Train) -> Experiment:
    """Return the closest recipe, changed as the options say.

    Raises:
        ValueError: if an option is not for the task family or the learner.
    """
    if options.tasks == rows.NUMBERS:
        options = dataclasses.replace(options, tasks=rows.family_of(options.path, options.target))
    if options.algorithm is None or options.tasks is None:
        raise ValueError(
            "name an algorithm and a task family (adaptax train maml sinusoid), or a run to go on "
            "with (adaptax train --resume RUN)"
        )
    table.trust(*table.own(options.algorithm, options.tasks, options.model))
    row, family = table.learner(options.algorithm), table.family(options.tasks)
    free = family.takes("way")
    if options.way is not None and not free:
        raise ValueError(f"{options.tasks} tasks {WAYS[family.kind]}; leave out --way")
    way, shot = or_else(options.way, 5), or_else(options.shot, 1)
    experiment = with_path(closest(options.algorithm, options.tasks, way, shot), options.path)
    task: dict[str, Any] = {"splits": list(options.splits) or None}
    task |= {name: getattr(options, name) for name in ("image_size", "channels", "min_images")}
    task |= {name: one_or_more(getattr(options, name)) for name in COLUMNS}
    for name, value in task.items():
        if value is not None and not family.takes(name):
            raise ValueError(
                f"{options.tasks} tasks have no {name}; leave out --{name.replace('_', '-')}"
            )
    task |= {"query": options.query} if free else {"shot": options.shot, "query": options.query}
    evaluation: dict[str, Any] = {"goals" if experiment.acts else "episodes": options.episodes}
    if options.eval_steps is not None and "at" in experiment.evaluation:
        evaluation["at"] = [0, options.eval_steps]
    changes: dict[str, Any] = {
        "task": task,
        "test_task": {n: v for n, v in task.items() if n in experiment.test_task},
        "network": {"model": options.model},
        "learner": _learner(options, experiment, row),
        "outer": _outer(options, experiment),
        "evaluation": evaluation,
        "steps": options.steps,
        "meta_batch": options.meta_batch,
        "keep": options.keep,
        "seed": options.seed,
    }
    if options.inner_lr is not None and experiment.tune:
        changes["tune"] = []
    experiment = with_settings(changed(experiment, changes), options.set)
    return rows.completed(experiment) if family.has("rows") else experiment


COLUMNS = ("task", "target", "features", "ignore", "order", "split")
"""Options that name columns of a table."""


def one_or_more(value: Any) -> Any:
    """Return the words of an option: one by itself, `None` for none."""
    if not isinstance(value, tuple):
        return value
    return None if not value else value[0] if len(value) == 1 else list(value)


WAYS = {
    "regression": "are regressions and have no ways",
    "classification": "have two ways",
    "environment": "are of reinforcement learning",
}
"""Why there is no way to choose, by the kind of tasks."""


def _learner(options: Train, experiment: Experiment, row: table.Learner) -> dict[str, Any]:
    """Return the settings of the learner that the options name.

    Raises:
        ValueError: if it has no such settings.
    """
    known = experiment.settings
    if options.train_only is not None and row.untrained:
        raise ValueError(f"{options.algorithm} trains no network; leave out --train-only")
    steps = (options.inner_lr, options.inner_steps)
    if any(value is not None for value in steps) and "inner_lr" not in known:
        raise ValueError(
            f"{row.title} takes no inner steps; leave out --inner-lr and --inner-steps"
        )
    learner: dict[str, Any] = {
        "inner_adam" if "inner_adam" in experiment.learner else "inner_lr": options.inner_lr,
        "inner_steps": options.inner_steps,
        "eval_steps": options.eval_steps,
        "train_only": options.train_only,
    }
    if options.first_order and "first_order" in known:
        learner["first_order"] = True
    elif options.first_order and "first_order" not in row.sets:
        said = f"{row.title} has no such setting; leave out --first-order"
        raise ValueError(row.first_order or said)
    if "outer_lr" in known:
        learner["outer_lr"] = options.outer_lr
    return learner


def _outer(options: Train, experiment: Experiment) -> dict[str, Any]:
    """Return the settings of the outer loop that the options name.

    Raises:
        ValueError: if it has no step size.
    """
    if "outer_lr" in experiment.settings or options.outer_lr is None:
        return {}  # of an optimizer of its own
    if "trpo" in experiment.outer:
        raise ValueError("TRPO has no step size; bound its KL by --set outer.trpo=0.01")
    rule = next((name for name in experiment.outer if name in parts.rules()), "adam")
    return {rule: options.outer_lr}


def recipe(name: str) -> Recipe:
    """Return the recipe of that name, or in that TOML file.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if there is no such recipe; suggests names that are similar.
    """
    if name.endswith(".toml"):
        return read_file(Path(name))
    if name not in RECIPES:
        near = difflib.get_close_matches(name[:100], RECIPES, 3, 0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else "see `adaptax recipes list`"
        raise ValueError(f"there is no recipe {shown(name)!r}; {hint}")
    return RECIPES[name]


def or_else(value: Any, default: Any) -> Any:
    """The value, or the default where it was not given."""
    return default if value is None else value

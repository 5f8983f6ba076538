"""Experiments changed as a user asks: other data, single settings."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..tasks.embeddings import width
from ..text import shown
from .experiment import Experiment, changed
from .names import ALGORITHMS

PATHS = {
    "folder": "a folder of images, a class a directory",
    "embeddings": "a file that `adaptax embed` wrote",
}
"""Families that want a path, and what is there."""

SECTIONS = ("task", "network", "learner", "outer", "evaluation", "test_task")


def known_algorithms(names: Iterable[str]) -> list[str]:
    """Return the algorithms of these names, each once.

    Raises:
        ValueError: if one is none.
    """
    for name in names:
        if name not in ALGORITHMS:
            raise ValueError(f"{name!r} is no algorithm; there are {', '.join(ALGORITHMS)}")
    return list(dict.fromkeys(names))


def with_path(experiment: Experiment, path: str | None) -> Experiment:
    """Return the experiment on the images or embeddings at this path, if it is on such.

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
    """Return the experiment with `section.name=value` settings, values in JSON or plain words.

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

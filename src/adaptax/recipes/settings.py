"""Experiments changed as a user asks: other data, single settings."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..tasks.embeddings import width
from ..text import shown
from . import table
from .experiment import Experiment, changed

SECTIONS = ("task", "network", "learner", "outer", "evaluation", "test_task")


def known_algorithms(names: Iterable[str]) -> list[str]:
    """Return the algorithms of these names, each once.

    Raises:
        ValueError: if one is none.
    """
    found = list(dict.fromkeys(names))
    table.trust(*table.own(*found))
    for name in found:
        table.learner(name)
    return found


def with_path(experiment: Experiment, path: str | None) -> Experiment:
    """Return the experiment on the images or embeddings at this path, if it is on such.

    Raises:
        FileNotFoundError: if there are no embeddings.
        ValueError: if the task family wants a path and has none, or the other way round.
    """
    family = experiment.family
    if not family.path and not (family.has("own") and family.takes("path")):
        if path is not None:
            those = " and ".join(name for name, one in table.FAMILIES.items() if one.path)
            raise ValueError(
                f"--path is for the task families {those}, not for {experiment.tasks}; use "
                "--data-root for data sets"
            )
        return experiment
    if path is None:
        if family.has("own"):
            return experiment
        raise ValueError(f"the task family {experiment.tasks} wants --path, {family.path}")
    where = Path(os.path.realpath(Path(path).expanduser()))
    changes: dict[str, Any] = {"task": {"path": str(where)}}
    if "linear" in experiment.network and family.has("features"):
        changes["network"] = {"linear": width(where)}
    elif family.has("features") and "in_size" in experiment.network:
        changes["network"] = {"in_size": width(where)}
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

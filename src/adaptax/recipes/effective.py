"""What an experiment comes to: its settings with the defaults of what they are given to."""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Callable, Mapping
from typing import Any

from .. import models
from ..tasks.omniglot import PROTOCOLS
from . import table
from .experiment import Experiment


def effective(experiment: Experiment) -> dict[str, Any]:
    """The settings in effect, section by section.

    Defaults are those of the task family (of Omniglot, the protocol's too), of the network with
    its preset, and of the learner. The outer optimizer is as given, else Adam's 1e-3.
    """
    task = _defaults(table.load(experiment.family.make)) | dict(experiment.task)
    if experiment.tasks == "omniglot":
        task = {**task, **dataclasses.asdict(PROTOCOLS[task["protocol"]]), **_given(task)}
    network, preset = dict(experiment.network), {}
    if "conv4" in network:
        preset = _defaults(models.Conv4) | models.CONV4[network["conv4"]]
    elif "mlp" in network:
        preset = _defaults(models.MLP)
    make = table.load(experiment.row.make)
    learner = {"reduction": "mean"}
    if not inspect.isclass(make):  # which passes arguments on to the class that it returns
        learner |= _defaults(typing.get_type_hints(make)["return"])
    learner |= _defaults(make)
    return {
        **dataclasses.asdict(experiment),
        "task": task,
        "network": preset | network,
        "learner": learner | dict(experiment.learner),
        "outer": dict(experiment.outer) or {"adam": 1e-3},
    }


def _defaults(function: Callable[..., Any]) -> dict[str, Any]:
    parameters = inspect.signature(function).parameters.items()
    return {name: p.default for name, p in parameters if p.default is not inspect.Parameter.empty}


def _given(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}

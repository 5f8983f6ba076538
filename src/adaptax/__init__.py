"""Meta-learning of the MAML family in JAX: short, faithful, fast."""

from typing import Any

from . import conv, inner, io, losses, metrics, models, tasks, testing, tree
from .algorithms.maml import ANIL, FOMAML, MAML, MetaSGD
from .algorithms.reptile import Reptile
from .bridge import from_torch, to_torch
from .evaluate import Evaluator, Report, evaluate, predict
from .io import load, save
from .learner import Ensemble, Functional, MetaLearner
from .losses import Loss
from .mapping import meta_value_and_grad
from .run import Run
from .task import (
    Batch,
    HostTaskDistribution,
    Minibatches,
    Source,
    Splits,
    Task,
    TaskDistribution,
)
from .train import Result, TrainingDiverged, fit

__version__ = "0.1.0"

__all__ = [
    "ANIL",
    "FOMAML",
    "MAML",
    "Batch",
    "Ensemble",
    "Evaluator",
    "Functional",
    "HostTaskDistribution",
    "Loss",
    "MetaLearner",
    "MetaSGD",
    "Minibatches",
    "Report",
    "Reptile",
    "Result",
    "Run",
    "Source",
    "Splits",
    "Task",
    "TaskDistribution",
    "TrainingDiverged",
    "conv",
    "evaluate",
    "fit",
    "from_torch",
    "inner",
    "io",
    "load",
    "losses",
    "meta_value_and_grad",
    "metrics",
    "models",
    "predict",
    "save",
    "tasks",
    "testing",
    "to_torch",
    "tree",
]


def __getattr__(name: str) -> Any:
    """`report`, whose plots load Matplotlib, when it is asked for."""
    if name == "report":
        import importlib

        return importlib.import_module(".report", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

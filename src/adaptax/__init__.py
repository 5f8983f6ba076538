"""Meta-learning of the MAML family in JAX: short, faithful, fast."""

from . import conv, inner, io, losses, metrics, models, tasks, tree
from .algorithms.maml import ANIL, FOMAML, MAML, MetaSGD
from .algorithms.reptile import Reptile
from .evaluate import Report, evaluate, predict
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
    "tree",
]

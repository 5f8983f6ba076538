"""Meta-learning of the MAML family in JAX: short, faithful, fast."""

from typing import Any

from . import (
    analysis,
    batch_norm,
    conv,
    inner,
    io,
    losses,
    metrics,
    models,
    svgd,
    tasks,
    testing,
    tree,
)
from .algorithms.bmaml import BayesianMAML
from .algorithms.checkpoint_ensemble import CheckpointEnsemble
from .algorithms.gaussian import Gaussian, gamma_prior, gaussian_nll
from .algorithms.maml import ANIL, FOMAML, MAML, MetaSGD
from .algorithms.maml_ensemble import MAMLEnsemble
from .algorithms.maml_plus_plus import MAMLPlusPlus
from .algorithms.platipus import PLATIPUS, ProbabilisticMAML
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
    "PLATIPUS",
    "Batch",
    "BayesianMAML",
    "CheckpointEnsemble",
    "Ensemble",
    "Evaluator",
    "Functional",
    "Gaussian",
    "HostTaskDistribution",
    "Loss",
    "MAMLEnsemble",
    "MAMLPlusPlus",
    "MetaLearner",
    "MetaSGD",
    "Minibatches",
    "ProbabilisticMAML",
    "Report",
    "Reptile",
    "Result",
    "Run",
    "Source",
    "Splits",
    "Task",
    "TaskDistribution",
    "TrainingDiverged",
    "analysis",
    "batch_norm",
    "conv",
    "evaluate",
    "fit",
    "from_torch",
    "gamma_prior",
    "gaussian_nll",
    "inner",
    "io",
    "load",
    "losses",
    "meta_value_and_grad",
    "metrics",
    "models",
    "predict",
    "save",
    "svgd",
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

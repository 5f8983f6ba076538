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
    rl,
    roles,
    svgd,
    tasks,
    testing,
    tree,
)
from .algorithms.baselines import NearestClassMean, RidgeRegression
from .algorithms.bmaml import BayesianMAML
from .algorithms.checkpoint_ensemble import CheckpointEnsemble
from .algorithms.gaussian import Gaussian, gamma_prior, gaussian_nll
from .algorithms.leo import LEO, LEORegression
from .algorithms.maml import ANIL, FOMAML, MAML, MetaSGD
from .algorithms.maml_ensemble import MAMLEnsemble
from .algorithms.maml_plus_plus import MAMLPlusPlus
from .algorithms.platipus import PLATIPUS, ProbabilisticMAML
from .algorithms.reptile import Reptile
from .augment import Augmentation
from .bridge import from_torch, to_torch
from .evaluate import Evaluator, Report, evaluate, predict
from .io import load, save
from .learner import Batched, Ensemble, Functional, MetaLearner
from .losses import Loss
from .mapping import meta_value_and_grad
from .pretrain import Pretraining, extract, pretrain
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
from .train import Outer, Result, TrainingDiverged, fit

__version__ = "0.1.0"

__all__ = [
    "ANIL",
    "FOMAML",
    "LEO",
    "MAML",
    "PLATIPUS",
    "Augmentation",
    "Batch",
    "Batched",
    "BayesianMAML",
    "CheckpointEnsemble",
    "Ensemble",
    "Evaluator",
    "Functional",
    "Gaussian",
    "HostTaskDistribution",
    "LEORegression",
    "Loss",
    "MAMLEnsemble",
    "MAMLPlusPlus",
    "MetaLearner",
    "MetaSGD",
    "Minibatches",
    "NearestClassMean",
    "Outer",
    "Pretraining",
    "ProbabilisticMAML",
    "Report",
    "Reptile",
    "Result",
    "RidgeRegression",
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
    "extract",
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
    "pretrain",
    "rl",
    "roles",
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

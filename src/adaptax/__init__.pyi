"""The public names, and where they are; `__init__.py` imports each when it is asked for."""

from . import (
    batch_norm,
    conv,
    inner,
    io,
    losses,
    metrics,
    models,
    report,
    rl,
    roles,
    studies,
    svgd,
    tasks,
    testing,
    tree,
)
from .algorithms.baselines import NearestClassMean, RidgeRegression
from .algorithms.bmaml import BayesianMAML
from .algorithms.checkpoint_ensemble import CheckpointEnsemble
from .algorithms.context import ContextAdaptation
from .algorithms.gaussian import Gaussian, gamma_prior, gaussian_nll
from .algorithms.gaussian_process import GaussianProcessHead
from .algorithms.leo import LEO
from .algorithms.leo_regression import LEORegression
from .algorithms.maml import ANIL, FOMAML, MAML, MetaSGD
from .algorithms.maml_ensemble import MAMLEnsemble
from .algorithms.maml_plus_plus import MAMLPlusPlus
from .algorithms.platipus import PLATIPUS, ProbabilisticMAML
from .algorithms.proto_maml import ProtoMAML
from .algorithms.prototypes import PrototypicalNetwork
from .algorithms.reptile import Reptile
from .algorithms.shared_head import SharedHead
from .engine.augment import Augmentation
from .engine.conformal import Conformal, conformal
from .engine.evaluate import Evaluator, evaluate
from .engine.extract import extract
from .engine.mapping import meta_value_and_grad
from .engine.predict import predict
from .engine.pretrain import Pretraining, pretrain
from .engine.report import Report
from .engine.run import Run
from .engine.steps import Outer
from .engine.train import Result, TrainingDiverged, fit
from .io import load, save
from .learner import Adapter, Batched, Ensemble, Functional, MetaLearner
from .losses import Loss
from .models.bridge import from_torch, to_torch
from .processes import distributed
from .recipes.runs import LoadedRun, load_run
from .task import (
    Batch,
    HostTaskDistribution,
    Minibatches,
    Source,
    Splits,
    Task,
    TaskDistribution,
)

__version__: str

__all__ = [
    "ANIL",
    "FOMAML",
    "LEO",
    "MAML",
    "PLATIPUS",
    "Adapter",
    "Augmentation",
    "Batch",
    "Batched",
    "BayesianMAML",
    "CheckpointEnsemble",
    "Conformal",
    "ContextAdaptation",
    "Ensemble",
    "Evaluator",
    "Functional",
    "Gaussian",
    "GaussianProcessHead",
    "HostTaskDistribution",
    "LEORegression",
    "LoadedRun",
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
    "ProtoMAML",
    "PrototypicalNetwork",
    "Report",
    "Reptile",
    "Result",
    "RidgeRegression",
    "Run",
    "SharedHead",
    "Source",
    "Splits",
    "Task",
    "TaskDistribution",
    "TrainingDiverged",
    "batch_norm",
    "conformal",
    "conv",
    "distributed",
    "evaluate",
    "extract",
    "fit",
    "from_torch",
    "gamma_prior",
    "gaussian_nll",
    "inner",
    "io",
    "load",
    "load_run",
    "losses",
    "meta_value_and_grad",
    "metrics",
    "models",
    "predict",
    "pretrain",
    "report",
    "rl",
    "roles",
    "save",
    "studies",
    "svgd",
    "tasks",
    "testing",
    "to_torch",
    "tree",
]

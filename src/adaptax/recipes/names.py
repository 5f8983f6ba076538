"""What experiments can name: algorithms, task families, losses; and which go together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from .. import inner, losses, rl, tasks
from ..algorithms.baselines import NearestClassMean, RidgeRegression
from ..algorithms.bmaml import BayesianMAML
from ..algorithms.gaussian import gaussian_nll
from ..algorithms.leo import LEO
from ..algorithms.maml import ANIL, FOMAML, MAML, MetaSGD
from ..algorithms.maml_ensemble import MAMLEnsemble
from ..algorithms.maml_plus_plus import MAMLPlusPlus
from ..algorithms.platipus import ProbabilisticMAML
from ..algorithms.reptile import Reptile
from ..learner import MetaLearner
from ..losses import Loss
from ..task import Splits


def Pretrained(loss: Loss, inner_lr: inner.Rate = 0.01, **how: Any) -> MAML:
    """The baseline without meta-learning: joint training on all tasks, then fine-tuning.

    MAML with no inner step while training; `eval_steps` are the steps of fine-tuning.
    """
    return MAML(loss, inner_lr, 0, **how)


ALGORITHMS: dict[str, Callable[..., MetaLearner]] = {
    "maml": MAML,
    "fomaml": FOMAML,
    "anil": ANIL,
    "meta-sgd": MetaSGD,
    "maml++": MAMLPlusPlus,
    "reptile": Reptile,
    "platipus": ProbabilisticMAML,
    "bmaml": BayesianMAML,
    "emaml": MAMLEnsemble,
    "leo": LEO,
    "pretrained": Pretrained,
    "class-mean": NearestClassMean,
    "ridge": RidgeRegression,
}
TITLES = {
    "maml": "MAML",
    "fomaml": "FOMAML",
    "anil": "ANIL",
    "meta-sgd": "Meta-SGD",
    "maml++": "MAML++",
    "reptile": "Reptile",
    "platipus": "PLATIPUS",
    "bmaml": "BMAML",
    "emaml": "EMAML",
    "leo": "LEO",
    "pretrained": "Pretrained",
    "class-mean": "Nearest class mean",
    "ridge": "Ridge",
}
"""How reports and plots write the algorithms."""
TASKS: dict[str, Callable[..., Splits]] = {
    "sinusoid": tasks.sinusoid,
    "omniglot": tasks.omniglot,
    "mini_imagenet": tasks.mini_imagenet,
    "glyphs": tasks.glyphs,
    "folder": tasks.folder,
    "sinusoid_or_line": tasks.sinusoid_or_line,
    "finite_sinusoids": tasks.finite_sinusoids,
    "circles": tasks.circles,
    "celeba": tasks.celeba,
    "fsmol": tasks.fsmol,
    "embeddings": tasks.embeddings,
    "navigation": rl.navigation,
    "bandit": rl.bandit,
    "tabular_mdp": rl.tabular_mdp,
    "half_cheetah": rl.half_cheetah,
    "ant": rl.ant,
}
ENVIRONMENTS = ("navigation", "bandit", "tabular_mdp", "half_cheetah", "ant")
"""Families of reinforcement learning."""
REINFORCED = ("maml", "fomaml", "meta-sgd", "reptile", "bmaml", "pretrained")
"""Algorithms that are tested on them."""
CURVES = ("sinusoid", "sinusoid_or_line", "finite_sinusoids")
"""Families of tasks that are functions of one variable."""
REGRESSIONS = (*CURVES, "fsmol")
"""Families whose targets are numbers."""
IMAGES = ("omniglot", "mini_imagenet", "glyphs", "folder", "celeba")
"""Families of images."""
DOWNLOADED = ("omniglot", "mini_imagenet", "celeba", "fsmol")
"""Families that are read from `data_root`."""
INPUTS = {"circles": 2, "fsmol": 2048}
"""Width of the inputs of families that are not images, if not 1."""
LOSSES = {
    "mse": losses.mse,
    "relative_mse": losses.relative_mse,
    "normal": losses.normal,
    "cross_entropy": losses.cross_entropy,
    "gaussian": gaussian_nll,
    **rl.OBJECTIVES,
}


def demand(algorithm: str, tasks: str) -> None:
    """That an algorithm can do these tasks at all.

    Args:
        algorithm: a name in `ALGORITHMS`.
        tasks: a name in `TASKS`.

    Raises:
        ValueError: if it cannot, and what can.
    """
    if tasks in ENVIRONMENTS and algorithm not in REINFORCED:
        raise ValueError(
            f"{tasks} tasks are of reinforcement learning, for {', '.join(REINFORCED)}, and not "
            f"for {algorithm}"
        )
    if algorithm == "ridge" and tasks not in REGRESSIONS:
        raise ValueError(
            f"ridge regression is for numbers ({', '.join(REGRESSIONS)}), not for classes, as "
            f"{tasks} has them; compare with class-mean or pretrained instead"
        )
    if algorithm == "class-mean" and (tasks in REGRESSIONS or tasks == "circles"):
        raise ValueError(
            "the nearest class mean is for classes that all have support, which "
            f"{tasks} tasks are not; compare with pretrained instead"
        )
    if algorithm == "leo" and tasks not in (*CURVES, "embeddings"):
        raise ValueError(
            f"LEO generates linear classifiers of embeddings, or small regressors of "
            f"{', '.join(CURVES)}, and nothing as large as a network for {tasks}; of images, "
            "`adaptax pretrain` and `adaptax embed` make embeddings first"
        )


ACTIVATIONS = {"relu": jax.nn.relu, "tanh": jnp.tanh}

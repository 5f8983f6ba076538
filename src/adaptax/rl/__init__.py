"""Meta reinforcement learning: environments, roll-outs as sources of batches, TRPO and PPO.

    tasks = rl.Tasks(rl.Navigation(), trajectories=20, horizon=100)
    policy = rl.GaussianMLP(2, 2, key=key)
    learner = adaptax.MAML(rl.log_prob, inner_lr=0.1)
    result = adaptax.fit(learner, policy, tasks, steps=500, meta_batch=20, outer=rl.TRPO(), key=key)
    print(rl.evaluate(learner, result.meta, tasks, lr=(0.1, 0.05), key=key))

The learners are those of supervised learning, unchanged: a task's support and query answer with
roll-outs of the policy they are handed, where elsewhere they answer with data.
"""

import importlib
from typing import TYPE_CHECKING, Any

from ..distributions import Categorical, Gaussian, StackedDistribution
from ..engine.evaluate import Evaluator, evaluate
from ..engine.report import Report as Returns
from ..task import Frozen
from .advantages import discounted, gae, masked_mean, standardise
from .bandit import Bandit, GaussianBandit
from .baseline import features, fitted_values
from .environment import Environment
from .families import ant, bandit, half_cheetah, navigation, splits, tabular_mdp
from .frozen import Collected, adapt, collect
from .hosted import Gymnasium
from .locomotion import Locomotion
from .navigation import Navigation
from .objectives import OBJECTIVES, dice, importance, log_prob, lvc
from .outer import OnRollOuts
from .particles import ParticleTRPO
from .ppo import PPO
from .rollout import RollOut, Steps, Tasks
from .tabular import TabularMDP
from .trpo import TRPO, conjugate_gradient, line_search, natural_step

if TYPE_CHECKING:
    from ..algorithms.svpg import CODE_KERNEL, KERNELS, BayesianMAML, Policies
    from ..models.policies import CategoricalMLP, GaussianMLP

Laws = StackedDistribution

_ELSEWHERE = {
    **dict.fromkeys(("CODE_KERNEL", "KERNELS", "BayesianMAML", "Policies"), "algorithms.svpg"),
    **dict.fromkeys(("CategoricalMLP", "GaussianMLP"), "models.policies"),
}
"""An algorithm and networks, of rooms that nothing here imports: by their names alone."""


def __getattr__(name: str) -> Any:
    """Import what is elsewhere when it is asked for."""
    if name not in _ELSEWHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"adaptax.{_ELSEWHERE[name]}"), name)


__all__ = [
    "CODE_KERNEL",
    "KERNELS",
    "OBJECTIVES",
    "PPO",
    "TRPO",
    "Bandit",
    "BayesianMAML",
    "Categorical",
    "CategoricalMLP",
    "Collected",
    "Environment",
    "Evaluator",
    "Frozen",
    "Gaussian",
    "GaussianBandit",
    "GaussianMLP",
    "Gymnasium",
    "Laws",
    "Locomotion",
    "Navigation",
    "OnRollOuts",
    "ParticleTRPO",
    "Policies",
    "Returns",
    "RollOut",
    "StackedDistribution",
    "Steps",
    "TabularMDP",
    "Tasks",
    "adapt",
    "ant",
    "bandit",
    "collect",
    "conjugate_gradient",
    "dice",
    "discounted",
    "evaluate",
    "features",
    "fitted_values",
    "gae",
    "half_cheetah",
    "importance",
    "line_search",
    "log_prob",
    "lvc",
    "masked_mean",
    "natural_step",
    "navigation",
    "splits",
    "standardise",
    "tabular_mdp",
]

"""What the papers derive and observe, measured: of meta-gradients, and of active learning."""

from .active import STRATEGIES, ActiveCurves, active_learning, unsureness
from .gradients import ARMS, COMBINATIONS, Combination, overlap
from .taylor import Expansion, predicted_coefficients, taylor_coefficients

__all__ = [
    "ARMS",
    "COMBINATIONS",
    "STRATEGIES",
    "ActiveCurves",
    "Combination",
    "Expansion",
    "active_learning",
    "overlap",
    "predicted_coefficients",
    "taylor_coefficients",
    "unsureness",
]

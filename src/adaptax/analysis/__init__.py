"""What the papers derive and observe about meta-gradients, measured."""

from .gradients import ARMS, COMBINATIONS, Combination, overlap
from .taylor import Expansion, predicted_coefficients, taylor_coefficients

__all__ = [
    "ARMS",
    "COMBINATIONS",
    "Combination",
    "Expansion",
    "overlap",
    "predicted_coefficients",
    "taylor_coefficients",
]

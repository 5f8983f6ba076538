"""Plots and tables of what was learned: Matplotlib figures and Rich tables."""

from .plots import ablation, comparison, learning_curve
from .predictions import adaptation, adaptations, episode_sheet
from .tables import comparison_table, number, protocol_line, report_table, returns_table, summary

__all__ = [
    "ablation",
    "adaptation",
    "adaptations",
    "comparison",
    "comparison_table",
    "episode_sheet",
    "learning_curve",
    "number",
    "protocol_line",
    "report_table",
    "returns_table",
    "summary",
]

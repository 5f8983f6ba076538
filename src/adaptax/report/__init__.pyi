"""The public names, and where they are; `__init__.py` imports each when it is asked for."""

from .calibration import coverage_diagram, reliability
from .plots import ablation, comparison, learning_curve
from .predictions import adaptation, adaptations, episode_sheet
from .returns import returns_by_step, trajectories
from .rows import error_by_support, parity
from .style import save
from .sweeps import sweep
from .tables import (
    Mean,
    Sheet,
    comparison_table,
    number,
    protocol_line,
    report_table,
    returns_table,
    summary,
)
from .uncertainty import active_curves, attribute_sheet, decision_boundaries, sampled_functions

__all__ = [
    "Mean",
    "Sheet",
    "ablation",
    "active_curves",
    "adaptation",
    "adaptations",
    "attribute_sheet",
    "comparison",
    "comparison_table",
    "coverage_diagram",
    "decision_boundaries",
    "episode_sheet",
    "error_by_support",
    "learning_curve",
    "number",
    "parity",
    "protocol_line",
    "reliability",
    "report_table",
    "returns_by_step",
    "returns_table",
    "sampled_functions",
    "save",
    "summary",
    "sweep",
    "trajectories",
]

"""What the papers compare, derive and observe, measured; each from Python and the command line.

study = adaptax.studies.compare("sinusoid", ["maml", "reptile"], steps=1000, out="runs/x")
print(study)               # the table
study.figures              # Matplotlib figures by name
study.save()               # figures, tables and JSON, beside the trainings in runs/x
"""

from .ablation import ablate
from .acquisition import analyze_active
from .active import STRATEGIES, ActiveCurves, acquisition_score, active_learning
from .comparison import compare
from .expansion import analyze_taylor
from .gradients import ARMS, COMBINATIONS, Combination, analyze_gradients, overlap
from .study import Lab, Row, Study
from .taylor import Expansion, predicted_coefficients, taylor_coefficients

__all__ = [
    "ARMS",
    "COMBINATIONS",
    "STRATEGIES",
    "ActiveCurves",
    "Combination",
    "Expansion",
    "Lab",
    "Row",
    "Study",
    "ablate",
    "acquisition_score",
    "active_learning",
    "analyze_active",
    "analyze_gradients",
    "analyze_taylor",
    "compare",
    "overlap",
    "predicted_coefficients",
    "taylor_coefficients",
    "unsureness",
]

unsureness = acquisition_score
"""The name of `acquisition_score` until now."""

"""Named recipes: one for each cell of the papers' tables, and short versions for a CPU."""

from .ablation import ROWS, ablated
from .bayesian import CELLS, COMPARED_ON, compared, with_noise
from .book import COMPARED, PAPER_CURVES, RECIPES, Recipe, closest, comparable, origin
from .effective import effective
from .experiment import Experiment, changed
from .names import (
    ALGORITHMS,
    CURVES,
    ENVIRONMENTS,
    IMAGES,
    REGRESSIONS,
    TASKS,
    TITLES,
    demand,
)
from .reinforcement import BODIES, COMPARED_IN, RETURNS, oracle, shortened

__all__ = [
    "ALGORITHMS",
    "BODIES",
    "CELLS",
    "COMPARED",
    "COMPARED_IN",
    "COMPARED_ON",
    "CURVES",
    "ENVIRONMENTS",
    "IMAGES",
    "PAPER_CURVES",
    "RECIPES",
    "REGRESSIONS",
    "RETURNS",
    "ROWS",
    "TASKS",
    "TITLES",
    "Experiment",
    "Recipe",
    "ablated",
    "changed",
    "closest",
    "comparable",
    "compared",
    "demand",
    "effective",
    "oracle",
    "origin",
    "shortened",
    "with_noise",
]

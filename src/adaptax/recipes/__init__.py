"""Named recipes: one for each cell of the papers' tables, and short versions for a CPU."""

from .ablation import ROWS, ablated
from .book import COMPARED, PAPER_CURVES, RECIPES, Recipe, closest, comparable
from .experiment import ALGORITHMS, TASKS, TITLES, Experiment

__all__ = [
    "ALGORITHMS",
    "COMPARED",
    "PAPER_CURVES",
    "RECIPES",
    "ROWS",
    "TASKS",
    "TITLES",
    "Experiment",
    "Recipe",
    "ablated",
    "closest",
    "comparable",
]

"""Named recipes: one for each cell of the papers' tables, and short versions for a CPU."""

from .book import RECIPES, Recipe, closest
from .experiment import ALGORITHMS, TASKS, Experiment

__all__ = ["ALGORITHMS", "RECIPES", "TASKS", "Experiment", "Recipe", "closest"]

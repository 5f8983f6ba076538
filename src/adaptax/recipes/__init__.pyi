"""The public names, and where they are."""

from . import authors, book, parts, rows, runs, schema, table
from .book import COMPARED, RECIPES, Recipe, closest, comparable, default_learners, origin
from .effective import effective
from .experiment import Experiment, changed
from .table import (
    AMBIGUOUS,
    BODIES,
    CURVES,
    ENVIRONMENTS,
    FAMILIES,
    IMAGES,
    LEARNERS,
    REGRESSIONS,
    TITLES,
    check_supported,
    trust,
)
from .variants import PAPER_CURVES, RETURNS, ROWS, ablated, oracle, with_noise

__all__ = [
    "AMBIGUOUS",
    "BODIES",
    "COMPARED",
    "CURVES",
    "ENVIRONMENTS",
    "FAMILIES",
    "IMAGES",
    "LEARNERS",
    "PAPER_CURVES",
    "RECIPES",
    "REGRESSIONS",
    "RETURNS",
    "ROWS",
    "TITLES",
    "Experiment",
    "Recipe",
    "ablated",
    "authors",
    "book",
    "changed",
    "check_supported",
    "closest",
    "comparable",
    "default_learners",
    "effective",
    "oracle",
    "origin",
    "parts",
    "rows",
    "runs",
    "schema",
    "table",
    "trust",
    "with_noise",
]

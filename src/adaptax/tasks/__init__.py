"""Distributions of tasks: generated functions, and episodes of classified images."""

from adaptax.tasks.arrays import from_arrays
from adaptax.tasks.attributes import AttributeTasks, StreamedAttributeTasks, score_readings
from adaptax.tasks.celeba import celeba
from adaptax.tasks.circles import Circles, circles
from adaptax.tasks.embeddings import embeddings
from adaptax.tasks.episodes import Episodes, StreamedEpisodes
from adaptax.tasks.files import DataError
from adaptax.tasks.finite_sinusoids import FiniteSinusoids, finite_sinusoids
from adaptax.tasks.folder import folder
from adaptax.tasks.from_tasks import from_tasks
from adaptax.tasks.fsmol import FSMol, fsmol
from adaptax.tasks.glyphs import glyphs
from adaptax.tasks.lines import SinusoidOrLine, sinusoid_or_line
from adaptax.tasks.mini_imagenet import mini_imagenet
from adaptax.tasks.omniglot import omniglot
from adaptax.tasks.preparation import Preparation
from adaptax.tasks.ragged import RaggedTasks
from adaptax.tasks.sinusoid import Sinusoid, sinusoid
from adaptax.tasks.table import table

__all__ = [
    "AttributeTasks",
    "Circles",
    "DataError",
    "Episodes",
    "FSMol",
    "FiniteSinusoids",
    "Preparation",
    "RaggedTasks",
    "Sinusoid",
    "SinusoidOrLine",
    "StreamedAttributeTasks",
    "StreamedEpisodes",
    "celeba",
    "circles",
    "embeddings",
    "finite_sinusoids",
    "folder",
    "from_arrays",
    "from_tasks",
    "fsmol",
    "glyphs",
    "mini_imagenet",
    "omniglot",
    "score_readings",
    "sinusoid",
    "sinusoid_or_line",
    "table",
]

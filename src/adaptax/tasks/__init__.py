"""Distributions of tasks: generated functions, and episodes of classified images."""

from adaptax.tasks.arrays import from_arrays
from adaptax.tasks.episodes import Episodes, StreamedEpisodes
from adaptax.tasks.folder import folder
from adaptax.tasks.glyphs import glyphs
from adaptax.tasks.mini_imagenet import mini_imagenet
from adaptax.tasks.omniglot import omniglot
from adaptax.tasks.sinusoid import Sinusoid, sinusoid
from adaptax.tasks.sources import DataError

__all__ = [
    "DataError",
    "Episodes",
    "Sinusoid",
    "StreamedEpisodes",
    "folder",
    "from_arrays",
    "glyphs",
    "mini_imagenet",
    "omniglot",
    "sinusoid",
]

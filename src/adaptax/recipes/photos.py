"""A user's own photos, read as the images of a run were."""

from __future__ import annotations

import dataclasses
import glob
import os
import zipfile
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from ..tasks import images
from ..tasks.episodes import Design
from ..tasks.files import DataError, Files, is_hidden, open_files
from ..tasks.mini_imagenet import IMAGENET_MEAN, IMAGENET_STD
from .effective import effective
from .experiment import Experiment


@dataclasses.dataclass(frozen=True)
class ImageFormat:
    """How images become inputs of a network.

    Args:
        size: side in pixels.
        channels: 1 or 3.
        resample: filter.
        design: scales, inverts and normalises.
    """

    size: int
    channels: int
    resample: str
    design: Design


def image_format(experiment: Experiment, invert: bool = False) -> ImageFormat:
    """Return the format that the images of an experiment had in training.

    Args:
        experiment: on images.
        invert: the other way round: for images that are light where those were dark.
    """
    task = effective(experiment)["task"]
    channels = task.get("channels", experiment.family.channels)
    normal: dict[str, Any] = {}
    if task.get("normalise"):
        normal = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}
    inverted = task.get("invert", False) != invert
    design = Design(task.get("way", 2), 1, 0, invert=inverted, **normal)
    resample = task.get("resample", "lanczos")
    return ImageFormat(task.get("image_size", 28), channels, resample, design)


def support_in(where: Path, form: ImageFormat) -> tuple[Any, Any, list[str]]:
    """Return inputs, labels and class names of a folder of class folders.

    Args:
        where: the folder.
        form: of the images.

    Raises:
        FileNotFoundError: if there is no such folder.
        DataError: if it has no classes, or an image cannot be read.
    """
    if not where.is_dir():
        raise FileNotFoundError(f"--support {where} is not a folder; expected one folder a class")
    classes = sorted(p.name for p in where.iterdir() if p.is_dir() and not is_hidden(p.name))
    each = [_decode(where / name, form)[1] for name in classes]
    if not each:
        raise DataError(f"{where} has no class folders; expected one folder a class")
    labels = np.repeat(np.arange(len(classes), dtype=np.int32), [len(x) for x in each])
    return jnp.concatenate(each), jnp.asarray(labels), classes


def queries_in(words: tuple[str, ...], form: ImageFormat) -> tuple[list[str], Any]:
    """Return names and inputs of files, of the images below folders or in archives, of patterns.

    Args:
        words: files, folders, archives or patterns.
        form: of the images.

    Raises:
        FileNotFoundError: if there is nothing of a name.
        DataError: if there is no image, or one cannot be read.
    """
    names: list[str] = []
    inputs = []
    for word in words:
        found = [word] if os.path.lexists(word) else sorted(glob.glob(word, recursive=True))
        if not found:
            raise FileNotFoundError(f"--query {word}: there is no such file or folder")
        for one in found:
            some, x = _decode(Path(one), form)
            # Of a single folder the names are those below it.
            alone = len(words) == len(found) == 1
            names += [one if name == "" else name if alone else f"{one}/{name}" for name in some]
            inputs.append(x)
    if not inputs:
        raise ValueError("--query wants files or folders of images")
    return names, jnp.concatenate(inputs)


def _decode(where: Path, form: ImageFormat) -> tuple[list[str], Any]:
    """Return names and inputs of the images below a folder, in an archive, or of one file, ""."""
    if where.is_file() and not zipfile.is_zipfile(where):
        one = Files(where.parent, ("",), "", lambda name: where.read_bytes())
        return [""], _pixels(one, [""], form)
    if where.exists() and not (where.is_dir() or where.is_file()):
        raise DataError(f"{where} is neither a file nor a folder")
    with open_files(where) as files:
        names = [name for name in files.names if images.is_image(name)]
        if not names:
            raise DataError(f"{where} holds no images; expected files such as 01.png")
        return names, _pixels(files, names, form)


def _pixels(files: Files, names: list[str], form: ImageFormat) -> Any:
    pixels = np.empty((len(names), form.size, form.size, form.channels), np.uint8)
    images.decode_into(pixels, files, names, resample=form.resample)
    return form.design.inputs(jnp.asarray(pixels))

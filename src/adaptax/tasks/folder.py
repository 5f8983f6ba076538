"""Any folder or zip archive of images, a class a directory."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from adaptax.task import Splits
from adaptax.tasks import bank, images, sources
from adaptax.tasks.bank import MEMORY_BUDGET
from adaptax.tasks.cache import cached
from adaptax.tasks.episodes import Rotations
from adaptax.tasks.sources import DataError


def folder(
    path: str | os.PathLike,
    way: int = 5,
    shot: int = 1,
    query: int = 15,
    *,
    train_shot: int | None = None,
    train_query: int | None = None,
    image_size: int = 84,
    channels: int = 3,
    splits: Sequence[float] = (0.64, 0.16, 0.2),
    seed: int = 0,
    rotations: tuple[Rotations, Rotations] = ("none", "none"),
    invert: bool = False,
    resample: str = "lanczos",
    memory_budget: int = MEMORY_BUDGET,
) -> Splits:
    """Episodes of the images in a folder, x `(n, image_size, image_size, channels)` in [0, 1].

    Two layouts: `class/image.png`, whose classes are split at random, and
    `train/class/image.png` with `val` and `test` beside it. A class is the directory that holds
    the image, named by its whole path, so `alphabet/letter/image.png` works too. Other files are
    passed over and counted in `describe()["ignored"]`.

    Args:
        path: the folder or zip archive; one directory that wraps all others is looked through.
        way: classes an episode.
        shot: support images a class.
        query: query images a class.
        train_shot: support images a class in meta-training, if not `shot`.
        train_query: query images a class in meta-training, if not `query`.
        image_size: side in pixels; images are resized to the square, whatever their aspect.
        channels: 1 for grey, 3 for colour.
        splits: fractions of the classes for train, val and test, in the first layout.
        seed: of that split.
        rotations: in meta-training, and in validation and test.
        invert: turn bytes b into 255 − b, for dark ink on light paper.
        resample: nearest, bilinear, bicubic or lanczos.
        memory_budget: in bytes; a larger data set is streamed from the host.

    Raises:
        FileNotFoundError: if there is no such path.
        DataError: if an image cannot be read or there are too few classes or images.
    """
    design = bank.designs(way, shot, query, train_shot, train_query, rotations, invert=invert)
    images.check_format(image_size, channels, resample)
    where = Path(path).expanduser()
    with sources.open_files(where) as files:
        names = [name for name in files.names if images.is_image(name)]
        if not names:
            raise DataError(
                f"{where} holds no images ({len(files.names)} other files); expected "
                "class/image.png or train/class/image.png"
            )
        shape = (len(names), image_size, image_size, channels)
        array = cached(
            "folder",
            [files.fingerprint, resample],
            shape,
            lambda out: images.decode_into(out, files, names, resample=resample),
        )
    wrapped = os.path.commonpath([os.path.dirname(name) for name in names])
    rows: dict[str, list[int]] = {}
    for row, name in enumerate(names):
        rows.setdefault(os.path.relpath(os.path.dirname(name), wrapped or "."), []).append(row)
    classes = {name: np.array(of) for name, of in rows.items()}
    tops = {name.split("/")[0] for name in classes}
    details: tuple[tuple[str, object], ...] = (
        ("image_size", image_size),
        ("ignored", len(files.names) - len(names)),
    )
    if tops & {"train", "test"}:
        parts = {
            split: {
                n.removeprefix(split + "/"): r
                for n, r in classes.items()
                if n.startswith(split + "/")
            }
            for split in sorted(tops)
        }
    else:
        cut = bank.split_by_fraction(list(classes), splits, seed)
        parts = {split: {n: classes[n] for n in part} for split, part in cut.items()}
        details += (("splits", tuple(splits)), ("split_seed", seed))
    return bank.make_splits(
        array, parts, design, name=where.stem, details=details, memory_budget=memory_budget
    )

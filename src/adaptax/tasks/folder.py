"""Any folder or zip archive of images, a class a directory."""

from __future__ import annotations

import os
import posixpath
from collections.abc import Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path

import numpy as np

from adaptax.task import Splits
from adaptax.tasks import bank, images
from adaptax.tasks.bank import MEMORY_BUDGET
from adaptax.tasks.episodes import Details, Rotations
from adaptax.tasks.files import DataError, open_files
from adaptax.tasks.layout import Classes, arrange
from adaptax.text import shown


def folder(
    path: str | os.PathLike[str],
    way: int = 5,
    shot: int = 1,
    query: int | None = None,
    *,
    train_shot: int | None = None,
    train_query: int | None = None,
    image_size: int = 84,
    channels: int = 3,
    splits: Sequence[float] | None = None,
    seed: int = 0,
    rotations: tuple[Rotations, Rotations] = ("none", "none"),
    invert: bool = False,
    resample: str = "lanczos",
    min_images: int | None = None,
    memory_budget: int = MEMORY_BUDGET,
) -> Splits:
    """Return episodes of the images in a folder, x `(n, size, size, channels)` in [0, 1].

    Two layouts: `class/image.png`, whose classes are split at random, and
    `train/class/image.png` with `val` and `test` beside it, called by any of their usual names
    (`layout.SPLITS`). A class is the directory that holds the image, named by its whole path, so
    `alphabet/letter/image.png` works too.

    The folder is what its owner sees in a file manager: what is hidden is none of it, links are
    followed. Other files, and images beside the class folders, are passed over and counted in
    `describe()["ignored"]`. Of images see `images.decode`; how many have several frames, of which
    the first is taken, is in `describe()["first_frame_of"]`.

    Args:
        path: the folder or zip archive; one directory that wraps all others is looked through.
        way: classes an episode.
        shot: support images a class.
        query: query images a class; 15 if `None`, or as many as the smallest class leaves.
        train_shot: support images a class in meta-training, if not `shot`.
        train_query: query images a class in meta-training, if not `query`.
        image_size: side in pixels; images are resized to the square, whatever their aspect.
        channels: 1 for grey, 3 for colour.
        splits: fractions of the classes for train, val and test, in the first layout; if `None`,
            (0.64, 0.16, 0.2), or others where these give a split fewer classes than `way`, see
            `describe()["splits"]`.
        seed: of that split.
        rotations: in meta-training, and in validation and test.
        invert: turn bytes b into 255 − b, for dark ink on light paper.
        resample: nearest, bilinear, bicubic or lanczos.
        min_images: leave out classes with fewer images than this, before the split, and list them
            in `describe()["left_out"]`; `None` to refuse classes with too few for an episode.
        memory_budget: in bytes; a larger data set is streamed from the host.

    Raises:
        FileNotFoundError: if there is no such path.
        DataError: if an image cannot be read, there are too few classes or images, links lead
            nowhere, or folders of splits are incomplete or mixed with classes.

    Warns:
        UserWarning: if an image is in two splits.
    """
    designs = partial(
        bank.designs, way, shot, train_shot=train_shot, train_query=train_query,
        rotations=rotations, invert=invert,
    )  # fmt: skip
    designs(query=query)  # bad counts are told first
    images.check_format(image_size, channels, resample)
    where = Path(path).expanduser()
    with open_files(where) as files:
        names = [n for n in files.names if images.is_image(n) or images.is_unread(n)]
        if not names:
            raise DataError(
                f"{shown(where)} holds no images ({len(files.names)} other files); expected "
                "class/image.png or train/class/image.png"
            )
        parts, stray = arrange(names, shown(where))
        ignored = len(files.names) - len(names) + len(stray)
        left_out = _leave_out(parts, min_images)
        used = [name for classes in parts.values() for of in classes.values() for name in of]
        unread = list(filter(images.is_unread, used))
        if unread:
            raise DataError(
                f"{shown(where)}: {len(unread)} pictures are of a format that is not read, first "
                f"{shown(unread[0])}; convert them to PNG or JPEG, or remove them"
            )
        place = {name: row for row, name in enumerate(used)}
        rows = {
            split: {name: np.array([place[n] for n in of]) for name, of in classes.items()}
            for split, classes in parts.items()
        }
        classes, design, how, shared = bank.settle(rows, splits, seed, query, designs)
        need = [d.shot + d.query for d in design.values()]
        if min_images is None:
            _check_beside(parts, min(need), shown(where))
        array, checksums, several = images.decode_all(
            "folder", [(files, used)], image_size, channels, resample, key=[resample, min_images]
        )
    details: Details = (("image_size", image_size), ("ignored", ignored))
    if several:
        details += (("first_frame_of", several),)
    if min_images is not None:
        details += (("min_images", min_images), ("left_out", left_out))
    return bank.make_splits(
        array,
        classes,
        design,
        name=where.stem,
        details=details + how,
        memory_budget=memory_budget,
        shared=shared,
        checksums=checksums,
        names=used,
        leave_out=f"leave such classes out by min_images={max(need)}",
    )


def _leave_out(parts: dict[str, Classes], least: int | None) -> tuple[str, ...]:
    """Drop the classes with fewer images, and return their names."""
    small = [(split, name) for split, classes in parts.items() for name, of in classes.items()
             if len(of) < (least or 0)]  # fmt: skip
    if len(small) == sum(map(len, parts.values())):
        raise DataError(f"all {len(small)} classes have fewer than min_images={least} images")
    for split, name in small:
        del parts[split][name]
    return tuple(f"{split}/{name}".removeprefix("/") for split, name in small)


def _check_beside(parts: dict[str, Classes], need: int, where: str) -> None:
    """Raise DataError for a few images beside class folders, which are no class."""
    for classes in parts.values():
        above = {f for name in classes for f in accumulate(name.split("/")[:-1], posixpath.join)}
        for name in sorted(above & set(classes)):
            if len(classes[name]) < need:
                raise DataError(
                    f"{where}: {shown(classes[name][0])} lies beside class folders; put it into "
                    "one or remove it"
                )

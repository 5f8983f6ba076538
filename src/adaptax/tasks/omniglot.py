"""Omniglot: 1623 handwritten characters, 20 drawings each (Lake et al. 2015)."""

from __future__ import annotations

import os
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from adaptax.task import Splits
from adaptax.tasks import bank, images
from adaptax.tasks.bank import MEMORY_BUDGET
from adaptax.tasks.cache import Cached
from adaptax.tasks.episodes import Rotations
from adaptax.tasks.files import DataError, data_folder, first_existing, open_files

URL = "https://raw.githubusercontent.com/brendenlake/omniglot/master/python/"
MD5 = {
    "images_background": "68d2efa1b9178cc56df9314c21c6e718",
    "images_evaluation": "6b91aef0f799c5bb55b94e3f2daec811",
}


@dataclass(frozen=True)
class Protocol:
    """How a paper's program splits and treats Omniglot.

    Args:
        sizes: characters for train, val and test.
        rotations: in meta-training, and in validation and test.
        invert: make ink 1 and paper 0.
        resample: filter. All three resize the 1-bit drawings as such, for which Pillow takes the
            nearest pixel whatever filter it is asked for: the images are binary.
    """

    sizes: tuple[int, int, int]
    rotations: tuple[Rotations, Rotations]
    invert: bool = False
    resample: str = "nearest"


PROTOCOLS = {
    "maml": Protocol((1100, 100, 423), ("random", "random"), invert=True),
    "reptile": Protocol((1200, 0, 423), ("classes", "none")),
    "maml++": Protocol((1150, 50, 423), ("random", "none")),
}


def omniglot(
    way: int = 5,
    shot: int = 1,
    query: int = 15,
    *,
    train_shot: int | None = None,
    train_query: int | None = None,
    protocol: str = "maml",
    data_root: str | os.PathLike[str] | None = None,
    image_size: int = 28,
    resample: str | None = None,
    seed: int = 1,
    memory_budget: int = MEMORY_BUDGET,
) -> Splits:
    """Return Omniglot episodes, x `(n, 28, 28, 1)` in [0, 1].

    The characters of both archives are pooled and split at random, as the papers do:

    | protocol | characters train / val / test | rotations train; val and test | ink |
    |---|---|---|---|
    | `"maml"` | 1100 / 100 / 423 | one random quarter turn a class of a task; the same | 1 |
    | `"reptile"` | 1200 / – / 423 | every turn of a character is a class; none | 0 |
    | `"maml++"` | 1150 / 50 / 423 | one random quarter turn a class of a task; none | 0 |

    Images are binary: the released codes ask for Lanczos or for the default filter, and Pillow
    resizes 1-bit drawings by the nearest pixel whatever it is asked for. `resample="lanczos"`
    converts to grey first and gives smooth strokes.

    Reptile has no validation characters and was tuned on the training ones, so its `.val` draws
    from the characters of `.train`, unrotated. Here the sorted names are shuffled by
    `random.Random(seed)`, so the split is the same on every machine. Reptile's code does so with
    seed 0; the others shuffle the order in which the file system lists the folders, and their
    splits are no one else's.

    Args:
        way: characters an episode.
        shot: support drawings a character.
        query: query drawings a character.
        train_shot: support drawings in meta-training, if not `shot`.
        train_query: query drawings in meta-training, if not `query`.
        protocol: whose split, rotations and treatment of images.
        data_root: folder with `omniglot/images_background.zip` and `images_evaluation.zip` (or
            the zips, or folders of these names, in itself); default `ADAPTAX_DATA`, else the
            user's cache folder. Archives that are absent are downloaded there.
        image_size: side in pixels.
        resample: nearest, bilinear, bicubic or lanczos, if not the protocol's, nearest.
        seed: of the split.
        memory_budget: in bytes; a larger bank is streamed from the host.

    Raises:
        DataError: if an archive is broken or cannot be downloaded, or the counts do not fit.
        FileNotFoundError: if `data_root` does not exist.
    """
    if protocol not in PROTOCOLS:
        raise DataError(f"protocol={protocol!r}; expected one of {', '.join(PROTOCOLS)}")
    how = PROTOCOLS[protocol]
    design = bank.designs(
        way, shot, query, train_shot, train_query, how.rotations, invert=how.invert
    )
    resample = resample or how.resample
    images.check_format(image_size, 1, resample)
    (array, checksums, _), characters, names = load(data_folder(data_root), image_size, resample)
    # A part of the data set is cut in the same proportions.
    splits = bank.shuffled(characters, seed, how.sizes, sum(how.sizes))
    if protocol == "reptile":
        splits["val"] = splits["train"]
    return bank.make_splits(
        array,
        {split: {name: characters[name] for name in of} for split, of in splits.items()},
        design,
        name="omniglot",
        details=(
            ("protocol", protocol),
            ("image_size", image_size),
            ("resample", resample),
            ("split_seed", seed),
        ),
        memory_budget=memory_budget,
        shared=[("train", "val")] if protocol == "reptile" else (),
        checksums=checksums,
        names=names,
    )


def load(
    root: Path, image_size: int = 28, resample: str = "nearest"
) -> tuple[Cached, dict[str, np.ndarray], list[str]]:
    """Return all drawings, `(32460, size, size, 1)` bytes, rows of every character, and names.

    Bytes are as in the files: paper is 255, ink is 0. Characters are named
    `"Alphabet/characterNN"`.

    Raises:
        DataError: if an archive is broken, empty or cannot be downloaded.
    """
    with ExitStack() as stack:
        archives = [stack.enter_context(open_files(_find(root, part))) for part in MD5]
        parts = [(files, list(filter(images.is_image, files.names))) for files in archives]
        for files, found in parts:
            if not found:
                raise DataError(
                    f"{files.where} holds no images; expected "
                    "<Alphabet>/characterNN/NNNN_DD.png inside; fetch it again"
                )
        made = images.decode_all("omniglot", parts, image_size, 1, resample)
    names = [name for _, found in parts for name in found]
    return made, bank.group(np.array(["/".join(name.split("/")[-3:-1]) for name in names])), names


def _find(root: Path, part: str) -> Path:
    """Return the archive or extracted folder of a part, downloaded if it is nowhere."""
    folder = root / "omniglot"
    names = (f"{part}.zip", part)
    found = first_existing([at / name for at in (folder, root) for name in names])
    if found is not None:
        return found
    import pooch

    try:
        return Path(
            pooch.retrieve(
                f"{URL}{part}.zip", known_hash=f"md5:{MD5[part]}", fname=f"{part}.zip", path=folder
            )
        )
    except (OSError, ValueError) as error:
        raise DataError(
            f"Omniglot is not under {root} and cannot be downloaded "
            f"({type(error).__name__}): fetch {URL}{part}.zip and put it at "
            f"{folder / part}.zip, or point data_root or ADAPTAX_DATA at a folder that has it"
        ) from error

"""CelebA: faces with forty attributes (Liu et al. 2015), as PLATIPUS makes ambiguous tasks of."""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool

from adaptax.task import Splits
from adaptax.tasks import attributes as attribute_tasks
from adaptax.tasks import bank, content, images
from adaptax.tasks.attributes import AttributeTasks
from adaptax.tasks.bank import MEMORY_BUDGET
from adaptax.tasks.cache import Cached
from adaptax.tasks.episodes import Details, HostRows
from adaptax.tasks.files import DataError, data_folder, find, first_existing, open_files

ATTRIBUTE_SPLITS = (25 / 40, 5 / 40, 10 / 40)
"""Fractions of the attributes for train, val and test."""

LEAST = {"train": 2, "val": 3, "test": 3}
"""Attributes of a conjunction, by split."""


def celeba(
    shot: int = 5,
    query: int = 10,
    *,
    train_shot: int | None = None,
    train_query: int | None = None,
    data_root: str | os.PathLike[str] | None = None,
    image_size: int = 84,
    resample: str = "lanczos",
    attributes: Mapping[str, Sequence[str]] | None = None,
    image_splits: Sequence[float] = (0.6, 0.15, 0.25),
    seed: int = 0,
    memory_budget: int = MEMORY_BUDGET,
) -> Splits:
    """Return attribute tasks of CelebA's faces, x `(n, 84, 84, 3)` in [0, 1], y int32 in {0, 1}.

    Meta-training draws two of its attributes: positives have both, negatives neither. Validation
    and test are ambiguous: the support has three of their attributes, or none, and is judged by
    the three readings that ask for two; see `AttributeTasks`, and `score_readings`.

    No split shares an attribute with another: 25, 5 and 10 of the forty, shuffled by
    `random.Random(seed)`. How many PLATIPUS took of each could not be confirmed, and which ones it
    never said. Nor do the splits share an image, which is stricter than need be: the files are cut
    in order into the three parts `image_splits`; one person may still occur in two of them.
    Conjunctions with too few images for a task are left out, and `describe()["left_out"]` counts
    them. Images of another aspect are squeezed to the square.

    Args:
        shot: support images a label.
        query: query images a label, and a reading in the ambiguous tasks.
        train_shot: support images a label in meta-training, if not `shot`.
        train_query: query images a label in meta-training, if not `query`.
        data_root: folder with `celeba/img_align_celeba.zip` (or a folder `img_align_celeba`) and
            `celeba/list_attr_celeba.txt`, or that folder itself; default `ADAPTAX_DATA`.
        image_size: side in pixels.
        resample: nearest, bilinear, bicubic or lanczos.
        attributes: names of the attributes for `"train"`, `"val"` and `"test"`, if not at random.
        image_splits: fractions of the images for train, val and test.
        seed: of the split of the attributes.
        memory_budget: in bytes; a larger data set is streamed from the host.

    Raises:
        FileNotFoundError: if the images or the list are nowhere.
        DataError: if files are broken, attributes are unknown or shared between splits, or no
            conjunction has enough images.

    Warns:
        UserWarning: if a picture is in two splits.
    """
    designs = bank.designs(2, shot, query, train_shot, train_query)
    images.check_format(image_size, 3, resample)
    (array, checksums, _), has, names, files = load(data_folder(data_root), image_size, resample)
    chosen = _chosen(attributes, names, seed)
    bank.check_fractions("image_splits", tuple(image_splits), "images")
    parts, rows = bank.cut(len(array), image_splits), np.arange(len(array))
    index = {split: rows[of] for split, of in parts.items()}
    content.warn_of_shared(array, checksums, index, name="celeba", names=files)
    streamed = sum(map(len, index.values())) * array[:1].nbytes > memory_budget

    def tasks(split: str) -> AttributeTasks:
        of, columns, size = parts[split], list(map(names.index, chosen[split])), LEAST[split]
        pools, kept = attribute_tasks.pools(
            has[of][:, columns], chosen[split], size, designs[split], split
        )
        faces = HostRows(array, index[split]) if streamed else jnp.asarray(array[of])
        details: Details = (
            ("left_out", math.comb(len(columns), size) - len(kept)),
            ("attributes", len(columns)),
            ("attribute_split", "given" if attributes is not None else f"seed {seed}"),
            ("images", len(index[split])),
            ("image_size", image_size),
            ("resample", resample),
        )
        return AttributeTasks(
            bank=faces, pools=pools, design=designs[split], split=split, name="celeba",
            conjunctions=kept, details=details,
        )  # fmt: skip

    return Splits.of(tasks)


def load(
    root: Path, image_size: int = 84, resample: str = "lanczos"
) -> tuple[Cached, Bool[np.ndarray, "images attributes"], list[str], list[str]]:
    """Return all listed faces, whether they have each attribute, and names of attributes and files.

    Raises:
        FileNotFoundError: if the images or the list are nowhere.
        DataError: if the list is broken or names images that are not there.
    """
    where, table = _find(root)
    wanted, has, names = read_attributes(table)
    with open_files(where) as files:
        found = find(files, wanted, table)
        made = images.decode_all(
            "celeba", [(files, found)], image_size, 3, resample, key=[found, resample]
        )
    return made, has, names, found


def read_attributes(
    path: Path,
) -> tuple[list[str], Bool[np.ndarray, "images attributes"], list[str]]:
    """Return file names, whether each image has each attribute, and the attributes' names.

    Raises:
        DataError: if it is not the official table: a count, a line of names, and for every image
            its file name and 1 or −1 for each attribute.
    """
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    names = lines[1].split() if len(lines) > 1 else []
    rows = [line.split(maxsplit=1) for line in lines[2:] if line.strip()]
    files = [row[0] for row in rows]
    try:
        values = np.loadtxt([row[-1] for row in rows] or ["0"], np.int8, ndmin=2)
    except ValueError:
        values = np.zeros((0, 0), np.int8)
    if values.shape != (len(files), len(names)) or not (abs(values) == 1).all():
        raise DataError(
            f"{path} is not CelebA's list_attr_celeba.txt: expected a count, a line of attributes, "
            "and for every image its file name and 1 or -1 for each attribute; fetch it again"
        )
    return files, values == 1, names


def _find(root: Path) -> tuple[Path, Path]:
    """Return the images, and the list of their attributes."""
    for folder in (root / "celeba", root / "CelebA", root):
        archives = [folder / "img_align_celeba.zip", folder / "img_align_celeba"]
        found, table = first_existing(archives), folder / "list_attr_celeba.txt"
        if found is not None and table.is_file():
            return found, table
    raise FileNotFoundError(
        f"no CelebA under {root}: expected celeba/img_align_celeba.zip (or a folder "
        "img_align_celeba) with list_attr_celeba.txt beside it; it may not be passed on, so obtain "
        "it from its authors (https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html) and name its "
        "folder by data_root or ADAPTAX_DATA"
    )


def _chosen(
    given: Mapping[str, Sequence[str]] | None, names: list[str], seed: int
) -> dict[str, list[str]]:
    """Return the attributes of every split."""
    if given is None:
        chosen = bank.shuffled(names, seed, ATTRIBUTE_SPLITS)
    else:
        chosen = {split: list(of) for split, of in given.items()}
        bank.check_names("attributes has the splits", chosen)
    for split, of in chosen.items():
        for name in of:
            if name not in names:
                close = difflib.get_close_matches(name, names, 1) or [", ".join(names)]
                raise DataError(f"{name!r} is no attribute of these images; expected {close[0]}")
        if len(set(of)) < max(len(of), LEAST[split]):
            raise DataError(
                f"the {split} attributes are {', '.join(of) or 'none'}; expected at least "
                f"{LEAST[split]}, each once"
            )
    bank.check_disjoint(chosen)
    return chosen

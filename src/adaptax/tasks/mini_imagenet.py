"""miniImageNet: 100 classes of 600 images (Vinyals et al. 2016, Ravi & Larochelle 2017)."""

from __future__ import annotations

import csv
import os
from pathlib import Path
from typing import Any

import numpy as np

from adaptax.task import Splits
from adaptax.tasks import bank, images
from adaptax.tasks.bank import MEMORY_BUDGET
from adaptax.tasks.files import DataError, data_folder, find, first_existing, open_files
from adaptax.text import shown

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def mini_imagenet(
    way: int = 5,
    shot: int = 1,
    query: int = 15,
    *,
    train_shot: int | None = None,
    train_query: int | None = None,
    data_root: str | os.PathLike[str] | None = None,
    image_size: int = 84,
    resample: str = "lanczos",
    normalise: bool = False,
    memory_budget: int = MEMORY_BUDGET,
) -> Splits:
    """Return miniImageNet episodes, x `(n, 84, 84, 3)` in [0, 1], classes 64 / 16 / 20.

    The split is Ravi & Larochelle's, read from their `train.csv`, `val.csv` and `test.csv`
    (`filename,label`); the MAML paper prints 64/12/24, but its code uses these. Nobody may
    redistribute the images, so they are never downloaded.

    Args:
        way: classes an episode.
        shot: support images a class.
        query: query images a class.
        train_shot: support images a class in meta-training, if not `shot`.
        train_query: query images a class in meta-training, if not `query`.
        data_root: folder with `mini_imagenet/images.zip` (or a folder `images`) and the three
            csv files beside it, or that folder itself; default `ADAPTAX_DATA`.
        image_size: side in pixels; images that have it already are not resized.
        resample: filter where they do not: MAML uses Lanczos, Reptile Pillow's default, which
            was `"nearest"` in its day and is `"bicubic"` now.
        normalise: subtract ImageNet's mean and divide by its standard deviation, as MAML++.
        memory_budget: in bytes; a larger data set is streamed from the host.

    Raises:
        FileNotFoundError: if the images or the csv files are nowhere.
        DataError: if files are broken, an image is listed twice, or the counts do not fit.

    Warns:
        UserWarning: if a picture is in two splits.
    """
    stats: dict[str, Any] = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD} if normalise else {}
    design = bank.designs(way, shot, query, train_shot, train_query, **stats)
    images.check_format(image_size, 3, resample)
    where, table = _find(data_folder(data_root))
    listed = {split: read_csv(table / f"{split}.csv") for split in bank.NAMES}
    splits, first = {}, 0
    for split, rows in listed.items():
        splits[split] = bank.group(np.array([label for _, label in rows]), first)
        first += len(rows)
    bank.check_disjoint(splits)
    with open_files(where) as files:
        names = find(files, [name for rows in listed.values() for name, _ in rows], table)
        array, checksums, _ = images.decode_all(
            "mini_imagenet", [(files, names)], image_size, 3, resample, key=[names, resample]
        )
    return bank.make_splits(
        array,
        splits,
        design,
        name="mini_imagenet",
        details=(("image_size", image_size), ("resample", resample), ("normalise", normalise)),
        memory_budget=memory_budget,
        checksums=checksums,
        names=names,
    )


def read_csv(path: Path) -> list[tuple[str, str]]:
    """Return file names and labels of a split.

    Raises:
        DataError: if the file is not UTF-8 or no table with the columns `filename` and `label`, or
            a row lacks one of them.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            listed = [(row.get("filename"), row.get("label"), reader.line_num) for row in reader]
            named = {"filename", "label"} <= set(reader.fieldnames or ())
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(
            f"{shown(path)} is no table of images ({error}); expected lines of filename,label in "
            "UTF-8"
        ) from error
    if not listed or not named:
        raise DataError(
            f"{shown(path)} has no rows of filename,label; expected Ravi & Larochelle's file"
        )
    rows = []
    for name, label, line in listed:
        if not name or not label:
            raise DataError(
                f"{shown(path)}, line {line}: no {'label' if name else 'filename'}; expected "
                "filename,label in every line"
            )
        rows.append((name, label))
    return rows


def _find(root: Path) -> tuple[Path, Path]:
    """Return the images, and the folder of the csv files."""
    for table in (root / "mini_imagenet", root / "miniImagenet", root):
        found = first_existing([table / "images.zip", table / "images"])
        if found is not None and all((table / f"{split}.csv").is_file() for split in bank.NAMES):
            return found, table
    raise FileNotFoundError(
        f"no miniImageNet under {root}: expected mini_imagenet/images.zip (or a folder images) "
        "with train.csv, val.csv and test.csv of Ravi & Larochelle beside it; it cannot be "
        "downloaded freely, so obtain it and name its folder by data_root or ADAPTAX_DATA"
    )

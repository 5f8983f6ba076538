"""Which images of a folder make up which classes, of which splits."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Sequence

from adaptax.tasks.bank import NAMES
from adaptax.tasks.files import DataError
from adaptax.text import shown

SPLITS = {
    "train": ("train", "training", "base", "metatrain", "metatraining"),
    "val": ("val", "valid", "validation", "dev", "metaval", "metavalid", "metavalidation"),
    "test": ("test", "testing", "novel", "metatest", "metatesting"),
}
"""What folders of the splits are called, in any case, with or without `-`, `_`, `.` and spaces, and
with or without "set", "images", "data" or "split" at the end."""

Classes = dict[str, list[str]]
"""Names of the images of every class."""


def split_named(folder: str) -> str | None:
    """Return the split that a folder of this name is for; `None` for any other name."""
    word = re.sub("[-_. ]|(set|images|data|split)$", "", folder.casefold())
    return next((split for split, words in SPLITS.items() if word in words), None)


def arrange(names: Sequence[str], where: str) -> tuple[dict[str, Classes], list[str]]:
    """Return the images of every class of every split, and those that lie beside the classes.

    A class is the directory that holds its images, called by its path. A directory that holds all
    others is looked through, unless it is called as a split is. If any folder on top is called as
    a split is, then all are: one for each split, and no class beside them.

    Args:
        names: of the images, parts joined by `/`.
        where: they are, for errors.

    Returns:
        Classes of `"train"`, `"val"` and `"test"`, or of `""` if there are no splits; and the
        images that lie in the folder itself or in that of a split, where classes were expected.

    Raises:
        DataError: if there are no class folders, or folders of some splits but not of all, of a
            split twice, beside classes or inside of them.
    """
    at: Classes = {}
    for name in sorted(names):
        at.setdefault(posixpath.dirname(name), []).append(name)
    stray = at.pop("", [])
    while len(_tops(at)) == 1:
        (top,) = _tops(at)
        if split_named(top) or set(at) == {top}:
            break
        stray += at.pop(top, [])
        at = {folder.removeprefix(f"{top}/"): of for folder, of in at.items()}
    if not at:
        raise DataError(
            f"{where}: {len(stray)} images lie in it directly, first {shown(stray[0])}; expected "
            "class/image.png or train/class/image.png"
        )
    found: dict[str, list[str]] = {}
    for top in _tops(at):
        found.setdefault(split_named(top) or "", []).append(top)
    beside = found.pop("", [])
    if not found:
        inner = [f for f in at if any(map(split_named, f.split("/")[1:]))]
        if len({split_named(part) for f in inner for part in f.split("/")[1:]} - {None}) > 1:
            raise DataError(
                f"{where} has folders of splits inside of its classes, first {shown(inner[0])}; "
                "expected them on top, as train/class/image.png, or other names"
            )
        return {"": at}, stray
    for split, tops in found.items():
        if len(tops) > 1:
            raise DataError(
                f"{where}: {' and '.join(map(shown, tops))} are both folders of the {split} split; "
                "join or rename them"
            )
    if beside or set(found) != set(NAMES):
        others = f", beside {len(beside)} other folders, first {shown(beside[0])}" if beside else ""
        raise DataError(
            f"{where}: found the splits {', '.join(sorted(found))}{others}; expected train, val "
            "and test with class folders in each, or class folders alone; add what is missing, "
            "name the folder of one split itself to split its classes at random, or rename a class "
            f"that is called as a split is ({shown(next(iter(found.values()))[0])})"
        )
    splits = {}
    for split, (top,) in found.items():
        splits[split] = {f[len(top) + 1 :]: of for f, of in at.items() if f.startswith(f"{top}/")}
        stray += at.get(top, [])
        if not splits[split]:
            raise DataError(
                f"{where}: {shown(top)} holds {len(at[top])} images but no class folders; expected "
                f"{shown(top)}/class/image.png"
            )
    return {split: splits[split] for split in NAMES}, stray


def _tops(folders: Classes) -> list[str]:
    return sorted({folder.split("/")[0] for folder in folders})

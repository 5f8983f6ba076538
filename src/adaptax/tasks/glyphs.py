"""Characters of many scripts, drawn from the fonts that come with Matplotlib: no download."""

from __future__ import annotations

import functools
import hashlib
import json
import unicodedata
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, features

from adaptax.io import write_atomic
from adaptax.task import Splits
from adaptax.tasks import bank
from adaptax.tasks.bank import MEMORY_BUDGET
from adaptax.tasks.cache import Cached, cache_root, cached
from adaptax.tasks.episodes import Rotations
from adaptax.tasks.files import DataError

LEAST_FACES = 8
SIZE, FONT_SIZE, BASELINE = 28, 20, 21

Classes = dict[str, dict[str, np.ndarray]]
"""For every split the rows of its characters."""

SCRIPTS = {
    "LATIN": "train",
    "CYRILLIC": "train",
    "GREEK": "val",
    "ARMENIAN": "test",
    "GEORGIAN": "test",
    "LAO": "test",
}
"""Split of the letters of a script, by the first word of their Unicode names."""

FAMILIES = ("DejaVuSans", "DejaVuSerif", "STIXGeneral")


def glyphs(
    way: int = 5,
    shot: int = 1,
    query: int = 5,
    *,
    train_shot: int | None = None,
    train_query: int | None = None,
    rotations: tuple[Rotations, Rotations] = ("none", "none"),
    memory_budget: int = MEMORY_BUDGET,
) -> Splits:
    """Return episodes of printed characters, x `(n, 28, 28, 1)` in [0, 1] with ink 1.

    A class is a character, its examples are 8 to 16 faces (sans, mono and serif, upright and
    slanted, regular and bold). The splits have no script in common: meta-train are Latin and
    Cyrillic letters, digits, punctuation, arrows, operators and other symbols; validation are
    Greek letters; test are Armenian, Georgian and Lao letters: about 1370, 270 and 220 classes. Of
    characters that look the same in any face (Latin, Greek and Cyrillic A) only the first is a
    class, and no image occurs twice. Letters of two scripts that are merely alike remain.

    Easier than Omniglot, and good for a first run, tests and demonstrations; no paper reports on
    it. A class has at least 8 examples, so `shot + query` is at most 8.

    Args:
        way: characters an episode.
        shot: support faces a character.
        query: query faces a character.
        train_shot: support faces in meta-training, if not `shot`.
        train_query: query faces in meta-training, if not `query`.
        rotations: in meta-training, and in validation and test.
        memory_budget: in bytes; a larger bank is streamed from the host.

    Raises:
        DataError: if the counts do not fit, or Matplotlib came without its fonts.
    """
    design = bank.designs(way, shot, query, train_shot, train_query, rotations)
    (array, checksums, _), splits = load()
    return bank.make_splits(
        array, splits, design, name="glyphs", memory_budget=memory_budget, checksums=checksums
    )


def load() -> tuple[Cached, Classes]:
    """Return all renderings, `(n, 28, 28, 1)` bytes, and the rows of the characters."""
    import matplotlib

    folder = Path(matplotlib.get_data_path(), "fonts", "ttf")
    faces = [p for p in sorted(folder.glob("*.ttf"))
             if p.stem.startswith(FAMILIES) and "Display" not in p.stem]  # fmt: skip
    if len(faces) < LEAST_FACES:
        raise DataError(
            f"{folder} holds {len(faces)} of the DejaVu and STIX fonts, expected 16; "
            "reinstall matplotlib with its fonts"
        )
    return _load(tuple((face, face.stat().st_mtime_ns) for face in faces))


@functools.lru_cache(1)
def _load(dated: tuple[tuple[Path, int], ...]) -> tuple[Cached, Classes]:
    """Return renderings and classes, from the cache on the disk if they are there."""
    faces = [face for face, _ in dated]
    key = [hashlib.sha256(face.read_bytes()).hexdigest() for face in faces]
    key += [str(features.version("freetype2")), f"{SIZE} {FONT_SIZE} {BASELINE}"]
    digest = hashlib.sha256(json.dumps([key, unicodedata.unidata_version, SCRIPTS]).encode())
    table = cache_root() / f"glyphs-{digest.hexdigest()[:24]}.json"
    # Which characters there are, and which of them agree, takes as long as drawing them.
    known = _read_table(table)
    drawn = list(_drawn(faces)) if known is None else known[0]
    images = _draw(faces, key, drawn)
    if known is not None:
        return images, known[1]
    found = _distinct_classes(images.images, drawn)
    kept = {s: {c: rows.tolist() for c, rows in of.items()} for s, of in found.items()}
    with suppress(OSError):
        write_atomic(table, json.dumps([drawn, kept]).encode())
    return images, found


def _read_table(path: Path) -> tuple[list[tuple[str, str, int]], Classes] | None:
    """Return what is drawn and the classes; `None` if the file is absent or broken."""
    try:
        drawn, kept = json.loads(path.read_text())
        found = {s: {c: np.array(kept[s][c], int) for c in kept[s]} for s in bank.NAMES}
        rows = np.concatenate([rows for of in found.values() for rows in of.values()])
        whole = 0 <= rows.min() <= rows.max() < len(drawn)
        return ([(s, c, int(f)) for s, c, f in drawn], found) if whole else None
    except Exception:  # a file that is damaged raises what JSON and NumPy have
        return None


def _draw(faces: list[Path], key: list[str], drawn: list[tuple[str, str, int]]) -> Cached:
    def fill(out: np.ndarray) -> int:
        for f, face in enumerate(faces):
            font = ImageFont.truetype(str(face), FONT_SIZE, layout_engine=ImageFont.Layout.BASIC)
            for row, (_, character, of) in enumerate(drawn):
                if of == f:
                    out[row, :, :, 0] = _render(font, character)
        return 0

    return cached("glyphs", [key, drawn], (len(drawn), SIZE, SIZE, 1), fill)


def split_of(character: str) -> str | None:
    """Return the split that a character belongs to; `None` for those left out.

    Left out are marks, spaces, controls, letters that are variants of others (superscripts,
    double-struck, numerals), and the box and Braille patterns, which hardly vary with the face.
    """
    category = unicodedata.category(character)
    script = unicodedata.name(character, "?").split()[0]
    if category[0] == "L":
        return SCRIPTS.get(script)
    plain = category == "Nd" or category[0] == "P" or category in ("Sm", "So", "Sc")
    named = {*SCRIPTS, "?", "BOX", "BRAILLE", "CIRCLED", "SQUARE", "SUPERSCRIPT", "SUBSCRIPT"}
    return "train" if plain and script not in named else None


def _drawn(faces: list[Path]) -> Iterator[tuple[str, str, int]]:
    """Yield split, character and face of every rendering: characters in enough faces, in order."""
    from fontTools.ttLib import TTFont

    support: dict[int, list[int]] = {}
    for f, face in enumerate(faces):
        with TTFont(face, lazy=True) as font:
            for point, glyph in font.getBestCmap().items():
                if glyph != ".notdef":
                    support.setdefault(point, []).append(f)
    for split in bank.NAMES:
        for point in sorted(support):
            if len(support[point]) >= LEAST_FACES and split_of(chr(point)) == split:
                yield from ((split, chr(point), f) for f in support[point])


def _render(font: ImageFont.FreeTypeFont, character: str) -> np.ndarray:
    """Draw ink on blank, centred on its advance, on a fixed baseline; clipped at the border."""
    image = Image.new("L", (SIZE, SIZE))
    ImageDraw.Draw(image).text((SIZE // 2, BASELINE), character, 255, font, anchor="ms")
    return np.asarray(image)


def _distinct_classes(array: np.ndarray, drawn: list[tuple[str, str, int]]) -> Classes:
    """Return the rows of every class, without characters that share an image with another."""
    rows: dict[tuple[str, str], list[int]] = {}
    for row, (split, character, _) in enumerate(drawn):
        rows.setdefault((split, character), []).append(row)
    taken: set[bytes] = {bytes(SIZE * SIZE)}
    splits: Classes = {split: {} for split in bank.NAMES}
    for (split, character), candidates in rows.items():
        seen = {array[row].tobytes(): row for row in reversed(candidates)}
        # Characters that agree in one face are mostly the same letter but for hinting: Greek and
        # Latin capitals agree in half of the faces, and differ by a pixel in the others.
        if len(seen) >= LEAST_FACES and not seen.keys() & taken:
            taken |= seen.keys()
            splits[split][f"U+{ord(character):04X}"] = np.array(sorted(seen.values()))
    return splits

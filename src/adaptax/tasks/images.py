"""Images decoded to arrays of bytes."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from adaptax.tasks.sources import DataError, Files

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
"""Names of image files end so, in either case."""

FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
"""Resampling filters by name."""

MODES = {1: "L", 3: "RGB"}
MAX_PIXELS = 64 * 2**20


def is_image(name: str) -> bool:
    """Whether a file name is that of an image; hidden files are not."""
    base = name.rsplit("/", 1)[-1]
    return base.lower().endswith(SUFFIXES) and not base.startswith(".")


def check_format(size: int, channels: int, resample: str) -> None:
    """Refuse a format that cannot be decoded to.

    Raises:
        DataError: if the size is below 1, or channels or filter are not known.
    """
    if size < 1:
        raise DataError(f"image_size={size}; expected a number of pixels, at least 1")
    if channels not in MODES:
        raise DataError(f"channels={channels}; expected 1 (grey) or 3 (red, green, blue)")
    if resample not in FILTERS:
        raise DataError(f"resample={resample!r}; expected one of {', '.join(FILTERS)}")


def decode(
    data: bytes, where: str, *, size: int, channels: int, resample: str = "lanczos"
) -> UInt8[np.ndarray, "size size channels"]:
    """One image file as `(size, size, channels)` bytes; other aspects are squeezed to the square.

    The image is converted to grey or RGB *before* it is resized: Pillow silently resizes 1-bit
    and palette images by nearest neighbour whatever filter it is asked for.

    Raises:
        DataError: if the file is not a readable image.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.width * image.height > MAX_PIXELS:
                raise DataError(
                    f"{where} has {image.width}x{image.height} pixels, more than {MAX_PIXELS}; "
                    "shrink or remove it"
                )
            pixels = image.convert(MODES[channels])
    except DataError:
        raise
    except Exception as error:  # Pillow's decoders raise many types on broken data
        raise DataError(
            f"{where} cannot be read as an image ({error}); replace or remove it"
        ) from error
    if pixels.size != (size, size):
        pixels = pixels.resize((size, size), FILTERS[resample])
    return np.asarray(pixels, dtype=np.uint8).reshape(size, size, channels)


def decode_into(
    out: UInt8[np.ndarray, "n size size channels"],
    files: Files,
    names: Sequence[str],
    *,
    resample: str,
) -> None:
    """Decode the named files into the rows of `out`, on as many threads as there are cores."""
    _, size, _, channels = out.shape

    def work(rows: range) -> None:
        for row in rows:
            name, where = names[row], f"{files.where}: {names[row]}"
            image = decode(files.read(name), where, size=size, channels=channels, resample=resample)
            out[row] = image

    chunks = [range(i, min(i + 128, len(names))) for i in range(0, len(names), 128)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for done in [pool.submit(work, chunk) for chunk in chunks]:
            done.result()

"""Images decoded to arrays of bytes, as a viewer shows them on a white page."""

from __future__ import annotations

import io
import os
import re
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.TiffImagePlugin import PHOTOMETRIC_INTERPRETATION as PHOTOMETRIC

from adaptax.tasks.cache import Cached, cached
from adaptax.tasks.files import DataError, Files

FORMATS = ("PNG", "JPEG", "BMP", "DIB", "GIF", "WEBP", "TIFF", "PPM")
"""What is decoded, whatever a file is called: raster formats alone, none of which starts a process
(for PostScript, Pillow would start Ghostscript)."""

SUFFIXES = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".dib", ".gif", ".webp", ".tif",
            ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".pfm")  # fmt: skip
"""Names of image files end so, in either case."""

UNREAD = (".ai", ".arw", ".avif", ".cr2", ".cr3", ".dcm", ".dds", ".dng", ".emf", ".eps", ".exr",
          ".hdr", ".heic", ".heif", ".icns", ".ico", ".j2k", ".jp2", ".jxl", ".nef", ".orf",
          ".pcx", ".ps", ".psd", ".qoi", ".raf", ".rw2", ".svg", ".svgz", ".tga", ".wmf",
          ".xcf")  # fmt: skip
"""Names of pictures of other formats, which are named in an error and not passed over."""

FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
"""Resampling filters by name."""

MODES = {1: "L", 3: "RGB"}

MAX_PIXELS = 64 * 2**20
MAX_SIDE = 2**17
"""Pillow's filters take 48 bytes a pixel of a side: 3 GB for an image of 64 Mi x 1."""


def is_image(name: str) -> bool:
    """Return whether a file name is that of an image that can be read."""
    return name.lower().endswith(SUFFIXES)


def is_unread(name: str) -> bool:
    """Return whether a file name is that of an image of another format."""
    return name.lower().endswith(UNREAD)


def check_format(size: int, channels: int, resample: str) -> None:
    """Check the format that images are decoded to.

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
    """Decode an image file to `(size, size, channels)` bytes; other aspects are squeezed.

    The image is what a viewer shows: turned as its EXIF orientation says, what is transparent
    white, the first frame if there are several. Greys of 16 bits are scaled from their full range,
    0 to 65535; floating-point greys from [0, 1] where they are all inside, else from the least to
    the greatest value of the image, and so are integers of 32 bits outside [0, 65535]. Colour
    profiles and gamma are not applied.

    It is converted to grey or RGB *before* it is resized: Pillow silently resizes 1-bit and
    palette images by nearest neighbour whatever filter it is asked for.

    Raises:
        DataError: if the file is not a readable image, or too large.
    """
    return _decode(data, where, size, channels, resample)[0]


def _decode(
    data: bytes, where: str, size: int, channels: int, resample: str
) -> tuple[UInt8[np.ndarray, "size size channels"], bool]:
    """Return the image, and whether the file has further frames."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS or max(image.size) > MAX_SIDE:
                raise DataError(
                    f"{where} has {image.width} x {image.height} pixels, more than {MAX_PIXELS} "
                    f"in all or {MAX_SIDE} a side; shrink or remove it"
                )
            pixels = _shown(image, MODES[channels])
            further = image.format in ("GIF", "PNG", "WEBP", "TIFF") and _is_animated(image)
    except DataError:
        raise
    except Exception as error:  # Pillow's decoders raise many types on broken data
        raise DataError(
            f"{where} cannot be read as an image ({_reason(error, data)}); replace or remove it"
        ) from error
    if pixels.size != (size, size):
        pixels = pixels.resize((size, size), FILTERS[resample])
    return np.asarray(pixels, dtype=np.uint8).reshape(size, size, channels), further


def _shown(image: Image.Image, mode: str) -> Image.Image:
    """Return the pixels as grey or RGB."""
    tiles = getattr(image, "tile", None)
    raw = tiles[0][3] if tiles else None
    image.load()
    with suppress(Exception):  # viewers show an image whose EXIF data are broken as it lies
        ImageOps.exif_transpose(image, in_place=True)
    if image.mode == "F" or image.mode.startswith("I"):
        return _grey(image).convert(mode)
    if not image.has_transparency_data:
        return image.convert(mode)
    # PNG's transparent colour is of the file's depth, and Pillow leaves it so.
    transparent: Any = image.info.get("transparency")
    if raw in ("L;2", "L;4"):
        image.info["transparency"] = transparent * (85 if raw == "L;2" else 17)
    elif raw == "RGB;16B":
        image.info["transparency"] = tuple(value >> 8 for value in transparent)
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image.convert("RGBA")).convert(mode)


def _grey(image: Image.Image) -> Image.Image:
    """Return greys of more than 8 bits as 8 bits."""
    values = np.asarray(image)
    low, high = float(values.min()), float(values.max())
    if not np.isfinite(high - low):
        raise ValueError("it holds NaN or infinity")
    white = 1.0 if image.mode == "F" else 65535.0
    if low >= 0 and high <= white:
        low, high = 0.0, white
    elif low == high:
        low, high = (0.0, high) if high > 0 else (low, 0.0)
    grey = np.rint((values - low) * (255 / (high - low))).astype(np.uint8)
    if getattr(image, "tag_v2", {}).get(PHOTOMETRIC) == 0:  # a TIFF file in which white is 0
        grey = 255 - grey
    if "transparency" in image.info:
        grey[values == image.info["transparency"]] = 255
    return Image.fromarray(grey)


def _is_animated(image: Image.Image) -> bool:
    try:
        return bool(getattr(image, "is_animated", False))
    except Exception:  # a second frame that is broken: the first one has been read
        return True


def _reason(error: Exception, data: bytes) -> str:
    """Return what is wrong with an image, in a few words."""
    if isinstance(error, UnidentifiedImageError):
        return f"not a file of {', '.join(FORMATS)}" if data else "the file is empty"
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return f"more than {MAX_PIXELS} pixels"
    said = " ".join(re.sub(r"<_io\.[^>]*>", "the file", str(error)).split())
    return said or type(error).__name__


def decode_all(
    name: str,
    parts: Sequence[tuple[Files, Sequence[str]]],
    size: int,
    channels: int,
    resample: str,
    key: Sequence[Any] | None = None,
) -> Cached:
    """Return images as one array, `(n, size, size, channels)`, from the cache if they are there.

    Args:
        name: of the data set.
        parts: files, and the names of those that are wanted of them.
        size: side in pixels.
        channels: 1 or 3.
        resample: a name in `FILTERS`.
        key: what the pixels depend on, beside the files; the filter if `None`.

    Returns:
        The images; noted is how many have several frames, of which the first was taken.

    Raises:
        DataError: naming the file that is not a readable image.
    """

    def fill(out: np.ndarray) -> int:
        first = several = 0
        for files, names in parts:
            several += decode_into(out[first : first + len(names)], files, names, resample)
            first += len(names)
        return several

    shape = (sum(len(names) for _, names in parts), size, size, channels)
    prints = [files.fingerprint for files, _ in parts]
    return cached(name, prints + list([resample] if key is None else key), shape, fill)


def decode_into(
    out: UInt8[np.ndarray, "n size size channels"],
    files: Files,
    names: Sequence[str],
    resample: str,
) -> int:
    """Decode files into the rows of `out`, on all cores; return how many have several frames.

    Raises:
        DataError: naming the file that is not a readable image.
    """
    _, size, _, channels = out.shape

    def work(rows: range) -> int:
        several = 0
        for row in rows:
            name = names[row]
            out[row], further = _decode(
                files.read(name), files.named(name), size, channels, resample
            )
            several += further
        return several

    chunks = [range(i, min(i + 128, len(names))) for i in range(0, len(names), 128)]
    # Pillow's warnings are of files that every viewer shows.
    with warnings.catch_warnings(), ThreadPoolExecutor(os.cpu_count()) as pool:
        warnings.filterwarnings("ignore", module=r"PIL\.")
        return sum(pool.map(work, chunks))

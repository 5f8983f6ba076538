"""Pictures come out as viewers show them, or are refused by name."""

import io
import struct
import subprocess
import zlib

import numpy as np
import pytest
from PIL import Image, ImageDraw

from adaptax.tasks import DataError
from adaptax.tasks import images as decoding
from adaptax.tasks.images import decode


def packed(image, kind="png", **how):
    out = io.BytesIO()
    image.save(out, kind, **how)
    return out.getvalue()


def shown(data, channels=1, size=None):
    """Decoded at its own size: no filter is in the way."""
    size = Image.open(io.BytesIO(data)).width if size is None else size
    pixels = decode(data, "here: a.png", size=size, channels=channels)
    return pixels[..., 0] if channels == 1 else pixels


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(side, depth, colour, rows, transparent=None):
    """A PNG file by hand, for kinds that Pillow does not write."""
    head = struct.pack(">IIBBBBB", side, len(rows), depth, colour, 0, 0, 0)
    rest = chunk(b"tRNS", transparent) if transparent else b""
    data = zlib.compress(b"".join(b"\0" + row for row in rows))
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + rest + chunk(b"IDAT", data)
        + chunk(b"IEND", b"")
    )  # fmt: skip


def ink():
    """Black ink on a transparent ground that is black, too."""
    image = Image.new("RGBA", (28, 28))
    ImageDraw.Draw(image).rectangle((5, 5, 20, 20), fill=(0, 0, 0, 255))
    return image


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", ["png", "webp", "tiff"])
@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_is_white(mode, kind, channels):
    image = ink().quantize(8) if mode == "P" else ink().convert(mode)
    if (mode, kind) == ("P", "tiff"):  # palettes of TIFF are opaque
        image, kind = ink(), "gif"
    pixels = shown(packed(image, kind, **({"lossless": True} if kind == "webp" else {})), channels)
    assert (pixels[5:21, 5:21] == 0).all()
    assert (pixels[:5] == 255).all()


def test_half_transparent_is_half_white():
    image = Image.new("RGBA", (2, 2), (100, 0, 200, 128))
    assert np.allclose(shown(packed(image), 3), [178, 127, 227], atol=1)


@pytest.mark.parametrize("transparent", [0, 3])
@pytest.mark.parametrize("depth", [1, 2, 4, 8])
def test_the_transparent_grey_of_any_depth(depth, transparent):
    transparent = min(transparent, 2**depth - 1)
    other = 1 if transparent == 0 else 0
    values = [transparent, other] * 4
    bits = "".join(f"{value:0{depth}b}" for value in values)
    row = bytes(int(bits[i : i + 8], 2) for i in range(0, len(bits), 8))
    found = shown(png(8, depth, 0, [row] * 8, struct.pack(">H", transparent)))
    assert (found[:, ::2] == 255).all()
    assert (found[:, 1::2] == round(other * 255 / (2**depth - 1))).all()


def test_transparent_colours_and_deep_greys():
    rgb = png(2, 8, 2, [bytes([5, 6, 7, 1, 2, 3])] * 2, struct.pack(">3H", 5, 6, 7))
    assert shown(rgb, 3)[0].tolist() == [[255, 255, 255], [1, 2, 3]]
    deep = png(2, 16, 2, [struct.pack(">6H", 1280, 1536, 1792, 256, 512, 768)] * 2,
               struct.pack(">3H", 1280, 1536, 1792))  # fmt: skip
    assert shown(deep, 3)[0].tolist() == [[255, 255, 255], [1, 2, 3]]
    grey = png(2, 16, 0, [struct.pack(">2H", 257 * 9, 257 * 7)] * 2, struct.pack(">H", 257 * 9))
    assert shown(grey)[0].tolist() == [255, 7]


def test_opaque_images_are_converted_as_ever():
    rng = np.random.default_rng(0)
    colour = Image.fromarray(rng.integers(0, 256, (9, 9, 3), np.uint8))
    for image in (colour, colour.convert("L"), colour.quantize(16), colour.convert("1")):
        for channels, mode in ((1, "L"), (3, "RGB")):
            expected = np.asarray(image.convert(mode))
            assert np.array_equal(shown(packed(image), channels), expected)
    opaque = np.asarray(colour)
    assert np.array_equal(shown(packed(colour.convert("RGBA")), 3), opaque)
    inks = colour.convert("CMYK")
    assert np.array_equal(shown(packed(inks, "tiff"), 3), np.asarray(inks.convert("RGB")))
    flat = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    assert np.allclose(shown(packed(flat, "jpeg"), 3)[0, 0], [255, 0, 0], atol=3)


@pytest.mark.parametrize("kind", ["png", "jpeg", "tiff", "webp"])
def test_images_are_turned_as_their_camera_was(kind):
    values = np.zeros((16, 16), np.uint8)
    values[:8] = 200  # light above
    how = {"lossless": True} if kind == "webp" else {}
    for orientation, light in {1: "above", 3: "below", 6: "right", 8: "left"}.items():
        exif = Image.Exif()
        exif[274] = orientation
        found = shown(packed(Image.fromarray(values), kind, exif=exif, **how)).astype(int)
        halves = {"above": found[:7], "below": found[9:], "left": found[:, :7],
                  "right": found[:, 9:]}  # fmt: skip
        assert max(halves, key=lambda side: halves[side].mean()) == light


def test_broken_orientation_is_passed_over():
    image = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8))
    data = packed(image, exif=b"Exif\0\0II*\0\xff\xff\xff\xff broken")
    assert np.array_equal(shown(data), np.asarray(image))


def test_greys_of_sixteen_bits_are_of_their_full_range():
    values = np.array([[0, 257], [32768, 65535]], np.uint16)
    for kind in ("png", "tiff"):
        assert shown(packed(Image.fromarray(values), kind)).tolist() == [[0, 1], [128, 255]]
    assert shown(b"P5 2 2 65535\n" + values.astype(">u2").tobytes()).tolist() == [
        [0, 1],
        [128, 255],
    ]
    dark = np.array([[0, 2570], [257, 514]], np.uint16)  # the content does not matter
    assert shown(packed(Image.fromarray(dark))).tolist() == [[0, 10], [1, 2]]
    white_is_zero = packed(Image.fromarray(values), "tiff", tiffinfo={262: 0})
    assert shown(white_is_zero).tolist() == [[255, 254], [127, 0]]


def test_floating_point_greys_are_of_the_unit_interval_or_of_their_content():
    def of(values):
        return shown(packed(Image.fromarray(np.array(values, np.float32)), "tiff")).tolist()

    assert of([[0, 0.2], [0.4, 1]]) == [[0, 51], [102, 255]]
    assert of([[0.2, 0.2], [0.2, 0.4]]) == [[51, 51], [51, 102]]
    assert of([[-1, 0], [1, 3]]) == [[0, 64], [128, 255]]
    assert of([[0, 51], [102, 255]]) == [[0, 51], [102, 255]]
    assert of([[9, 9], [9, 9]]) == [[255, 255], [255, 255]]
    signed = Image.fromarray(np.array([[-100, 0], [0, 155]], np.int32))
    assert shown(packed(signed, "tiff")).tolist() == [[0, 100], [100, 255]]
    with pytest.raises(DataError, match=r"here: a.png cannot be read .*holds NaN or infinity"):
        of([[0, 1], [np.nan, 1]])


@pytest.mark.parametrize("kind", ["gif", "png", "webp", "tiff"])
def test_the_first_frame_of_several(kind, tmp_path):
    frames = [Image.new("L", (4, 4), grey) for grey in (50, 150, 250)]
    how = {"lossless": True} if kind == "webp" else {}
    data = packed(frames[0], kind, save_all=True, append_images=frames[1:], **how)
    assert (shown(data) == 50).all()
    (tmp_path / f"a.{kind}").write_bytes(data)
    Image.new("L", (4, 4)).save(tmp_path / "b.png")
    from adaptax.tasks.files import open_files

    with open_files(tmp_path) as files:
        out = np.zeros((2, 4, 4, 1), np.uint8)
        assert decoding.decode_into(out, files, files.names, resample="nearest") == 1


def bomb(width, height):
    """65 KB that unpack to `width x height` greys of one bit."""
    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    packer = zlib.compressobj(9)
    row = bytes(1 + (width + 7) // 8)
    data = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


@pytest.mark.parametrize(("width", "height"), [(2**26, 1), (1, 2**18), (9000, 9000)])
def test_extreme_shapes_are_refused_before_they_are_decoded(width, height, monkeypatch):
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(DataError, match=f"a.png has {width} x {height} pixels, more than"):
        shown(bomb(width, height), size=84)


def test_a_picture_beyond_pillows_own_limit():
    head = struct.pack(">IIBBBBB", 2**20, 2**20, 8, 0, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
    with pytest.raises(DataError, match=r"a.png cannot be read as an image \(more than \d+ pixels"):
        shown(data, size=84)


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"


@pytest.mark.parametrize(
    "data",
    [POSTSCRIPT, b"%PDF-1.4\n", b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"GIF", b"\x89PNG"],
)
def test_other_formats_are_refused_and_start_no_process(data, monkeypatch):
    for name in ("Popen", "run", "call", "check_call", "check_output"):
        monkeypatch.setattr(subprocess, name, lambda *a, **k: pytest.fail("a process"))
    with pytest.raises(
        DataError, match=r"a.png cannot be read as an image \(not a file of PNG"
    ) as e:
        shown(data, size=8)
    assert "BytesIO" not in str(e.value)


def test_an_empty_file():
    with pytest.raises(DataError, match=r"a.png cannot be read as an image \(the file is empty\)"):
        shown(b"", size=8)


def test_damaged_pictures_are_right_or_refused():
    """Flipped and cut bytes: an image of the right shape, or one sentence that names the file."""
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8))
    whole = [packed(noise, kind) for kind in ("png", "jpeg", "gif", "bmp", "tiff", "webp", "ppm")]
    whole += [packed(noise.convert("I;16"), "png"), packed(noise.convert("F"), "tiff")]
    for data in whole:
        for _ in range(40):
            broken = bytearray(data)
            for at in rng.integers(0, min(len(broken), 400), rng.integers(1, 9)):
                broken[at] = rng.integers(256)
            if rng.random() < 0.3:
                broken = broken[: rng.integers(len(broken))]
            said = "here: a.png"
            try:
                assert shown(bytes(broken), 3, size=8).shape == (8, 8, 3)
            except DataError as error:
                said = str(error)
            assert "here: a.png" in said
            assert "\n" not in said
            assert "_io" not in said

import equinox as eqx
import jax
import numpy as np
import pytest
from image_files import write_images, zip_folder
from PIL import Image

from adaptax.tasks import DataError, folder
from adaptax.tasks.images import decode

KEY = jax.random.key(0)
draw = eqx.filter_jit(lambda tasks, key: tasks.sample(key))
ASKED = {"way": 2, "shot": 1, "query": 2, "image_size": 10}


def test_classes_are_directories_and_are_split_at_random(tmp_path):
    write_images(tmp_path / "set", [f"c{i}" for i in range(10)], 3)
    (tmp_path / "set" / "notes.txt").write_text("not an image")
    (tmp_path / "set" / "c0" / ".hidden.png").write_text("not an image")
    splits = folder(tmp_path / "set", **ASKED)
    assert [len(s.classes) for s in (splits.train, splits.val, splits.test)] == [6, 2, 2]
    assert splits.train.describe()["ignored"] == 2
    assert splits.train.describe()["tasks"] == "set"
    task = draw(splits.train, KEY)
    assert task.query.x.shape == (4, 10, 10, 3)
    files = {np.asarray(Image.open(p)).tobytes() for p in (tmp_path / "set").rglob("c*/[0-9].png")}
    assert {np.rint(x * 255).astype(np.uint8).tobytes() for x in np.asarray(task.query.x)} <= files


def test_an_archive_is_as_good_as_its_folder(tmp_path):
    write_images(tmp_path / "set", [f"c{i}" for i in range(10)], 3)
    zip_folder(tmp_path / "set", tmp_path / "set.zip")
    a, b = folder(tmp_path / "set", **ASKED), folder(tmp_path / "set.zip", **ASKED)
    assert a.train.classes == b.train.classes
    assert np.array_equal(a.train.bank, b.train.bank)


def test_ready_made_splits_grey_and_nested(tmp_path):
    for split in ("train", "val", "test"):
        write_images(tmp_path / split, [f"{split}/{i}" for i in range(3)], 3, mode="L", size=12)
    splits = folder(tmp_path, **ASKED, channels=1, rotations=("classes", "none"), invert=True)
    assert splits.val.classes == ("val/0", "val/1", "val/2")
    assert draw(splits.train, KEY).support.x.shape == (2, 10, 10, 1)
    assert splits.train.describe()["classes"] == 12


def test_grey_palette_and_transparent_images_are_converted(tmp_path):
    write_images(tmp_path, [f"c{i}" for i in range(10)], 3, mode="L", size=20)
    for i, mode in enumerate(["1", "P", "RGBA", "L", "LA"]):
        Image.new(mode, (30, 15)).save(tmp_path / f"c{i}" / "0.png")
    assert folder(tmp_path, **ASKED).train.bank.shape[1:] == (10, 10, 3)


def test_one_bit_images_are_resized_smoothly():
    import io

    checks = np.indices((28, 28)).sum(0) % 2 == 0
    out = io.BytesIO()
    Image.fromarray(checks).save(out, "png")
    asked = {"where": "checks", "size": 14, "channels": 1}
    smooth = decode(out.getvalue(), **asked, resample="bilinear")
    hard = decode(out.getvalue(), **asked, resample="nearest")
    assert 100 < smooth.mean() < 155
    assert len(np.unique(smooth)) > 2
    assert set(np.unique(hard)) <= {0, 255}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image_size": 0}, "image_size=0"),
        ({"channels": 2}, "channels=2; expected 1"),
        ({"resample": "magic"}, "resample='magic'; expected one of nearest"),
        ({"query": 3}, r"class c\d of the train split has 3 examples, but shot \+ query = 1 \+ 3"),
        ({"way": 3}, "way=3, but the val split has 2 classes"),
    ],
)
def test_errors_of_arguments(tmp_path, arguments, message):
    write_images(tmp_path, [f"c{i}" for i in range(10)], 3)
    with pytest.raises(DataError, match=message):
        folder(tmp_path, **(ASKED | arguments))


def test_errors_of_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        folder(tmp_path / "none", **ASKED)
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(DataError, match=r"holds no images \(1 other files\)"):
        folder(tmp_path, **ASKED)
    write_images(tmp_path, ["c0"], 3)
    (tmp_path / "c0" / "1.png").write_bytes(b"broken")
    with pytest.raises(DataError, match=r"c0/1.png cannot be read as an image"):
        folder(tmp_path, **ASKED)
    good = (tmp_path / "c0" / "2.png").read_bytes()
    (tmp_path / "c0" / "1.png").write_bytes(good[: len(good) // 2])
    with pytest.raises(DataError, match=r"c0/1.png cannot be read as an image"):
        folder(tmp_path, **ASKED)


def test_splits_that_share_a_class(tmp_path):
    for split, names in {"train": "abc", "val": "de", "test": "cf"}.items():
        write_images(tmp_path / split, list(names), 3)
    with pytest.raises(DataError, match=r"the train and test splits share 1 classes \(c\)"):
        folder(tmp_path, **ASKED)


def test_a_missing_split(tmp_path):
    for split in ("train", "test"):
        write_images(tmp_path / split, [split + "a", split + "b"], 3)
    with pytest.raises(DataError, match="found the splits test, train; expected train, val and"):
        folder(tmp_path, **ASKED)

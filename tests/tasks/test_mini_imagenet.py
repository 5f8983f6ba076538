import csv

import jax
import numpy as np
import pytest
from image_files import write_images

from adaptax.tasks import DataError, mini_imagenet

KEY = jax.random.key(0)
ASKED = {"way": 2, "shot": 1, "query": 2}


def write_table(path, rows, header=("filename", "label")):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])


@pytest.fixture
def small(tmp_path):
    """Nine classes of four noise images, three a split."""
    root = tmp_path / "mini_imagenet"
    write_images(root, ["images"], 36, size=84)
    for i, split in enumerate(("train", "val", "test")):
        write_table(
            root / f"{split}.csv", [(f"{12 * i + j}.png", f"n{3 * i + j // 4}") for j in range(12)]
        )
    return root


def test_splits_follow_the_tables(small, tmp_path):
    splits = mini_imagenet(**ASKED, data_root=tmp_path)
    assert splits.train.classes == ("n0", "n1", "n2")
    assert splits.test.classes == ("n6", "n7", "n8")
    assert splits.val.sample(KEY).query.x.shape == (4, 84, 84, 3)
    other = mini_imagenet(**ASKED, data_root=small, memory_budget=0)
    assert np.array_equal(other.val.sample(KEY).query.x, splits.val.sample(KEY).query.x)


def test_normalised_and_resized(small):
    splits = mini_imagenet(
        **ASKED, data_root=small, normalise=True, image_size=20, resample="nearest"
    )
    x = splits.train.sample(KEY).support.x
    assert x.shape == (2, 20, 20, 3)
    assert float(x.min()) < -1.5
    assert float(x.max()) > 2


def test_errors(small, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no miniImageNet under .* cannot be downloaded"):
        mini_imagenet(data_root=small / "images")
    with pytest.raises(DataError, match="class n0 of the train split has 4 examples"):
        mini_imagenet(way=2, data_root=tmp_path)
    write_table(small / "val.csv", [("0.png", "n0")] * 4 + [("1.png", "n1")] * 4)
    with pytest.raises(DataError, match=r"train and val splits share 2 classes \(n0, n1\)"):
        mini_imagenet(**ASKED, data_root=tmp_path)
    write_table(small / "val.csv", [("gone.png", "n3")])
    with pytest.raises(DataError, match=r"lacks 1 of the 25 images listed .* first gone.png"):
        mini_imagenet(**ASKED, data_root=tmp_path)
    write_table(small / "val.csv", [("0.png", "n3")], header=("file", "class"))
    with pytest.raises(DataError, match=r"val.csv has no rows of filename,label"):
        mini_imagenet(**ASKED, data_root=tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"filename,label\n0.png,n0\n1.png\n", r"train.csv, line 3: no label; expected"),
        (b"filename,label\n,n0\n", r"train.csv, line 2: no filename"),
        (b"filename,label\ncaf\xe9.png,n0\n", r"train.csv is no table of images \(.*utf-8"),
        (b"filename,label\n" + b"x" * 140_000 + b",n0\n", r"train.csv is no table .*field limit"),
        (b"filename,label\n0.png,n0\n1.png,n0\n0.png,n0\n", "lists 0.png more than once"),
        (b"filename,label\n12.png,n0\n", "lists 12.png more than once; .* in one split"),
        (b"", "train.csv has no rows of filename,label"),
    ],
)
def test_tables_that_are_refused(small, text, message):
    (small / "train.csv").write_bytes(text)
    with pytest.raises(DataError, match=message) as refused:
        mini_imagenet(**ASKED, data_root=small)
    assert "\n" not in str(refused.value)


def test_a_mark_of_the_byte_order_is_none_of_a_table(small):
    path = small / "train.csv"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert mini_imagenet(**ASKED, data_root=small).train.classes == ("n0", "n1", "n2")


def test_a_listed_name_that_is_there_twice(small):
    write_images(small / "images", ["more"], 1, seed=1)
    with pytest.raises(DataError, match=r"lists 0.png, which is there twice: .*images: 0.png and"):
        mini_imagenet(**ASKED, data_root=small)


def test_a_picture_in_two_splits_is_reported(small):
    (small / "images" / "12.png").write_bytes((small / "images" / "3.png").read_bytes())
    with pytest.warns(UserWarning, match=r"1 of val are in train, such as 3.png and 12.png"):
        mini_imagenet(**ASKED, data_root=small)


def test_real_mini_imagenet(real_data, tmp_path):
    # The first 6 images of every class: decoding all takes half a minute.
    real = real_data / "mini_imagenet"
    if not (real / "images.zip").exists():
        pytest.skip(f"no miniImageNet at {real}")
    (tmp_path / "images.zip").symlink_to(real / "images.zip")
    for split in ("train", "val", "test"):
        with (real / f"{split}.csv").open(newline="") as file:
            rows = [(row["filename"], row["label"]) for row in csv.DictReader(file)]
        seen: dict[str, int] = {}
        kept = []
        for name, label in rows:
            seen[label] = seen.get(label, 0) + 1
            if seen[label] <= 6:
                kept.append((name, label))
        write_table(tmp_path / f"{split}.csv", kept)
    splits = mini_imagenet(query=5, data_root=tmp_path)
    assert [len(s.classes) for s in (splits.train, splits.val, splits.test)] == [64, 16, 20]
    x = splits.test.sample(KEY).query.x
    assert x.shape == (25, 84, 84, 3)
    assert 0.3 < float(x.mean()) < 0.6

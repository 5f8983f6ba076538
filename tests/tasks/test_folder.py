import warnings
import zipfile

import equinox as eqx
import jax
import numpy as np
import pytest
from image_files import write_images, zip_folder
from PIL import Image

from adaptax.tasks import DataError, folder
from adaptax.tasks.images import decode
from adaptax.tasks.layout import split_named

KEY = jax.random.key(0)
draw = eqx.filter_jit(lambda tasks, key: tasks.sample(key))
ASKED = {"way": 2, "shot": 1, "query": 2, "image_size": 10}


def test_classes_are_directories_and_are_split_at_random(tmp_path):
    write_images(tmp_path / "set", [f"c{i}" for i in range(10)], 3)
    (tmp_path / "set" / "notes.txt").write_text("not an image")
    (tmp_path / "set" / "c0" / ".hidden.png").write_text("not an image")
    splits = folder(tmp_path / "set", **ASKED)
    assert [len(s.classes) for s in (splits.train, splits.val, splits.test)] == [6, 2, 2]
    assert splits.train.describe()["ignored"] == 1
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
        Image.fromarray(np.eye(20, 30, i, np.uint8) * 255).convert(mode).save(
            tmp_path / f"c{i}" / "0.png"
        )
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
        (
            {"way": 3, "splits": (0.64, 0.16, 0.2)},
            "way=3, but the val split has 2 classes and the test split has 2; lower way to 2 or",
        ),
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


def test_what_lies_beside_the_classes_is_passed_over_and_counted(tmp_path):
    for seed, split in enumerate(("Training", "val_set", "meta-test")):
        write_images(tmp_path / "wrap" / split, [f"{split}{i}" for i in range(3)], 3, seed=seed)
    picture = (tmp_path / "wrap" / "Training" / "Training0" / "0.png").read_bytes()
    for name in ("preview.png", "wrap/preview.jpg", "wrap/val_set/preview.png", "logo.svg"):
        (tmp_path / name).write_bytes(picture)
    splits = folder(tmp_path, **ASKED)
    assert splits.train.classes == ("Training0", "Training1", "Training2")
    assert splits.val.classes == ("val_set0", "val_set1", "val_set2")
    assert splits.test.classes == ("meta-test0", "meta-test1", "meta-test2")
    assert splits.train.describe()["ignored"] == 4


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["Train/a", "Train/b", "Test/c"], "found the splits test, train; expected train, val and"),
        (["train/a", "train/b"], "found the splits train; expected train, val and test"),
        (["train/a", "b", "c"], "found the splits train, beside 2 other folders, first b"),
        (["novel/a", "base/b", "val/c", "more/d"], "beside 1 other folders, first more"),
        (
            ["train/a", "Training/b", "val/c", "test/d"],
            "Training and train are both folders of the",
        ),
        (["train/a", "val", "test/d"], "val holds 3 images but no class folders; expected val/cla"),
        (["a/train", "a/test", "b/train", "b/test"], "folders of splits inside of its classes"),
        (["."], r"3 images lie in it directly, first 0.png; expected class/image.png or train/"),
    ],
)
def test_splits_are_never_taken_for_classes(tmp_path, names, message):
    write_images(tmp_path, names, 3)
    with pytest.raises(DataError, match=message) as refused:
        folder(tmp_path, **ASKED)
    assert "\n" not in str(refused.value)


def test_small_classes_are_listed_all_at_once_or_left_out_when_asked(tmp_path):
    write_images(tmp_path / "set", [f"c{i}" for i in range(10)], 3)
    for i, name in enumerate(("few", "fewer")):
        write_images(tmp_path / "set", [name], 2 - i, seed=i + 1)
    with pytest.raises(
        DataError, match=r"2 classes have too few: .*; lower shot or query, or "
    ) as e:
        folder(tmp_path / "set", **ASKED)
    for word in ("few (2)", "fewer (1)", "shot + query = 1 + 2", "min_images=3"):
        assert word in str(e.value)
    splits = folder(tmp_path / "set", **ASKED, min_images=3)
    assert splits.test.describe()["left_out"] == ("few", "fewer")
    assert sum(len(s.classes) for s in (splits.train, splits.val, splits.test)) == 10
    with pytest.raises(DataError, match="class few of the"):
        folder(tmp_path / "set", **ASKED, min_images=2)
    with pytest.raises(DataError, match=r"all 12 classes have fewer than min_images=4"):
        folder(tmp_path / "set", **ASKED, min_images=4)


def test_own_photos_make_episodes_without_a_word_about_them(tmp_path):
    write_images(tmp_path / "set", [f"c{i:02d}" for i in range(12)], 15, size=4)
    made = folder(tmp_path / "set", image_size=4)
    about = made.test.describe()
    assert (about["way"], about["shot"], about["query"], about["classes"]) == (5, 1, 14, 5)
    assert about["splits"] == "7 / – / 5 of 12 classes, validation on those of training"
    assert made.val.classes == made.train.classes
    assert not set(made.test.classes) & set(made.train.classes)
    assert made.train.sample(KEY).query.x.shape == (70, 4, 4, 3)
    write_images(tmp_path / "set", [f"d{i}" for i in range(4)], 15, size=4, seed=1)
    write_images(tmp_path / "set", ["few"], 3, size=4, seed=2)
    made = folder(tmp_path / "set", image_size=4, min_images=10)
    assert [len(s.classes) for s in (made.train, made.val, made.test)] == [6, 5, 5]
    assert made.val.describe()["splits"] == "6 / 5 / 5 of 16 classes"
    assert made.val.describe()["left_out"] == ("few",)
    assert len({*made.train.classes, *made.val.classes, *made.test.classes}) == 16
    with pytest.raises(
        DataError, match=r"class few of .* or leave such classes out by min_images="
    ):
        folder(tmp_path / "set", image_size=4)


def test_an_error_names_every_cure_at_once(tmp_path):
    write_images(tmp_path, [f"c{i:02d}" for i in range(12)], 15, size=4)
    asked = {"image_size": 4, "way": 5, "shot": 1, "query": 15}
    with pytest.raises(DataError, match=r"shot \+ query = 15 fits every class$") as caught:
        folder(tmp_path, **asked)
    assert "12 classes have too few" in str(caught.value)
    assert "min_images" not in str(caught.value)  # which would leave none
    with pytest.raises(DataError) as caught:
        folder(tmp_path, **asked, splits=(0.64, 0.16, 0.2))
    for said in (
        "12 classes have too few",
        "way=5, but the val split has 2 classes and the test split has 2",
        "lower shot or query; shot + query = 15 fits every class",
        "lower way to 2 or give the split more classes",
    ):
        assert said in str(caught.value)


def test_a_picture_beside_class_folders_is_named(tmp_path):
    write_images(tmp_path, [f"{a}/{b}" for a in "ab" for b in "12345"], 3)
    write_images(tmp_path, ["a"], 1, seed=1)
    with pytest.raises(DataError, match=r"a/0.png lies beside class folders; put it into one or"):
        folder(tmp_path, **ASKED)
    assert folder(tmp_path, **ASKED, min_images=3).train.describe()["left_out"] == ("a",)


@pytest.mark.parametrize("suffix", ["svg", "HEIC", "eps", "psd"])
def test_pictures_of_formats_that_are_not_read_are_named(tmp_path, suffix):
    write_images(tmp_path, [f"c{i}" for i in range(10)], 3)
    (tmp_path / "c3" / f"photo.{suffix}").write_bytes(b"<svg/>")
    with pytest.raises(DataError, match=rf"1 pictures are of a format .* first c3/photo.{suffix}"):
        folder(tmp_path, **ASKED)
    for path in tmp_path.rglob("*.png"):
        path.rename(path.with_suffix(f".{suffix}"))
    with pytest.raises(DataError, match="31 pictures are of a format that is not read"):
        folder(tmp_path, **ASKED)


def test_several_frames_are_said(tmp_path):
    write_images(tmp_path, [f"c{i}" for i in range(10)], 3)
    frames = [Image.new("L", (10, 10), grey) for grey in (50, 150)]
    frames[0].save(tmp_path / "c3" / "0.gif", save_all=True, append_images=frames[1:])
    for _ in range(2):  # decoded, and from the cache
        assert folder(tmp_path, **ASKED).train.describe()["first_frame_of"] == 1


def test_a_picture_in_two_splits_is_reported(tmp_path):
    for seed, split in enumerate(("train", "val", "test")):
        write_images(tmp_path / split, [f"{split}{i}" for i in range(3)], 3, seed=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        folder(tmp_path, **ASKED)
    # Another encoding of the same pixels.
    Image.open(tmp_path / "train" / "train1" / "2.png").save(tmp_path / "test" / "test0" / "x.bmp")
    expected = (
        "the same picture is in two splits of .*: 1 of test are in train, such as "
        "train/train1/2.png and test/test0/x.bmp"
    )
    for budget in (2**30, 0):
        with pytest.warns(UserWarning, match=expected):
            folder(tmp_path, **ASKED, memory_budget=budget)


def test_archives_keep_the_same_rules(tmp_path):
    write_images(tmp_path / "set", [f"c{i}" for i in range(10)], 3)
    zip_folder(tmp_path / "set", tmp_path / "set.zip")
    with zipfile.ZipFile(tmp_path / "set.zip", "a") as out:
        for name in ("__MACOSX/set/c0/._0.png", "set/.git/x.png", "set/preview.png", "top.png"):
            out.writestr(name, b"junk")
    made = folder(tmp_path / "set.zip", **ASKED).train
    assert made.describe()["ignored"] == 2
    assert np.array_equal(made.bank, folder(tmp_path / "set", **ASKED).train.bank)


@pytest.mark.parametrize(
    ("split", "names"),
    {
        "train": ["train", "TRAIN", "Training", "base", "meta-train", "meta_train", "Train Images"],
        "val": ["val", "Valid", "validation", "dev", "metaval", "val_set", "Meta-Validation"],
        "test": ["test", "testing", "Novel", "meta.test", "test-data"],
        None: ["trains", "1train", "cat", "tester", "set", "images", "data", "retest", "validity"],
    }.items(),
)
def test_names_of_splits(split, names):
    assert [split_named(name) for name in names] == [split] * len(names)

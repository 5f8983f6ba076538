import zipfile

import jax
import numpy as np
import pytest
from image_files import write_images, zip_folder
from PIL import Image

from adaptax.tasks import DataError, omniglot

KEY = jax.random.key(0)


@pytest.fixture
def small(tmp_path):
    """Two archives of 10 + 6 characters with 4 drawings each."""
    root = tmp_path / "omniglot"
    for part, alphabet, characters in (("background", "Latin", 10), ("evaluation", "Greek", 6)):
        names = [f"{alphabet}/character{i:02d}" for i in range(characters)]
        write_images(root / f"images_{part}", names, 4, mode="L", size=28)
    return root


ASKED = {"way": 2, "shot": 1, "query": 3, "protocol": "reptile"}


def test_archives_folders_and_both_layouts_agree(small, tmp_path):
    folders = omniglot(**ASKED, data_root=tmp_path)
    assert [len(s.classes) for s in (folders.train, folders.val, folders.test)] == [12, 12, 4]
    packed = tmp_path / "packed"
    packed.mkdir()
    for part in ("images_background", "images_evaluation"):
        zip_folder(small / part, packed / f"{part}.zip")
    for other in (omniglot(**ASKED, data_root=small), omniglot(**ASKED, data_root=packed)):
        assert other.test.classes == folders.test.classes
        assert np.array_equal(other.test.bank, folders.test.bank)


def test_the_seed_fixes_the_split(small):
    a, b = (omniglot(**ASKED, data_root=small, seed=seed).test.classes for seed in (1, 2))
    assert a == omniglot(**ASKED, data_root=small).test.classes != b


def test_ink_is_one_for_maml_and_paper_is_one_for_the_others(small):
    asked = {"way": 1, "shot": 1, "query": 3, "data_root": small}
    dark, light = omniglot(**asked, protocol="maml"), omniglot(**asked, protocol="maml++")
    assert dark.train.design.invert
    assert not light.train.design.invert
    assert (dark.train.design.rotations, dark.test.design.rotations) == ("random", "random")
    assert (light.train.design.rotations, light.test.design.rotations) == ("random", "none")


@pytest.mark.parametrize("protocol", ["maml", "reptile", "maml++"])
def test_drawings_of_one_bit_stay_binary_as_pillow_resizes_them(small, protocol):
    numbers, theirs = np.random.default_rng(0), set()
    for path in small.rglob("*.png"):
        drawing = Image.fromarray(numbers.random((105, 105)) < 0.9)  # of one bit, as Omniglot's
        drawing.save(path)
        for wanted in (Image.Resampling.LANCZOS, Image.Resampling.BICUBIC):
            resized = drawing.resize((28, 28), resample=wanted)
            theirs.add((np.asarray(resized.convert("L")) == 255).tobytes())
    asked = {"way": 1, "shot": 1, "query": 3, "data_root": small, "protocol": protocol}
    ours = omniglot(**asked)
    assert {(image == 255).tobytes() for image in np.asarray(ours.test.bank)} <= theirs
    assert len(theirs) == len(list(small.rglob("*.png")))
    assert ("resample", "nearest") in ours.test.details
    grey = omniglot(**asked, resample="lanczos")
    assert len(np.unique(grey.test.bank)) > 10


def test_errors(small, no_data):
    with pytest.raises(DataError, match="protocol='leo'; expected one of maml, reptile"):
        omniglot(protocol="leo", data_root=small)
    with pytest.raises(DataError, match="has 4 examples, but shot \\+ query = 1 \\+ 15"):
        omniglot(data_root=small)
    for image in (small / "images_evaluation").rglob("*.png"):
        image.unlink()
    with pytest.raises(DataError, match="images_evaluation holds no images"):
        omniglot(**ASKED, data_root=small)


def test_nothing_there_and_no_network(no_data):
    (no_data / "empty").mkdir()
    with pytest.raises(
        DataError, match=r"fetch https://.*images_background.zip and put it at"
    ) as e:
        omniglot(data_root=no_data / "empty")
    assert "\n" not in str(e.value)


@pytest.fixture(scope="module")
def real(real_data, tmp_path_factory):
    """All real characters with their first four drawings: decoding all takes long under checks."""
    root = tmp_path_factory.mktemp("omniglot")
    for part in ("images_background", "images_evaluation"):
        archive = real_data / "omniglot" / f"{part}.zip"
        if not archive.exists():
            pytest.skip(f"no Omniglot at {archive}")
        with zipfile.ZipFile(archive) as whole, zipfile.ZipFile(root / archive.name, "w") as out:
            for name in whole.namelist():
                if name.endswith(("_01.png", "_02.png", "_03.png", "_04.png")):
                    out.writestr(name, whole.read(name))
    return root


def test_real_omniglot(real):
    splits = omniglot(query=3, data_root=real)
    counts = [s.describe()["classes"] for s in (splits.train, splits.val, splits.test)]
    assert counts == [1100, 100, 423]
    assert set(np.unique(splits.test.bank)) == {0, 255}
    assert splits.test.bank.shape == (423 * 4, 28, 28, 1)
    task = splits.test.sample(KEY)
    assert task.query.x.shape == (15, 28, 28, 1)
    assert 0.03 < float(task.query.x.mean()) < 0.15  # little ink on much paper
    assert len({image.tobytes() for image in np.asarray(task.query.x)}) == 15


@pytest.mark.parametrize(
    ("protocol", "sizes"), [("reptile", [1200, 1200, 423]), ("maml++", [1150, 50, 423])]
)
def test_real_splits_of_the_other_papers(real, protocol, sizes):
    splits = omniglot(query=3, data_root=real, protocol=protocol)
    assert [len(s.classes) for s in (splits.train, splits.val, splits.test)] == sizes
    assert float(splits.train.sample(KEY).query.x.mean()) > 0.8

import zipfile

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from image_files import zip_folder
from PIL import Image

from adaptax.tasks import AttributeTasks, DataError, celeba
from adaptax.tasks.celeba import read_attributes

KEY = jax.random.key(2)
NAMES = [f"Attribute_{letter}" for letter in "ABCDEFGHIJKLMNOPQRSTUVWX"]
ASKED = {"shot": 2, "query": 2, "image_size": 8, "resample": "nearest"}
ALL = ("train", "val", "test")


def write_list(path, has, names=None):
    names = NAMES if names is None else names
    rows = [
        f"{i + 1:06d}.png  " + " ".join(" 1" if v else "-1" for v in row)
        for i, row in enumerate(has)
    ]
    path.write_text("\n".join([str(len(has)), " ".join(names) + " ", *rows]) + "\n")


@pytest.fixture
def small(tmp_path):
    """400 images that tell their own row, and 24 attributes."""
    has = np.random.default_rng(0).random((400, len(NAMES))) < 0.5
    folder = tmp_path / "celeba" / "img_align_celeba"
    folder.mkdir(parents=True)
    for row in range(len(has)):
        pixels = np.zeros((8, 8, 3), np.uint8)
        pixels[0, 0, :2] = divmod(row, 256)
        Image.fromarray(pixels).save(folder / f"{row + 1:06d}.png")
    write_list(folder.parent / "list_attr_celeba.txt", has)
    return folder.parent, has


def rows_of(x):
    pixels = np.rint(np.asarray(x)[..., 0, 0, :2] * 255).astype(int)
    return 256 * pixels[..., 0] + pixels[..., 1]


def check_labels(tasks, task, key, has, names):
    """What every label promises, from the attributes of the very images."""
    readings = tasks.readings(key)
    together = sorted({name for reading in readings for name in reading})
    columns = [names.index(name) for name in together]
    support = has[rows_of(task.support.x)][:, columns]
    assert (support == np.asarray(task.support.y)[:, None].astype(bool)).all()
    parts = rows_of(task.query.x).reshape(len(readings), -1)
    for reading, rows, y in zip(readings, parts, np.asarray(task.query.y).reshape(parts.shape)):
        asked = [names.index(name) for name in reading]
        assert (has[rows][:, asked] == y[:, None].astype(bool)).all()
        assert len({*rows, *rows_of(task.support.x)}) == len(rows) + len(support)


def test_labels_mean_what_they_say(small, tmp_path):
    _, has = small
    splits = celeba(**ASKED, data_root=tmp_path)
    for split, readings in zip(ALL, (1, 3, 3)):
        tasks = getattr(splits, split)
        assert isinstance(tasks, AttributeTasks)
        draw = eqx.filter_jit(lambda tasks, key: tasks.sample(key))
        for key in jax.random.split(KEY, 10):
            task = draw(tasks, key)
            assert task.support.x.shape == (4, 8, 8, 3)
            assert task.query.x.shape == (readings * 4, 8, 8, 3)
            assert task.support.y.tolist() == [0, 0, 1, 1]
            assert task.query.y.tolist() == readings * [0, 0, 1, 1]
            assert len(tasks.readings(key)) == readings
            check_labels(tasks, task, key, has, NAMES)


def test_splits_share_neither_attributes_nor_images(small, tmp_path):
    splits = celeba(**ASKED, data_root=tmp_path)
    parts = [getattr(splits, split) for split in ALL]
    used = [{name for of in tasks.conjunctions for name in of} for tasks in parts]
    assert [len(of) for of in used] == [15, 3, 6]
    assert len(set.union(*used)) == 24
    rows = [set(rows_of(np.asarray(tasks.bank) / 255)) for tasks in parts]
    assert [len(of) for of in rows] == [240, 60, 100]
    assert len(set.union(*rows)) == 400
    described = [tasks.describe() for tasks in parts]
    assert [d["readings"] for d in described] == [1, 3, 3]
    assert [d["conjunctions"] + d["left_out"] for d in described] == [105, 1, 20]
    assert described[2]["attribute_split"] == "seed 0"
    other = celeba(**ASKED, data_root=tmp_path, seed=1).test.conjunctions
    assert other != splits.test.conjunctions
    assert celeba(**ASKED, data_root=tmp_path).test.conjunctions == splits.test.conjunctions


def test_attributes_by_name_and_other_counts_in_training(small, tmp_path):
    given = {"train": NAMES[:2], "val": NAMES[2:5], "test": NAMES[5:8]}
    splits = celeba(
        **ASKED, data_root=tmp_path, attributes=given, train_shot=3, train_query=0,
        image_splits=(0.5, 0.25, 0.25),
    )  # fmt: skip
    assert splits.train.conjunctions == (tuple(NAMES[:2]),)
    assert splits.test.readings(KEY) == (
        (NAMES[5], NAMES[6]), (NAMES[5], NAMES[7]), (NAMES[6], NAMES[7]),
    )  # fmt: skip
    task = splits.train.sample(KEY)
    assert (task.support.size, task.query.size) == (6, 0)
    assert task.query.x.shape == (0, 8, 8, 3)
    assert splits.val.describe()["attribute_split"] == "given"
    assert splits.train.describe()["images"] == 200


@pytest.mark.parametrize("lead", [(), (3,), (2, 2)])
def test_streamed_tasks_are_the_device_tasks_to_the_bit(small, tmp_path, lead):
    here = celeba(**ASKED, data_root=tmp_path).test
    there = celeba(**ASKED, data_root=tmp_path, memory_budget=0).test
    assert (here.on_host, there.on_host) == (False, True)
    keys = jax.random.split(KEY, lead) if lead else KEY
    plan, sample = there.plan, here.sample
    for _ in lead:
        plan, sample = eqx.filter_vmap(plan), eqx.filter_vmap(sample)
    fetched = there.fetch(eqx.filter_jit(plan)(keys))
    assert eqx.tree_equal(fetched, eqx.filter_jit(sample)(keys))
    assert there.describe() == here.describe()
    assert there.readings(KEY) == here.readings(KEY)


def test_a_key_names_one_task(small, tmp_path):
    tasks = celeba(**ASKED, data_root=tmp_path).test
    assert eqx.tree_equal(tasks.sample(KEY), eqx.filter_jit(tasks.sample)(KEY))
    assert not eqx.tree_equal(tasks.sample(KEY), tasks.sample(jax.random.key(9)))


def test_archive_and_folder_agree(small, tmp_path):
    folder, _ = small
    packed = tmp_path / "packed"
    packed.mkdir()
    zip_folder(folder / "img_align_celeba", packed / "img_align_celeba.zip")
    (folder / "list_attr_celeba.txt").rename(packed / "list_attr_celeba.txt")
    tasks = celeba(**ASKED, data_root=packed).val
    assert (rows_of(np.asarray(tasks.bank) / 255) == np.arange(240, 300)).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shot": 0}, "shot=0"),
        ({"resample": "best"}, "resample='best'"),
        ({"query": 300}, r"no conjunction of 2 of the 15 train attributes .*2 \+ 300 of each"),
        ({"image_splits": (0.5, 0.5)}, "three numbers that sum to at most 1"),
        ({"image_splits": (1.0, 0.0, 0.0)}, "no conjunction of 3 of the 3 val attributes"),
        ({"attributes": {"train": NAMES[:2]}}, "attributes has the splits train; expected"),
        (
            {"attributes": {"train": ["Atribute_A", NAMES[1]], "val": NAMES[:3], "test": []}},
            "'Atribute_A' is no attribute of these images; expected Attribute_A",
        ),
        (
            {"attributes": {"train": NAMES[:2], "val": NAMES[2:4], "test": NAMES[5:8]}},
            "the val attributes are Attribute_C, Attribute_D; expected at least 3",
        ),
        (
            {"attributes": {"train": NAMES[:2] * 2, "val": NAMES[2:5], "test": NAMES[5:8]}},
            "expected at least 2, each once",
        ),
        (
            {"attributes": {"train": NAMES[:2], "val": NAMES[1:4], "test": NAMES[5:8]}},
            r"the train and val splits share 1 classes \(Attribute_B\)",
        ),
    ],
)
def test_errors_are_one_clear_sentence(small, tmp_path, arguments, message):
    with pytest.raises(DataError, match=message) as caught:
        celeba(**{**ASKED, "data_root": tmp_path, **arguments})
    assert "\n" not in str(caught.value)


def test_broken_and_missing_files(small, tmp_path):
    folder, has = small
    table = folder / "list_attr_celeba.txt"
    whole = table.read_text()
    for broken in (
        "",
        "400\n",
        whole.replace("-1", "-2", 1),
        whole.replace(" 1", "", 1),
        "000001.png 1 -1\n" + whole,
    ):
        table.write_text(broken)
        with pytest.raises(DataError, match=r"is not CelebA's list_attr_celeba.txt"):
            celeba(**ASKED, data_root=tmp_path)
    write_list(table, np.concatenate([has, has[:2]]))
    with pytest.raises(DataError, match=r"lacks 2 of the 402 images .* first 000401.png"):
        celeba(**ASKED, data_root=tmp_path)
    table.write_text(whole)
    (folder / "img_align_celeba" / "000007.png").write_bytes(b"\x89PNG no image")
    with pytest.raises(DataError, match=r"000007.png cannot be read as an image"):
        celeba(**ASKED, data_root=tmp_path)
    table.unlink()
    with pytest.raises(FileNotFoundError, match=r"no CelebA under .* list_attr_celeba.txt beside"):
        celeba(**ASKED, data_root=tmp_path)


@pytest.fixture(scope="module")
def real(real_data, tmp_path_factory):
    """The first 1200 real faces: decoding all takes long under checks."""
    archive = real_data / "celeba" / "img_align_celeba.zip"
    if not archive.exists():
        pytest.skip(f"no CelebA at {archive}")
    root = tmp_path_factory.mktemp("celeba")
    lines = (archive.parent / "list_attr_celeba.txt").read_text().splitlines()[:1202]
    (root / "list_attr_celeba.txt").write_text("\n".join(lines))
    with zipfile.ZipFile(archive) as whole, zipfile.ZipFile(root / archive.name, "w") as out:
        for i in range(1, 1201):
            out.writestr(f"{i:06d}.jpg", whole.read(f"img_align_celeba/{i:06d}.jpg"))
    return root


def test_real_faces(real):
    files, has, names = read_attributes(real / "list_attr_celeba.txt")
    assert files[0] == "000001.jpg"
    assert len(names) == 40
    assert has[0, names.index("Smiling")]
    assert not has[0, names.index("Male")]
    splits = celeba(shot=5, query=3, data_root=real)
    attributes = [tasks.describe()["attributes"] for tasks in (splits.train, splits.test)]
    assert attributes == [25, 10]
    tasks, first = splits.test, 900
    for key in jax.random.split(KEY, 3):
        task, rows = tasks.sample(key), first + np.asarray(tasks.plan(key))
        assert task.query.x.shape == (18, 84, 84, 3)
        assert jnp.array_equal(task.support.x, tasks.design.inputs(tasks.bank[rows[:10] - first]))
        assert 0.2 < float(task.query.x.mean()) < 0.7
        for i, reading in enumerate(tasks.readings(key)):
            columns = [names.index(name) for name in reading]
            both = has[np.concatenate([rows[:10], rows[10 + 6 * i : 16 + 6 * i]])][:, columns]
            y = np.concatenate([task.support.y, task.query.y[6 * i : 6 * i + 6]])
            assert (both == y[:, None].astype(bool)).all()


def test_a_face_in_two_splits_is_reported_and_one_listed_twice_is_refused(small, tmp_path):
    folder, _ = small
    first, last = (folder / "img_align_celeba" / f"{row:06d}.png" for row in (3, 398))
    last.write_bytes(first.read_bytes())
    with pytest.warns(UserWarning, match="1 of test are in train, such as 000003.png and 000398"):
        celeba(**ASKED, data_root=tmp_path)
    table = folder / "list_attr_celeba.txt"
    table.write_text(table.read_text().replace("000007.png", "000008.png"))
    with pytest.raises(DataError, match=r"list_attr_celeba.txt lists 000008.png more than once"):
        celeba(**ASKED, data_root=tmp_path)

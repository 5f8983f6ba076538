"""`adaptax pretrain` and `adaptax embed`, end to end and where they complain."""

import importlib
import json
import os
import pickle
import signal

import equinox as eqx
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from adaptax import io, tasks
from adaptax.cli import extractor as command
from adaptax.cli import main
from adaptax.cli.progress import Watcher
from adaptax.recipes import extractors
from adaptax.tasks.embeddings import embeddings

PRETRAIN = importlib.import_module("adaptax.engine.pretrain")
TINY = ["--width", "4", "--down", "stride", "--epochs", "3", "--batch", "16"]
CLASSES = {"train": 4, "val": 2, "test": 3}


@pytest.fixture(autouse=True)
def here(tmp_path, tmp_path_factory, monkeypatch):
    """An empty working directory, and an environment that the commands leave as it was."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XLA_FLAGS", os.environ.get("XLA_FLAGS", ""))
    monkeypatch.setenv("ADAPTAX_CACHE", str(tmp_path_factory.getbasetemp() / "decoded"))
    monkeypatch.delenv("ADAPTAX_DEBUG", raising=False)
    monkeypatch.setattr(PRETRAIN, "CHUNK", 6)
    monkeypatch.setattr(PRETRAIN, "task_mesh", lambda *given: None)  # as with one device
    return tmp_path


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder of images, class and number told by their colour."""
    root = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for split, count in CLASSES.items():
        for c in range(count):
            (root / split / f"{split}{c}").mkdir(parents=True)
            for i in range(20):
                pixels = rng.integers(0, 60, (20, 20, 3)) + 40 * np.array([c, count - c, 2])
                Image.fromarray(pixels.astype(np.uint8)).save(
                    root / split / f"{split}{c}" / f"{i}.png"
                )
    return root


@pytest.fixture(scope="module")
def run(photos, tmp_path_factory):
    """A run of three epochs on the folder."""
    path = tmp_path_factory.mktemp("runs") / "run"
    words = ["pretrain", "folder", "--path", str(photos), "--size", "16", *TINY]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ADAPTAX_CACHE", str(path.parent / "cache"))
        patch.setattr(PRETRAIN, "CHUNK", 6)
        patch.setattr(PRETRAIN, "task_mesh", lambda *given: None)
        assert main([*words, "--run", str(path)]) == 0
    return path


@pytest.mark.parametrize("command", ["pretrain", "embed"])
def test_help_has_an_example(command, capsys):
    assert main([command, "--help"]) == 0
    text = capsys.readouterr().out
    assert f"adaptax {command}" in text.split("For example:")[1]


def test_pretrain_writes_a_run(run):
    names = {"config.json", "metrics.jsonl", "checkpoint.safetensors", "pretrained.json",
             "learning_curve.png"}  # fmt: skip
    assert names <= {path.name for path in run.iterdir()}
    config = json.loads((run / "config.json").read_text())
    assert config["classes"] == [f"train{c}" for c in range(4)]
    assert config["augmentation"] == {"crop": 1, "flip": True, "jitter": 0.4}
    found = json.loads((run / "pretrained.json").read_text())
    assert found["training"]["steps"] == 12  # three epochs of 72 images by 16
    assert found["config"] == config
    assert 0 <= found["accuracy"] <= 1
    assert {"hardware", "versions", "command"} <= found.keys()


def test_embed_writes_the_features_of_every_image(run, here, capsys):
    assert main(["embed", str(run), "--out", "e.safetensors", "--batch", "7", "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["splits"] == {
        split: {"embeddings": 20 * n, "classes": n} for split, n in CLASSES.items()
    }
    arrays = load_file("e.safetensors")
    for split, count in CLASSES.items():
        x, labels = arrays[f"{split}/embeddings"], arrays[f"{split}/labels"]
        assert x.shape == (20 * count, summary["width"])
        np.testing.assert_allclose(np.linalg.norm(x, axis=1), 1, 1e-5)
        np.testing.assert_array_equal(labels, np.repeat(np.arange(count), 20))
    about = io.read_metadata("e.safetensors")
    assert about["classes"]["test"] == ["test0", "test1", "test2"]
    assert about["source"]["trained_on"] == ["train0", "train1", "train2", "train3"]
    assert about["source"]["step"] == 12
    # As the network does one image at a time.
    model, _, config = extractors.load_extractor(run)
    images = extractors.splits_of(config).test
    x = extractors.extract(model, images, batch=1)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    np.testing.assert_allclose(arrays["test/embeddings"], x, 1e-3, 1e-4)
    splits = embeddings("e.safetensors", way=2, shot=1, query="all")
    assert splits.test.describe()["query"] == 19
    assert splits.test.describe()["backbone"] == "conv4"


def test_embed_writes_into_the_run_by_default(run, capsys):
    assert main(["embed", str(run)]) == 0
    said = capsys.readouterr().out
    assert "train 80 of 4 classes, val 40 of 2 classes, test 60 of 3 classes" in said
    assert (run / "embeddings.safetensors").exists()


def test_interrupted_and_resumed_is_uninterrupted(run, photos, here, capsys, monkeypatch):
    plain = Watcher.__call__

    def press(self, record):
        plain(self, record)
        os.kill(os.getpid(), signal.SIGINT)

    words = ["pretrain", "folder", "--path", str(photos), "--size", "16", *TINY, "--run", "again"]
    monkeypatch.setattr(Watcher, "__call__", press)
    assert main(words) == 130
    said = capsys.readouterr().err
    assert "go on with: adaptax pretrain --resume again (step 6 of 12)" in said
    assert not (here / "again" / "pretrained.json").exists()
    monkeypatch.setattr(Watcher, "__call__", plain)
    assert main(["pretrain", "--resume", "again", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["training"]["steps"] == 12
    a, b = (load_file(path / "checkpoint.safetensors") for path in (run, here / "again"))
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)
    assert main(words) == 0  # goes on, with nothing to do
    assert main([*words, "--rate", "0.7"]) == 2
    said = "already holds a run, with other settings (training['rate'] was 0.1 and is 0.7)"
    assert said in " ".join(capsys.readouterr().err.split())


def configured(words, monkeypatch):
    """The configuration that the words make."""
    asked = []
    monkeypatch.setattr(
        command, "fit_extractor", lambda config, *a, **k: asked.append(config) or 1 / 0
    )
    monkeypatch.setenv("ADAPTAX_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        main(["pretrain", *words])
    return asked[0]


@pytest.mark.parametrize(
    ("words", "augmentation"),
    [
        (["mini_imagenet"], {"crop": 8, "flip": True, "jitter": 0.4}),
        (["mini_imagenet", "--size", "42"], {"crop": 4, "flip": True, "jitter": 0.4}),
        (["glyphs"], {"crop": 2, "flip": False, "jitter": 0.0}),
        (["omniglot", "--crop", "1", "--jitter", "0.1"],
         {"crop": 1, "flip": False, "jitter": 0.1}),
        (["mini_imagenet", "--no-augment"], {}),
    ],
)  # fmt: skip
def test_characters_are_neither_mirrored_nor_recoloured(words, augmentation, monkeypatch):
    assert configured(words, monkeypatch)["augmentation"] == augmentation


@pytest.mark.parametrize(
    ("words", "network", "features"),
    [
        ([], {"filters": 64, "down": "pool"}, 1600),
        (["--size", "42"], {"filters": 64, "down": "pool"}, 256),
        (["--width", "8", "--down", "stride"], {"filters": 8, "down": "stride"}, 8 * 36),
        (["--backbone", "resnet12"], {"widths": [64, 160, 320, 640]}, 640),
        (["--backbone", "resnet12", "--width", "4"], {"widths": [4, 10, 20, 40]}, 40),
        (["--backbone", "wrn28-10"], {"width": 10, "depth": 28}, 640),
        (["--backbone", "wrn28-10", "--width", "2", "--depth", "10"],
         {"width": 2, "depth": 10}, 128),
    ],
)  # fmt: skip
def test_backbones(words, network, features, monkeypatch):
    asked = configured(["mini_imagenet", *words], monkeypatch)
    assert asked["network"] == network
    side = asked["task"].get("image_size", 84)
    config = {**asked, "image": [side, side, 3]}
    assert eqx.filter_eval_shape(lambda: extractors.make_network(config, 64)).head.weight.shape == (
        features, 64,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["pretrain"], "pretrain wants the data: mini_imagenet, omniglot, glyphs, folder"),
        (["pretrain", "glyphs", "--size", "20"], "28×28 pixels; leave out --size"),
        (["pretrain", "folder"], "--path names the images of the data set folder"),
        (["pretrain", "glyphs", "--path", "x"], "--path names the images of the data set folder"),
        (["pretrain", "folder", "--path", "nowhere"], "nowhere does not exist"),
        (["pretrain", "glyphs", "--depth", "10"], "--depth is of wrn28-10; conv4 has one"),
        (["pretrain", "glyphs", "--width", "0"], "--width: '0' is not a whole number from 1"),
        (["pretrain", "glyphs", "--jitter", "2"], "jitter=2.0; expected"),
        (["pretrain", "--resume", "nowhere"], "nowhere holds no run"),
        (["pretrain", "--resume", "nowhere", "--rate", "1"], "leave out --rate"),
        (["pretrain", "mini_imagenet", "--data-root", "."], "no miniImageNet under"),
        (["embed"], "the folder of a run, or --archive, one of them"),
        (["embed", "r", "--archive", "a.zip"], "the folder of a run, or --archive, one of them"),
        (["embed", "nowhere"], "nowhere holds no run"),
        (["embed", "--archive", "a.zip"], "--archive wants --out"),
        (["embed", "--archive", "a.zip", "--out", "e"], "a.zip does not exist"),
        (["embed", "nowhere", "--batch", "0"], "--batch: '0' is not a whole number from 1"),
    ],
)
def test_errors_are_a_sentence_and_leave_nothing(words, said, here, capsys):
    assert main(words) == 2
    err = capsys.readouterr().err
    assert said in " ".join(err.split())
    assert "Traceback" not in err
    assert list(here.iterdir()) == []


def test_settings_that_the_images_do_not_allow(photos, here, capsys):
    words = ["pretrain", "folder", "--path", str(photos), "--size", "16", "--width", "2"]
    for more, said in ((["--epochs", "0"], "--epochs: '0' is not a whole number"),
                       (["--batch", "100"], "batch=100, but there are 72 images")):  # fmt: skip
        assert main([*words, *more]) == 2
        assert said in capsys.readouterr().err
    assert list(here.iterdir()) == []


def test_runs_of_another_kind_or_network(run, here, capsys):
    (here / "other").mkdir()
    (here / "other" / "config.json").write_text('{"version": 1, "experiment": {}}')
    assert main(["embed", "other"]) == 2
    assert "is not of a pretraining" in capsys.readouterr().err
    assert main(["embed", str(run), "--layer", "21"]) == 2
    assert "--layer is of wrn28-10, and the run is of conv4" in capsys.readouterr().err


def test_a_network_that_saw_test_classes_embeds_nothing(run, here, capsys):
    """The split was changed after training, so that a test class was trained on."""
    (here / "run").mkdir()
    config = json.loads((run / "config.json").read_text())
    config["classes"][1] = "test2"
    (here / "run" / "config.json").write_text(json.dumps(config))
    (here / "run" / "checkpoint.safetensors").write_bytes(
        (run / "checkpoint.safetensors").read_bytes()
    )
    assert main(["embed", "run"]) == 2
    assert "1 of the test classes (test2, …) are among" in " ".join(capsys.readouterr().err.split())
    assert not (here / "run" / "embeddings.safetensors").exists()


def test_validation_classes_that_are_trained_on_are_refused():
    """Reptile's protocol validates on classes of meta-train."""
    x = np.random.default_rng(0).integers(0, 255, (12, 8, 8, 3)).astype(np.uint8)
    part = lambda rows, names: (x[rows], np.repeat(names, 3))
    splits = tasks.from_arrays(
        {"train": part(slice(0, 6), ["a", "b"]), "val": part(slice(6, 9), ["c"]),
         "test": part(slice(9, 12), ["d"])}, way=1, shot=1, query=1,
    )  # fmt: skip
    extractors.check_unseen(["a", "b"], splits)
    for seen, split in ((["a", "c"], "val"), (["d"], "test")):
        with pytest.raises(tasks.DataError, match=f"1 of the {split} classes"):
            extractors.check_unseen(seen, splits)


def test_leos_archive_becomes_a_file_of_ours(here, capsys):
    folder = here / "embeddings" / "miniImageNet" / "center"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for split, count in CLASSES.items():
        names = np.repeat([f"n{split}{c}" for c in range(count)], 6)
        held = {
            "embeddings": 3 * rng.normal(size=(6 * count, 5)).astype(np.float32),
            "labels": np.repeat(np.arange(count), 6),
            "keys": np.array([f"{i}-{n}-{n}_{i}.JPEG" for i, n in enumerate(names)], "S"),
        }
        (folder / f"{split}_embeddings.pkl").write_bytes(pickle.dumps(held, 2))
    assert main(["embed", "--archive", "embeddings", "--out", "leo.safetensors"]) == 0
    assert "width 5, train 24 of 4 classes" in capsys.readouterr().out
    splits = embeddings("leo.safetensors", way=2, shot=1, query="all", train_query=5)
    assert splits.test.classes == ("ntest0", "ntest1", "ntest2")
    assert io.read_metadata("leo.safetensors")["source"] == {
        "archive": "embeddings", "view": "miniImageNet/center",
    }  # fmt: skip
    (folder / "val_embeddings.pkl").write_bytes(b"cos\nsystem\n(S'touch mark'\ntR.")
    assert main(["embed", "--archive", "embeddings", "--out", "bad.safetensors"]) == 2
    assert "is refused: it asks for os.system" in " ".join(capsys.readouterr().err.split())
    assert not (here / "mark").exists()
    assert not (here / "bad.safetensors").exists()

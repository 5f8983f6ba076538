"""The command line: every command end to end, every error in one sentence, nothing half-written."""

import csv
import dataclasses
import importlib.util
import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time

import equinox as eqx
import jax
import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from safetensors import safe_open

import adaptax
from adaptax.cli import main
from adaptax.cli.app import _share_cores
from adaptax.cli.progress import Watcher, watching
from adaptax.engine.run import Run
from adaptax.recipes import FAMILIES, LEARNERS, RECIPES, Experiment, book, changed, runs
from adaptax.recipes.photos import image_format
from adaptax.studies import ablation, comparison
from adaptax.tasks import glyphs, images

SINE = ["train", "maml", "sinusoid", "--steps", "20", "--episodes", "6", "--set",
        "network.mlp=[8]", "--validate-every", "10"]  # fmt: skip
TINY = dataclasses.replace(
    RECIPES["reptile-omniglot-5w1s"],
    name="tiny",
    experiment=Experiment(
        algorithm="reptile",
        tasks="glyphs",
        task={"way": 3, "shot": 1, "query": 2},
        network={"mlp": [4], "in_size": 784, "batch_norm": True},
        learner={"inner_adam": 0.01, "inner_steps": 1, "inner_batch": 3, "eval_steps": 1},
        steps=2,
        meta_batch=1,
        evaluation={"episodes": 4, "at": [0, 1]},
    ),
)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """An empty working directory, and an environment that the commands leave as it was."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XLA_FLAGS", os.environ.get("XLA_FLAGS", ""))
    monkeypatch.delenv("ADAPTAX_DEBUG", raising=False)
    return tmp_path


@pytest.fixture(scope="module")
def image_run(tmp_path_factory):
    """A run of a recipe on images, barely trained."""
    path = tmp_path_factory.mktemp("images") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(RECIPES, "tiny", TINY)
        assert main(["recipes", "run", "tiny", "--run", str(path)]) == 0
    return path


@pytest.fixture(scope="module")
def sine_run(tmp_path_factory):
    """A run on sinusoids, barely trained."""
    path = tmp_path_factory.mktemp("sines") / "run"
    assert main([*SINE, "--run", str(path)]) == 0
    return path


@pytest.mark.parametrize(
    "words",
    [[], ["train"], ["evaluate"], ["compare"], ["predict"], ["recipes"],
     ["recipes", "list"], ["recipes", "show"], ["recipes", "run"]],
)  # fmt: skip
def test_every_help_has_an_example(words, capsys):
    assert main([*words, "--help"]) == 0
    text = capsys.readouterr().out
    assert "For example:" in text
    assert f"adaptax {' '.join(words)}".strip() in text.split("For example:")[1]


def test_train_writes_a_run_and_prints_where(sine_run):
    names = {path.name for path in sine_run.iterdir()}
    assert {"config.json", "metrics.jsonl", "checkpoint.safetensors", "test.json",
            "learning_curve.png", "adaptation.png"} <= names  # fmt: skip
    assert any(name.startswith("events.") for name in names)
    config, result = (json.loads((sine_run / n).read_text()) for n in ("config.json", "test.json"))
    assert config["experiment"]["steps"] == 20
    assert result["protocol"]["shot"] == 5
    assert result["training"]["steps"] == 20
    assert result["versions"]["jax"] == jax.__version__


def test_a_second_run_gets_a_folder_of_its_own(here, capsys):
    (here / "runs" / "maml-sinusoid").mkdir(parents=True)
    assert main(SINE) == 0
    shown = capsys.readouterr()
    assert "runs/maml-sinusoid-2" in shown.out
    assert "mse" in shown.out
    assert shown.err == ""  # no terminal, no progress
    assert (here / "runs" / "maml-sinusoid-2" / "test.json").exists()


def test_interrupted_and_resumed_is_uninterrupted(here, capsys, monkeypatch):
    words = ["train", "maml", "sinusoid", "--steps", "600", "--episodes", "6", "--set",
             "network.mlp=[8]"]  # fmt: skip
    plain = Watcher.__call__

    def press(self, record):
        plain(self, record)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Watcher, "__call__", press)
    assert main([*words, "--run", "run"]) == 130
    assert "adaptax train --resume run" in capsys.readouterr().err
    assert not (here / "run" / "test.json").exists()
    monkeypatch.setattr(Watcher, "__call__", plain)
    assert main(["train", "--resume", "run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["training"]["steps"] == 600
    config = json.loads((here / "run" / "config.json").read_text())
    experiment = Experiment.from_json(config["experiment"])
    whole = experiment.train(experiment.splits()).last
    with safe_open(here / "run" / "checkpoint.safetensors", "numpy") as parts:
        np.testing.assert_array_equal(parts.get_tensor("meta/head/weight"), whole.head.weight)


def test_minutes_stop_a_run_in_time_and_it_goes_on(here, capsys):
    words = ["train", "maml", "sinusoid", "--steps", "600", "--episodes", "6", "--set",
             "network.mlp=[8]", "--run", "run", "--minutes", "0"]  # fmt: skip
    assert main(words) == 75
    said = capsys.readouterr().err
    assert said.startswith("adaptax: out of time, and saved in run; go on with: adaptax train")
    assert "--resume run --minutes 0 (meta-step 500 of 600)" in said
    assert not (here / "run" / "test.json").exists()
    assert main(["train", "--resume", "run", "--minutes", "9", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["training"]["steps"] == 600


def test_what_is_not_to_be_trained_is_left_alone(here, capsys):
    assert main([*SINE, "--train-only", "head", "--run", "run"]) == 0
    with safe_open(here / "run" / "checkpoint.safetensors", framework="numpy") as file:
        held = [name for name in file.keys() if not name.startswith("best_")]  # noqa: SIM118
    assert any("head" in name for name in held)
    assert not any("layers" in name for name in held)
    assert main(["evaluate", "run", "--episodes", "4"]) == 0
    assert main(["train", "ridge", "fsmol", "--train-only", "head"]) == 2
    assert "trains no network; leave out --train-only" in capsys.readouterr().err


def test_ctrl_c_in_a_process(here):
    command = "import sys; from adaptax.cli import main; sys.exit(main(sys.argv[1:]))"
    words = ["train", "maml", "sinusoid", "--steps", "10000000", "--run", "long"]
    process = subprocess.Popen(
        [sys.executable, "-c", command, *words], stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while not (here / "long" / "checkpoint.safetensors").exists():
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "adaptax train --resume long" in err
    assert "Traceback" not in err


def test_a_run_is_extended(sine_run, here, capsys):
    shutil.copytree(sine_run, here / "run")
    assert main(["train", "--resume", "run", "--steps", "40"]) == 0
    shown = capsys.readouterr()
    assert "extended from 20 to 40 meta-steps" in shown.err
    assert json.loads((here / "run" / "test.json").read_text())["training"]["steps"] == 40
    config = json.loads((here / "run" / "config.json").read_text())
    assert (config["experiment"]["steps"], config["extended_from"]) == (40, 20)
    assert main(["train", "--resume", "run", "--steps", "20"]) == 2
    assert "would be fewer" in sentence(capsys)
    assert main(["train", "--resume", "run", "--json"]) == 0  # goes on, with nothing to do
    assert json.loads(capsys.readouterr().out)["training"]["steps"] == 40


def test_a_run_whose_data_lie_elsewhere(here, capsys):
    for c in range(10):
        for i in range(3):
            path = here / "mine" / f"c{c}" / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((8, 8), 20 * c + i, np.uint8)).save(path)
    words = ["train", "maml", "folder", "--path", "mine", "--way", "2", "--query", "2", "--steps",
             "2", "--episodes", "4", "--set", "task.splits=[0.4,0.3,0.3]", "--set",
             "task.image_size=8", "--set", "task.channels=1", "--set", "network.mlp=[4]", "--set",
             "network.in_size=64", "--run", "run"]  # fmt: skip
    assert main(words) == 0
    (here / "mine").rename(here / "moved")
    (here / "run").rename(here / "there")
    capsys.readouterr()
    assert main(["evaluate", "there"]) == 2
    assert "mine" in sentence(capsys)
    assert main(["evaluate", "there", "--path", "moved", "--json"]) == 0
    again = json.loads(capsys.readouterr().out)["result"]
    assert again == json.loads((here / "there" / "test.json").read_text())["result"]
    assert adaptax.load_run("there", path="moved").tasks.test.sample(jax.random.key(0))
    assert main(["train", "--resume", "there", "--path", "moved", "--steps", "4"]) == 0
    capsys.readouterr()
    for c in range(10):
        other = np.full((8, 8), 210 + c, np.uint8)
        Image.fromarray(other).save(here / "moved" / f"c{c}" / "0.png")
    assert main(["train", "--resume", "there", "--steps", "6"]) == 2
    assert "cannot be resumed with other settings: tasks" in capsys.readouterr().err


def test_several_seeds_and_a_recipe_of_ones_own(here, capsys):
    assert main(["recipes", "show", "maml-sinusoid-glorot", "--toml"]) == 0
    text = capsys.readouterr().out
    (here / "my.toml").write_text(text.replace("steps = 70000", "steps = 4"))
    assert book.read_file(here / "my.toml").experiment == changed(
        RECIPES["maml-sinusoid-glorot"].experiment, {"steps": 4}
    )
    words = ["recipes", "run", "my.toml", "--set", "network.mlp=[4]", "--set",
             "evaluation.episodes=4", "--seeds", "2", "--run", "both"]  # fmt: skip
    assert main([*words, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["seeds"] == [0, 1]
    each = [json.loads((here / "both" / f"seed{i}" / "test.json").read_text()) for i in (0, 1)]
    scores = [one["result"]["mse"] for one in each]
    found = result["scores"]["test"]["mse"]
    assert found["each"] == scores
    expected = [np.mean(scores), np.std(scores, ddof=1)]
    np.testing.assert_allclose([found["mean"], found["std"]], expected)
    assert [one["experiment"]["network"] for one in each] == [{"mlp": [4]}] * 2
    assert main(words) == 0  # goes on, with nothing to do
    assert "standard deviation" in capsys.readouterr().out
    assert json.loads((here / "both" / "seeds.json").read_text())["seeds"] == [0, 1]
    (here / "my.toml").write_text(text.replace("inner_lr", "iner_lr"))
    assert main(["recipes", "run", "my.toml"]) == 2
    assert "did you mean inner_lr" in sentence(capsys)
    (here / "my.toml").write_text('like = "maml-sinusoid-gloro"')
    assert main(["recipes", "run", "my.toml"]) == 2
    assert "did you mean maml-sinusoid-glorot" in sentence(capsys)


def test_all_that_can_be_trained_is_in_its_help(capsys):
    assert main(["train", "--help"]) == 0
    text = capsys.readouterr().out.split("For example:")[0]
    assert all(name in text for name in (*LEARNERS, *FAMILIES))


def test_resume_refuses_other_settings(sine_run, capsys):
    assert main(["train", "--resume", str(sine_run), "--shot", "40"]) == 2
    assert "--shot" in capsys.readouterr().err
    assert main(["train", "reptile", "sinusoid", "--resume", str(sine_run)]) == 2
    assert "maml on sinusoid" in capsys.readouterr().err


def test_evaluate(sine_run, capsys):
    words = ["evaluate", str(sine_run), "--episodes", "5", "--steps", "3", "--json"]
    assert main([*words, "--split", "val", "--no-transductive"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["protocol"]["episodes"] == 5
    assert result["protocol"]["split"] == "val"
    assert result["protocol"]["transductive"] is False
    assert [row["step"] for row in result["curve"]] == [0, 1, 2, 3]


def test_evaluate_scores_what_training_scored(sine_run, capsys):
    assert main(["evaluate", str(sine_run), "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["result"] == json.loads((sine_run / "test.json").read_text())["result"]


def test_images_are_scored_both_ways_for_reptile(image_run):
    result = json.loads((image_run / "test.json").read_text())
    assert result["protocol"]["transductive"] is True
    assert result["non_transductive"]["protocol"]["transductive"] is False
    assert (image_run / "episode.png").stat().st_size > 1000


def write_images(folder, episode):
    """The support and queries of an episode as image files."""
    for part in ("support", "query"):
        batch = getattr(episode, part)
        for i, (x, y) in enumerate(zip(np.asarray(batch.x), np.asarray(batch.y))):
            path = folder / part / f"c{y}" / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.uint8(np.round(255 * x[..., 0]))).save(path)


def test_predict(image_run, here, capsys):
    episode = glyphs(3, 2, 2).test.sample(jax.random.key(0))
    write_images(here, episode)
    words = ["predict", str(image_run), "--support", "support", "--query", "query"]
    assert main([*words, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["classes"] == ["c0", "c1", "c2"]
    assert [row["file"] for row in result["predictions"]][:2] == ["c0/0.png", "c0/1.png"]
    run = adaptax.load_run(image_run)
    experiment, meta = run.experiment, run.meta
    learner = experiment.build_learner()
    logits = adaptax.predict(learner, meta, episode.support, episode.query.x, transductive=False)
    expected = jax.nn.softmax(logits)
    for row, p in zip(result["predictions"], expected):
        assert sum(row["probabilities"].values()) == pytest.approx(1, abs=1e-5)
        np.testing.assert_allclose(list(row["probabilities"].values()), p, rtol=1e-4, atol=1e-6)


def test_predict_prints_a_table(image_run, here, capsys):
    write_images(here, glyphs(3, 1, 1).test.sample(jax.random.key(0)))
    words = ["predict", str(image_run), "--support", "support", "--query", "query"]
    assert main([*words, "--transductive", "--steps", "2"]) == 0
    assert "c0/0.png" in capsys.readouterr().out


def test_images_are_prepared_as_in_training(here):
    experiment = book.closest("maml", "omniglot")
    form = image_format(experiment)
    assert (form.size, form.channels, form.resample, form.design.invert) == (28, 1, "nearest", True)
    assert not image_format(experiment, invert=True).design.invert
    grey = changed(experiment, {"task": {"resample": "lanczos"}})
    assert image_format(grey).resample == "lanczos"
    for algorithm in ("reptile", "maml++"):
        form = image_format(book.closest(algorithm, "omniglot"))
        assert (form.resample, form.design.invert) == ("nearest", False)
        form = image_format(book.closest(algorithm, "mini_imagenet"))
        assert (form.size, form.channels, form.resample) == (84, 3, "nearest")
        assert (form.design.mean is not None) == (algorithm == "maml++")
    Image.fromarray(np.full((50, 30), 255, np.uint8)).save(here / "white.png")
    data = (here / "white.png").read_bytes()
    form = image_format(experiment)
    pixels = images.decode(data, "white.png", size=form.size, channels=form.channels)
    assert float(form.design.inputs(jax.numpy.asarray(pixels)).max()) == 0.0


def test_compare_trains_tests_and_goes_on(here, capsys, monkeypatch):
    words = ["compare", "sinusoid", "--algorithms", "maml", "pretrained", "--steps", "10",
             "--episodes", "5", "--out", "both"]  # fmt: skip

    def press(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(comparison, "_report", press)
    assert main(words) == 130
    assert f"adaptax {' '.join(words)}" in capsys.readouterr().err
    monkeypatch.undo()
    monkeypatch.chdir(here)
    before = (here / "both" / "maml" / "metrics.jsonl").read_text()
    assert main(words) == 0
    text = capsys.readouterr().out
    assert "0.67 / 0.38 / 0.35" in text
    assert "Pretrained" in text
    both = here / "both"
    assert (both / "maml" / "metrics.jsonl").read_text() == before  # not trained again
    assert {path.name for path in both.iterdir()} == {
        "comparison.json", "comparison.png", "adaptation.png", "table.csv", "table.tex", "maml",
        "pretrained",
    }  # fmt: skip
    result = json.loads((both / "comparison.json").read_text())
    assert [one["algorithm"] for one in result["algorithms"]] == ["maml", "pretrained"]
    assert list(result["algorithms"][0]["scores"]) == ["0 steps", "1 step", "5 steps", "10 steps"]
    tuned = json.loads((both / "pretrained" / "config.json").read_text())["tuned"]
    assert tuned["learner"]["inner_lr"] in tuned["tune"]
    assert result["algorithms"][0]["difference"] == {"mean": 0, "ci95": 0}
    assert "− MAML" in text
    study = adaptax.studies.compare(
        "sinusoid", ["maml", "pretrained"], steps=10, episodes=5, out="both"
    )
    assert study.to_json()["algorithms"] == result["algorithms"]
    assert set(study.reports) == {"MAML", "Pretrained"}
    gap = study.reports["Pretrained"].difference(study.reports["MAML"])[0]
    assert np.isclose(result["algorithms"][1]["difference"]["mean"], gap)
    assert "0.67 / 0.38 / 0.35" in str(study)
    study.save(here / "copy", format="svg")
    assert {"comparison.json", "table.csv", "comparison.svg"} <= {
        path.name for path in (here / "copy").iterdir()
    }
    words[words.index("10")] = "12"
    assert main(words) == 2
    assert "--out" in capsys.readouterr().err


TINY_CURVES = {"network": {"mlp": [8]}, "steps": 4, "meta_batch": 2}


def test_compare_where_uncertainty_counts(here, capsys, monkeypatch):
    family = book.BOOK["family"]["sinusoid_or_line"]
    platipus = {"init_from": "maml", "steps": 4, "learner": {"samples": 3, "inner_steps": 1}}
    monkeypatch.setitem(family, "short", TINY_CURVES)
    monkeypatch.setitem(family, "platipus", platipus)
    words = ["compare", "ambiguous", "--algorithms", "maml", "platipus", "--episodes", "5",
             "--out", "both"]  # fmt: skip
    assert main(words) == 0
    text = capsys.readouterr().out
    assert all(word in text for word in ("MAML + noise", "PLATIPUS", "NLL", "in 90 %"))
    result = json.loads((here / "both" / "comparison.json").read_text())
    names = [row["name"] for row in result["rows"]]
    assert names == ["MAML", "MAML + noise", "PLATIPUS"]
    for row in result["rows"]:
        waves, lines = row["families"]["waves"], row["families"]["lines"]
        assert waves["episodes"] + lines["episodes"] == 5
        both = sum(one["mse"] * one["episodes"] for one in (waves, lines)) / 5
        assert np.isclose(both, row["scores"]["result"]["mse"], rtol=1e-5)
    single, noisy, _ = (row["scores"]["protocol"] for row in result["rows"])
    assert (single["model"], noisy["model"]) == ("single", "ensemble of 10")
    assert single["nll_noise"] == noisy["nll_noise"] == 0.3
    assert {path.name for path in (here / "both").iterdir()} == {
        "comparison.json", "calibration.png", "functions.png", "table.csv", "table.tex", "maml",
        "platipus",
    }  # fmt: skip
    # PLATIPUS started from the MAML of the comparison, which was not trained twice.
    start = here / "both" / "platipus" / "init" / "checkpoint.safetensors"
    assert start.read_bytes() == (here / "both" / "maml" / "checkpoint.safetensors").read_bytes()
    assert main([*words, "--json"]) == 0  # goes on, with nothing to do
    again = json.loads(capsys.readouterr().out)
    assert again["rows"][2]["scores"] == result["rows"][2]["scores"]


def test_a_run_starts_from_another(sine_run, here, capsys):
    words = ["train", "platipus", "sinusoid", "--init-from", str(sine_run), "--steps", "2",
             "--episodes", "4", "--set", "network.mlp=[8]", "--run", "warm"]  # fmt: skip
    assert main([*words, "--set", "learner.samples=2", "--set", "learner.kl_weight=0"]) == 0
    capsys.readouterr()
    of_maml, of_platipus = adaptax.load_run(sine_run).meta, adaptax.load_run("warm").meta
    moved = np.abs(np.asarray(of_platipus["mean"].head.weight - of_maml.head.weight))
    assert moved.max() < 0.01  # two steps of Adam, 1e-3, from there
    assert main(words) == 2
    assert "already" in capsys.readouterr().err
    words[-1] = "other"
    assert main([*words[:4], "nowhere", *words[5:]]) == 2
    assert "no run" in capsys.readouterr().err
    assert not (here / "other").exists()


TINY_RUN = ["train", "maml", "sinusoid", "--steps", "4", "--episodes", "4", "--set",
            "network.mlp=[8]", "--json"]  # fmt: skip


def test_a_run_killed_before_its_first_checkpoint_goes_on(here, capsys):
    words = [*TINY_RUN, "--run", "killed"]
    assert main(words) == 0
    run, result = Run("killed"), json.loads(capsys.readouterr().out)
    whole = run.checkpoint_file.read_bytes()
    for again in (words, ["train", "--resume", "killed", "--json"]):
        run.checkpoint_file.unlink()
        run.metrics_file.write_text("")
        assert main(again) == 0
        assert json.loads(capsys.readouterr().out)["result"] == result["result"]
        assert run.checkpoint_file.read_bytes() == whole
    run.metrics_file.unlink()  # a finished run without metrics
    for again in (words, ["train", "--resume", "killed"], ["evaluate", "killed"]):
        assert main(again) == 0


def test_a_run_killed_while_its_start_is_copied_goes_on(sine_run, here, capsys):
    words = ["train", "platipus", "sinusoid", "--init-from", str(sine_run), "--steps", "2",
             "--episodes", "4", "--set", "network.mlp=[8]", "--run", "copied"]  # fmt: skip
    assert main(words) == 0
    whole = (here / "copied" / "checkpoint.safetensors").read_bytes()
    for again in (words, ["train", "--resume", "copied"]):
        (here / "copied" / "checkpoint.safetensors").unlink()
        (here / "copied" / "init" / "checkpoint.safetensors").unlink()
        (here / "copied" / ".init.copy").mkdir()
        assert main(again) == 0
        assert (here / "copied" / "checkpoint.safetensors").read_bytes() == whole
        assert not (here / "copied" / ".init.copy").exists()


def test_a_second_process_is_refused(here, capsys):
    with Run("busy"):
        assert main([*TINY_RUN, "--run", "busy"]) == 2
    assert f"another process works on busy (process {os.getpid()} on" in capsys.readouterr().err
    assert main([*TINY_RUN, "--run", "busy"]) == 0


def test_a_run_goes_on_with_the_devices_it_began_with(sine_run, monkeypatch):
    monkeypatch.delenv("XLA_FLAGS")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2})
    for words, count in ((["train", "--resume", str(sine_run)], jax.local_device_count()),
                         (["train", f"--run={sine_run}"], jax.local_device_count()),
                         (["train", "--run", "nowhere"], 3)):  # fmt: skip
        _share_cores(words)
        assert os.environ.pop("XLA_FLAGS") == f"--xla_force_host_platform_device_count={count}"


def test_analyze_active(sine_run, here, capsys):
    words = ["analyze", "active", str(sine_run), "--labels", "2", "--pool", "4", "--episodes", "3",
             "--out", "game"]  # fmt: skip
    assert main(words) == 0
    assert "entropy" in capsys.readouterr().out
    result = json.loads((here / "game" / "active.json").read_text())
    assert [row["labels"] for row in result["learners"][0]["curve"]] == [1, 2, 3]
    assert (here / "game" / "active.png").exists()
    assert main([*words, "--labels", "9"]) == 2
    assert "pool" in capsys.readouterr().err
    more = ["--split", "val", "--query", "7", "--labels", "1", "--strategies", "random",
            "disagreement", "--set", "learner.eval_steps=3"]  # fmt: skip
    assert main([*words, *more]) == 0
    assert "gain of disagreement" in " ".join(capsys.readouterr().out.split())
    protocol = json.loads((here / "game" / "active.json").read_text())["learners"][0]["protocol"]
    assert (protocol["split"], protocol["query"], protocol["eval_steps"]) == ("val", 7, 3)


def test_ablate_trains_tests_and_goes_on(here, capsys, monkeypatch):
    tiny = {"conv4": "maml++ omniglot", "filters": 2, "down": "stride", "head": "mean"}
    ablated = ablation.ablated
    monkeypatch.setattr(
        ablation, "ablated",
        lambda *row: dataclasses.replace(ablated(*row), network=tiny),
    )  # fmt: skip
    words = ["ablate", "glyphs", "--rows", "maml", "learned-rates", "--way", "3", "--steps", "2",
             "--meta-batch", "1", "--episodes", "4", "--out", "abl"]  # fmt: skip
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert "+ learned rates" in shown
    assert "ensemble of the best 3" in shown
    result = json.loads((here / "abl" / "ablation.json").read_text())
    assert [row["name"] for row in result["rows"]] == ["MAML", "+ learned rates"]
    assert {row["single"]["protocol"]["episodes"] for row in result["rows"]} == {4}
    assert result["rows"][1]["single"]["protocol"]["parts"] == "learned rates"
    assert (here / "abl" / "ablation.png").stat().st_size > 1000
    trained = (here / "abl" / "maml" / "checkpoint.safetensors").stat().st_mtime_ns
    assert main([*words, "--json"]) == 0  # nothing is trained anew
    again = json.loads(capsys.readouterr().out)
    assert again["rows"][0]["single"] == result["rows"][0]["single"]
    assert (here / "abl" / "maml" / "checkpoint.safetensors").stat().st_mtime_ns == trained


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["ablate", "sinusoid"], "of image classification"),
        (["ablate", "glyphs", "--rows", "momentum"], "no row of the ablation"),
    ],
)
def test_ablate_says_what_is_wrong(words, said, capsys, here):
    assert main(words) == 2
    assert said in capsys.readouterr().err
    assert not list(here.iterdir())


def test_an_ensemble_is_scored_beside_the_single_model(here, capsys):
    words = ["--steps", "1000", "--validate-every", "500", "--keep", "2", "--run", "kept"]
    assert main([*SINE, *words]) == 0
    result = json.loads((here / "kept" / "test.json").read_text())
    assert result["protocol"]["model"] == "single"
    assert result["ensemble"]["protocol"]["model"] == "ensemble of 2"
    capsys.readouterr()
    assert main(["evaluate", "kept", "--ensemble", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["result"] == result["ensemble"]["result"]


def test_the_untrained_network_is_scored_on_the_same_episodes(sine_run, capsys):
    before, after = [], []
    for words, curve in ((["--untrained"], before), ([], after)):
        assert main(["evaluate", str(sine_run), "--json", *words]) == 0
        result = json.loads(capsys.readouterr().out)
        curve += [row["mse"] for row in result["curve"]]
    assert result["meta_step"] == 20
    experiment = adaptax.load_run(sine_run).experiment
    splits = experiment.splits(test=True)
    direct = experiment.test(experiment.model(), splits)
    np.testing.assert_allclose(before, [direct.mean("mse", i) for i in range(len(before))])
    assert before != after
    assert main(["evaluate", str(sine_run), "--untrained", "--ensemble"]) == 2


def test_one_checkpoint_is_no_ensemble(sine_run, capsys):
    assert main(["evaluate", str(sine_run), "--ensemble"]) == 2
    assert "kept one checkpoint" in capsys.readouterr().err


def test_recipes_list_and_show(capsys):
    assert main(["recipes", "list", "--json"]) == 0
    assert [one["name"] for one in json.loads(capsys.readouterr().out)] == list(RECIPES)
    assert main(["recipes", "list"]) == 0
    assert "98.7 ± 0.4 %" in capsys.readouterr().out
    assert main(["recipes", "show", "maml-omniglot-5w1s"]) == 0
    text = capsys.readouterr().out
    assert '"inner_lr": 2.0' in text
    assert "RECIPES[" in text
    assert main(["recipes", "show", "maml-omniglot-5w1s-short"]) == 0
    printed = capsys.readouterr().out
    assert "60,000" in printed
    assert "stride 2" not in printed  # the authors'
    assert main(["recipes", "show", "maml-omniglot-5w1s-short", "--json"]) == 0
    rows = {row["setting"]: row for row in json.loads(capsys.readouterr().out)["settings"]}
    assert rows["meta-steps"]["here"] == "12,000"
    assert rows["how a block halves the image"]["same"]
    assert main(["recipes", "show", "platipus-mini_imagenet-5w1s-short"]) == 0
    text = capsys.readouterr().out
    assert "first = start.train(" in text
    assert "init_from=first.meta" in text


def test_recipes_run(image_run, capsys, monkeypatch):
    result = json.loads((image_run / "test.json").read_text())
    assert result["recipe"] == "tiny"
    assert result["paper"] == TINY.paper
    assert result["hardware"]["backend"] == jax.default_backend()
    assert result["training"]["steps"] == 2
    monkeypatch.setitem(RECIPES, "tiny", TINY)
    again = ["recipes", "run", "tiny", "--run", str(image_run), "--json"]
    assert main(again) == 0  # goes on, with nothing to do
    assert json.loads(capsys.readouterr().out)["result"] == result["result"]
    assert main([*again, "--seed", "9"]) == 2
    said = "already holds a run, with other settings (experiment['seed'] was"
    assert said in " ".join(capsys.readouterr().err.split())


def sentence(capsys):
    """What was said on stderr, which is one line."""
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.count("\n") == 1
    assert shown.err.startswith("adaptax: error: ")
    return shown.err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "name a command of `adaptax`: train, "),
        (["recipes"], "name a command of `adaptax recipes`: list, "),
        (["trian"], "did you mean train?"),
        (["recipes", "lst"], "did you mean list?"),
        (["recipes", "show"], "`adaptax recipes show` wants NAME"),
        (["evaluate"], "`adaptax evaluate` wants RUN"),
        (["evaluate", "a", "b"], "'b' is a word too many"),
        (["predict", "run"], "--support (folder"),
        (["train", "sgd", "sinusoid"], "ALGORITHM: 'sgd' is not one of maml, "),
        (["train", "maml", "sinusoids"], "did you mean sinusoid?"),
        (["train", "maml", "sinusoid", "--stps", "1"], "did you mean --steps?"),
        (["train", "maml", "sinusoid", "--bogus", "1"], "--bogus is no option"),
        (["train", "maml", "sinusoid", "--way"], "--way wants INT"),
        (["train", "maml", "sinusoid", "--way", "x"], "--way: 'x' is not a whole number"),
        (["train", "maml", "sinusoid", "--episodes", "-5"], "--episodes: '-5' is not"),
        (["train", "maml", "sinusoid", "--inner-lr", "-1"], "--inner-lr: '-1' is not"),
        (["train", "maml", "sinusoid", "--inner-lr", "nan"], "--inner-lr: 'nan' is not"),
        (["train", "maml", "sinusoid", "--seed", "9" * 20], "--seed: "),
        (["train", "maml", "sinusoid", "--steps", "2147483648"], "--steps: "),
        (["train", "maml", "sinusoid", "--mapping", "0"], "--mapping: '0' is not auto, scan"),
        (["evaluate", "run", "--split", "train"], "--split 'train' is not one of test, val"),
        (["analyze", "gradients", "--inner-steps", "2", "x"], "--inner-steps: "),
        (["--tyro-print-completion", "fsh"], "Shell"),
        (["evaluate", "a[/b]"], "a[/b] holds no run"),
        (["evaluate", "a\x1b[31m\udcff\n"], "a\\x1b[31m\\udcff holds no run"),
        (["train"], "name an algorithm"),
        (["train", "maml", "sinusoid", "--way", "3"], "no ways"),
        (["train", "maml", "omniglot", "--data-root", "nowhere"], "nowhere"),
        (["train", "maml", "mini_imagenet", "--data-root", "."], "no miniImageNet"),
        (["train", "maml", "folder"], "--path"),
        (["train", "maml", "folder", "--path", "nowhere"], "nowhere"),
        (["train", "maml", "glyphs", "--path", "."], "--data-root"),
        (["train", "maml", "folder", "--path", "~nobody-here/x"], "home directory"),
        (["train", "maml", "glyphs", "--way", "5000"], "way=5000"),
        (["train", "maml", "glyphs", "--query", "20"], "shot + query"),
        (["train", "maml", "sinusoid", "--steps", "0"], "steps"),
        (["train", "maml", "sinusoid", "--meta-batch", "0"], "--meta-batch: '0' is not"),
        (["train", "maml", "sinusoid", "--set", "rate=1"], "section.name=value"),
        (["train", "maml", "sinusoid", "--set", "learner.rate=1"], "rate"),
        (["train", "maml", "sinusoid", "--set", "network.depth=1"], "depth"),
        (["train", "maml", "sinusoid", "--set", "task.noise=1"], "noise"),
        (["train", "reptile", "sinusoid", "--first-order"], "--first-order"),
        (["train", "--resume", "nowhere"], "no run"),
        (["evaluate", "nowhere"], "no run"),
        (["predict", "nowhere", "--support", ".", "--query", "."], "no run"),
        (["train", "maml", "sinusoid", "--run", ""], "--run: '' is not a path"),
        (["embed", "--archive", "leo.zip", "--out", " "], "--out: ' ' is not a path"),
        (["compare", "sinusoid", "--algorithms", "sgd"], "'sgd'"),
        (["compare", "sinusoid", "--way", "5"], "--way"),
        (["compare", "sinusoid", "--seeds", "0"], "--seeds"),
        (["compare", "ambiguous", "--way", "5"], "--way"),
        (["compare", "circles", "--algorithms", "ridge"], "not for classes"),
        (["train", "maml", "circles", "--way", "3"], "two ways"),
        (["train", "ridge", "fsmol", "--inner-lr", "1"], "no inner steps"),
        (
            ["train", "bmaml", "sinusoid", "--set", "learner.loss=huber"],
            "learner.loss 'huber': there are ",
        ),
        (["compare", "omniglot", "--data-root", "nowhere"], "nowhere"),
        (["recipes", "show", "maml-omniglot"], "maml-omniglot-"),
        (["recipes", "run", "nothing-like-it"], "recipes list"),
    ],
)
def test_errors_are_a_sentence_and_leave_nothing(words, said, capsys, here):
    assert main(words) == 2
    assert said in sentence(capsys)
    assert list(here.iterdir()) == []


def test_broken_data(capsys, here):
    (here / "data").mkdir()
    (here / "data" / "images_background.zip").write_bytes(b"PK broken")
    (here / "data" / "images_evaluation.zip").write_bytes(b"PK broken")
    assert main(["train", "maml", "omniglot", "--data-root", "data"]) == 2
    assert "not a readable zip archive" in sentence(capsys)
    assert not (here / "runs").exists()


def test_broken_runs(sine_run, capsys, here):
    checkpoint = (sine_run / "checkpoint.safetensors").read_bytes()
    config = json.loads((sine_run / "config.json").read_text())
    run = here / "run"
    run.mkdir()

    def said(config, checkpoint):
        (run / "config.json").write_text(config)
        (run / "checkpoint.safetensors").write_bytes(checkpoint)
        assert main(["evaluate", "run"]) == 2
        return sentence(capsys)

    assert "truncated" in said(json.dumps(config), checkpoint[: len(checkpoint) // 2])
    assert "not valid JSON" in said("{", checkpoint)
    assert "not written by" in said("{}", checkpoint)
    config["experiment"]["network"]["mlp"] = [9]
    assert "another model" in said(json.dumps(config), checkpoint)


def test_divergence(capsys, here):
    assert main([*SINE, "--outer-lr", "1e30", "--run", "bad"]) == 2
    assert "not finite" in sentence(capsys)
    assert (here / "bad" / "checkpoint.safetensors").exists()


def test_predict_says_what_is_wrong(image_run, sine_run, capsys, here):
    words = ["--support", "support", "--query", "query"]
    assert main(["predict", str(sine_run), *words]) == 2
    assert "images" in sentence(capsys)
    assert main(["predict", str(image_run), *words]) == 2
    assert "support is not a folder" in sentence(capsys)
    write_images(here, glyphs(2, 1, 1).test.sample(jax.random.key(0)))
    (here / "support" / "c2").mkdir()
    assert main(["predict", str(image_run), *words]) == 2
    assert "no images" in sentence(capsys)
    (here / "support" / "c2" / "0.png").write_bytes(b"not an image")
    assert main(["predict", str(image_run), *words]) == 2
    assert "cannot be read as an image" in sentence(capsys)


def test_debug_raises(monkeypatch):
    monkeypatch.setenv("ADAPTAX_DEBUG", "1")
    with pytest.raises(ValueError, match="no recipe"):
        main(["recipes", "show", "nothing"])


def test_cores_become_devices_unless_the_user_says(monkeypatch):
    flag = "--xla_force_host_platform_device_count"
    monkeypatch.setenv("XLA_FLAGS", "--other=1")
    main(["--help"])
    assert os.environ["XLA_FLAGS"].startswith(f"--other=1 {flag}=")
    monkeypatch.setenv("XLA_FLAGS", f"{flag}=3")
    main(["--help"])
    assert os.environ["XLA_FLAGS"] == f"{flag}=3"


def test_progress_on_a_terminal():
    console = Console(force_terminal=True, width=160, record=True, file=io.StringIO())
    with watching("MAML", 100, console) as watch:
        watch({"step": 50, "loss": 1.25, "seconds": 2.0})
        watch({"step": 60, "loss": 0.5, "seconds": 1.0, "validation": {"mse": 0.25}})
    text = console.export_text()
    for part in ("MAML", "60/100", "loss 0.5", "val mse 0.250", "10 steps/s", "0:04 left"):
        assert part in text


def test_any_number_of_ways_and_where_its_settings_are_from(here, capsys):
    folder = here / "classes"
    for c in range(60):
        for i in range(2):
            path = folder / f"${c}_{{犬$" / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((8, 8), 4 * c + i, np.uint8)).save(path)
    words = ["train", "anil", "folder", "--path", str(folder), "--way", "12", "--shot", "1",
             "--query", "1", "--steps", "2", "--episodes", "4",
             "--splits", "0.4", "0.3", "0.3", "--image-size", "8", "--channels", "1",
             "--min-images", "2", "--format", "svg",
             "--set", "network.mlp=[4]", "--set", "network.in_size=64",
             "--run", "a[/b]"]  # fmt: skip
    assert main(words) == 0
    text = capsys.readouterr().out
    assert 'settings: recipe maml-mini_imagenet-5w1s but for algorithm "anil"' in text
    assert "task.way 12" in text
    assert "run folder: a[/b]" in text
    assert json.loads((here / "a[/b]" / "test.json").read_text())["settings"] in text
    assert (here / "a[/b]" / "learning_curve.svg").exists()
    drawn = (here / "a[/b]" / "episode.svg").read_text()
    assert drawn.count("$") >= 24, "twelve classes by their names"
    query = here / "x[" / "y].png"
    query.parent.mkdir()
    Image.fromarray(np.full((8, 8), 9, np.uint8)).save(query)
    words = ["predict", "a[/b]", "--support", str(folder), "--query", str(query)]
    assert main(words) == 2  # sixty classes, of which the head has twelve
    assert "60" in sentence(capsys)
    for path in sorted(folder.iterdir())[12:]:
        shutil.rmtree(path)
    assert main(words) == 0
    assert "x[/y].png" in capsys.readouterr().out
    assert main(["train", "maml", "sinusoid", "--image-size", "8"]) == 2
    assert "sinusoid tasks have no image_size; leave out --image-size" in sentence(capsys)


def test_what_does_not_suit_the_data_is_told_before_training(here, capsys):
    for setting, said in (
        ("network.in_size=3", "does not take the inputs of sinusoid, of shape (1,)"),
        ("evaluation.noise=0", "noise"),
        ("evaluation.episodes=0", "episodes"),
    ):
        assert main([*SINE, "--set", setting, "--run", "new"]) == 2
        assert said in sentence(capsys)
        assert list(here.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: c.pop("training"), "training is null"),
        (lambda c: c.update(training={"steps": 3}), "training.steps is not a setting"),
        (lambda c: c.update(training={"mapping": 0.5}), "training.mapping"),
        (lambda c: c.update(data_root=3), "data_root is 3"),
        (lambda c: c["experiment"].update(network=None), "network should name"),
        (lambda c: c["experiment"]["outer"].update(sgdd=0.5), "outer.sgdd is not a setting"),
        (lambda c: c["experiment"].update(seed=math.nan), "seed is nan"),
        (lambda c: c.update(tuned=[]), "no JSON object"),
    ],
)
def test_configurations_are_checked_where_they_enter(change, said, sine_run, here, capsys):
    shutil.copytree(sine_run, here / "run")
    config = json.loads((here / "run" / "config.json").read_text())
    change(config)
    (here / "run" / "config.json").write_text(json.dumps(config))
    for words in (["evaluate", "run"], ["train", "--resume", "run"]):
        assert main(words) == 2
        text = sentence(capsys)
        assert "config.json: " in text
        assert said in text


def test_a_configuration_without_a_place_of_data_means_none(sine_run):
    config = Run(sine_run).config()
    del config["data_root"]
    assert runs.experiment_in(config, sine_run).tasks == "sinusoid"
    assert config["data_root"] is None


@pytest.mark.parametrize("content", [b"[" * 5000, b"\xff\xfe", b"9" * 5000, b"[1]"])
def test_configurations_that_are_no_json(content, sine_run, here, capsys):
    shutil.copytree(sine_run, here / "run")
    (here / "run" / "config.json").write_bytes(content)
    assert main(["evaluate", "run"]) == 2
    assert "config.json is not " in sentence(capsys)


def test_predict_takes_files_folders_and_patterns(image_run, here, capsys):
    episode = glyphs(3, 1, 2).test.sample(jax.random.key(0))
    write_images(here, episode)
    (here / "query" / "c0").rename(here / "query" / "[red]c0")
    (here / "x[").mkdir()
    (here / "query" / "[red]c0" / "0.png").rename(here / "x[/y].png")
    words = ["predict", str(image_run), "--support", "support", "--query"]
    assert main([*words, "x[/y].png"]) == 0
    assert "x[/y].png" in capsys.readouterr().out
    asked = ["x[/y].png", "query/c*/[24].png", "query/[[]red]c0"]
    assert main([*words, *asked, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["predictions"]
    files = ["x[/y].png", "query/c1/2.png", "query/c2/4.png", "query/[red]c0/1.png"]
    assert [row["file"] for row in rows] == files
    for row in rows:  # of a single model the entropy is that of its probabilities
        p = np.array(list(row["probabilities"].values()))
        assert row["entropy"] == pytest.approx(float(-(p * np.log(p)).sum()), abs=1e-4)
        assert "epistemic" not in row
    assert main([*words, *asked, "--out", "a/table.csv"]) == 0
    capsys.readouterr()
    with open(here / "a" / "table.csv", encoding="utf-8", newline="") as file:
        table = list(csv.DictReader(file))
    assert list(table[0]) == ["file", "label", "probability", "entropy", "p_c0", "p_c1", "p_c2"]
    assert [row["file"] for row in table] == files
    assert float(table[1]["p_c2"]) == rows[1]["probabilities"]["c2"]
    assert main([*words, *asked, "--out", "table.json"]) == 0
    assert json.loads((here / "table.json").read_text()) == rows
    capsys.readouterr()
    for more, said in (
        (["nowhere*"], "no such file"),
        (["x[/y].png", "--out", "table.xls"], "should end in .csv, .json or .parquet"),
        (["support/c0", "--steps", "-1"], "--steps: '-1' is not"),
    ):
        assert main([*words, *more]) == 2
        assert said in sentence(capsys)


def test_parquet_where_it_can_be_written(image_run, here, capsys):
    write_images(here, glyphs(3, 1, 1).test.sample(jax.random.key(0)))
    words = ["predict", str(image_run), "--support", "support", "--query", "query", "--out",
             "table.parquet"]  # fmt: skip
    if importlib.util.find_spec("pyarrow") is None:
        assert main(words) == 2
        assert "pip install pyarrow" in sentence(capsys)
        return
    import pyarrow.parquet

    assert main(words) == 0
    assert pyarrow.parquet.read_table(here / "table.parquet").num_rows == 3


def test_predict_of_fewer_classes_is_that_of_a_smaller_head(image_run, here, capsys):
    """Left out, an output moves nothing: the same as a network without it."""
    episode = glyphs(2, 2, 2).test.sample(jax.random.key(0))
    write_images(here, episode)
    words = ["predict", str(image_run), "--support", "support", "--query", "query"]
    assert main([*words, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    run = adaptax.load_run(image_run)
    experiment, meta = run.experiment, run.meta
    head = meta.head
    smaller = eqx.tree_at(
        lambda m: (m.head.weight, m.head.bias), meta, (head.weight[:, :2], head.bias[:2])
    )
    assert smaller.head.weight.shape == (4, 2)
    learner = experiment.build_learner()
    logits = adaptax.predict(learner, smaller, episode.support, episode.query.x, transductive=False)
    for row, p in zip(result["predictions"], jax.nn.softmax(logits)):
        np.testing.assert_allclose(list(row["probabilities"].values()), p, rtol=1e-4, atol=1e-6)
    write_images(here, glyphs(4, 1, 1).test.sample(jax.random.key(0)))
    assert main(words) == 2
    assert "3 or fewer" in sentence(capsys)


def test_a_link_to_itself_is_a_sentence(here, capsys):
    (here / "loop").symlink_to("loop")
    assert main(["train", "maml", "folder", "--path", "loop"]) == 2
    assert "fault" not in sentence(capsys)

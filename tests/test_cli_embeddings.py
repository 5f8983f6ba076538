"""The command line on embeddings: LEO and its rivals on a file of features."""

import dataclasses
import io
import json

import numpy as np
import pytest
from rich.console import Console

from adaptax.algorithms import leo_terms
from adaptax.cli import main
from adaptax.cli.progress import watching
from adaptax.recipes import closest
from adaptax.tasks.embeddings import write


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    """Noisy classes on the sphere, six for each split, of width 8."""
    draw = np.random.default_rng(0)

    def split(name):
        labels = np.repeat(np.arange(6), 18)
        x = draw.normal(size=(6, 8))[labels] + 0.3 * draw.normal(size=(108, 8))
        return x.astype(np.float32), labels, [f"{name}{i}" for i in range(6)]

    path = tmp_path_factory.mktemp("features") / "features.safetensors"
    splits = {name: split(name) for name in ("train", "val", "test")}
    write(path, splits, backbone="none", source={})
    return path


def test_train_leo(features, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(leo_terms, "COLLAPSED", 1e9)
    words = ["train", "leo", "embeddings", "--path", str(features), "--way", "3", "--shot", "2",
             "--steps", "4", "--meta-batch", "2", "--episodes", "5",
             "--run", str(tmp_path / "leo")]  # fmt: skip
    assert main([*words, "--json"]) == 0
    printed = capsys.readouterr()
    # Of all the records, the first is warned about.
    assert printed.err.count("warning: step 4: LEO's latent has collapsed: the codes of diff") == 1
    result = json.loads(printed.out)
    assert result["protocol"]["trained_on"] == "train"
    assert [row["step"] for row in result["curve"]] == list(range(11))
    assert result["protocol"]["query"] == 16  # all that remain
    assert result["experiment"]["network"] == {"linear": 8}
    assert result["experiment"]["learner"]["kl_weight"] == 0.756143
    assert main(["evaluate", str(tmp_path / "leo"), "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["result"]["accuracy"] == result["result"]["accuracy"]


def test_compare_on_embeddings(features, tmp_path, capsys):
    words = ["compare", "embeddings", "--path", str(features), "--way", "3", "--steps", "4",
             "--algorithms", "class-mean", "meta-sgd", "--episodes", "5",
             "--out", str(tmp_path / "both")]  # fmt: skip
    assert main(words) == 0
    assert "Nearest class mean" in capsys.readouterr().out
    result = json.loads((tmp_path / "both" / "comparison.json").read_text())
    scores = {one["algorithm"]: one["scores"]["own protocol"] for one in result["algorithms"]}
    assert scores["class-mean"]["mean"] > 0.8  # classes are far apart
    assert set(scores) == {"class-mean", "meta-sgd"}


def test_the_protocol_names_the_classes_that_were_trained_on(features):
    task = {"path": str(features), "way": 3, "shot": 1, "query": 2, "train_and_val": True}
    means = dataclasses.replace(
        closest("class-mean", "embeddings", 3, 1), task=task, network={"linear": 8}
    )
    report = means.test(means.untrained(), means.splits(), episodes=2)
    assert report.protocol["trained_on"] == "train and val"


def test_a_warning_is_printed_when_it_begins():
    console = Console(file=io.StringIO(), width=200)
    wrong = {2: "too low", 3: "too low", 5: "too low"}
    with watching("LEO", 6, console, lambda record: wrong.get(record["step"])) as watch:
        for step in range(1, 7):
            watch({"step": step, "seconds": 1.0, "loss": 1.0})
    assert console.file.getvalue() == "warning: step 2: too low\nwarning: step 5: too low\n"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train", "leo", "embeddings"], "--path"),
        (["train", "leo", "embeddings", "--path", "nowhere"], "adaptax embed"),
        (["train", "leo", "omniglot"], "adaptax embed"),
        (["train", "class-mean", "fsmol"], "class mean"),
        (["train", "leo", "sinusoid", "--first-order"], "--first-order"),
    ],
)
def test_errors_are_a_sentence(words, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith("adaptax: error: ")
    assert said in error
    assert "Traceback" not in error
    assert not list(tmp_path.iterdir())

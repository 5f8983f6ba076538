"""The command line on embeddings: LEO and its rivals on a file of features."""

import json

import numpy as np
import pytest

from adaptax.cli import main
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


def test_train_leo(features, tmp_path, capsys):
    words = ["train", "leo", "embeddings", "--path", str(features), "--way", "3", "--shot", "2",
             "--steps", "4", "--meta-batch", "2", "--episodes", "5",
             "--run", str(tmp_path / "leo")]  # fmt: skip
    assert main([*words, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
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

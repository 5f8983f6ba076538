"""The command line on environments: train, evaluate, compare, and what it refuses."""

import json

import pytest

from adaptax.cli import main
from adaptax.recipes import RETURNS, book
from adaptax.rl import locomotion
from gliders import GLIDER

SMALL = ["--set", "task.trajectories=2", "--set", "task.horizon=5", "--set", "network.policy=[4]",
         "--set", "evaluation.trajectories=2", "--episodes", "3", "--steps", "2",
         "--meta-batch", "2"]  # fmt: skip


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run on navigation, barely trained."""
    path = tmp_path_factory.mktemp("navigation") / "run"
    assert main(["train", "maml", "navigation", *SMALL, "--run", str(path)]) == 0
    return path


def test_train_leaves_returns_and_pictures(run):
    result = json.loads((run / "test.json").read_text())
    assert [row["step"] for row in result["curve"]] == [0, 1, 2, 3]
    assert result["protocol"]["goals"] == 3
    assert result["protocol"]["inner_lr"] == [0.1, 0.05]
    assert {"returns.png", "trajectories.png", "learning_curve.png"} <= {
        path.name for path in run.iterdir()
    }


def test_evaluate_scores_what_training_scored(run, capsys):
    assert main(["evaluate", str(run), "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["curve"] == json.loads((run / "test.json").read_text())["curve"]
    assert main(["evaluate", str(run), "--untrained", "--steps", "1"]) == 0
    text = capsys.readouterr().out
    assert "1 step" in text
    assert "2 steps" not in text


def test_compare_has_baselines_and_the_papers_numbers(here, capsys, monkeypatch):
    tiny = {
        "task": {"trajectories": 2, "horizon": 5}, "network": {"policy": [4]}, "steps": 2,
        "meta_batch": 2, "evaluation": {"goals": 3, "trajectories": 2},
    }  # fmt: skip
    monkeypatch.setitem(book.BOOK["family"]["navigation"], "short", tiny)
    names = ["maml", "bmaml", "pretrained"]
    assert main(["compare", "navigation", "--algorithms", *names, "--out", "both"]) == 0
    text = capsys.readouterr().out
    assert all(word in text for word in ("Random policy", "Oracle", "-40.41 / -11.68"))
    rows = json.loads((here / "both" / "comparison.json").read_text())["rows"]
    assert [row["name"] for row in rows] == [
        "MAML", "BMAML", "Pretrained", "Pretrained, stopped early", "Oracle", "Random policy",
    ]  # fmt: skip
    assert [len(row["curve"]) for row in rows] == [4, 4, 4, 4, 1, 4]
    assert rows[2]["step"] == 2
    assert rows[2]["paper"]
    assert not rows[3]["paper"]
    assert rows[1]["protocol"]["particles"] == 5
    assert rows[1]["experiment"]["outer"] == {"trpo": 0.01, "curvature": 0.25, "each": False}
    assert rows[0]["paper"] == {str(k): v for k, v in RETURNS["navigation"]["MAML"].items()}


def test_policies_of_bmaml_have_a_trust_region_each(here, capsys):
    words = ["train", "bmaml", "navigation", *SMALL, "--set", "learner.particles=2"]
    assert main([*words, "--run", "several"]) == 0
    config = json.loads((here / "several" / "config.json").read_text())["experiment"]
    assert config["outer"] == {"trpo": 0.01, "curvature": 0.25, "each": True}
    result = json.loads((here / "several" / "test.json").read_text())
    assert result["protocol"]["particles"] == 2
    assert result["protocol"]["return"] == "mean over particles"
    assert (here / "several" / "trajectories.png").exists()
    capsys.readouterr()
    assert main(["evaluate", "several", "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["curve"] == result["curve"]


def test_ppo_in_the_place_of_trpo(here):
    words = [
        "train",
        "maml",
        "bandit",
        *SMALL,
        "--set",
        "outer.ppo=0.01",
        "--set",
        "outer.clip=0.3",
    ]
    assert main([*words, "--run", "simple"]) == 0
    last = json.loads((here / "simple" / "metrics.jsonl").read_text().splitlines()[-1])
    assert "return_after" in last
    assert "kl" not in last
    assert main(["evaluate", "simple"]) == 0
    config = json.loads((here / "simple" / "config.json").read_text())
    assert config["experiment"]["outer"] == {"ppo": 0.01, "clip": 0.3}


@pytest.fixture
def glider(monkeypatch):
    """A body whose motion is known, in the place of brax's."""
    monkeypatch.setattr(locomotion, "_made", lambda name, backend: GLIDER)


def test_locomotion_is_trained_resumed_and_drawn(here, glider, capsys, monkeypatch):
    words = ["train", "maml", "half_cheetah", *SMALL, "--run", "run"]
    assert main(words) == 0
    result = json.loads((here / "run" / "test.json").read_text())
    assert result["protocol"]["tasks"] == "Locomotion"
    assert (here / "run" / "frames.png").exists()
    assert main(["train", "--resume", "run"]) == 0
    assert json.loads((here / "run" / "test.json").read_text())["curve"] == result["curve"]
    assert main(["evaluate", "run", "--steps", "1"]) == 0
    tiny = {
        **book.BOOK["family"]["ant"]["short"],
        "task": {"trajectories": 2, "horizon": 3},
        "steps": 1,
        "network": {"policy": [4]},
        "evaluation": {"goals": 2, "trajectories": 2},
    }
    monkeypatch.setitem(book.BOOK["family"]["ant"], "short", tiny)
    assert main(["compare", "ant", "--algorithms", "maml", "--out", "both"]) == 0
    found = json.loads((here / "both" / "comparison.json").read_text())
    assert [row["name"] for row in found["rows"]] == ["MAML", "Random policy"]
    assert [row["paper"] for row in found["rows"]] == [{}, {}]
    assert any(plot.endswith("frames.png") for plot in found["plots"])


def test_locomotion_without_brax(here, capsys, monkeypatch):
    def missing(name, backend):
        raise ModuleNotFoundError("rl.Locomotion needs brax, which is not installed; pip install")

    monkeypatch.setattr(locomotion, "_made", missing)
    for words in (["train", "maml", "ant"], ["compare", "half_cheetah"]):
        assert main(words) == 2
        assert "needs brax" in capsys.readouterr().err
    assert not list(here.iterdir())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train", "platipus", "bandit"], "reinforcement"),
        (["train", "bmaml", "navigation", "--set", "learner.kernel=flat"], "kernel"),
        (["train", "bmaml", "navigation", "--eval-steps", "3"], "eval_steps"),
        (["train", "maml", "navigation", "--set", "outer.each=true"], "BayesianMAML"),
        (["train", "maml", "navigation", "--way", "5"], "--way"),
        (["train", "maml", "navigation", "--outer-lr", "1"], "TRPO"),
        (["train", "maml", "navigation", "--set", "task.horizon=0"], "horizon"),
        (["train", "maml", "navigation", "--set", "task.reward=gold"], "reward"),
        (
            ["train", "maml", "navigation", "--set", "outer.kl=1"],
            "outer.kl is not a setting here; there are trpo",
        ),
        (["compare", "navigation", "--seeds", "2"], "--seeds"),
    ],
)
def test_errors_are_a_sentence_and_leave_nothing(words, said, capsys, here):
    assert main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith("adaptax: error: ")
    assert said in error
    assert "Traceback" not in error
    assert not list(here.iterdir())

"""Sweeps: what is tried, workers that share trials, and kills that lose none."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from adaptax.cli import main
from adaptax.recipes import RECIPES
from adaptax.recipes.book import read_file
from adaptax.recipes.sweep import Domain, domain, score_of, with_values

pytest.importorskip("optuna")

# Few programs: each is compiled once, whatever the number of trials.
OVER = ["--over", "learner.inner_lr=0.01|0.1", "--over", "learner.inner_steps=1|2"]
TINY = [*OVER, "--steps", "20", "--set", "network.mlp=[4]", "--set", "evaluation.episodes=6",
        "--validate-every", "10"]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("learner.inner_lr=0.001..0.5", Domain("learner.inner_lr", 0.001, 0.5)),
        ("learner.inner_steps=1..5", Domain("learner.inner_steps", 1, 5)),
        ("network.mlp=[40]|[8,8]", Domain("network.mlp", choices=("[40]", "[8,8]"))),
        ("meta_batch=2|4", Domain("meta_batch", choices=("2", "4"))),
    ],
)
def test_what_is_tried_is_read(text, found):
    assert domain(text) == found


@pytest.mark.parametrize("text", ["inner_lr=1..2", "learner.inner_lr", "learner.inner_lr=2..1",
                                  "learner.inner_lr=0.1", "learner.x=a..b", "learner.x=0..nan",
                                  "learner.x=1|"])  # fmt: skip
def test_what_says_nothing_is_refused(text):
    with pytest.raises(ValueError, match="is neither section"):
        domain(text)


def test_values_are_those_of_the_experiment():
    values = {"learner.inner_lr": 0.02, "network.mlp": "[8,8]", "meta_batch": "4"}
    found = with_values(RECIPES["maml-sinusoid"].experiment, values)
    assert found.learner["inner_lr"] == 0.02
    assert found.network["mlp"] == [8, 8]
    assert found.meta_batch == 4


def test_more_is_better():
    assert score_of({"validation": {"mse": 2.0, "mse_ci95": 1.0}}) == -2.0
    assert score_of({"validation": {"accuracy": 0.5}}) == 0.5
    assert score_of({"step": 1}) is None


def worker(folder, trials):
    code = "import sys; from adaptax.cli import main; sys.exit(main(sys.argv[1:]))"
    words = ["sweep", "maml-sinusoid", *TINY, "--trials", str(trials), "--out", "out", "--json"]
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    with (folder / "log").open("a") as log:
        return subprocess.Popen([sys.executable, "-c", code, *words], cwd=folder, stderr=log,
                                stdout=subprocess.DEVNULL, env=env)  # fmt: skip


def told(folder):
    """Trial and state of everything that was told, from the storage itself."""
    lines = (folder / "out" / "trials.log").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return [(r["trial_id"], r["state"]) for r in records if r["op_code"] == 6]


def test_a_worker_is_killed_and_no_trial_is_lost_or_done_twice(tmp_path, monkeypatch, capsys):
    first = worker(tmp_path, 20)
    while len(list((tmp_path / "out").glob("trial-*"))) < 3:
        assert first.poll() is None, (tmp_path / "log").read_text()
        time.sleep(0.01)
    first.send_signal(signal.SIGKILL)
    first.wait()
    both = [worker(tmp_path, 20) for _ in range(2)]
    assert [each.wait(300) for each in both] == [0, 0], (tmp_path / "log").read_text()
    monkeypatch.chdir(tmp_path)
    assert main(["sweep", "maml-sinusoid", *TINY, "--trials", "20", "--out", "out", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert sorted(row["trial"] for row in found["trials"]) == list(range(20))
    assert {row["state"] for row in found["trials"]} <= {"complete", "pruned"}
    done = [state for state in told(tmp_path) if state[1] in (1, 2, 3)]
    assert len(done) == len({trial for trial, _ in done}) == 20
    scores = [row["score"] for row in found["trials"] if row["state"] == "complete"]
    assert scores == sorted(scores, reverse=True)
    best = read_file(tmp_path / "out" / "best.toml")
    settings = found["trials"][0]["settings"]
    assert best.experiment.learner["inner_lr"] == float(settings["learner.inner_lr"])
    assert (tmp_path / "out" / "sweep.png").exists()
    assert (tmp_path / "out" / "table.csv").read_text().count("\n") == 21
    # Another question is not answered from the same folder.
    assert main(["sweep", "maml-sinusoid", *TINY, "--seeds", "2", "--out", "out"]) == 2
    assert "holds a sweep of other settings" in capsys.readouterr().err


def test_what_fails_is_told_and_the_others_go_on(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["sweep", "maml-sinusoid", "--over", "learner.inner_lr=1e30|0.01", *TINY[4:]]
    assert main([*words, "--trials", "4", "--out", "out", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["trials"]
    assert len(rows) == 4
    for row in rows:
        bad = row["settings"]["learner.inner_lr"] == "1e30"
        assert (row["state"] == "fail") == bad
        assert ("failed" in row) == bad

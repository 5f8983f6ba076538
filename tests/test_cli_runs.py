"""`adaptax runs`: state, score and settings of the runs below a folder."""

import json

import pytest

from adaptax.cli import main
from adaptax.process import is_locked, lock

WORDS = ["train", "maml", "sinusoid", "--steps", "6", "--meta-batch", "2", "--episodes", "4",
         "--set", "network.mlp=[4]"]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    assert main([*WORDS, "--run", str(folder / "one")]) == 0
    two = ["--inner-lr", "0.02", "--minutes", "0", "--steps", "600", "--run", str(folder / "two")]
    assert main([*WORDS, *two]) == 75
    (folder / "three").mkdir()
    (folder / "three" / "config.json").write_text("{")
    return folder


def listed(folder, capsys):
    capsys.readouterr()
    assert main(["runs", str(folder), "--json"]) == 0
    return {row["run"].rpartition("/")[2]: row for row in json.loads(capsys.readouterr().out)}


def test_state_steps_score_and_settings(folder, capsys):
    rows = listed(folder, capsys)
    assert {name: row["state"] for name, row in rows.items()} == {
        "one": "done", "two": "stopped", "three": "broken",
    }  # fmt: skip
    assert rows["one"]["steps"] == "6 of 6"
    assert rows["two"]["steps"] == "500 of 600"
    result = json.loads((folder / "one" / "test.json").read_text())["result"]
    assert rows["one"]["score"] == result["mse"]
    assert (rows["one"]["split"], rows["two"]["split"]) == ("test", "val")
    assert rows["one"]["about"] == "maml on sinusoid"
    assert rows["two"]["differs in"]["learner.inner_lr"] == 0.02
    assert "meta_batch" in rows["one"]["settings"]


def test_a_run_at_work_is_running(folder, capsys):
    release = lock(folder / "two")
    try:
        assert is_locked(folder / "two")
        assert listed(folder, capsys)["two"]["state"] == "running"
    finally:
        release()
    assert not is_locked(folder / "two")
    assert not (folder / "two" / ".lock").exists()


def test_runs_side_by_side(folder, capsys):
    capsys.readouterr()
    assert main(["runs", str(folder / "one"), str(folder / "two"), "--compare"]) == 0
    shown = capsys.readouterr().out
    assert "learner.inner_lr" in shown
    assert "meta_batch" not in shown  # the same in both
    assert main(["runs", str(folder)]) == 0
    assert "stopped" in capsys.readouterr().out


def test_where_there_is_none(tmp_path, capsys):
    assert main(["runs", str(tmp_path / "x")]) == 2
    assert "is no folder" in capsys.readouterr().err
    assert main(["runs", str(tmp_path)]) == 2
    assert "there is no run in" in capsys.readouterr().err

"""The campaign of long runs: killed, started again, and nothing lost."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "campaign.py"
TINY = "--set network.mlp=[4] --set evaluation.episodes=20"

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="wants /proc")


def started(out, queue, *more):
    words = [sys.executable, SCRIPT, "--out", out, "--queue", queue, "--results", out, *more]
    with (out / "log").open("a") as log:
        return subprocess.Popen([*map(str, words)], stdout=log, stderr=log, start_new_session=True)


def result(out, name):
    return json.loads((out / f"campaign-{name}.json").read_text())


def test_a_queue_is_killed_with_its_child_and_goes_on(tmp_path):
    queue, jobs = tmp_path / "queue.toml", {"first": 1000, "second": 60}
    queue.write_text("".join(
        f'[[job]]\nname = "{name}"\nbar = "none"\n'
        f'command = "recipes run maml-sinusoid --steps {steps} {TINY} --run {{run}}"\n'
        for name, steps in jobs.items()
    ))  # fmt: skip
    # The time of a start is over at once, so that it ends after a chunk of 500, and again begins.
    first = started(tmp_path, queue, "--minutes", "0.0001")
    while not (tmp_path / "first" / "checkpoint.safetensors").exists():
        assert first.poll() is None, (tmp_path / "first.log").read_text()
        time.sleep(0.02)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    before = json.loads((tmp_path / "first.state.json").read_text())
    assert before["status"] == "running"
    assert before["pid"]
    subprocess.run([*map(str, first.args), "--report"], check=True)
    assert result(tmp_path, "first")["status"] == "running"
    assert result(tmp_path, "first")["result"] is None
    assert not (tmp_path / "campaign-second.json").exists()
    assert started(tmp_path, queue, "--minutes", "0.0001").wait(240) == 0
    one, two = result(tmp_path, "first"), result(tmp_path, "second")
    assert (one["status"], two["status"]) == ("done", "done"), (tmp_path / "log").read_text()
    assert one["result"]["training"]["steps"] == 1000
    assert one["starts"] >= 2
    assert one["core_hours"] * 3600 > before["cpu_seconds"]
    assert one["result"]["protocol"]["episodes"] == 20
    assert one["curve"]["."][-1]["step"] == 1000
    assert one["commits"]
    assert two["starts"] == 1


def test_a_job_that_cannot_run_is_given_up_and_the_next_one_runs(tmp_path):
    queue = tmp_path / "queue.toml"
    queue.write_text(
        '[[job]]\nname = "wrong"\nbar = ""\ncommand = "recipes show no-such-recipe"\n'
        '[[job]]\nname = "good"\nbar = ""\ncommand = "recipes list"\n'
    )
    assert started(tmp_path, queue).wait(120) == 0
    assert result(tmp_path, "wrong")["status"] == "given up"
    assert "there is no recipe" in result(tmp_path, "wrong")["said"]
    assert result(tmp_path, "good")["status"] == "done"

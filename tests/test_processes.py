"""Several processes on this machine: the numbers of one, and an end in a sentence.

`benchmarks/processes.py` does all kinds of trainings, resumes and kills; here are a few.
"""

import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import adaptax as ax
from adaptax import processes
from adaptax.cli import main

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "processes.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("several_processes", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_two_processes_have_the_numbers_of_one(script, tmp_path):
    """Trained on images that are streamed from the host, each process its own; 10 episodes."""
    _, apart = script.compare(tmp_path, ["streamed"], [2])
    assert set(apart[2]) == {"streamed/params", "streamed/scores"}
    assert max(apart[2].values()) < script.TOLERANCE


def test_numbers_that_are_apart_are_seen(script):
    one = {"job/a/0": np.array([1.0, 2.0]), "job/a/1": np.array([np.nan, 4.0])}
    assert script.apart(one, one) == {"job/a": 0.0}
    assert script.apart({**one, "job/a/0": np.array([1.0, 2.5])}, one) == {"job/a": 0.125}


def started(i, port, folder):
    command = "import sys; from adaptax.cli import main; sys.exit(main(sys.argv[1:]))"
    words = [
        "train",
        "maml",
        "sinusoid",
        "--steps",
        "10000000",
        "--meta-batch",
        "4",
        "--run",
        "run",
    ]
    words += ["--coordinator", f"127.0.0.1:{port}", "--processes", "2", "--process-id", str(i)]
    return subprocess.Popen(
        [sys.executable, "-c", command, *words], cwd=folder, text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"}, stderr=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip


def test_a_process_is_killed_and_the_other_one_ends_with_a_sentence(tmp_path, request):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    both = [started(i, port, tmp_path) for i in range(2)]
    request.addfinalizer(lambda: [process.kill() for process in both])
    checkpoint, end = tmp_path / "run" / "checkpoint.safetensors", time.monotonic() + 240
    while not checkpoint.exists() and time.monotonic() < end and both[0].poll() is None:
        time.sleep(0.05)
    both[1].send_signal(signal.SIGKILL)
    out, err = both[0].communicate(timeout=110)  # a few seconds, but for the load of other tests
    both[1].communicate()
    assert both[0].returncode == 75, err
    said = [line for line in err.splitlines() if line.startswith("adaptax:")]
    assert said == [
        "adaptax: another of the 2 processes has ended, and so does process 0; the last state is "
        "kept, and saved in run; go on with: adaptax train --resume run"
    ]
    assert out == ""
    # One process goes on with what two began, and says so.
    run = ax.Run(tmp_path / "run")
    assert run.recorded()["made_by"]["processes"] == "2"
    assert run.recorded()["plan"]["devices"] % 2 == 0
    code = "import sys; from adaptax.cli import main; sys.exit(main(sys.argv[1:]))"
    words = [sys.executable, "-c", code, "train", "--resume", "run", "--minutes", "0"]
    found = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert found.returncode == 75, found.stderr
    assert "processes was 2 and is 1" in found.stderr


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("node1:1234", 4, None), "give all three, or none where a cluster says so"),
        (("node1", 4, 0), "expected host:port"),
        (("node1:1234", 4, 4), "expected a number from 0 to 3"),
    ],
)
def test_what_a_process_is_told_is_checked(given, said):
    with pytest.raises(ValueError, match=said):
        ax.distributed(*given)


def test_the_command_line_says_what_is_missing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "maml", "sinusoid", "--processes", "2"]) == 2
    assert "give all three" in capsys.readouterr().err


def test_clusters_are_found_where_there_is_more_than_one_process(monkeypatch):
    names = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE",
             "TPU_WORKER_HOSTNAMES")  # fmt: skip
    for name in names:
        monkeypatch.delenv(name, raising=False)
    assert not processes.detected()
    monkeypatch.setenv("SLURM_NTASKS", "4")  # a batch script, whose processes srun would start
    assert not processes.detected()
    monkeypatch.setenv("SLURM_PROCID", "0")
    assert processes.detected()
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    assert not processes.detected()
    monkeypatch.delenv("SLURM_PROCID")
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    assert processes.detected()
    monkeypatch.delenv("OMPI_COMM_WORLD_SIZE")
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "a,b")
    assert processes.detected()


def test_one_process_has_all_and_asks_nobody():
    assert processes.own(5) == slice(0, 5)
    assert processes.anyone(True, False) == [True, False]
    assert processes.total(3) == 3
    assert processes.from_first(lambda: {"a": (1, 2)}) == {"a": (1, 2)}
    state = {"x": jnp.arange(3.0)}
    assert processes.state_from_first(lambda: (state, 1), state)[0] is state
    assert processes.here(state)["x"] is state["x"]
    np.testing.assert_array_equal(processes.gathered(state)["x"], [0, 1, 2])
    processes.agree(a=1)


def test_tasks_that_processes_cannot_share_are_refused(monkeypatch):
    """Four processes of three devices each, as JAX would show them."""

    class Device:
        def __init__(self, id, process_index):
            self.id, self.process_index = id, process_index

    devices = [Device(i, i % 4) for i in range(12)]
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    monkeypatch.setattr(jax, "devices", lambda: devices)
    order = [[(d.process_index, d.id) for d in processes.shared_devices(n)] for n in (12, 8, 4)]
    assert [len(each) for each in order] == [12, 8, 4]
    assert all(each == sorted(each) for each in order)  # a process's tasks lie side by side
    with pytest.raises(ValueError, match="4 processes cannot share 25 tasks evenly"):
        processes.shared_devices(25)
    with pytest.raises(ValueError, match="devices=6 cannot be shared evenly by 4 processes"):
        processes.shared_devices(12, 6)

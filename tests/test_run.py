"""Run folders: one process at a time, nothing lost, damage named."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import adaptax as ax
from adaptax import io
from adaptax.engine.run import Run, differences
from adaptax.process import at_most, interruptible, time_left

STATE = {"step": jnp.array(6), "w": jnp.ones((3, 2)), "best": jnp.array([-jnp.inf, 1.0])}
FACTS = {"plan": {"steps": 12, "learner.inner_lr": 0.01}}


def process(code, *words, **how):
    how = {"stdout": subprocess.PIPE, "text": True, **how}
    return subprocess.Popen([sys.executable, "-c", code, *map(str, words)], **how)


# One process at a time

HOLD = """
import sys, time
from adaptax.engine.run import Run
with Run(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


def test_one_process_on_a_folder(tmp_path):
    with process(HOLD, tmp_path) as other:
        assert other.stdout.readline() == "held\n"
        said = rf"another process works on {tmp_path} \(process {other.pid} on .*\); wait for its"
        with pytest.raises(BlockingIOError, match=said):
            Run(tmp_path).begin(STATE, FACTS, False)
        assert not (tmp_path / "metrics.jsonl").exists()
        other.kill()
    with Run(tmp_path) as run:  # the lock died with its process
        with pytest.raises(BlockingIOError, match=f"process {os.getpid()} on"):
            Run(tmp_path).begin(STATE, FACTS, False)
        run.begin(STATE, FACTS, False)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["metrics.jsonl"]


def test_where_there_are_no_locks(tmp_path, monkeypatch):
    def fail(*args):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("adaptax.process.fcntl.flock", fail)
    with pytest.warns(UserWarning, match="cannot be locked .*not supported"), Run(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


def test_what_killed_processes_left_is_swept(tmp_path):
    def left(name, age=0.0):
        file = tmp_path / name
        file.write_bytes(b"half")
        os.utime(file, (time.time() - age, time.time() - age))
        return file

    digits = "0123456789abcdef"
    gone = [left(f".checkpoint.safetensors.{digits}.tmp"), left(f".x.{digits}.tmp", 7200)]
    kept = [left(f".x.{digits[::-1]}.tmp"), left(".mine.tmp", 7200), left("y.tmp", 7200)]
    with Run(tmp_path):
        pass
    assert not any(file.exists() for file in gone)
    assert all(file.exists() for file in kept)


# Checkpoints


def test_a_flipped_bit_is_named(tmp_path):
    run, flip = Run(tmp_path), random.Random(0)
    with run:
        run.begin(STATE, FACTS, False)
        run.checkpoint(STATE, FACTS)
    sound = run.checkpoint_file.read_bytes()
    assert int(run.load(STATE)["step"]) == 6
    for bit in [*range(8 * len(sound))][:: 7 if len(sound) > 800 else 1]:
        bad = bytearray(sound)
        bad[bit // 8] ^= 1 << bit % 8
        run.checkpoint_file.write_bytes(bad)
        with pytest.raises(ValueError, match=r"checkpoint.safetensors is (damaged|truncated)"):
            run.begin(STATE, FACTS, True)
    for _ in range(50):
        bad = bytearray(sound)
        for _ in range(flip.randrange(1, 20)):
            bad[flip.randrange(len(bad))] = flip.randrange(256)
        run.checkpoint_file.write_bytes(bad)
        if bytes(bad) != sound:
            with pytest.raises(ValueError, match=r"damaged|truncated|another model|not a check"):
                run.begin(STATE, FACTS, True)


def test_a_state_of_nan_is_named(tmp_path):
    with Run(tmp_path) as run:
        run.begin(STATE, FACTS, False)
        run.checkpoint({**STATE, "w": STATE["w"].at[1, 1].set(jnp.nan)}, FACTS)
        with pytest.raises(ValueError, match="holds NaN in w, which no training leaves"):
            run.begin(STATE, FACTS, True)


def test_files_without_a_checksum_are_read(tmp_path):
    """Those of earlier versions and of other programs."""
    from safetensors.numpy import save_file

    for metadata in (None, {"adaptax": '{"plan": {}}'}, {"format": "pt"}):
        save_file({"a": np.ones(3)}, tmp_path / "x", metadata=metadata)
        assert ax.load(tmp_path / "x", {"a": np.zeros(3)})["a"].sum() == 3
    for metadata in ({"adaptax": "[" * 100_000}, {"adaptax": "7"}, {"adaptax": "{"}):
        save_file({"a": np.ones(3)}, tmp_path / "x", metadata=metadata)
        with pytest.raises(ValueError, match="not a checkpoint"):
            io.read_metadata(tmp_path / "x")


@pytest.mark.parametrize("plan", [None, 7, [], {}, "x"])
def test_a_checkpoint_of_no_run(plan, tmp_path):
    io.save(tmp_path / "checkpoint.safetensors", STATE, plan=plan)
    with pytest.raises(ValueError, match="is not the checkpoint of a run"):
        Run(tmp_path).begin(STATE, FACTS, True)


def test_differences_name_the_whole_and_not_its_parts():
    before = {"steps": 3, "learner": "MAML", "learner.loss": "mse", "learner[0].a": 1, "same": [1]}
    now = {"steps": 4, "learner": "Reptile", "same": [1], "lr": 2}
    said = "steps was 3 and is 4, learner was MAML and is Reptile, lr was absent and is 2"
    assert differences(before, now) == said
    assert differences(before, dict(before)) == ""
    many = differences({}, {f"a{i}": i for i in range(9)})
    assert many.startswith("a0 was absent and is 0, ")
    assert many.endswith("a3 was absent and is 3, 5 more")


# Metrics

GOOD = [{"step": s, "seconds": 0.1, "loss": 1.0, "validation": {"mse": 2.0}} for s in (3, 6, 9)]


@pytest.mark.parametrize(
    "line",
    [
        b"", b"null", b"7", b'"x"', b"[1]", b"{}", b'{"step": 4}', b"\xff\xfe", b"{" * 100_000,
        b"[" * 100_000, b'{"step": 1e999, "seconds": 1, "loss": 1}', b'{"step": 4, "seconds": 0',
        b'{"step": "4", "seconds": 1, "loss": 1}', b'{"step": true, "seconds": 1, "loss": 1}',
        b'{"step": -1, "seconds": 1, "loss": 1}', b'{"step": 1' + b"0" * 400 + b', "loss": 1}',
        b'{"step": 1' + b"0" * 5000 + b"}", b'{"step": 4, "seconds": null, "loss": 1}',
        b'{"step": 4, "seconds": 1, "loss": [1]}', b'{"step": 4, "seconds": 1}',
        b'{"step": 4, "seconds": 1, "loss": 1, "validation": 5}',
        b'{"step": 4, "seconds": 1, "loss": 1, "validation": {"mse": "x"}}',
        b'{"step": 4, "loss": 1, "seconds": 1' + b"0" * 400 + b"}",
        b'{"step": 4, "seconds": NaN, "loss": 1}', '{"step": 4, "löss"'.encode("latin-1"),
    ],
    ids=range(25),
)  # fmt: skip
@pytest.mark.parametrize("place", [0, 1, 3])
def test_a_damaged_line_of_metrics_loses_that_line_alone(line, place, tmp_path):
    lines = [json.dumps(record).encode() for record in GOOD]
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join([*lines[:place], line, *lines[place:]]))
    assert Run(tmp_path).metrics() == GOOD
    ax.report.learning_curve(Run(tmp_path).metrics())


def test_records_are_in_order_and_the_last_of_a_step_counts(tmp_path):
    again = {**GOOD[1], "loss": None, "validation": {"mse_ci95": None}}
    lines = [json.dumps(record) for record in (GOOD[2], GOOD[1], GOOD[0], again)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    assert Run(tmp_path).metrics() == [GOOD[0], again, GOOD[2]]
    ax.report.learning_curve(Run(tmp_path).metrics())


@pytest.mark.parametrize("text", [b"[]", b"7", b"{", b"\xff", b"[" * 100_000])
def test_a_configuration_that_is_none(text, tmp_path):
    (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(ValueError, match=r"config.json is not"):
        Run(tmp_path).config()


# Files and signals


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_files_follow_the_umask(mask, mode, tmp_path):
    before = os.umask(mask)
    try:
        ax.save(tmp_path / "x", STATE)
    finally:
        os.umask(before)
    assert (tmp_path / "x").stat().st_mode & 0o777 == mode


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_signals_end_a_run_with_its_state_saved(name):
    number = getattr(signal, name)
    before = signal.getsignal(number)
    with interruptible() as interrupted:
        assert not interrupted()
        signal.raise_signal(number)
        assert interrupted()
        assert signal.getsignal(number) is before  # the second ends the process
    assert signal.getsignal(number) is before


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_signals_that_are_ignored_stay_so(name):
    number = getattr(signal, name)
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with interruptible() as interrupted:
            assert signal.getsignal(number) is signal.SIG_IGN
            signal.raise_signal(number)
            assert not interrupted()
    finally:
        signal.signal(number, before)


def test_minutes_end_what_is_inside_alone():
    with at_most(None):
        with at_most(0.0):
            assert time_left() <= 0
        assert time_left() == float("inf")


def test_a_run_that_stops_in_time_goes_on_to_the_same_bits(tmp_path):
    tasks, key = ax.tasks.sinusoid(shot=3, query=3).train, jax.random.key(0)
    model = ax.models.MLP(1, 1, (4,), key=key)

    def train(folder):
        learner = ax.MAML(ax.losses.mse, 0.01)
        how = {"steps": 6, "meta_batch": 2, "chunk": 2, "key": key, "resume": "auto"}
        return ax.fit(learner, model, tasks, run=tmp_path / folder, **how)

    whole = train("whole")
    for step in (2, 4):
        with at_most(0.0):
            result = train("parts")
        assert (result.stopped, result.step) == ("out of time", step)
    with at_most(0.0):  # nothing is left to be stopped
        assert train("parts").stopped == "done"
    assert (tmp_path / "parts" / "checkpoint.safetensors").read_bytes() == (
        tmp_path / "whole" / "checkpoint.safetensors"
    ).read_bytes()
    assert whole.stopped == "done"


FORK = """
import os, sys, warnings
import jax, adaptax as ax
warnings.simplefilter("ignore")
if sys.argv[1] == "after":
    jax.random.key(0)  # starts JAX
child = os.fork()
if child:
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
try:
    result = ax.fit(
        ax.MAML(ax.losses.mse, 0.01), None,
        ax.tasks.sinusoid().train, steps=1, key=None,
    )
except RuntimeError as error:
    print(error)
except Exception as error:
    print("reached", type(error).__name__)
sys.stdout.flush()
os._exit(0)
"""


@pytest.mark.parametrize(
    ("when", "said"),
    [("after", "this process was forked from one in which"), ("before", "reached")],
)
def test_a_fork_after_use_is_refused(when, said):
    with process(FORK, when) as parent:
        assert parent.stdout.read().startswith(said)
        assert parent.wait() == 0


# Training

TASKS = ax.tasks.sinusoid(shot=5, query=5)
KEY = jax.random.key(0)


def fit(**how):
    model = ax.models.MLP(1, 1, (8,), key=KEY)
    how = {"steps": 12, "meta_batch": 4, "chunk": 3, "key": KEY, "devices": 1, **how}
    return ax.fit(ax.MAML(ax.losses.mse, 0.01), model, TASKS.train, **how)


def test_a_run_that_stopped_early_is_finished(tmp_path):
    import optax

    how = {"optimizer": optax.sgd(0.0), "validate": TASKS.val, "validate_every": 3,
           "patience": 2, "validation": {"episodes": 4}, "run": tmp_path}  # fmt: skip
    first = fit(**how)
    assert (first.stopped, first.step, first.best_step) == ("early", 9, 3)
    again = fit(resume=True, **how)
    assert (again.stopped, again.step, again.best_step) == ("early", 9, 3)
    assert (again.best_score, again.history) == (first.best_score, first.history)
    on = fit(resume=True, **{**how, "patience": 3})  # more patience goes on
    assert (on.stopped, on.step, on.best_step) == ("early", 12, 3)


def test_a_folder_without_a_checkpoint_is_no_run(tmp_path):
    """Its process was killed before the first one: the same call goes on."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 3, "seconds": 1, "loss": 1}\n')
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="there is no checkpoint at"):
        fit(run=tmp_path / "mistyped", resume=True)
    for how in ({}, {"resume": True}, {"resume": "auto"}):
        result = fit(run=str(tmp_path), steps=3, **how)
        assert [record["step"] for record in result.history] == [3]
        (tmp_path / "checkpoint.safetensors").unlink()
    fit(run=tmp_path / "new", resume="auto", steps=6, watch=None)
    assert fit(run=tmp_path / "new", resume="auto", steps=6).step == 6

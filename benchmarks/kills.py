"""Kill trainings at random moments, give the same command again, and compare the ends to the bit.

Every training is killed by SIGKILL a few times: at any moment, before its first checkpoint, or as
soon as a checkpoint is being written. The same command, or the same call of `fit`, goes on each
time. The last checkpoint has to have the bytes of that of a training without a break, and the
metrics the same records but for the seconds they took.

    python benchmarks/kills.py --kills 300
    python benchmarks/kills.py --kills 4 --only python-sinusoid
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

SCRATCH = tempfile.TemporaryDirectory(prefix="kills-")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", f"{SCRATCH.name}/programs")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
os.environ.setdefault("MPLBACKEND", "Agg")

import jax  # noqa: E402
import numpy as np  # noqa: E402
from PIL import Image  # noqa: E402

import adaptax as ax  # noqa: E402
from adaptax.cli import main  # noqa: E402
from adaptax.engine.run import Run  # noqa: E402
from adaptax.recipes import changed, closest  # noqa: E402

PICTURES = Path(SCRATCH.name, "pictures")
EACH = 5
"""Kills of one training at most."""


def pictures() -> None:
    """A folder of 20 classes of 6 pictures of 28 by 28 pixels."""
    rng = np.random.default_rng(0)
    for name in range(20):
        folder = PICTURES / f"class {name}"
        folder.mkdir(parents=True)
        base = rng.integers(0, 200, (28, 28))
        for i in range(6):
            noisy = (base + rng.integers(0, 50, (28, 28))).astype(np.uint8)
            Image.fromarray(noisy).save(folder / f"{i}.png")


def by_command(words: str, settings: tuple[str, ...] = ()):  # type: ignore[no-untyped-def]
    """A training by the command line."""
    extra = [word for setting in settings for word in ("--set", setting)]
    return lambda folder: main(["train", *words.split(), *extra, "--run", str(folder)])


def sinusoid(folder: Path) -> int:
    """A training by a call of `fit`, with validation."""
    tasks, key = ax.tasks.sinusoid(shot=5, query=5), jax.random.key(0)
    model = ax.models.MLP(1, 1, (8,), key=key)
    ax.fit(ax.MAML(ax.losses.mse, 0.01), model, tasks.train, steps=60, meta_batch=4, chunk=4,
           key=key, validate=tasks.val, validate_every=8, validation={"episodes": 4}, run=folder,
           resume="auto")  # fmt: skip
    return 0


def images(folder: Path) -> int:
    """Likewise on images."""
    rng, key = np.random.default_rng(0), jax.random.key(0)
    x = rng.integers(0, 255, (20 * 6, 12, 12, 1), dtype=np.uint8)
    tasks = ax.tasks.from_arrays(x, np.repeat(np.arange(20), 6), way=3, shot=1, query=2)
    model = ax.models.Conv4(out=3, key=key, image=(12, 12, 1), filters=4)
    ax.fit(ax.MAML(ax.losses.cross_entropy, 0.1), model, tasks.train, steps=24, meta_batch=4,
           chunk=3, key=key, run=folder, resume="auto")  # fmt: skip
    return 0


NAVIGATION = ("task.horizon=5", "task.trajectories=4", "network.policy=[4]")


def navigation(folder: Path) -> int:
    """Likewise by roll-outs."""
    task = {"horizon": 5, "trajectories": 4}
    changes = {"steps": 60, "meta_batch": 4, "task": task, "network": {"policy": [4]}}
    experiment = changed(closest("maml", "navigation", 5, 1), changes)
    experiment.train(experiment.splits(), Run(folder), chunk=4, resume="auto")
    return 0


JOBS = {
    "python-sinusoid": sinusoid,
    "python-images": images,
    "python-navigation": navigation,
    "command-sinusoid": by_command("maml sinusoid --steps 3000 --episodes 8", ("network.mlp=[8]",)),
    "command-images": by_command(
        f"maml folder --path {PICTURES} --way 3 --shot 1 --query 2 --steps 60 --episodes 8",
        ("network.filters=4", "task.image_size=28", "task.channels=1"),
    ),
    "command-navigation": by_command(
        "maml navigation --steps 80 --meta-batch 4 --episodes 4", NAVIGATION
    ),
}


def start(job: str, folder: Path, log: Path) -> int:
    """Begin, or go on, in a process of its own, forked before JAX has started; its number."""
    if child := os.fork():
        return child
    code = 1
    try:
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1)
        os.dup2(out, 2)
        code = JOBS[job](folder)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def finish(job: str, folder: Path) -> None:
    """Let it run to its end."""
    log = folder.with_suffix(".log")
    code = os.waitstatus_to_exitcode(os.waitpid(start(job, folder, log), 0)[1])
    if code:
        raise SystemExit(f"{job} ended with exit code {code}:\n{log.read_text()[-3000:]}")


def kill(job: str, folder: Path, how: str, after: float) -> str | None:
    """Kill it after so many seconds, or when it writes a checkpoint after that; at which point."""
    child = start(job, folder, folder.with_suffix(".log"))
    until, end = time.monotonic() + after, time.monotonic() + 120
    while time.monotonic() < end:
        if os.waitpid(child, os.WNOHANG)[0]:
            return None
        writing = any(folder.glob(".checkpoint.*.tmp")) if folder.exists() else False
        if time.monotonic() >= until and (how == "time" or writing):
            break
        time.sleep(0.0002 if how == "writing" else 0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    if any(folder.glob(".checkpoint.*.tmp")):
        return "in a checkpoint's writing"
    there = (folder / "checkpoint.safetensors").exists()
    return "after a checkpoint" if there else "before the first checkpoint"


def state(folder: Path) -> tuple[bytes, list[dict]]:
    """What has to be the same."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return (folder / "checkpoint.safetensors").read_bytes(), [
        {name: value for name, value in record.items() if name != "seconds"} for record in records
    ]


def run(kills: int, jobs: list[str], seed: int) -> None:
    """Kill so often, all jobs in turn."""
    chance, where, trainings = random.Random(seed), Counter(), 0
    whole, seconds = {}, {}
    pictures()
    for job in jobs:
        folder = Path(SCRATCH.name, f"whole {job}")
        finish(job, folder)  # compiles
        warm = Path(SCRATCH.name, f"warm {job}")
        began = time.monotonic()
        finish(job, warm)
        seconds[job], whole[job] = time.monotonic() - began, state(folder)
        assert state(warm) == whole[job], f"{job} is not reproducible"
        print(f"{job}: {seconds[job]:.1f} s without a break", flush=True)
    while sum(where.values()) < kills:
        job = jobs[trainings % len(jobs)]
        trainings += 1
        folder = Path(SCRATCH.name, f"{trainings} {job}")
        done = Counter()
        for _ in range(min(chance.randint(1, EACH), kills - sum(where.values()))):
            how = chance.choice(["time", "time", "writing"])
            after = chance.uniform(0, seconds[job]) * (1 if how == "time" else 0.7)
            if (at := kill(job, folder, how, after)) is None:
                break  # finished before
            done[at] += 1
        finish(job, folder)
        where += done
        left = [file.name for file in folder.rglob(".*")]
        assert not left, f"{folder} still holds {left}"
        assert state(folder) == whole[job], f"{job}, training {trainings}: other bits, {done}"
        print(f"{sum(where.values())} kills; {job}: {dict(done)}, the same bits", flush=True)
    print(f"{sum(where.values())} kills in {trainings} trainings: every end has the same bits; "
          f"{dict(where)}")  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=300)
    parser.add_argument("--only", choices=JOBS, nargs="+", default=list(JOBS))
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    run(asked.kills, asked.only, asked.seed)

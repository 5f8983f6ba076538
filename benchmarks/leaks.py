"""Whether a long-lived process grows: memory, memory maps, threads and open files after many calls.

    python benchmarks/leaks.py [--calls 300] [--fits 60] [--cache FOLDER] [--out FILE]

`same` calls with one learner, as in a notebook; `anew` makes learner, loss, optimizer and bank of
images for every call. With `--cache` JAX keeps its programs on the disk as well. Memory counts
from a quarter of the calls on, when the allocator has seen all sizes.
"""

import argparse
import gc
import os
import sys
import tempfile
import threading
from pathlib import Path

import jax
import numpy as np
import optax
from measure import RESULTS, resident, save, table

import adaptax as ax

SAME = ax.MAML(ax.losses.mse, 0.01, 1)
WAVES = ax.tasks.sinusoid()
KEY = jax.random.key(0)


def net():
    return ax.models.MLP(1, 1, key=KEY)


def anew():
    return ax.MAML(lambda model, batch: ax.losses.mse(model, batch), 0.01, 1)


def adapt(learner, i, folder):
    task = WAVES.test.sample(jax.random.key(i))
    learner.adapt(net(), task.support, key=KEY)(task.query.x)


def evaluate(learner, i, folder):
    ax.evaluate(learner, net(), WAVES.test, episodes=100, key=jax.random.key(i))


def fit(learner, i, folder):
    ax.fit(
        learner, net(), WAVES.train, steps=20, chunk=10, meta_batch=4, key=jax.random.key(i),
        optimizer=optax.adam(1e-3), validate=WAVES.val, validation={"episodes": 20},
        run=f"{folder}/{i}",
    )  # fmt: skip


def banks(learner, i, folder):
    """Another bank of 4 MB every time."""
    pixels = np.random.default_rng(i).integers(0, 255, (200, 144 * 144), np.uint8)
    tasks = ax.tasks.from_arrays(pixels, np.repeat(np.arange(20), 10), way=2, shot=1, query=2)
    model = ax.Functional({"w": np.zeros((144 * 144, 2), np.float32)}, lambda p, x: x @ p["w"])
    learner = ax.MAML(ax.losses.cross_entropy, 0.01, 1)
    ax.evaluate(learner, model, tasks.test, episodes=5, key=KEY)


def counts():
    gc.collect()
    return {
        "MB": resident(),
        "maps": len(Path("/proc/self/maps").read_text().splitlines()),
        "threads": threading.active_count(),
        "files": len(os.listdir("/proc/self/fd")),
    }


def growth(call, make, calls):
    """What `calls` calls leave behind, and what the last three quarters of them add to that."""
    with tempfile.TemporaryDirectory() as folder:
        for i in range(3):
            call(make(), i, folder)
        start = counts()
        for i in range(calls):
            if i == calls // 4:
                settled = counts()
            call(make(), i + 3, folder)
        end = counts()
    left = {name: end[name] - start[name] for name in end}
    return {**left, "later_MB": end["MB"] - settled["MB"]}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--calls", type=int, default=300)
    parser.add_argument("--fits", type=int, default=60)
    parser.add_argument("--cache", default=None)
    parser.add_argument("--out", default=RESULTS / "leaks.json")
    asked = parser.parse_args()
    jax.config.update("jax_compilation_cache_dir", asked.cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    found = {}
    for name, call, make, calls in (
        ("adapt", adapt, lambda: SAME, asked.calls),
        ("evaluate", evaluate, lambda: SAME, asked.calls),
        ("fit", fit, lambda: SAME, asked.fits),
        ("adapt, learner anew", adapt, anew, asked.calls),
        ("evaluate, learner anew", evaluate, anew, asked.calls),
        ("fit, learner anew", fit, anew, asked.fits),
        ("evaluate, bank anew", banks, lambda: None, asked.calls),
    ):
        found[name] = {"calls": calls, **growth(call, make, calls)}
        print(name, found[name], file=sys.stderr, flush=True)
    columns = ["calls", "MB", "later_MB", "maps", "threads", "files"]
    rows = [(name, *(row[column] for column in columns)) for name, row in found.items()]
    table("What is left after so many calls", ["", *columns], rows)
    save(asked.out, cache=asked.cache is not None, growth=found)
    bad = [
        name
        for name, row in found.items()
        if row["later_MB"] > 20 or row["maps"] > 20 or row["threads"] or row["files"]
    ]
    sys.exit(f"{', '.join(bad)}: it grows" if bad else 0)


if __name__ == "__main__":
    main()

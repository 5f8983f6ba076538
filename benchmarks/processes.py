"""Trainings by 1, 2 and 4 processes on this machine: the same numbers, whatever the number.

In float64, meta-parameters and scores of several processes are compared with those of one. Then a
run is resumed by 2, 1 and 4 processes in turn, and one of 4 processes is killed with -9: the others
have to end, each with one sentence, and the run that goes on has to end with the bits of one that
was never killed.

    python benchmarks/processes.py                      # all of it: minutes
    python benchmarks/processes.py --jobs sinusoid images --counts 1 2
"""

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TOLERANCE = 1e-12
"""Of float64, relative to the largest of a job's parameters, or scores."""


def sinusoid(ax, jax, run=None):
    """MAML, validated."""
    return _fit(ax, jax, ax.MAML(ax.losses.mse, 0.01, 2), run, validate=True)


def reptile(ax, jax, run=None):
    return _fit(ax, jax, ax.Reptile(ax.losses.mse, 0.02, 3), run)


def bmaml(ax, jax, run=None):
    return _fit(ax, jax, ax.BayesianMAML(ax.losses.mse, 0.01, 1, particles=2), run)


def _fit(ax, jax, learner, run, validate=False):
    tasks, key = ax.tasks.sinusoid(shot=5, query=5), jax.random.key(0)
    model = ax.models.MLP(1, 1, (8,), key=key)
    how = {"validate": tasks.val, "validate_every": 2, "validation": {"episodes": 10}}
    result = ax.fit(learner, model, tasks.train, steps=6, meta_batch=8, chunk=2, key=key, run=run,
                    resume="auto" if run else False, **how if validate else {})  # fmt: skip
    report = ax.evaluate(learner, result.meta, tasks.test, key=key, episodes=10)
    return result, {"params": ax.tree.parameters(result.last), "scores": report.values}


def images(ax, jax, run=None, streamed=False):
    """MAML through batch normalisation, tasks on the device."""
    import numpy as np

    rng, key = np.random.default_rng(0), jax.random.key(0)
    x = rng.integers(0, 255, (20 * 6, 12, 12, 1), dtype=np.uint8)
    tasks = ax.tasks.from_arrays(x, np.repeat(np.arange(20), 6), way=3, shot=1, query=2,
                                 memory_budget=0 if streamed else 2**32)  # fmt: skip
    model = ax.models.MLP(144, 3, (8,), key=key)
    if not streamed:
        model = ax.models.Conv4(out=3, key=key, image=(12, 12, 1), filters=4)
    learner = ax.MAML(ax.losses.cross_entropy, 0.1, 2)
    # Adam would blow up the rounding errors of gradients that are zero: of biases before a
    # normalisation.
    import optax

    result = ax.fit(learner, model, tasks.train, steps=4, meta_batch=4, chunk=2, key=key, run=run,
                    optimizer=optax.sgd(0.1), resume="auto" if run else False)  # fmt: skip
    report = ax.evaluate(learner, result.meta, tasks.test, key=key, episodes=10)
    return result, {"params": ax.tree.parameters(result.last), "scores": report.values}


def streamed(ax, jax, run=None):
    """Images that stay on the host, of which every process reads its own; for a small network."""
    return images(ax, jax, run, streamed=True)


def navigation(ax, jax, run=None):
    """MAML by TRPO; damped, as conjugate gradients blow up rounding where F is nearly singular."""
    from adaptax.recipes import changed, closest

    task = {"horizon": 5, "trajectories": 4}
    changes = {"steps": 4, "meta_batch": 4, "task": task, "network": {"policy": [4]},
               "outer": {"damping": 0.1, "cg_steps": 3}}  # fmt: skip
    experiment = changed(closest("maml", "navigation", 5, 1), changes)
    splits = experiment.splits()
    result = experiment.train(splits, run, chunk=2, resume="auto" if run else False)
    how = {"goals": 6, "trajectories": 4}
    report = ax.evaluate(experiment.build_learner(), result.meta, splits.test,
                         key=jax.random.key(0), **how)  # fmt: skip
    return result, {"params": ax.tree.parameters(result.last), "scores": report.values}


def pretrain(ax, jax, run=None):
    """A classifier, whose batches are shared."""
    import numpy as np

    rng, key = np.random.default_rng(0), jax.random.key(0)
    x = rng.integers(0, 255, (20 * 6, 12, 12, 1), dtype=np.uint8)
    tasks = ax.tasks.from_arrays(x, np.repeat(np.arange(20), 6), way=3, shot=1, query=2)
    model = ax.models.Conv4(out=len(tasks.train.classes), key=key, image=(12, 12, 1), filters=4)
    result = ax.pretrain(model, tasks.train, key=key, epochs=2, batch=8, held_out=0.2, run=run,
                         resume="auto" if run else False)  # fmt: skip
    scores = {"accuracy": result.accuracy, "loss": [r["loss"] for r in result.history]}
    return result, {"params": ax.tree.parameters(result.model), "scores": scores}


JOBS = {job.__name__: job
        for job in (sinusoid, images, streamed, reptile, bmaml, navigation, pretrain)}  # fmt: skip


def work(asked):
    """A process of several: does the jobs, and the first writes what came of them."""
    import jax

    import adaptax as ax
    from adaptax import processes
    from adaptax.process import Interrupted, at_most

    if asked.processes > 1:
        ax.distributed(asked.coordinator, asked.processes, asked.process_id)
    import numpy as np

    found = {}
    try:
        for job in asked.jobs:
            run = asked.run and asked.run / job
            with at_most(0.0 if asked.stop else None):
                result, numbers = JOBS[job](ax, jax, run)
            print(f"{job}: {result.stopped} after {result.step}", flush=True)
            for kind, some in numbers.items():
                for i, leaf in enumerate(jax.tree.leaves(some)):
                    found[f"{job}/{kind}/{i}"] = np.asarray(leaf)
        if processes.first():
            np.savez(asked.out, **found)
    except Interrupted as stop:
        print(f"sentence: {stop}", flush=True)
        sys.stdout.flush()
        os._exit(75)


class Group:
    """So many processes that do the same jobs."""

    def __init__(self, count, jobs, folder, *, run=None, stop=False, devices=1):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.out, self.logs, self.members = folder / f"{count}.npz", [], []
        env = dict(os.environ, JAX_PLATFORMS="cpu", JAX_ENABLE_X64="1")
        env["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
        for i in range(count):
            words = [sys.executable, __file__, "--worker", "--process-id", str(i)]
            words += ["--coordinator", f"127.0.0.1:{port}", "--processes", str(count)]
            words += ["--out", str(self.out), "--jobs", *jobs, *["--stop"] * stop]
            words += ["--run", str(run)] if run else []
            self.logs.append(folder / f"{count}-{i}.log")
            with self.logs[-1].open("w") as log:
                self.members.append(subprocess.Popen(words, stdout=log, stderr=log, env=env))

    def wait(self, seconds=600):
        """Exit codes."""
        end = time.monotonic() + seconds
        try:
            return [m.wait(max(end - time.monotonic(), 0.1)) for m in self.members]
        finally:
            for member in self.members:
                if member.poll() is None:
                    member.kill()
                    member.wait()

    def numbers(self):
        """What the jobs gave, by name."""
        import numpy as np

        codes = self.wait()
        if any(codes):
            raise SystemExit(f"exit codes {codes}:\n{self.said()}")
        with np.load(self.out) as found:
            return dict(found)

    def said(self):
        return "\n".join(f"--- {log.name}\n{log.read_text()[-2500:]}" for log in self.logs)


def apart(ours, theirs):
    """How far numbers are from those of one process, by job."""
    import numpy as np

    worst, largest = {}, {}
    for name, other in theirs.items():
        kind = name.rpartition("/")[0]
        largest[kind] = max(largest.get(kind, 0.0), np.nanmax(np.abs(other), initial=0.0))
    for name, other in theirs.items():
        mine, kind = ours[name], name.rpartition("/")[0]
        assert mine.shape == other.shape, (name, mine.shape, other.shape)
        assert np.array_equal(np.isnan(mine), np.isnan(other)), name
        far = np.nanmax(np.abs(mine.astype(float) - other.astype(float)), initial=0.0)
        worst[kind] = max(worst.get(kind, 0.0), float(far / largest[kind]))
    return worst


def compare(folder, jobs, counts):
    """Differences to one process, by the number of processes."""
    one = Group(1, jobs, folder).numbers()
    found = {}
    for count in counts:
        if count > 1:
            found[count] = apart(Group(count, jobs, folder).numbers(), one)
            print(count, found[count], flush=True)
            assert max(found[count].values()) < TOLERANCE, found
    return one, found


def move(folder, job, one, counts):
    """A run that is resumed by other numbers of processes, a chunk each."""
    run = folder / "moved"
    for count in counts[:-1]:
        codes = (group := Group(count, [job], folder, run=run, stop=True)).wait()
        assert codes == [0] * count, group.said()
        assert "out of time" in group.logs[0].read_text(), group.said()
    last = Group(counts[-1], [job], folder, run=run).numbers()
    far = apart(last, {n: v for n, v in one.items() if n.startswith(f"{job}/")})
    assert max(far.values()) < TOLERANCE, far
    return far


def kill(folder, job, count, victim, devices=1):
    """Kill one of the processes; seconds until the others have ended, and what they said."""
    whole, hit = folder / "whole", folder / "hit"
    Group(count, [job], folder, run=whole).numbers()
    # Stops after its first chunk, so that there is more to do; then killed at the start of that.
    assert Group(count, [job], folder, run=hit, stop=True).wait() == [0] * count
    file = hit / job / "checkpoint.safetensors"
    before = file.stat().st_mtime_ns
    group = Group(count, [job], folder, run=hit)
    while file.stat().st_mtime_ns == before and group.members[victim].poll() is None:
        time.sleep(0.001)
    group.members[victim].send_signal(signal.SIGKILL)
    began = time.monotonic()
    codes = group.wait(120)
    seconds = time.monotonic() - began
    sentences = [
        [line for line in log.read_text().splitlines() if line.startswith("sentence:")]
        for i, log in enumerate(group.logs)
        if i != victim
    ]
    Group(count, [job], folder, run=hit).numbers()
    same = file.read_bytes() == (whole / job / "checkpoint.safetensors").read_bytes()
    return {"victim": victim, "seconds": round(seconds, 2), "codes": codes,
            "sentences": sentences, "the same bits": same}  # fmt: skip


def main(asked):
    from measure import save

    with tempfile.TemporaryDirectory(prefix="processes-") as name:
        folder = Path(name)
        one, far = compare(folder, asked.jobs, asked.counts)
        moved = move(folder, asked.jobs[0], one, (2, 1, 4))
        killed = []
        for victim in (1, 0):
            (folder / f"kill{victim}").mkdir()
            found = kill(folder / f"kill{victim}", asked.jobs[0], max(asked.counts), victim)
            print(json.dumps(found), flush=True)
            killed.append(found)
    save(asked.out, tolerance=TOLERANCE, apart=far, moved={"2, 1, 4": moved}, killed=killed)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--jobs", choices=JOBS, nargs="+", default=list(JOBS))
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results/processes.json"
    )
    parser.add_argument("--worker", action="store_true")
    parser.add_argument("--coordinator")
    parser.add_argument("--processes", type=int)
    parser.add_argument("--process-id", type=int)
    parser.add_argument("--run", type=Path)
    parser.add_argument("--stop", action="store_true")
    asked = parser.parse_args()
    work(asked) if asked.worker else main(asked)

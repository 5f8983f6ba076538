"""Weak scaling of Omniglot's meta-step: processes of one core each, the same tasks for each.

One process on one core against two on two, and four where there are as many cores (`--counts 4` on
fewer shares them, and says so). Every process is bound to its core. Prints the seconds of a
meta-step, the efficiency, and the bytes that a process sends a step: of a ring, 2 (n − 1) / n times
those of the gradient. The all-reduce alone is timed, too.

    python benchmarks/scaling.py
"""

import argparse
import json
import math
import os
import socket
import statistics
import subprocess
import sys
from pathlib import Path

TASKS, STEPS = 8, 12

RATE, LINK, HOP = 2e13, 12.5e9, 1e-5
"""Assumed of a cluster: operations a second of a device, bytes a second (100 Gb/s) and seconds a
message between two."""

COMBINED = 3e7
"""Bytes up to which XLA sends several arrays in one all-reduce on accelerators."""

NETWORKS = {
    "Conv4, Omniglot, 112 k": (112e3, 2.6e9),
    "Conv4, miniImageNet, 33 k": (33e3, 25e9),
    "ResNet-12, 84 by 84, 8 M, first order": (8e6, 2.1e12),
    "transformer, 1 G, 9 steps of 256 tokens": (1e9, 1.4e13),
}
"""Parameters, and operations of one task's meta-gradient."""


def on_paper(parameters, operations, devices):
    """Seconds of work and of the all-reduce of a meta-step of one task a device."""
    size = 4 * parameters
    sent, messages = 2 * (devices - 1) / devices * size, math.ceil(size / COMBINED)
    return operations / RATE, sent / LINK + messages * 2 * math.log2(devices) * HOP


def work(asked):
    """A process: trains, and says how long its steps took."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[asked.process_id % len(cores)]})
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=1"
    import time

    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import PartitionSpec as P

    import adaptax as ax
    from adaptax import processes

    if asked.processes > 1:
        ax.distributed(asked.coordinator, asked.processes, asked.process_id)
    rng, key = np.random.default_rng(0), jax.random.key(0)
    x = rng.integers(0, 255, (100 * 20, 28, 28, 1), dtype=np.uint8)
    tasks = ax.tasks.from_arrays(x, np.repeat(np.arange(100), 20), way=5, shot=1, query=15)
    model = ax.models.Conv4(out=5, key=key, image=(28, 28, 1), filters=64, down="stride",
                            head="mean")  # fmt: skip
    learner, count = ax.MAML(ax.losses.cross_entropy, 0.4, 5), TASKS * asked.processes
    result = ax.fit(learner, model, tasks.train, steps=STEPS, meta_batch=count, chunk=1, key=key)
    seconds = [record["seconds"] for record in result.history][2:]
    leaves = jax.tree.leaves(ax.tree.parameters(result.last))
    said = {
        "seconds": statistics.median(seconds), "all": [round(each, 4) for each in seconds],
        "parameters": sum(leaf.size for leaf in leaves),
        "gradient_bytes": sum(leaf.nbytes for leaf in leaves),
    }  # fmt: skip
    if asked.processes > 1:
        mesh = processes.mesh_of_all(asked.processes)
        own = processes.sharded([jnp.ones((1, *leaf.shape)) for leaf in leaves], mesh)
        reduce = jax.jit(
            jax.shard_map(
                lambda own: jax.tree.map(lambda leaf: jax.lax.pmean(leaf, mesh.axis_names), own),
                mesh=mesh, in_specs=P(mesh.axis_names), out_specs=P(mesh.axis_names),
                check_vma=False,
            )
        )  # fmt: skip
        times = []
        for _ in range(30):
            began = time.perf_counter()
            jax.block_until_ready(reduce(own))
            times.append(time.perf_counter() - began)
        said["all_reduce_seconds"] = statistics.median(times[5:])
    if processes.first():
        print("@" + json.dumps(said), flush=True)


def measure(count):
    """What the first of so many processes says."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = dict(os.environ, JAX_PLATFORMS="cpu")
    members = [
        subprocess.Popen(
            [sys.executable, __file__, "--worker", "--processes", str(count), "--process-id",
             str(i), "--coordinator", f"127.0.0.1:{port}"],
            stdout=subprocess.PIPE, text=True, env=env,
        )
        for i in range(count)
    ]  # fmt: skip
    said = [member.communicate()[0] for member in members]
    line = next(line for line in said[0].splitlines() if line.startswith("@"))
    found = json.loads(line[1:])
    found["bytes_sent"] = round(2 * (count - 1) / count * found["gradient_bytes"])
    return found


def main(asked):
    from measure import CORES, save, table

    found = {count: measure(count) for count in asked.counts}
    alone = found[1]["seconds"]
    for count, each in found.items():
        share = min(count, CORES) / count  # of a core that each process has
        each["efficiency"] = alone / each["seconds"] / share
        each["cores"] = min(count, CORES)
    rows = [
        [count, each["cores"], TASKS * count, each["seconds"], f"{each['efficiency']:.1%}",
         f"{each['bytes_sent']:,}", each.get("all_reduce_seconds", 0.0)]
        for count, each in found.items()
    ]  # fmt: skip
    headings = ["processes", "cores", "tasks", "s a meta-step", "efficiency", "bytes sent",
                "s of all-reduce"]  # fmt: skip
    table(f"Weak scaling, Omniglot 5-way 1-shot, {TASKS} tasks a process", headings, rows)
    sizes = (8, 64, 256, 1024)
    model = {
        name: {n: on_paper(*of, n)[0] / sum(on_paper(*of, n)) for n in sizes}
        for name, of in NETWORKS.items()
    }
    rows = [[name, *(f"{of[n]:.0%}" for n in sizes)] for name, of in model.items()]
    table("On paper: efficiency of one task a device", ["network", *map(str, sizes)], rows)
    save(asked.out, tasks_a_process=TASKS, by_processes=found, on_paper=model)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/scaling.json")
    parser.add_argument("--worker", action="store_true")
    parser.add_argument("--coordinator")
    parser.add_argument("--processes", type=int)
    parser.add_argument("--process-id", type=int)
    asked = parser.parse_args()
    work(asked) if asked.worker else main(asked)

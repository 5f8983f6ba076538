"""What the benchmarks share: workers in processes of their own, taking turns, and tables.

Each implementation runs in its own process, so that peak memories do not add up, and each waits
for its turn, so that a change in the machine's load falls on all of them alike.
"""

import contextlib
import importlib.metadata
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
RESULTS = Path(__file__).parent / "results"


def host_devices():
    """Makes JAX see one CPU device for each core; to be called before JAX is imported."""
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={CORES}".strip()


def say(**message):
    """From a worker to the benchmark."""
    print("@" + json.dumps(message), flush=True)


def turn():
    """In a worker: waits for its turn; whether there is one."""
    return sys.stdin.readline().strip() == "go"


def serve(run, **info):
    """In a worker that is warm: does `run()` whenever its turn comes."""
    say(**info)
    forget_peak()
    while turn():
        start, cpu = time.perf_counter(), time.process_time()
        run()
        say(seconds=time.perf_counter() - start, cpu_seconds=time.process_time() - cpu)
    farewell()


def farewell():
    """The last message of a worker."""
    say(peak_mb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, running_mb=peak())


def forget_peak():
    """From here on, `peak` is that of what follows, where the system allows it."""
    with contextlib.suppress(OSError):  # not Linux, or not allowed: the whole process's peak
        Path("/proc/self/clear_refs").write_text("5")


def peak():
    """Peak resident memory in MB, since `forget_peak` where that works."""
    return _status("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def resident():
    """Resident memory in MB."""
    return _status("VmRSS")


def _status(name):
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(name))
    except (OSError, StopIteration):
        return 0.0


class Worker:
    """A benchmark's script, started again as `script --worker name`."""

    def __init__(self, script, name):
        self.name = name
        self.process = subprocess.Popen(
            [sys.executable, script, "--worker", name],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.info = self.hear()

    def hear(self):
        for line in self.process.stdout:
            if line.startswith("@"):
                return json.loads(line[1:])
        raise RuntimeError(f"the worker {self.name} ended with {self.process.wait()}")

    def go(self):
        """One turn: wall-clock seconds, and processor seconds, which other programs change less."""
        self.tell("go")
        heard = self.hear()
        return heard["seconds"], heard["cpu_seconds"]

    def stop(self):
        self.tell("stop")
        last = self.hear()
        self.process.communicate()
        return last

    def tell(self, word):
        self.process.stdin.write(word + "\n")
        self.process.stdin.flush()


def take_turns(script, names, repeats):
    """`{name: record}`, each with the seconds of its `repeats` turns and their medians."""
    workers = [Worker(script, name) for name in names]
    seconds = {name: [] for name in names}
    for _ in range(repeats):
        for worker in workers:
            seconds[worker.name].append(worker.go())
    return {
        w.name: {
            **w.info,
            **w.stop(),
            "seconds": statistics.median(wall for wall, _ in seconds[w.name]),
            "cpu_seconds": statistics.median(cpu for _, cpu in seconds[w.name]),
            "all_seconds": [round(wall, 5) for wall, _ in seconds[w.name]],
        }
        for w in workers
    }


def table(title, columns, rows):
    """Prints a table; numbers to three digits."""
    made = Table(title=title)
    for i, column in enumerate(columns):
        made.add_column(column, justify="left" if i == 0 else "right")
    for row in rows:
        made.add_row(*(f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in row))
    Console(width=130).print(made)


MATMUL = """
import time, jax, jax.numpy as jnp
a = jax.random.normal(jax.random.key(0), (2048, 2048))
product, best = jax.jit(jnp.matmul), float("inf")
for _ in range(9):
    start = time.perf_counter()
    product(a, a).block_until_ready()
    best = min(best, time.perf_counter() - start)
print(2e-9 * 2048**3 / best)
"""


def matmul_peak():
    """GFLOP/s of XLA's product of large float32 matrices on all cores."""
    out = subprocess.run([sys.executable, "-c", MATMUL], stdout=subprocess.PIPE, check=True)
    return float(out.stdout)


def machine(peak):
    """Prints what is measured on."""
    print(f"{_cpu()}, {CORES} cores, {peak:.0f} GFLOP/s in a float32 matrix product", flush=True)


def save(path, **content):
    """Results as JSON, with what they were measured on."""
    versions = {}
    for name in ("adaptax", "jax", "jaxlib", "equinox", "optax", "flax", "torch", "numpy"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    record = {
        "command": " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
        "hardware": {
            "cpu": _cpu(), "cores": CORES, "machine": platform.machine(),
            "load_average": round(os.getloadavg()[0], 2),
        },
        "versions": {"python": platform.python_version(), **versions},
        **content,
    }  # fmt: skip
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")


def _cpu():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()

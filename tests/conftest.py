"""Fixtures of all tests, and how XLA is to compile for them."""

import gc
import hashlib
import os
import platform
import shutil
import signal
import subprocess
import sys
from pathlib import Path

# Before JAX starts its backend: four host devices, so that sharding can be tested anywhere, and
# little optimisation, since tests compile much and compute little. The older emitters of loops
# compile in a third of the time of those that XLA would take, in one part in half of that.
FLAGS = {
    "--xla_force_host_platform_device_count": "4",
    "--xla_backend_optimization_level": "0",
    "--xla_llvm_disable_expensive_passes": "true",
    "--xla_cpu_use_fusion_emitters": "false",
    "--xla_cpu_parallel_codegen_split_count": "1",
}


def understood(flags):
    """Whether this XLA knows the flags; it ends the process if not."""
    start = [sys.executable, "-c", "import jax; jax.local_devices()"]
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    return subprocess.run(start, env=environment, capture_output=True).returncode == 0


given = os.environ.get("XLA_FLAGS", "")
missing = [f"{name}={value}" for name, value in FLAGS.items() if name not in given]
if missing and not understood(" ".join([given, *missing])):
    missing = [flag for flag in missing if "device_count" in flag]  # slower, and as good
os.environ["XLA_FLAGS"] = " ".join([given, *missing]).strip()


def processor() -> str:
    """What compiled programs depend on, in a few letters."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else [platform.processor()]
    flags = sorted({line for line in lines if line.startswith(("flags", "Features"))})
    return hashlib.sha256("\n".join([platform.machine(), *flags]).encode()).hexdigest()[:12]


# Compiled programs are shared by the workers and by later runs: nearly all of the time that tests
# take is compilation. JAX leaves out programs that call the host.
PROGRAMS = Path(__file__).parents[1] / ".pytest_cache" / "programs"
MOST = 4 * 2**30
for name, value in {
    "JAX_COMPILATION_CACHE_DIR": str(PROGRAMS / processor()),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}.items():
    os.environ.setdefault(name, value)

# In the background of a shell Ctrl-C is ignored, and so it stays in a training.
signal.signal(signal.SIGINT, signal.default_int_handler)

import jax  # noqa: E402
import pytest  # noqa: E402


def pytest_configure(config):
    """Programs of old are thrown away, once they are many."""
    if hasattr(config, "workerinput"):
        return
    size = sum(file.stat().st_size for file in PROGRAMS.glob("*/*"))
    if size > MOST:
        shutil.rmtree(PROGRAMS)


MOST_MEMORY, MOST_MAPS = 4 * 2**30, 20_000


@pytest.fixture(autouse=True, scope="module")
def forget_programs():
    """Compiled programs go once they fill the memory, or the maps of which a process has 65,530."""
    yield
    process = Path("/proc/self")
    if process.exists():
        pages = int((process / "statm").read_text().split()[1])
        with (process / "maps").open("rb") as maps:
            count = sum(1 for _ in maps)
        if pages * os.sysconf("SC_PAGE_SIZE") < MOST_MEMORY and count < MOST_MAPS:
            return
    jax.clear_caches()
    gc.collect()


@pytest.fixture
def x64():
    """Double precision for one test."""
    with jax.enable_x64(True):
        yield

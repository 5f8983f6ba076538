"""Fixtures of all tests, and how XLA is to compile for them."""

import gc
import os

# Before JAX starts its backend: four host devices, so that sharding can be tested anywhere, and
# little optimisation, since tests compile much and compute little.
FLAGS = {
    "--xla_force_host_platform_device_count": "4",
    "--xla_backend_optimization_level": "0",
    "--xla_llvm_disable_expensive_passes": "true",
}
given = os.environ.get("XLA_FLAGS", "")
missing = (f"{name}={value}" for name, value in FLAGS.items() if name not in given)
os.environ["XLA_FLAGS"] = " ".join([given, *missing]).strip()

import jax  # noqa: E402
import pytest  # noqa: E402


@pytest.fixture(autouse=True, scope="module")
def forget_programs():
    """Every file's compiled programs go with it: together they would fill the memory."""
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture
def x64():
    """Double precision for one test."""
    with jax.enable_x64(True):
        yield

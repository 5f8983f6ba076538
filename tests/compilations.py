"""What JAX compiles."""

from contextlib import contextmanager

import jax
import pytest

_found = []


def _note(event, *_, **about):
    if event == "/jax/core/compile/backend_compile_duration":
        _found.append(about)


jax.monitoring.register_event_duration_secs_listener(_note)


@contextmanager
def compilations():
    """The list of what is compiled inside, or taken from the cache of programs on the disk."""
    before, found = len(_found), []
    yield found
    found += _found[before:]


@pytest.fixture(autouse=True, scope="module")
def fresh_programs():
    """For a file that counts: programs of other files are not there already."""
    jax.clear_caches()

"""Where adaptax keeps what it need not do twice: decoded images and compiled programs."""

from __future__ import annotations

import hashlib
import os
import platform
from contextlib import suppress
from pathlib import Path

PROGRAMS = 2**30
"""Bytes of compiled programs that are kept; those that were not used for the longest time go."""


def folder(kind: str) -> Path:
    """Return the folder of a cache: in `ADAPTAX_CACHE`, else in the user's cache folder.

    Args:
        kind: `"decoded"` for images, `"programs"` for what JAX compiled.
    """
    if given := os.environ.get("ADAPTAX_CACHE"):
        return Path(given).expanduser() / ("" if kind == "decoded" else kind)
    import pooch

    return Path(pooch.os_cache("adaptax")) / kind


def keep_programs() -> None:
    """Have JAX keep compiled programs, so that the next start of a command finds them.

    To be called before JAX is imported. JAX's own variables come first: JAX_COMPILATION_CACHE_DIR
    is another folder, JAX_ENABLE_COMPILATION_CACHE=false keeps none.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    with suppress(OSError, RuntimeError):  # without such a folder, programs are compiled anew
        programs = folder("programs") / _processor()
        programs.mkdir(parents=True, exist_ok=True)
        if os.access(programs, os.W_OK):
            os.environ["JAX_COMPILATION_CACHE_DIR"] = str(programs)
            os.environ.setdefault("JAX_COMPILATION_CACHE_MAX_SIZE", str(PROGRAMS))
            os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")


def _processor() -> str:
    """Return what programs for this processor have to be kept apart by: its instructions."""
    text = platform.machine() + platform.processor()
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        text += "\n".join(sorted({x for x in lines if x.startswith(("flags", "Features"))}))
    return hashlib.sha256(text.encode()).hexdigest()[:12]

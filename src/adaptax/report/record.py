"""Results as JSON: what they depend on beside their settings, and files of them."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from pathlib import Path
from typing import Any

import jax

from .. import io, processes
from ..engine.fingerprint import processor


def facts() -> dict[str, Any]:
    """Return hardware and versions, as JSON values."""
    device = jax.local_devices()[0]
    versions = {name: importlib.metadata.version(name) for name in ("adaptax", "jax", "equinox")}
    return {
        "hardware": {
            "cpu": processor(),
            "cores": os.cpu_count(),
            "backend": jax.default_backend(),
            "device": device.device_kind,
            "devices": jax.local_device_count(),
        },
        "versions": {"python": platform.python_version(), **versions},
    }


def keep(file: Path, result: Any) -> None:
    """Keep a result as JSON, atomically; the first of several processes does."""
    if processes.first():
        io.write_atomic(file, (dump(result) + "\n").encode())


def dump(value: Any) -> str:
    """Return JSON of a value, numbers that are not finite as null."""
    text = json.dumps(io.strict(value), indent=2, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # names of files need not be text
        return json.dumps(io.strict(value), indent=2)
    return text

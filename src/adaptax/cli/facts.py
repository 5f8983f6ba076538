"""What a result depends on beside its settings: hardware and versions."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
from pathlib import Path
from typing import Any

import jax


def facts() -> dict[str, Any]:
    """Hardware and versions, as JSON values."""
    device = jax.local_devices()[0]
    versions = {name: importlib.metadata.version(name) for name in ("adaptax", "jax", "equinox")}
    return {
        "hardware": {
            "cpu": cpu_model(),
            "cores": os.cpu_count(),
            "backend": jax.default_backend(),
            "device": device.device_kind,
            "devices": jax.local_device_count(),
        },
        "versions": {"python": platform.python_version(), **versions},
    }


def cpu_model() -> str:
    """The name of the processor."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def dump(value: Any) -> str:
    """JSON of it, numbers that are not finite as null."""
    return json.dumps(_finite(value), indent=2, ensure_ascii=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

"""What a result depends on beside its settings: the command, hardware and versions."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import platform
import shlex
from pathlib import Path
from typing import Any

import jax

from .. import io
from ..engine.fingerprint import processor


def facts() -> dict[str, Any]:
    """Hardware and versions, as JSON values."""
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


def command(asked: Any, *words: str, out: Path) -> str:
    """The words that ask for the same, in a given folder.

    Args:
        asked: a command, a dataclass.
        words: its name and the values of its positional fields.
        out: the folder.
    """
    line = ["adaptax", *words]
    for field in dataclasses.fields(asked):
        value = getattr(asked, field.name)
        if field.name in ("tasks", "runs", "out", "json") or value == field.default:
            continue
        many = value if isinstance(value, tuple) else () if value is True else (value,)
        line += [f"--{field.name.replace('_', '-')}", *map(str, many)]
    return shlex.join([*line, "--out", str(out)])


def keep(file: Path, result: Any) -> None:
    """Keep a result as JSON, atomically."""
    io.write_atomic(file, (dump(result) + "\n").encode())


def dump(value: Any) -> str:
    """JSON of it, numbers that are not finite as null."""
    text = json.dumps(io.strict(value), indent=2, ensure_ascii=False)
    # Names of files need not be text.
    return text if _is_text(text) else json.dumps(io.strict(value), indent=2)


def _is_text(text: str) -> bool:
    try:
        return bool(text.encode())
    except UnicodeEncodeError:
        return False

"""Where code comes from and which variables it reads: whether a library's, which stay as they are.

`adaptax.look` compares values within a process by it, `adaptax.engine.fingerprint` between two.
"""

from __future__ import annotations

import dis
import functools
import sys
import sysconfig
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

INSTALLED = (
    *(str(sysconfig.get_path(name)) for name in ("purelib", "platlib", "stdlib")),
    str(Path(__file__).parent),
    "<frozen",
)
"""Beginnings of the files of installed packages, and of this one."""


@functools.lru_cache(4096)
def installed(file: str) -> bool:
    """Return whether a file is of an installed package."""
    return file.startswith(INSTALLED)


@functools.lru_cache(4096)
def of_library(module: str | None) -> bool:
    """Return whether a module, by its name, is of an installed package or built in."""
    if module in sys.builtin_module_names:
        return True
    file = getattr(sys.modules.get(str(module)), "__file__", None)
    return module != "__main__" and module in sys.modules if file is None else installed(file)


def unchecked(function: types.FunctionType) -> Any:
    """Return the function that a checker of types wraps; any other as it is.

    The wrapper closes over objects that are made for every function.
    """
    file = function.__code__.co_filename
    checks = "jaxtyping" in file or "beartype" in file
    return function.__dict__.get("__wrapped__", function) if checks else function


def instructions(code: types.CodeType) -> Iterator[dis.Instruction | None]:
    """Iterate over the instructions of code, then of that within it; `None` between two."""
    yield from dis.get_instructions(code)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield None
            yield from instructions(constant)

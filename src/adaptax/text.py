"""Text of users in sentences and on terminals, settings in reports, and limits of numbers."""

from __future__ import annotations

import dataclasses
import functools
import re
import types
from typing import Any

MOST, LARGEST = 2**31 - 1, 3e38
"""Of the whole numbers and the numbers that users give: 32 bits, as sizes have, and float32."""


# Control characters but for tabs and ends of lines, separators of lines, what turns the direction
# of writing, and the bytes of file names that are no text.
_HIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def escaped(text: str) -> str:
    """Escape what would control a terminal, as `\\x1b`."""
    return _HIDDEN.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def shown(name: object, most: int = 200) -> str:
    """Return a name for a sentence: one line, control characters escaped, long ones cut.

    Args:
        name: such as a path.
        most: characters.
    """
    line = escaped(str(name)).replace("\n", "\\n").replace("\t", "\\t")
    return line if len(line) <= most else f"{line[: most // 2]}…{line[-(most // 2) :]}"


def readable(value: Any) -> Any:
    """Return a setting as a report says it: plain values as they are, functions by their names.

    What has no short name, such as an array or a function of one's own without a name, is
    `"given"`.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
        return [readable(part) for part in value]
    if isinstance(value, functools.partial):
        return _call(readable(value.func), value.args, value.keywords)
    if isinstance(value, types.FunctionType):
        name, _, inside = value.__qualname__.partition(".<locals>")
        if inside and value.__module__.startswith(("adaptax.", "optax.")):
            return _call(name, [cell.cell_contents for cell in value.__closure__ or ()], {})
        return "given" if inside or "<lambda>" in name else name
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        own = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return _call(type(value).__name__, [], own)
    return "given"


def _call(name: str, arguments: Any, named: dict[str, Any]) -> str:
    parts = [readable(part) for part in arguments]
    said = [", ".join(map(str, part)) if isinstance(part, list) else str(part) for part in parts]
    said += [f"{name}={readable(part)}" for name, part in named.items() if part is not None]
    return "given" if any("given" in part for part in said) else f"{name}({', '.join(said)})"

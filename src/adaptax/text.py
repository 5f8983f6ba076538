"""Text of users, such as names of files, in sentences and on terminals; limits of their numbers."""

from __future__ import annotations

import re

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

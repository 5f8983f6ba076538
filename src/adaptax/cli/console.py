"""Text for the terminal: shown as it is, never taken for markup or for control codes."""

from __future__ import annotations

import os
import sys
from typing import Any

from rich.console import Console
from rich.text import Text

from ..text import escaped


class Plain(Console):
    """A console on which text is text: no markup, no emoji codes, control characters escaped."""

    def __init__(self, **how: Any):
        super().__init__(highlight=False, markup=False, emoji=False, **how)

    def render_str(self, text: str, **how: Any) -> Text:
        """Text of any origin: what is printed, cells and titles of tables."""
        return super().render_str(escaped(text), **how)

    def on_broken_pipe(self) -> None:
        """Raise, and leave the exit code to the entry point."""
        raise BrokenPipeError


_silent = False


def be_silent() -> None:
    """Show neither results nor progress from here on: another process does."""
    global _silent
    _silent = True
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - as long as the process


def is_silent() -> bool:
    """Return whether another process shows results and progress."""
    return _silent


def consoles() -> tuple[Console, Console]:
    """For results, on stdout, and for progress, on stderr."""
    wide = None if sys.stdout.isatty() else 140
    return Plain(width=wide, quiet=_silent), Plain(stderr=True, quiet=_silent)


def say(text: str) -> None:
    """A line on stderr."""
    Plain(stderr=True, soft_wrap=True).print(f"adaptax: {text}")

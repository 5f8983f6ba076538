"""The command line, `adaptax`."""

from .app import main

__all__ = ["main"]

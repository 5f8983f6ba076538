"""The entry point: parses, dispatches, and turns errors into one sentence and an exit code.

Nothing here imports JAX before a command is run, so that `--help` is quick.
"""

from __future__ import annotations

import importlib
import itertools
import os
import sys
import tempfile
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .. import __version__
from ..caches import keep_programs
from ..process import Interrupted, OutOfTime, ProcessLost, at_most
from ..text import shown
from . import commands
from .parsing import parse

COMMANDS: dict[str, tuple[type, str]] = {
    "train": (commands.Train, "training:train"),
    "evaluate": (commands.Evaluate, "inspection:evaluate"),
    "compare": (commands.Compare, "studies:compare"),
    "ablate": (commands.Ablate, "studies:ablate"),
    "predict": (commands.Predict, "inspection:predict"),
    "pretrain": (commands.Pretrain, "extractor:pretrain"),
    "embed": (commands.Embed, "extractor:embed"),
    "runs": (commands.Runs, "runs:show"),
    "sweep": (commands.Sweep, "sweep:sweep"),
    "recipes list": (commands.RecipesList, "cookbook:show_all"),
    "recipes show": (commands.RecipesShow, "cookbook:show"),
    "recipes run": (commands.RecipesRun, "training:run_recipe"),
    "analyze gradients": (commands.AnalyzeGradients, "studies:gradients"),
    "analyze taylor": (commands.AnalyzeTaylor, "studies:taylor"),
    "analyze active": (commands.AnalyzeActive, "studies:active"),
}
"""The options of every command, and the function of `adaptax.cli` that runs it."""

TRY_AGAIN = 75
"""Exit code of a command whose minutes are over: `EX_TEMPFAIL` of sysexits.h."""

HOST_DEVICES = "--xla_force_host_platform_device_count"
PACKAGE = str(Path(__file__).parents[1])


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line; what `adaptax` on the shell calls.

    Args:
        args: words of the command; those of the process if `None`.

    Returns:
        0; 2 for bad input, and for faults of this package; 75 when the minutes of `--minutes` are
        over and there is more to do, or another process is gone; 130 for Ctrl-C. With
        ADAPTAX_DEBUG=1 errors are raised instead.
    """
    _open_streams()
    code = _run(list(sys.argv[1:] if args is None else args))
    try:
        sys.stdout.flush()
    except OSError:  # a full disk, which was told, or a reader that is gone: nothing more to say
        with suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return code


def _run(words: list[str]) -> int:
    """The exit code of a command; says on stderr what went wrong."""
    _share_cores(words)
    try:
        with _warnings_in_a_line():
            if words == ["--version"]:
                print(f"adaptax {__version__}")
            else:
                _call(parse(words, {name: kind for name, (kind, _) in COMMANDS.items()}))
            sys.stdout.flush()
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except ProcessLost as stop:
        _say(str(stop))
        return _leave(TRY_AGAIN)
    except Interrupted as stop:
        if not _is_silent():
            _say(str(stop))
        return TRY_AGAIN if isinstance(stop, OutOfTime) else 130
    except KeyboardInterrupt:
        _say("interrupted")
        return 130
    except BrokenPipeError:  # such as `adaptax recipes list | head`
        return 0
    except Exception as error:
        if os.environ.get("ADAPTAX_DEBUG"):
            raise
        if not _is_told(error):
            _say(f"error: {_sentence(error)}")
        return _leave(2)
    return 0


def _is_silent() -> bool:
    from .console import is_silent

    return is_silent()


def _is_told(error: Exception) -> bool:
    """Whether another process says it, which has the same error."""
    same = isinstance(error, FloatingPointError) or hasattr(error, "said_by_first")
    return same and _is_silent()


_joined = False


def _leave(code: int) -> int:
    """The exit code; of several processes at once, as the others may wait for this one."""
    if _joined:
        with suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)
    return code


def _own_stdout() -> None:
    """Keep stdout for what is printed here: the library that connects processes uses it, too."""
    with suppress(OSError, ValueError):
        sys.stdout.flush()
        kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.close(nowhere)
        sys.stdout = open(kept, "w", errors="backslashreplace")  # noqa: SIM115 - as long as it runs


def _join(options: object) -> None:
    """Join the other processes, if there are any; all but the first are silent."""
    global _joined
    if not hasattr(options, "coordinator"):
        return
    from .. import processes
    from .console import be_silent

    names = ("coordinator", "processes", "process_id")
    given = {name: getattr(options, name) for name in names}
    if given["coordinator"] == "auto":
        given["coordinator"] = None
    elif all(value is None for value in given.values()) and not processes.detected():
        return
    processes.check(**given)
    _own_stdout()
    processes.distributed(**given)
    _joined = processes.several()
    if not processes.first():
        be_silent()


def _call(options: object) -> None:
    """Run the command whose options these are."""
    keep_programs()
    import jax

    # Errors come with all their frames, which tell ours from those of others.
    jax.config.update("jax_traceback_filtering", "off")
    (place,) = (place for kind, place in COMMANDS.values() if kind is type(options))
    module, name = place.split(":")
    _join(options)
    with at_most(getattr(options, "minutes", None)):
        getattr(importlib.import_module(f".{module}", __package__), name)(options)


def _say(text: str) -> None:
    """Print a line on stderr."""
    from .console import say  # Rich takes its time

    say(text)


def _share_cores(words: Sequence[str] = ()) -> None:
    """Let JAX see a device for every core, over which heavy meta-batches are shared.

    Where a run goes on, as many as it began with, so that it gives the same numbers.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if HOST_DEVICES not in flags:
        cores = min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity")
                    else os.cpu_count() or 1, 8)  # fmt: skip
        cores = _devices_before(words) or max(cores // _beside(words), 1)
        os.environ["XLA_FLAGS"] = f"{flags} {HOST_DEVICES}={cores}".strip()


def _beside(words: Sequence[str]) -> int:
    """How many processes of this command share this machine, as far as its options say."""
    named = dict(itertools.pairwise(part for word in words for part in word.split("=", 1)))
    local = named.get("--coordinator", "").rpartition(":")[0] in ("localhost", "127.0.0.1")
    count = named.get("--processes", "1")
    return int(count) if local and count.isdecimal() and int(count) else 1


def _devices_before(words: Sequence[str]) -> int | None:
    """The devices that JAX saw when the runs in the folder of this command were begun."""
    options = ("--resume", "--run", "--out")
    split = [part for word in words for part in (word.split("=", 1) if "=" in word else [word])]
    named = [folder for option, folder in itertools.pairwise(split) if option in options]
    named += [f"runs/{name}" for name in words[2:3] if tuple(words[:2]) == ("recipes", "run")]
    for folder in named:
        for depth in ("", "*/", "*/*/"):
            for file in sorted(Path(folder).glob(f"{depth}checkpoint.safetensors")):
                from ..engine.run import Run

                with suppress(ValueError, OSError):
                    made_by = Run(file.parent).recorded().get("made_by", {})
                    if (devices := int(made_by.get("local devices", 0))) > 0:
                        return devices
    return None


def _open_streams() -> None:
    """Let any text be written, whatever the locale, and although a stream is closed."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - as long as the process
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


@contextmanager
def _warnings_in_a_line() -> Iterator[None]:
    def show(message: Warning | str, *where: Any, **more: Any) -> None:
        if not _is_silent():
            _say(f"warning: {_line(message)}")

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


def _sentence(error: Exception) -> str:
    """What went wrong, in a line.

    A `ValueError` of this package is about what the user gave. One from elsewhere met something
    that should have been checked before: a fault of ours, as are all other exceptions.
    """
    if isinstance(error, OSError) and error.strerror:
        where = f"{shown(error.filename)}: " if error.filename else ""
        return f"{where}{error.strerror}"
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
        return (
            "there is not enough memory for this; ask for fewer or smaller examples, tasks or "
            f"networks ({_line(error)})"
        )
    if (
        isinstance(error, ModuleNotFoundError)
        or "determine home directory" in str(error)
        or (isinstance(error, ValueError | OSError | FloatingPointError) and _is_ours(error))
    ):
        return _line(error)
    return (
        f"this is a fault of adaptax: {type(error).__name__}, {_line(error, 300)}; please report "
        f"it with the command and {_log(error)}"
    )


def _line(text: object, most: int = 2000) -> str:
    return shown(" ".join(str(text).split()), most) or type(text).__name__


def _is_ours(error: BaseException) -> bool:
    """Whether it was raised in this package, and not in what it calls."""
    frames = list(traceback.walk_tb(error.__traceback__))
    return bool(frames) and frames[-1][0].f_code.co_filename.startswith(PACKAGE)


def _log(error: BaseException) -> str:
    """Where the traceback is, which is written to a file."""
    lines = traceback.format_exception(error)
    try:
        handle, file = tempfile.mkstemp(prefix="adaptax-", suffix=".log")
        with os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace") as log:
            log.write(f"adaptax {' '.join(sys.argv[1:])}\n\n{''.join(lines)}")
    except OSError:
        return "what it prints with ADAPTAX_DEBUG=1 (no log file could be written)"
    return f"the traceback in {file}"

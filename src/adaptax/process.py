"""What a run asks of its process: to stop in time with all saved, one process a folder, no fork."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import socket
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import IO, Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


class Interrupted(Exception):
    """Ctrl-C, with what it says on the way out: how to resume."""


class OutOfTime(Interrupted):
    """The minutes that a command was given are over, likewise."""


class ProcessLost(Interrupted):
    """Another process of several that work together is gone, likewise."""


class TimeOver(KeyboardInterrupt):
    """The minutes are over in the middle of something that is done as a whole, such as a test."""


def ended(by_time: bool, kept: str) -> Interrupted:
    """Return the exception that ends a command.

    Args:
        by_time: whether its minutes are over; else it was interrupted.
        kept: what is saved, and how to go on.
    """
    return OutOfTime(f"out of time, {kept}") if by_time else Interrupted(f"interrupted, {kept}")


_ends: ContextVar[float] = ContextVar("ends", default=math.inf)


@contextlib.contextmanager
def at_most(minutes: float | None) -> Iterator[None]:
    """Let what is inside take so many minutes: trainings stop before they are over, and save.

    Args:
        minutes: from now on; without end if `None`.
    """
    token = _ends.set(math.inf if minutes is None else time.monotonic() + 60 * minutes)
    try:
        yield
    finally:
        _ends.reset(token)


def time_left() -> float:
    """Return the seconds until the minutes of `at_most` are over; infinite without."""
    return _ends.get() - time.monotonic()


_forked = False
_locks: set[IO[str]] = set()


def _after_fork() -> None:
    """In the child: its threads are gone, and a lock belongs to the parent."""
    global _forked
    bridge = sys.modules.get("jax._src.xla_bridge")
    started: Callable[[], bool] | None = getattr(bridge, "backends_are_initialized", None)
    _forked = _forked or (started is not None and started())
    for file in _locks:
        file.close()
    _locks.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def check_not_forked() -> None:
    """Refuse to compute in a process that was forked after JAX had started: it would hang.

    Raises:
        RuntimeError: in such a process.
    """
    if _forked:
        raise RuntimeError(
            "this process was forked from one in which JAX had started, and JAX would wait for "
            "ever for threads that a fork does not copy; start it afresh, for instance by "
            'multiprocessing.get_context("spawn"), or fork before anything is computed'
        )


@contextlib.contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Turns the first Ctrl-C or SIGTERM into a flag; the second one ends the process as ever.

    A signal that is ignored, as SIGINT is in a shell's background jobs, or SIGTERM where the
    program has a handler of its own, stays as it is.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    pressed = threading.Event()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    taken = {
        number: handler
        for number, handler in before.items()
        if handler is signal.SIG_DFL or (number == signal.SIGINT and callable(handler))
    }

    def restore() -> None:
        for number, handler in taken.items():
            signal.signal(number, handler)

    def handle(number: int, frame: Any) -> None:
        pressed.set()
        restore()

    for number in taken:
        signal.signal(number, handle)
    try:
        yield pressed.is_set
    finally:
        restore()


def is_locked(folder: Path) -> bool:
    """Return whether a process has locked a folder; false where that cannot be told."""
    if fcntl is None:
        return False
    try:
        with (folder / ".lock").open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def lock(folder: Path) -> Callable[[], None]:
    """Lock a folder for this process, until the function that is returned is called.

    The lock dies with the process, however it ends. Where the file system has no locks, a warning
    says so, and nothing is locked.

    Raises:
        BlockingIOError: naming folder and process, if another one holds the lock.
    """
    path = folder / ".lock"
    while True:
        file = path.open("a+")
        try:
            if fcntl is None:
                raise OSError("this system has no flock")
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read(200).strip()
            file.close()
            raise BlockingIOError(
                f"another process works on {folder}"
                + (f" ({owner})" if owner else "")
                + "; wait for its end or stop it, or choose another folder"
            ) from None
        except OSError as error:
            warnings.warn(f"{folder} cannot be locked ({error}); see to it that no other process "
                          "works on it", stacklevel=3)  # fmt: skip
            file.close()
            path.unlink(missing_ok=True)
            return lambda: None
        # Its last owner may have removed the file after it was opened here.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(path.stat(), os.fstat(file.fileno())):
                break
        file.close()
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    _locks.add(file)

    def release() -> None:
        if file in _locks:  # not in a fork, to which it does not belong
            _locks.discard(file)
            path.unlink(missing_ok=True)
            file.close()

    return release

"""A run folder: configuration, metrics, TensorBoard events and the checkpoint to resume from."""

from __future__ import annotations

import functools
import json
import math
import os
import time
import warnings
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, Literal, ParamSpec, TypeVar

import jax.numpy as jnp

from .. import io, processes
from ..process import lock
from .fingerprint import UNKNOWN

Resume = bool | Literal["auto"]
"""Go on with a run; `"auto"`: if there is one, and begin it if there is none."""

Facts = dict[str, dict[str, Any]]
"""JSON values that a checkpoint holds beside the state, in groups: in `plan` what the run depends
on, by name, which is compared when it is resumed; in `made_by` versions and machine, which are
noted; and what the caller compares by himself."""


class Run:
    """A folder that holds one training run.

        config.json         what was asked for (written by the caller, see `write_config`)
        metrics.jsonl       one JSON record for every chunk of meta-steps
        events.*            the same for TensorBoard
        checkpoint.safetensors   the state to resume from, replaced atomically

    A `with` block holds the folder for this process; `fit` does so by itself.

    Args:
        path: the folder; created if need be.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        self._events: Any = None
        self._release: Callable[[], None] | None = None

    @property
    def metrics_file(self) -> Path:
        """One JSON record a line."""
        return self.path / "metrics.jsonl"

    @property
    def checkpoint_file(self) -> Path:
        """The state to resume from."""
        return self.path / "checkpoint.safetensors"

    @property
    def config_file(self) -> Path:
        """What was asked for."""
        return self.path / "config.json"

    @property
    def held(self) -> bool:
        """Whether the folder is this object's to write to."""
        return self._release is not None

    def __enter__(self) -> Run:
        """Hold the folder, so that no other process writes to it, and tidy it up.

        Raises:
            BlockingIOError: if another process holds it.
        """
        if not processes.first():
            self._release = lambda: None
            return self
        io.make_folder(self.path)
        self._release = lock(self.path)
        ours = {file.name for file in (self.metrics_file, self.checkpoint_file, self.config_file)}
        for file in self.path.glob(".*.tmp"):
            name = io.TEMPORARY.fullmatch(file.name)
            # Ours are of a process that was killed, as the folder is held; others may be at work.
            if name and (name[1] in ours or io.is_stale(file)):
                file.unlink(missing_ok=True)
        return self

    def __exit__(self, *error: object) -> None:
        """Let go of it, every file closed."""
        if self._events is not None:
            self._events.close()
            self._events = None
        if self._release is not None:
            self._release()
            self._release = None

    def write_config(self, config: dict[str, Any]) -> None:
        """Keep what was asked for, as JSON."""
        if processes.first():
            io.write_atomic(self.config_file, (json.dumps(config, indent=2) + "\n").encode())

    def config(self) -> dict[str, Any]:
        """What was asked for.

        Raises:
            FileNotFoundError: if the folder holds no run.
            ValueError: if its configuration cannot be read.
        """
        if not self.config_file.is_file():
            raise FileNotFoundError(f"{self.path} holds no run: there is no config.json in it")
        try:
            found = json.loads(self.config_file.read_bytes())
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{self.config_file} is not valid JSON ({error})") from None
        if not isinstance(found, dict):
            raise ValueError(f"{self.config_file} is not the configuration of a run")
        return found

    def recorded(self, resume: Resume = True) -> Facts:
        """The facts of the run to resume; nothing where a new one begins.

        Raises:
            FileNotFoundError: if a run is to be resumed and there is no such folder.
            ValueError: if the folder holds a run and none is to be resumed, or the checkpoint is
                damaged.
        """
        if self.checkpoint_file.exists():
            if not resume:
                raise ValueError(
                    f"{self.path} already holds a run; resume it, or choose another folder"
                )
            return self._read()[1]
        # Without a checkpoint, whoever began a run here was stopped before the first one.
        if resume is True and not self.path.is_dir():
            raise FileNotFoundError(f"there is no checkpoint at {self.checkpoint_file}")
        return {}

    def begin(
        self,
        state: Any,
        facts: Facts,
        resume: Resume,
        *,
        grows: str = "",
        free: Collection[str] = (),
    ) -> tuple[Any, list[Any]]:
        """The state and history to go on from; `state` and nothing for a new run.

        Holds the folder from here on. Warns if versions or machine are others.

        Args:
            state: of the beginning.
            facts: of this call.
            resume: see `Resume`.
            grows: a number of the plan that may be larger than it was.
            free: what of the plan may be otherwise.

        Raises:
            FileNotFoundError: if there is nothing to resume.
            ValueError: if a new run would overwrite one, or the plan differs from the one resumed.
        """
        return processes.state_from_first(
            lambda: self._begun(state, facts, resume, grows, free), like=state
        )

    def _begun(
        self, state: Any, facts: Facts, resume: Resume, grows: str, free: Collection[str]
    ) -> tuple[Any, list[Any]]:
        """`begin`, in the first process alone."""
        recorded = self.recorded(resume)
        if not self.held:
            self.__enter__()
            recorded = self.recorded(resume)
        if not recorded:
            self.metrics_file.write_bytes(b"")
            return state, []
        before, now = recorded["plan"], facts["plan"]
        before = {**before, **{name: now[name] for name in free}}
        if isinstance(old := before.get(grows), int) and old < now[grows]:
            before = {**before, grows: now[grows]}
        if changed := differences(before, now):
            raise ValueError(
                f"the run in {self.path} cannot be resumed with other settings: {changed}"
            )
        if unknown := [name for name, text in now.items() if UNKNOWN in str(text)]:
            warnings.warn(
                f"what is in {', '.join(unknown)} cannot be compared; see to it that it is as it "
                f"was when the run in {self.path} began",
                stacklevel=4,
            )
        state = self.load(state)
        made_by = {"processes": "1", **recorded.get("made_by", {})}
        if changed := differences(made_by, facts.get("made_by", {})):
            warnings.warn(
                f"the run in {self.path} goes on under other conditions: {changed}; its numbers "
                "agree with those of a run without a break to rounding, not to the bit",
                stacklevel=4,
            )
        # A killed process may have logged chunks after its last checkpoint; they come again.
        records = [r for r in self.metrics() if r["step"] <= int(state.step)]
        lines = "".join(_line(record) for record in records)
        io.write_atomic(self.metrics_file, lines.encode())
        return state, records

    def load(self, like: Any) -> Any:
        """The state in the checkpoint; see `adaptax.load`.

        Raises:
            FileNotFoundError: if there is none.
            ValueError: if it is damaged, of another model, or holds NaN.
        """
        found = self._read()[0]
        for name, array in found.items():
            if jnp.issubdtype(array.dtype, jnp.inexact) and bool(jnp.isnan(array).any()):
                raise ValueError(
                    f"the checkpoint in {self.path} holds NaN in {name}, which no training leaves "
                    "there; begin the run again in another folder"
                )
        return io.fill(self.checkpoint_file, found, like)

    def checkpoint(self, state: Any, facts: Facts) -> None:
        """Replace the checkpoint; the first of several processes does."""
        if not processes.first():
            return
        with self.metrics_file.open("ab") as file:  # no step without its record
            os.fsync(file.fileno())
        io.save(self.checkpoint_file, state, **facts)

    def log(self, record: dict[str, Any]) -> None:
        """Append a record to the metrics and to the TensorBoard events, as `checkpoint`."""
        if not processes.first():
            return
        with self.metrics_file.open("a") as file:
            file.write(_line(record))
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.summary import scalar

        if self._events is None:
            # Not a SummaryWriter, whose threads and pipes stay, and which has words at exit. By the
            # step, as a run that is resumed within a second would write over its events.
            prefix, suffix = str(self.path / "events"), f".{record['step']}"
            self._events = EventsWriter(prefix, suffix)
        flat = {k: v for k, v in record.items() if k not in ("step", "validation")}
        flat |= {f"validation/{k}": v for k, v in record.get("validation", {}).items()}
        for name, value in flat.items():
            if math.isfinite(value):  # others have no place in a plot
                values = {"step": record["step"], "summary": scalar(name, value)}
                self._events.write_event(Event(wall_time=time.time(), **values))
        self._events.flush()

    def metrics(self) -> list[dict[str, Any]]:
        """Every record so far, by step; a line that holds none, cut off or damaged, is left out."""
        lines = self.metrics_file.read_bytes().split(b"\n") if self.metrics_file.exists() else []
        records = {}
        for line in lines:
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if _is_record(record):
                records[record["step"]] = record
        return [records[step] for step in sorted(records)]

    def _read(self) -> tuple[dict[str, Any], Facts]:
        arrays, metadata = io.read(self.checkpoint_file)
        if not metadata.get("plan") or not all(isinstance(f, dict) for f in metadata.values()):
            raise ValueError(f"{self.checkpoint_file} is not the checkpoint of a run")
        return arrays, metadata


Arguments = ParamSpec("Arguments")
Value = TypeVar("Value")


def as_run(run: Run | str | os.PathLike[str] | None) -> Run | None:
    """A run by its path; a run, or none, as it is."""
    return run if run is None or isinstance(run, Run) else Run(run)


def opened(run: Run | str | os.PathLike[str] | None, resume: Resume) -> tuple[Run | None, Facts]:
    """The run, if there is one, and the facts of what is to be resumed.

    Raises:
        ValueError: if there is to be one and is none; and as `Run.recorded`.
    """
    if resume and run is None:
        raise ValueError(f"resume={resume!r} wants run=, the folder of the run to continue")
    run = as_run(run)
    return run, {} if run is None else processes.from_first(lambda: run.recorded(resume))


def lets_go(function: Callable[Arguments, Value]) -> Callable[Arguments, Value]:
    """Decorate what works on its argument `run`: a folder that it took hold of is let go."""

    @functools.wraps(function)
    def call(*args: Any, run: Any = None, **how: Any) -> Any:
        run = as_run(run)
        held = run is not None and run.held
        try:
            return function(*args, run=run, **how)
        finally:
            if run is not None and not held:
                run.__exit__()

    return call


NAMED = ("tasks.name", "validate.name", "images.name")
"""Names of data, which may be those of the folders that they lie in; their content is compared."""


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What two plans differ in, in words; empty if they agree.

    Of a thing and its parts, `learner` and `learner.loss`, the thing alone is named.
    """
    names = [n for n in {**now, **before} if n not in before or before[n] != now.get(n)]
    names = [n for n in names if n not in NAMED]
    parent = lambda name: any(name.startswith((f"{n}.", f"{n}[")) for n in names)  # noqa: E731
    found = [n for n in names if not parent(n)]
    said = [f"{n} was {before.get(n, 'absent')} and is {now.get(n, 'absent')}" for n in found[:4]]
    more = [f"{len(found) - 4} more"] if len(found) > 4 else []
    return ", ".join(said + more)


def _is_record(record: Any) -> bool:
    """Whether `fit` may have written it: numbers by name, and a step that a run can reach."""

    def numbers(values: Any) -> bool:
        return isinstance(values, dict) and all(
            value is None
            or (type(value) is float and abs(value) < math.inf)
            or (type(value) is int and abs(value) < 2**63)
            for value in values.values()
        )

    if not isinstance(record, dict) or not numbers(record.get("validation", {})):
        return False
    step, seconds = record.get("step"), record.get("seconds")
    return (
        numbers({name: value for name, value in record.items() if name != "validation"})
        and type(step) is int
        and 0 <= step < 2**31
        and seconds is not None
        and "loss" in record
    )


def _line(record: dict[str, Any]) -> str:
    return json.dumps(io.strict(record), allow_nan=False) + "\n"

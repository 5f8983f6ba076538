"""A run folder: configuration, metrics, TensorBoard events and the checkpoint to resume from."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from . import io


class Run:
    """A folder that holds one training run.

        config.json         what was asked for (written by the caller, see `write_config`)
        metrics.jsonl       one JSON record for every chunk of meta-steps
        events.*            the same for TensorBoard
        checkpoint.safetensors   the state to resume from, replaced atomically

    Args:
        path: the folder; created if need be.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        self._events: Any = None

    @property
    def metrics_file(self) -> Path:
        """One JSON record a line."""
        return self.path / "metrics.jsonl"

    @property
    def checkpoint_file(self) -> Path:
        """The state to resume from."""
        return self.path / "checkpoint.safetensors"

    def write_config(self, config: dict[str, Any]) -> None:
        """Keep what was asked for, as JSON."""
        io.write_atomic(self.path / "config.json", (json.dumps(config, indent=2) + "\n").encode())

    def config(self) -> dict[str, Any]:
        """What was asked for.

        Raises:
            FileNotFoundError: if the folder holds no run.
            ValueError: if its configuration cannot be read.
        """
        file = self.path / "config.json"
        if not file.is_file():
            raise FileNotFoundError(f"{self.path} holds no run: there is no config.json in it")
        try:
            return json.loads(file.read_text())
        except json.JSONDecodeError as error:
            raise ValueError(f"{file} is not valid JSON ({error})") from None

    def begin(self, state: Any, plan: dict[str, Any], resume: bool) -> tuple[Any, list[Any]]:
        """The state and history to go on from; `state` and nothing for a new run.

        Raises:
            FileNotFoundError: if there is nothing to resume.
            ValueError: if a new run would overwrite one, or `plan` differs from the one resumed.
        """
        if not resume:
            if self.checkpoint_file.exists():
                raise ValueError(
                    f"{self.path} already holds a run; resume it, or choose another folder"
                )
            self.path.mkdir(parents=True, exist_ok=True)
            self.metrics_file.write_text("")
            return state, []
        before = io.read_metadata(self.checkpoint_file).get("plan", {})
        changed = [name for name in plan if before.get(name) != plan[name]]
        if changed:
            raise ValueError(
                f"the run in {self.path} cannot be resumed with other settings: "
                + ", ".join(f"{n} was {before.get(n)} and is {plan[n]}" for n in changed)
            )
        state = io.load(self.checkpoint_file, state)
        # A killed process may have logged chunks after its last checkpoint; they come again.
        records = [r for r in self.metrics() if r["step"] <= int(state.step)]
        lines = "".join(_line(record) for record in records)
        io.write_atomic(self.metrics_file, lines.encode())
        return state, records

    def checkpoint(self, state: Any, plan: dict[str, Any]) -> None:
        """Replace the checkpoint."""
        io.save(self.checkpoint_file, state, plan=plan)

    def log(self, record: dict[str, Any]) -> None:
        """Append a record to the metrics and to the TensorBoard events."""
        with self.metrics_file.open("a") as file:
            file.write(_line(record))
        if self._events is None:
            from tensorboardX import SummaryWriter

            self._events = SummaryWriter(str(self.path))
        flat = {k: v for k, v in record.items() if k not in ("step", "validation")}
        flat |= {f"validation/{k}": v for k, v in record.get("validation", {}).items()}
        for name, value in flat.items():
            if math.isfinite(value):  # others have no place in a plot
                self._events.add_scalar(name, value, record["step"])
        self._events.flush()

    def metrics(self) -> list[dict[str, Any]]:
        """Every record so far; a last line that was cut off is left out."""
        records = []
        text = self.metrics_file.read_text() if self.metrics_file.exists() else ""
        for line in text.splitlines():
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:
                break
        return [r for r in records if math.isfinite(r.get("step", math.nan))]


def _line(record: dict[str, Any]) -> str:
    return json.dumps(io.strict(record), allow_nan=False) + "\n"

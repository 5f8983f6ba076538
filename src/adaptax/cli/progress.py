"""The progress bar: loss, validation score, steps per second and time left."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from ..recipes.runs import Warn
from ..report import number


class Watcher:
    """Follows a training; `fit(watch=...)` calls it with every new record.

    Args:
        bar: where to show it.
        task: the line of the bar.
        warn: a sentence if something is wrong with a record, such as `LEO.collapsed`.
    """

    def __init__(self, bar: Progress, task: Any, warn: Warn | None = None):
        self.bar, self.task, self.warn = bar, task, warn
        self.step, self.rate, self.validation, self.warned = 0, 0.0, "", False

    def start(self, step: int) -> None:
        """Begin at a step, for a resumed run."""
        self.step = step
        self.bar.update(self.task, completed=step)

    def __call__(self, record: dict[str, Any]) -> None:
        """Show a record, and say what is wrong with it when it begins to be."""
        wrong = None if self.warn is None else self.warn(record)
        if wrong is not None and not self.warned:
            self.bar.console.print(f"warning: step {record['step']:,}: {wrong}", soft_wrap=True)
        self.warned = wrong is not None
        now = max(record["step"] - self.step, 0) / max(record["seconds"], 1e-9)
        # The first chunk compiles, so that its speed says nothing about the second.
        first = self.rate == 0.0
        self.rate = now if first or self.bar.tasks[0].fields["records"] < 2 else (
            0.8 * self.rate + 0.2 * now)  # fmt: skip
        self.step = record["step"]
        for name, value in record.get("validation", {}).items():
            if not name.endswith("_ci95"):
                self.validation = f"val {name} {number(name, value)}"
        total = self.bar.tasks[0].total or 0
        left = (total - self.step) / self.rate if self.rate else 0.0
        self.bar.update(
            self.task,
            completed=self.step,
            records=self.bar.tasks[0].fields["records"] + 1,
            status=f"loss {record['loss']:.4g}  {self.validation}  "
            f"{self.rate:.3g} steps/s  {_clock(left)} left",
        )


@contextmanager
def watching(
    title: str, steps: int, console: Console, warn: Warn | None = None
) -> Iterator[Watcher]:
    """A progress bar on a terminal, and nothing but warnings elsewhere."""
    bar = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[status]}", markup=False),
        console=console,
        disable=not console.is_terminal,
    )
    with bar:
        task = bar.add_task(title, total=steps, status="compiling", records=0)
        yield Watcher(bar, task, warn)


@contextmanager
def scoring(title: str, episodes: int, console: Console) -> Iterator[Any]:
    """Show a bar for the episodes of a test; yield what `evaluate(watch=...)` calls."""
    bar = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    with bar:
        task = bar.add_task(title, total=episodes)
        yield lambda done: bar.update(task, completed=done)


@dataclasses.dataclass(frozen=True)
class Shown:
    """`adaptax.recipes.runs.Progress` on a console."""

    console: Console

    def training(
        self, title: str, steps: int, warn: Warn | None = None
    ) -> AbstractContextManager[Watcher]:
        """Follow a training."""
        return watching(title, steps, self.console, warn)

    def scoring(self, title: str, episodes: int) -> AbstractContextManager[Any]:
        """Follow a test."""
        return scoring(title, episodes, self.console)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"

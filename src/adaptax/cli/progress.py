"""The progress bar: loss, validation score, steps per second and time left."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from .. import processes
from ..process import TimeOver, time_left
from ..recipes.budget import Budget
from ..recipes.runs import Warn
from ..report import number


class Minutes:
    """Says a line a minute where no bar is shown: what is no terminal.

    Args:
        console: where to.
    """

    def __init__(self, console: Console):
        self.console, self.said = console, time.monotonic()

    def say(self, line: str) -> None:
        """Print this line if the last one is a minute old, or half a minute for the first."""
        if self.console.is_terminal or time.monotonic() < self.said + 30:
            return
        self.said = time.monotonic() + 30
        self.console.print(line, soft_wrap=True)


class Watcher:
    """Follows a training; `fit(watch=...)` calls it with every new record.

    Args:
        bar: where to show it.
        task: the line of the bar.
        warn: a sentence if something is wrong with a record, such as `LEO.collapsed`.
        budget: how long it is.
    """

    def __init__(
        self, bar: Progress, task: Any, warn: Warn | None = None, budget: Budget | None = None
    ):
        self.bar, self.task, self.warn, self.budget = bar, task, warn, budget
        self.step, self.rate, self.validation, self.warned = 0, 0.0, "", False
        self.minutes = Minutes(bar.console)

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
        total = int(self.bar.tasks[0].total or 0)
        left = (total - self.step) / self.rate if self.rate else 0.0
        status = (
            f"loss {record['loss']:.4g}  {self.validation}  {self.rate:.3g} steps/s  "
            f"{_clock(left)} left"
        )
        if not first:
            self._estimate(total)
        self.minutes.say(f"step {self.step:,} of {total:,}  {status}")
        self.bar.update(
            self.task,
            completed=self.step,
            records=self.bar.tasks[0].fields["records"] + 1,
            status=status,
        )

    def _estimate(self, total: int) -> None:
        """Say, once and if it is over a minute, how long the whole will take."""
        budget, self.budget = self.budget, None
        if budget is None or not (speed := budget.training / max(total, 1) * self.rate):
            return
        if (budget.training + budget.validation + budget.test) / speed > 60:
            self.bar.console.print(budget.sentence(speed), soft_wrap=True)


@contextmanager
def watching(
    title: str,
    steps: int,
    console: Console,
    warn: Warn | None = None,
    budget: Budget | None = None,
) -> Iterator[Watcher]:
    """A progress bar on a terminal, and a line a minute elsewhere."""
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
        yield Watcher(bar, task, warn, budget)


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
        task, minutes = bar.add_task(title, total=episodes), Minutes(console)

        def watch(done: int) -> None:
            minutes.say(f"{title}: {done:,} of {episodes:,}")
            bar.update(task, completed=done)
            if done < episodes and any(processes.anyone(time_left() < 0)):
                raise TimeOver

        yield watch


@dataclasses.dataclass(frozen=True)
class Shown:
    """`adaptax.recipes.runs.Progress` on a console."""

    console: Console

    def training(
        self, title: str, steps: int, warn: Warn | None = None, budget: Budget | None = None
    ) -> AbstractContextManager[Watcher]:
        """Follow a training."""
        return watching(title, steps, self.console, warn, budget)

    def scoring(self, title: str, episodes: int) -> AbstractContextManager[Any]:
        """Follow a test."""
        return scoring(title, episodes, self.console)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"

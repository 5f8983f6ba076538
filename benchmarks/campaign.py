"""The cells of the papers' tables at their length, one after another, in the background.

Each job of a queue is a command of `adaptax`, started again and again for so many minutes until it
is done. What was trained is in its checkpoint and what was spent in its state, so the campaign may
be stopped or killed at any moment and started again by the same command. After every start
benchmarks/results/campaign-NAME.json says how far it is: score and protocol, or the curve by
validation so far; command, commit, processor, and the core-hours of all starts.

    nohup python benchmarks/campaign.py --out ../campaign --minutes 60 &
    python benchmarks/campaign.py --out ../campaign --report       # how far it is; starts nothing
"""

import argparse
import contextlib
import dataclasses
import fcntl
import json
import os
import shlex
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

from measure import save

ROOT = Path(__file__).parents[1]
OUT_OF_TIME, CORES = 75, 2
TIMED = ("recipes run", "train", "pretrain", "compare", "ablate", "analyze gradients")
"""Commands that take `--minutes`."""
TRIES = 3
"""Starts in a row that may end without a result, or stand still, before a job is given up."""
EVERY = 20.0
"""Seconds between notes of what a child has spent, which a kill loses at most."""


@dataclasses.dataclass(frozen=True)
class Job:
    """A job of the queue, as campaign.toml says."""

    name: str
    command: str
    bar: str
    hours: float | None = None


@dataclasses.dataclass
class State:
    """What is known of a job, kept in OUT/NAME.state.json; `pid` and `born` are of a child."""

    status: str = "waiting"
    starts: int = 0
    failures: int = 0
    cpu_seconds: float = 0.0
    wall_seconds: float = 0.0
    commits: list[str] = dataclasses.field(default_factory=list)
    said: str = ""
    pid: int = 0
    born: str = ""


class Campaign:
    """A queue that is worked off in a folder."""

    def __init__(self, jobs: list[Job], out: Path, results: Path, minutes: float):
        self.jobs, self.out, self.results, self.minutes = jobs, out, results, minutes
        self.child: subprocess.Popen | None = None
        self.stopping = False

    def run(self) -> None:
        """Work until every job is done, cut off or given up."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._stop)
        self.out.mkdir(parents=True, exist_ok=True)
        with (self.out / "campaign.lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise SystemExit(f"another campaign works in {self.out}") from None
            for job in self.jobs:
                self._orphan(job)
            for job in self.jobs:
                while not self.stopping and self.state(job).status in ("waiting", "running"):
                    self._start(job)
                    self.report(job)

    def report(self, job: Job) -> None:
        """Write how far a job is, if it was begun."""
        state = self.state(job)
        if state.status == "waiting":
            return
        save(
            self.results / f"campaign-{job.name}.json",
            command=f"adaptax {job.command.format(run=job.name, out='.')}",
            status=state.status,
            bar=job.bar,
            starts=state.starts,
            core_hours=round(state.cpu_seconds / 3600, 3),
            wall_hours=round(state.wall_seconds / 3600, 3),
            commits=state.commits,
            said=state.said.replace(f"{self.out}/", ""),
            curve=self._curve(job),
            result=self._result(job),
        )

    def state(self, job: Job) -> State:
        """What is known of it."""
        file = self.out / f"{job.name}.state.json"
        return State(**json.loads(file.read_text())) if file.exists() else State()

    def _keep(self, job: Job, state: State) -> None:
        file = self.out / f"{job.name}.state.json"
        new = file.with_suffix(".new")
        new.write_text(json.dumps(dataclasses.asdict(state)))
        new.replace(file)

    def _start(self, job: Job) -> None:
        """Start the command of a job once, and note what it spent and how it ended."""
        state, minutes = self.state(job), self.minutes
        if job.hours is not None:
            minutes = min(minutes, job.hours * 60 - state.cpu_seconds / CORES / 60)
        cut = minutes <= 0
        line = "evaluate {run}" if cut else job.command
        words = shlex.split(line.format(run=self.out / job.name, out=self.out))
        if " ".join(words[:2]) in TIMED or words[0] in TIMED:
            words += ["--minutes", f"{minutes:.5g}"]
        before, commit = self._mark(job), _commit()
        state = dataclasses.replace(state, status="running", starts=state.starts + 1)
        state.commits = list(dict.fromkeys([*state.commits, commit]))
        code = self._wait(job, state, [sys.executable, "-m", "adaptax", *words, "--json"])
        if self.stopping:
            pass
        elif code == 0:
            state.status, state.failures = "cut off" if cut else "done", 0
        elif code == OUT_OF_TIME and self._mark(job) != before:
            state.failures = 0
        else:
            state.failures += 1
            if state.failures >= TRIES:
                state.status = "given up"
            time.sleep(1)
        self._keep(job, state)

    def _wait(self, job: Job, state: State, words: list[str]) -> int:
        """The exit code of a child, whose time is added to the state now and then."""
        spent, wall = state.cpu_seconds, state.wall_seconds
        began = time.monotonic()
        with self._file(job, "out").open("w") as out, self._file(job, "log").open("a") as log:
            print(f"{time.strftime('%F %T')} {shlex.join(words)}", file=log, flush=True)
            child = self.child = subprocess.Popen(words, stdout=out, stderr=log)
        state.pid, state.born = child.pid, _born(child.pid)
        noted = -EVERY
        while True:
            used = _used(child.pid)
            ended, status, usage = os.wait4(child.pid, os.WNOHANG)
            if ended:
                used = usage.ru_utime + usage.ru_stime
            state.cpu_seconds = spent + used
            state.wall_seconds = wall + time.monotonic() - began
            if ended:
                break
            if time.monotonic() >= noted + EVERY:
                self._keep(job, state)
                noted = time.monotonic()
            time.sleep(0.5)
        self.child, state.pid, state.born = None, 0, ""
        child.returncode = os.waitstatus_to_exitcode(status)
        state.said = ["", *self._file(job, "log").read_text().splitlines()][-1][:500]
        return child.returncode

    def _orphan(self, job: Job) -> None:
        """Have a child that outlived a killed campaign save and end."""
        state = self.state(job)
        if state.pid and _born(state.pid) == state.born:
            used = _used(state.pid)
            with contextlib.suppress(ProcessLookupError):
                os.kill(state.pid, signal.SIGTERM)
            while _born(state.pid) == state.born:
                used = max(used, _used(state.pid))
                time.sleep(0.2)
            state.said += f" (ended by the next campaign, after {used:.0f} s of processor)"
        if state.pid:
            self._keep(job, dataclasses.replace(state, pid=0, born=""))

    def _stop(self, number: int, frame: object) -> None:
        self.stopping = True
        if self.child is not None:
            self.child.send_signal(signal.SIGTERM)

    def _file(self, job: Job, kind: str) -> Path:
        return self.out / f"{job.name}.{kind}"

    def _metrics(self, job: Job) -> list[Path]:
        return sorted((self.out / job.name).rglob("metrics.jsonl"))

    def _mark(self, job: Job) -> list[tuple[str, int]]:
        """What changes when a job moves on."""
        return [(str(file), len(file.read_bytes().splitlines())) for file in self._metrics(job)]

    def _curve(self, job: Job) -> dict[str, list[dict]]:
        """Steps done, and the scores of validation, of each of a job's trainings."""
        found = {}
        for file in self._metrics(job):
            records = []
            for line in file.read_text().splitlines():
                with contextlib.suppress(ValueError):
                    records.append(json.loads(line))
            kept = [r for r in records if "validation" in r]
            kept += [r for r in records[-1:] if r not in kept]
            name = file.parent.relative_to(self.out / job.name)
            found[str(name)] = [
                {n: r[n] for n in ("step", "loss", "validation") if n in r} for r in kept
            ]
        return found

    def _result(self, job: Job) -> object:
        """What the command printed in the end, without what `curve` and the head say."""
        if self.state(job).status not in ("done", "cut off"):
            return None
        try:
            found = json.loads(self._file(job, "out").read_text())
        except (OSError, ValueError):
            return None
        if isinstance(found, dict):
            return {n: v for n, v in found.items() if n not in ("command", "plots", "run")}
        return found


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat after the name; none where there is no such process."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []
    return [] if fields[0] == "Z" else fields


def _born(pid: int) -> str:
    """When a process began, which tells it from a later one of its number."""
    fields = _stat(pid)
    return fields[19] if fields else ""


def _used(pid: int) -> float:
    """Seconds of processor."""
    fields = _stat(pid)
    ticks = sum(map(int, fields[11:15])) if fields else 0
    return ticks / os.sysconf("SC_CLK_TCK")


def _commit() -> str:
    line = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    found = subprocess.run(line, capture_output=True, text=True)
    return found.stdout.strip() or "unknown"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--queue", type=Path, default=Path(__file__).with_suffix(".toml"))
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--minutes", type=float, default=60.0, help="of one start")
    parser.add_argument("--report", action="store_true", help="write results; start nothing")
    asked = parser.parse_args()
    jobs = [Job(**each) for each in tomllib.loads(asked.queue.read_text())["job"]]
    campaign = Campaign(jobs, asked.out.resolve(), asked.results.resolve(), asked.minutes)
    if asked.report:
        for each in jobs:
            campaign.report(each)
    else:
        campaign.run()

"""`adaptax runs`: the run folders there are, how far they are, their scores and settings."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..engine.run import Run
from ..process import is_locked
from ..recipes.runs import INIT
from ..report import number
from ..report.record import dump
from ..report.tables import Sheet
from .commands import Runs
from .console import consoles


def show(options: Runs) -> None:
    """`adaptax runs`."""
    folders = [Path(name) for name in options.folders or ("runs",)]
    for folder in folders:
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder} is no folder; name folders that hold runs")
    found = [_look(path) for path in _paths(folders)]
    if not found:
        raise ValueError(f"there is no run in {', '.join(map(str, folders))}")
    apart = _apart(found)
    if options.json:
        print(dump([{**row, "differs in": _own(row, apart)} for row in found]))
        return
    out = consoles()[0]
    if options.compare:
        names = ["", *(row["run"] for row in found)]
        first = [["state", *(row["state"] for row in found)],
                 ["score", *(_score(row) for row in found)]]  # fmt: skip
        rows = [[name, *(str(row["settings"].get(name, "-")) for row in found)] for name in apart]
        out.print(Sheet(names, [*first, *rows], "settings that are not the same in all"))
        return
    rows = [
        [row["run"], row["state"], row["steps"], _score(row), row["changed"], row["about"]]
        for row in found
    ]
    headings = ["run", "state", "meta-steps", "score", "changed", "experiment"]
    out.print(Sheet(headings, rows, left=("state", "experiment")))


def _paths(folders: Iterable[Path]) -> Iterator[Path]:
    """The folders of runs below these, in order; not of those that runs start from."""
    for folder in folders:
        for file in sorted(folder.rglob("config.json")):
            if file.parent.name != INIT:
                yield file.parent


def _look(path: Path) -> dict[str, Any]:
    """What is known of a run; a broken one is told as such."""
    run, tested = Run(path), path / "test.json"
    row: dict[str, Any] = {
        "run": str(path), "state": "broken", "steps": "", "metric": None, "score": None,
        "ci95": None, "split": None, "about": "", "settings": {},
        "changed": time.strftime("%Y-%m-%d %H:%M", time.localtime(path.stat().st_mtime)),
    }  # fmt: skip
    try:
        config, records = run.config(), run.metrics()
        experiment = config.get("tuned") or config.get("experiment") or config["training"]
    except (OSError, ValueError, KeyError):
        return row
    done = records[-1]["step"] if records else 0
    steps = experiment.get("steps")
    row["steps"] = f"{done:,}" if steps is None else f"{done:,} of {steps:,}"
    row["settings"] = dict(_flat(experiment))
    names = ("algorithm", "tasks") if "algorithm" in experiment else ()
    cell = experiment.get("task", {})
    shot = f" {cell['way']}w{cell['shot']}s" if {"way", "shot"} <= cell.keys() else ""
    about = " on ".join(str(experiment[name]) for name in names) + shot
    row["about"] = config.get("recipe") or about or f"{config.get('backbone', '')}, pretrained"
    if is_locked(path):
        row["state"] = "running"
    elif tested.exists() or (path / "pretrained.json").exists():
        row["state"] = "done"
    else:
        row["state"] = "stopped" if run.checkpoint_file.exists() else "not begun"
    return row | _scored(tested, records)


def _scored(tested: Path, records: list[dict[str, Any]]) -> dict[str, Any]:
    """The score of the test, else the last one of validation."""
    last = (r["validation"] for r in reversed(records) if "validation" in r)
    found: Mapping[str, Any] = next(last, {})
    names = [name for name in found if f"{name}_ci95" in found]  # the primary metric alone
    split = "val"
    if tested.exists():
        try:
            found, split = json.loads(tested.read_bytes())["result"], "test"
        except (ValueError, KeyError, TypeError):
            return {}
    for name in (*names, *found):
        if f"{name}_ci95" in found:
            half = found[f"{name}_ci95"]
            return {"metric": name, "score": found[name], "ci95": half, "split": split}
    return {}


def _score(row: Mapping[str, Any]) -> str:
    if row["score"] is None:
        return ""
    said = number(row["metric"], row["score"], row["ci95"])
    return f"{row['metric']} {said}{'' if row['split'] == 'test' else ' (val)'}"


def _flat(value: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """Settings by their whole names."""
    for name, one in value.items():
        if isinstance(one, dict) and one:
            yield from _flat(one, f"{before}{name}.")
        else:
            yield f"{before}{name}", one


def _apart(rows: list[dict[str, Any]]) -> list[str]:
    """Names of the settings that are not the same in all runs."""
    names = dict.fromkeys(name for row in rows for name in row["settings"])
    missing = object()
    return [
        name
        for name in names
        if any(row["settings"].get(name, missing) != rows[0]["settings"].get(name, missing)
               for row in rows)
    ]  # fmt: skip


def _own(row: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    return {name: row["settings"][name] for name in names if name in row["settings"]}

"""What papers and their authors' programs set, beside what the recipes have: `authors.toml`, read.

`compare` sets the two beside each other for a recipe; `table` makes the tables of docs/recipes.md,
which `python -m adaptax.recipes.authors docs/recipes.md` writes into the page.
"""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

from .book import RECIPES
from .effective import effective


class Row(NamedTuple):
    """A setting of the authors' beside that of a recipe.

    Args:
        setting: what is set.
        authors: what the authors have, in their own units.
        here: what the recipe has.
        same: whether that is the same.
    """

    setting: str
    authors: str
    here: str
    same: bool


@dataclass(frozen=True)
class Fact:
    """A setting of the authors', and where it is in an experiment.

    Args:
        recipes: patterns of the names of the recipes that it concerns.
        setting: what is set.
        authors: what the authors have, in their own units.
        at: where a recipe has it, such as `"outer.clip"`, in what `effective` gives; empty for
            what is no one setting of ours, and differs.
        value: what is there in a recipe that does as the authors do.
        note: why a recipe has another value, or, without `at`, what recipes do.
    """

    recipes: tuple[str, ...]
    setting: str
    authors: str
    at: str = ""
    value: Any = None
    note: str = ""

    def concerns(self, name: str) -> bool:
        """Whether a recipe is concerned."""
        return any(fnmatchcase(name, pattern) for pattern in self.recipes)

    def row(self, name: str) -> Row:
        """The setting of the authors' beside that of a recipe that it concerns."""
        if not self.at:
            return Row(self.setting, self.authors, self.note, False)
        found: Any = effective(RECIPES[name].experiment)
        for key in self.at.split("."):
            found = found.get(key)
        same = _plain(found) == _plain(self.value)
        here = _text(found) if same or not self.note else f"{_text(found)}: {self.note}"
        return Row(self.setting, self.authors, here, same)


def facts() -> dict[str, list[Fact]]:
    """All that is known, by section."""
    file = Path(__file__).with_suffix(".toml")
    found: dict[str, list[Fact]] = {}
    for section, parts in tomllib.loads(file.read_text(encoding="utf-8")).items():
        for part in parts:
            recipes = tuple(part["recipes"].split())
            found.setdefault(section, []).extend(
                [Fact(recipes, *row) for row in part.get("settings", ())]
                + [
                    Fact(recipes, what, theirs, note=ours)
                    for what, theirs, ours in part.get("differs", ())
                ]
            )
    return found


def compare(name: str) -> list[Row]:
    """Every setting of the authors' that is known, beside that of a recipe.

    A short recipe has a row for whatever else it has otherwise than its full version, whose
    setting then stands for the authors'.

    Args:
        name: of the recipe.
    """
    known = [fact for section in facts().values() for fact in section if fact.concerns(name)]
    places = {fact.at for fact in known}
    rest = [row for row in _shortened(name) if row.setting not in places]
    return [fact.row(name) for fact in known] + rest


def table() -> str:
    """All facts as Markdown, a table for each section, differences in bold."""
    lines: list[str] = []
    for section, known in facts().items():
        lines += [f"## {section}", "", _cells("recipes", "setting", "authors", "here", "")]
        lines += [_cells(*["---"] * 5)]
        for fact in known:
            for names, row in _grouped(fact):
                mark = "" if row.same else "**differs**"
                lines.append(_cells(names, row.setting, row.authors, row.here, mark))
        lines.append("")
    lines += ["## What else the short versions change", ""]
    lines += [_cells("recipe", "setting", "full version", "here"), _cells(*["---"] * 4)]
    for name in RECIPES:
        for row in [row for row in _shortened(name) if row in compare(name)]:
            lines.append(_cells(f"`{name}`", row.setting, row.authors, row.here))
    return "\n".join(lines)


def _cells(*cells: str) -> str:
    return f"| {' | '.join(cells)} |".replace("|  |", "| |")


def _grouped(fact: Fact) -> Iterator[tuple[str, Row]]:
    """The names of the recipes that have the same, and what they have."""
    groups: dict[Row, list[str]] = {}
    for name in RECIPES:
        if fact.concerns(name):
            groups.setdefault(fact.row(name), []).append(name)
    for row, names in groups.items():
        short = fact.recipes if len(groups) == 1 else names
        yield ", ".join(f"`{name}`" for name in short), row


def _shortened(name: str) -> Iterator[Row]:
    """What a short version has otherwise than its full one, by where it is."""
    full = RECIPES.get(name.removesuffix("-short"))
    if not name.endswith("-short") or full is None:
        return
    before, after = _flat(full.experiment.to_json()), _flat(RECIPES[name].experiment.to_json())
    for at in (at for at in {**before, **after} if before.get(at) != after.get(at)):
        yield Row(at, _text(before.get(at)), _text(after.get(at)), False)


def _flat(values: dict[str, Any], above: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        nested = isinstance(value, dict) and name != "init_from"
        found |= _flat(value, f"{above}{name}.") if nested else {above + name: value}
    return found


def _plain(value: Any) -> Any:
    """Lists for tuples, numbers to the digits that JSON keeps, and `"none"` for `None`."""
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    if value is None:
        return "none"
    return round(value, 12) if isinstance(value, float) else value


def _text(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return " / ".join(map(_text, value))
    if isinstance(value, dict):  # an experiment that another starts from
        return f"{value['algorithm']} of {value['steps']:,} meta-steps" if value else "none"
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.7g}" if isinstance(value, float) else str(value)


START, END = "<!-- tables: begin -->", "<!-- tables: end -->"


def write(page: Path) -> None:
    """Put the tables into a page, in the place of those that it has.

    Args:
        page: a Markdown file with the lines `START` and `END`.
    """
    before, _, rest = page.read_text(encoding="utf-8").partition(START)
    after = rest.partition(END)[2]
    page.write_text(f"{before}{START}\n\n{table()}\n\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1]))

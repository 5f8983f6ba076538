"""`adaptax recipes list` and `show`."""

from __future__ import annotations

import json
from typing import Any

from rich.syntax import Syntax
from rich.table import Table

from ..recipes import RECIPES, Recipe, authors
from ..recipes.book import to_toml
from .commands import RecipesList, RecipesShow
from .console import consoles
from .settings import recipe


def show_all(options: RecipesList) -> None:
    """`adaptax recipes list`: a line each."""
    if options.json:
        print(json.dumps([_to_json(one) for one in RECIPES.values()], indent=2, ensure_ascii=False))
        return
    table = Table()
    for heading in ("recipe", "about", "paper"):
        table.add_column(heading, overflow="fold", no_wrap=heading == "recipe")
    for one in RECIPES.values():
        table.add_row(one.name, one.about, one.paper)
    consoles()[0].print(table)


def show(options: RecipesShow) -> None:
    """`adaptax recipes show`: what it does otherwise than its authors, its settings, and Python."""
    found = recipe(options.name)
    if options.toml:
        print(to_toml(found), end="")
        return
    rows = authors.compare(options.name)
    if options.json:
        content = {**_to_json(found), "settings": [row._asdict() for row in rows]}
        print(json.dumps(content, indent=2, ensure_ascii=False))
        return
    out = consoles()[0]
    out.print(f"{found.name}: {found.about}", soft_wrap=True)
    out.print(f"paper: {found.paper}\n", soft_wrap=True)
    table = Table(title=f"{sum(row.same for row in rows)} settings are the authors'; others are:")
    for heading in ("setting", "authors", "here"):
        table.add_column(heading, overflow="fold")
    for row in rows:
        if not row.same:
            table.add_row(row.setting, row.authors, row.here)
    out.print(table)
    for text, language in (
        (json.dumps(found.experiment.to_json(), indent=2, ensure_ascii=False), "json"),
        (python(found), "python"),
    ):
        coloured = Syntax(text + "\n", language)
        out.print(coloured if out.is_terminal else text + "\n", soft_wrap=True)


def python(found: Recipe) -> str:
    """A script that trains and tests the recipe."""
    start: list[str] = []
    imports, given = "RECIPES", ""
    if found.experiment.init_from:
        imports, given = "RECIPES, Experiment", ", init_from=first.meta"
        start = [
            "start = Experiment.from_json(experiment.init_from)",
            "first = start.train(splits, validate=splits.val)",
        ]
    return "\n".join(
        [
            f"from adaptax.recipes import {imports}",
            "",
            f'experiment = RECIPES["{found.name}"].experiment',
            "splits = experiment.splits()",
            *start,
            f"result = experiment.train(splits, validate=splits.val{given})",
            "print(experiment.test(result.meta, experiment.splits(test=True)))",
        ]
    )


def _to_json(one: Recipe) -> dict[str, Any]:
    return {
        "name": one.name,
        "about": one.about,
        "paper": one.paper,
        "experiment": one.experiment.to_json(),
    }

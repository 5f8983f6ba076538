"""The recipes, and the settings of any learner on any family of tasks: `book.toml`, read.

A recipe belongs to a cell: a learner, a data set, ways and shots. `closest` finds the settings of
a cell that is in no table, and `comparable` those of several learners on the same tasks. Recipes
whose name ends in `-short` shorten meta-training for two CPU cores, and say what else they change.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from ..learner import MetaLearner
from . import parts, schema, table
from .experiment import Experiment, changed

BOOK: dict[str, dict[str, Any]] = tomllib.loads(
    Path(__file__).with_suffix(".toml").read_text(encoding="utf-8")
)
"""Entries by section and name; see the head of the file."""

Entry = Mapping[str, Any]
"""Changes of an experiment, as TOML has them."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """One cell of a table.

    Args:
        name: such as `"maml-omniglot-5w1s"`.
        about: the cell, and how a short version departs from the paper.
        paper: the published score as printed, with its protocol where it differs from ours.
        experiment: what to run.
    """

    name: str
    about: str
    paper: str
    experiment: Experiment


def read(name: str, entry: Entry, known: Mapping[str, Recipe]) -> Recipe:
    """Return the recipe that an entry describes.

    Args:
        name: of the recipe.
        entry: the fields of an `Experiment`, those of a recipe, and `like`, the name of a recipe
            to start from, and `without`, settings of that to leave out.
        known: recipes by name.

    Raises:
        ValueError: naming the field or setting that is wrong.
    """
    values = {n: v for n, v in entry.items() if n not in ("name", "about", "paper", "short")}
    said = {n: schema.fitting(n, entry[n], str) for n in ("about", "paper", "short") if n in entry}
    like = values.pop("like", name.removesuffix("-short") if "short" in said else None)
    if isinstance(values.get("init_from"), Mapping) and "like" in values["init_from"]:
        values["init_from"] = read("", values["init_from"], known).experiment.to_json()
    if like is None:
        experiment = Experiment.from_json(values)
        paper = ""
    elif like not in known:
        raise ValueError(f"like is {like!r:.80}; {table.one_of(str(like), known)}")
    else:
        experiment = _applied(known[like].experiment, values)
        paper = known[like].paper if "short" in said else ""
    about = said.get("about", _about(experiment))
    if "short" in said:
        about = f"{known[str(like)].about}, for two CPU cores: {said['short']}"
    return Recipe(name, about, said.get("paper", paper), experiment)


def read_file(path: Path) -> Recipe:
    """Return the recipe in a TOML file, such as `to_toml` writes.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no TOML, or naming the field or setting that is wrong.
    """
    try:
        entry = tomllib.loads(path.read_text(encoding="utf-8"))
        return read(schema.fitting("name", entry.get("name", path.stem), str), entry, RECIPES)
    except ValueError as error:  # which bad TOML and bad text are, too
        raise ValueError(f"{path}: {error}") from None


def to_toml(recipe: Recipe) -> str:
    """Return a recipe as TOML, every setting of it written out."""
    values = recipe.experiment.to_json()
    own = {"name": recipe.name, "about": recipe.about, "paper": recipe.paper}
    single = {n: v for n, v in (own | values).items() if not isinstance(v, dict)}
    lines = [f"{name} = {_toml(value)}" for name, value in single.items()]
    for section, of in values.items():
        if isinstance(of, dict) and of:
            lines += ["", f"[{section}]"]
            lines += [f"{_key(n)} = {_toml(v)}" for n, v in of.items() if v is not None]
    return "\n".join(lines) + "\n"


def _toml(value: Any) -> str:
    if isinstance(value, Mapping):
        some = [f"{_key(n)} = {_toml(v)}" for n, v in value.items() if v is not None]
        return f"{{{', '.join(some)}}}"
    if isinstance(value, list):
        return f"[{', '.join(map(_toml, value))}]"
    return json.dumps(value, ensure_ascii=isinstance(value, str) and not value.isprintable())


def _key(name: str) -> str:
    bare = name.replace("-", "").replace("_", "")
    return name if bare.isascii() and bare.isalnum() else json.dumps(name)


def _about(experiment: Experiment) -> str:
    """Return a line on a cell."""
    task = experiment.task
    cell = [f"{task['way']}-way {task.get('shot', '')}-shot"] if "way" in task else []
    return ", ".join([experiment.title, experiment.tasks, *cell])


def _applied(experiment: Experiment, *entries: Entry) -> Experiment:
    """Return an experiment with changes of entries, later ones over earlier ones, made at once."""
    changes: dict[str, Any] = {}
    without: list[str] = []
    for entry in entries:
        gone = schema.fitting("without", entry.get("without", []), Sequence[str])
        for section, _, name in (place.partition(".") for place in gone):
            if isinstance(changes.get(section), dict) and name:
                changes[section].pop(name, None)
            else:
                changes.pop(section, None)
        without += gone
        for name, value in entry.items():
            old = changes.get(name, {})
            merging = isinstance(value, Mapping) and isinstance(old, Mapping)
            changes[name] = {**old, **value} if merging and name != "init_from" else value
    changes.pop("without", None)
    for name, value in changes.items():
        if _formula(value) is not None:
            changes[name] = _number(experiment, name, value)
        elif isinstance(value, Mapping) and name != "init_from":
            changes[name] = {n: _number(experiment, n, v) for n, v in value.items()}
    return changed(experiment, changes, without)


def _formula(value: Any) -> Mapping[str, Any] | None:
    """Return how a number follows from another one, if that is what is said."""
    known = {"times", "least"}
    return value if isinstance(value, Mapping) and value and value.keys() <= known else None


def _number(experiment: Experiment, name: str, value: Any) -> Any:
    """Return a value, computed from that of an experiment where a formula is given."""
    how = _formula(value)
    if how is None:
        return value
    if name == "tune":
        return [experiment.learner["inner_lr"] * factor for factor in how["times"]]
    old = experiment.learner.get(name, getattr(experiment, name, None))
    new = old * how.get("times", 1)
    return max(new, how.get("least", new))


def _all() -> tuple[dict[str, Recipe], dict[str, Recipe]]:
    """Read all recipes, and the cells that are none."""
    recipes: dict[str, Recipe] = {}
    cells: dict[str, Recipe] = {}
    for name, entry in BOOK["cell"].items():
        if entry.get("like", "").startswith("cell.") or "like" not in entry:
            cells[f"cell.{name}"] = read(name, entry, cells)
    for name, entry in BOOK["recipe"].items():
        recipes[name] = read(name, entry, {**cells, **recipes})
    for name, entry in BOOK["cell"].items():
        if f"cell.{name}" not in cells:
            cells[f"cell.{name}"] = read(name, entry, recipes)
    return recipes, cells


RECIPES, CELLS = _all()
"""All recipes by name; and MAML on the families that no recipe is of, by `cell.NAME`."""

COMPARED: dict[str, tuple[str, ...]] = {
    name: tuple(BOOK["family"].get(name, BOOK["family"]["any"])["compared"])
    for name in table.FAMILIES
}
"""The learners of a comparison on a family unless others are asked for."""


def default_learners(tasks: str) -> tuple[str, ...]:
    """Return the learners of a comparison on a family, which may be one's own."""
    return COMPARED.get(tasks, tuple(BOOK["family"]["any"]["compared"]))


def closest(algorithm: str, tasks: str, way: int = 5, shot: int = 1) -> Experiment:
    """Return the experiment that `adaptax train ALGORITHM TASKS` starts from.

    The recipe of that cell where there is one; else the paper's settings for a similar cell, those
    of MAML with what the learner has otherwise. MAML's sinusoids start from Glorot's
    initialisation, as `maml-sinusoid-glorot` does.

    Args:
        algorithm: the name of a learner, or one's own, `my_module:MyLearner`.
        tasks: the name of a task family, or one's own, `my_module:my_tasks`.
        way: classes an episode, where that is free.
        shot: support examples a class, likewise; other families come with their own.

    Raises:
        ValueError: for a learner that cannot do these tasks.
    """
    table.trust(*table.own(algorithm, tasks))
    table.check_supported(algorithm, tasks)
    own = _cell(algorithm, tasks, way, shot)
    return own or _adapted(algorithm, _maml(tasks, way, shot))


def comparable(
    algorithm: str, tasks: str, way: int = 5, shot: int = 1, seed: int = 0
) -> Experiment:
    """Return the experiment of one of several learners that are compared on the same episodes.

    For two CPU cores: each takes minutes. Sinusoids are MAML's, of the paper's length, trained
    with 10 shots and tested with 5, for one network. Images are as in MAML's protocol. Where no
    paper has a number (glyphs, folders), all share MAML's network; else each has its paper's.
    PLATIPUS starts from MAML, as its users advise.

    Args:
        algorithm: the name of a learner, or one's own.
        tasks: the name of a task family, or one's own.
        way: classes an episode, where that is free.
        shot: support examples a class, likewise.
        seed: of training; the test episodes do not depend on it.

    Raises:
        ValueError: for a learner that cannot do these tasks.
    """
    table.trust(*table.own(algorithm, tasks))
    table.check_supported(algorithm, tasks)
    row, family = table.learner(algorithm), table.family(tasks)
    entry = BOOK["family"].get(tasks, BOOK["family"]["any"])
    short, more = entry.get("short", {}), dict(entry.get(algorithm, {}))
    maml = _maml(tasks, way, shot)
    base, own = _applied(maml, short), _cell(algorithm, tasks, way, shot)
    if isinstance(more.get("init_from"), str):
        more["init_from"] = base.to_json()
    if own is not None and row.own_protocol and family.has("images"):
        kept = {n: v for n, v in own.task.items() if n in ("train_shot", "train_query")}
        own = dataclasses.replace(own, task={**maml.task, **kept}, evaluation=maml.evaluation)
        own = dataclasses.replace(own, network=maml.network) if _is_unpublished(family) else own
    elif row.own_protocol:
        own = None
    found = _adapted(algorithm, base, more) if own is None else _applied(own, short, more)
    return dataclasses.replace(found, seed=seed)


def _is_unpublished(family: table.Family) -> bool:
    return family.has("unpublished") or family.has("own")


def _maml(tasks: str, way: int, shot: int) -> Experiment:
    """Return MAML's settings on a family."""
    family = table.family(tasks)
    if family.has("own"):
        return _own_cell(tasks, family, way, shot)
    found = _cell("maml", tasks, way, shot)
    assert found is not None, tasks
    return found


def _cell(algorithm: str, tasks: str, way: int, shot: int) -> Experiment | None:
    """Return the settings that a learner's own recipes have for a family; `None` without one."""
    row, family = table.learner(algorithm), table.family(tasks)
    data, free = family.like or tasks, family.takes("way")
    found = [
        one.experiment
        for one in (*RECIPES.values(), *CELLS.values())
        if (one.experiment.algorithm, one.experiment.tasks) == (algorithm, data)
        and not one.name.endswith("-short")
    ]
    if free:
        found = [one for one in found if one.task["shot"] == (5 if shot > 2 else 1)]
        ways = (20, 5) if way > 10 else (5,)  # the tables of miniImageNet have 5 alone
        found = [one for w in ways for one in found if one.task["way"] == w]
    if not found:
        return None
    experiment = found[0]
    if free:
        task = {**experiment.task, "way": way, "shot": shot}
        if family.has("images") and not row.own_protocol:
            task["query"] = shot
        experiment = dataclasses.replace(experiment, task=task)
    if not row.own_protocol and "closest" in (entry := BOOK["family"].get(tasks, {})):
        experiment = _applied(experiment, entry["closest"])
    if family.has("unpublished"):
        experiment = _without_paper(experiment, algorithm, tasks)
    return experiment


def _without_paper(experiment: Experiment, algorithm: str, tasks: str) -> Experiment:
    """Return what a learner has on data of any kind, that no paper reports on."""
    task = {name: experiment.task[name] for name in ("way", "shot")}
    task["query"] = max(experiment.task["query"], 5)
    changes = {
        "tasks": tasks,
        "task": task,
        "network": {"head_init": "glorot"},  # starts faster than MAML's N(0, 1)
        "steps": 2000,
        "meta_batch": min(experiment.meta_batch, 8),
        "evaluation": {"episodes": 600},
        "without": ["task", "evaluation"],
    }
    return _applied(experiment, changes, BOOK["learner"].get(algorithm, {}).get("unpublished", {}))


def _adapted(algorithm: str, maml: Experiment, *more: Entry) -> Experiment:
    """Return the settings of a learner on tasks that those of MAML are known for.

    Args:
        algorithm: the name of a learner.
        maml: MAML's experiment.
        more: further changes.
    """
    if algorithm == maml.algorithm:
        return _applied(maml, *more)
    row, family = table.learner(algorithm), maml.family
    of = BOOK["learner"].get(algorithm, {})
    places = (maml.tasks, *family.tags, family.kind, "any")
    entry: Entry = next(
        (of[place] for place in places if place in of and place != "unpublished"), {}
    )
    known = {*parts.known_of(row, family), "loss", "noise", "reduction"}
    without = [f"learner.{name}" for name in maml.learner if name not in known]
    without += ["evaluation.at"] if "eval_steps" not in known else []  # of more steps
    without += ["outer"] if ":" in algorithm and _has_optimizer(row.maker(family)) else []
    extra = of.get("unpublished", {}) if family.has("unpublished") else {}
    own = {"algorithm": algorithm, "without": without}
    return _applied(maml, own, entry, extra, *more)


def _has_optimizer(make: Any) -> bool:
    """Whether a learner brings an outer optimizer of its own."""
    return getattr(make, "optimizer", MetaLearner.optimizer) is not MetaLearner.optimizer


@functools.cache
def _own_cell(tasks: str, family: table.Family, way: int, shot: int) -> Experiment:
    """Return MAML's settings on a family of the user's own, for the shape of its examples."""
    known = schema.taken(table.load(family.make))
    if family.kind == "environment":
        task: dict[str, Any] = {}
        base, network = CELLS["cell.own-environment"].experiment, {}
    else:
        numbers = family.kind == "regression"
        base = CELLS[f"cell.own-{'numbers' if numbers else 'vectors'}"].experiment
        task = {} if numbers else {"way": way, "shot": shot, "query": max(shot, 5)}
        task = {name: value for name, value in task.items() if name in known}
        splits = parts.call(table.load(family.make), task, f"the task family {tasks}")
        key = jax.random.key(0)
        shape = jax.tree.leaves(splits.train.sample(key).support.draw(None, key).x)[0].shape[1:]
        if len(shape) == 3 and not numbers:
            base, network = CELLS["cell.own-images"].experiment, {"image": list(shape)}
        else:
            network = {"in_size": math.prod(shape)}
    changes = {"tasks": tasks, "task": task, "network": network, "without": ["task"]}
    return _applied(base, changes)


def origin(experiment: Experiment) -> str:
    """Say in a line which recipe is nearest to an experiment, and what is otherwise in this one."""
    own = _settings(experiment)

    def changes(recipe: Recipe) -> dict[str, Any]:
        theirs = _settings(recipe.experiment)
        return {
            name: own.get(name)
            for name in {**theirs, **own}
            if name != "seed" and own.get(name) != theirs.get(name)
        }

    nearest = min(RECIPES.values(), key=lambda recipe: len(changes(recipe)))
    new = [
        f"{name} {'left out' if value is None else json.dumps(value)}"
        for name, value in changes(nearest).items()
    ]
    return f"recipe {nearest.name}" + (f" but for {', '.join(new)}" if new else "")


def _settings(experiment: Experiment) -> dict[str, Any]:
    """Return every setting by `section.name`, but for where data lie and where it starts from."""
    values = {n: v for n, v in experiment.to_json().items() if n != "init_from"}
    single = {n: v for n, v in values.items() if not isinstance(v, dict)}
    return single | {
        f"{section}.{name}": value
        for section, of in values.items()
        if isinstance(of, dict)
        for name, value in of.items()
        if name != "path"
    }

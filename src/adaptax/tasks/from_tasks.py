"""From a list of tasks of unequal sizes to three distributions of tasks."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, PyTree, Shaped

from adaptax.task import Splits
from adaptax.tasks import bank
from adaptax.tasks.arrays import check_values, is_array, to_array, to_labels
from adaptax.tasks.bank import MEMORY_BUDGET, NAMES, SPLITS
from adaptax.tasks.episodes import Details, HostRows, kept
from adaptax.tasks.files import DataError
from adaptax.tasks.ragged import Draw, RaggedTasks, Shot, share
from adaptax.tree import by_path

KINDS = ("auto", "regression", "classification")
CLASSES = ("all", "task")
SCALES = ("none", "support")

QUERY = 256
"""Queries at most, where they are not given."""

MANY = 100
"""Integers of more values than this are hardly classes."""

SHOWN = 8
"""Tasks that a message names."""


def from_tasks(
    tasks: Mapping[Any, Any] | Sequence[Any],
    shot: Shot,
    query: int | None = None,
    *,
    train_shot: Shot | None = None,
    train_query: int | None = None,
    splits: Sequence[float] | Mapping[str, Iterable[Any]] = SPLITS,
    order: Mapping[Any, Any] | Sequence[Any] | None = None,
    kind: str = "auto",
    classes: str = "all",
    stratify: bool = True,
    standardise: str = "none",
    least_spread: float = 1e-3,
    in_order: bool = True,
    seed: int = 0,
    name: str = "tasks",
    memory_budget: int = MEMORY_BUDGET,
) -> Splits:
    """Return a list of tasks, each with examples of its own, as three distributions of tasks.

    An episode is of one task: some of its examples to learn from, others to be judged on, none in
    both roles. Tasks may have any sizes; episodes are padded to one shape by examples of weight 0.

        tasks = from_tasks({"pump 1": (x1, y1), "pump 2": (x2, y2), ...}, shot=(4, 64))

    Args:
        tasks: `(x, y)` of every task, by name or in a list. x is an array `(n, ...)`, or a dict of
            such: floats, integers, which stay such, or bytes and booleans, which become floats; or
            a list of n sequences `(time, channels)` of unequal length,
            which become `{"series": (n, time, channels), "length": (n,)}`. y is `(n,)` or
            `(n, targets)` floats, in which NaN are gaps, or `(n,)` labels: integers, booleans or
            text.
        shot: examples to learn from: a number; a range `(4, 64)` that every episode draws from, as
            far as its task reaches; or a share of the task, such as 0.5.
        query: others to be judged on, at most; all that are left, but at most 256, if `None`.
        train_shot: in meta-training, if not `shot`.
        train_query: in meta-training, if not `query`.
        splits: fractions of the tasks for train, val and test, at random; or their names (places
            in a list) in a dict of these three.
        order: of every task `(n,)` numbers or dates, by the same names: the support then comes
            right before a random point in time, and the queries after it.
        kind: of y: `"regression"` or `"classification"`; `"auto"` takes floats for the first and
            all else for the second.
        classes: labels mean the same in `"all"` tasks, or each `"task"` has classes of its own,
            which are numbered in order of their names.
        stratify: draw supports and queries with the classes in proportion.
        standardise: targets by mean and standard deviation of their task's `"support"`, which lets
            nothing out that the learner may not see, or `"none"`.
        least_spread: a smaller deviation counts as this.
        in_order: episode i of validation and test is of task i; else of one at random.
        seed: of the split.
        name: what reports call the data.
        memory_budget: in bytes; larger data stay on the host.

    Returns:
        Splits of `RaggedTasks`. Tasks too small for the support and a query are left out, with a
        warning that names them.

    Raises:
        DataError: if x and y do not fit, tasks differ in kind, numbers are not finite, a split has
            no task, or an argument makes no sense.
    """
    for what, given, known in (("kind", kind, KINDS), ("classes", classes, CLASSES),
                               ("standardise", standardise, SCALES)):  # fmt: skip
        if given not in known:
            raise DataError(f"{what}={given!r}; expected one of {', '.join(known)}")
    if not least_spread > 0:
        raise DataError(f"least_spread={least_spread}; expected a deviation above 0")
    named = _named(tasks)
    shots = {"train": shot if train_shot is None else train_shot, "val": shot, "test": shot}
    queries = {"train": query if train_query is None else train_query, "val": query, "test": query}
    for asked in shots.values():
        _check_shot(asked)
    for number in queries.values():
        if number is not None and (not isinstance(number, int | np.integer) or number < 1):
            raise DataError(f"query={number!r}; expected an integer, at least 1")
    times = _times(order, named)
    inputs = _inputs({key: x for key, (x, _) in named.items()})
    count = {key: len(jax.tree.leaves(x)[0]) for key, x in inputs.items()}
    targets = _Targets.of({key: y for key, (_, y) in named.items()}, count, kind, classes)
    rows = {key: targets.rows(key, times.get(key)) for key in named}
    parts = _parts(splits, [*named], seed)
    draws, left_out = {}, []
    for split, own in parts.items():
        least = _least(shots[split])
        left_out += [key for key in own if len(rows[key]) <= least]
        parts[split] = [key for key in own if len(rows[key]) > least]
        if not parts[split]:
            raise DataError(
                f"no task of the {split} split has more than {least} examples with a target, "
                f"{least} to learn from and 1 to be judged on; lower shot, or give it other tasks"
            )
        sizes = [len(rows[key]) for key in parts[split]]
        draws[split] = _draw(shots[split], queries[split], sizes, times, stratify, targets)
    if left_out:
        some = ", ".join(f"{key} ({len(rows[key])})" for key in left_out[:SHOWN])
        more = f" and {len(left_out) - SHOWN} more" if len(left_out) > SHOWN else ""
        warnings.warn(
            f"{len(left_out)} of {len(named)} tasks are too small for shot={shot} and a query, and "
            f"are left out: {some}{more}",
            stacklevel=2,
        )
    details: Details = (("left_out", len(left_out)), ("split_seed", seed),
                        ("standardise", standardise))  # fmt: skip
    whole = _Bank(inputs, targets, rows, memory_budget)

    def distribution(split: str) -> RaggedTasks:
        own = parts[split]
        sizes = np.array([len(rows[key]) for key in own], np.int32)
        return RaggedTasks(
            bank=whole.of(own),
            start=jnp.asarray(np.cumsum(sizes, dtype=np.int32) - sizes),
            count=jnp.asarray(sizes),
            label=whole.labels(own) if draws[split].order == "stratified" else None,
            draw=draws[split], split=split, name=name, names=tuple(map(str, own)),
            standardise=standardise, least_spread=least_spread,
            in_order=in_order and split != "train", way=targets.way, details=details,
        )  # fmt: skip

    return Splits.of(distribution)


def _named(tasks: Any) -> dict[Any, tuple[Any, Any]]:
    """Return the pairs by name, or by place in a list."""
    pairs = dict(tasks) if isinstance(tasks, Mapping) else dict(enumerate(tasks))
    for key, pair in pairs.items():
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise DataError(
                f"task {key}: given a {type(pair).__name__}; expected the pair (x, y) of its "
                "inputs and targets"
            )
    if len(pairs) < 3:
        raise DataError(f"given {len(pairs)} tasks; expected three or more, one for each split")
    return pairs


def _check_shot(shot: Any) -> None:
    if isinstance(shot, bool):
        sound = False
    elif isinstance(shot, int | np.integer):
        sound = bool(shot >= 1)
    elif isinstance(shot, float):
        sound = 0 < shot < 1
    else:
        sound = (
            isinstance(shot, tuple) and len(shot) == 2
            and all(isinstance(n, int | np.integer) for n in shot) and 1 <= shot[0] <= shot[1]
        )  # fmt: skip
    if not sound:
        raise DataError(
            f"shot={shot!r}; expected a number of examples, 1 or more, a range such as (4, 64), or "
            "a share of each task between 0 and 1, such as 0.5"
        )


def _least(shot: Shot) -> int:
    """Return the fewest support examples that a task can have."""
    return shot[0] if isinstance(shot, tuple) else shot if isinstance(shot, int) else 1


def _draw(
    shot: Shot, query: int | None, sizes: list[int], times: Any, stratify: bool, targets: _Targets
) -> Draw:
    stratified = stratify and targets.way is not None and not times
    order = "time" if times else "stratified" if stratified else "random"
    largest, smallest = max(sizes), min(sizes)
    left = largest - (share(shot, largest) if isinstance(shot, float) else _least(shot))
    number = max(min(QUERY if query is None else int(query), left), 1)
    fixed = isinstance(shot, int) and smallest >= shot + number and order != "time"
    return Draw(shot, number, largest, full=fixed, order=order, classes=targets.way or 0)


def _parts(splits: Any, names: list[Any], seed: int) -> dict[str, list[Any]]:
    """Return the names of the tasks of every split."""
    if not isinstance(splits, Mapping):
        bank.check_fractions("splits", splits, "tasks")
        by_text = {str(key): key for key in names}
        if len(by_text) < len(names):
            raise DataError("two tasks have names of one spelling; give every task its own")
        cut = bank.shuffled(by_text, seed, splits)
        return {split: [by_text[text] for text in own] for split, own in cut.items()}
    bank.check_names("given the splits", [str(split) for split in splits])
    parts = {split: list(splits[split]) for split in NAMES}
    bank.check_disjoint({split: [*map(str, own)] for split, own in parts.items()})
    known = set(names)
    for split, own in parts.items():
        unknown = [key for key in own if key not in known]
        if unknown:
            raise DataError(
                f"the {split} split names {len(unknown)} tasks that are not there, such as "
                f"{unknown[0]!r}; expected names of the tasks, such as {names[0]!r}"
            )
        if len(set(own)) < len(own):
            raise DataError(f"the {split} split names a task twice")
    return parts


def _times(order: Any, named: Mapping[Any, Any]) -> dict[Any, np.ndarray]:
    """Return the points in time of every task's examples; of none if there is no order."""
    if order is None:
        return {}
    given = dict(order) if isinstance(order, Mapping) else dict(enumerate(order))
    if set(given) != set(named):
        raise DataError(
            f"order is given for {len(given)} tasks, and there are {len(named)}, by other names or "
            "places; give the times of each task under its own"
        )
    found = {}
    for key, values in given.items():
        array = np.asarray(values)
        if array.ndim != 1 or array.dtype.kind not in "iufM":
            raise DataError(
                f"order of task {key}: {array.dtype} of shape {array.shape}; expected (n,) numbers "
                "or dates"
            )
        if bool(np.any(np.isnat(array) if array.dtype.kind == "M" else np.isnan(array))):
            raise DataError(f"order of task {key}: some examples have no time; leave them out")
        found[key] = array
    return found


def _inputs(given: Mapping[Any, Any]) -> dict[Any, PyTree]:
    """Return the inputs of every task as arrays, checked, of one kind in all."""
    if any(_is_series(x) for x in given.values()):
        given = _padded_series(given)
    found: dict[Any, PyTree] = {}
    for key, x in given.items():
        try:
            leaves, structure = jax.tree.flatten(x, is_leaf=is_array)
        except (TypeError, ValueError) as error:
            raise DataError(f"x of task {key} cannot be put in order ({error})") from None
        arrays = [to_array(f"x of task {key}", leaf) for leaf in leaves]
        if not arrays or any(a.ndim == 0 or len(a) != len(arrays[0]) for a in arrays):
            raise DataError(
                f"x of task {key} has shapes {[a.shape for a in arrays]}; expected one example "
                "axis, (n, ...), the same in all inputs"
            )
        for array in arrays:
            check_values(f"x of task {key}", array)
        arrays = [a.astype(np.float32) if a.dtype == bool else a for a in arrays]
        found[key] = jax.tree.unflatten(structure, arrays)
    first = next(iter(found))
    due = _described(found[first])
    for key, x in found.items():
        if _described(x) != due:
            raise DataError(
                f"x of task {key} is {_described(x)}, and of task {first} {due}; every task has "
                "the same inputs"
            )
    return found


def _described(x: PyTree) -> str:
    """Return names, kinds and shapes of an example."""
    kinds = {"f": "floats", "i": "integers", "u": "integers"}
    leaves = by_path(x) if not isinstance(x, np.ndarray) else {"": x}
    return ", ".join(
        f"{path} {kinds[kept(leaf.dtype).kind]} {leaf.shape[1:]}".strip()
        for path, leaf in leaves.items()
    )


def _is_series(x: Any) -> bool:
    """Return whether this is a list of sequences of unequal length."""
    if not isinstance(x, list | tuple) or not x:
        return False
    shapes = {np.shape(each) for each in x if hasattr(each, "shape")}
    return len(shapes) > 1 and len({len(shape) for shape in shapes}) == 1


def _padded_series(given: Mapping[Any, Any]) -> dict[Any, dict[str, np.ndarray]]:
    """Return series padded by zeros to the longest of all tasks, and how long each is."""
    series = {key: [np.asarray(each) for each in x] for key, x in given.items()}
    shapes = {each.shape[1:] for x in series.values() for each in x}
    if len(shapes) > 1 or any(each.ndim == 0 for x in series.values() for each in x):
        raise DataError(
            f"the series have channels {sorted(shapes)}; expected (time, channels) of one kind"
        )
    longest = max(len(each) for x in series.values() for each in x)
    if longest == 0:
        raise DataError("all series are empty; expected one or more points in time")
    found = {}
    for key, x in series.items():
        whole = np.zeros((len(x), longest, *shapes.copy().pop()), np.result_type(*x, np.float32))
        for i, each in enumerate(x):
            whole[i, : len(each)] = each
        found[key] = {"series": whole, "length": np.array([len(each) for each in x], np.int32)}
    return found


@dataclasses.dataclass(frozen=True)
class _Targets:
    """Targets of all tasks: floats with gaps, or classes by number.

    Args:
        values: `(n, targets)` float32 or `(n,)` int32, by task.
        way: number of classes; `None` for regression.
        gaps: whether some of several targets are missing where others are not.
    """

    values: dict[Any, np.ndarray]
    way: int | None
    gaps: bool

    @classmethod
    def of(cls, given: Mapping[Any, Any], count: Mapping[Any, int], kind: str, classes: str) -> Any:
        arrays = {key: _target(key, y, count[key]) for key, y in given.items()}
        kinds = {array.dtype.kind == "f" for array in arrays.values()}
        if len(kinds) > 1 and kind == "auto":
            raise DataError(
                "some tasks have floats for targets and others labels; say kind= what they are"
            )
        if kind == "regression" or (kind == "auto" and kinds == {True}):
            return cls._regression(arrays)
        return cls._classification(arrays, kind, classes)

    @classmethod
    def _regression(cls, arrays: dict[Any, np.ndarray]) -> Any:
        values = {}
        for key, y in arrays.items():
            if y.dtype.kind not in "fiub":
                raise DataError(f"y of task {key} is {y.dtype}; expected numbers for a regression")
            y = y.astype(np.float32)
            y = y[:, None] if y.ndim == 1 else y
            if np.isinf(y).any():
                raise DataError(
                    f"y of task {key} is infinite, or beyond float32, in row "
                    f"{int(np.argwhere(np.isinf(y))[0, 0])}; leave it out, or make it NaN, a gap"
                )
            values[key] = y
        widths = {y.shape[1:] for y in values.values()}
        if len(widths) > 1:
            raise DataError(f"tasks have targets of shapes {sorted(widths)}; expected one")
        missing = [np.isnan(y).reshape(len(y), -1) for y in values.values()]
        gaps = any(bool((m.any(axis=1) & ~m.all(axis=1)).any()) for m in missing)
        return cls(values, None, gaps)

    @classmethod
    def _classification(cls, arrays: dict[Any, np.ndarray], kind: str, classes: str) -> Any:
        labels = {}
        for key, y in arrays.items():
            if y.ndim != 1:
                raise DataError(f"y of task {key} has shape {y.shape}; expected (n,) labels")
            if y.dtype.kind == "f":
                if not bool(np.all(y == np.round(y))):
                    raise DataError(
                        f"y of task {key} holds fractions or NaN, which are no classes; say "
                        'kind="regression", or leave out what has no label'
                    )
                y = y.astype(np.int64)
            labels[key] = to_labels(f"y of task {key}", y)
        if len({array.dtype.kind == "O" for array in labels.values()}) > 1:
            labels = {key: array.astype(object) for key, array in labels.items()}
        try:
            known = [np.unique(array) for array in labels.values()]
            shared = np.unique(np.concatenate(known))
        except TypeError:
            raise DataError("labels are of several kinds; expected one, in all tasks") from None
        if kind == "auto" and shared.dtype.kind in "iu" and len(shared) > MANY:
            raise DataError(
                f'y are integers of {len(shared)} values; say kind="regression" to take them as '
                'numbers, or kind="classification"'
            )
        own = [shared if classes == "all" else each for each in known]
        values = {key: np.searchsorted(of, array).astype(np.int32)
                  for of, (key, array) in zip(own, labels.items(), strict=True)}  # fmt: skip
        way = max(map(len, own))
        if way < 2:
            raise DataError("all labels are the same; expected two classes or more")
        return cls(values, way, False)

    def rows(self, key: Any, times: np.ndarray | None) -> Int[np.ndarray, " rows"]:
        """Return the examples of a task that have a target, in order of time if there is one."""
        y = self.values[key]
        if times is not None and len(times) != len(y):
            raise DataError(
                f"order of task {key} has {len(times)} times for {len(y)} examples; expected one "
                "for each"
            )
        there = np.ones(len(y), bool)
        if self.way is None:
            there = ~np.isnan(y).reshape(len(y), -1).all(axis=1)
        order = np.arange(len(y)) if times is None else np.argsort(times, kind="stable")
        return order[there[order]]


def _target(key: Any, y: Any, count: int) -> np.ndarray:
    array = to_array(f"y of task {key}", y)
    if array.ndim == 0 or len(array) != count:
        raise DataError(
            f"task {key} has {count} examples and targets of shape {array.shape}; expected (n, ...)"
        )
    if array.dtype.kind in "OUSTb" and array.ndim != 1:
        raise DataError(f"y of task {key} is {array.dtype} of shape {array.shape}; expected (n,)")
    return array


@dataclasses.dataclass(frozen=True)
class _Bank:
    """The rows of all tasks, on the device or on the host.

    Args:
        inputs: by task.
        targets: by task.
        rows: which of them are of use, by task.
        memory_budget: in bytes.
    """

    inputs: dict[Any, PyTree]
    targets: _Targets
    rows: dict[Any, Int[np.ndarray, " _"]]
    memory_budget: int

    def of(self, names: Sequence[Any]) -> PyTree | HostRows:
        """Return the rows of some tasks, one after another."""
        x = jax.tree.map(
            lambda *parts: np.concatenate(
                [a[self.rows[key]] for key, a in zip(names, parts, strict=True)]
            ),
            *(self.inputs[key] for key in names),
        )
        y: Shaped[np.ndarray, "rows ..."]
        y = np.concatenate([self.targets.values[key][self.rows[key]] for key in names])
        there: Float[np.ndarray, "rows ..."] | None = None
        if self.targets.gaps:
            there, y = (~np.isnan(y)).astype(np.float32), np.nan_to_num(y)
        x = jax.tree.map(lambda a: a.astype(kept(a.dtype), copy=False), x)
        whole = (x, y, there)
        if sum(leaf.nbytes for leaf in jax.tree.leaves(whole)) > self.memory_budget:
            return HostRows(whole, np.arange(len(y)))
        return jax.tree.map(jnp.asarray, whole)

    def labels(self, names: Sequence[Any]) -> Any:
        """Return the classes of the rows of some tasks."""
        return jnp.asarray(
            np.concatenate([self.targets.values[key][self.rows[key]] for key in names])
        )

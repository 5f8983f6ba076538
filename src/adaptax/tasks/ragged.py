"""Tasks of unequal sizes, one after another in a bank, padded to one shape when they are drawn."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, Integer, PRNGKeyArray, PyTree, Shaped

from adaptax import weights
from adaptax.program import call
from adaptax.task import Batch, HostTaskDistribution, Task
from adaptax.tasks.episodes import Details, HostRows, distinct, take

Shot = int | float | tuple[int, int]
"""Support examples: a number, the share of a task's rows (a float in (0, 1)), or a range from which
every episode draws, both ends included."""

SORTED = 512
"""Beyond so many rows a draw sorts; below it swaps, which costs the square of the rows."""


class Rows(NamedTuple):
    """Which rows of the bank make up a task; leading axes, if any, run over tasks.

    Args:
        support: rows, `(..., S)`.
        query: rows, `(..., Q)`.
        sizes: how many of each there are, `(..., 2)`; the others are copies of rows that are.
    """

    support: Int32[Array, "*lead s"]
    query: Int32[Array, "*lead q"]
    sizes: Int32[Array, "*lead 2"]


@dataclass(frozen=True)
class Draw:
    """How many rows of a task an episode has, and which come first.

    Args:
        shot: support examples; see `Shot`.
        query: queries at most.
        largest: rows of the largest task.
        full: whether every task has `shot + query` rows, so that nothing is padded.
        order: `"random"`; `"stratified"`, so that support and queries hold the classes in
            proportion; or `"time"`: the support comes right before a random cut, the queries
            after it.
        classes: number of classes, for `"stratified"`.
    """

    shot: Shot
    query: int
    largest: int
    full: bool = False
    order: str = "random"
    classes: int = 0

    @property
    def support(self) -> int:
        """Rows of the support, padding included."""
        if isinstance(self.shot, tuple):
            return min(self.shot[1], self.largest - 1)
        return self.shot if isinstance(self.shot, int) else share(self.shot, self.largest)

    def size(self, key: PRNGKeyArray, count: Int32[Array, ""]) -> Int32[Array, ""]:
        """Draw the number of support examples of a task of so many rows; a query is left."""
        if isinstance(self.shot, int):
            return jnp.int32(self.shot)
        if isinstance(self.shot, float):
            return jnp.clip(jnp.round(self.shot * count).astype(jnp.int32), 1, count - 1)
        low, high = self.shot
        return jax.random.randint(key, (), low, jnp.minimum(high, count - 1) + 1, jnp.int32)

    def places(
        self, key: PRNGKeyArray, size: Int32[Array, ""], count: Int32[Array, ""], label: Any
    ) -> tuple[Int32[Array, " s"], Int32[Array, " q"], Int32[Array, ""]]:
        """Draw places in a task: of the support, of the queries, and how many these are.

        Args:
            key: of the draw.
            size: support examples.
            count: rows of the task.
            label: classes of the first `largest` rows, for `"stratified"`.
        """
        many = self.support + self.query
        if self.order == "time":
            cut = jax.random.randint(key, (), size, count, jnp.int32)
            first = cut - size
            left = jnp.minimum(count - cut, self.query)
            return first + jnp.arange(self.support), cut + jnp.arange(self.query), left
        if self.order == "stratified":
            order = _stratified(key, label, count, self.classes)
            order = jnp.pad(order, (0, max(many - len(order), 0)))
        elif many <= SORTED:
            order = distinct(key, many, count)
        else:
            bits = jax.random.bits(key, (max(self.largest, many),), jnp.uint32)
            order = jnp.lexsort((bits, jnp.arange(len(bits)) >= count)).astype(jnp.int32)
        query = jax.lax.dynamic_slice_in_dim(order, size, self.query)
        return order[: self.support], query, jnp.minimum(count - size, self.query)


def share(part: float, count: int) -> int:
    """Return the support of a task of so many rows: a share of them, but leaving a query."""
    return min(max(round(part * count), 1), count - 1)


def _stratified(
    key: PRNGKeyArray, label: Integer[Array, " rows"], count: Int32[Array, ""], classes: int
) -> Int32[Array, " rows"]:
    """Return a random order whose every beginning holds each class in proportion, but for two.

    Example j of a class of n, in random order, is put at `(j + u) / n`, one u for each class.
    """
    for_order, for_offset = jax.random.split(key)
    there = jnp.arange(len(label)) < count
    bits = jax.random.bits(for_order, label.shape, jnp.uint32)
    order = jnp.lexsort((bits, ~there))
    own = label[order]
    member = jax.nn.one_hot(own, classes, dtype=jnp.int32) * there[:, None]
    number = jnp.take_along_axis(jnp.cumsum(member, axis=0), own[:, None], axis=1)[:, 0] - 1
    total = jnp.maximum(jnp.sum(member, axis=0), 1)
    at = (number + jax.random.uniform(for_offset, (classes,))[own]) / total[own]
    return order[jnp.lexsort((at, ~there))].astype(jnp.int32)


class RaggedTasks(HostTaskDistribution):
    """Tasks of one split, each with rows of its own: some to learn from, others to be judged on.

    Every episode has one shape: what a task lacks is filled by copies of a row, of weight 0.

    Args:
        bank: the rows of all tasks, task by task: inputs, targets, and what these count, 0 for
            gaps, `None` if there are none. Or `HostRows` of the same.
        start: first row of every task.
        count: rows of every task.
        label: classes of all rows, for stratified draws, else `None`.
        draw: sizes and order.
        split: `"train"`, `"val"` or `"test"`.
        name: of the data.
        names: of the tasks.
        standardise: targets by mean and spread of their task's `"support"`, or `"none"`.
        least_spread: below this a spread of targets counts as this.
        in_order: whether episode i is of task i, or of one at random.
        way: number of classes; `None` for regression.
        unit: what a report calls the number of tasks.
        packed: whether x are bits, eight a byte, to be unpacked to 0 and 1.
        details: what else a report says of the data, as pairs.
    """

    bank: Any
    start: Int32[Array, " tasks"]
    count: Int32[Array, " tasks"]
    label: Int32[Array, " rows"] | None
    draw: Draw = eqx.field(static=True)
    split: str = eqx.field(static=True)
    name: str = eqx.field(static=True)
    names: tuple[str, ...] = eqx.field(static=True)
    standardise: str = eqx.field(static=True, default="none")
    least_spread: float = eqx.field(static=True, default=1e-3)
    in_order: bool = eqx.field(static=True, default=True)
    way: int | None = eqx.field(static=True, default=None)
    unit: str = eqx.field(static=True, default="members")
    packed: bool = eqx.field(static=True, default=False)
    details: Details = eqx.field(static=True, default=())

    @property
    def on_host(self) -> bool:
        """Return whether the bank is on the host."""
        return isinstance(self.bank, HostRows)

    def rows(self, i: int | Integer[Array, ""], key: PRNGKeyArray) -> Rows:
        """Draw rows of task `i`, none twice; pure and traceable."""
        start, count = self.start[i], self.count[i]
        size = self.draw.size(jax.random.fold_in(key, 1), count)
        label = None
        if self.draw.order == "stratified" and self.label is not None:
            places = jnp.minimum(start + jnp.arange(self.draw.largest), len(self.label) - 1)
            label = self.label[places]
        support, query, left = self.draw.places(key, size, count, label)
        sizes = jnp.stack([size, left]).astype(jnp.int32)
        if not self.draw.full:
            support = jnp.where(jnp.arange(len(support)) < size, support, support[0])
            query = jnp.where(jnp.arange(len(query)) < left, query, query[0])
        return Rows(start + support, start + query, sizes)

    def member(self, i: int | Integer[Array, ""], key: PRNGKeyArray) -> Task:
        """Return a task of task `i` of the list: the key names which of its rows.

        Inputs are `(S, ...)` and `(Q, ...)`, targets `(n, targets)` float or `(n,)` int32.
        """
        return self.fetch(self.rows(i, key))

    def plan(self, key: PRNGKeyArray) -> Rows:
        """Return the rows of the episode that this key names, of any task, each as likely."""
        for_task, for_rows = jax.random.split(key)
        which = jax.random.randint(for_task, (), 0, len(self.names), jnp.int32)
        return self.rows(which, for_rows)

    def plan_episode(self, key: PRNGKeyArray, i: int | Integer[Array, ""]) -> Rows:
        """Return the rows of episode `i`, whose own key is `key`: of task `i` if in order."""
        return self.rows(i % len(self.names), key) if self.in_order else self.plan(key)

    def fetch(self, plan: Rows) -> Task:
        """Gather planned tasks."""
        support, query = take(self.bank, plan.support), take(self.bank, plan.query)
        if not self.on_host:
            return self._task(support, query, plan.sizes)
        task: Task = call(RaggedTasks._task, self._without_bank(), support, query, plan.sizes)
        return task

    def sample(self, key: PRNGKeyArray) -> Task:
        """Return the task that this key names, of any task of the list, each as likely."""
        return self.fetch(self.plan(key))

    def episode(self, key: PRNGKeyArray, i: int | Integer[Array, ""]) -> Task:
        """Return episode `i` of a stream, whose own key is `key`: of task `i`, if in order.

        As many episodes as tasks are each task once; with more of them it starts again, with
        other rows.
        """
        return self.fetch(self.plan_episode(key, i))

    def scores(
        self,
        predictions: Float[Array, "*particles n out"],
        targets: Shaped[Array, "n ..."],
        weight: weights.Weight = None,
    ) -> dict[str, Float[Array, ""]]:
        """Return what `evaluate` adds: `r2 = 1 − Σ(y − f)² / Σ(y − ȳ)²`, f the mean prediction.

        ȳ is the mean of the *support*, 0 in its units: what one would predict without looking at
        inputs (R² out of sample). Only for targets that are standardised by the support.
        """
        if self.standardise != "support" or not jnp.issubdtype(targets.dtype, jnp.floating):
            return {}
        mean = predictions if predictions.ndim == targets.ndim else jnp.mean(predictions, axis=0)
        errors = weights.total((targets - mean) ** 2, weight)
        return {"r2": 1 - errors / weights.total(targets**2, weight)}

    def describe(self) -> dict[str, Any]:
        """Return name, split, shots, queries, number of tasks and details of the data."""
        shot: Hashable = self.draw.shot
        how = {} if self.draw.order == "random" else {"draw": self.draw.order}
        return {
            "tasks": self.name,
            "split": self.split,
            **({} if self.way is None else {"way": self.way}),
            "shot": shot,
            "query": self.draw.query,
            self.unit: len(self.names),
            "order": f"each {self.unit[:-1]} in turn" if self.in_order else "at random",
            **how,
            **dict(self.details),
        }

    def _without_bank(self) -> RaggedTasks:
        return eqx.tree_at(
            lambda t: (t.bank, t.start, t.count, t.label), self, (None, None, None, None),
            is_leaf=lambda leaf: leaf is None or isinstance(leaf, HostRows),
        )  # fmt: skip

    def _task(self, support: PyTree, query: PyTree, sizes: Int32[Array, "*lead 2"]) -> Task:
        """The rows as a task: unpacked, weighed, standardised; for leading axes each."""
        if sizes.ndim > 1:
            task: Task = jax.vmap(self._task)(support, query, sizes)
            return task
        batches = [
            self._weighed(self._treated(*rows), sizes[j], j == 0)
            for j, rows in enumerate((support, query))
        ]
        if self.standardise == "support" and jnp.issubdtype(batches[0].y.dtype, jnp.floating):
            mean, scale = centre_and_scale(batches[0], self.least_spread)
            batches = [Batch(b.x, (b.y - mean) / scale, b.weight) for b in batches]
        return Task(*batches)

    def _treated(self, x: PyTree, y: Array, there: Array | None) -> Batch:
        def as_floats(a: Array) -> Array:
            return a.astype(float) if jnp.issubdtype(a.dtype, jnp.floating) else a

        x = jnp.unpackbits(x, axis=-1) if self.packed else x
        x = jax.tree.map(lambda a: a.astype(float) if a.dtype == jnp.uint8 else as_floats(a), x)
        return Batch(x, as_floats(y), None if there is None else as_floats(there))

    def _weighed(self, batch: Batch, size: Array, of_support: bool) -> Batch:
        padded = not (self.draw.full or (of_support and isinstance(self.draw.shot, int)))
        if not padded:
            return batch
        there = (jnp.arange(batch.size) < size).astype(float)
        if batch.weight is not None:
            there = batch.weight * weights.spread(there, batch.weight)
        return Batch(batch.x, batch.y, there)


def centre_and_scale(
    support: Batch, least: float
) -> tuple[Float[Array, " targets"], Float[Array, " targets"]]:
    """Return mean and standard deviation of every target of a support, of what there is of it.

    Args:
        support: float targets `(n, targets)`.
        least: below this a deviation counts as this.
    """
    if support.weight is None:
        return jnp.mean(support.y, axis=0), jnp.maximum(jnp.std(support.y, axis=0), least)
    weight = weights.spread(support.weight, support.y)
    count = jnp.maximum(jnp.sum(weight, axis=0), 1e-12)
    mean = jnp.sum(jnp.where(weight > 0, weight * support.y, 0), axis=0) / count
    squares = jnp.where(weight > 0, weight * (support.y - mean) ** 2, 0)
    return mean, jnp.maximum(jnp.sqrt(jnp.sum(squares, axis=0) / count), least)

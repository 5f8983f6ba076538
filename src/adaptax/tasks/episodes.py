"""N-way k-shot episodes drawn from a bank of classes.

W denotes the ways, K the shots, Q the queries a class.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Int32, PRNGKeyArray, PyTree, Shaped

from adaptax.program import call
from adaptax.task import Batch, HostTaskDistribution, Task
from adaptax.tasks.files import DataError

Rotations = Literal["none", "random", "classes"]
"""`"classes"`: every quarter turn of a class is a class of its own. `"random"`: one random quarter
turn for every class of an episode. `"none"`: images as they are."""

Details = tuple[tuple[str, Hashable], ...]


def kept(dtype: np.dtype) -> np.dtype:
    """Return the type that the device keeps examples of this type in.

    Raises:
        DataError: if they are not numbers.
    """
    if dtype in (np.uint8, np.bool_):
        return np.dtype(dtype)
    if jnp.issubdtype(dtype, jnp.integer):
        return np.dtype(jax.dtypes.canonicalize_dtype(dtype.newbyteorder("=")))
    if jnp.issubdtype(dtype, jnp.floating):
        return np.dtype(np.float32)
    raise DataError(f"examples of type {dtype}; expected numbers")


class Plan(NamedTuple):
    """Which images make up an episode; leading axes, if any, run over episodes.

    Args:
        rows: rows of the bank, `(..., W, K+Q)`, distinct within a class; the first K are support.
        turns: quarter turns of every class, `(..., W)`.
    """

    rows: Int32[Array, "*lead way each"]
    turns: Int32[Array, "*lead way"]


def distinct(key: PRNGKeyArray, m: int, count: int | Int[Array, ""]) -> Int32[Array, " m"]:
    """Draw `m` distinct integers of `range(count)`, every ordered choice equally likely.

    The first `m` swaps of a Fisher-Yates shuffle, without the array that they would shuffle: swap
    `i` exchanges places `i` and `s_i`, `s_i ~ U{i, ..., count-1}`, and what ends in place `i` is
    found by following `s_i` back through the earlier swaps. Costs `m` random numbers and `m²`
    comparisons whatever the `count`, which may be traced; sorting would cost `count·log(count)`.

    Args:
        key: fixes the choice.
        m: how many; at most `count`, which cannot be checked when it is traced.
        count: how many there are.
    """
    place = jnp.arange(m, dtype=jnp.int32)
    # The remainder favours small numbers by count / 2^32 at most; `randint` would draw twice.
    left = (jnp.int32(count) - place).astype(jnp.uint32)
    swap = place + (jax.random.bits(key, (m,), jnp.uint32) % left).astype(jnp.int32)

    def undo(k: Any, value: Any) -> Any:
        return jnp.where((value == swap[k]) & (k < place), jnp.int32(k), value)

    value: Array = swap
    if m <= 32:  # one fused kernel; beyond, compile time would grow with m
        for k in reversed(range(m)):
            value = undo(k, value)
    else:
        value = jax.lax.fori_loop(0, m, lambda i, value: undo(m - 1 - i, value), value)
    return value


def rotate(
    images: Shaped[Array, "*lead way each side side channels"], turns: Int[Array, "*lead way"]
) -> Shaped[Array, "*lead way each side side channels"]:
    """Turn the images of every class by `turns` quarter turns, as `numpy.rot90` does."""
    k = turns[..., None, None, None, None]
    images = jnp.where(k % 2 == 1, jnp.swapaxes(images, -3, -2), images)
    images = jnp.where((k == 1) | (k == 2), jnp.flip(images, -3), images)
    return jnp.where((k == 2) | (k == 3), jnp.flip(images, -2), images)


@dataclass(frozen=True)
class Design:
    """What an episode is made of, and how bytes become inputs.

    Args:
        way: classes an episode, W.
        shot: support examples a class, K.
        query: query examples a class, Q; may be 0.
        rotations: see `Rotations`.
        invert: turn bytes b into 255 − b, so that ink on paper becomes 1 on 0.
        mean: subtracted from inputs in [0, 1], one number a channel.
        std: divides them after that.
    """

    way: int
    shot: int
    query: int
    rotations: Rotations = "none"
    invert: bool = False
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    def plan(self, key: PRNGKeyArray, start: Int32[Array, " c"], count: Int32[Array, " c"]) -> Plan:
        """Draw an episode: W classes in random order, K+Q rows of each."""
        for_classes, for_rows, for_turns = jax.random.split(key, 3)
        classes = len(start)
        if self.rotations == "classes":
            chosen = distinct(for_classes, self.way, 4 * classes)
            chosen, turns = chosen % classes, chosen // classes
        else:
            chosen = distinct(for_classes, self.way, classes)
            turns = jnp.zeros(self.way, jnp.int32)
        if self.rotations == "random":
            turns = (jax.random.bits(for_turns, (self.way,), jnp.uint32) % 4).astype(jnp.int32)
        draw: Any = jax.vmap(lambda key, count: distinct(key, self.shot + self.query, count))
        rows = draw(jax.random.split(for_rows, self.way), count[chosen])
        return Plan(start[chosen][:, None] + rows, turns)

    def task(self, examples: PyTree[Shaped[Array, ...]], turns: Int[Array, "*lead way"]) -> Task:
        """Return planned examples as a task, class by class, with labels 0, ..., W−1."""
        if self.rotations != "none":
            examples = rotate(examples, turns)
        inputs, axis = self.inputs(examples), turns.ndim
        ends = (0, self.shot, self.shot + self.query)
        support, query = (
            jax.tree.map(lambda a, b=b, e=e: jax.lax.slice_in_dim(a, b, e, axis=axis), inputs)
            for b, e in pairwise(ends)
        )
        lead = turns.shape[:-1]
        return Task(self._batch(support, lead, self.shot), self._batch(query, lead, self.query))

    def inputs(self, examples: PyTree[Shaped[Array, ...]]) -> PyTree[Shaped[Array, ...]]:
        """Return bytes as floats in [0, 1], normalised if asked, and other numbers as they are."""
        return jax.tree.map(self._input, examples)

    def _input(self, a: Shaped[Array, "*any"]) -> Shaped[Array, "*any"]:
        if a.dtype != jnp.uint8:
            return a.astype(float) if jnp.issubdtype(a.dtype, jnp.floating) else a
        # Inverted as bytes, scaled by one multiplication: the same bits compiled or not.
        a = 255 - a if self.invert else a
        inputs = a.astype(float) * (1 / 255)
        if self.mean is not None and self.std is not None:
            inputs = (inputs - jnp.array(self.mean)) / jnp.array(self.std)
        return inputs

    def _batch(self, inputs: PyTree, lead: tuple[int, ...], each: int) -> Batch:
        labels = jnp.repeat(jnp.arange(self.way, dtype=jnp.int32), each)
        shape = (*lead, self.way * each)
        x = jax.tree.map(lambda a: a.reshape(shape + a.shape[len(lead) + 2 :]), inputs)
        return Batch(x, jnp.broadcast_to(labels, shape))


@jax.tree_util.register_static
@dataclass(frozen=True, eq=False)
class HostRows:
    """Rows of an array on the host, possibly memory-mapped; compared by identity.

    Args:
        array: `(n, ...)`, or a tree of such; never touched but for the rows that are taken.
        index: which rows of it make up the bank, class by class.
    """

    array: PyTree[Shaped[np.ndarray, "n ..."]]
    index: Int[np.ndarray, " rows"]

    def take(self, rows: Int[np.ndarray, "*any"]) -> PyTree[Shaped[np.ndarray, ...]]:
        """Return examples by their rows of the bank, of the types that the device keeps."""
        return jax.tree.map(
            lambda a: a[self.index[rows]].astype(kept(a.dtype), copy=False), self.array
        )


def take(bank: PyTree, rows: Int[Array | np.ndarray, "*any"]) -> PyTree:
    """Return examples by their rows of a bank, which is `HostRows` or lies on the device."""
    if isinstance(bank, HostRows):
        return bank.take(np.asarray(rows))
    return jax.tree.map(lambda a: a[rows], bank)


class Episodes(HostTaskDistribution):
    """Episodes of a bank of examples.

    A bank on the device is sampled there. One that is too large stays on the host: episodes are
    planned on the device, their images cross to it as bytes and are treated there. A key names the
    same episode either way.

    Args:
        bank: all examples of the split, `(rows, ...)`, class by class; of several inputs, a tree.
            Or `HostRows`.
        start: first row of every class, `(classes,)`.
        count: rows of every class, `(classes,)`.
        design: ways, shots, queries and treatment of images.
        split: `"train"`, `"val"` or `"test"`.
        name: of the data set.
        classes: names of the classes.
        details: what else a report says of the data, as pairs.
    """

    bank: PyTree[Shaped[Array, "rows ..."]] | HostRows
    start: Int32[Array, " c"]
    count: Int32[Array, " c"]
    design: Design = eqx.field(static=True)
    split: str = eqx.field(static=True)
    name: str = eqx.field(static=True)
    classes: tuple[str, ...] = eqx.field(static=True)
    details: Details = eqx.field(static=True, default=())

    @property
    def on_host(self) -> bool:
        """Return whether the bank is on the host."""
        return isinstance(self.bank, HostRows)

    def examples(self, rows: Int[Array | np.ndarray, "*any"]) -> PyTree[Shaped[Any, ...]]:
        """Return examples by their rows, `(*any, ...)`, as the bank has them."""
        return take(self.bank, rows)

    def plan(self, key: PRNGKeyArray) -> Plan:
        """Return which rows make up the episode that this key names; pure and traceable."""
        return self.design.plan(key, self.start, self.count)

    def fetch(self, plan: Plan) -> Task:
        """Gather planned episodes, `(..., W·K, ...)` for leading axes `...`."""
        task: Task = call(Design.task, self.design, self.examples(plan.rows), plan.turns)
        return task

    def sample(self, key: PRNGKeyArray) -> Task:
        """Return the episode of this key: x `(W·K, ...)` and `(W·Q, ...)`, y int32 in [0, W)."""
        plan = self.plan(key)
        if self.on_host:
            return self.fetch(plan)
        return self.design.task(self.examples(plan.rows), plan.turns)

    def named(self, key: PRNGKeyArray) -> list[str]:
        """Return the names of the classes of the episode of this key, by label."""
        row = np.asarray(self.plan(key).rows)[:, :1]
        start, count = np.asarray(self.start), np.asarray(self.count)
        own = ((row >= start) & (row < start + count)).argmax(axis=1)
        return [self.classes[i] for i in own]

    def describe(self) -> dict[str, Any]:
        """Return name, ways, shots, queries, split, number of classes and details of the data."""
        times = 4 if self.design.rotations == "classes" else 1
        return {
            "tasks": self.name,
            "split": self.split,
            "way": self.design.way,
            "shot": self.design.shot,
            "query": self.design.query,
            "classes": times * len(self.classes),
            "rotations": self.design.rotations,
            **dict(self.details),
        }


StreamedEpisodes = Episodes
"""Episodes of a bank on the host had a class of their own."""

"""Batches, tasks, and distributions of tasks: what a learner is given.

A *task* (or *episode*) is a pair of sources of batches, `Task(support, query)`. A *source* answers
`draw(model, key) -> Batch`: data at rest answers with itself, an environment answers with
roll-outs of the model it is handed. A *task distribution* is a pure function `sample(key) -> Task`.
"""

from __future__ import annotations

import abc
import dataclasses
import zlib
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Integer, PRNGKeyArray, PyTree

from .weights import present, spread, weighing

Model = Any
"""Any callable pytree, `model(x) -> predictions`; `adaptax.roles` says what its parameters are."""


class Batch(eqx.Module):
    """Inputs and targets, both with a leading example axis.

    Tasks of unequal sizes are padded to one: a row of weight 0 is as good as not there, for every
    loss, metric and learner of this library. Layers that mix examples see the weights where they
    ask `adaptax.weights.seen`, as `adaptax.models.BatchNorm` does; those of other libraries do not.

    Args:
        x: inputs, `(n, ...)`, or a pytree of such arrays.
        y: targets, `(n, ...)`: float for regression, integer class labels for classification.
        weight: what each example counts, 0 for padding: `(n,)`; or what each target counts, of
            the shape of `y` or the first of its axes, 0 for a gap. All count 1 if `None`.
    """

    x: PyTree
    y: PyTree
    weight: Float[Array, "n ..."] | None = None

    def draw(self, model: Model, key: PRNGKeyArray) -> Batch:
        """Return the batch itself."""
        return self

    def predict(self, model: Model) -> PyTree:
        """Return `model(x)`; what of the model mixes examples sees their weights."""
        with weighing(None if self.weight is None else self.present):
            return model(self.x)

    @property
    def targets(self) -> PyTree:
        """The targets, 0 where they do not count: a gap may be NaN, and its derivative is none."""
        if self.weight is None:
            return self.y
        return jnp.where(spread(self.weight, self.y) > 0, self.y, jnp.zeros((), self.y.dtype))

    @property
    def size(self) -> int:
        """Number of examples, `n`, padding included."""
        return len(jax.tree.leaves(self.x)[0])

    @property
    def present(self) -> Float[Array, " n"]:
        """What each example counts: the mean over its targets where they have weights."""
        if self.weight is None:
            return jnp.ones(self.size)
        return present(self.weight)

    @property
    def count(self) -> int | Float[Array, ""]:
        """Number of examples, each as often as it counts."""
        return self.size if self.weight is None else jnp.sum(self.present)

    @classmethod
    def joined(cls, *batches: Batch) -> Batch:
        """Return the examples of all batches, one after another."""
        if all(batch.weight is None for batch in batches):
            joined: Batch = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *batches)
            return joined
        each = [jnp.ones(b.size) if b.weight is None else b.weight for b in batches]
        if max(weight.ndim for weight in each) > 1:
            each = [spread(weight, batch.y) for weight, batch in zip(each, batches, strict=True)]
        whole = cls.joined(*(cls(batch.x, batch.y) for batch in batches))
        return cls(whole.x, whole.y, jnp.concatenate(each))


@runtime_checkable
class Source(Protocol):
    """Anything that answers `draw(model, key)` with a `Batch`.

    A source whose answer depends on the inner step (minibatches without replacement) also has
    `at(step) -> Source`; the inner loop asks it for its `step`-th version before it draws.
    """

    def draw(self, model: Model, key: PRNGKeyArray) -> Batch:
        """Return a batch for this model."""
        ...


class Minibatches(eqx.Module):
    """The minibatches of a batch, without replacement, reshuffled when it is exhausted.

    Step `i` covers positions `[i·size, (i+1)·size)` of an endless sequence of random permutations
    of the examples; so it is a pure function of `(key, i)`, and a minibatch may span the end of
    one permutation and the start of the next, as in Reptile's released code.

    Padding is never drawn: the minibatches of a padded batch are those of what is not padding.

    Args:
        batch: the examples to draw from, `(n, ...)`.
        size: examples a minibatch; may exceed `n`.
        key: fixes the sequence of permutations.
        step: which minibatch `draw` answers with.
    """

    batch: Batch
    size: int = eqx.field(static=True)
    key: PRNGKeyArray
    step: int | Int[Array, ""] = 0

    def at(self, step: int | Int[Array, ""]) -> Minibatches:
        """Return the same sequence at another step."""
        return Minibatches(self.batch, self.size, self.key, step)

    def draw(self, model: Model, key: PRNGKeyArray) -> Batch:
        """Return the minibatch of this step; `key` is not used."""
        rows = self._rows() if self.batch.weight is None else self._rows_of_padded()
        drawn: Batch = jax.tree.map(lambda a: a[rows], self.batch)
        return drawn

    def _rows(self) -> Int[Array, " size"]:
        n = self.batch.size
        first = self.step * self.size
        # A minibatch touches at most this many permutations, whatever its offset.
        touched = first // n + jnp.arange((self.size - 1) // n + 2)
        permute: Any = jax.vmap(
            lambda e: jax.random.permutation(jax.random.fold_in(self.key, e), n)
        )
        return jax.lax.dynamic_slice_in_dim(permute(touched).ravel(), first % n, self.size)

    def _rows_of_padded(self) -> Int[Array, " size"]:
        there = self.batch.present > 0
        n = jnp.maximum(jnp.sum(there), 1)
        place = self.step * self.size + jnp.arange(self.size)

        def row(place: Array) -> Array:
            order = _permutation(jax.random.fold_in(self.key, place // n), self.batch.size, n)
            return order[place % n]

        return jnp.argsort(~there, stable=True)[jax.vmap(row)(place)]


def _permutation(key: PRNGKeyArray, size: int, count: Int[Array, ""]) -> Int[Array, " size"]:
    """Return `jax.random.permutation(key, count)` of a traced count, and the rest up to `size`.

    It sorts by random bits, once for as many as a third of them tell apart. The bits of an element
    depend on its place alone, and what is beyond the count sorts last.
    """
    order = jnp.arange(size)
    for bound in (1, *_BOUNDS):
        if size <= bound:
            break
        key, own = jax.random.split(key)
        bits = jax.random.bits(own, (size,), jnp.uint32)
        last = jnp.where(jnp.arange(size) < count, bits, jnp.iinfo(jnp.uint32).max)
        _, sorted_ = jax.lax.sort_key_val(last, order)
        order = jnp.where(count > bound, sorted_, order)
    return order


_BOUNDS = (1625, 2642245)
"""Largest numbers of elements that JAX permutes by one and by two rounds of sorting."""


class Frozen(eqx.Module):
    """A source that answers at each inner step with the batch that was drawn for it.

    Args:
        batches: a `Batch` whose arrays lead with an axis of inner steps.
        step: which of them `draw` answers with.
    """

    batches: Batch
    step: int | Int[Array, ""] = 0

    def at(self, step: int | Int[Array, ""]) -> Frozen:
        """The same batches at another step."""
        return Frozen(self.batches, step)

    def draw(self, model: Model, key: PRNGKeyArray) -> Batch:
        """The batch of this step, whatever the model."""
        drawn: Batch = jax.tree.map(lambda leaf: leaf[self.step], self.batches)
        return drawn


class Task(eqx.Module):
    """One task: learn from `support`, be judged on `query`.

    Args:
        support: the source that adaptation may see.
        query: the source that the adapted model is judged on.
    """

    support: Any
    query: Any

    @classmethod
    def cut(cls, x: PyTree, y: PyTree, shot: int) -> Task:
        """Return the task whose support is the first `shot` examples, and whose query the rest."""
        halves = (
            jax.tree.map(lambda a, part=part: a[part], Batch(x, y))
            for part in (slice(None, shot), slice(shot, None))
        )
        return cls(*halves)

    def unpadded(self) -> Task:
        """Return the task of data at rest without its padding; for the host, as sizes are values.

        Targets that are gaps are NaN in it if they are floats.
        """
        return Task(_unpadded(self.support), _unpadded(self.query))


def _unpadded(source: Any) -> Any:
    if not isinstance(source, Batch) or source.weight is None:
        return source
    rows = np.flatnonzero(np.asarray(source.present) > 0)
    x, y, weight = jax.tree.map(lambda a: np.asarray(a)[rows], (source.x, source.y, source.weight))
    if weight.ndim > 1 and np.issubdtype(y.dtype, np.floating):
        y = np.where(np.asarray(spread(weight, y)) > 0, y, np.nan)
    return Batch(*jax.tree.map(jnp.asarray, (x, y)))


class TaskDistribution(eqx.Module):
    """Abstract: a distribution over tasks.

    `sample` must be pure and traceable: it is called inside compiled programs, under `vmap`.
    """

    split: eqx.AbstractVar[str]

    @abc.abstractmethod
    def sample(self, key: PRNGKeyArray) -> Task:
        """Return the task that this key names."""

    def episode(self, key: PRNGKeyArray, i: int | Integer[Array, ""]) -> Task:
        """Return episode `i` of a stream, whose own key is `key`: here the task of that key.

        A distribution over a list of tasks may go through the list instead.
        """
        return self.sample(key)

    @property
    def on_host(self) -> bool:
        """Return whether tasks are planned on the device and fetched from the host."""
        return False

    def describe(self) -> dict[str, Any]:
        """Return what a report says of the tasks: name, ways, shots, queries, sizes."""
        return {"tasks": type(self).__name__, "split": self.split, **self._settings()}

    def _settings(self) -> dict[str, Any]:
        """Return the fields that are numbers or text, or pairs of such."""

        def plain(value: Any) -> bool:
            pair = isinstance(value, tuple) and len(value) == 2
            return (
                value is None
                or isinstance(value, bool | int | float | str)
                or (pair and all(map(plain, value)))
            )

        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in fields.items() if plain(value) and name != "split"}


class HostTaskDistribution(TaskDistribution):
    """Abstract: tasks whose data may stay on the host, planned on the device and fetched from disk.

    `fit` and `evaluate` plan a whole chunk of tasks at once and fetch it in a background thread
    while the device works on the previous one.
    """

    @abc.abstractmethod
    def plan(self, key: PRNGKeyArray) -> PyTree:
        """Return which rows make up the task that this key names; pure and traceable."""

    def plan_episode(self, key: PRNGKeyArray, i: int | Integer[Array, ""]) -> PyTree:
        """Return the plan of episode `i`, whose own key is `key`; see `episode`."""
        return self.plan(key)

    @abc.abstractmethod
    def fetch(self, plan: PyTree) -> Task:
        """Gather planned tasks on the host; they lead with the leading axes of `plan`."""

    @property
    def on_host(self) -> bool:
        """Return whether tasks are fetched from the host; if not, `sample` must be traceable."""
        return True

    def sample(self, key: PRNGKeyArray) -> Task:
        """Return the task that this key names; not traceable if the data is on the host."""
        return self.fetch(self.plan(key))


class Splits(eqx.Module):
    """Meta-train, meta-validation and meta-test distributions of one family of tasks.

    Args:
        train: what meta-training samples from.
        val: what model selection samples from.
        test: what is reported; selecting on it is an error.
        preparation: what makes inputs of further rows, of tables: `adaptax.tasks.Preparation`.
    """

    train: TaskDistribution
    val: TaskDistribution
    test: TaskDistribution
    preparation: Any = eqx.field(static=True, default=None)

    @classmethod
    def of(cls, make: Callable[[str], TaskDistribution]) -> Splits:
        """Return the splits that a function makes of their names."""
        return cls(make("train"), make("val"), make("test"))

    def sample(self, key: PRNGKeyArray) -> Task:
        """Return a meta-training task."""
        return self.train.sample(key)


def way_of(tasks: Any) -> int | None:
    """Return how many classes a task has, at most, if the distribution says so: its `"way"`."""
    way = tasks.describe().get("way") if isinstance(tasks, TaskDistribution) else None
    return way if isinstance(way, int) else None


def episode_key(split: str, key: PRNGKeyArray, i: int | Integer[Array, ""]) -> PRNGKeyArray:
    """Return the key of episode `i`, a function of (key, split, i) and of nothing else.

    Two splits never share a stream, so a seed that is used for training and for test does not
    make the test tasks of a generated family those that were trained on.
    """
    stream = zlib.crc32(split.encode()) & 0x7FFFFFFF
    return jax.random.fold_in(jax.random.fold_in(key, stream), i)

"""What a learner is given: batches, tasks, and distributions of tasks.

A *task* (or *episode*) is a pair of sources of batches, `Task(support, query)`. A *source* answers
`draw(model, key) -> Batch`: data at rest answers with itself, an environment answers with
roll-outs of the model it is handed. A *task distribution* is a pure function `sample(key) -> Task`.
"""

from __future__ import annotations

import zlib
from typing import Any, Protocol, runtime_checkable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Integer, PRNGKeyArray, PyTree

Model = Any
"""Any callable pytree, `model(x) -> predictions`; `adaptax.roles` says what its parameters are."""


class Batch(eqx.Module):
    """Inputs and targets, both with a leading example axis.

    Args:
        x: inputs, `(n, ...)`, or a pytree of such arrays.
        y: targets, `(n, ...)`: float for regression, integer class labels for classification.
    """

    x: PyTree
    y: PyTree

    def draw(self, model: Model, key: PRNGKeyArray) -> Batch:
        """A batch is the source that answers with itself."""
        return self

    @property
    def size(self) -> int:
        """Number of examples, `n`."""
        return len(jax.tree.leaves(self.x)[0])


@runtime_checkable
class Source(Protocol):
    """Anything that answers `draw(model, key)` with a `Batch`.

    A source whose answer depends on the inner step (minibatches without replacement) also has
    `at(step) -> Source`; the inner loop asks it for its `step`-th version before it draws.
    """

    def draw(self, model: Model, key: PRNGKeyArray) -> Batch:
        """A batch for this model."""
        ...


class Minibatches(eqx.Module):
    """The minibatches of a batch, without replacement, reshuffled when it is exhausted.

    Step `i` covers positions `[i·size, (i+1)·size)` of an endless sequence of random permutations
    of the examples; so it is a pure function of `(key, i)`, and a minibatch may span the end of
    one permutation and the start of the next, as in Reptile's released code.

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
        """The same sequence at another step."""
        return Minibatches(self.batch, self.size, self.key, step)

    def draw(self, model: Model, key: PRNGKeyArray) -> Batch:
        """The minibatch of this step; `key` is not used."""
        n = self.batch.size
        first = self.step * self.size
        # A minibatch touches at most this many permutations, whatever its offset.
        touched = first // n + jnp.arange((self.size - 1) // n + 2)
        permute = jax.vmap(lambda e: jax.random.permutation(jax.random.fold_in(self.key, e), n))
        rows = jax.lax.dynamic_slice_in_dim(permute(touched).ravel(), first % n, self.size)
        return jax.tree.map(lambda a: a[rows], self.batch)


class Task(eqx.Module):
    """One task: learn from `support`, be judged on `query`.

    Args:
        support: the source that adaptation may see.
        query: the source that the adapted model is judged on.
    """

    support: Any
    query: Any


class TaskDistribution(eqx.Module):
    """Abstract: a distribution over tasks.

    `sample` must be pure and traceable: it is called inside compiled programs, under `vmap`.
    """

    split: eqx.AbstractVar[str]

    def sample(self, key: PRNGKeyArray) -> Task:
        """The task that this key names."""
        raise NotImplementedError  # pragma: no cover - abstract

    def episode(self, key: PRNGKeyArray, i: int | Integer[Array, ""]) -> Task:
        """Episode `i` of a stream, whose own key is `key`. Here: the task that the key names.

        A distribution over a list of tasks may go through the list instead.
        """
        return self.sample(key)

    def describe(self) -> dict[str, Any]:
        """What a report says of the tasks: name, ways, shots, queries, sizes."""
        return {"tasks": type(self).__name__, "split": self.split}


class HostTaskDistribution(TaskDistribution):
    """Abstract: tasks whose data stays on the host, planned on the device and fetched from disk.

    `fit` and `evaluate` plan a whole chunk of tasks at once and fetch it in a background thread
    while the device works on the previous one.
    """

    def plan(self, key: PRNGKeyArray) -> PyTree:
        """Pure and traceable: which rows make up the task that this key names."""
        raise NotImplementedError  # pragma: no cover - abstract

    def fetch(self, plan: PyTree) -> Task:
        """On the host: gather planned tasks; they lead with the leading axes of `plan`."""
        raise NotImplementedError  # pragma: no cover - abstract

    def sample(self, key: PRNGKeyArray) -> Task:
        """The task that this key names; not traceable."""
        return self.fetch(self.plan(key))


class Splits(eqx.Module):
    """Meta-train, meta-validation and meta-test distributions of one family of tasks.

    Args:
        train: what meta-training samples from.
        val: what model selection samples from.
        test: what is reported; selecting on it is an error.
    """

    train: TaskDistribution
    val: TaskDistribution
    test: TaskDistribution

    def sample(self, key: PRNGKeyArray) -> Task:
        """A meta-training task."""
        return self.train.sample(key)


def episode_key(split: str, key: PRNGKeyArray, i: int | Integer[Array, ""]) -> PRNGKeyArray:
    """The key of episode `i`: a function of (key, split, i) and of nothing else.

    Two splits never share a stream, so a seed that is used for training and for test does not
    make the test tasks of a generated family those that were trained on.
    """
    stream = zlib.crc32(split.encode()) & 0x7FFFFFFF
    return jax.random.fold_in(jax.random.fold_in(key, stream), i)

"""Many tasks of unequal sizes adapted and predicted at once, in a few compiled programs.

Supports and queries are padded to size classes, the powers of two, with examples of weight 0; the
tasks of a class are mapped over together. So a task of a size that was never seen runs a program
that is compiled already.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray, PyTree

from .. import program, roles
from ..learner import Adapter, Meta
from ..task import Batch, Model
from .predict import Deviation, is_predictive, learned_noise

LEAST = 8
"""Smallest size class."""

AT_ONCE = 256
"""Tasks that are mapped over at most in one call of a program."""


def size_class(count: int, least: int = LEAST) -> int:
    """Return the power of two that is `count` or the next above it."""
    return max(least, 1 << (count - 1).bit_length())


def padded(values: PyTree, size: int) -> PyTree:
    """Return the arrays of a tree with rows of zeros behind theirs, `size` in all."""

    def one(array: Any) -> np.ndarray:
        array = np.asarray(array)
        return np.concatenate([array, np.zeros((size - len(array), *array.shape[1:]), array.dtype)])

    return jax.tree.map(one, values)


def weights(count: int, size: int) -> np.ndarray:
    """Return the weights of a padded batch: 1 for its `count` examples, 0 for what pads them."""
    return (np.arange(size) < count).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Adapted:
    """The models of many tasks.

    Args:
        count: tasks.
        groups: positions of tasks, and their models, stacked; the last ones may repeat.
    """

    count: int
    groups: Sequence[tuple[np.ndarray, Model]]

    def only(self, i: int) -> Adapted:
        """Return the model of one task, as that of the only one."""
        for index, models in self.groups:
            if len(place := np.flatnonzero(index == i)[:1]):
                arrays, rest = eqx.partition(models, eqx.is_array)
                own = jax.tree.map(lambda a, place=place: a[place], arrays)
                return Adapted(1, [(np.zeros(1, int), eqx.combine(own, rest))])
        raise IndexError(f"task {i} of {self.count}")

    def predict(self, queries: Sequence[PyTree]) -> list[np.ndarray]:
        """Return the predictions for the queries of every task.

        Args:
            queries: inputs of every task, `(n, ...)`.

        Returns:
            For every task `(n, out)`, of an ensemble `(particles, n, out)`.
        """
        found: list[Any] = [None] * self.count
        for index, models in self.groups:
            size = size_class(max(_length(queries[i]) for i in index))
            x = _stacked([padded(queries[i], size) for i in index])
            out = np.asarray(program.call(_predict, models, x))
            for i, one in zip(index, out):
                n = _length(queries[i])
                found[i] = one[:, :n] if _leads(models) else one[:n]
        return found

    def deviations(self, queries: Sequence[PyTree]) -> list[np.ndarray] | None:
        """Return the standard deviations of targets that the models predict; `None` if they do not.

        Args:
            queries: as in `predict`, as is what is returned.
        """
        if not all(is_predictive(models) for _, models in self.groups):
            return None
        own = [(index, Deviation.of(models)) for index, models in self.groups]
        return dataclasses.replace(self, groups=own).predict(queries)

    def noise(self) -> list[np.ndarray]:
        """Return the standard deviations that the models learned, of ensembles each member's.

        Raises:
            ValueError: for models that have none.
        """
        found: list[Any] = [None] * self.count
        for index, models in self.groups:
            for i, one in zip(index, np.asarray(program.call(_noise, models))):
                found[i] = one
        return found


def adapt(
    learner: Adapter,
    meta: Meta,
    supports: Sequence[tuple[PyTree, Any]],
    *,
    count: Sequence[int] | None = None,
    key: PRNGKeyArray | None = None,
) -> Adapted:
    """Adapt to the support of every task.

    Args:
        learner: any `Adapter`.
        meta: its meta-parameters.
        supports: inputs and targets of every task, `(n, ...)`, of unequal lengths; NaN among
            several targets is a gap.
        count: examples of each that count, the first ones; all if `None`.
        key: of adaptation, the same for all; `jax.random.key(0)` if `None`.

    Raises:
        ValueError: if a task has no support.
    """
    if bare := sum(_length(x) == 0 for x, _ in supports):
        raise ValueError(
            f"{bare} of {len(supports)} tasks have no support; give each one example or more"
        )
    key = jax.random.key(0) if key is None else key
    gaps = any(_has_gaps(y) for _, y in supports)
    groups = []
    for index, size in _classes([_length(x) for x, _ in supports]):
        parts = []
        for i in index:
            x, y = supports[i]
            some = _length(x) if count is None else count[i]
            parts.append(_padded(x, y, size, some, gaps))
        batch = Batch(*_stacked(parts))
        groups.append((index, program.call(_adapt, learner, meta, batch, key)))
    return Adapted(len(supports), groups)


def _padded(
    x: PyTree, y: Any, size: int, count: int, gaps: bool
) -> tuple[PyTree, np.ndarray, np.ndarray]:
    """Return a support padded to a size class, and its weights, of every target if some are gaps.

    Args:
        x: inputs.
        y: targets.
        size: of the class.
        count: examples that count.
        gaps: whether any of the tasks has gaps.
    """
    y, weight = np.asarray(y), weights(count, size)
    if gaps:
        there = padded(np.isfinite(y).astype(np.float32), size)
        weight = there * weight.reshape(-1, *[1] * (there.ndim - 1))
        y = np.nan_to_num(y)
    return padded(x, size), padded(y, size), weight


def _has_gaps(y: Any) -> bool:
    y = np.asarray(y)
    return bool(np.issubdtype(y.dtype, np.floating) and np.isnan(y).any())


def _adapt(learner: Adapter, meta: Meta, supports: Batch, key: PRNGKeyArray) -> Model:
    one = lambda support: learner.adapt(meta, support, key=key)  # noqa: E731
    return eqx.filter_vmap(one, out_axes=eqx.if_array(0))(supports)


def _predict(models: Model, x: PyTree) -> PyTree:
    return eqx.filter_vmap(roles.apply, in_axes=(eqx.if_array(0), 0))(models, x)


def _noise(models: Model) -> PyTree:
    return eqx.filter_vmap(learned_noise, in_axes=eqx.if_array(0))(models)


def _classes(sizes: Sequence[int]) -> Iterator[tuple[np.ndarray, int]]:
    """Return the tasks of every size class, a power of two of them at a time: the last repeats."""
    classes = np.array([size_class(size) for size in sizes])
    for size in np.unique(classes):
        index = np.flatnonzero(classes == size)
        for start in range(0, len(index), AT_ONCE):
            some = index[start : start + AT_ONCE]
            more = size_class(len(some), 1) - len(some)
            yield np.concatenate([some, np.repeat(some[-1:], more)]), int(size)


def _length(x: PyTree) -> int:
    return len(jax.tree.leaves(x)[0])


def _stacked(trees: Sequence[PyTree]) -> PyTree:
    return jax.tree.map(lambda *leaves: jnp.asarray(np.stack(leaves)), *trees)


def _leads(models: Model) -> bool:
    """Return whether predictions lead with an axis of particles."""
    return hasattr(models, "particles")

"""Batch normalisation in a model of any library: which arrays it has, and running statistics.

A batch-norm layer is any node of a model that has the attribute `use_running_average`, as
`adaptax.models.BatchNorm` and Flax NNX's `BatchNorm` do. Its arrays `mean` and `var`, if any, are
its running statistics, and its other arrays its weights. Called while `use_running_average` is
false, it normalises by the batch, and either updates `mean` and `var` in place, as Flax NNX does,
or passes its result through `observe`, as ours does. A layer of one's own takes part by doing so.
"""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from . import roles, tree

Rows = dict[str, Array]
"""Arrays by their path in the model, such as `"blocks/0/1/shift"`."""


def weights(model: PyTree) -> Rows:
    """The weights of every batch-norm layer: scale and shift."""
    return {path: leaf for path, leaf, statistic in _arrays(model) if not statistic}


def statistics(model: PyTree) -> Rows:
    """The running statistics of every batch-norm layer that has some."""
    return {path: leaf for path, leaf, statistic in _arrays(model) if statistic}


def track(model: PyTree) -> PyTree:
    """The model, with running statistics in those layers of ours that had none."""
    lacks = lambda layer: hasattr(layer, "tracking") and layer.mean is None  # noqa: E731
    return _each_layer(lambda layer: layer.tracking() if lacks(layer) else layer, model)


def forget(model: PyTree) -> PyTree:
    """The model, without running statistics in those layers of ours that have some."""
    return _each_layer(lambda layer: layer.forgetting() if hasattr(layer, "forgetting") else layer,
                       model)  # fmt: skip


def use_running_average(model: PyTree) -> PyTree:
    """A copy of the model that normalises by its running statistics instead of the batch's."""

    def switched(layer: PyTree) -> PyTree:
        layer = jax.tree.map(lambda leaf: leaf, layer)
        object.__setattr__(layer, "use_running_average", True)  # the copy is ours to complete
        return layer

    return _each_layer(switched, model)


@jax.custom_vjp
def observe(y: PyTree, running: PyTree, updated: PyTree) -> PyTree:
    """`y`, whose derivative with respect to `running` is `running − updated`, whatever comes after.

    So a gradient tells, beside what it was taken for, how the pass would update the running
    statistics, and gradient descent with rate 1 on them *is* that update. No scan, remat, vmap or
    rewriting of the model on the way can lose it.

    Args:
        y: what the layer returns.
        running: its running statistics.
        updated: the same after this batch.
    """
    return y


def _observe_forward(y: PyTree, running: PyTree, updated: PyTree) -> tuple[PyTree, PyTree]:
    return y, (running, updated)


def _observe_backward(kept: PyTree, cotangent: PyTree) -> tuple[PyTree, PyTree, PyTree]:
    running, updated = kept
    away = jax.tree.map(jnp.subtract, running, updated)
    return cotangent, away, jax.tree.map(jnp.zeros_like, updated)


observe.defvjp(_observe_forward, _observe_backward)


def carry(rows: Rows, moved: Rows) -> tuple[Rows, Array]:
    """Return running statistics that later passes go on from, and a term of value 0.

    The term's derivative with respect to `rows` is what earlier passes moved them by; that of what
    later passes observe, on the rows that are returned, adds theirs.

    Args:
        rows: as they were.
        moved: as earlier passes left them.
    """
    still, moved = jax.lax.stop_gradient((rows, moved))
    away = jax.tree.map(jnp.subtract, rows, still)  # 0, with a derivative
    by = jax.tree.map(jnp.subtract, still, moved)
    pairs = zip(jax.tree.leaves(away), jax.tree.leaves(by), strict=True)
    term = sum((jnp.sum(tree.wide(a) * tree.wide(b)) for a, b in pairs), jnp.zeros(()))
    return jax.tree.map(jnp.add, moved, away), term


class Observed(eqx.Module):
    """A model whose layers' updates in place pass through `observe`, so that it is pure.

    Args:
        model: any.
    """

    model: PyTree

    def __call__(self, x: PyTree) -> PyTree:
        """What the model returns."""
        model = jax.tree.map(lambda leaf: leaf, self.model)
        y = model(x)
        before, after = statistics(self.model), statistics(model)
        changed = [path for path in before if after[path] is not before[path]]
        if not changed:
            return y
        return observe(y, *({path: rows[path] for path in changed} for rows in (before, after)))


def _is_layer(node: Any) -> bool:
    return hasattr(node, "use_running_average")


def _each_layer(function: Any, model: PyTree) -> PyTree:
    return jax.tree.map(
        lambda node: function(node) if _is_layer(node) else node, model, is_leaf=_is_layer
    )


def _arrays(model: PyTree) -> list[tuple[str, Array, bool]]:
    """Path, array and whether it is a statistic, for the arrays of every batch-norm layer."""

    def kind(node: Any) -> PyTree[str]:
        # Of every leaf below: "" outside of batch-norm layers, else the field that it is in.
        return jax.tree_util.tree_map_with_path(
            lambda path, _: roles.path_name(path[:1]) if _is_layer(node) else "", node
        )

    kinds = jax.tree.map(kind, model, is_leaf=_is_layer)
    leaves = zip(*map(jax.tree.leaves, (tree.paths(model), model, kinds)), strict=True)
    return [
        (path, leaf, field in ("mean", "var"))
        for path, leaf, field in leaves
        if field and eqx.is_inexact_array(leaf)
    ]

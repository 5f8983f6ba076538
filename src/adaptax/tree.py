"""Algebra on models: pytrees whose inexact arrays are their parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray, PyTree

Predicate = Callable[[str], bool]
"""Chooses leaves by path, such as `"head/weight"` or `"blocks/0/norm/shift"`."""


def paths(tree: PyTree) -> PyTree[str]:
    """The path of every leaf, as a tree of strings: attributes, keys and indices joined by `/`."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path_name(path), tree)


def path_name(path: Any) -> str:
    """A path of `jax.tree_util` as `paths` writes it."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def by_path(tree: PyTree) -> dict[str, Any]:
    """The leaves of a tree by their paths."""
    return dict(zip(jax.tree.leaves(paths(tree)), jax.tree.leaves(tree), strict=True))


def replace(tree: PyTree, leaves: dict[str, Any]) -> PyTree:
    """The tree with other leaves at some paths."""
    return jax.tree.map(lambda path, leaf: leaves.get(path, leaf), paths(tree), tree)


def every(path: str) -> bool:
    """The predicate that chooses every parameter."""
    return True


def under(*prefixes: str) -> Predicate:
    """The predicate that chooses the leaves at or below any of these paths: `under("head")`."""
    return lambda path: any(path == p or path.startswith(p + "/") for p in prefixes)


def adaptable(model: PyTree, adapt_only: Predicate | None = None) -> PyTree[bool]:
    """Which leaves the inner loop adapts, as a tree of booleans.

    Args:
        model: any pytree; only its inexact arrays can be adapted.
        adapt_only: a predicate on paths. `None` leaves out the modules that declare
            `adapted = False`, as `adaptax.models.BatchNorm` does in MAML's own networks.

    Raises:
        ValueError: if no leaf is chosen.
    """

    def fixed(node: Any) -> bool:
        return adapt_only is None and getattr(node, "adapted", True) is False

    def choose(node: Any) -> Any:
        return jax.tree.map(lambda leaf: eqx.is_inexact_array(leaf) and not fixed(node), node)

    mask = jax.tree.map(choose, model, is_leaf=fixed)
    if adapt_only is not None:
        mask = jax.tree.map(lambda chosen, path: chosen and adapt_only(path), mask, paths(model))
    if not any(jax.tree.leaves(mask)):
        names = [p for p, leaf in zip(jax.tree.leaves(paths(model)), jax.tree.leaves(model))
                 if eqx.is_inexact_array(leaf)]  # fmt: skip
        raise ValueError(
            "no parameter is left to adapt: `adapt_only` chose none of "
            f"{', '.join(names) or 'the model, which has no inexact arrays'}"
        )
    return mask


def parameters(model: PyTree) -> PyTree:
    """The inexact arrays of a model; everything else is `None`."""
    return eqx.filter(model, eqx.is_inexact_array)


def count(model: PyTree) -> int:
    """Number of parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(parameters(model)))


def full_like(model: PyTree, value: float) -> PyTree:
    """The parameters of a model, all set to `value`."""
    return jax.tree.map(lambda leaf: jnp.full_like(leaf, value), parameters(model))


def axpy(a: float | Float[Array, ""], x: PyTree, y: PyTree) -> PyTree:
    """`a·x + y`, leaf by leaf."""
    return jax.tree.map(lambda x, y: a * x + y, x, y)


def shift(model: PyTree, to: PyTree, start: PyTree) -> PyTree:
    """The model, its parameters moved by `to − start`."""
    move = lambda m, a, b: m + (a - b) if eqx.is_inexact_array(m) else m  # noqa: E731
    return jax.tree.map(move, model, to, start)


def squared_distance(x: PyTree, y: PyTree) -> Float[Array, ""]:
    """`‖x − y‖²` over the inexact arrays of two models."""
    pairs = zip(jax.tree.leaves(parameters(x)), jax.tree.leaves(parameters(y)), strict=True)
    return sum((jnp.sum((wide(a) - wide(b)) ** 2) for a, b in pairs), jnp.zeros(()))


def wide(x: Array) -> Array:
    """The array in float32 if it is in half precision, as it is if not: for sums."""
    half = jnp.issubdtype(x.dtype, jnp.floating)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32)) if half else x


def in_types_of(like: PyTree, tree: PyTree) -> PyTree:
    """The arrays of a tree in the dtypes of another of its structure."""
    return jax.tree.map(lambda old, new: new.astype(old.dtype), like, tree)


def noise_like(key: PRNGKeyArray, model: PyTree) -> PyTree:
    """Standard normal noise of the shape of a model's parameters, independent for each leaf."""
    leaves, structure = jax.tree.flatten(parameters(model))
    keys = jax.random.split(key, max(len(leaves), 1))
    noise = [jax.random.normal(k, leaf.shape, leaf.dtype) for k, leaf in zip(keys, leaves)]
    return jax.tree.unflatten(structure, noise)


def stack(models: list[PyTree]) -> PyTree:
    """Models of one structure as one model whose arrays lead with a new axis."""
    arrays = [eqx.filter(model, eqx.is_array) for model in models]
    rest = eqx.filter(models[0], eqx.is_array, inverse=True)
    return eqx.combine(jax.tree.map(lambda *leaves: jnp.stack(leaves), *arrays), rest)


def at(models: PyTree, index: int | Array) -> PyTree:
    """Of models stacked along a leading axis, the one at an index: what `stack` undoes."""
    return jax.tree.map(lambda leaf: leaf[index] if eqx.is_array(leaf) else leaf, models)


def finite(tree: PyTree) -> Bool[Array, ""]:
    """Whether every inexact array of the tree is finite."""
    leaves = jax.tree.leaves(parameters(tree))
    return jnp.all(jnp.array([jnp.all(jnp.isfinite(leaf)) for leaf in leaves]))


def norm(tree: PyTree) -> Float[Array, ""]:
    """`‖x‖` over the inexact arrays of a tree."""
    squares = (jnp.sum(jnp.square(wide(leaf))) for leaf in jax.tree.leaves(parameters(tree)))
    return jnp.sqrt(sum(squares, jnp.zeros(())))

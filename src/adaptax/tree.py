"""Algebra on models: pytrees, of whose arrays `adaptax.roles` says which are parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray, PyTree

from . import roles
from .roles import path_name

Predicate = Callable[[str], bool]
"""Chooses leaves by path, such as `"head/weight"` or `"blocks/0/norm/shift"`."""


def paths(tree: PyTree) -> PyTree[str]:
    """Return the path of every leaf as a string: attributes, keys and indices joined by `/`."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path_name(path), tree)


def by_path(tree: PyTree) -> dict[str, Any]:
    """Return the leaves of a tree by their paths."""
    return dict(zip(jax.tree.leaves(paths(tree)), jax.tree.leaves(tree), strict=True))


def replace(tree: PyTree, leaves: dict[str, Any]) -> PyTree:
    """Return the tree with other leaves at some paths."""
    return jax.tree.map(lambda path, leaf: leaves.get(path, leaf), paths(tree), tree)


def every(path: str) -> bool:
    """Choose every parameter."""
    return True


def under(*prefixes: str) -> Predicate:
    """Return the predicate of the leaves at or below any of these paths: `under("head")`."""
    return lambda path: any(path == p or path.startswith(p + "/") for p in prefixes)


def adaptable(model: PyTree, adapt_only: Predicate | None = None) -> PyTree[bool]:
    """Return which leaves the inner loop adapts, as a tree of booleans.

    Args:
        model: any pytree; only its parameters can be adapted, see `adaptax.roles`.
        adapt_only: a predicate on paths. `None` leaves out the modules that declare
            `adapted = False`, as `adaptax.models.BatchNorm` does in MAML's own networks.

    Raises:
        ValueError: if no leaf is chosen.
    """

    def fixed(node: Any) -> bool:
        return adapt_only is None and getattr(node, "adapted", True) is False

    def choose(node: Any, mask: PyTree[bool]) -> PyTree[bool]:
        return jax.tree.map(lambda chosen: chosen and not fixed(node), mask)

    trained = roles.trained(model)
    mask = jax.tree.map(choose, model, trained, is_leaf=fixed)
    return only(mask, adapt_only, "adapt_only", trained)


def only(
    mask: PyTree[bool], predicate: Predicate | None, name: str, among: PyTree[bool] | None = None
) -> PyTree[bool]:
    """Return the mask without the leaves that a predicate does not choose.

    Args:
        mask: booleans in the structure of a model.
        predicate: on paths; all if `None`.
        name: of the argument that the predicate is.
        among: the leaves to name where none is left; those of the mask if `None`.

    Raises:
        ValueError: if no leaf is left.
    """
    among = mask if among is None else among
    if predicate is not None:
        mask = jax.tree.map(lambda chosen, path: chosen and predicate(path), mask, paths(mask))
    if not any(jax.tree.leaves(mask)):
        names = [path for path, chosen in by_path(among).items() if chosen]
        raise ValueError(
            f"no parameter is left to {name.removesuffix('_only')}: `{name}` chose none of "
            f"{', '.join(names) or 'the model, which has no inexact arrays'}"
        )
    return mask


def parameters(model: PyTree) -> PyTree:
    """Return the parameters of a model, shared ones in one place; everything else is `None`."""
    model = roles.deduplicate(model)
    return eqx.filter(model, roles.trained(model))


def count(model: PyTree) -> int:
    """Return the number of parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(parameters(model)))


def full_like(model: PyTree, value: float) -> PyTree:
    """Return the parameters of a model, all set to `value`."""
    return jax.tree.map(lambda leaf: jnp.full_like(leaf, value), parameters(model))


def axpy(a: float | Float[Array, ""], x: PyTree, y: PyTree) -> PyTree:
    """Return `a·x + y`, leaf by leaf."""
    return jax.tree.map(lambda x, y: a * x + y, x, y)


def shift(model: PyTree, to: PyTree, start: PyTree) -> PyTree:
    """Return the model, its parameters moved by `to − start`."""
    move = lambda chosen, m, a, b: m + (a - b) if chosen else m  # noqa: E731
    return jax.tree.map(move, roles.trained(model), model, to, start)


def squared_distance(x: PyTree, y: PyTree) -> Float[Array, ""]:
    """Return `‖x − y‖²` over the parameters of two models."""
    pairs = zip(jax.tree.leaves(parameters(x)), jax.tree.leaves(parameters(y)), strict=True)
    return sum((jnp.sum((wide(a) - wide(b)) ** 2) for a, b in pairs), jnp.zeros(()))


def wide(x: Array) -> Array:
    """Return the array, in float32 if it is in half precision: for sums."""
    half = jnp.issubdtype(x.dtype, jnp.floating)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32)) if half else x


def in_types_of(like: PyTree, tree: PyTree) -> PyTree:
    """Return the arrays of a tree in the dtypes of another of its structure."""
    return jax.tree.map(lambda old, new: new.astype(old.dtype), like, tree)


def noise_like(key: PRNGKeyArray, model: PyTree) -> PyTree:
    """Draw standard normal noise of the shape of a model's parameters, independent by leaf."""
    leaves, structure = jax.tree.flatten(parameters(model))
    keys = jax.random.split(key, max(len(leaves), 1))
    noise = [jax.random.normal(k, leaf.shape, leaf.dtype) for k, leaf in zip(keys, leaves)]
    return jax.tree.unflatten(structure, noise)


def stack(models: list[PyTree]) -> PyTree:
    """Stack models of one structure into one, whose arrays lead with a new axis."""
    shares = roles.deduplicate(models[0]) is not models[0]
    models = [roles.deduplicate(model) for model in models]
    arrays = [eqx.filter(model, eqx.is_array) for model in models]
    rest = eqx.filter(models[0], eqx.is_array, inverse=True)
    stacked = eqx.combine(jax.tree.map(lambda *leaves: jnp.stack(leaves), *arrays), rest)
    return roles.reshare(stacked) if shares else stacked


def at(models: PyTree, index: int | Array) -> PyTree:
    """Return one of the models that `stack` joined."""
    take = lambda leaf: leaf[index] if eqx.is_array(leaf) else leaf  # noqa: E731
    return roles.kept(lambda models: jax.tree.map(take, models), models)


def finite(tree: PyTree) -> Bool[Array, ""]:
    """Return whether every parameter of the tree is finite."""
    leaves = jax.tree.leaves(parameters(tree))
    return jnp.all(jnp.array([jnp.all(jnp.isfinite(leaf)) for leaf in leaves]))


def norm(tree: PyTree) -> Float[Array, ""]:
    """Return `‖x‖` over the parameters of a tree."""
    squares = (jnp.sum(jnp.square(wide(leaf))) for leaf in jax.tree.leaves(parameters(tree)))
    return jnp.sqrt(sum(squares, jnp.zeros(())))

"""Layers of any model by their paths: found, taken out, replaced by others.

A layer is a node of the model's tree that can be called; nothing of the model's own code changes.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from .. import roles, tree
from ..conv import fast
from ..task import Batch, Model


class Features(eqx.Module):
    """In the place of a head that was taken out: hands on what the head was given.

    Args:
        way: outputs that the head had; `None` if it does not say.
    """

    way: int | None = eqx.field(static=True, default=None)

    def __call__(self, x: Array, **how: Any) -> Array:
        """Return the input."""
        return x


class Affine(eqx.Module):
    """A head that is made for a task: `x W + b`.

    Args:
        weight: `(features, out)`.
        bias: `(out,)`.
    """

    weight: Float[Array, "features out"]
    bias: Float[Array, " out"]

    def __call__(self, x: Float[Array, "n features"]) -> Float[Array, "n out"]:
        """Return a batch of outputs."""
        return x @ self.weight + self.bias


class Headed(eqx.Module):
    """A model without its head, and another head.

    Args:
        body: gives features, `(n, ...)`; they are flattened.
        head: of features, `(n, features)`.
    """

    body: Model
    head: Any

    def __call__(self, x: PyTree) -> Array:
        """Return the head's outputs, `(n, out)`."""
        return self.head(flat(self.body(x)))


def flat(features: Array) -> Float[Array, "n features"]:
    """Return features as rows, in float32 if they are in half precision."""
    return tree.wide(features.reshape(len(features), -1))


def embed(body: Model, batch: Batch) -> Float[Array, "n features"]:
    """Return the features of the examples of a batch."""
    return fast(roles.pure(_features))(body, batch)


def _features(body: Model, batch: Batch) -> Float[Array, "n features"]:
    return flat(batch.predict(body))


def without_head(model: Model, path: str | None) -> Model:
    """Return a model that gives what its head was given: its features.

    Args:
        model: any; one without a head already is returned as it is.
        path: of the head in the model; `None` for a model whose outputs are the features.

    Raises:
        ValueError: if there is no layer at the path.
    """
    if path is None:
        return model
    head = find(model, path)
    if isinstance(head, Features):
        return model
    if not _is_layer(head):
        raise ValueError(
            f"the model, {type(model).__name__}, has no layer at head={path!r} to take out; give "
            f"head= one of {', '.join(layers(model)) or 'no layers'}, or head=None to take the "
            "model's outputs for features"
        )
    return replaced(model, {path: Features(width(head))})


def way_of(model: Model, path: str | None) -> int | None:
    """Return how many outputs the head had that `without_head` took out, if it is known."""
    head = None if path is None else find(model, path)
    return head.way if isinstance(head, Features) else None


def layers(model: Model) -> dict[str, Any]:
    """Return the layers below a model by their paths, outer ones first."""
    found: dict[str, Any] = {}
    for name, child in _children(model)[0]:
        if _is_layer(child):
            found[name] = child
        found |= {f"{name}/{path}": layer for path, layer in layers(child).items()}
    return found


def matching(model: Model, patterns: tuple[str, ...]) -> dict[str, Any]:
    """Return the layers whose path is of one of the patterns, as file names are: `layers/*`.

    Raises:
        ValueError: if there is none of a pattern.
    """
    every = layers(model)
    found: dict[str, Any] = {}
    for pattern in patterns:
        these = {path: one for path, one in every.items() if fnmatch.fnmatchcase(path, pattern)}
        if not these:
            raise ValueError(
                f"no layer of the model, {type(model).__name__}, is at {pattern!r}; it has "
                f"{', '.join(every) or 'none'}"
            )
        found |= these
    return found


def find(model: Model, path: str) -> Any:
    """Return the node of a model at a path; `None` if there is none."""
    for name, child in _children(model)[0]:
        if path == name:
            return child
        if path.startswith(name + "/"):
            return find(child, path[len(name) + 1 :])
    return None


def replaced(model: Model, new: Mapping[str, Any]) -> Model:
    """Return the model with other nodes at some paths, none of which is below another."""
    if "" in new:
        return new[""]
    children, structure = _children(model)
    nodes = []
    for name, child in children:
        below = {
            path[len(name) + 1 :]: node
            for path, node in new.items()
            if path == name or path.startswith(name + "/")
        }
        nodes.append(replaced(child, below) if below else child)
    return jax.tree.unflatten(structure, nodes)


def width(layer: Any) -> int | None:
    """Return the number of features or channels that a layer gives; `None` if it does not say."""
    for name in ("out_features", "out_channels", "num_features", "out_size"):
        if isinstance(size := getattr(layer, name, None), int):
            return size
    for name in ("bias", "shift", "scale"):
        leaves = jax.tree.leaves(getattr(layer, name, None))
        if len(leaves) == 1 and jnp.ndim(leaves[0]) == 1:
            return leaves[0].shape[0]
    return None


def _children(node: Any) -> tuple[list[tuple[str, Any]], Any]:
    """Return the nodes right below a node by their names, and how they make it up."""
    found, structure = jax.tree_util.tree_flatten_with_path(
        node, is_leaf=lambda inner: inner is not node
    )
    if jax.tree_util.treedef_is_leaf(structure):
        return [], structure
    return [(roles.path_name(path), child) for path, child in found], structure


def _is_layer(node: Any) -> bool:
    """Whether a node is a module, and no array, function or variable."""
    structure = jax.tree.structure(node)
    wraps = len(jax.tree.leaves(node)) == 1 and hasattr(node, "get_value")  # a variable of NNX
    return callable(node) and not jax.tree_util.treedef_is_leaf(structure) and not wraps

"""What of a model is trained, what is state, what is randomness, and what is shared.

* **Trained** are floating-point arrays; of a Flax NNX module those in an `nnx.Param` (or a
  subclass) alone.
* **State** is every other array. No gradient moves it, in the inner or the outer loop: other
  variables of NNX, `equinox.nn.State`, the `mean` and `var` of a batch-norm layer, and what a node
  of the model says of itself by a method `is_state(path)`, paths beginning below the node.
* **Randomness** are typed PRNG keys. Every pass of training (each inner step and each query loss of
  each task) gets others, a function of the key that the pass has anyway: see `fresh`.
* **Shared** are variables that an NNX module holds in several places. JAX flattens them to one
  array for each place and so forgets that they are one; `deduplicate` leaves one array, outside of
  what is traced, and `reshare` puts the variable back in all of its places.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray, PyTree


def path_name(path: Any) -> str:
    """A path of `jax.tree_util` as attributes, keys and indices joined by `/`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def trained(tree: PyTree) -> PyTree[bool]:
    """Which leaves are parameters, as a tree of booleans.

    Args:
        tree: a model, meta-parameters, or what has their structure, such as a gradient.

    Raises:
        ValueError: if a parameter is complex. Its gradient would have to be conjugated, and norms
            and distances be those of complex numbers, everywhere.
    """
    mask = _mask(tree, True)
    for (path, leaf), chosen in zip(
        jax.tree_util.tree_leaves_with_path(tree), jax.tree.leaves(mask), strict=True
    ):
        if chosen and jnp.iscomplexobj(leaf):
            raise ValueError(
                f"the parameter {path_name(path) or 'of the model'} is {leaf.dtype}, and parameters"
                " are real; keep real and imaginary part as two arrays and join them by "
                "jax.lax.complex in the model, or, if it is a constant, make it state"
            )
    return mask


def is_key(leaf: Any) -> bool:
    """Whether a leaf holds typed PRNG keys."""
    return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def check_keys(model: PyTree) -> None:
    """Raise for an untyped key in a model, which would never change.

    Raises:
        ValueError: if an array is `uint32[2]`, which is what such a key looks like.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(model, is_leaf=_is_variable):
        if eqx.is_array(leaf) and leaf.dtype == jnp.uint32 and leaf.shape == (2,):
            raise ValueError(
                f"the array {path_name(path)} of the model is uint32[2], as random keys of the old "
                "kind are, which would never change; make it a key by jax.random.wrap_key_data, or "
                "int32 if it is none"
            )


def fresh(tree: PyTree, key: PRNGKeyArray) -> PyTree:
    """The tree with other PRNG keys, a function of its own and of `key`.

    Different keys in the tree, and so the particles of an ensemble, stay different.

    Args:
        tree: a model or meta-parameters.
        key: names the pass.
    """
    if not any(map(is_key, jax.tree.leaves(tree))):
        return tree
    words = jax.random.bits(key, (2,), jnp.uint32)

    def renew(own: PRNGKeyArray) -> PRNGKeyArray:
        return jax.random.fold_in(jax.random.fold_in(own, words[0]), words[1])

    def each(leaf: Any) -> Any:
        return jax.vmap(renew)(leaf.ravel()).reshape(leaf.shape) if is_key(leaf) else leaf

    return jax.tree.map(each, tree)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Elsewhere:
    """Stands in a variable for the array of another, so that there is no leaf.

    Args:
        up: how many steps the two have no longer in common.
        down: from there to the other.
    """

    up: int
    down: tuple[Any, ...]


def deduplicate(tree: PyTree) -> PyTree:
    """The tree with an array in the first place alone of every variable that is in several.

    Variables are told apart by identity, so this must see the objects of the user: call it before
    anything flattens them. A tree that shares nothing is returned as it is.

    Args:
        tree: a model, meta-parameters, or anything else.
    """
    if _nnx() is None:
        return tree
    found, structure = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_variable)
    places: dict[int, Any] = {}
    leaves, shares = [], False
    for path, leaf in found:
        first = places.setdefault(id(leaf), path) if _is_variable(leaf) else path
        if first is not path:
            common = sum(1 for _ in _common(first, path))
            stand_in = Elsewhere(len(path) - common, first[common:])
            is_none = lambda node: node is None  # noqa: E731 - an array that was filtered out
            leaf = jax.tree.map(lambda _, new=stand_in: new, leaf, is_leaf=is_none)
            shares = True
        leaves.append(leaf)
    return jax.tree.unflatten(structure, leaves) if shares else tree


def reshare(tree: PyTree) -> PyTree:
    """The inverse of `deduplicate`: one variable, a new one, in all of its places.

    Args:
        tree: what `deduplicate` gave, or has its structure.
    """
    if _nnx() is None:
        return tree
    found, structure = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_variable)
    ends = [_stands_in(leaf) for _, leaf in found]
    if not any(ends):
        return tree
    new = {path: jax.tree.map(lambda a: a, leaf) for path, leaf in found}
    leaves = [
        new[path] if end is None else new[path[: len(path) - end.up] + end.down]
        for (path, _), end in zip(found, ends, strict=True)
    ]
    return jax.tree.unflatten(structure, leaves)


def kept(function: Callable[..., PyTree], tree: PyTree, *more: Any) -> PyTree:
    """`function(tree, *more)` of a tree that shares variables, which the result shares as well.

    Args:
        function: from a tree without shared variables to one of like structure.
        tree: with or without.
        more: further arguments.
    """
    once = deduplicate(tree)
    result = function(once, *more)
    return result if once is tree else reshare(result)


def pure(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of a model that sees its shared variables, and changes no model but a copy.

    Args:
        function: of a model and more, such as a loss.

    Raises:
        ValueError: for an error of Equinox's that is due to dropout without a key or to a stateful
            layer without its state, naming the layer.
    """

    if getattr(function, "is_pure", False):  # as what wraps one says, too
        return function

    @functools.wraps(function)
    def call(model: PyTree, *more: Any) -> Any:
        whole = reshare(model)
        if whole is model and _nnx() is not None:
            whole = jax.tree.map(lambda leaf: leaf, model)  # NNX updates in place
        try:
            return function(whole, *more)
        except (AttributeError, RuntimeError, TypeError) as error:
            sentence = _lacks(model)
            if sentence is None:
                raise
            raise ValueError(sentence) from error

    call.__dict__["is_pure"] = True
    return call


def apply(model: PyTree, x: PyTree) -> PyTree:
    """`model(x)`, of a copy of the model with its shared variables; see `pure`."""
    return pure(_call)(model, x)


def _call(model: PyTree, x: PyTree) -> PyTree:
    return model(x)


def _nnx() -> Any:
    """Flax NNX, if it is there: a model of it cannot be where it was not imported."""
    nnx = sys.modules.get("flax.nnx")
    return nnx if hasattr(nnx, "Variable") and hasattr(nnx, "Module") else None


def _is_variable(node: Any) -> bool:
    nnx = _nnx()
    return nnx is not None and isinstance(node, nnx.Variable)


def _is_module(node: Any) -> bool:
    nnx = _nnx()
    return nnx is not None and isinstance(node, getattr(nnx, "Pytree", nnx.Module))


def _common(a: tuple[Any, ...], b: tuple[Any, ...]) -> Any:
    """The steps that two paths begin with alike."""
    for x, y in zip(a, b, strict=False):
        if x != y:
            return
        yield x


def _stands_in(leaf: Any) -> Elsewhere | None:
    if not _is_variable(leaf):
        return None
    inside = jax.tree.leaves(leaf, is_leaf=lambda node: isinstance(node, Elsewhere))
    return inside[0] if inside and isinstance(inside[0], Elsewhere) else None


def _declares(node: Any) -> bool:
    """Whether a node says more of its arrays than their dtype does."""
    return (
        _is_variable(node)
        or _is_module(node)
        or isinstance(node, eqx.nn.State | eqx.nn.StateIndex)
        or hasattr(node, "is_state")
        or hasattr(node, "use_running_average")
    )


def _mask(tree: PyTree, trains: bool) -> PyTree[bool]:
    """`trained`, below nodes whose arrays are parameters, or not, unless they say otherwise."""
    is_state = None
    if _is_variable(tree):
        trains = isinstance(tree, _nnx().Param)
    elif _is_module(tree) or isinstance(tree, eqx.nn.State | eqx.nn.StateIndex):
        trains = False
    elif hasattr(tree, "is_state"):
        is_state = tree.is_state
    elif hasattr(tree, "use_running_average"):
        is_state = lambda path: path in ("mean", "var")  # noqa: E731

    def each(node: Any) -> Any:
        inside = node is not tree and _declares(node)
        return _mask(node, trains) if inside else trains and eqx.is_inexact_array(node)

    mask = jax.tree.map(each, tree, is_leaf=lambda node: node is not tree and _declares(node))
    if is_state is None:
        return mask
    return jax.tree_util.tree_map_with_path(
        lambda path, chosen: chosen and not is_state(path_name(path)), mask
    )


def _lacks(model: PyTree) -> str | None:
    """A sentence on a layer of Equinox's that wants what the model does not hold."""
    kinds = (eqx.nn.Dropout, eqx.nn.State, eqx.nn.StateIndex)
    nodes, _ = jax.tree_util.tree_flatten_with_path(
        model, is_leaf=lambda node: isinstance(node, kinds)
    )
    has = lambda kind: any(isinstance(node, kind) for _, node in nodes)  # noqa: E731
    for path, node in nodes:
        if isinstance(node, eqx.nn.StateIndex) and not has(eqx.nn.State):
            return (
                f"the layer {path_name(path[:-1])} of the model has state, and the model holds no "
                "equinox.nn.State; make both by equinox.nn.make_with_state, and give "
                "adaptax.Batched(model, state)"
            )
        active = isinstance(node, eqx.nn.Dropout) and not (node.inference or node.p == 0)
        if active and not any(is_key(leaf) for _, leaf in nodes):
            return (
                f"the layer {path_name(path)} of the model is dropout, which wants a key at every "
                "call, and the model holds none; give adaptax.Batched(model, key=key), or "
                "equinox.nn.inference_mode(model) for none"
            )
    return None

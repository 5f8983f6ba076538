"""A choice between functions, each of which takes its own derivative."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
from jaxtyping import Array, Float, PyTree

from . import roles


def switch(
    index: Array, branches: Sequence[Callable[..., Array]], tree: PyTree, *rest: Any
) -> Float[Array, ""]:
    """Return `branches[index](tree, *rest)`, differentiable once, with respect to the tree.

    `lax.switch`, differentiated, would keep what *any* branch's derivative needs. Here each
    branch takes its own derivative, and a cheap branch stays cheap.

    Args:
        index: which branch; traced.
        branches: scalar functions.
        tree: meta-parameters.
        rest: further arguments.
    """
    if len(branches) == 1:
        return branches[0](tree, *rest)

    @eqx.filter_custom_vjp
    def chosen(tree: PyTree, rest: Any, index: Array) -> Array:
        arrays, static = eqx.partition((tree, rest), eqx.is_array)

        def value(branch: Callable[..., Array]) -> Callable[[PyTree], Array]:
            def call(arrays: PyTree) -> Array:
                tree, rest = eqx.combine(arrays, static)
                return branch(tree, *rest)

            return call

        return jax.lax.switch(index, [value(branch) for branch in branches], arrays)

    def forward(perturbed: Any, tree: PyTree, rest: Any, index: Array) -> tuple[Array, PyTree]:
        trained, fixed = eqx.partition(tree, roles.trained(tree))
        arrays, static = eqx.partition((fixed, rest), eqx.is_array)

        def derived(branch: Callable[..., Array]) -> Callable[..., Any]:
            def call(trained: PyTree, arrays: PyTree) -> tuple[Array, PyTree]:
                fixed, rest = eqx.combine(arrays, static)
                return jax.value_and_grad(lambda t: branch(eqx.combine(t, fixed), *rest))(trained)

            return call

        return jax.lax.switch(index, [derived(branch) for branch in branches], trained, arrays)

    def backward(gradient: PyTree, cotangent: Array, *_: Any) -> PyTree:
        return jax.tree.map(lambda leaf: cotangent * leaf, gradient)

    chosen.def_fwd(forward)
    chosen.def_bwd(backward)
    return chosen(tree, rest, index)

"""Operations of our own for JAX: what they compute, and how it is compiled on a CPU."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir
from jaxtyping import Array


def primitive(
    name: str, plain: Callable[..., Array], form: Callable[..., Array], static: Sequence[str]
) -> Primitive:
    """Return an operation of one result, without rules to differentiate it.

    Args:
        name: in jaxprs.
        plain: what it computes, in operations of JAX; also what it is under `vmap`.
        form: the same, as it is compiled for a CPU.
        static: names of the arguments that are no arrays.
    """
    made = Primitive(name)

    def shape(*avals: Any, **how: Any) -> Any:
        given = [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in avals]
        out = jax.eval_shape(functools.partial(plain, **how), *given)
        return jax.core.ShapedArray(out.shape, out.dtype)

    made.def_impl(jax.jit(form, static_argnames=static))
    made.def_abstract_eval(shape)
    for kind, platform in ((plain, None), (form, "cpu")):
        lowered = mlir.lower_fun(kind, multiple_results=False)
        mlir.register_lowering(made, lowered, platform=platform)
    batching.primitive_batchers[made] = apart(plain)
    return made


def apart(plain: Callable[..., Array]) -> Callable[..., tuple[Array, int]]:
    """Return the rule by which an operation under `vmap` is what it is written as."""

    def mapped(operands: Sequence[Any], axes: Sequence[Any], **how: Any) -> tuple[Array, int]:
        return jax.vmap(functools.partial(plain, **how), axes)(*operands), 0

    return mapped

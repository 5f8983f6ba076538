"""Update rules whose derivative is finite where a gradient is zero."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core
from jaxtyping import Array, Bool

from .rewrite import rewritten

_Singular = Callable[..., Bool[Array, "*any"]]

# Of the operands of an operation: where its derivative is infinite.
_SINGULAR: dict[str, _Singular] = {
    "sqrt": lambda x: x == 0,
    "cbrt": lambda x: x == 0,
    "rsqrt": lambda x: x == 0,
    "log": lambda x: x == 0,
    "pow": lambda x, y: (x == 0) & (y < 1),
    "integer_pow": lambda x: x == 0,
    "div": lambda x, y: y == 0,
}


def safe(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, its roots, powers, logarithms and quotients without infinite derivatives.

        f'(x) := 0  where f' is infinite,   f = √x, ∛x, 1/√x, xᵖ (p < 1), log x, a/x

    That is at x = 0. The chain rule multiplies the infinity by a zero elsewhere, and 0 · ∞ is NaN:
    in `√(g²)` of Adam, in the norm `√(Σ g²)` of clipping, and in the quotient by that norm, which
    clipping computes and does not choose. Zero is a subgradient of these norms, and the one with
    which the derivative of Adam's first step, `−α g / (|g| + ε)`, is exact at g = 0: `−α / ε`.
    Values are equal to the bit, as are derivatives of any order where they are finite. What only
    overflows, as `v^(−1/2)` of Adafactor does in float32 where v is its floor of 1e-30, is not
    covered.

    Args:
        function: pure, such as the `update` of an optax rule. What has a derivative rule of its
            own keeps it.
    """
    return rewritten(function, _replacement)


def _replacement(equation: Any) -> Callable[..., Array] | None:
    name, params = equation.primitive.name, equation.params
    if name not in _SINGULAR or not jnp.issubdtype(equation.outvars[0].aval.dtype, jnp.inexact):
        return None
    if name == "integer_pow" and params["y"] >= 0:
        return None
    at = 1 if name == "div" else 0
    if isinstance(equation.invars[at], core.Literal):
        return None
    operation = functools.partial(equation.primitive.bind, **params)
    return functools.partial(_guarded, operation, _SINGULAR[name], at)


def _guarded(
    operation: Callable[..., Array], singular: _Singular, at: int, *operands: Any
) -> Array:
    """The operation as a constant where it is singular; elsewhere of operands that never are, so
    that no infinity enters, however often it is differentiated."""
    where = singular(*operands)
    moved = list(operands)
    moved[at] = jnp.where(where, jnp.ones_like(moved[at]), moved[at])
    constant = operation(*map(jax.lax.stop_gradient, operands))
    return jnp.where(where, constant, operation(*moved))

"""A function of many batches that differ in their last example alone: what is shared, done once.

A query that is predicted beside the support, and not beside other queries, makes a batch of its
own. What of the support's examples does not depend on the query is computed once for all: the
function is traced, and an array that leads with the examples is kept in two parts, until an
operation mixes what the query changes into the support's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core
from jaxtyping import Array, PyTree

from .rewrite import bound

_INLINED = ("jit", "pjit", "closed_call", "custom_jvp_call", "custom_vjp_call", "checkpoint")

_ELEMENTWISE = frozenset(
    [
        "abs", "add", "add_any", "and", "atan2", "cbrt", "ceil", "clamp", "convert_element_type",
        "copy", "cos", "cosh", "div", "eq", "erf", "erfc", "erf_inv", "exp", "exp2", "expm1",
        "floor", "ge", "gt", "integer_pow", "is_finite", "le", "log", "log1p", "logistic", "lt",
        "max", "min", "mul", "ne", "neg", "not", "or", "pow", "reduce_precision", "rem", "round",
        "rsqrt", "select_n", "sign", "sin", "sinh", "sqrt", "square", "sub", "tan", "tanh", "xor",
    ]
)  # fmt: skip

_MERGED: dict[str, Callable[[Array, Array], Array]] = {
    "reduce_sum": jnp.add, "reduce_max": jnp.maximum, "reduce_min": jnp.minimum,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class _Value:
    """An array, whole or in the parts of the shared examples and of the last.

    Args:
        whole: the array; `None` if it is in parts.
        parts: leading with the shared examples and with the last one; none of the shared depends
            on the last.
        moves: whether it depends on the last example.
    """

    whole: Any = None
    parts: tuple[Array, Array] | None = None
    moves: bool = False

    def joined(self) -> Any:
        return self.whole if self.parts is None else jnp.concatenate(self.parts)


def beside(
    function: Callable[[PyTree], PyTree], shared: PyTree, each: PyTree, size: int = 16
) -> PyTree:
    """Return what a function makes of every example in the batch of the shared ones and itself.

    Args:
        function: of a batch, to arrays that lead with its examples; pure.
        shared: examples, with a leading axis.
        each: others, which do not see each other.
        size: how many of them at once.
    """
    n = len(jax.tree.leaves(shared)[0])
    if n == 0:
        alone = lambda one: jax.tree.map(lambda q: q[None], one)  # noqa: E731
        return lax.map(lambda one: jax.tree.map(lambda out: out[0], function(alone(one))), each,
                       batch_size=size)  # fmt: skip
    batch = jax.tree.map(lambda s, q: jnp.concatenate([s, q[:1]]), shared, each)
    closed, shape = jax.make_jaxpr(function, return_shape=True)(batch)

    def last(one: PyTree) -> list[Array]:
        pairs = zip(jax.tree.leaves(shared), jax.tree.leaves(one), strict=True)
        given = [_Value(parts=(s, q[None]), moves=True) for s, q in pairs]
        found = _evaluate(closed, given, n)
        return [value.parts[1][0] if value.parts else value.whole[-1] for value in found]

    first = jax.tree.map(lambda q: q[0], each)
    late = _hoisted(jax.make_jaxpr(last)(first))
    out = lax.map(lambda one: late(*jax.tree.leaves(one)), each, batch_size=size)
    return jax.tree.unflatten(jax.tree.structure(shape), out)


def _hoisted(closed: Any) -> Callable[..., list[Array]]:
    """Return the function of a jaxpr; what does not depend on its arguments is computed here."""
    known = dict(zip(closed.jaxpr.constvars, closed.consts, strict=True))
    moving, late = set(closed.jaxpr.invars), []
    for equation in closed.jaxpr.eqns:
        if equation.effects or any(_in(atom, moving) for atom in equation.invars):
            moving.update(equation.outvars)
            late.append(equation)
        else:
            _run(equation, known)

    def function(*args: Array) -> list[Array]:
        env = {**known, **dict(zip(closed.jaxpr.invars, args, strict=True))}
        for equation in late:
            _run(equation, env)
        return [_read(atom, env) for atom in closed.jaxpr.outvars]

    return function


def _in(atom: Any, found: set[Any]) -> bool:
    return not isinstance(atom, core.Literal) and atom in found


def _read(atom: Any, env: dict[Any, Any]) -> Any:
    return atom.val if isinstance(atom, core.Literal) else env[atom]


def _run(equation: Any, env: dict[Any, Any]) -> None:
    values = [_read(atom, env) for atom in equation.invars]
    env.update(zip(equation.outvars, bound(equation, values), strict=True))


def _evaluate(closed: Any, args: Sequence[_Value], n: int) -> list[_Value]:
    """Evaluate a jaxpr with values in parts.

    Args:
        closed: the jaxpr.
        args: its arguments.
        n: shared examples.
    """
    env: dict[Any, _Value] = {}
    jaxpr = closed.jaxpr if isinstance(closed, core.ClosedJaxpr) else closed
    consts = closed.consts if isinstance(closed, core.ClosedJaxpr) else ()
    env.update(zip(jaxpr.constvars, map(_Value, consts), strict=True))
    env.update(zip(jaxpr.invars, args, strict=True))

    def read(atom: Any) -> _Value:
        return _Value(atom.val) if isinstance(atom, core.Literal) else env[atom]

    for equation in jaxpr.eqns:
        values = [read(atom) for atom in equation.invars]
        found = _apply(equation, values, n)
        env.update(zip(equation.outvars, found, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _apply(equation: Any, values: list[_Value], n: int) -> list[_Value]:
    params, name = equation.params, equation.primitive.name
    if any(value.parts for value in values):
        if name in _INLINED:
            return _evaluate(params.get("call_jaxpr", params.get("jaxpr")), values, n)
        found = _in_parts(equation, name, params, values, n)
        if found is not None:
            return found
    moves = any(value.moves for value in values)
    out = bound(equation, [value.joined() for value in values])
    return [_Value(each, moves=moves) for each in out]


def _in_parts(
    equation: Any, name: str, params: dict[str, Any], values: list[_Value], n: int
) -> list[_Value] | None:
    """Return the results in parts, or of parts that are merged; `None` where there is no way."""

    def on(*pairs: tuple[Any, Any]) -> list[tuple[Any, Any]]:
        both = [bound(equation, list(operands)) for operands in zip(*pairs, strict=True)]
        return list(zip(*both, strict=True))

    if name in _ELEMENTWISE:
        pairs = [_pair(value, n) for value in values]
        return None if None in pairs else _parts(on(*pairs))  # type: ignore[arg-type]
    if name == "scan":
        return _scan(equation, params, values)
    x, *rest = values
    if x.parts is None or any(value.parts or value.moves for value in rest):
        if name != "concatenate" or not all(v.parts for v in values) or params["dimension"] == 0:
            return None
        return _parts(on(*(v.parts for v in values if v.parts)))
    (s, q), more = x.parts, [(value.whole, value.whole) for value in rest]
    if name in _MERGED and 0 in params["axes"]:
        ((left, right),) = on((s, q))
        return [_Value(_MERGED[name](left, right), moves=True)]
    if name == "reshape":
        size = params["new_sizes"]
        if not size or size[0] % (n + 1) or params.get("dimensions") is not None:
            return None
        k = size[0] // (n + 1)
        return _parts([(s.reshape(n * k, *size[1:]), q.reshape(k, *size[1:]))])
    if name == "broadcast_in_dim":
        size, where = params["shape"], params["broadcast_dimensions"]
        if where[:1] != (0,) or size[0] != len(s) + len(q):
            return None
        grown = [lax.broadcast_in_dim(a, (len(a), *size[1:]), where) for a in (s, q)]
        return _parts([(grown[0], grown[1])])
    if name == "slice":
        return _slice(params, s, q)
    return _parts(on((s, q), *more)) if _row_by_row(name, params) else None


def _pair(value: _Value, n: int) -> tuple[Any, Any] | None:
    """Return the operands of an elementwise operation for both parts."""
    if value.parts:
        return value.parts
    if value.moves:
        return None
    shape = jnp.shape(value.whole)
    if not shape or shape[0] == 1:
        return value.whole, value.whole
    at = shape[0] // (n + 1) * n
    return value.whole[:at], value.whole[at:]


def _parts(pairs: list[tuple[Any, Any]]) -> list[_Value]:
    return [_Value(parts=pair, moves=True) for pair in pairs]


def _slice(params: dict[str, Any], s: Array, q: Array) -> list[_Value] | None:
    start, limit = params["start_indices"], params["limit_indices"]
    strides = params["strides"] or (1,) * len(start)
    if limit[0] <= len(s):
        return [_Value(lax.slice(s, start, limit, strides))]
    if start[0] or limit[0] != len(s) + len(q) or strides[0] != 1:
        return None
    cut = [lax.slice(a, start, (len(a), *limit[1:]), strides) for a in (s, q)]
    return _parts([(cut[0], cut[1])])


def _scan(equation: Any, params: dict[str, Any], values: list[_Value]) -> list[_Value] | None:
    """Go through the shared rows once, and on to those of the last example."""
    first = params["num_consts"] + params["num_carry"]
    rows = values[first:]
    if params["reverse"] or any(v.moves for v in values[:first]) or not all(v.parts for v in rows):
        return None
    consts = [v.whole for v in values[: params["num_consts"]]]
    carry = [v.whole for v in values[params["num_consts"] : first]]
    outs = []
    for part in (0, 1):
        some = [v.parts[part] for v in rows if v.parts]
        found = bound(equation, [*consts, *carry, *some], length=len(some[0]))
        carry = found[: params["num_carry"]]
        outs.append(found[params["num_carry"] :])
    return [_Value(c, moves=True) for c in carry] + _parts(list(zip(*outs, strict=True)))


def _row_by_row(name: str, params: dict[str, Any]) -> bool:
    """Return whether the rows of a result are those of the first operand, each by itself."""
    if name in _MERGED or name in ("argmax", "argmin", "reduce_and", "reduce_or", "reduce_prod"):
        return 0 not in params["axes"]
    if name in ("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp", "rev", "sort"):
        axis = params.get("axis", params.get("dimension", params.get("dimensions", (0,))))
        return 0 not in (axis if isinstance(axis, tuple) else (axis,))
    if name == "transpose":
        return bool(params["permutation"][0] == 0)
    if name == "squeeze":
        return 0 not in params["dimensions"]
    if name == "pad":
        return bool(params["padding_config"][0] == (0, 0, 0))
    if name == "conv_forward":
        return True
    if name == "conv_general_dilated":
        where = params["dimension_numbers"]
        return where.lhs_spec[0] == where.out_spec[0] == 0 and params["batch_group_count"] == 1
    if name == "dot_general":
        (contracted, _), (batch, _) = params["dimension_numbers"]
        return 0 not in contracted and not batch
    if name.startswith("reduce_window"):
        window, padding = params.get("window_dimensions", (0,)), params.get("padding", ((1, 1),))
        return window[0] == 1 and padding[0] == (0, 0) and params["window_strides"][0] == 1
    return False

"""A function with some of its primitive operations replaced, whatever library it was written in."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import equinox as eqx
import jax
from jax.extend import core
from jaxtyping import Array

Replace: TypeAlias = Callable[[Any], Callable[..., Array] | None]
"""What takes the place of an equation of a jaxpr: a function of its operands, or `None`."""

_JIT = ("jit", "pjit")
_CONTROL = ("scan", "while", "cond", "checkpoint", "remat", "remat2")


def rewritten(function: Callable[..., Any], replace: Replace) -> Callable[..., Any]:
    """The same function, every operation that `replace` knows in another form.

    The function is traced to a jaxpr and that is evaluated, descending into `jit`, `scan`, `cond`,
    `while` and `checkpoint`. Custom derivative rules keep theirs. A function in which there is
    nothing to replace is called as it is.

    Args:
        function: pure; its arrays may be anywhere in its arguments.
        replace: asked of every equation.
    """

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        leaves, structure = jax.tree.flatten((args, kwargs))
        arrays = [leaf for leaf in leaves if eqx.is_array(leaf)]

        def flat(*arrays: Array) -> Any:
            values = iter(arrays)
            filled = [next(values) if eqx.is_array(leaf) else leaf for leaf in leaves]
            args, kwargs = jax.tree.unflatten(structure, filled)
            out, static = eqx.partition(function(*args, **kwargs), eqx.is_array)
            box.append((jax.tree.structure(out), static))
            return jax.tree.leaves(out)

        box: list[Any] = []
        closed = jax.make_jaxpr(flat)(*arrays)
        if not _touched(closed.jaxpr, replace):
            return function(*args, **kwargs)
        out_structure, static = box[-1]
        out = _evaluate(closed, arrays, replace)
        return eqx.combine(jax.tree.unflatten(out_structure, out), static)

    return wrapped


def _evaluate(closed: Any, args: Sequence[Any], replace: Replace) -> list[Any]:
    """Run a jaxpr with the replacements."""
    jaxpr = closed.jaxpr
    env: dict[Any, Any] = {}

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, core.Literal) else env[atom]

    env.update(zip(jaxpr.constvars, closed.consts, strict=True))
    env.update(zip(jaxpr.invars, args, strict=True))
    for equation in jaxpr.eqns:
        values = [read(atom) for atom in equation.invars]
        results = _bind(equation, values, replace)
        env.update(zip(equation.outvars, results, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _bind(equation: Any, values: list[Any], replace: Replace) -> list[Any]:
    if (other := replace(equation)) is not None:
        return [other(*values)]
    primitive, params = equation.primitive, dict(equation.params)
    if primitive.name in _JIT and _touched(params["jaxpr"].jaxpr, replace):
        return _evaluate(params["jaxpr"], values, replace)
    if primitive.name in _CONTROL:
        params = {name: _rewrite(value, replace) for name, value in params.items()}
    return bound(equation, values, **params)


def bound(equation: Any, values: Sequence[Any], **changed: Any) -> list[Any]:
    """Return the results of an equation of a jaxpr for these operands.

    Args:
        equation: of the jaxpr.
        values: as many as it has operands.
        changed: parameters in place of its own.
    """
    primitive, params = equation.primitive, {**equation.params, **changed}
    bind = primitive.get_bind_params(params)
    functions, params = bind if isinstance(bind, tuple) else ((), bind)  # as JAX < 0.10 has it
    out = primitive.bind(*functions, *values, **params)
    return list(out) if primitive.multiple_results else [out]


def _rewrite(param: Any, replace: Replace) -> Any:
    """A parameter of a control-flow primitive, with the jaxprs in it rewritten."""
    if type(param) is tuple:
        return tuple(_rewrite(each, replace) for each in param)
    if isinstance(param, core.ClosedJaxpr) and _touched(param.jaxpr, replace):
        types = [v.aval for v in param.jaxpr.invars]
        if any(type(aval) is not jax.core.ShapedArray for aval in types):
            return param  # a reference to mutable memory, say
        return jax.make_jaxpr(lambda *args: _evaluate(param, args, replace))(*types)
    if isinstance(param, core.Jaxpr) and _touched(param, replace):
        closed = _rewrite(core.ClosedJaxpr(param, ()), replace)
        # An open jaxpr cannot hold constants; ours has none but those that tracing may hoist.
        return closed.jaxpr if not closed.consts else param
    return param


def _touched(jaxpr: Any, replace: Replace) -> bool:
    """Whether a jaxpr, or one inside it, has an operation to replace."""
    for equation in jaxpr.eqns:
        if replace(equation) is not None:
            return True
        if equation.primitive.name not in _JIT + _CONTROL:
            continue
        for param in equation.params.values():
            for inner in param if isinstance(param, tuple) else (param,):
                inner = inner.jaxpr if isinstance(inner, core.ClosedJaxpr) else inner
                if isinstance(inner, core.Jaxpr) and _touched(inner, replace):
                    return True
    return False

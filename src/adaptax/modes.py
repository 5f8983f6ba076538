"""How a meta-gradient goes back through an inner loop: what is kept, and what is computed twice."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.extend import core
from jaxtyping import Array, Float, PyTree

Objective = Callable[[PyTree], Float[Array, ""]]
"""The loss of an inner step as a function of the parameters that the step moves."""

LARGE = 2**20
"""Bytes of activations of an inner step from which on they are better not kept."""

_WORDS = re.compile(r"(auto|reverse|forward)|(checkpoint|truncate)=(\d{1,9})")


_FORWARD: ContextVar[bool] = ContextVar("adaptation differentiated in forward mode", default=False)


@contextmanager
def forward_mode() -> Iterator[None]:
    """Have the inner loops that are traced meanwhile be such as forward mode can differentiate."""
    token = _FORWARD.set(True)
    try:
        yield
    finally:
        _FORWARD.reset(token)


@dataclasses.dataclass(frozen=True)
class Mode:
    """A way to differentiate an inner loop; written as text, see `parse`.

    Args:
        order: how an inner gradient is differentiated: `"reverse"`, `"forward"` or `"auto"`.
        checkpoint: keep the parameters of every so many steps alone; `None` for all that the
            derivative needs.
        truncate: take the derivative of the last so many inner gradients alone; `None` for all.
    """

    order: str = "auto"
    checkpoint: int | None = None
    truncate: int | None = None


@functools.lru_cache
def parse(text: str) -> Mode:
    """Return the mode that a text names, such as `"forward"` or `"auto, truncate=4"`.

    * `"reverse"`: reverse over reverse. The activations of all inner steps are kept.
    * `"forward"`: forward over reverse. The derivative of an inner gradient is a product with the
      Hessian, which needs the parameters of the step and no activations. For losses without
      `jax.custom_vjp`, and not where the adaptation itself is differentiated in forward mode.
    * `"auto"`: one of these two, by the loss; see `order`.
    * `"checkpoint=n"`: keep the parameters of every n-th step, and compute the n steps after it
      again. About √steps needs least memory.
    * `"truncate=n"`: the inner gradients of all but the last n steps are constants. The
      meta-gradient is biased: 0 is first order, and `steps` or more is exact.

    Args:
        text: one of the first three, or none for `"auto"`, and the last two, joined by commas.

    Raises:
        ValueError: for anything else.
    """
    found: dict[str, Any] = {}
    for word in str(text).split(","):
        match = _WORDS.fullmatch(word.strip())
        name = match and (match[2] or "order")
        least = 1 if name == "checkpoint" else 0
        if not match or name in found or (match[2] and int(match[3]) < least):
            raise ValueError(
                f"meta_gradient is {text!r}; expected auto, reverse or forward, and after a comma, "
                'or alone, checkpoint=n (n of 1 or more) or truncate=n, such as "forward" or '
                '"reverse, checkpoint=4"'
            )
        found[name or ""] = int(match[3]) if match[2] else match[1]
    return Mode(**found)


def value_and_grad(objective: Objective, order: str) -> Callable[[PyTree], Any]:
    """Return `jax.value_and_grad(objective)`, whose own derivative is taken in this order.

    Args:
        objective: may close over anything, of which the gradient has a derivative, too.
        order: as in `Mode`.

    Raises:
        ValueError: when called, in forward order, for a loss with a derivative rule of its own, or
            within `forward_mode`.
    """

    def call(params: PyTree) -> Any:
        if order == "reverse" or (order == "auto" and _FORWARD.get()):
            return jax.value_and_grad(objective)(params)
        if _FORWARD.get():
            raise ValueError(
                'meta_gradient="forward" was given where the adaptation is differentiated in '
                'forward mode, as TRPO does; use "reverse"'
            )
        closed = jax.make_jaxpr(objective)(params)
        own = has_rule(closed.jaxpr)
        if order == "forward" and own:
            raise ValueError(
                'meta_gradient="forward" takes the gradient of a scalar, and the loss has a '
                "derivative rule of its own (jax.custom_vjp), which may be none; use "
                '"reverse, checkpoint=1", which needs little memory, too'
            )
        if order == "auto" and (own or not suits_forward(closed.jaxpr)):
            return jax.value_and_grad(objective)(params)
        return _forward_over_reverse(closed, params)

    return call


def _forward_over_reverse(closed: Any, params: PyTree) -> Any:
    """Return value and gradient, the derivative of which is one `jvp` of the full gradient.

    With g(p, c) = ∂_p L(p, c), of the parameters and of all that the loss closes over, a cotangent
    v has the products `vᵀ ∂g/∂p = ∂_ε ∂_p L(p + εv, c)` and `vᵀ ∂g/∂c = ∂_ε ∂_c L(p + εv, c)`.
    """
    leaves, structure = jax.tree.flatten(params)
    inexact, rest = eqx.partition(closed.consts, eqx.is_inexact_array)

    def scalar(leaves: list[Array], inexact: Any, rest: Any) -> Array:
        consts = eqx.combine(inexact, rest)
        (value,) = jax.core.eval_jaxpr(closed.jaxpr, consts, *leaves)
        return value

    @eqx.filter_custom_vjp
    def slope(given: Any, rest: Any) -> tuple[Array, list[Array]]:
        leaves, inexact = given
        return jax.value_and_grad(scalar)(leaves, inexact, rest)

    def forward(perturbed: Any, given: Any, rest: Any) -> tuple[Any, None]:
        leaves, inexact = given
        return jax.value_and_grad(scalar)(leaves, inexact, rest), None

    def backward(_: None, cotangent: Any, perturbed: Any, given: Any, rest: Any) -> Any:
        (leaves, inexact), (of_leaves, of_inexact) = given, perturbed
        moved = (eqx.filter(leaves, of_leaves), eqx.filter(inexact, of_inexact))

        def full(leaves: list[Array]) -> PyTree:
            def at(moved: Any) -> Array:
                own, consts = eqx.combine(moved, (leaves, inexact))
                return scalar(own, consts, rest)

            return jax.grad(at)((eqx.filter(leaves, of_leaves), moved[1]))

        along = [jnp.zeros_like(p) if v is None else v for p, v in zip(leaves, cotangent[1])]
        return jax.jvp(full, (leaves,), (along,))[1]

    slope.def_fwd(forward)
    slope.def_bwd(backward)
    value, grads = slope((leaves, inexact), rest)
    # The loss is watched and not differentiated.
    return jax.lax.stop_gradient(value), jax.tree.unflatten(structure, grads)


def scan(
    step: Callable[[PyTree, Any], tuple[PyTree, PyTree]],
    carry: PyTree,
    first: int,
    last: int,
    checkpoint: int | None,
) -> tuple[PyTree, PyTree]:
    """Return `jax.lax.scan` of the steps from `first` to before `last`.

    Args:
        step: `(carry, i) -> (carry, out)`.
        carry: before.
        first: the first i.
        last: the one after the last.
        checkpoint: as in `Mode`.
    """
    count = last - first
    checkpoint = checkpoint and min(checkpoint, max(count, 1))
    if checkpoint is None or checkpoint == 1:
        body = step if checkpoint is None else jax.checkpoint(step)
        # One step needs no loop, and small models are faster without.
        return jax.lax.scan(body, carry, jnp.arange(first, last), unroll=count <= 1)

    def several(carry: PyTree, start: Any, count: int = checkpoint) -> tuple[PyTree, PyTree]:
        return jax.lax.scan(step, carry, start + jnp.arange(count), unroll=count <= 1)

    whole = count // checkpoint
    starts = first + checkpoint * jnp.arange(whole)
    carry, out = jax.lax.scan(jax.checkpoint(several), carry, starts, unroll=whole <= 1)
    out = jax.tree.map(lambda leaf: leaf.reshape(whole * checkpoint, *leaf.shape[2:]), out)
    if left := count % checkpoint:
        end = jax.checkpoint(functools.partial(several, count=left))
        carry, more = end(carry, first + checkpoint * whole)
        out = jax.tree.map(lambda *parts: jnp.concatenate(parts), out, more)
    return carry, out


def has_rule(jaxpr: Any) -> bool:
    """Return whether something in a jaxpr has a derivative rule in reverse mode of its own."""
    return any(equation.primitive.name.startswith("custom_vjp_call") for equation in _all(jaxpr))


def suits_forward(jaxpr: Any) -> bool:
    """Return whether `"auto"` takes forward over reverse for such a loss.

    Measured (`benchmarks/meta_gradient.py`): it is faster and needs a fraction of the memory where
    activations are large, and is slower for convolutions and for what fits in a cache.
    """
    return not any(map(_convolves, _all(jaxpr))) and _activations(jaxpr) >= LARGE


def _convolves(equation: Any) -> bool:
    """Return whether this is a convolution, or a piece of what `conv_forms` makes of one."""
    marks = ("conv_forward", "conv_general_dilated", "optimization_barrier")
    return equation.primitive.name in marks


def _activations(jaxpr: Any) -> int:
    """Return the bytes of all intermediate results, of a loop those of all its turns."""
    total = 0
    for equation in jaxpr.eqns:
        bodies = [_activations(inner) for inner in _inside(equation)]
        each = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        own = (v.aval for v in equation.outvars if hasattr(v.aval, "shape"))
        total += (
            each * sum(bodies)
            if bodies
            else sum(math.prod(aval.shape) * getattr(aval.dtype, "itemsize", 4) for aval in own)
        )
    return total


def _all(jaxpr: Any) -> Iterator[Any]:
    """Every equation of a jaxpr and of those in it."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in _inside(equation):
            yield from _all(inner)


def _inside(equation: Any) -> Iterator[Any]:
    """The jaxprs that an equation calls."""
    for param in equation.params.values():
        for inner in param if isinstance(param, tuple | list) else (param,):
            inner = inner.jaxpr if isinstance(inner, core.ClosedJaxpr) else inner
            if isinstance(inner, core.Jaxpr):
                yield inner

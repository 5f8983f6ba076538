"""Convolutions whose derivatives of any order are convolutions, and the same for any model.

XLA's CPU backend is slow at the convolutions that differentiation writes, above all at those to
the kernel, and a hundredfold so inside loops. A convolution is a trilinear form, so that each of
its three contractions has the other two as derivatives: as three primitives that know this, every
derivative takes the form that is fast for it; see `adaptax.conv_forms`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching
from jaxtyping import Array, Float

from . import conv_forms as forms
from .conv_forms import Geometry
from .pooling import max_pool
from .primitive import apart, primitive
from .rewrite import rewritten

Padding = str | Sequence[tuple[int, int]]


def conv(
    x: Float[Array, "n *size c"],
    kernel: Float[Array, "*window c//{groups} out"],
    *,
    strides: Sequence[int],
    padding: Padding = "SAME",
    dilation: Sequence[int] | None = None,
    groups: int = 1,
    precision: Any = None,
    preferred_element_type: Any = None,
) -> Float[Array, "n *outsize out"]:
    """`y[n, p, o] = Σ_{q, c} x[n, s·p + d·q, c] · kernel[q, c, o]`, in any number of dimensions.

    Args:
        x: channels last.
        kernel: window, input channels (of a group), output channels.
        strides: one for each dimension.
        padding: `"SAME"`, `"VALID"`, or `(low, high)` for each dimension.
        dilation: of the kernel, one for each dimension; 1 if `None`.
        groups: of channels, each convolved with its own kernels; depthwise if of one channel.
        precision: of the matrix product, as in `jax.lax.dot_general`.
        preferred_element_type: of its accumulation and result, as there.
    """
    geometry = _geometry(x, kernel, strides, padding, dilation)
    out = preferred_element_type or x.dtype
    if 0 in geometry.outsize:
        return jnp.zeros((len(x), *geometry.outsize, kernel.shape[-1]), out)
    if groups > 1:
        return _grouped(x, kernel, groups, geometry, precision, preferred_element_type)
    if geometry.plain and x.dtype == kernel.dtype == out and 0 not in x.shape:
        return _forward.bind(x, kernel, geometry=geometry, precision=_hashable(precision))
    return forms.forward_windows(x, kernel, geometry, precision, preferred_element_type)


def _grouped(
    x: Array, kernel: Array, groups: int, geometry: Geometry, precision: Any, out: Any
) -> Array:
    """Convolve groups of channels each with its own kernels, the outputs of a group together."""
    shape = (len(x), *geometry.outsize, kernel.shape[-1])
    each, taps = kernel.shape[-2], kernel.reshape(-1, kernel.shape[-2], groups, shape[-1] // groups)
    seen = [a.reshape(*shape[:-1], groups, each) for a in forms.shifted(x, geometry)]
    if each == 1:
        wide = out or x.dtype
        y = sum(a.astype(wide) * tap[0].astype(wide) for a, tap in zip(seen, taps))
    else:
        depth = jnp.stack(seen, -2).reshape(-1, groups, len(seen) * each)
        weights = jnp.moveaxis(taps, 2, 0).reshape(groups, len(seen) * each, -1)
        y = jnp.einsum("lgd,gdo->lgo", depth, weights, precision=precision,
                       preferred_element_type=out)  # fmt: skip
    return y.reshape(shape)


def _geometry(
    x: Array,
    kernel: Array,
    strides: Sequence[int],
    padding: Padding,
    dilation: Sequence[int] | None,
) -> Geometry:
    size, window = x.shape[1:-1], kernel.shape[:-2]
    dilation = (1,) * len(window) if dilation is None else tuple(dilation)
    if isinstance(padding, str):
        reach = [d * (k - 1) + 1 for k, d in zip(window, dilation)]
        padding = lax.padtype_to_pads(size, reach, strides, padding)
    pairs = tuple((int(low), int(high)) for low, high in padding)
    return Geometry(tuple(size), tuple(window), tuple(strides), pairs, dilation)


def _hashable(precision: Any) -> Any:
    return tuple(precision) if isinstance(precision, list) else precision


# The three contractions as primitives


def _contraction(name: str, plain: Callable[..., Array], form: Callable[..., Array]) -> Primitive:
    return primitive(name, plain, form, ("geometry", "precision"))


def _of_one_kernel(contraction: Primitive, images: int, plain: Callable[..., Array]) -> None:
    """Let images that are mapped over, but not their kernel, be more images of one call.

    Args:
        contraction: of images and a kernel.
        images: position of the images among its two operands.
        plain: what it is written as.
    """

    def mapped(operands: Sequence[Any], axes: Sequence[Any], **how: Any) -> tuple[Array, int]:
        if axes[1 - images] is not None:
            return apart(plain)(operands, axes, **how)
        moved = jnp.moveaxis(operands[images], axes[images], 0)
        together = [*operands]
        together[images] = moved.reshape(-1, *moved.shape[2:])
        found = contraction.bind(*together, **how)
        return found.reshape(*moved.shape[:2], *found.shape[1:]), 0

    batching.primitive_batchers[contraction] = mapped


_forward = _contraction("conv_forward", forms.forward_windows, forms.forward)
_to_input = _contraction("conv_to_input", forms.to_input_windows, forms.to_input)
_to_kernel = _contraction("conv_to_kernel", forms.to_kernel_windows, forms.to_kernel)
_of_one_kernel(_forward, 0, forms.forward_windows)
_of_one_kernel(_to_input, 1, forms.to_input_windows)

# Of T(x, w, y): each is its derivative with respect to what is missing, and has the two others.
ad.defbilinear(
    _forward,  # of x and w
    lambda y, x, w, **how: _to_input.bind(w, y, **how),
    lambda y, x, w, **how: _to_kernel.bind(x, y, **how),
)
ad.defbilinear(
    _to_input,  # of w and y
    lambda x, w, y, **how: _to_kernel.bind(x, y, **how),
    lambda x, w, y, **how: _forward.bind(x, w, **how),
)
ad.defbilinear(
    _to_kernel,  # of x and y
    lambda w, x, y, **how: _to_input.bind(w, y, **how),
    lambda w, x, y, **how: _forward.bind(x, w, **how),
)


FastPath = bool | Literal["auto"]


def fast(function: Callable[..., Any], enabled: FastPath = "auto") -> Callable[..., Any]:
    """The same function, its convolutions and poolings replaced by ours; differentiable as before.

    `adaptax.fit`, `evaluate` and `meta_value_and_grad` apply this to a learner's loss, so a model
    of any library gets the fast forms unchanged. The function is traced to a jaxpr and that is
    evaluated, descending into `jit`, `scan`, `cond`, `while` and `checkpoint`. Convolutions become
    `conv`, in groups too, and maxima over windows that lie side by side `pooling.max_pool`.
    Transposed convolutions are left as they are, and custom derivative rules keep theirs.

    Args:
        function: pure; its arrays may be anywhere in its arguments.
        enabled: `"auto"` replaces on the CPU, where it was measured to be faster.
    """
    if enabled is False or (enabled == "auto" and jax.default_backend() != "cpu"):
        return function
    return rewritten(function, _replacement)


def _replacement(equation: Any) -> Callable[..., Array] | None:
    if equation.primitive.name == "conv_general_dilated" and _plain(equation):
        return functools.partial(_any_layout, params=equation.params)
    if equation.primitive.name == "reduce_window_max" and _side_by_side(equation):
        return functools.partial(_pooled, params=equation.params)
    return None


def _plain(equation: Any) -> bool:
    """No groups of the batch and no dilation of the images; real floating point."""
    params, types = equation.params, [v.aval.dtype for v in (*equation.invars, *equation.outvars)]
    return (
        params["batch_group_count"] == 1
        and set(params["lhs_dilation"]) <= {1}
        and all(jnp.issubdtype(dtype, jnp.floating) for dtype in types)
    )


def _any_layout(x: Array, kernel: Array, params: dict[str, Any]) -> Array:
    """`conv_general_dilated` of any layout through `conv`, which wants channels last."""
    layout = params["dimension_numbers"]
    channels_last = (layout.lhs_spec[0], *layout.lhs_spec[2:], layout.lhs_spec[1])
    window_first = (*layout.rhs_spec[2:], layout.rhs_spec[1], layout.rhs_spec[0])
    y = conv(
        lax.transpose(x, channels_last),
        lax.transpose(kernel, window_first),
        strides=params["window_strides"],
        padding=params["padding"],
        dilation=params["rhs_dilation"],
        groups=params["feature_group_count"],
        precision=params["precision"],
        preferred_element_type=params["preferred_element_type"],
    )
    out = layout.out_spec
    position = np.argsort((out[0], *out[2:], out[1]))
    return lax.transpose(y, tuple(int(p) for p in position))


def _side_by_side(equation: Any) -> bool:
    """Whether a maximum is of two dimensions of four, over windows that lie side by side."""
    params, x = equation.params, equation.invars[0].aval
    window, strides = params["window_dimensions"], params["window_strides"]
    return (
        len(window) == 4
        and window == strides
        and sum(size > 1 for size in window) == 2
        and set(params["base_dilation"]) | set(params["window_dilation"]) == {1}
        and not any(map(any, params["padding"]))
        and jnp.issubdtype(x.dtype, jnp.floating)
    )


def _pooled(x: Array, params: dict[str, Any]) -> Array:
    window = params["window_dimensions"]
    inner = [axis for axis, size in enumerate(window) if size > 1]
    first, last = (axis for axis in range(4) if axis not in inner)
    order = (first, *inner, last)
    y = max_pool(lax.transpose(x, order), window=(window[inner[0]], window[inner[1]]))
    return lax.transpose(y, tuple(int(p) for p in np.argsort(order)))

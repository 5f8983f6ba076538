"""The convolution as slices and one matrix product, and the same for any model's convolutions.

XLA's CPU backend is slow at `conv_general_dilated` inside loops and in the layouts that
differentiating twice makes. Slices, concatenation and a matrix product are fast everywhere, and
closed under differentiation: their derivatives of any order are products, slices and pads again.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from .rewrite import rewritten

Padding = str | Sequence[tuple[int, int]]


def conv(
    x: Float[Array, "n *size c"],
    kernel: Float[Array, "*window c out"],
    *,
    strides: Sequence[int],
    padding: Padding = "SAME",
    precision: Any = None,
    preferred_element_type: Any = None,
) -> Float[Array, "n *outsize out"]:
    """`y[n, p, o] = Σ_{q, c} x[n, s·p + q, c] · kernel[q, c, o]`, in any number of dimensions.

    Args:
        x: channels last.
        kernel: window, input channels, output channels.
        strides: one for each dimension.
        padding: `"SAME"`, `"VALID"`, or `(low, high)` for each dimension.
        precision: of the matrix product, as in `jax.lax.dot_general`.
        preferred_element_type: of its accumulation and result, as there.
    """
    window, (c, out) = kernel.shape[:-2], kernel.shape[-2:]
    size = x.shape[1:-1]
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(size, window, strides, padding)
    extent = [n + low + high for n, (low, high) in zip(size, padding)]
    outsize = [max((n - k) // s + 1, 0) for n, k, s in zip(extent, window, strides)]
    if 0 in outsize:
        return jnp.zeros((len(x), *outsize, out), preferred_element_type or x.dtype)
    config = ((0, 0, 0), *((low, high, 0) for low, high in padding), (0, 0, 0))
    x = lax.pad(x, jnp.zeros((), x.dtype), config)  # negative padding crops
    # Written out once: fused into the concatenation, the padding costs a comparison an element.
    x = lax.optimization_barrier(x)
    columns = [
        lax.slice(
            x,
            (0, *offset, 0),
            (len(x), *(o + (m - 1) * s + 1 for o, m, s in zip(offset, outsize, strides)), c),
            (1, *strides, 1),
        )
        for offset in itertools.product(*map(range, window))
    ]
    patches = jnp.concatenate(columns, axis=-1) if len(columns) > 1 else columns[0]
    depth = math.prod(window) * c
    y = jnp.dot(
        patches.reshape(len(x) * math.prod(outsize), depth),
        kernel.reshape(depth, out),
        precision=precision,
        preferred_element_type=preferred_element_type,
    )
    return y.reshape(len(x), *outsize, out)


FastPath = bool | Literal["auto"]


def fast(function: Callable[..., Any], enabled: FastPath = "auto") -> Callable[..., Any]:
    """The same function, its plain convolutions replaced by `conv`; differentiable as before.

    `adaptax.fit`, `evaluate` and `meta_value_and_grad` apply this to a learner's loss, so a model
    of any library gets the fast convolution unchanged. The function is traced to a jaxpr and that
    is evaluated, descending into `jit`, `scan`, `cond`, `while` and `checkpoint`. Grouped, dilated
    and transposed convolutions are left as they are, and custom derivative rules keep theirs.

    Args:
        function: pure; its arrays may be anywhere in its arguments.
        enabled: `"auto"` replaces on the CPU, where it was measured to be faster.
    """
    if enabled is False or (enabled == "auto" and jax.default_backend() != "cpu"):
        return function
    return rewritten(function, _replacement)


def _replacement(equation: Any) -> Callable[..., Array] | None:
    if equation.primitive.name != "conv_general_dilated" or not _plain(equation):
        return None
    return functools.partial(_matmul_form, params=equation.params)


def _plain(equation: Any) -> bool:
    """No groups and no dilation of either side; real floating point."""
    params, types = equation.params, [v.aval.dtype for v in (*equation.invars, *equation.outvars)]
    return (
        params["feature_group_count"] == params["batch_group_count"] == 1
        and set(params["lhs_dilation"]) | set(params["rhs_dilation"]) <= {1}
        and all(jnp.issubdtype(dtype, jnp.floating) for dtype in types)
    )


def _matmul_form(x: Array, kernel: Array, params: dict[str, Any]) -> Array:
    """`conv_general_dilated` of any layout through `conv`, which wants channels last."""
    layout = params["dimension_numbers"]
    channels_last = (layout.lhs_spec[0], *layout.lhs_spec[2:], layout.lhs_spec[1])
    window_first = (*layout.rhs_spec[2:], layout.rhs_spec[1], layout.rhs_spec[0])
    y = conv(
        lax.transpose(x, channels_last),
        lax.transpose(kernel, window_first),
        strides=params["window_strides"],
        padding=params["padding"],
        precision=params["precision"],
        preferred_element_type=params["preferred_element_type"],
    )
    out = layout.out_spec
    position = np.argsort((out[0], *out[2:], out[1]))
    return lax.transpose(y, tuple(int(p) for p in position))

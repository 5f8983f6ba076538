"""The three contractions of a convolution, each in the forms among which a program may choose.

A convolution is a trilinear form `T(x, w, y) = Σ_{n,p,q,c,o} x[n, s·p+q, c] w[q, c, o] y[n, p, o]`:

* forward, `∂T/∂y`: images and kernel to images;
* to the input, `∂T/∂x`: kernel and a cotangent to images;
* to the kernel, `∂T/∂w`: images and a cotangent to a kernel.

The derivatives of each are the other two. Which form is the fastest of each on a CPU, in float32,
is measured by `benchmarks/conv_forms.py`:

| contraction | form | where |
|---|---|---|
| forward | XLA's own convolution, channels last | two dimensions, float32 |
| to the input | the forward form of the mirrored kernel | the same, strides of 1 |
| to the kernel | the window's rows moved to one factor, its columns to the other | the same |
| | windows laid out channels first | the same, fewer than 8 channels |
| all | windows laid out side by side, and one matrix product | else |
"""

from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

LAST = ("NHWC", "HWIO", "NHWC")
CACHE = 2**20
"""Bytes of what is laid out at once: about a core's second-level cache."""


class Geometry(NamedTuple):
    """What of a convolution is no array; hashable.

    Args:
        size: of the images.
        window: of the kernel.
        strides: one a dimension.
        padding: `(low, high)` a dimension; negative ones crop.
        dilation: of the kernel, one a dimension.
    """

    size: tuple[int, ...]
    window: tuple[int, ...]
    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]

    @property
    def outsize(self) -> tuple[int, ...]:
        """Size of the result."""
        extent = (n + low + high for n, (low, high) in zip(self.size, self.padding))
        reach = (d * (k - 1) for k, d in zip(self.window, self.dilation))
        return tuple(max((n - r - 1) // s + 1, 0) for n, r, s in zip(extent, reach, self.strides))

    @property
    def plain(self) -> bool:
        """Whether every form takes it: two dimensions, strides of 1, no dilation, no cropping."""
        return (
            len(self.window) == 2
            and set(self.strides) | set(self.dilation) == {1}
            and all(0 <= p < k for k, each in zip(self.window, self.padding) for p in each)
        )


Images = Float[Array, "n *size c"]
Result = Float[Array, "n *outsize out"]
Kernel = Float[Array, "*window c out"]


# Forward


def forward(x: Images, kernel: Kernel, geometry: Geometry, precision: Any = None) -> Result:
    """Convolve, in the form that suits the shapes."""
    if _measured(x) and len(geometry.window) == 2:
        return forward_native(x, kernel, geometry, precision)
    return forward_windows(x, kernel, geometry, precision)


def forward_native(x: Images, kernel: Kernel, geometry: Geometry, precision: Any = None) -> Result:
    """Convolve by XLA's own convolution; two dimensions."""
    return lax.conv_general_dilated(
        x, kernel, geometry.strides, geometry.padding, rhs_dilation=geometry.dilation,
        dimension_numbers=LAST, precision=precision,
    )  # fmt: skip


def forward_windows(
    x: Images, kernel: Kernel, geometry: Geometry, precision: Any = None, accumulated: Any = None
) -> Result:
    """Lay the windows out side by side, and multiply once."""
    c, out = kernel.shape[-2:]
    depth = math.prod(geometry.window) * c
    y = jnp.dot(
        windows(x, geometry).reshape(len(x) * math.prod(geometry.outsize), depth),
        kernel.reshape(depth, out),
        precision=precision,
        preferred_element_type=accumulated,
    )
    return y.reshape(len(x), *geometry.outsize, out)


def windows(x: Images, geometry: Geometry) -> Float[Array, "n *outsize depth"]:
    """Return the window of every place of the result, one pixel of it after another."""
    columns = shifted(x, geometry)
    return jnp.concatenate(columns, axis=-1) if len(columns) > 1 else columns[0]


def shifted(x: Images, geometry: Geometry) -> list[Float[Array, "n *outsize c"]]:
    """Return, for every pixel of the window, what of the images it sees."""
    # Written out once: fused into the concatenation, the padding costs a comparison an element.
    x = lax.optimization_barrier(_padded(x, geometry))
    reach = [(m - 1) * s + 1 for m, s in zip(geometry.outsize, geometry.strides)]
    found = []
    for offset in itertools.product(*map(range, geometry.window)):
        first = [o * d for o, d in zip(offset, geometry.dilation)]
        last = [f + r for f, r in zip(first, reach)]
        strides = (1, *geometry.strides, 1)
        found.append(lax.slice(x, (0, *first, 0), (len(x), *last, x.shape[-1]), strides))
    return found


def _padded(x: Images, geometry: Geometry) -> Array:
    config = ((0, 0, 0), *((low, high, 0) for low, high in geometry.padding), (0, 0, 0))
    return lax.pad(x, jnp.zeros((), x.dtype), config)  # negative padding crops


# To the input


def to_input(kernel: Kernel, y: Result, geometry: Geometry, precision: Any = None) -> Images:
    """Return the cotangent of the images, in the form that suits the shapes."""
    mirrored = to_input_mirrored if _measured(y) and geometry.plain else to_input_windows
    return mirrored(kernel, y, geometry, precision)


def to_input_mirrored(
    kernel: Kernel, y: Result, geometry: Geometry, precision: Any = None
) -> Images:
    """Convolve the cotangent with the mirrored kernel; of plain geometry."""
    padding = tuple(
        (k - 1 - low, k - 1 - high) for k, (low, high) in zip(geometry.window, geometry.padding)
    )
    back = Geometry(geometry.outsize, geometry.window, geometry.strides, padding, geometry.dilation)
    mirrored = jnp.swapaxes(jnp.flip(kernel, range(len(geometry.window))), -1, -2)
    return forward_native(y, mirrored, back, precision)


def to_input_windows(
    kernel: Kernel, y: Result, geometry: Geometry, precision: Any = None
) -> Images:
    """Return the transpose of `forward_windows`."""
    x = jax.ShapeDtypeStruct((len(y), *geometry.size, kernel.shape[-2]), y.dtype)
    return jax.linear_transpose(lambda x: forward_windows(x, kernel, geometry, precision), x)(y)[0]


# To the kernel


def to_kernel(x: Images, y: Result, geometry: Geometry, precision: Any = None) -> Kernel:
    """Return the cotangent of the kernel, in the form that suits the shapes."""
    if not _measured(x) or not geometry.plain:
        return to_kernel_windows(x, y, geometry, precision)
    form = to_kernel_planes if x.shape[-1] < 8 else to_kernel_split
    return form(x, y, geometry, precision)


def to_kernel_windows(x: Images, y: Result, geometry: Geometry, precision: Any = None) -> Kernel:
    """Return the transpose of `forward_windows`."""
    kernel = jax.ShapeDtypeStruct((*geometry.window, x.shape[-1], y.shape[-1]), x.dtype)
    return jax.linear_transpose(lambda k: forward_windows(x, k, geometry, precision), kernel)(y)[0]


def to_kernel_split(x: Images, y: Result, geometry: Geometry, precision: Any = None) -> Kernel:
    """Move the images by the rows of the window, the cotangent by its columns, and multiply.

    `w[i, j] = Σ_p x[p + (i, j)] y[p] = Σ_p x[p + (i, 0)] y[p − (0, j)]`: one product has all pairs
    of i and j, and lays out `rows + columns` copies, not `rows · columns`. Of plain geometry.
    """
    (rows, columns), c, out = geometry.window, x.shape[-1], y.shape[-1]

    def product(x: Array, y: Array) -> Array:
        x = _padded(x, geometry)
        up = [x[:, i : i + geometry.outsize[0]] for i in range(rows)]
        along = [jnp.pad(y, ((0, 0), (0, 0), (j, columns - 1 - j), (0, 0))) for j in range(columns)]
        left = jnp.concatenate(up, -1).reshape(-1, rows * c)
        right = jnp.concatenate(along, -1).reshape(-1, columns * out)
        return jnp.dot(left.T, right, precision=precision)

    wide = geometry.size[1] + sum(geometry.padding[1])
    each = geometry.outsize[0] * wide * (rows * c + columns * out) * x.dtype.itemsize
    found = _summed(product, x, y, each)
    return found.reshape(rows, c, columns, out).transpose(0, 2, 1, 3)


def to_kernel_planes(x: Images, y: Result, geometry: Geometry, precision: Any = None) -> Kernel:
    """Lay the windows out channels first, long runs where channels are few; of plain geometry."""
    c, out = x.shape[-1], y.shape[-1]

    def product(x: Array, y: Array) -> Array:
        x = jnp.moveaxis(_padded(x, geometry), -1, 0)
        places = itertools.product(*map(range, geometry.window))
        high, wide = geometry.outsize
        planes = [x[:, :, i : i + high, j : j + wide] for i, j in places]
        left = jnp.concatenate(planes, 0).reshape(len(planes) * c, -1)
        return jnp.dot(left, y.reshape(-1, out), precision=precision)

    each = math.prod(geometry.outsize) * math.prod(geometry.window) * c * x.dtype.itemsize
    return _summed(product, x, y, each // 4).reshape(*geometry.window, c, out)


def _summed(product: Any, x: Array, y: Array, each: int) -> Array:
    """Add products over images, as many at once as a cache holds; `each` is the bytes of one."""
    size = _fitting(len(x), each)
    if size == len(x):
        return product(x, y)
    xs, ys = (a.reshape(len(x) // size, size, *a.shape[1:]) for a in (x, y))
    zero = jnp.zeros_like(jax.eval_shape(product, xs[0], ys[0]))
    return lax.scan(lambda total, xy: (total + product(*xy), None), zero, (xs, ys))[0]


def _fitting(count: int, each: int) -> int:
    """Return the largest divisor of a count of which a cache holds so many of so many bytes."""
    most = max(CACHE // max(each, 1), 1)
    return max(d for d in range(1, min(count, most) + 1) if count % d == 0)


def _measured(x: Array) -> bool:
    """Whether the forms were measured for such numbers, on such a machine."""
    return x.dtype == jnp.float32 and x.size > 0

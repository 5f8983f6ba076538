"""The convolution of the residual networks, which extract features and are never adapted."""

from __future__ import annotations

import equinox as eqx
import jax
from jax import lax
from jax.nn import initializers
from jaxtyping import Array, Float, PRNGKeyArray

_HE = initializers.he_normal()


class Convolution(eqx.Module):
    """Convolution without bias, padding SAME, He initialisation; computes in its kernel's type.

    Written with `jax.lax`, so that an accelerator uses its own kernels; on a CPU
    `adaptax.conv.fast` rewrites it, as everywhere in the library. Inputs and outputs have one
    type, whatever that of the kernel: what lies between convolutions, batch normalisation above
    all, keeps its precision.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        window: side of the kernel.
        stride: of both dimensions.
        key: of the initialisation.
    """

    weight: Float[Array, "window window in_channels out_channels"]
    stride: int = eqx.field(static=True)

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        window: int = 3,
        stride: int = 1,
        *,
        key: PRNGKeyArray,
    ):
        self.weight = _HE(key, (window, window, in_channels, out_channels))
        self.stride = stride

    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n h2 w2 c2"]:
        """Return a batch of images."""
        y = lax.conv_general_dilated(
            x.astype(self.weight.dtype),
            self.weight,
            (self.stride, self.stride),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return y.astype(x.dtype)

    def computing_in(self, dtype: jax.typing.DTypeLike) -> Convolution:
        """The layer, computing in this type; see `adaptax.protocols.Casting`."""
        weight = self.weight.astype(dtype)
        layer: Convolution = eqx.tree_at(lambda layer: layer.weight, self, weight)
        return layer


def check_image(x: Array, channels: int, least: int) -> None:
    """Check images for a network that takes any size.

    Raises:
        ValueError: if the channels are others, or a side is smaller than what halving leaves.
    """
    if x.ndim != 4 or x.shape[-1] != channels or min(x.shape[1:3]) < least:
        raise ValueError(
            f"this network was built for images (n, height, width, {channels}) of at least "
            f"{least}×{least} pixels, and was given {x.shape}; build it with channels= of the "
            "images, or give it larger ones"
        )

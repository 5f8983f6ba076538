"""ResNet-12, the usual feature extractor of few-shot learning."""

from __future__ import annotations

from itertools import pairwise

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from ..pooling import max_pool
from .layers import BatchNorm, Linear
from .residual import Convolution, check_image


class _Block(eqx.Module):
    """Three 3×3 convolutions, each normalised, and a 1×1 shortcut around them; halves the image."""

    convolutions: tuple[Convolution, ...]
    norms: tuple[BatchNorm, ...]
    shortcut: Convolution
    shortcut_norm: BatchNorm
    slope: float = eqx.field(static=True)

    def __init__(self, channels: int, width: int, slope: float, *, key: PRNGKeyArray):
        *keys, last = jax.random.split(key, 4)
        sizes = (channels, width, width, width)
        self.convolutions = tuple(
            Convolution(a, b, key=k) for (a, b), k in zip(pairwise(sizes), keys)
        )
        self.norms = tuple(BatchNorm(width, scale=True, eps=1e-5) for _ in range(3))
        self.shortcut = Convolution(channels, width, 1, key=last)
        self.shortcut_norm = BatchNorm(width, scale=True, eps=1e-5)
        self.slope = slope

    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n h2 w2 width"]:
        y = x
        for i, (convolution, norm) in enumerate(zip(self.convolutions, self.norms)):
            y = norm(convolution(y))
            if i == 2:
                y = y + self.shortcut_norm(self.shortcut(x))
            y = jax.nn.leaky_relu(y, self.slope)
        return max_pool(y)


class ResNet12(eqx.Module):
    """Four residual blocks of three convolutions, each halving the image by 2×2 max pooling.

    The extractor of TADAM and of most few-shot work since, in the widths of MetaOptNet: 640
    features, 12,424,320 parameters below the head. There DropBlock regularises the last two
    blocks as well; here it is left out.

    Args:
        out: number of classes.
        key: of the initialisation: convolutions He normal, the head Xavier uniform.
        channels: of the images, of any size from 16×16 pixels.
        widths: channels of every block; the last is the number of features.
        slope: of the leaky ReLU below zero.
    """

    blocks: tuple[_Block, ...]
    head: Linear
    channels: int = eqx.field(static=True)

    def __init__(
        self,
        out: int,
        *,
        key: PRNGKeyArray,
        channels: int = 3,
        widths: tuple[int, ...] = (64, 160, 320, 640),
        slope: float = 0.1,
    ):
        *keys, head_key = jax.random.split(key, len(widths) + 1)
        sizes = pairwise((channels, *widths))
        self.blocks = tuple(_Block(a, b, slope, key=k) for (a, b), k in zip(sizes, keys))
        self.head = Linear(widths[-1], out, key=head_key)
        self.channels = channels

    def features(self, x: Float[Array, "n h w c"]) -> Float[Array, "n features"]:
        """Return the last block, averaged over the image."""
        check_image(x, self.channels, 2 ** len(self.blocks))
        for block in self.blocks:
            x = block(x)
        return jnp.mean(x, axis=(1, 2))

    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n out"]:
        """Return a batch of logits."""
        return self.head(self.features(x))

"""Wide residual networks (Zagoruyko & Komodakis 2016), LEO's feature extractor."""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from .layers import BatchNorm, Linear
from .residual import Convolution, check_image

STEM = 16


class _Block(eqx.Module):
    """BN, ReLU, convolution, twice, and the shortcut: of `x`, or where the shape changes a 1×1
    convolution of the first ReLU."""

    norms: tuple[BatchNorm, BatchNorm]
    convolutions: tuple[Convolution, Convolution]
    shortcut: Convolution | None

    def __init__(self, channels: int, width: int, stride: int, *, key: PRNGKeyArray):
        first, second, third = jax.random.split(key, 3)
        self.norms = (
            BatchNorm(channels, scale=True, eps=1e-5),
            BatchNorm(width, scale=True, eps=1e-5),
        )
        self.convolutions = (
            Convolution(channels, width, stride=stride, key=first),
            Convolution(width, width, key=second),
        )
        same = channels == width and stride == 1
        self.shortcut = None if same else Convolution(channels, width, 1, stride, key=third)

    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n h2 w2 width"]:
        y = jax.nn.relu(self.norms[0](x))
        around = x if self.shortcut is None else self.shortcut(y)
        y = self.convolutions[0](y)
        return around + self.convolutions[1](jax.nn.relu(self.norms[1](y)))


class WideResNet(eqx.Module):
    """WRN-`depth`-`width`: a stem and three groups of pre-activation blocks, halving twice.

    The defaults are WRN-28-10: 640 features, 36,472,784 parameters below the head. LEO takes its
    features from "layer 21", averaged over the image: of the 25 convolutions in sequence, stem
    first, that is `features(x, layer=21)`, the sum that the second block of the last group
    returns. By default the features are those that the head sees.

    Args:
        out: number of classes.
        key: of the initialisation: convolutions He normal, the head Xavier uniform.
        channels: of the images, of any size from 4×4 pixels.
        depth: 6 n + 4, for n blocks a group.
        width: the groups have 16, 32 and 64 times as many channels.

    Raises:
        ValueError: if there is no network of that depth.
    """

    stem: Convolution
    blocks: tuple[_Block, ...]
    norm: BatchNorm
    head: Linear
    channels: int = eqx.field(static=True)

    def __init__(
        self,
        out: int,
        *,
        key: PRNGKeyArray,
        channels: int = 3,
        depth: int = 28,
        width: int = 10,
    ):
        if depth < 10 or depth % 6 != 4:
            raise ValueError(f"depth is 10, 16, 22, 28 or so on in steps of 6, not {depth}")
        stem_key, head_key, *keys = jax.random.split(key, 2 + (depth - 4) // 2)
        self.stem = Convolution(channels, STEM, key=stem_key)
        blocks, size, each = [], STEM, (depth - 4) // 6
        for i, block_key in enumerate(keys):
            group, first = i // each, i % each == 0
            stride = 2 if first and group > 0 else 1
            blocks.append(_Block(size, size := STEM * width * 2**group, stride, key=block_key))
        self.blocks = tuple(blocks)
        self.norm = BatchNorm(size, scale=True, eps=1e-5)
        self.head = Linear(size, out, key=head_key)
        self.channels = channels

    def features(
        self, x: Float[Array, "n h w c"], layer: int | None = None
    ) -> Float[Array, "n features"]:
        """Return the last group, normalised, rectified and averaged over the image.

        Args:
            x: a batch of images.
            layer: stop at the block that ends with this convolution, and average what it returns.

        Raises:
            ValueError: if no block ends with that convolution.
        """
        check_image(x, self.channels, 4)
        ends = range(3, 2 * len(self.blocks) + 2, 2)
        if layer is not None and layer not in ends:
            raise ValueError(
                f"layer={layer}; blocks end with the convolutions {', '.join(map(str, ends))}"
            )
        x = self.stem(x)
        for end, block in zip(ends, self.blocks):
            x = block(x)
            if layer == end:
                return jnp.mean(x, axis=(1, 2))
        return jnp.mean(jax.nn.relu(self.norm(x)), axis=(1, 2))

    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n out"]:
        """Return a batch of logits."""
        return self.head(self.features(x))

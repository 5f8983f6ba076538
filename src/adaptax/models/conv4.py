"""The four-block convolutional networks of the papers."""

from __future__ import annotations

import functools
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from ..pooling import max_pool
from .layers import BatchNorm, Conv2d, Init, Linear

Down = Literal["stride", "relu-pool", "pool-relu"]


class Conv4(eqx.Module):
    """Four blocks of 3×3 convolution, batch normalisation and (leaky) ReLU, each halving the image.

    The defaults are MAML's Omniglot net: 28→14→7→4→2 by strides, the spatial mean, and a linear
    head. `CONV4` holds the arguments of every network in the papers:

        Conv4(out=5, key=key, **CONV4["reptile mini_imagenet"])

    Args:
        out: number of classes.
        key: of the initialisation: convolutions Xavier uniform, biases zero.
        image: height, width and channels of the input.
        filters: channels of every block.
        down: how a block halves: by the stride of its convolution, or by 2×2 max pooling after
            the ReLU (MAML) or before it (Reptile; the same function, a quarter of the work).
        padding: of the pooling; `"SAME"` keeps an odd last row (84→42→21→11→6).
        head: the linear head sees the spatial `"mean"` or the `"flatten"`ed last block.
        head_init: of the head's weight. MAML draws N(0, 1) on Omniglot.
        scale: batch normalisation with a learned scale (Reptile) beside its shift.
        adapted: whether MAML's inner loop adapts the parameters of batch normalisation.
        slope: of the ReLU below zero. MAML++ has 0.01.
        eps: of batch normalisation. TensorFlow's 1e-3 (MAML, Reptile); MAML++ has PyTorch's 1e-5.
    """

    blocks: tuple[tuple[Conv2d, BatchNorm], ...]
    head: Linear
    down: Down = eqx.field(static=True)
    padding: Literal["VALID", "SAME"] = eqx.field(static=True)
    flatten: bool = eqx.field(static=True)
    image: tuple[int, int, int] = eqx.field(static=True)
    slope: float = eqx.field(static=True)

    def __init__(
        self,
        out: int,
        *,
        key: PRNGKeyArray,
        image: tuple[int, int, int] = (28, 28, 1),
        filters: int = 64,
        down: Down = "stride",
        padding: Literal["VALID", "SAME"] = "VALID",
        head: Literal["mean", "flatten"] = "mean",
        head_init: Init = "normal",
        scale: bool = False,
        adapted: bool = False,
        slope: float = 0.0,
        eps: float = 1e-3,
    ):
        *keys, head_key = jax.random.split(key, 5)
        channels = (image[2], filters, filters, filters)
        stride = 2 if down == "stride" else 1
        norm: dict[str, Any] = {"scale": scale, "adapted": adapted, "eps": eps}
        self.blocks = tuple(
            (Conv2d(c, filters, stride, key=k), BatchNorm(filters, **norm))
            for c, k in zip(channels, keys)
        )
        self.down, self.padding, self.flatten = down, padding, head == "flatten"
        self.image, self.slope = image, slope
        rounds_up = down == "stride" or padding == "SAME"
        sides = [_halve(side, 4, rounds_up) for side in image[:2]]
        if min(sides) == 0:
            raise ValueError(f"images of {image[0]}×{image[1]} are too small to be halved 4 times")
        features = filters * sides[0] * sides[1] if self.flatten else filters
        self.head = Linear(features, out, key=head_key, init=head_init)

    def features(self, x: Float[Array, "n h w c"]) -> Float[Array, "n features"]:
        """Return what the head sees."""
        if x.shape[1:] != self.image:
            raise ValueError(
                f"this network was built for images of shape {self.image} (height, width, "
                f"channels), and was given {x.shape[1:]}; build it with image={x.shape[1:]}"
            )
        # Pooling by the maximum before a function that rises or after it is the same.
        pool = None if self.down == "stride" else functools.partial(max_pool, padding=self.padding)
        for conv, norm in self.blocks:
            x = norm(conv(x), pool)
            x = jax.nn.leaky_relu(x, self.slope) if self.slope else jax.nn.relu(x)
        return x.reshape(len(x), -1) if self.flatten else jnp.mean(x, axis=(1, 2))

    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n out"]:
        """Return a batch of logits."""
        return self.head(self.features(x))


def _halve(side: int, times: int, rounds_up: bool) -> int:
    for _ in range(times):
        side = (side + rounds_up) // 2
    return side


_PLUS_PLUS: dict[str, Any] = {
    "down": "relu-pool", "head": "flatten", "head_init": "glorot", "scale": True, "slope": 0.01,
    "eps": 1e-5,
}  # fmt: skip
_MINI: dict[str, Any] = {"image": (84, 84, 3), "filters": 32, "head": "flatten"}

CONV4: dict[str, dict[str, Any]] = {
    "maml omniglot": {},
    "maml mini_imagenet": {**_MINI, "down": "relu-pool", "head_init": "glorot"},
    "reptile omniglot": {
        "head": "flatten", "head_init": "glorot", "scale": True, "adapted": True,
    },
    "reptile mini_imagenet": {
        **_MINI, "down": "pool-relu", "padding": "SAME", "head_init": "glorot",
        "scale": True, "adapted": True,
    },
    "maml++ omniglot": _PLUS_PLUS,
    "maml++ mini_imagenet": {**_MINI, **_PLUS_PLUS},
}  # fmt: skip
"""Arguments of `Conv4` for the networks of MAML (section 5.2), Reptile and MAML++ (released codes;
of MAML++ on miniImageNet its first one, with 32 filters, where the last has 48)."""

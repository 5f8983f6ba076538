"""Random changes of images that leave their class."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

_LUMA = (0.299, 0.587, 0.114)


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """A random shift, mirror image and light, each image in its own way.

    Args:
        crop: pixels by which the image is padded, reflected, before it is cropped to its size.
        flip: mirror every other image left to right; not for letters.
        jitter: brightness, contrast and saturation are multiplied by a number from 1 − `jitter`
            to 1 + `jitter` each.
    """

    crop: int = 0
    flip: bool = False
    jitter: float = 0.0

    def __post_init__(self) -> None:
        if self.crop < 0 or not 0 <= self.jitter <= 1:
            raise ValueError(
                f"crop={self.crop} and jitter={self.jitter}; expected a number of pixels, and a "
                "number from 0 to 1"
            )

    def __call__(self, key: PRNGKeyArray, x: Float[Array, "n h w c"]) -> Float[Array, "n h w c"]:
        """The images changed; values stay in [0, 1]."""
        for_crop, for_flip, for_jitter = jax.random.split(key, 3)
        if self.crop:
            x = _cropped(for_crop, x, self.crop)
        if self.flip:
            mirrored = jax.random.bernoulli(for_flip, shape=(len(x), 1, 1, 1))
            x = jnp.where(mirrored, jnp.flip(x, 2), x)
        if self.jitter:
            x = _jittered(for_jitter, x, self.jitter)
        return x


def _cropped(key: PRNGKeyArray, x: Array, pad: int) -> Array:
    offsets = jax.random.randint(key, (len(x), 2), 0, 2 * pad + 1)
    padded = jnp.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)), mode="reflect")
    cut = lambda image, at: jax.lax.dynamic_slice(image, (at[0], at[1], 0), x.shape[1:])  # noqa: E731
    return jax.vmap(cut)(padded, offsets)


def _jittered(key: PRNGKeyArray, x: Array, strength: float) -> Array:
    factors = 1 + strength * jax.random.uniform(key, (3, len(x), 1, 1, 1), minval=-1.0, maxval=1.0)
    brightness, contrast, saturation = factors
    x = brightness * x
    mean = jnp.mean(x, axis=(1, 2, 3), keepdims=True)
    x = mean + contrast * (x - mean)
    if x.shape[-1] == 3:
        grey = jnp.sum(x * jnp.array(_LUMA), axis=-1, keepdims=True)
        x = grey + saturation * (x - grey)
    return jnp.clip(x, 0, 1)

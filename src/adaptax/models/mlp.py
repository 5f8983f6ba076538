"""Multi-layer perceptrons: the sinusoid regressors and the non-convolutional Omniglot net."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from .layers import BatchNorm, Init, Linear


class MLP(eqx.Module):
    """`in_size → hidden… → out_size`, an activation after each hidden layer.

    MAML's sinusoid net is `MLP(1, 1, (40, 40))`, Reptile's `MLP(1, 1, (64, 64))`, and MAML's
    Omniglot net without convolutions `MLP(784, way, (256, 128, 64, 64), batch_norm=True)`.

    Args:
        in_size: width of the input; images are flattened to it.
        out_size: width of the output.
        hidden: widths between.
        key: of the initialisation.
        activation: elementwise.
        batch_norm: normalise each hidden layer before its activation.
        init: of the weights. MAML's code draws N(0, 0.01²), `"truncated"`.
        context: length of a vector of parameters, 0 at first, that every input is joined with: a
            bias that one inner step may move further than it moves a bias (PLATIPUS: 20).
    """

    context: Float[Array, " context"] | None

    layers: tuple[Linear, ...]
    norms: tuple[BatchNorm, ...]
    head: Linear
    activation: Callable[[Array], Array] = eqx.field(static=True)

    def __init__(
        self,
        in_size: int,
        out_size: int,
        hidden: Sequence[int] = (40, 40),
        *,
        key: PRNGKeyArray,
        activation: Callable[[Array], Array] = jax.nn.relu,
        batch_norm: bool = False,
        init: Init = "glorot",
        context: int = 0,
    ):
        sizes = (in_size + context, *hidden, out_size)
        keys = jax.random.split(key, len(sizes) - 1)
        *layers, head = (Linear(a, b, key=k, init=init) for (a, b), k in zip(pairwise(sizes), keys))
        self.layers, self.head = tuple(layers), head
        self.norms = tuple(BatchNorm(size) for size in hidden) if batch_norm else ()
        self.activation = activation
        self.context = jnp.zeros(context) if context else None

    def __call__(self, x: Float[Array, "n ..."]) -> Float[Array, "n out_size"]:
        """Return a batch of outputs."""
        x = x.reshape(len(x), -1)
        if self.context is not None:
            rows = jnp.broadcast_to(self.context, (len(x), *self.context.shape))
            x = jnp.concatenate([x, rows], axis=1)
        for i, layer in enumerate(self.layers):
            x = layer(x)
            x = self.activation(self.norms[i](x) if self.norms else x)
        return self.head(x)

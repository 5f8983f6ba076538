"""Images of a split, by their rows, and the features that a network has of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from .. import batch_norm, program
from ..conv import fast
from ..protocols import Extractor, Images
from ..task import Model, TaskDistribution


def extract(
    model: Model,
    images: TaskDistribution,
    *,
    batch: int = 256,
    layer: int | None = None,
    watch: Callable[[int], None] | None = None,
) -> Float[np.ndarray, "n features"]:
    """Features of all images of a split, in its order: class by class.

    Batch normalisation is by running statistics where the model has some, so that the features of
    an image do not depend on the others.

    Args:
        model: has `features`, as the networks in `adaptax.models` do.
        images: any split of a family of image episodes.
        batch: images at once, which bounds the memory.
        layer: passed on to `features` if given; see `WideResNet.features`.
        watch: called with the number of images done.

    Raises:
        TypeError: if the model has no features, or the tasks are no episodes of images.
    """
    if not isinstance(images, Images) or not isinstance(model, Extractor):
        raise TypeError(
            "features are extracted by a model with a method `features` from episodes of images, "
            f"not by {type(model).__name__} from {type(images).__name__}"
        )
    how = {} if layer is None else {"layer": layer}
    rows, found, done = np.arange(int(np.sum(images.count))), [], 0
    see = lambda model, x: model.features(x, **how)  # noqa: E731
    for features in outputs(see, model, images, rows, batch):
        found.append(features)
        done += len(features)
        if watch is not None:
            watch(done)
    return np.concatenate(found)


def outputs(
    function: Callable[[Model, PyTree], Array],
    model: Model,
    images: Images,
    rows: Int[np.ndarray, " n"],
    batch: int,
) -> Iterator[Float[np.ndarray, "batch ..."]]:
    """What a model makes of some images, batch by batch, by its running statistics.

    Args:
        function: of the model and inputs.
        model: any.
        images: the split.
        rows: which of them.
        batch: images at once; the last batch is filled up, so that there is one program.
    """
    model = batch_norm.use_running_average(model)
    for first in range(0, len(rows), batch):
        some = rows[first : first + batch]
        pixels = pixels_of(images, np.resize(some, min(batch, len(rows))))
        yield np.asarray(program.call(_of, function, model, images.design, pixels))[: len(some)]


def pixels_of(images: Images, rows: Int[np.ndarray, "*any"]) -> PyTree:
    """Examples by their rows, on the device."""
    return jax.tree.map(jnp.asarray, images.examples(rows))


def _of(function: Callable[..., Array], model: Model, design: Any, pixels: PyTree) -> Array:
    return fast(function)(model, design.inputs(pixels))

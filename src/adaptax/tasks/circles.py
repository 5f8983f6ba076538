"""Circles in the plane, known by points inside: ambiguous classification (PLATIPUS, 2018)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from adaptax.task import Batch, Splits, Task, TaskDistribution
from adaptax.tasks.ranges import Range, checked, points, uniform

SQUARE = (0.0, 5.0)
"""Sides of the square that queries are drawn from."""


class Circles(TaskDistribution):
    """Is a point of the plane inside a circle (label 1) or outside (0)?

    The circle has diameter `d ~ U[0.1, 2]` and centre `c ~ U[1, 4]²`. The support holds positives
    alone, uniform in the circle, so that its border stays open; queries are uniform in the square
    [0, 5]². One in 23 queries is positive on average: compare accuracies with the 0.956 of a model
    that always says "outside".

    Args:
        shot: support points, all of label 1.
        query: query points; may be 0.
        split: `"train"`, `"val"` or `"test"`; all splits follow the same law.
        diameter: range of the diameters.
        centre: range of both coordinates of the centres.
    """

    shot: int = eqx.field(static=True)
    query: int = eqx.field(static=True)
    split: str = eqx.field(static=True)
    diameter: Range = eqx.field(static=True, default=(0.1, 2.0))
    centre: Range = eqx.field(static=True, default=(1.0, 4.0))

    def parameters(self, key: PRNGKeyArray) -> tuple[Float[Array, " 2"], Float[Array, ""]]:
        """Return centre and radius of the circle of the task that this key names."""
        for_centre, for_diameter = jax.random.split(jax.random.split(key, 3)[0])
        return uniform(for_centre, self.centre, (2,)), uniform(for_diameter, self.diameter) / 2

    def function(self, key: PRNGKeyArray) -> Callable[[Array], Array]:
        """Return the labels of points `(n, 2)`, int32, in the task that this key names."""
        centre, radius = self.parameters(key)
        return lambda x: (jnp.sum((x - centre) ** 2, axis=-1) <= radius**2).astype(jnp.int32)

    def sample(self, key: PRNGKeyArray) -> Task:
        """Return the task of this key: x `(shot, 2)` and `(query, 2)`, y int32 in {0, 1}."""
        _, for_support, for_query = jax.random.split(key, 3)
        centre, radius = self.parameters(key)
        # The square root makes the points uniform in area.
        out, turn = jax.random.uniform(for_support, (2, self.shot, 1))
        way = jnp.concatenate([jnp.cos(2 * jnp.pi * turn), jnp.sin(2 * jnp.pi * turn)], axis=-1)
        inside = Batch(centre + radius * jnp.sqrt(out) * way, jnp.ones(self.shot, jnp.int32))
        x = uniform(for_query, SQUARE, (self.query, 2))
        return Task(inside, Batch(x, self.function(key)(x)))

    def describe(self) -> dict[str, Any]:
        """Return name, split, shots, queries and ranges."""
        about = {"tasks": "circles", "split": self.split, "way": 2}
        return {**about, **self._settings(), "support": "positives only"}


def circles(
    shot: int = 10,
    query: int = 50,
    *,
    diameter: Sequence[float] = (0.1, 2.0),
    centre: Sequence[float] = (1.0, 4.0),
    train_shot: int | None = None,
    train_query: int | None = None,
) -> Splits:
    """Return circles known by points inside, generated on the device; see `Circles`.

    The splits follow one law; they differ in the stream of keys that `fit` and `evaluate` give
    them.

    Args:
        shot: support points, all of them positive.
        query: query points, of both labels.
        diameter: range of the diameters.
        centre: range of both coordinates of the centres.
        train_shot: support points in meta-training, if not `shot`.
        train_query: query points in meta-training, if not `query`.

    Raises:
        DataError: if a count or a range is none.
    """
    across, middle = checked("diameter", diameter, least=0.0), checked("centre", centre)
    of = points(shot, query, train_shot, train_query)
    return Splits.of(lambda split: Circles(**of[split], diameter=across, centre=middle))

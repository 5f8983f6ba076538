"""Sine waves: the regression tasks of MAML and of Reptile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from adaptax.task import Splits, Task, TaskDistribution
from adaptax.tasks.episodes import distinct
from adaptax.tasks.files import DataError
from adaptax.tasks.ranges import points

GRID = 50
"""Points of Reptile's published demonstration."""


class Sinusoid(TaskDistribution):
    """Sine waves `y = A·sin(x + b)` with `A ~ U[0.1, 5]` and `x ~ U[−5, 5]`.

    MAML (Finn et al. 2017) writes `A·sin(x − φ)` with `φ ~ U[0, π]`, so `b = −φ`; Reptile (Nichol
    et al. 2018) draws `b ~ U[0, 2π]`, which is why its waves average to zero.

    Args:
        shot: support points.
        query: query points; may be 0.
        split: `"train"`, `"val"` or `"test"`; all splits follow the same law.
        paper: `"maml"` or `"reptile"`.
        grid: draw x from 50 equally spaced points of [−5, 5] without replacement, as Reptile's
            demonstration does (`shot=50, query=0` is the whole grid, in random order).
    """

    shot: int = eqx.field(static=True)
    query: int = eqx.field(static=True)
    split: str = eqx.field(static=True)
    paper: str = eqx.field(static=True, default="maml")
    grid: bool = eqx.field(static=True, default=False)

    def parameters(self, key: PRNGKeyArray) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """Return amplitude `A` and shift `b` of the task that this key names."""
        for_amplitude, for_shift = jax.random.split(jax.random.split(key)[0])
        low, high = (-jnp.pi, 0.0) if self.paper == "maml" else (0.0, 2 * jnp.pi)
        amplitude = jax.random.uniform(for_amplitude, minval=0.1, maxval=5.0)
        return amplitude, jax.random.uniform(for_shift, minval=low, maxval=high)

    def function(self, key: PRNGKeyArray) -> Callable[[Array], Array]:
        """Return the true function of the task that this key names, as `sample(key)` uses it."""
        amplitude, shift = self.parameters(key)
        return lambda x: amplitude * jnp.sin(x + shift)

    def sample(self, key: PRNGKeyArray) -> Task:
        """Return the task that this key names: x and y are `(shot, 1)` and `(query, 1)`."""
        points, for_x = self.shot + self.query, jax.random.split(key)[1]
        if self.grid:
            x = jnp.linspace(-5.0, 5.0, GRID)[distinct(for_x, points, GRID)][:, None]
        else:
            x = jax.random.uniform(for_x, (points, 1), minval=-5.0, maxval=5.0)
        y = self.function(key)(x)
        return Task.cut(x, y, self.shot)

    def describe(self) -> dict[str, Any]:
        """Return name, split, shots, queries and whose waves they are."""
        return {**super().describe(), "tasks": "sinusoid"}


def sinusoid(
    shot: int = 10,
    query: int = 10,
    paper: str = "maml",
    *,
    grid: bool = False,
    train_shot: int | None = None,
    train_query: int | None = None,
) -> Splits:
    """Return sine waves, generated on the device.

    The splits follow one law; they differ in the stream of keys that `fit` and `evaluate` give
    them.

    Args:
        shot: support points.
        query: query points.
        paper: whose waves, `"maml"` or `"reptile"`; see `Sinusoid`.
        grid: draw x from 50 equally spaced points without replacement.
        train_shot: support points in meta-training, if not `shot`.
        train_query: query points in meta-training, if not `query`.

    Raises:
        DataError: if the counts do not fit or the paper is not known.
    """
    if paper not in ("maml", "reptile"):
        raise DataError(f"paper={paper!r}; expected 'maml' or 'reptile'")
    of = points(shot, query, train_shot, train_query)
    for k, q in {(each["shot"], each["query"]) for each in of.values()}:
        if grid and k + q > GRID:
            raise DataError(f"shot + query = {k} + {q} points of a grid of {GRID}; lower them")
    return Splits.of(lambda split: Sinusoid(**of[split], paper=paper, grid=grid))

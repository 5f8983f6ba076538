"""Sine waves and lines under noise: the ambiguous regression of PLATIPUS (Finn et al. 2018)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from adaptax.task import Splits, Task, TaskDistribution
from adaptax.tasks.ranges import Range, check_noise, checked, points, uniform

PHASES = (0.0, jnp.pi)
INPUTS = (-5.0, 5.0)


class Curve(NamedTuple):
    """The true function of a task: `slope·x + intercept`, or `amplitude·sin(x − phase)`.

    Args:
        is_line: which of the two; the parameters of the other one do not matter.
        amplitude: of the wave.
        phase: of the wave, in radians.
        slope: of the line.
        intercept: of the line.
    """

    is_line: Bool[Array, ""]
    amplitude: Float[Array, ""]
    phase: Float[Array, ""]
    slope: Float[Array, ""]
    intercept: Float[Array, ""]

    def __call__(self, x: Float[Array, "*any"]) -> Float[Array, "*any"]:
        """Return the function without noise."""
        wave = self.amplitude * jnp.sin(x - self.phase)
        return jnp.where(self.is_line, self.slope * x + self.intercept, wave)


class SinusoidOrLine(TaskDistribution):
    """Half of the tasks are sine waves, half are lines, all observed under Gaussian noise.

    Waves `A·sin(x − φ)` have `A ~ U[0.1, 5]` and `φ ~ U[0, π]`, lines `a·x + b` have
    `a, b ~ U[−3, 3]`; `x ~ U[−5, 5]`, and the noise has standard deviation 0.3. A handful of noisy
    points often leaves open which of the two it is. Settings that are attributed to the authors'
    unreleased code begin the amplitudes at 1, and others in it draw slopes from [−1, 1]: say
    `amplitude=(1, 5)` or `slope=(-1, 1)`. Support and queries are equally noisy; `function(key)`
    answers without noise.

    Args:
        shot: support points.
        query: query points; may be 0.
        split: `"train"`, `"val"` or `"test"`; all splits follow the same law.
        noise: standard deviation of the noise in y.
        amplitude: range of the waves' amplitudes.
        slope: range of the lines' slopes, and of their intercepts.
    """

    shot: int = eqx.field(static=True)
    query: int = eqx.field(static=True)
    split: str = eqx.field(static=True)
    noise: float = eqx.field(static=True, default=0.3)
    amplitude: Range = eqx.field(static=True, default=(0.1, 5.0))
    slope: Range = eqx.field(static=True, default=(-3.0, 3.0))

    def parameters(self, key: PRNGKeyArray) -> Curve:
        """Return the true function of the task that this key names."""
        keys = jax.random.split(jax.random.split(key, 3)[0], 5)
        return Curve(
            jax.random.bernoulli(keys[0]),
            uniform(keys[1], self.amplitude),
            uniform(keys[2], PHASES),
            uniform(keys[3], self.slope),
            uniform(keys[4], self.slope),
        )

    def function(self, key: PRNGKeyArray) -> Callable[[Array], Array]:
        """Return the true function of the task that this key names, without noise."""
        return self.parameters(key).__call__

    def sample(self, key: PRNGKeyArray) -> Task:
        """Return the task that this key names: x and y are `(shot, 1)` and `(query, 1)`."""
        _, for_x, for_noise = jax.random.split(key, 3)
        x = uniform(for_x, INPUTS, (self.shot + self.query, 1))
        y = self.parameters(key)(x) + self.noise * jax.random.normal(for_noise, x.shape)
        return Task.cut(x, y, self.shot)

    def describe(self) -> dict[str, Any]:
        """Return name, split, shots, queries, noise and ranges."""
        return {**super().describe(), "tasks": "sinusoid_or_line"}


def sinusoid_or_line(
    shot: int = 5,
    query: int = 50,
    *,
    noise: float = 0.3,
    amplitude: Sequence[float] = (0.1, 5.0),
    slope: Sequence[float] = (-3.0, 3.0),
    train_shot: int | None = None,
    train_query: int | None = None,
) -> Splits:
    """Return sine waves and lines under noise, generated on the device; see `SinusoidOrLine`.

    The splits follow one law; they differ in the stream of keys that `fit` and `evaluate` give
    them.

    Args:
        shot: support points.
        query: query points.
        noise: standard deviation of the noise in y.
        amplitude: range of the waves' amplitudes.
        slope: range of the lines' slopes, and of their intercepts.
        train_shot: support points in meta-training, if not `shot`.
        train_query: query points in meta-training, if not `query`.

    Raises:
        DataError: if a count, the noise or a range is none.
    """
    check_noise("noise", noise)
    waves, lines = checked("amplitude", amplitude, least=0.0), checked("slope", slope)
    of = points(shot, query, train_shot, train_query)
    return Splits.of(
        lambda split: SinusoidOrLine(**of[split], noise=float(noise), amplitude=waves, slope=lines)
    )

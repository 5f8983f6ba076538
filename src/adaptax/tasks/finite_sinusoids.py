"""Finite sets of sine waves of varying frequency: the regression of BMAML (Yoon et al. 2018)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, PRNGKeyArray

from adaptax.task import Splits, Task, TaskDistribution
from adaptax.tasks.files import DataError
from adaptax.tasks.ranges import check_noise, points, uniform

AMPLITUDES = (0.1, 5.0)
FREQUENCIES = (0.5, 2.0)
PHASES = (0.0, 2 * jnp.pi)
INPUTS = (-5.0, 5.0)


class FiniteSinusoids(TaskDistribution):
    """Sine waves `y = A·sin(w·x − b)`, of which meta-training sees a fixed, finite set.

    `A ~ U[0.1, 5]`, `w ~ U[0.5, 2]`, `b ~ U[0, 2π]`, `x ~ U[−5, 5]`, and Gaussian noise of
    standard deviation 0.01·A. The T training tasks are fixed with their points and their noise:
    meta-training that goes on for long can learn them by heart, and the spread of a Bayesian
    learner's particles is to prevent it. Validation and test tasks are fresh, a new one for every
    key, and their queries are free of noise.

    The released code keeps 100 fixed tasks for validation and 100 for test, and draws the tasks of
    a meta-batch without replacement; here they are drawn independently.

    Args:
        shot: support points.
        query: query points; may be 0.
        split: `"train"`, `"val"` or `"test"`.
        tasks: how many there are, T; `None` for a fresh one at every key.
        noise: standard deviation of the noise, in amplitudes.
        noisy_queries: whether the queries have noise too.
        seed: names the set of tasks.
    """

    shot: int = eqx.field(static=True)
    query: int = eqx.field(static=True)
    split: str = eqx.field(static=True)
    tasks: int | None = eqx.field(static=True)
    noise: float = eqx.field(static=True, default=0.01)
    noisy_queries: bool = eqx.field(static=True, default=True)
    seed: int = eqx.field(static=True, default=0)

    def index(self, key: PRNGKeyArray) -> Int32[Array, ""]:
        """Return which task of the finite set this key names."""
        if self.tasks is None:
            raise ValueError(f"the {self.split} tasks are fresh for every key and have no index")
        return jax.random.randint(key, (), 0, self.tasks, jnp.int32)

    def parameters(
        self, key: PRNGKeyArray
    ) -> tuple[Float[Array, ""], Float[Array, ""], Float[Array, ""]]:
        """Return amplitude `A`, frequency `w` and phase `b` of the task that this key names."""
        for_wave = jax.random.split(jax.random.split(self._own(key), 3)[0], 3)
        ranges = (AMPLITUDES, FREQUENCIES, PHASES)
        amplitude, frequency, phase = (uniform(k, ends) for k, ends in zip(for_wave, ranges))
        return amplitude, frequency, phase

    def function(self, key: PRNGKeyArray) -> Callable[[Array], Array]:
        """Return the true function of the task that this key names, without noise."""
        amplitude, frequency, phase = self.parameters(key)
        return lambda x: amplitude * jnp.sin(frequency * x - phase)

    def sample(self, key: PRNGKeyArray) -> Task:
        """Return the task that this key names: x and y are `(shot, 1)` and `(query, 1)`."""
        _, for_x, for_noise = jax.random.split(self._own(key), 3)
        x = uniform(for_x, INPUTS, (self.shot + self.query, 1))
        y = self.function(key)(x)
        noisy = jnp.arange(len(x))[:, None] < (len(x) if self.noisy_queries else self.shot)
        noise = self.noise * self.parameters(key)[0] * jax.random.normal(for_noise, x.shape)
        y = jnp.where(noisy, y + noise, y)
        return Task.cut(x, y, self.shot)

    def describe(self) -> dict[str, Any]:
        """Return name, split, shots, queries, number of tasks and noise."""
        return {
            "tasks": "finite_sinusoids",
            "split": self.split,
            "shot": self.shot,
            "query": self.query,
            "set": "fresh" if self.tasks is None else f"{self.tasks} of seed {self.seed}",
            "noise": self.noise,
            "noisy_queries": self.noisy_queries,
        }

    def _own(self, key: PRNGKeyArray) -> PRNGKeyArray:
        """Return the key that everything about a task is drawn with."""
        if self.tasks is None:
            return key
        return jax.random.fold_in(jax.random.key(self.seed), self.index(key))


def finite_sinusoids(
    shot: int = 5,
    query: int | None = None,
    tasks: int = 100,
    *,
    noise: float = 0.01,
    train_shot: int | None = None,
    train_query: int | None = None,
    seed: int = 0,
) -> Splits:
    """Return finite sets of sine waves, generated on the device; see `FiniteSinusoids`.

    The paper has 5 and 10 shots with as many queries, of 100 and of 1000 training tasks.

    Args:
        shot: support points.
        query: query points; as many as `shot` if `None`.
        tasks: training tasks, T.
        noise: standard deviation of the noise, in amplitudes.
        train_shot: support points in meta-training, if not `shot`.
        train_query: query points in meta-training, if not `query`.
        seed: names the set of training tasks.

    Raises:
        DataError: if a count or the noise is none.
    """
    if tasks < 1:
        raise DataError(f"tasks={tasks}; expected at least 1 task to train on")
    check_noise("noise", noise)
    of = points(shot, shot if query is None else query, train_shot, train_query)
    return Splits.of(
        lambda split: FiniteSinusoids(
            **of[split],
            tasks=tasks if split == "train" else None,
            noise=float(noise),
            noisy_queries=split == "train",
            seed=seed,
        )
    )

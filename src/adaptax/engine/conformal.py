"""Intervals and sets of classes that hold for new tasks: calibrated over tasks that are held out.

Tasks are exchangeable, and the queries of one task are among themselves (Lee, Barber & Willett
2023, arXiv:2306.06342). A query's score s is how badly it was predicted. Of T calibration tasks,

    F(t) = Σ_i Σ_j w_ij [s_ij ≤ t] / (T + 1),   Σ_j w_ij = 1 for every task i

puts 1 / (T + 1) at infinity, for the new task. What scores at most the least t with `F(t) ≥ c`
holds the target of a query of a new task with probability c or more, whatever the learner, its
noise and the tasks are: over the draw of all tasks, not for each task.
"""

from __future__ import annotations

import dataclasses
import math
import os
import warnings
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PRNGKeyArray, PyTree
from safetensors import SafetensorError
from safetensors.numpy import load, save

from .. import io, losses, metrics, program, roles, weights
from ..conv import FastPath
from ..learner import Adapter, Ensemble, Meta
from ..task import Batch, Model, Source, TaskDistribution, way_of
from . import feed
from .evaluate import Evaluator
from .mapping import map_over, suited, with_fast_path
from .predict import deviations, is_predictive, learned_noise, predictions
from .work import episodes_at_once

LEVELS = (0.5, 0.8, 0.9, 0.95)
"""Coverages that `check` tells of."""

Noise = float | str
"""Standard deviation of the targets beside an ensemble's disagreement: a number; `"learned"`, as in
`evaluate`; or `"support"`, the residuals of every task's own support."""


@dataclasses.dataclass(frozen=True)
class Scores:
    """How badly the queries of some tasks were predicted.

    Args:
        score: `|y − f(x)| / σ(x)`, `(tasks, n, targets)`; or `1 − p(y | x)`, `(tasks, n, 1)`.
        weight: what each counts, of that shape.
        spread: σ(x), of that shape; or `1 − p(c | x)` of all classes, `(tasks, n, way)`.
        support_loss: of the adapted models on their supports, `(tasks,)`.
    """

    score: Float[np.ndarray, "tasks n targets"]
    weight: Float[np.ndarray, "tasks n targets"]
    spread: Float[np.ndarray, "tasks n _"]
    support_loss: Float[np.ndarray, " tasks"]

    def threshold(self, coverage: float) -> Float[np.ndarray, " targets"]:
        """Return the largest score that is held, of every target; see `quantile`.

        Raises:
            ValueError: if there are too few tasks for it.
        """
        pairs = zip(np.moveaxis(self.score, -1, 0), np.moveaxis(self.weight, -1, 0), strict=True)
        return np.array([quantile(score, weight, coverage) for score, weight in pairs])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write them as safetensors."""
        io.write_atomic(
            path, save({f.name: getattr(self, f.name) for f in dataclasses.fields(self)})
        )

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Scores:
        """Read what `save` wrote.

        Raises:
            ValueError: if it is no such file.
        """
        try:
            with open(path, "rb") as file:
                return cls(**load(file.read()))
        except (SafetensorError, TypeError, ValueError) as error:
            raise ValueError(f"{path} holds no scores of calibration tasks ({error})") from error

    @classmethod
    def joined(cls, parts: Sequence[Scores]) -> Scores:
        """Return the tasks of all parts; what is shorter is filled up without weight."""
        longest = max(part.score.shape[1] for part in parts)

        def padded(array: np.ndarray) -> np.ndarray:
            if array.ndim == 1:
                return array
            return np.pad(array, ((0, 0), (0, longest - array.shape[1]), (0, 0)))

        names = [field.name for field in dataclasses.fields(cls)]
        return cls(
            *(np.concatenate([padded(getattr(part, name)) for part in parts]) for name in names)
        )


def fewest(coverage: float) -> int:
    """Return how many calibration tasks a coverage of new tasks wants."""
    return math.ceil(coverage / (1 - coverage) - 1e-9)


def quantile(
    score: Float[np.ndarray, "tasks n"], weight: Float[np.ndarray, "tasks n"], coverage: float
) -> float:
    """Return the least t with `F(t) ≥ coverage`, as above.

    Args:
        score: of the queries of every task.
        weight: what each counts; tasks in which none does are left out.
        coverage: in (0, 1).

    Raises:
        ValueError: if the coverage is no share, or there are too few tasks for it.
    """
    if not 0 < coverage < 1:
        raise ValueError(f"coverage is between 0 and 1, not {coverage}")
    total = weight.sum(axis=1, keepdims=True)
    there = total[:, 0] > 0
    tasks = int(there.sum())
    least = fewest(coverage)
    if tasks < least:
        raise ValueError(
            f"a coverage of {coverage:g} for new tasks wants {least} calibration tasks or more, "
            f"and there are {tasks}; calibrate on more tasks, or ask for less"
        )
    share = (weight / np.where(total > 0, total, 1))[there].ravel() / (tasks + 1)
    values = score[there].ravel()
    order = np.argsort(values, kind="stable")
    reached = np.cumsum(share[order]) >= coverage - 1e-12
    return float(values[order][np.argmax(reached)])


@dataclasses.dataclass(frozen=True)
class Coverage:
    """How often the intervals or sets of a learner hold the targets of test tasks.

    Args:
        level: the coverage that was asked for.
        coverage: the mean over tasks of the share of their queries that are held.
        ci95: half its 95 % interval, over test tasks.
        calibration_ci95: half the 95 % interval of what other calibration tasks would give.
        size: mean width of the intervals, or number of classes in the sets.
        by_task: the share of every task, `(tasks,)`.
    """

    level: float
    coverage: float
    ci95: float
    calibration_ci95: float
    size: float
    by_task: Float[np.ndarray, " tasks"]

    def to_json(self) -> dict[str, Any]:
        """Return all but the single tasks, and their tenths."""
        said = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        said["by_task"] = np.quantile(said.pop("by_task"), np.linspace(0, 1, 11)).tolist()
        return io.strict(said)

    def __str__(self) -> str:
        """One line."""
        worst = float(np.min(self.by_task))
        return (
            f"{100 * self.level:g} %: {100 * self.coverage:.1f} ± {100 * self.ci95:.1f} % of the "
            f"targets of {len(self.by_task)} tasks (other calibration tasks: ± "
            f"{100 * self.calibration_ci95:.1f}), least of a task {100 * worst:.0f} %, mean size "
            f"{self.size:.3g}"
        )


@dataclasses.dataclass(frozen=True)
class Conformal:
    """A learner with intervals, or sets of classes, that hold for new tasks; see `conformal`.

    Args:
        learner: any `Adapter`.
        meta: its meta-parameters.
        scores: of the calibration tasks.
        noise: see `Noise`.
        transductive: as in `evaluate`.
        fast_path: see `adaptax.conv.fast`.
    """

    learner: Adapter
    meta: Meta
    scores: Scores
    noise: Noise = 1.0
    transductive: bool = True
    fast_path: FastPath = "auto"

    def threshold(self, coverage: float) -> Float[np.ndarray, " targets"]:
        """Return the largest score that is held, of every target.

        Raises:
            ValueError: if there are too few calibration tasks for it.
        """
        return self.scores.threshold(coverage)

    def interval(
        self, support: Source, x: PyTree, coverage: float = 0.9, *, key: PRNGKeyArray | None = None
    ) -> tuple[Float[np.ndarray, "n targets"], Float[np.ndarray, "n targets"]]:
        """Return the ends of intervals `f(x) ± t σ(x)` that hold a share of a new task's targets.

        Args:
            support: of the task.
            x: queries.
            coverage: the share.
            key: of adaptation; `jax.random.key(0)` if `None`.

        Raises:
            ValueError: for classes, or too few calibration tasks.

        Warns:
            UserWarning: if the task looks unlike those of calibration; see `resemblance`.
        """
        if _kind(self.learner, support) != "regression":
            raise ValueError("intervals are of numbers; for classes take sets(support, x)")
        half = self.threshold(coverage)
        mean, spread, _ = self._predicted(support, x, key)
        return mean - half * spread, mean + half * spread

    def sets(
        self, support: Source, x: PyTree, coverage: float = 0.9, *, key: PRNGKeyArray | None = None
    ) -> Bool[np.ndarray, "n way"]:
        """Return which classes are in the sets that hold the class of a share of a task's queries.

        A class is in the set of a query if its probability is large enough; none may be.

        Args:
            support: of the task.
            x: queries.
            coverage: the share.
            key: of adaptation; `jax.random.key(0)` if `None`.

        Raises:
            ValueError: for numbers, or too few calibration tasks.

        Warns:
            UserWarning: if the task looks unlike those of calibration; see `resemblance`.
        """
        if _kind(self.learner, support) != "classification":
            raise ValueError("sets are of classes; for numbers take interval(support, x)")
        (largest,) = self.threshold(coverage)
        _, missed, _ = self._predicted(support, x, key)
        return np.asarray(missed <= largest)

    def resemblance(self, support: Source, *, key: PRNGKeyArray | None = None) -> float:
        """Return how many of the calibration tasks were fitted as badly as this one, or worse.

        A conformal p-value of the loss that the adapted model has on its own support: small for a
        task that is unlike those of calibration.

        Args:
            support: of the task.
            key: of adaptation.
        """
        _, _, loss = self._predicted(support, support.draw(None, jax.random.key(0)).x, key, False)
        return float((1 + np.sum(self.scores.support_loss >= loss)) / (1 + len(
            self.scores.support_loss)))  # fmt: skip

    def check(
        self,
        tasks: TaskDistribution,
        *,
        key: PRNGKeyArray,
        episodes: int | None = None,
        levels: Sequence[float] = LEVELS,
    ) -> list[Coverage]:
        """Return how often the targets of test tasks are held.

        Args:
            tasks: usually `tasks.test`.
            key: names the episodes.
            episodes: how many; as in `conformal`.
            levels: coverages; those that there are too few calibration tasks for are left out.
        """
        found = scored(self.learner, self.meta, tasks, key=key, episodes=episodes, noise=self.noise,
                       transductive=self.transductive, fast_path=self.fast_path)  # fmt: skip
        return [self._coverage(found, level) for level in levels if self._can(level)]

    def _can(self, level: float) -> bool:
        try:
            self.threshold(level)
        except ValueError:
            return False
        return True

    def _coverage(self, found: Scores, level: float) -> Coverage:
        largest = self.threshold(level)
        weight = found.weight
        there = weight.sum(axis=(1, 2)) > 0

        def by_task(scores: Scores) -> np.ndarray:
            held = (scores.score <= largest) * scores.weight
            total = scores.weight.sum(axis=(1, 2))
            return held.sum(axis=(1, 2))[total > 0] / total[total > 0]

        own = by_task(found)
        mean, half = metrics.interval(own)
        if found.spread.shape[-1] == found.score.shape[-1]:  # numbers; classes are two or more
            size = 2 * largest * found.spread
            each = (size * weight).sum(axis=(1, 2))[there] / weight.sum(axis=(1, 2))[there]
        else:
            inside = (found.spread <= largest).sum(axis=-1)
            each = (inside * weight[..., 0]).sum(axis=1)[there] / weight[..., 0].sum(axis=1)[there]
        other = float(metrics.ci95(by_task(self.scores)))
        return Coverage(level, float(mean), float(half), other, float(each.mean()), own)

    def _predicted(
        self, support: Source, x: PyTree, key: PRNGKeyArray | None, warn: bool = True
    ) -> tuple[np.ndarray, np.ndarray, float]:
        """Return means and σ, or logarithms of probabilities and 1 − p; and the support's loss."""
        key = jax.random.key(0) if key is None else key
        model = self.learner.adapt(self.meta, support, key=key)
        seen = support.draw(model, key)
        found = program.call(_predict_new, self._scorer, model, seen, x)
        *rest, loss = (np.asarray(each) for each in found)
        worst = float(np.max(self.scores.support_loss))
        if warn and not float(loss) <= worst:
            warnings.warn(
                f"the task looks unlike the {len(self.scores.support_loss)} calibration tasks: its "
                f"support is fitted with a loss of {float(loss):.3g}, theirs with at most "
                f"{worst:.3g}; what is promised for tasks like those may not hold",
                stacklevel=3,
            )
        return rest[0], rest[1], float(loss)

    @property
    def _scorer(self) -> _Scorer:
        return _Scorer(self.learner, self.noise, self.transductive, self.fast_path)


def conformal(
    learner: Adapter, meta: Meta, tasks: TaskDistribution, *, key: PRNGKeyArray, **how: Any
) -> Conformal:
    """Calibrate intervals, or sets of classes, over held-out tasks.

        found = adaptax.conformal(learner, result.meta, tasks.val, key=key)
        low, high = found.interval(support, x, coverage=0.9)
        print(*found.check(tasks.test, key=key), sep="\\n")

    For a cross form, score every fold of the tasks by meta-parameters that were trained without
    it, and give `Scores.joined` of these `scored` to `Conformal`, with those of all tasks.

    Args:
        learner: any `Adapter`.
        meta: its meta-parameters.
        tasks: held out from meta-training, and not those that are reported.
        key: names the episodes.
        how: `episodes`: how many; as many as there are tasks in a list, else 600, if `None`.
            `noise`: see `Noise`. `transductive`, `fast_path`: as in `evaluate`.

    Raises:
        ValueError: if the learner's predictions are neither numbers nor classes.
    """
    found = scored(learner, meta, tasks, key=key, **how)
    own = {name: how[name] for name in ("noise", "transductive", "fast_path") if name in how}
    return Conformal(learner, meta, found, **own)


def scored(
    learner: Adapter,
    meta: Meta,
    tasks: TaskDistribution,
    *,
    key: PRNGKeyArray,
    episodes: int | None = None,
    noise: Noise = 1.0,
    transductive: bool = True,
    fast_path: FastPath = "auto",
) -> Scores:
    """Return the scores of the queries of many tasks; see `conformal`."""
    if noise not in ("learned", "support") and (isinstance(noise, str) or not noise > 0):
        raise ValueError(f'noise is a number above 0, "learned" or "support", not {noise!r}')
    learner, listed = learner.with_way(way_of(tasks)), len(getattr(tasks, "names", ()))
    episodes = episodes or listed or 600
    scorer, meta = _Scorer(learner, noise, transductive, fast_path), roles.deduplicate(meta)
    evaluator = Evaluator(learner, tasks, episodes=episodes)
    task = evaluator.work(meta, key=key)
    size = 1 if suited(task) == "scan" else 32
    chunk = episodes_at_once(task, size, episodes)
    parts = []
    for start in range(0, episodes, chunk):
        given = evaluator.load(start, chunk, key, slice(None))  # each of several processes all
        found = program.call(_Scorer.chunk, scorer, size, meta, tasks, *given)
        parts.append([np.asarray(each) for each in found])
    whole = [np.concatenate(each)[:episodes] for each in zip(*parts, strict=True)]
    return Scores(*whole)


class _Scorer(eqx.Module):
    """What the programs depend on."""

    learner: Adapter
    noise: Noise = eqx.field(static=True)
    transductive: bool = eqx.field(static=True)
    fast_path: FastPath = eqx.field(static=True)

    def chunk(
        self, size: int, meta: Meta, tasks: TaskDistribution, loaded: PyTree, keys: Array
    ) -> Any:
        return map_over(lambda xs: self.episode(meta, tasks, *xs), (loaded, keys), size)

    def episode(
        self, meta: Meta, tasks: TaskDistribution, loaded: PyTree, key: PRNGKeyArray
    ) -> tuple[Array, Array, Array, Array]:
        """Return the fields of `Scores` for one episode, with the keys of `evaluate`."""
        adapt_key, support_key, query_key = jax.random.split(key, 3)
        task, meta = feed.task(tasks, loaded), roles.fresh(meta, key)
        learner = with_fast_path(self.learner, self.fast_path)
        model = learner.adapt(meta, task.support, key=adapt_key)
        support, query = task.support.draw(model, support_key), task.query.draw(model, query_key)
        loss = _fit(self.learner, model, support)
        mean, spread = self.predicted(model, support, query.x, query.weight)
        if _kind(self.learner, query) == "classification":
            score = jnp.take_along_axis(spread, query.y[:, None], axis=-1)
        else:
            y = query.targets.reshape(len(mean), -1)
            score = jnp.abs(y - mean) / spread
        weight = jnp.ones(score.shape) if query.weight is None else weights.spread(
            query.weight.reshape(len(score), -1)[:, : score.shape[1]], score)  # fmt: skip
        return score, weight, spread, loss

    def predicted(
        self, model: Model, support: Batch, x: PyTree, weight: Any
    ) -> tuple[Array, Array]:
        """Return means and σ, `(n, targets)`; or log-probabilities and 1 − p, `(n, way)`."""
        how: dict[str, Any] = {
            "transductive": self.transductive,
            "fast_path": self.fast_path,
            "weights": (weight, support.weight),
        }
        found = predictions(model, x, support.x, **how)
        if _kind(self.learner, support) == "classification":
            log_p = metrics.mixture(found)
            return log_p, 1 - jnp.exp(log_p)
        ensemble = found if found.ndim > support.y.ndim else found[None]
        mean = jnp.mean(ensemble, axis=0)
        variance = jnp.var(ensemble, axis=0)
        if is_predictive(model):
            own = deviations(model, x, support.x, **how)
            own = own if own.ndim > support.y.ndim else own[None]
            variance = variance + jnp.mean(own**2, axis=0)
        else:
            variance = variance + self._noise(model, support) ** 2
        flat = lambda a: a.reshape(len(a), -1)  # noqa: E731
        return flat(mean), flat(jnp.sqrt(variance))

    def _noise(self, model: Model, support: Batch) -> Array:
        if self.noise == "learned":
            return jnp.sqrt(jnp.mean(learned_noise(model) ** 2))
        if self.noise == "support":
            found = support.predict(lambda x: roles.apply(model, x))
            mean = found if found.ndim == support.y.ndim else jnp.mean(found, axis=0)
            squares = weights.average((support.targets - mean) ** 2, support.weight)
            return jnp.sqrt(jnp.maximum(squares, 1e-6))
        return jnp.asarray(self.noise, float)


def _predict_new(
    scorer: _Scorer, model: Model, support: Batch, x: PyTree
) -> tuple[Array, Array, Array]:
    return *scorer.predicted(model, support, x, None), _fit(scorer.learner, model, support)


def _fit(learner: Adapter, model: Model, support: Batch) -> Array:
    """Return the loss of an adapted model on its support, the mean over an ensemble's."""
    loss = roles.pure(learner.loss)
    if isinstance(model, Ensemble):
        return jnp.mean(model.map(lambda one: loss(one, support)))
    return loss(model, support)


def _kind(learner: Adapter, batch: Any) -> str:
    """Return what is predicted: numbers or classes.

    Raises:
        ValueError: if it is something else.
    """
    kind = losses.kind_of(learner.loss)
    if kind is None and isinstance(batch, Batch):
        labels = jnp.issubdtype(batch.y.dtype, jnp.integer)
        kind = "classification" if labels and batch.y.ndim == 1 else "regression"
    if kind not in ("regression", "classification"):
        raise ValueError(
            f"conformal calibration is for numbers or one class each, and the loss says {kind}"
        )
    return kind

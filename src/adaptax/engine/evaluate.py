"""Evaluation: the same episodes for every learner, and the protocol printed with the number."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from .. import io, metrics, program, roles, tree
from ..conv import FastPath, fast
from ..learner import Ensemble, Meta, MetaLearner
from ..task import Model, Splits, TaskDistribution
from . import feed, scoring
from .mapping import Mapping, chunk_size, with_fast_path
from .scoring import Scores, Select

DIVERGED = 10.0
"""A regression task counts as diverged when its error after adaptation is not finite, or is so
many times its error before."""


@dataclasses.dataclass(frozen=True)
class Report:
    """Scores of one learner on the episodes of one split, with the protocol they belong to.

    Args:
        protocol: what the number depends on: algorithm, tasks, ways, shots, queries, split,
            episodes, steps, transductive or not, single model or ensemble.
        at: the adaptation steps that were scored; `[None]` for a learner without steps.
        values: for each metric, an array `(episodes, len(at))`.
        bins: calibration tables, `(len(at), bins, 3)`, for classification.
        quantiles: how many targets fell in each quantile of their prediction, `(len(at), bins)`,
            for regression.
        select: the metric that `score` is of, and which of its directions is better if its name
            does not tell; the primary one if `None`.
    """

    protocol: dict[str, Any]
    at: list[int | None]
    values: dict[str, np.ndarray]
    bins: np.ndarray | None
    quantiles: np.ndarray | None = None
    select: Select | None = None

    @property
    def primary(self) -> str:
        """`"accuracy"` for classification, `"mse"` for regression, `"label_accuracy"` for labels
        that are each true or false; otherwise what was selected by, or the `"loss"`."""
        usual = (name for name in ("accuracy", "mse", "label_accuracy") if name in self.values)
        return next(usual, scoring.name_of(self.select or "loss"))

    @property
    def score(self) -> float:
        """What `fit` selects by, after the last step, signed so that more is better."""
        select = self.select or self.primary
        mean = self.mean(scoring.name_of(select))
        return scoring.sign_of(select) * mean if math.isfinite(mean) else -math.inf

    def mean(self, metric: str, step: int = -1, *, diverged: bool = True) -> float:
        """Mean over episodes of a metric at one of the steps in `at` (by position).

        Args:
            metric: one of `values`.
            step: position in `at`.
            diverged: count the episodes that diverged; without them the mean of none is NaN.
        """
        values = self.values[metric][:, step]
        values = values if diverged else values[~self._diverged(step)]
        with np.errstate(all="ignore"):
            return float(np.mean(values)) if len(values) else math.nan

    def ci95(self, metric: str, step: int = -1, *, diverged: bool = True) -> float:
        """Half the 95 % confidence interval of that mean: 1.96 standard errors over episodes."""
        values = self.values[metric][:, step]
        values = values if diverged else values[~self._diverged(step)]
        return float(metrics.ci95(values))

    def ece(self, step: int = -1) -> float:
        """Expected calibration error over the queries of all episodes, in bins of confidence."""
        if self.bins is None:
            raise ValueError("the calibration error is a metric of classification")
        return metrics.calibration_error(jnp.asarray(self.bins[step]))

    def coverage(self, level: float, step: int = -1) -> float:
        """Fraction of all targets in the central intervals that should hold `level` of them.

        Args:
            level: a multiple of 0.05 up to 1.
            step: position in `at`.

        Raises:
            ValueError: for another level, or a report of classification.
        """
        if self.quantiles is None:
            raise ValueError("the coverage of intervals is a metric of regression")
        counts = self.quantiles[step]
        half = round(level * len(counts) / 2)
        if not 1 <= half <= len(counts) // 2 or abs(half - level * len(counts) / 2) > 1e-6:
            raise ValueError(f"level is a multiple of {2 / len(counts):g} up to 1, not {level}")
        middle = len(counts) // 2
        return float(counts[middle - half : middle + half].sum() / counts.sum())

    def diverged(self, step: int = -1) -> int:
        """Episodes whose adaptation diverged by then; see `DIVERGED`. Means include them."""
        return int(np.sum(self._diverged(step)))

    def _diverged(self, step: int) -> np.ndarray:
        if self.primary != "mse":
            name = "nll" if "nll" in self.values else self.primary
            return ~np.isfinite(self.values[name][:, step])
        mse = self.values["mse"]
        bad = ~np.isfinite(mse[:, step])
        if self.at[0] == 0:
            with np.errstate(all="ignore"):
                bad |= mse[:, step] > DIVERGED * mse[:, 0]
        return bad

    def _curve(self) -> list[dict[str, Any]]:
        curve = []
        for i, step in enumerate(self.at):
            row: dict[str, Any] = {"step": step}
            for name in self.values:
                row[name], row[f"{name}_ci95"] = self.mean(name, i), self.ci95(name, i)
                row[f"{name}_not_diverged"] = self.mean(name, i, diverged=False)
            with np.errstate(all="ignore"):
                row[f"median_{self.primary}"] = float(np.median(self.values[self.primary][:, i]))
            if self.bins is not None:
                row["ece"] = self.ece(i)
            row["diverged"] = self.diverged(i)
            curve.append(row)
        return curve

    def to_json(self) -> dict[str, Any]:
        """Everything but the single episodes, as JSON values: `None` for what is not finite.

        Means include the episodes that diverged; `..._not_diverged` are the means without them.
        """
        curve = self._curve()
        return io.strict({"protocol": self.protocol, "result": curve[-1], "curve": curve})

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write `to_json` to a file."""
        text = json.dumps(self.to_json(), indent=2, allow_nan=False)
        io.write_atomic(path, f"{text}\n".encode())

    def __str__(self) -> str:
        """The score, the curve over steps, and the protocol."""
        last = self._curve()[-1]
        scale, unit = (100, " %") if self.primary == "accuracy" else (1, "")
        shown = f"{scale * last[self.primary]:.4g} ± {scale * last[self.primary + '_ci95']:.2g}"
        lines = [f"{self.primary} {shown}{unit} (mean, 95 % CI over episodes)"]
        rest = [n for n in (*self.values, "ece") if n in last and n != self.primary]
        lines.append(", ".join(f"{name} {last[name]:.4g}" for name in rest))
        if len(self.at) > 1:
            curve = zip(self.at, range(len(self.at)))
            points = (f"{step}: {scale * self.mean(self.primary, i):.4g}" for step, i in curve)
            lines.append(f"{self.primary} by step: " + ", ".join(points))
        if last["diverged"]:
            others = scale * last[f"{self.primary}_not_diverged"]
            lines.append(
                f"{last['diverged']} of {self.protocol['episodes']} tasks diverged, which the "
                f"means include; {self.primary} of the others {others:.4g}{unit}"
            )
        lines.append(", ".join(f"{name} {value}" for name, value in self.protocol.items()))
        return "\n".join(lines)


def evaluate(
    learner: MetaLearner,
    meta: Meta,
    tasks: TaskDistribution,
    *,
    key: PRNGKeyArray,
    **how: Any,
) -> Report:
    """Adapt to each of 600 tasks and score the predictions on its queries.

    Which metrics that are follows from the loss; see `adaptax.engine.scoring`.

    Episode i depends on the key, the split and i alone: every learner sees the same ones.

    Args:
        learner: any `MetaLearner`.
        meta: its meta-parameters, `result.meta`.
        tasks: usually `tasks.test`.
        key: names the episodes.
        how: the arguments of `Evaluator`: `episodes`, `steps`, `at`, `transductive`, `noise`,
            `scores`, `select`, `mapping`, `fast_path`, `watch`.

    Raises:
        ValueError: if there are no episodes or no queries, or the model's output does not fit
            the targets.
    """
    return Evaluator(learner, tasks, **how)(meta, key=key)


class Evaluator:
    """`evaluate` for one learner and one split, compiled once and called as often as need be.

    Args:
        learner: any `MetaLearner`.
        tasks: the split.
        episodes: how many; 600 as in MAML's paper.
        steps: adaptation steps; as many as the learner takes in `adapt` if `None`.
        at: the steps to score; by default all up to 10, or eleven evenly spaced.
        transductive: predict all queries of an episode as one batch, as the papers of MAML do:
            with batch normalisation they then see each other. If false, each query is predicted
            in a batch of the support set and itself alone, as in Reptile's paper.
        noise: standard deviation of the targets that the likelihood and the intervals of a
            regression assume; or `"learned"`: what the model, or each of an ensemble, says in its
            attribute `noise`, as `adaptax.Gaussian` does.
        scores: metrics of one's own, beside those that the loss says:
            `scores(predictions, targets) -> {name: scalar}` for the queries of one task, traceable.
            An ensemble's predictions lead with the particle axis.
        select: the metric that the report's `score` is of, by which `fit` selects: such as `"nll"`
            where it counts how sure a prediction is; the primary one if `None`. For a metric whose
            name does not tell whether more is better, `("name", "max")` or `("name", "min")`.
        mapping: how to map over episodes; see `adaptax.engine.mapping.Mapping`.
        fast_path: see `adaptax.conv.fast`.
        watch: called with the number of episodes done.
    """

    def __init__(
        self,
        learner: MetaLearner,
        tasks: TaskDistribution,
        *,
        episodes: int = 600,
        steps: int | None = None,
        at: Sequence[int] | None = None,
        transductive: bool = True,
        noise: float | str = 1.0,
        scores: Scores | None = None,
        select: Select | None = None,
        mapping: Mapping = "auto",
        fast_path: FastPath = "auto",
        watch: Callable[[int], None] | None = None,
    ):
        if isinstance(tasks, Splits):
            raise ValueError("evaluate was given all splits of the tasks; give it tasks.test")
        if episodes < 1:
            raise ValueError(f"episodes is at least 1, not {episodes}")
        if noise != "learned" and (isinstance(noise, str) or not noise > 0):
            raise ValueError(f'noise is a positive standard deviation or "learned", not {noise!r}')
        if steps is not None and steps < 0:
            raise ValueError(f"steps is 0 or more, not {steps}")
        if scores is not None and not callable(scores):
            raise ValueError(f"scores is a function of predictions and targets, not {scores!r}")
        if select is not None:
            scoring.sign_of(select)
        self.learner, self.tasks, self.episodes = learner, tasks, episodes
        self.transductive, self.noise, self.select = transductive, noise, select
        self.mapping, self.watch = mapping, watch
        self._scorer = _Scorer(
            learner, steps, None if at is None else tuple(at), transductive, scores, fast_path
        )
        self._facts: dict[str, Any] = {}
        self._size: int | None = None

    def __call__(
        self, meta: Meta, *, key: PRNGKeyArray, noise: float | Array | None = None
    ) -> Report:
        """Score these meta-parameters on the episodes that `key` names.

        Args:
            meta: the meta-parameters.
            key: names the episodes.
            noise: another standard deviation than the evaluator's, without compiling anew.
        """
        meta = roles.deduplicate(meta)
        assumed: Any = self.noise if noise is None else noise
        # An argument of the program; `None` asks the models for theirs.
        noise = None if assumed == "learned" else jnp.asarray(assumed, float)
        given = meta, self.tasks, noise
        if self._size is None:
            probe = feed.load(self.tasks, key, jnp.zeros(1, jnp.uint32))
            self._size = program.call(self._scorer.size, self.mapping, *given, probe, key)
        # The tail of the last chunk repeats the last episode, so that one program does for all.
        # An interrupt waits for the end of a chunk, so that few heavy episodes make one.
        chunk = min(self.episodes, 20 * self._size)
        jobs = (lambda s=s: self._load(s, chunk, key) for s in range(0, self.episodes, chunk))
        parts = []
        for loaded, keys in feed.prefetch(self.tasks, jobs):
            scores, self._facts = program.call(self._scorer.chunk, self._size, *given, loaded, keys)
            parts.append(jax.tree.map(np.asarray, scores))
            if self.watch is not None:
                self.watch(min(len(parts) * chunk, self.episodes))
        values: dict[str, Any] = jax.tree.map(
            lambda *each: np.concatenate(each)[: self.episodes], *parts
        )
        values = scoring.settled(values)
        bins = values.pop("bins", None)
        bins = None if bins is None else bins.sum(axis=0)
        quantiles = values.pop("quantiles", None)
        quantiles = None if quantiles is None else quantiles.sum(axis=0)
        protocol = self._protocol(assumed if "mse" in values else None)
        self._check_select(values)
        return Report(protocol, self._facts["at"], values, bins, quantiles, self.select)

    def check(self, meta: Meta, *, key: PRNGKeyArray) -> None:
        """Raise what scoring these meta-parameters would raise, from shapes alone.

        Raises:
            ValueError: if `select` is no score of the learner on these tasks, or as `evaluate`.
        """
        loaded = feed.load(self.tasks, key, jnp.zeros(1, jnp.uint32))
        first = jax.tree.map(lambda leaf: leaf[0], loaded)
        noise = None if self.noise == "learned" else jnp.asarray(self.noise, float)
        found = eqx.filter_eval_shape(self._scorer.episode, {}, meta, self.tasks, noise, first, key)
        self._check_select({**found, **found.get("claimed", {})})

    def _check_select(self, found: dict[str, Any]) -> None:
        if self.select is not None and scoring.name_of(self.select) not in found:
            names = sorted(found.keys() - scoring.INTERNAL)
            raise ValueError(f"select is one of {', '.join(names)}, not {self.select!r}")

    def _protocol(self, noise: float | str | None) -> dict[str, Any]:
        particles = self._facts["particles"]
        return {
            **self.learner.describe(),
            "backbone": self._facts["backbone"],
            **self.tasks.describe(),
            "episodes": self.episodes,
            "steps": self._facts["at"][-1],
            "ci": "1.96 standard errors over episodes",
            "transductive": self.transductive,
            "model": "single" if particles == 1 else f"ensemble of {particles}",
            **({} if noise is None else {"nll_noise": noise}),
        }

    def _load(self, start: int, chunk: int, key: PRNGKeyArray) -> tuple[PyTree, Array]:
        index = jnp.minimum(jnp.arange(start, start + chunk), self.episodes - 1).astype(jnp.uint32)
        keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(index)
        return feed.load(self.tasks, key, index), keys


class _Scorer(eqx.Module):
    """What of an evaluator its programs depend on: nothing that refers to the data."""

    learner: MetaLearner
    steps: int | None = eqx.field(static=True)
    at: tuple[int, ...] | None = eqx.field(static=True)
    transductive: bool = eqx.field(static=True)
    scores: Scores | None = eqx.field(static=True)
    fast_path: FastPath = eqx.field(static=True)

    def size(
        self,
        mapping: Mapping,
        meta: Meta,
        tasks: TaskDistribution,
        noise: Array | None,
        probe: PyTree,
        key: PRNGKeyArray,
    ) -> int:
        """How many episodes to map at once."""
        each = lambda loaded: self.episode({}, meta, tasks, noise, loaded, key)  # noqa: E731
        return chunk_size(mapping, 32, each, (probe,))

    def chunk(
        self,
        size: int,
        meta: Meta,
        tasks: TaskDistribution,
        noise: Array | None,
        loaded: PyTree,
        keys: Array,
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Scores of episodes, and what is known of all of them."""
        facts: dict[str, Any] = {}
        each = lambda xs: self.episode(facts, meta, tasks, noise, *xs)  # noqa: E731
        return jax.lax.map(each, (loaded, keys), batch_size=None if size == 1 else size), facts

    def episode(
        self,
        facts: dict[str, Any],
        meta: Meta,
        tasks: TaskDistribution,
        noise: Array | None,
        loaded: PyTree,
        key: PRNGKeyArray,
    ) -> dict[str, Any]:
        """Scores of one episode, leading with the axis of scored steps."""
        adapt_key, support_key, query_key = jax.random.split(key, 3)
        task = feed.task(tasks, loaded)
        meta = roles.fresh(meta, key)
        learner = with_fast_path(self.learner, self.fast_path)
        path = learner.iterates(meta, task.support, key=adapt_key, steps=self.steps)
        arrays, rest = eqx.partition(path, eqx.is_array)
        length = len(jax.tree.leaves(arrays)[0])
        chosen = _chosen(length, self.at)
        # Drawn once, for the model before adaptation, which is right for data at rest.
        before = eqx.combine(jax.tree.map(lambda leaf: leaf[0], arrays), rest)
        support = task.support.draw(before, support_key)
        query = task.query.draw(before, query_key)
        if query.size == 0:
            raise ValueError("the tasks have no queries to score; sample them with query=1 or more")
        if query.y is None:
            raise ValueError(
                "the tasks' queries have no targets, y=None, to score predictions by; give "
                "labelled queries, or call the adapted model on their x"
            )
        facts["at"] = chosen if length > 1 else [None]
        facts["particles"] = getattr(before, "particles", 1)
        facts["backbone"] = _backbone(before)

        # Some families have scores of their own, such as the readings of ambiguous tasks.
        family = getattr(tasks, "scores", None)

        def scores(arrays: PyTree) -> dict[str, Any]:
            model = eqx.combine(arrays, rest)
            predictions = predict(
                model, query.x, support.x,
                transductive=self.transductive, fast_path=self.fast_path,
            )  # fmt: skip
            assumed = learned_noise(model) if noise is None else noise
            found = scoring.scores(self.learner.loss, model, predictions, query, assumed)
            for by, own in (("the tasks' scores", family), ("scores=", self.scores)):
                if own is not None:
                    found |= scoring.checked(own(predictions, query.y), by)
                    found.pop("repeats", None)
            return found

        picked = jax.tree.map(lambda leaf: leaf[jnp.array(chosen)], arrays)
        return jax.lax.map(scores, picked)


def predict(
    model: Model,
    x: PyTree,
    support_x: PyTree,
    *,
    transductive: bool,
    fast_path: FastPath = "auto",
) -> PyTree:
    """Predictions for queries, together or one by one.

    Args:
        model: an adapted model or an `Ensemble`.
        x: queries, leading with the example axis.
        support_x: the inputs it was adapted to.
        transductive: all queries in one batch; else each with the support set alone, so that
            nothing computed over the batch lets it see another query.
        fast_path: see `adaptax.conv.fast`.
    """
    return program.call(_predict, model, x, support_x, transductive, fast_path)


def _predict(
    model: Model, x: PyTree, support_x: PyTree, transductive: bool, fast_path: FastPath
) -> Float[Array, ...]:
    call = fast(roles.apply, fast_path)
    if transductive:
        return call(model, x)
    axis = 1 if isinstance(model, Ensemble) else 0

    def alone(one: PyTree) -> PyTree:
        batch = jax.tree.map(lambda s, q: jnp.concatenate([s, q[None]]), support_x, one)
        return jax.tree.map(lambda out: jnp.take(out, -1, axis=axis), call(model, batch))

    # Sixteen at a time bounds memory and keeps the matrix products large.
    each = jax.lax.map(alone, x, batch_size=16)
    return jax.tree.map(lambda out: jnp.moveaxis(out, 0, axis), each)


def _backbone(model: Model) -> str:
    """The kind of network and its size."""
    kind = type(model.models if hasattr(model, "particles") else model).__name__
    size = model.size if hasattr(model, "particles") else tree.count(model)
    return f"{kind}, {size:,} parameters"


def _chosen(length: int, at: Sequence[int] | None) -> list[int]:
    # All steps up to ten, else eleven evenly spaced.
    spaced = np.linspace(0, length - 1, min(length, 11)).round()
    chosen = [int(step) for step in (spaced if at is None else at)]
    if not chosen or min(chosen) < 0 or max(chosen) >= length:
        raise ValueError(f"at={chosen} should be steps between 0 and the last, {length - 1}")
    return chosen


def learned_noise(model: Model) -> Float[Array, "*particles"]:
    """The standard deviations that a model, or each of an ensemble, learned."""

    def noise(model: Model) -> Array:
        if not hasattr(model, "noise"):
            raise ValueError(
                f'noise="learned" asks the model for its `noise`, and {type(model).__name__} has '
                "none; wrap it in adaptax.Gaussian, or give a number"
            )
        return model.noise

    return model.map(noise) if isinstance(model, Ensemble) else noise(model)

"""Active learning inside a task: which example of a pool to have labelled next.

What Bayesian MAML (Yoon et al. 2018, arXiv:1806.03836) does with its predictive entropy. Its code
for this and the details of its protocol are not released; those below are ours. P denotes the
examples of a pool.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from .. import io, metrics, roles
from ..engine import feed
from ..engine.mapping import Mapping, chunk_size, with_fast_path
from ..engine.predict import predictions
from ..learner import Adapter, Meta
from ..task import Batch, Splits, Task, TaskDistribution

STRATEGIES = ("random", "entropy", "disagreement")
"""How the next example may be chosen: at random, where the prediction is least sure, or where the
particles disagree most."""


@dataclasses.dataclass(frozen=True)
class ActiveCurves:
    """Scores by number of labels, of several strategies on the same episodes.

    Args:
        protocol: what the numbers depend on.
        labels: how many labels the learner had seen at each of the scores.
        values: by strategy and metric, an array `(episodes, len(labels))`.
        asked: by strategy, the examples in the order in which they were labelled, those of the
            start included: rows of the task's support, `(episodes, labels[-1])`.
    """

    protocol: dict[str, Any]
    labels: list[int]
    values: dict[str, dict[str, np.ndarray]]
    asked: dict[str, np.ndarray]

    @property
    def primary(self) -> str:
        """`"accuracy"` for classification, `"mse"` for regression."""
        return "accuracy" if "accuracy" in next(iter(self.values.values())) else "mse"

    def mean(self, strategy: str, metric: str | None = None) -> Float[np.ndarray, " sizes"]:
        """Mean over episodes at every number of labels, of the primary metric if not told."""
        return metrics.interval(self._of(strategy, metric))[0]

    def ci95(self, strategy: str, metric: str | None = None) -> Float[np.ndarray, " sizes"]:
        """Half the 95 % confidence interval of that mean: 1.96 standard errors over episodes."""
        return metrics.ci95(self._of(strategy, metric))

    def difference(
        self, metric: str | None = None, *, of: str = "entropy", to: str = "random"
    ) -> tuple[Float[np.ndarray, " sizes"], Float[np.ndarray, " sizes"]]:
        """Mean over episodes of one strategy's score less the other's, and half its 95 % CI.

        Episodes are paired: they have the pool, the start, the queries and the randomness of
        adaptation in common. So the interval is narrower than those of the two curves tell.

        Args:
            metric: the primary one if `None`.
            of: strategy.
            to: the strategy to compare it with.
        """
        return metrics.interval(self._of(of, metric) - self._of(to, metric))

    @property
    def informed(self) -> list[str]:
        """The strategies whose difference from `random` can be told."""
        return [s for s in self.values if s != "random" and "random" in self.values]

    def to_json(self) -> dict[str, Any]:
        """Means and intervals by number of labels, and the protocol; `None` for what is not finite.

        Beside `random` also the paired differences from it: `difference` of `entropy`, and
        `difference_disagreement`.
        """
        curve = []
        for i, count in enumerate(self.labels):
            row: dict[str, Any] = {"labels": count}
            for strategy, scores in self.values.items():
                row[strategy] = {}
                for name in scores:
                    row[strategy][name] = float(self.mean(strategy, name)[i])
                    row[strategy][f"{name}_ci95"] = float(self.ci95(strategy, name)[i])
            for strategy in self.informed:
                mean, half = self.difference(of=strategy)
                name = "difference" if strategy == "entropy" else f"difference_{strategy}"
                row[name] = {
                    self.primary: float(mean[i]),
                    f"{self.primary}_ci95": float(half[i]),
                }
            curve.append(row)
        return io.strict({"protocol": self.protocol, "curve": curve})

    def _of(self, strategy: str, metric: str | None) -> np.ndarray:
        if strategy not in self.values:
            raise ValueError(
                f"these curves are of {' and '.join(self.values)}, not of {strategy!r}; name it "
                "in strategies="
            )
        scores = self.values[strategy]
        metric = self.primary if metric is None else metric
        if metric not in scores:
            raise ValueError(f"metric is one of {', '.join(scores)}, not {metric!r}")
        return scores[metric]


def active_learning(
    learner: Adapter,
    meta: Meta,
    tasks: TaskDistribution,
    *,
    start: int,
    queries: int,
    at_once: int = 1,
    strategies: Sequence[str] = ("random", "entropy"),
    episodes: int = 600,
    key: PRNGKeyArray,
    noise: float = 1.0,
    mapping: Mapping = "auto",
    watch: Callable[[int], None] | None = None,
) -> ActiveCurves:
    """Let a learner choose which examples of a pool it is told the labels of.

    The support of every task is the pool: sample tasks with many shots. The learner adapts to
    `start` labelled examples; then, until `queries` more are, one more is labelled (or `at_once`)
    and it adapts anew, from the meta-parameters, to all that are. It is scored on the task's
    queries each time.

    * `"random"` labels the next of the pool in a random order.
    * `"entropy"` labels the example whose prediction is least sure, with an ensemble's mixture as
      the prediction: of classes, the one of largest entropy; of real targets, that of largest
      variance, summed over outputs. A Gaussian's entropy grows with its variance, so that either
      puts the pool in one order; that of a mixture of Gaussians has no closed form. Of equals it
      takes the next in the random order.
    * `"disagreement"` labels the example of which labels the particles have the most different
      opinions: largest mutual information of class and particle, which is the entropy less what
      every particle finds ambiguous. Of real targets it is `"entropy"`.

    A single regressor is equally unsure everywhere, so `"entropy"` chooses at random as well, as
    `"disagreement"` does of any single model. All
    strategies have the same episodes, start and randomness; episode i depends on the key, the
    split and i alone, so curves of several learners are paired too. All that is predicted at
    once, queries or pool, is one batch. There is one program for each number of labels.

    Args:
        learner: any `Adapter`, whose `adapt` gives a model or an `Ensemble`.
        meta: its meta-parameters, `result.meta`.
        tasks: usually `tasks.test`; the support is a `Batch`, the pool.
        start: labelled examples to start from: in all for regression, of each class for
            classification.
        queries: examples to label after those.
        at_once: how many of them to label at once, the next best beside the best; 1 for one by one.
        strategies: any of `STRATEGIES`.
        episodes: how many.
        key: names the episodes, and all randomness.
        noise: standard deviation of real targets that their `nll` assumes; no choice depends on it.
        mapping: how to map over episodes; see `adaptax.engine.mapping.Mapping`.
        watch: called with the number of episodes done.

    Raises:
        ValueError: if the pool is too small, or has too few of a class to start from; if the tasks
            have no queries; for counts below 1, an unknown strategy, or predictions that do not
            fit the targets.
        TypeError: if the support is not a `Batch`.

    Example:
        `active_learning(learner, result.meta, tasks.test, start=1, queries=15, key=key)`, of
        `tasks = adaptax.tasks.omniglot(way=5, shot=15, train_shot=1)`
    """
    _check(tasks, start, queries, at_once, strategies, episodes, noise)
    learner, meta = with_fast_path(learner, "auto"), roles.deduplicate(meta)
    probe = feed.load(tasks, key, jnp.zeros(1, jnp.uint32))
    first = jax.tree.map(lambda leaf: leaf[0], probe)
    facts = _facts(learner, meta, eqx.filter_eval_shape(feed.task, tasks, first), key)
    held = start * (facts.way or 1)
    if held + queries > facts.pool:
        raise ValueError(
            f"the pool has {facts.pool} examples, the support of a task, and start and queries "
            f"ask for {held} + {queries} of them; sample tasks with more shots, or ask for fewer"
        )
    game = _Game(learner, meta, tasks, start, at_once, facts.way, noise)
    informed = jnp.array([STRATEGIES.index(strategy) for strategy in strategies])

    def whole(loaded: PyTree, key: PRNGKeyArray) -> Any:
        orders = jnp.zeros((len(informed), facts.pool), int)
        return game.play(held + queries - at_once, True, informed, loaded, key, orders)

    size = min(chunk_size(mapping, 32, whole, (probe, key[None])), episodes)
    # Whole multiples: what is left over would be compiled once more.
    chunk = size * min(math.ceil(episodes / size), 100 if size == 1 else 20)
    labels = list(range(held, held + queries + 1, at_once))

    # Programs of this call alone: there may be more numbers of labels than programs are kept.
    arrays, rest = eqx.partition(game, eqx.is_array)

    @jax.jit
    def shuffle(arrays: PyTree, loaded: PyTree, keys: Array) -> tuple[Array, Array]:
        return jax.vmap(eqx.combine(arrays, rest).shuffle)(loaded, keys)

    @partial(jax.jit, static_argnums=0)
    def play(count: int, arrays: PyTree, loaded: PyTree, keys: Array, orders: Array) -> Any:
        game = eqx.combine(arrays, rest)
        one = lambda xs: game.play(count, count < labels[-1], informed, *xs)  # noqa: E731
        return jax.lax.map(one, (loaded, keys, orders), batch_size=None if size == 1 else size)

    def load(begin: int) -> tuple[PyTree, Array]:
        # The tail of the last chunk repeats the last episode, so that one program does for all.
        index = jnp.minimum(jnp.arange(begin, begin + chunk), episodes - 1).astype(jnp.uint32)
        keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(index)
        return feed.load(tasks, key, index), keys

    parts = []
    jobs = (lambda begin=begin: load(begin) for begin in range(0, episodes, chunk))
    for loaded, keys in feed.prefetch(tasks, jobs):
        order, fewest = shuffle(arrays, loaded, keys)
        if int(fewest.min()) < start:
            raise ValueError(
                f"a pool has {int(fewest.min())} examples of one of the {facts.way} classes that "
                f"the model tells apart, and start={start} asks for as many of each; sample tasks "
                "with more shots, or start with fewer"
            )
        orders = jnp.repeat(order[:, None], len(informed), axis=1)
        rounds = []
        for count in labels:
            scores, orders = play(count, arrays, loaded, keys, orders)
            rounds.append(jax.tree.map(np.asarray, scores))
        by_round = jax.tree.map(lambda *each: np.stack(each, axis=-1), *rounds)
        parts.append((by_round, np.asarray(orders)[..., : labels[-1]]))
        if watch is not None:
            watch(min(len(parts) * chunk, episodes))
    values, asked = jax.tree.map(lambda *each: np.concatenate(each)[:episodes], *parts)
    protocol = {
        **learner.describe(),
        **tasks.describe(),
        "episodes": episodes,
        "pool": facts.pool,
        "start": held,
        "queries": queries,
        "at_once": at_once,
        "ci": "1.96 standard errors over episodes",
        "model": "single" if facts.particles == 1 else f"ensemble of {facts.particles}",
        **({"nll_noise": noise} if facts.way is None else {}),
    }
    return ActiveCurves(
        protocol,
        labels,
        {s: {name: v[:, i] for name, v in values.items()} for i, s in enumerate(strategies)},
        {strategy: asked[:, i] for i, strategy in enumerate(strategies)},
    )


def acquisition_score(
    predictions: Float[Array, "*particles n out"], targets: Array, by: str = "entropy"
) -> Float[Array, " n"]:
    """How unsure each prediction is, up to what makes no difference to their order.

    For classification the entropy of the mixture in nats, or the mutual information of class and
    particle; for regression the variance of the particles' predictions, summed over outputs. The
    noise adds the same to every variance.

    Args:
        predictions: logits `(n, way)`, or reals of the shape of the targets; of one model or of
            particles.
        targets: of any number of examples; only their type and rank are looked at.
        by: `"entropy"` or `"disagreement"`.
    """
    if jnp.issubdtype(targets.dtype, jnp.integer):
        part = "entropy" if by == "entropy" else "epistemic"

        def of(one: Float[Array, "*particles way"]) -> Float[Array, ""]:
            # A single model has no epistemic part.
            return metrics.uncertainty(one[..., None, :]).get(part, jnp.zeros(()))

        return jax.vmap(of, in_axes=-2)(predictions)
    if predictions.ndim == targets.ndim:
        return jnp.zeros(len(predictions))
    variance = jnp.var(predictions, axis=0)
    return jnp.sum(variance.reshape(len(variance), -1), axis=-1)


class _Game(eqx.Module):
    """One episode, written for one task; `way` is `None` for regression."""

    learner: Adapter
    meta: Meta
    tasks: TaskDistribution
    start: int = eqx.field(static=True)
    at_once: int = eqx.field(static=True)
    way: int | None = eqx.field(static=True)
    noise: float = eqx.field(static=True)

    def shuffle(self, loaded: PyTree, key: PRNGKeyArray) -> tuple[Int[Array, " pool"], Array]:
        """A random order of the pool that leads with the start; the fewest of a class in it."""
        pool = feed.task(self.tasks, loaded).support
        order = jax.random.permutation(jax.random.split(key, 3)[1], pool.size)
        if self.way is None:
            return order, jnp.asarray(pool.size)
        of_class = pool.y[order][:, None] == jnp.arange(self.way)
        place = jnp.cumsum(of_class, axis=0)  # 1 for the first of its class
        first = jnp.any(of_class & (place <= self.start), axis=1)
        return order[jnp.argsort(~first, stable=True)], jnp.min(place[-1])

    def play(
        self,
        count: int,
        ask: bool,
        informed: Int[Array, " s"],
        loaded: PyTree,
        key: PRNGKeyArray,
        orders: Int[Array, "s pool"],
    ) -> tuple[dict[str, Float[Array, " s"]], Int[Array, "s pool"]]:
        """Scores with the first `count` labels, and the orders, the next ones brought forward.

        An order is a permutation of the pool at all times: nothing can be asked for twice.
        """
        adapt_key, _, query_key = jax.random.split(key, 3)  # as `evaluate` has them
        task, meta = feed.task(self.tasks, loaded), roles.fresh(self.meta, key)
        pool = task.support

        def one(order: Int[Array, " pool"], informed: Int[Array, ""]) -> Any:
            labelled = jax.tree.map(lambda a: a[order[:count]], pool)
            model = self.learner.adapt(meta, labelled, key=adapt_key)
            query = task.query.draw(model, query_key)
            answer = lambda x: predictions(model, x, labelled.x, transductive=True)  # noqa: E731
            scores = self._scores(answer(query.x), query.y)
            if not ask:
                return scores, order
            left = order[count:]
            answers = answer(jax.tree.map(lambda a: a[left], pool.x))
            unsure = [acquisition_score(answers, pool.y, by) for by in STRATEGIES[1:]]
            # The order is random already: of equals, and at random, it is the turn of the first.
            worth = jnp.stack([jnp.zeros_like(unsure[0]), *unsure])[informed]
            _, chosen = jax.lax.top_k(worth, self.at_once)
            # The chosen lead, best first; the others stay in their order.
            place = jnp.arange(len(left)).at[chosen].set(jnp.arange(self.at_once) - self.at_once)
            return scores, order.at[count:].set(left[jnp.argsort(place)])

        return jax.lax.map(lambda each: one(*each), (orders, informed))

    def _scores(self, predictions: Array, targets: Array) -> dict[str, Array]:
        if self.way is None:
            return metrics.regression(predictions, targets, self.noise)
        scores = metrics.classification(predictions, targets) | metrics.uncertainty(predictions)
        return {name: value for name, value in scores.items() if name != "bins"}


@dataclasses.dataclass(frozen=True)
class _Facts:
    pool: int
    way: int | None
    particles: int


def _facts(learner: Adapter, meta: Meta, task: Task, key: PRNGKeyArray) -> _Facts:
    """Sizes, from shapes alone."""
    if not isinstance(task.support, Batch):
        raise TypeError(
            f"the pool is the support of a task as a Batch, not {type(task.support).__name__}; "
            "active learning needs examples that can be chosen one by one"
        )

    if task.support.weight is not None:
        raise ValueError(
            "active learning asks for examples of tasks of one size, and these are padded; give "
            "shot= as one number, and every target"
        )

    def look(meta: Meta, task: Task) -> tuple[Batch, Array]:
        model = learner.adapt(meta, task.support, key=key)
        query = task.query.draw(model, key)
        return query, model(query.x)

    query, out = eqx.filter_eval_shape(look, meta, task)
    if query.size == 0:
        raise ValueError("the tasks have no queries to score; sample them with query=1 or more")
    y = query.y
    if jnp.issubdtype(y.dtype, jnp.integer):
        if out.ndim not in (2, 3) or out.shape[-2] != len(y):
            raise ValueError(
                f"for {len(y)} labels the model should predict logits of shape ({len(y)}, way), "
                f"and predicted {out.shape}"
            )
        return _Facts(task.support.size, out.shape[-1], out.shape[0] if out.ndim == 3 else 1)
    if out.shape[-y.ndim :] != y.shape or out.ndim > y.ndim + 1:
        raise ValueError(f"the model predicts {out.shape} for targets of shape {y.shape}")
    return _Facts(task.support.size, None, out.shape[0] if out.ndim > y.ndim else 1)


def _check(
    tasks: TaskDistribution,
    start: int,
    queries: int,
    at_once: int,
    strategies: Sequence[str],
    episodes: int,
    noise: float,
) -> None:
    if isinstance(tasks, Splits):
        raise ValueError("active_learning was given all splits of the tasks; give it tasks.test")
    if start < 1:
        raise ValueError(
            f"start is 1 or more labelled examples, not {start}: nothing can be adapted to none"
        )
    for name, value in (("queries", queries), ("episodes", episodes)):
        if value < 1:
            raise ValueError(f"{name} is 1 or more, not {value}")
    if at_once < 1 or queries % at_once:
        raise ValueError(
            f"at_once is 1 or more and divides queries={queries}, not {at_once}, so that all "
            "rounds are alike"
        )
    if not strategies or not set(strategies) <= set(STRATEGIES):
        raise ValueError(f"strategies is a sequence of {', '.join(STRATEGIES)}, not {strategies!r}")
    if not noise > 0:
        raise ValueError(f"noise is a positive standard deviation, not {noise}")

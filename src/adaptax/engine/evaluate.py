"""Evaluation: the same episodes for every learner, and the protocol printed with the number."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray, PyTree

from .. import processes, program, roles
from ..conv import FastPath
from ..learner import Adapter, Meta
from ..protocols import Acting, Rated
from ..task import Splits, TaskDistribution, way_of
from . import feed, scoring
from .episode import Scorer
from .mapping import Mapping, chunk_size, everywhere, task_mesh
from .report import Report
from .scoring import Scores, Select
from .work import NONE, Work, episodes_at_once, heavy

PREDICTING = {"at": None, "transductive": True, "noise": 1.0, "scores": None, "select": None}
"""Arguments of `Evaluator` that say how predictions are scored, and their defaults."""

ACTING = {"trajectories": None}
"""Arguments of `Evaluator` for tasks in which models act."""


def evaluate(
    learner: Adapter,
    meta: Meta,
    tasks: TaskDistribution,
    *,
    key: PRNGKeyArray,
    **how: Any,
) -> Report:
    """Adapt to each of 600 tasks and score the predictions on its queries.

    Which metrics that are follows from the loss; see `adaptax.engine.scoring`. Policies are judged
    by the returns of 40 tasks, after every gradient step.

    Episode i depends on the key, the split and i alone: every learner sees the same ones.

    Args:
        learner: any `Adapter`.
        meta: its meta-parameters, `result.meta`.
        tasks: usually `tasks.test`.
        key: names the episodes.
        how: the arguments of `Evaluator`.

    Raises:
        ValueError: if there are no episodes or no queries, the model's output does not fit the
            targets, the learner has no rate to replace, an argument is of the other kind of tasks,
            or an environment pays what is not a number.
    """
    return Evaluator(learner, tasks, **how)(meta, key=key)


class Evaluator:
    """`evaluate` for one learner and one split, compiled once and called as often as need be.

    Args:
        learner: any `Adapter`; it adapts by `iterates`.
        tasks: the split.
        episodes: how many; 600 as in MAML's paper if `None`, of roll-outs 40.
        steps: adaptation steps; as many as the learner takes in `adapt` if `None`, of roll-outs 3.
        lr: step sizes of the first steps, of which the last is that of all further ones; the
            learner's own if `None`. MAML's paper takes `(0.1, 0.05)` in 2-D navigation.
        at: the steps to score; by default all up to 10, or eleven evenly spaced; of roll-outs all.
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
        trajectories: roll-outs for each gradient step, and for each return; 40 as in MAML's 2-D
            navigation if `None`.
        mapping: how to map over episodes; see `adaptax.engine.mapping.Mapping`. Of roll-outs
            `"auto"` is 10, on each of the local devices, which share the episodes.
        fast_path: see `adaptax.conv.fast`.
        watch: called with the number of episodes done.
        goals: another name of `episodes`, for roll-outs.
        batch: another name of `mapping`, for roll-outs.

    Raises:
        ValueError: for numbers that make no sense, arguments for predictions where models act and
            the other way round, or rates that the learner does not have.
    """

    def __init__(
        self,
        learner: Adapter,
        tasks: TaskDistribution,
        *,
        episodes: int | None = None,
        steps: int | None = None,
        lr: Sequence[float] | None = None,
        at: Sequence[int] | None = None,
        transductive: bool = True,
        noise: float | str = 1.0,
        scores: Scores | None = None,
        select: Select | None = None,
        trajectories: int | None = None,
        mapping: Mapping = "auto",
        fast_path: FastPath = "auto",
        watch: Callable[[int], None] | None = None,
        goals: int | None = None,
        batch: int | None = None,
    ):
        if isinstance(tasks, Splits):
            raise ValueError("evaluate was given all splits of the tasks; give it tasks.test")
        if (episodes is not None and goals is not None) or (batch and mapping != "auto"):
            raise ValueError("goals= is another name of episodes=, batch= of mapping=; give one")
        acting = isinstance(tasks, Acting)
        given = {"at": at, "transductive": transductive, "noise": noise, "scores": scores,
                 "select": select, "trajectories": trajectories}  # fmt: skip
        for name, usual in (PREDICTING if acting else ACTING).items():
            if given[name] != usual:
                kind = "predict, and these act" if acting else "act, and these predict"
                raise ValueError(f"{name}={given[name]!r} is for models that {kind}; leave it out")
        if episodes is None:
            episodes = goals if goals is not None else 40 if acting else 600
        mapping = mapping if batch is None else batch
        _check(episodes, steps, noise, scores, select, trajectories, batch)
        if isinstance(tasks, Acting):
            steps, mapping = 3 if steps is None else steps, 10 if mapping == "auto" else mapping
            tasks = _changed(tasks, trajectories=trajectories or 40)
        learner = learner.with_way(way_of(tasks))
        self.learner, self.tasks, self.episodes, self.acting = learner, tasks, episodes, acting
        self.transductive, self.noise, self.select, self.lr = transductive, noise, select, lr
        self.mapping, self.watch = mapping, watch
        self._scorer = Scorer(
            learner if lr is None else _with_rates(learner, lr),
            steps, None if at is None else tuple(at), transductive, scores, fast_path,
        )  # fmt: skip

    @processes.ends_with_the_others
    def __call__(
        self, meta: Meta, *, key: PRNGKeyArray, noise: float | Array | None = None
    ) -> Report:
        """Score these meta-parameters on the episodes that `key` names.

        Args:
            meta: the meta-parameters.
            key: names the episodes.
            noise: another standard deviation than the evaluator's, without compiling anew.
        """
        assumed: Any = self.noise if noise is None else noise
        size, facts, given = self._look(roles.deduplicate(meta), key, assumed)
        # The tail of the last chunk repeats the last episode, so that one program does for all.
        # An interrupt waits for the end of a chunk, so that few heavy episodes make one.
        episode = facts.get("work", NONE)
        chunk = episodes_at_once(episode, size, self.episodes)
        shares, count = self.acting or heavy(episode) or processes.several(), jax.process_count()
        if not self.acting and heavy(episode):
            devices = count * jax.local_device_count()
            chunk += -chunk % devices if chunk > devices else 0
        chunk += -chunk % count
        mesh = task_mesh(chunk) if shares else None
        scorer, given = everywhere((self._scorer, given), mesh)
        jobs = (lambda s=s: self.load(s, chunk, key) for s in range(0, self.episodes, chunk))
        parts = []
        for loaded in feed.prefetch(self.tasks, jobs):
            if mesh is not None and processes.several():
                loaded = processes.sharded(loaded, mesh)
            loaded = everywhere(loaded, mesh)
            scores = program.call(scorer.chunk, size, mesh, *given, *loaded)
            parts.append(processes.gathered(scores))
            if self.watch is not None:
                self.watch(min(len(parts) * chunk, self.episodes))
        values: dict[str, Any] = jax.tree.map(
            lambda *each: np.concatenate(each)[: self.episodes], *parts
        )
        settled = self.tasks.settled if isinstance(self.tasks, Acting) else scoring.settled
        values = settled(values)
        tables = {
            name: values.pop(name).sum(axis=0) for name in ("bins", "quantiles") if name in values
        }
        protocol = self._protocol(facts, facts.get("noise", assumed) if "mse" in values else None)
        self._check_select(values)
        at = facts.get("at") or list(range(next(iter(values.values())).shape[1]))
        return Report(protocol, at, values, **tables, select=self.select)

    def work(self, meta: Meta, *, key: PRNGKeyArray) -> Work:
        """Count the work of an episode; of roll-outs it is not known."""
        return self._look(roles.deduplicate(meta), key, self.noise)[1].get("work", NONE)

    def check(self, meta: Meta, *, key: PRNGKeyArray) -> None:
        """Raise what scoring these meta-parameters would raise, from shapes alone.

        Raises:
            ValueError: if `select` is no score of the learner on these tasks, or as `evaluate`.
        """
        _, facts, _ = self._look(meta, key, self.noise)
        self._check_select(facts["scores"])

    def _look(self, meta: Meta, key: PRNGKeyArray, noise: Any) -> tuple[int, dict[str, Any], Any]:
        """How many episodes to map at once, what is known of all, and what the programs get."""
        # An argument of the program; `None` asks the models for theirs.
        given = meta, self.tasks, None if noise == "learned" else jnp.asarray(noise, float)
        if self.acting:
            return chunk_size(self.mapping, self.episodes, self._scorer.chunk, ()), {}, given
        probe = feed.load(self.tasks, key, jnp.zeros(1, jnp.uint32))
        size, facts = program.call(self._scorer.look, self.mapping, *given, probe, key)
        return size, facts, given

    def _check_select(self, found: Iterable[str]) -> None:
        if self.select is not None and scoring.name_of(self.select) not in (found := set(found)):
            names = sorted(found - scoring.INTERNAL)
            raise ValueError(f"select is one of {', '.join(names)}, not {self.select!r}")

    def _protocol(self, facts: dict[str, Any], noise: float | str | None) -> dict[str, Any]:
        rates = {} if self.lr is None else {"inner_lr": list(self.lr)}
        about, tasks = self.learner.describe(), self.tasks.describe()
        if self.acting:
            return {
                **about,
                **tasks,
                "goals": self.episodes,
                "steps": self._scorer.steps,
                "ci": "1.96 standard errors over tasks",
                **rates,
            }
        particles = facts["particles"]
        return {
            **about,
            "backbone": facts["backbone"],
            **tasks,
            "episodes": self.episodes,
            "steps": facts["at"][-1],
            "ci": "1.96 standard errors over episodes",
            "transductive": self.transductive,
            "model": "single" if particles == 1 else f"ensemble of {particles}",
            **({} if noise is None else {"nll_noise": noise}),
            **rates,
        }

    def load(
        self, start: int, chunk: int, key: PRNGKeyArray, mine: slice | None = None
    ) -> tuple[PyTree, Array]:
        """Return what a program needs of some episodes, and their keys; the last one repeats.

        Args:
            start: the first episode.
            chunk: how many.
            key: names the episodes.
            mine: which of them; those of this process if `None`.
        """
        them = np.minimum(np.arange(start, start + chunk), self.episodes - 1)
        index = jnp.asarray(them[processes.own(chunk) if mine is None else mine], jnp.uint32)
        return feed.load(self.tasks, key, index), program.call(_keys, key, index)


def _keys(key: PRNGKeyArray, index: Array) -> Array:
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(index)


def _check(
    episodes: int,
    steps: int | None,
    noise: float | str,
    scores: Scores | None,
    select: Select | None,
    trajectories: int | None,
    batch: int | None,
) -> None:
    counts = {"episodes": episodes, "trajectories": trajectories, "batch": batch}
    for name, count in counts.items():
        if count is not None and count < 1:
            raise ValueError(f"{name} is at least 1, not {count}")
    if noise != "learned" and (isinstance(noise, str) or not noise > 0):
        raise ValueError(f'noise is a positive standard deviation or "learned", not {noise!r}')
    if steps is not None and steps < 0:
        raise ValueError(f"steps is 0 or more, not {steps}")
    if scores is not None and not callable(scores):
        raise ValueError(f"scores is a function of predictions and targets, not {scores!r}")
    if select is not None:
        scoring.sign_of(select)


def _with_rates(learner: Adapter, lr: Sequence[float]) -> Adapter:
    """The learner with other rates in its inner loop."""
    if len(lr) == 0 or not all(rate > 0 for rate in lr):
        raise ValueError(f"lr is one or more positive step sizes, not {lr!r}")
    # Meta-SGD's rates are meta-parameters, and an optimizer of one's own has its own.
    if not isinstance(learner, Rated) or learner.inner_optimizer is not None:
        raise ValueError(
            f"{type(learner).__name__} has no step size to replace by lr={lr!r}; leave lr out"
        )
    rates = tuple(lr)
    schedule = lambda step: jnp.array(rates)[jnp.minimum(step, len(rates) - 1)]  # noqa: E731
    return _changed(learner, inner_lr=schedule)


def _changed(record: Any, **fields: Any) -> Any:
    return dataclasses.replace(record, **fields)

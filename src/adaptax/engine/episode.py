"""Scores of an episode: adaptation to its support, and what its queries are predicted to be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, PRNGKeyArray, PyTree

from .. import roles, tree
from ..conv import FastPath
from ..learner import Adapter, Meta
from ..protocols import Acting, Scoring, Several
from ..task import Model, TaskDistribution
from . import feed, scoring
from .mapping import Mapping, chunk_size, first, map_shared, suited, with_fast_path
from .predict import deviations, is_predictive, learned_noise, predictions
from .scoring import Scores
from .work import work


class Scorer(eqx.Module):
    """What of an evaluator its programs depend on: nothing that refers to the data."""

    learner: Adapter
    steps: int | None = eqx.field(static=True)
    at: tuple[int, ...] | None = eqx.field(static=True)
    transductive: bool = eqx.field(static=True)
    scores: Scores | None = eqx.field(static=True)
    fast_path: FastPath = eqx.field(static=True)

    def look(
        self,
        mapping: Mapping,
        meta: Meta,
        tasks: TaskDistribution,
        noise: Array | None,
        probe: PyTree,
        key: PRNGKeyArray,
    ) -> tuple[int, dict[str, Any]]:
        """How many episodes to map at once, and what is known of all of them."""
        facts: dict[str, Any] = {}
        each = lambda loaded: self.episode(facts, meta, tasks, noise, loaded, key)  # noqa: E731
        found = jax.eval_shape(each, jax.tree.map(lambda leaf: leaf[0], probe))
        facts["scores"] = sorted({**found, **found.get("claimed", {})})
        facts["work"] = work(each, *first((probe,)))
        mapping = suited(facts["work"]) if mapping == "auto" else mapping
        return chunk_size(mapping, 32, each, (probe,)), facts

    def chunk(
        self,
        size: int,
        mesh: Mesh | None,
        meta: Meta,
        tasks: TaskDistribution,
        noise: Array | None,
        loaded: PyTree,
        keys: Array,
    ) -> dict[str, Any]:
        """Scores of episodes."""

        def each(common: PyTree, xs: PyTree) -> dict[str, Any]:
            scorer, *given = common
            return scorer.episode({}, *given, *xs)

        return map_shared(each, (self, meta, tasks, noise), (loaded, keys), size, mesh)

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
        if isinstance(tasks, Acting):
            return tasks.judged(self.learner, meta, loaded, self.steps or 0)
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
        facts["particles"] = before.particles if isinstance(before, Several) else 1
        facts["backbone"] = _backbone(before)
        family = tasks.scores if isinstance(tasks, Scoring) else None
        if is_predictive(before):
            facts["noise"] = "predicted"

        def scores(arrays: PyTree) -> dict[str, Any]:
            model = eqx.combine(arrays, rest)
            how: dict[str, Any] = {
                "transductive": self.transductive,
                "fast_path": self.fast_path,
                "weights": (query.weight, support.weight),
            }
            predicted = predictions(model, query.x, support.x, **how)
            if is_predictive(model):
                assumed = deviations(model, query.x, support.x, **how)
            else:
                assumed = learned_noise(model) if noise is None else noise
            found = scoring.scores(self.learner.loss, model, predicted, query, assumed)
            for by, own in (("the tasks' scores", family), ("scores=", self.scores)):
                if own is not None:
                    found |= scoring.own(own, predicted, query, by)
                    found.pop("repeats", None)
            return found

        picked = jax.tree.map(lambda leaf: leaf[jnp.array(chosen)], arrays)
        return jax.lax.map(scores, picked)


def _backbone(model: Model) -> str:
    """The kind of network and its size."""
    if isinstance(model, Several):
        return f"{type(model.models).__name__}, {model.size:,} parameters"
    return f"{type(model).__name__}, {tree.count(model):,} parameters"


def _chosen(length: int, at: Sequence[int] | None) -> list[int]:
    # All steps up to ten, else eleven evenly spaced.
    spaced = np.linspace(0, length - 1, min(length, 11)).round()
    chosen = [int(step) for step in (spaced if at is None else at)]
    if not chosen or min(chosen) < 0 or max(chosen) >= length:
        raise ValueError(f"at={chosen} should be steps between 0 and the last, {length - 1}")
    return chosen

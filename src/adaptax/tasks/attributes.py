"""Tasks of images that share attributes, some of them ambiguous on purpose.

K denotes the shots, Q the queries a label, R the readings of a task.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import combinations
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Int32, PRNGKeyArray, Shaped

from adaptax.program import call
from adaptax.task import Batch, HostTaskDistribution, Task
from adaptax.tasks.episodes import Design, Details, HostRows, distinct, take
from adaptax.tasks.files import DataError

Conjunction = tuple[str, ...]
"""Names of the attributes that the positives of a task have and the negatives lack."""


class Pools(eqx.Module):
    """Which images may stand for each label of each conjunction, in one flat table.

    The *core* of a label is consistent with all attributes of the conjunction: support comes from
    there. Queries of a reading, which asks for some of the attributes, come from the core or from
    the *extra* images that are consistent with this reading alone.

    Args:
        table: rows of the bank, pool after pool.
        start: first place in the table, `(conjunctions, 2, 1+R)`, by label (0, 1) and pool (the
            core, then the extra images of each reading).
        count: images in the pool, of the same shape.
    """

    table: Int32[Array, " places"]
    start: Int32[Array, "conjunctions 2 pools"]
    count: Int32[Array, "conjunctions 2 pools"]

    def which(self, key: PRNGKeyArray) -> Int32[Array, ""]:
        """Return the conjunction that this key names."""
        return jax.random.randint(jax.random.split(key)[0], (), 0, len(self.start), jnp.int32)

    def plan(self, key: PRNGKeyArray, shot: int, query: int) -> Int32[Array, " images"]:
        """Return rows of the images of a task, `2K + R·2Q`, negatives before positives everywhere.

        The support first, then the queries reading by reading; no query of a reading is in the
        support or occurs twice in the reading.
        """
        which, keys = self.which(key), jax.random.split(jax.random.split(key)[1], 2)
        draw = jax.vmap(partial(_draw, shot=shot, query=query))
        support, queries = draw(keys, self.start[which], self.count[which])
        places = jnp.concatenate([support.ravel(), jnp.swapaxes(queries, 0, 1).ravel()])
        return self.table[places]


def _draw(
    key: PRNGKeyArray,
    start: Int32[Array, " pools"],
    count: Int32[Array, " pools"],
    shot: int,
    query: int,
) -> tuple[Int32[Array, " shot"], Int32[Array, "readings query"]]:
    """Return places in the table of the support and of the queries of one label."""
    for_support, for_queries = jax.random.split(key)
    support = distinct(for_support, shot, count[0])
    taken = jnp.sort(support) - jnp.arange(shot)

    def reading(key: PRNGKeyArray, start_extra: Array, count_extra: Array) -> Array:
        left = distinct(key, query, count[0] + count_extra - shot)
        # The j-th number that is not taken: j and as many as are taken up to there.
        place = left + jnp.searchsorted(taken, left, side="right").astype(jnp.int32)
        return jnp.where(place < count[0], start[0] + place, start_extra + place - count[0])

    keys = jax.random.split(for_queries, len(start) - 1)
    return start[0] + support, jax.vmap(reading)(keys, start[1:], count[1:])


class AttributeTasks(HostTaskDistribution):
    """Does an image have these attributes (label 1), or none of them (label 0)?

    The attributes are not told: the support shows K images that have all attributes of a
    conjunction and K that have none. With R = 1 the queries ask for the same. With R = 3 the
    conjunction has three attributes, and the support fits three readings, the conjunctions of two
    of them; every reading has queries of its own, images with both of its attributes and images
    with neither, whatever the third. `readings(key)` names them, `score_readings` scores them.

    Args:
        bank: the images of the split, `(rows, side, side, channels)` bytes; or `HostRows`, if they
            are too many for the device.
        pools: which of them may stand for which label.
        design: shots, queries and treatment of images.
        split: `"train"`, `"val"` or `"test"`.
        name: of the data set.
        conjunctions: names of the attributes, in order of the pools.
        details: what else a report says of the data, as pairs.
    """

    bank: Shaped[Array, "rows ..."] | HostRows
    pools: Pools
    design: Design = eqx.field(static=True)
    split: str = eqx.field(static=True)
    name: str = eqx.field(static=True)
    conjunctions: tuple[Conjunction, ...] = eqx.field(static=True)
    details: Details = eqx.field(static=True, default=())

    @property
    def on_host(self) -> bool:
        """Return whether the bank is on the host."""
        return isinstance(self.bank, HostRows)

    def plan(self, key: PRNGKeyArray) -> Int32[Array, " images"]:
        """Return which rows make up the task that this key names; pure and traceable."""
        return self.pools.plan(key, self.design.shot, self.design.query)

    def fetch(self, plan: Int32[Array, "*lead images"]) -> Task:
        """Gather planned tasks, `(..., 2K, ...)` for leading axes `...`."""
        task: Task = call(_task, self.design, take(self.bank, plan))
        return task

    def sample(self, key: PRNGKeyArray) -> Task:
        """Return the task of this key: x `(2K, ...)` and `(R·2Q, ...)`, y int32 in {0, 1}.

        Queries lead with those of the first reading.
        """
        plan = self.plan(key)
        return self.fetch(plan) if self.on_host else _task(self.design, take(self.bank, plan))

    def readings(self, key: PRNGKeyArray) -> tuple[Conjunction, ...]:
        """Return the attributes that each reading of the task asks for; not traceable."""
        return _readings(self.conjunctions[int(self.pools.which(key))])

    def scores(
        self, logits: Float[Array, "*particles n way"], labels: Int[Array, " n"]
    ) -> dict[str, Float[Array, ""]]:
        """Return what `evaluate` adds for ambiguous tasks; `readings` is their coverage.

        `readings`, `reading_accuracy` and `joint_nll`, see `score_readings`.
        """
        readings = len(_readings(self.conjunctions[0]))
        if readings == 1:
            return {}
        found = score_readings(logits, labels, readings)
        return {
            "readings": found["coverage"],
            "reading_accuracy": found["accuracy"],
            "joint_nll": found["joint_nll"],
        }

    def describe(self) -> dict[str, Any]:
        """Return name, shots, queries, readings, split, number of conjunctions and details."""
        return {
            "tasks": self.name,
            "split": self.split,
            "way": 2,
            "shot": self.design.shot,
            "query": self.design.query,
            "readings": len(_readings(self.conjunctions[0])),
            "conjunctions": len(self.conjunctions),
            **dict(self.details),
        }


StreamedAttributeTasks = AttributeTasks
"""Tasks of a bank on the host had a class of their own."""


def _task(design: Design, images: Shaped[Array, "*lead images side side channels"]) -> Task:
    inputs, axis, held = design.inputs(images), images.ndim - 4, 2 * design.shot
    readings = (images.shape[axis] - held) // (2 * design.query) if design.query else 0
    one = jnp.arange(2, dtype=jnp.int32)
    labels = jnp.repeat(one, design.shot), jnp.tile(jnp.repeat(one, design.query), readings)
    parts = jnp.split(inputs, [held], axis=axis)
    lead = images.shape[:axis]
    batches = (Batch(x, jnp.broadcast_to(y, (*lead, *y.shape))) for x, y in zip(parts, labels))
    return Task(*batches)


def _readings(conjunction: Sequence[Any]) -> tuple[tuple[Any, ...], ...]:
    """Return the conjunctions of two attributes that images of this one are consistent with."""
    return tuple(combinations(conjunction, 2))


def pools(
    has: Bool[np.ndarray, "images attributes"],
    names: Sequence[str],
    size: int,
    design: Design,
    split: str,
) -> tuple[Pools, tuple[Conjunction, ...]]:
    """Return the pools of all conjunctions of so many attributes that have enough images.

    Args:
        has: whether an image has an attribute.
        names: of the attributes.
        size: attributes a conjunction: 2, or 3 for the ambiguous ones.
        design: how many images a task takes.
        split: for the error.

    Raises:
        DataError: if no conjunction has enough images, naming the one that comes closest.
    """
    every = {of: _parts(has, of) for of in combinations(range(len(names)), size)}
    spare = {of: _spare(parts, design) for of, parts in every.items()}
    kept = [of for of in every if spare[of] >= 0]
    if not kept:
        best = max(every, key=spare.__getitem__)
        none, full = (len(every[best][label][0]) for label in (0, 1))
        raise DataError(
            f"no conjunction of {size} of the {len(names)} {split} attributes has enough images "
            f"for shot + query = {design.shot} + {design.query} of each label; "
            f"{' and '.join(names[i] for i in best)} comes closest, with {full} images that have "
            f"all and {none} that have none; lower them, or choose other attributes or larger "
            "image_splits"
        )
    found = [part for of in kept for side in every[of] for part in side]
    count = np.array([len(part) for part in found], np.int32)
    shape = (len(kept), 2, 1 + len(_readings(kept[0])))
    start = np.cumsum(count, dtype=np.int32) - count
    table = np.concatenate(found)
    made = Pools(
        jnp.asarray(table), jnp.asarray(start.reshape(shape)), jnp.asarray(count.reshape(shape))
    )
    return made, tuple(tuple(names[i] for i in conjunction) for conjunction in kept)


def _parts(
    has: Bool[np.ndarray, "images attributes"], conjunction: tuple[int, ...]
) -> list[list[Int32[np.ndarray, " _"]]]:
    """Return, by label, rows of the core, then the extra rows of each reading."""
    made = []
    for label in (False, True):
        fits = has == label
        core = fits[:, list(conjunction)].all(axis=1)
        asked = [fits[:, list(pair)].all(axis=1) & ~core for pair in _readings(conjunction)]
        made.append([np.flatnonzero(of).astype(np.int32) for of in (core, *asked)])
    return made


def _spare(parts: list[list[Int32[np.ndarray, " _"]]], design: Design) -> int:
    """Return how many images are left where they are fewest; below 0 if too few for a task."""
    core = [len(side[0]) for side in parts]
    asked = [len(side[0]) + len(extra) for side in parts for extra in side[1:]]
    return min(min(core) - design.shot, min(asked) - design.shot - design.query)


def score_readings(
    logits: Float[Array, "*particles n way"], labels: Int[Array, " n"], readings: int = 3
) -> dict[str, Float[Array, ""]]:
    """Return scores of M models on an ambiguous task, in the manner of PLATIPUS (Finn et al. 2018).

    Every model is assigned to the reading whose queries it finds most likely.

    * `coverage`: how many readings have a model, between 1 and R.
    * `accuracy`: of every model on the reading that it is assigned to, averaged over models.
    * `nll`: `−log p(y)` in nats a query, `p` the mean of the models' probabilities, averaged over
      all readings; what `evaluate` reports as `nll`.
    * `joint_nll`: `−(1/n_r) log (1/M) Σ_m Π_i p_m(y_i)`, averaged over readings: one model that
      is right about a whole reading makes the reading likely, at a price of `log(M) / n_r`.

    These are the scores that the paper is said to report of ten models; its own definitions, and
    which of the two likelihoods it means, could not be confirmed. For one model the likelihoods
    are the same, and the coverage is 1.

    Args:
        logits: of the queries, reading by reading, by one model or M.
        labels: of the queries, reading by reading.
        readings: R; each has `n_r = n / R` queries.

    Raises:
        ValueError: if there are no queries, or they are not the same number for every reading.
    """
    if readings < 1 or len(labels) == 0 or len(labels) % readings:
        raise ValueError(
            f"{len(labels)} queries are not {readings} readings of the same length; give the "
            "queries of an ambiguous task, reading by reading"
        )
    by_model = logits if logits.ndim == 3 else logits[None]
    models, shape = len(by_model), (len(by_model), readings, -1)
    log_p = jnp.take_along_axis(jax.nn.log_softmax(by_model), labels[None, :, None], axis=-1)
    log_p = log_p.reshape(shape)
    right = (jnp.argmax(by_model, axis=-1) == labels).astype(log_p.dtype).reshape(shape)
    total = jnp.sum(log_p, axis=-1)
    assigned = jax.nn.one_hot(jnp.argmax(total, axis=1), readings, dtype=log_p.dtype)
    mixture = jax.nn.logsumexp(log_p, axis=0) - jnp.log(models)
    joint = (jax.nn.logsumexp(total, axis=0) - jnp.log(models)) / log_p.shape[-1]
    return {
        "coverage": jnp.sum(jnp.max(assigned, axis=0)),
        "accuracy": jnp.mean(jnp.sum(assigned * jnp.mean(right, axis=-1), axis=1)),
        "nll": -jnp.mean(mixture),
        "joint_nll": -jnp.mean(joint),
    }

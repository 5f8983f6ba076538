"""Predictions of adapted models."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from .. import program, roles
from ..beside import beside
from ..conv import FastPath, fast
from ..learner import Adapter, Ensemble, Meta
from ..protocols import Noisy, Predictive
from ..task import Model, Source
from ..weights import present, weighing


def predict(
    learner: Adapter,
    meta: Meta,
    support: Source,
    x: PyTree,
    *,
    key: PRNGKeyArray | None = None,
    transductive: bool = True,
    fast_path: FastPath = "auto",
) -> PyTree:
    """Adapt to a support set and predict queries, `(n, out)`, of an ensemble `(particles, n, out)`.

    Args:
        learner: any `Adapter`.
        meta: its meta-parameters, `result.meta`.
        support: labelled examples, usually a `Batch`.
        x: queries, leading with the example axis.
        key: of adaptation, for learners and models that draw; `jax.random.key(0)` if `None`.
        transductive: predict all queries as one batch; else each with the support set alone, so
            that nothing computed over the batch lets it see another query.
        fast_path: see `adaptax.conv.fast`.
    """
    key = jax.random.key(0) if key is None else key
    model = learner.adapt(meta, support, key=key)
    known = support.draw(model, key)
    return predictions(
        model, x, known.x, transductive=transductive, fast_path=fast_path,
        weights=(None, known.weight),
    )  # fmt: skip


def predictions(
    model: Model,
    x: PyTree,
    support_x: PyTree,
    *,
    transductive: bool,
    fast_path: FastPath = "auto",
    weights: tuple[Array | None, Array | None] = (None, None),
) -> PyTree:
    """What an adapted model predicts; see `predict`.

    Args:
        model: an adapted model or an `Ensemble`.
        x: queries, leading with the example axis.
        support_x: the inputs it was adapted to.
        transductive: all queries in one batch; else one by one.
        fast_path: see `adaptax.conv.fast`.
        weights: what the queries and the examples of the support count.
    """
    return program.call(_predict, model, x, support_x, transductive, fast_path, weights)


def _predict(
    model: Model,
    x: PyTree,
    support_x: PyTree,
    transductive: bool,
    fast_path: FastPath,
    weights: tuple[Array | None, Array | None],
) -> Float[Array, ...]:
    call = fast(roles.apply, fast_path)
    of_query, of_support = (None if w is None else present(w) for w in weights)
    if transductive:
        with weighing(of_query):
            return call(model, x)
    with_one = None if of_support is None else jnp.append(of_support, 1)

    def one(batch: PyTree) -> PyTree:
        with weighing(with_one):
            return call(model, batch)

    # Sixteen at a time bounds memory and keeps the matrix products large.
    if not isinstance(model, Ensemble):
        return beside(one, support_x, x, size=16)

    def alone(one_x: PyTree) -> PyTree:
        batch = jax.tree.map(lambda s, q: jnp.concatenate([s, q[None]]), support_x, one_x)
        return jax.tree.map(lambda out: jnp.take(out, -1, axis=1), one(batch))

    each = jax.lax.map(alone, x, batch_size=16)
    return jax.tree.map(lambda out: jnp.moveaxis(out, 0, 1), each)


def learned_noise(model: Model) -> Float[Array, "*particles"]:
    """The standard deviations that a model, or each of an ensemble, learned.

    Raises:
        ValueError: for a model that has none.
    """

    def noise(model: Model) -> Array:
        if not isinstance(model, Noisy):
            raise ValueError(
                f'noise="learned" asks the model for its `noise`, and {type(model).__name__} has '
                "none; wrap it in adaptax.Gaussian, or give a number"
            )
        return model.noise

    return model.map(noise) if isinstance(model, Ensemble) else noise(model)


def is_predictive(model: Model) -> bool:
    """Return whether a model, or each of an ensemble, predicts a standard deviation of its own."""
    return isinstance(model.models if isinstance(model, Ensemble) else model, Predictive)


def deviations(model: Model, x: PyTree, support_x: PyTree, **how: Any) -> Float[Array, ...]:
    """Return the standard deviations of targets that a model predicts, noise included.

    Args:
        model: one that `is_predictive`.
        x: as in `predictions`, as are the others.
        support_x: the inputs that it was adapted to.
        how: further arguments of `predictions`.
    """
    return predictions(Deviation.of(model), x, support_x, **how)


class Deviation(eqx.Module):
    """A model of the standard deviations that a model predicts."""

    model: Model

    @classmethod
    def of(cls, model: Model) -> Model:
        """Return that of a model, or of each of an ensemble."""
        if not isinstance(model, Ensemble):
            return cls(model)
        return Ensemble(cls(model.models), None if model.shared is None else cls(model.shared))

    def __call__(self, x: PyTree) -> Array:
        """Return the deviations of the targets of a batch."""
        return self.model.predictive(x)[1]

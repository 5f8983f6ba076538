"""What `evaluate` scores predictions by: what the loss says they are.

The library's losses say it themselves, and a loss of your own may (`adaptax.losses.predicts`). For
one that does not, `evaluate` reports the loss itself and claims a metric only where it applies:

* squared error and coverage where the loss is least if the predictions are the targets. The loss is
  evaluated there and a little beside it; a cross-entropy of logits, say, is lower beside it;
* accuracy and likelihood where the targets are integers in `[0, way)` and the predictions have one
  logit for each class.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from .. import losses, metrics
from ..learner import Ensemble
from ..losses import Loss
from ..task import Batch, Model
from ..weights import Weight, spread

Scores = Callable[..., Mapping[str, Array]]
"""Scores of one's own: `f(predictions, targets) -> {name: scalar}` for the queries of one task; of
padded tasks `f(predictions, targets, weight)`."""

Select = str | Sequence[str]
"""A metric, or a metric and `"max"` or `"min"`."""

HIGH = {"accuracy", "r2", "readings", "precision", "recall", "f1", "auc", "auroc", "auprc", "iou",
        "dice", "correlation", "return", "reward"}  # fmt: skip
"""Words in names of metrics that are to be large, as in `label_accuracy`."""

LOW = {"loss", "error", "mse", "rmse", "mae", "nll", "brier", "perplexity"}
"""Words in names of metrics that are to be small, as in `particle_mse`."""


INTERNAL = {"bins", "quantiles", "claimed", "fits", "repeats"}
"""What `scores` gives beside metrics."""


def known_sign(metric: str) -> int:
    """1 for a metric that is to be large, −1 for a small one, 0 if its name does not tell."""
    words = set(metric.lower().split("_"))
    return bool(words & HIGH) - bool(words & LOW)


def sign_of(select: Select) -> int:
    """1 for a metric that is to be large, −1 for one that is to be small.

    Raises:
        ValueError: if it does not say and its name does not tell.
    """
    if isinstance(select, str):
        if not known_sign(select):
            raise ValueError(
                f"select={select!r} does not tell whether more of it is better; say "
                f'select=({select!r}, "max") or ({select!r}, "min")'
            )
        return known_sign(select)
    if len(select) != 2 or select[1] not in ("max", "min"):
        raise ValueError(f'select={select!r}; expected a metric, or a metric and "max" or "min"')
    return 1 if select[1] == "max" else -1


def name_of(select: Select) -> str:
    """The metric of a `select`."""
    return select if isinstance(select, str) else select[0]


def scores(
    loss: Loss, model: Model, predictions: PyTree, batch: Batch, noise: Any
) -> dict[str, Any]:
    """Scores of the predictions of one task, by what the loss says they are.

    Metrics that a loss of one's own does not say are under `"claimed"`, and `"fits"` is whether
    they apply; see `settled`.

    Args:
        loss: of the learner.
        model: an adapted model or an `Ensemble`, which predicted.
        predictions: for the batch; of an ensemble they lead with the particle axis.
        batch: the queries.
        noise: standard deviation of regression targets: a number, one for each particle, or one
            for each prediction.

    Raises:
        ValueError: if the predictions do not fit the targets.
    """
    kind, y = losses.kind_of(loss), batch.y
    if kind == "classification":
        return _classification(predictions, y, batch.weight)
    if kind == "binary":
        return metrics.binary(_same_shape(predictions, y), y, batch.weight)
    if kind == "regression":
        return _regression(predictions, y, noise, batch.weight)
    return _of_own_loss(loss, model, predictions, batch, noise)


def settled(found: dict[str, Any]) -> dict[str, Any]:
    """The scores of all episodes, with the metrics that were claimed if they apply in each.

    Args:
        found: what `scores` gave, stacked over episodes.

    Raises:
        ValueError: if the loss compares every target with several predictions.
    """
    if "repeats" in found and found.pop("repeats").any():
        raise ValueError(
            "the model predicts another shape than the targets have, and the loss compares each "
            "target with several predictions, as broadcasting does; give both the same shape, or "
            "scores= if that is meant"
        )
    claimed = found.pop("claimed", {})
    if "fits" in found and found.pop("fits").all():
        found = claimed | found
    return dict(sorted(found.items()))


def checked(found: Any, by: str) -> dict[str, Array]:
    """Scores of one's own as floats.

    Raises:
        ValueError: if they are not scalars by name.
    """
    if not isinstance(found, Mapping) or not all(isinstance(name, str) for name in found):
        raise ValueError(f"{by} gave {type(found).__name__}; expected a dict of scores by name")
    for name, value in found.items():
        if name in INTERNAL or jnp.shape(value) != ():
            raise ValueError(
                f"{by} gave {name} of shape {jnp.shape(value)}; expected one number for the "
                f"queries of a task, under a name other than {', '.join(sorted(INTERNAL))}"
            )
    return {name: jnp.asarray(value, float) for name, value in found.items()}


def own(function: Scores, predictions: PyTree, batch: Batch, by: str) -> dict[str, Array]:
    """Return scores of one's own, checked.

    Args:
        function: of predictions and targets; of padded tasks also of their `weight`, by that name.
        predictions: for the batch.
        batch: the queries.
        by: what to call the function.

    Raises:
        ValueError: if they are not scalars by name, or the function would count padding.
    """
    if batch.weight is None:
        return checked(function(predictions, batch.y), by)
    if "weight" not in inspect.signature(function).parameters:
        raise ValueError(
            f"the tasks are padded to one size, and {by} has no argument weight to leave padding "
            "out by; write it as f(predictions, targets, weight), 0 for what does not count"
        )
    return checked(function(predictions, batch.y, weight=batch.weight), by)


def _classification(logits: Array, labels: Array, weight: Weight) -> dict[str, Array]:
    if not _are_logits(logits, labels):
        raise ValueError(
            f"for labels of shape {labels.shape} the model should predict logits of shape "
            f"{(*labels.shape, 'way')}, and predicted {logits.shape}"
        )
    # One label a pixel or token: each counts as a query.
    lead = logits.shape[: logits.ndim - labels.ndim - 1]
    logits = logits.reshape(*lead, -1, logits.shape[-1])
    weight = None if weight is None else spread(weight, labels).ravel()
    found = metrics.classification(logits, labels.ravel(), weight)
    return found | metrics.uncertainty(logits, weight)


def _are_logits(predictions: Array, labels: Array) -> bool:
    return (
        predictions.ndim - labels.ndim in (1, 2)
        and predictions.shape[-1 - labels.ndim : -1] == labels.shape
    )


def _regression(predictions: Array, y: Array, noise: Any, weight: Weight) -> dict[str, Array]:
    predictions = _same_shape(predictions, y)
    y = y if jnp.issubdtype(y.dtype, jnp.inexact) else y.astype(float)
    found = metrics.regression(predictions, y, noise, weight)
    return found | metrics.coverage(predictions, y, noise, weight)


def _same_shape(predictions: Array, y: Array) -> Array:
    if predictions.shape[predictions.ndim - y.ndim :] != y.shape or predictions.ndim > y.ndim + 1:
        raise ValueError(
            f"the model predicts {predictions.shape} for targets of shape {y.shape}; give both "
            "the same shape"
        )
    return predictions


def _of_own_loss(
    loss: Loss, model: Model, predictions: PyTree, batch: Batch, noise: Any
) -> dict[str, Any]:
    y = batch.y
    while isinstance(loss, losses.MixedPrecision):  # the predictions are in full precision
        loss = loss.loss

    def value(model: Model, predictions: PyTree) -> Array:
        return loss(_Answering(model, batch.x, predictions), batch)

    if isinstance(model, Ensemble):
        found = {"loss": jnp.mean(model.map(value, predictions))}
        model, one = model.member(0), jax.tree.map(lambda leaf: leaf[0], predictions)
    else:
        found, one = {"loss": value(model, predictions)}, predictions
    if not (eqx.is_array(one) and eqx.is_array(y)):
        return found
    at = lambda predictions: value(model, predictions.astype(one.dtype))  # noqa: E731
    integers = jnp.issubdtype(y.dtype, jnp.integer)
    if integers and one.shape[:-1] == y.shape and one.shape[-1] > 1:
        fits = jnp.all((y >= 0) & (y < one.shape[-1]))
        return found | {"claimed": _classification(predictions, y, batch.weight), "fits": fits}
    if one.shape == y.shape:
        fits = _least_at(at, y.astype(float))
        return found | {"claimed": _regression(predictions, y, noise, batch.weight), "fits": fits}
    return found | {"repeats": _repeats(at, one.shape, y.shape)}


def _least_at(loss: Callable[[Array], Array], y: Array) -> Array:
    """Whether the loss of predicting the targets is below that of predictions a little beside.

    All of them are moved up or down together, and the larger away from the smaller or towards
    them, which is where the losses of logits fall.
    """
    step = 0.1 * (1 + jnp.mean(jnp.abs(y)))
    apart = jnp.where(y > jnp.mean(y), step, -step)
    beside = jnp.stack([loss(y + move) for move in (step, -step, apart, -apart)])
    return jnp.all(~(beside <= loss(y))) & jnp.isfinite(loss(y))


def _repeats(
    loss: Callable[[Array], Array], shape: tuple[int, ...], targets: tuple[int, ...]
) -> Array:
    """Whether the loss broadcasts targets over predictions of another shape.

    It then does not matter which of the predictions that share a target comes first.
    """
    size = max(len(shape), len(targets))
    pairs = list(zip((1,) * (size - len(shape)) + shape, (1,) * (size - len(targets)) + targets))
    if any(a != b and 1 not in (a, b) for a, b in pairs):
        return jnp.array(False)  # they do not broadcast
    shared = [i - size for i, (a, b) in enumerate(pairs) if a > b]
    if not shared:
        return jnp.array(False)
    some = jax.random.normal(jax.random.key(0), shape)
    return jnp.isclose(loss(some), loss(jnp.flip(some, shared)), rtol=1e-5)


class _Answering(eqx.Module):
    """A model with given predictions for given inputs; else the model that it stands for."""

    model: Model
    answer: Callable[[PyTree], PyTree | None] = eqx.field(static=True)

    def __init__(self, model: Model, x: PyTree, predictions: PyTree):
        # Not a leaf: a loss may sum over the parameters of a model.
        self.model, self.answer = model, lambda asked: predictions if asked is x else None

    def __call__(self, x: PyTree, *args: Any, **kwargs: Any) -> PyTree:
        found = self.answer(x)
        return self.model(x, *args, **kwargs) if found is None else found

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "model":
            raise AttributeError(name)
        return getattr(self.model, name)

"""Losses `loss(model, batch) -> scalar`, with the reductions that the papers' codes use.

Published step sizes depend on the reduction. MAML's code divides the *sum* of the cross-entropies
of a batch by the number of shots, so that its gradient is `way` times that of the mean; Reptile's
and LEO's codes sum. `reduction=` names all three:

    loss = functools.partial(adaptax.losses.cross_entropy, reduction="sum/shot")

Predictions in half precision are reduced in float32, which the loss is then in.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Literal, TypeVar, get_args

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from .protocols import Predictive
from .task import Batch, Model
from .tree import wide
from .weights import Weight, average, spread, total

Loss = Callable[[Model, Batch], Float[Array, ""]]
Reduction = Literal["mean", "sum", "sum/shot", "balanced"]
Kind = Literal["classification", "binary", "regression"]
"""What the predictions of a loss are: logits of one class each, logits of labels that are each true
or false, or estimates of the targets."""

Function = TypeVar("Function", bound=Callable[..., Any])


def predicts(kind: Kind) -> Callable[[Function], Function]:
    """Decorate a loss with what its predictions are, so that `evaluate` scores them as that.

    A loss of your own needs it only if `evaluate` does not find out; see `adaptax.engine.scoring`.

    Args:
        kind: see `Kind`.
    """

    def mark(loss: Function) -> Function:
        loss.__dict__["predicts"] = kind
        return loss

    return mark


def kind_of(loss: Loss) -> Kind | None:
    """What the predictions of a loss are, if `predicts` marked it or the loss that it wraps."""
    while isinstance(loss, functools.partial | MixedPrecision):
        loss = loss.func if isinstance(loss, functools.partial) else loss.loss
    kind = getattr(loss, "predicts", None)
    return kind if kind in get_args(Kind) else None


@predicts("regression")
def mse(model: Model, batch: Batch, *, reduction: Reduction = "mean") -> Float[Array, ""]:
    """Squared error, averaged over outputs and reduced over examples.

    Args:
        model: predicts `(n, out)` from `batch.x`.
        batch: float targets `(n, out)`.
        reduction: `"mean"` or `"sum"` over the examples.

    Raises:
        ValueError: if predictions and targets differ in shape, which would broadcast silently; if
            the batch is empty or without targets.
    """
    labelled(batch)
    predictions = batch.predict(model)
    if predictions.shape != batch.y.shape:
        raise ValueError(
            f"the model predicts shape {predictions.shape} for targets of shape {batch.y.shape}; "
            "mse compares them element by element, so give both the same shape"
        )
    errors = jnp.square(wide(predictions) - wide(batch.targets))
    return _reduce(*_per_example(errors, batch.weight), reduction, way=1)


@predicts("regression")
def relative_mse(model: Model, batch: Batch) -> Float[Array, ""]:
    """Squared error over that of answering 0, where that is above 1: `Σ(y − f)² / max(Σ y², n)`.

    For targets in units of each task's own support, as `tasks.fsmol` has them. Of a support that is
    standardised it is `mse`; but queries of a task whose support happened to lie close together
    have targets of ten or a hundred, and one such task would outweigh all others of a meta-batch.
    Here no task starts from more than 1, and the meta-loss is close to 1 − R².

    Args:
        model: predicts `(n, out)` from `batch.x`.
        batch: float targets `(n, out)`.

    Raises:
        ValueError: if predictions and targets differ in shape.
    """
    return mse(model, batch) / jnp.maximum(average(wide(batch.targets) ** 2, batch.weight), 1.0)


@predicts("regression")
def normal(
    model: Model, batch: Batch, *, noise: float = 1.0, reduction: Reduction = "mean"
) -> Float[Array, ""]:
    """`−log N(y; f(x), noise²)`, in nats, averaged over outputs and reduced over examples.

    For those who weigh the likelihood against something else: the KL of `ProbabilisticMAML`, the
    repulsion or the mixture of `BayesianMAML`.

    Args:
        model: predicts `(n, out)` from `batch.x`.
        batch: float targets `(n, out)`.
        noise: standard deviation of the targets.
        reduction: `"mean"` or `"sum"` over the examples.

    Raises:
        ValueError: if predictions and targets differ in shape, or the noise is not positive.
    """
    if not noise > 0:
        raise ValueError(f"noise is the standard deviation of the targets, above 0, not {noise}")
    constant = math.log(noise) + math.log(2 * math.pi) / 2
    half = mse(model, batch, reduction=reduction) / (2 * noise**2)
    return half + constant * (batch.count if reduction == "sum" else 1)


@predicts("regression")
def predictive_nll(model: Model, batch: Batch) -> Float[Array, ""]:
    """`−log N(y; f(x), s(x)²)`, in nats, averaged over outputs and examples.

    For models that predict a standard deviation s beside the mean f, for every target its own.

    Args:
        model: `model.predictive(x)` gives both, `(n, out)` each, as the models that
            `adaptax.GaussianProcessHead` adapts do.
        batch: float targets `(n, out)`.

    Raises:
        ValueError: if the model does not predict standard deviations; if predictions and targets
            differ in shape.
    """
    labelled(batch)
    if not isinstance(model, Predictive):
        raise ValueError(
            f"predictive_nll wants a model with predictive(x), which gives means and standard "
            f"deviations, and {type(model).__name__} has none; use mse or normal"
        )
    mean, deviation = batch.predict(model.predictive)
    if mean.shape != batch.y.shape:
        raise ValueError(
            f"the model predicts shape {mean.shape} for targets of shape {batch.y.shape}; give "
            "both the same shape"
        )
    mean, deviation = wide(mean), wide(deviation)
    each = jnp.square((batch.targets - mean) / deviation) / 2 + jnp.log(deviation)
    each = each + math.log(2 * math.pi) / 2
    return average(each, batch.weight)


@predicts("classification")
def cross_entropy(model: Model, batch: Batch, *, reduction: Reduction = "mean") -> Float[Array, ""]:
    """Softmax cross-entropy `−log p(y | x)` of integer labels.

    Args:
        model: predicts logits `(n, ..., way)` from `batch.x`.
        batch: integer labels `(n, ...)` in `[0, way)`: `(n,)`, or one for every pixel or token.
        reduction: `"mean"` (default) or `"sum"` over the examples, or `"sum/shot"`: the sum over
            `n` examples of `way` classes divided by the shots `n / way`, that is `way` times the
            mean (MAML's code: the paper's step 0.4 on this loss is 2.0 on the mean for 5 ways);
            or `"balanced"`: the mean over the classes that occur of the mean over their examples.
            Where all occur equally often, as in an episode, it is the mean; where some have more
            labels than others, as in active learning, each class still counts as one.

    Raises:
        ValueError: if the labels are not integers, one for each prediction; if the batch is empty
            or without labels.
    """
    labelled(batch)
    logits = batch.predict(model)
    if not jnp.issubdtype(batch.y.dtype, jnp.integer) or batch.y.shape != logits.shape[:-1]:
        raise ValueError(
            f"cross_entropy wants integer labels of shape {logits.shape[:-1]}, and was given "
            f"{batch.y.dtype} of shape {batch.y.shape}; use labels 0..way-1, not one-hot vectors"
        )
    each = optax.softmax_cross_entropy_with_integer_labels(wide(logits), batch.targets)
    if reduction == "balanced":
        return _balanced(each, batch)
    return _reduce(each, batch.weight, reduction, way=logits.shape[-1])


@predicts("binary")
def binary_cross_entropy(
    model: Model, batch: Batch, *, reduction: Reduction = "mean"
) -> Float[Array, ""]:
    """`−y log σ(f(x)) − (1 − y) log σ(−f(x))`, averaged over labels and reduced over examples.

    For examples that have several labels, or none: each output is the logit of one label.

    Args:
        model: predicts logits of the shape of the targets from `batch.x`.
        batch: targets `(n, ...)`, 0 or 1, as floats, integers or booleans.
        reduction: `"mean"` or `"sum"` over the examples.

    Raises:
        ValueError: if logits and targets differ in shape; if the batch is empty or without targets.
    """
    labelled(batch)
    logits = wide(batch.predict(model))
    if logits.shape != batch.y.shape:
        raise ValueError(
            f"the model predicts logits of shape {logits.shape} for targets of shape "
            f"{batch.y.shape}; binary_cross_entropy wants one logit for each label"
        )
    each = optax.sigmoid_binary_cross_entropy(logits, batch.targets.astype(logits.dtype))
    return _reduce(*_per_example(each, batch.weight), reduction, way=1)


@dataclasses.dataclass(frozen=True)
class MixedPrecision:
    """A loss that computes its model in half precision, of parameters kept in float32.

    Parameters and inputs are cast to `dtype` where the loss is taken, and its derivatives cast
    back: fast weights, meta-parameters, their gradients and the states of inner and outer rules
    stay in float32, in both loops of every learner. Targets are not cast. The losses of this
    module reduce half-precision predictions in float32; one of your own does by
    `adaptax.tree.wide`.

    Args:
        loss: `loss(model, batch) -> scalar`.
        dtype: bfloat16, which has the range of float32. In float16, small gradients become 0.
    """

    loss: Loss
    dtype: Any = jnp.bfloat16

    def __call__(self, model: Model, batch: Batch) -> Float[Array, ""]:
        """The loss, in float32."""
        cast = lambda leaf: leaf.astype(self.dtype) if _is_real(leaf) else leaf  # noqa: E731
        model, x = jax.tree.map(cast, (model, batch.x))
        return wide(self.loss(model, dataclasses.replace(batch, x=x)))


def _is_real(leaf: Any) -> bool:
    return eqx.is_array(leaf) and jnp.issubdtype(leaf.dtype, jnp.floating)


def labelled(batch: Batch) -> None:
    """That a batch has examples, with targets, so that a loss of it has a meaning.

    Args:
        batch: of the support or the queries.

    Raises:
        ValueError: if it has not.
    """
    if batch.y is None:
        raise ValueError(
            "a loss was asked of a batch without targets, y=None; give the support labels to learn "
            "from and the queries labels to be judged by, or call the adapted model on queries.x"
        )
    if batch.size == 0:
        raise ValueError(
            "a loss was asked of a batch without examples, of which there is no mean; sample tasks "
            "with a support and queries of one or more"
        )
    if batch.weight is not None and batch.weight.shape != batch.y.shape[: batch.weight.ndim]:
        raise ValueError(
            f"weights of shape {batch.weight.shape} do not fit targets of shape {batch.y.shape}; "
            "give one for every example, (n,), or for every target"
        )


def _balanced(each: Float[Array, "n ..."], batch: Batch) -> Float[Array, ""]:
    """Return the mean over the classes that occur of the mean over their examples."""
    y = batch.y.ravel()
    same = y[:, None] == y
    if batch.weight is None:
        count = jnp.sum(same, axis=1)  # of its class, for every example
        return jnp.sum(each.ravel() / count) / jnp.sum(1 / count)
    weight = spread(batch.weight, batch.y).ravel()
    count = same @ weight
    return average(each.ravel(), jnp.where(count > 0, weight / jnp.where(count > 0, count, 1), 0))


def _per_example(each: Float[Array, "n ..."], weight: Weight) -> tuple[Array, Weight]:
    """Return the mean over the targets of every example, and what the example counts."""
    flat = each.reshape(len(each), -1)
    if weight is None or weight.ndim == 1:
        return jnp.mean(flat, axis=1), weight
    weight = spread(weight, each).reshape(flat.shape)
    count = jnp.mean(weight, axis=1)
    kept = jnp.mean(jnp.where(weight > 0, weight * flat, 0), axis=1)
    return kept / jnp.where(count > 0, count, 1), count


def _reduce(
    each: Float[Array, "n ..."], weight: Weight, reduction: Reduction, way: int
) -> Float[Array, ""]:
    match reduction:
        case "mean":
            return average(each, weight)
        case "sum":
            return total(each, weight)
        case "sum/shot":
            return way * average(each, weight)
    raise ValueError(
        'reduction is "mean", "sum" or "sum/shot", for cross_entropy "balanced" too, '
        f"not {reduction!r}"
    )

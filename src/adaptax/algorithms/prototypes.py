"""Prototypical networks (Snell, Swersky & Zemel 2017, arXiv:1703.05175)."""

from __future__ import annotations

from dataclasses import KW_ONLY
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from ..checks import one_of
from ..learner import Meta, MetaLearner
from ..losses import Loss, cross_entropy
from ..task import Batch, Model, Source, Task
from .layers import Affine, Headed, embed, way_of, without_head
from .particles import nonempty


class PrototypicalNetwork(MetaLearner):
    """Classify by the nearest prototype, the mean of a class's support in a learned space.

        c_k = mean of f(x) over the support of class k
        p(k | x) ∝ exp(−‖f(x) − c_k‖²),   or with `distance="cosine"` ∝ exp(s cos(f(x), c_k))

    where f is the model without its head, and the meta-loss is the loss of the queries. There is
    no inner loop and no gradient in it: adaptation is one pass over the support. The scale s of
    the cosines is learned, as they are at most 1 apart.

    The adapted model is f with a linear head, `2 c_k · f(x) − ‖c_k‖²`: the squared distances less
    `‖f(x)‖²`, which all classes share. A class without support gets no probability.

    The meta-parameters do not depend on the number of ways, and a task may have any. Where `way`
    is `None`, `fit` and `evaluate` take what the tasks say, `adapt` the largest label of the
    support, and a program of one's own, in which labels are traced, the outputs of the head that
    was taken out. It is safe to give more ways than a task has.

    Args:
        loss: of the queries, in meta-training.
        distance: squared `"euclidean"`, as in the paper, or `"cosine"`.
        way: number of classes; see above.
        head: path of the head in the model, which is taken out; `None` if the model's outputs are
            the space in which distances are taken, as in the paper.
        scale: s at the start.

    Raises:
        ValueError: for another distance, a scale or way that is not positive; in `init`, if there
            is no layer at `head`.
    """

    title = "prototypical network"
    loss: Loss = eqx.field(static=True, default=cross_entropy)
    distance: Literal["euclidean", "cosine"] = eqx.field(static=True, default="euclidean")
    _: KW_ONLY
    way: int | None = eqx.field(static=True, default=None)
    head: str | None = eqx.field(static=True, default="head")
    scale: float = eqx.field(static=True, default=10.0)

    def __check_init__(self) -> None:
        one_of(self, distance=("euclidean", "cosine"))
        if not self.scale > 0:
            raise ValueError(f"scale is above 0, not {self.scale}")
        check_way(self.way)

    def init(self, model: Model, *, key: PRNGKeyArray) -> Meta:
        """Return `{"model": the model without its head}`, and `log_scale` for cosines.

        Args:
            model: any; also the meta-parameters of a trained `MAML` or of this learner.
            key: not used.
        """
        given = model if isinstance(model, dict) and "model" in model else {"model": model}
        meta = {"model": without_head(given["model"], self.head)}
        if self.distance == "euclidean":
            return meta
        return {
            **meta,
            "log_scale": given.get("log_scale", jnp.log(jnp.asarray(self.scale, float))),
        }

    def check_support(self, meta: Meta, support: Any, *, key: PRNGKeyArray) -> None:
        """Raise for labels that are none, or more than there are ways.

        Raises:
            ValueError: for targets that are not labels in `[0, way)`.
        """
        check_labels(support, self._way(meta))

    def adapt(self, meta: Meta, support: Source, *, key: PRNGKeyArray) -> Model:
        """Return the classifier by the prototypes of the support."""
        batch = nonempty(support, "support").draw(meta["model"], key)
        way = known_way(self._way(meta))
        centres, present = prototypes(embed(meta["model"], batch), batch, way)
        if self.distance == "euclidean":
            return Headed(meta["model"], linear_head(centres, present))
        return Headed(meta["model"], Cosines(centres, present, jnp.exp(meta["log_scale"])))

    def meta_loss(
        self, meta: Meta, task: Task, *, key: PRNGKeyArray, progress: float | Array = 1.0
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """Return the loss of the queries."""
        adapt_key, query_key = jax.random.split(key)
        model = self.adapt(meta, task.support, key=adapt_key)
        return self.loss(model, task.query.draw(model, query_key)), {}

    def part_of(self, path: str, meta: Meta) -> str | None:
        """Return the path in the model; the scale belongs to none."""
        return path.partition("/")[2] or None

    def _way(self, meta: Meta) -> int | None:
        return way_of(meta["model"], self.head) if self.way is None else self.way


class Cosines(eqx.Module):
    """A head of cosines: `s cos(x, c_k)`, and −∞ for a class without support.

    Args:
        centres: the prototypes.
        present: which classes have support.
        scale: s.
    """

    centres: Float[Array, "way features"]
    present: Bool[Array, " way"]
    scale: Float[Array, ""]

    def __call__(self, x: Float[Array, "n features"]) -> Float[Array, "n way"]:
        """Return a batch of logits."""
        return jnp.where(self.present, self.scale * _unit(x) @ _unit(self.centres).T, -jnp.inf)


def _unit(x: Float[Array, "n features"]) -> Float[Array, "n features"]:
    """Return the rows at length 1; zero stays zero, with a derivative that is finite."""
    squares = jnp.sum(x**2, axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.maximum(squares, jnp.finfo(x.dtype).tiny ** 0.5))


def prototypes(
    features: Float[Array, "n features"], batch: Batch, way: int
) -> tuple[Float[Array, "way features"], Bool[Array, " way"]]:
    """Return the mean of the features of every class, and which classes have examples.

    Where labels are traced, so that none can be refused, one of `way` or more makes all prototypes
    NaN.

    Args:
        features: of the examples.
        batch: their labels, and what each counts.
        way: number of classes.
    """
    check_classes(batch)
    weight = batch.present.astype(features.dtype)
    # What counts nothing may hold anything.
    features = jnp.where(weight[:, None] > 0, features, 0)
    member = jax.nn.one_hot(batch.y, way, dtype=features.dtype) * weight[:, None]
    count = jnp.sum(member, axis=0)
    outside = jnp.any((weight > 0) & ((batch.y < 0) | (batch.y >= way)))
    means = member.T @ features / jnp.where(count > 0, count, 1)[:, None]
    return jnp.where(outside, jnp.nan, means), count > 0


def linear_head(centres: Float[Array, "way features"], present: Bool[Array, " way"]) -> Affine:
    """Return the head whose logits are `−‖x − c_k‖² + ‖x‖²`: `w_k = 2 c_k`, `b_k = −‖c_k‖²`.

    Args:
        centres: the prototypes.
        present: which classes have support; the bias of others is −∞.
    """
    bias = jnp.where(present, -jnp.sum(centres**2, axis=1), -jnp.inf)
    return Affine(2 * centres.T, bias)


def check_way(way: int | None) -> None:
    """Raise unless a number of classes is one.

    Raises:
        ValueError: if it is below 1.
    """
    if way is not None and way < 1:
        raise ValueError(f"way is the number of classes, 1 or more, not {way}")


def known_way(way: int | None) -> int:
    """Return a number of classes that has to be known.

    Raises:
        ValueError: if it is not.
    """
    if way is None:
        raise ValueError(
            "the number of classes is not known while the labels are traced; give the learner way="
        )
    return way


def check_classes(batch: Batch) -> None:
    """Raise unless the targets are labels, one for each example.

    Raises:
        ValueError: saying what they are.
    """
    if batch.y is None or not jnp.issubdtype(batch.y.dtype, jnp.integer) or batch.y.ndim != 1:
        what = "none" if batch.y is None else f"{batch.y.dtype} of shape {batch.y.shape}"
        raise ValueError(
            f"prototypes want an integer label for each example, (n,), not {what}; for numbers use "
            "another learner, such as GaussianProcessHead"
        )


def check_labels(support: Any, way: int | None) -> None:
    """Raise for labels of known values that are not in `[0, way)`.

    Raises:
        ValueError: naming the first of them.
    """
    if not isinstance(support, Batch) or support.size == 0:
        return
    check_classes(support)
    outside = (support.y < 0) | (support.y >= known_way(way))
    wrong = outside & (support.present > 0)
    if bool(jnp.any(wrong)):
        raise ValueError(
            f"the support has the label {int(support.y[jnp.argmax(wrong)])} of a task of {way} "
            "ways, whose labels are 0 to way − 1; give the learner way=, or labels in that range"
        )

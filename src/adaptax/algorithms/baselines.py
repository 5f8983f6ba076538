"""What there is without meta-learned weights: ridge regression and the nearest class mean."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PRNGKeyArray

from ..learner import Functional, Meta, MetaLearner
from ..losses import Loss, cross_entropy, mse
from ..task import Model, Source, Task
from ..weights import Weight, spread
from .particles import nonempty


class RidgeRegression(MetaLearner):
    """Linear regression of a task's support with a penalty, the baseline of few-shot regression.

        w = argmin ‖y − ȳ − (X − x̄) w‖² + λ ‖w‖²,   f(x) = (x − x̄) w + ȳ

    in closed form. Only the penalty λ is meta-learned, by the gradient of the query loss. It is
    solved among the n examples of the support, so inputs may be as wide as one likes.

    Args:
        loss: of the queries, in meta-training.
        penalty: λ at the start, in squared units of the inputs.

    Raises:
        ValueError: if the penalty is not positive.
    """

    title = "ridge regression"
    loss: Loss = eqx.field(static=True, default=mse)
    penalty: float = eqx.field(static=True, default=1.0)

    def __check_init__(self) -> None:
        if not self.penalty > 0:
            raise ValueError(f"penalty is above 0, not {self.penalty}")

    def init(self, model: Model, *, key: PRNGKeyArray) -> Meta:
        """`{"log_penalty": log λ}`; the model is not used, except to continue from this."""
        if isinstance(model, dict) and "log_penalty" in model:
            return model
        return {"log_penalty": jnp.log(jnp.asarray(self.penalty, float))}

    def adapt(self, meta: Meta, support: Source, *, key: PRNGKeyArray) -> Model:
        """The linear model that fits the support.

        Raises:
            ValueError: if the targets are not numbers.
        """
        batch = nonempty(support, "support").draw(meta, key)
        if not jnp.issubdtype(batch.y.dtype, jnp.floating):
            raise ValueError(
                f"ridge regression wants targets that are numbers, not {batch.y.dtype}; "
                "for classes use another learner"
            )
        x, y = (a.reshape(len(a), -1) for a in (batch.x, batch.targets))
        penalty = jnp.exp(meta["log_penalty"])
        if batch.weight is None or batch.weight.ndim == 1:
            return Functional(_ridge(x, y, batch.weight, penalty), _affine)
        # A gap in one target is none in the others: each is a regression of its own.
        weight = spread(batch.weight, batch.y).reshape(y.shape)
        each: Any = jax.vmap(lambda y, w: _ridge(x, y[:, None], w, penalty), in_axes=1)
        slopes, offsets = each(y, weight)
        return Functional((slopes[..., 0].T, offsets[:, 0]), _affine)

    def meta_loss(
        self, meta: Meta, task: Task, *, key: PRNGKeyArray, progress: float | Array = 1.0
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """The query loss, of λ alone; `log_penalty` is logged."""
        return _query_loss(self, meta, task, key), meta

    def optimizer(self, steps: int) -> optax.GradientTransformation:
        """Adam, 0.05: one number, on a logarithmic scale."""
        return optax.adam(0.05)


class NearestClassMean(MetaLearner):
    """Classify by the nearest of the class means of the support: the baseline of LEO.

        p(c | x) = softmax_c(−s ‖x − μ_c‖²),   μ_c the mean of the support of class c

    Inputs are taken as they are, flattened: give it embeddings. Only the scale s, which no
    prediction but how sure it is depends on, is meta-learned. A class without support is never
    predicted.

    Args:
        loss: of the queries, in meta-training.
        way: number of classes.
        scale: s at the start, in inverse squared units of the inputs.

    Raises:
        ValueError: if scale or way are not positive.
    """

    title = "nearest class mean"
    loss: Loss = eqx.field(static=True, default=cross_entropy)
    way: int = eqx.field(static=True, default=5)
    scale: float = eqx.field(static=True, default=10.0)

    def __check_init__(self) -> None:
        if not (self.scale > 0 and self.way > 0):
            raise ValueError(f"scale and way are above 0, not {self.scale} and {self.way}")

    def init(self, model: Model, *, key: PRNGKeyArray) -> Meta:
        """`{"log_scale": log s}`; the model is not used, except to continue from this."""
        if isinstance(model, dict) and "log_scale" in model:
            return model
        return {"log_scale": jnp.log(jnp.asarray(self.scale, float))}

    def adapt(self, meta: Meta, support: Source, *, key: PRNGKeyArray) -> Model:
        """The classifier by distance to the class means of the support.

        Raises:
            ValueError: if the targets are not classes.
        """
        batch = nonempty(support, "support").draw(meta, key)
        if not jnp.issubdtype(batch.y.dtype, jnp.integer):
            raise ValueError(
                f"the nearest class mean wants integer labels, not {batch.y.dtype}; for numbers "
                "use another learner, such as RidgeRegression"
            )
        x = batch.x.reshape(len(batch.x), -1)
        member = jax.nn.one_hot(batch.y, self.way, dtype=x.dtype)
        member = member if batch.weight is None else member * batch.weight[:, None]
        count = jnp.sum(member, axis=0)
        means = member.T @ x / jnp.where(count > 0, count, 1)[:, None]
        # −s‖x − μ‖² = 2s x·μ − s‖μ‖² + what all classes share.
        scale = jnp.exp(meta["log_scale"])
        bias = jnp.where(count > 0, -scale * jnp.sum(means**2, axis=1), -jnp.inf)
        return Functional((2 * scale * means.T, bias), _affine)

    def meta_loss(
        self, meta: Meta, task: Task, *, key: PRNGKeyArray, progress: float | Array = 1.0
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """The query loss, of s alone; `log_scale` is logged."""
        return _query_loss(self, meta, task, key), meta

    def optimizer(self, steps: int) -> optax.GradientTransformation:
        """Adam, 0.05: one number, on a logarithmic scale."""
        return optax.adam(0.05)


def _ridge(
    x: Float[Array, "n d"], y: Float[Array, "n out"], weight: Weight, penalty: Array
) -> tuple[Float[Array, "d out"], Float[Array, " out"]]:
    """Slopes and offset, solved among the examples."""
    if weight is None:
        centre, mean = jnp.mean(x, axis=0), jnp.mean(y, axis=0)
        x, y = x - centre, y - mean
    else:
        share = weight / jnp.maximum(jnp.sum(weight), 1e-12)
        centre, mean, root = share @ x, share @ y, jnp.sqrt(weight)[:, None]
        x, y = root * (x - centre), root * (y - mean)
    gram = x @ x.T + penalty * jnp.eye(len(x), dtype=x.dtype)
    slopes = x.T @ jax.scipy.linalg.solve(gram, y, assume_a="pos")
    return slopes, mean - centre @ slopes


def _query_loss(
    learner: MetaLearner, meta: Meta, task: Task, key: PRNGKeyArray
) -> Float[Array, ""]:
    """The loss of the adapted model on the task's queries."""
    adapt_key, query_key = jax.random.split(key)
    model = learner.adapt(meta, task.support, key=adapt_key)
    return learner.loss(model, task.query.draw(model, query_key))


def _affine(params: tuple[Array, Array], x: Array) -> Float[Array, "n out"]:
    """`x W + b` of flattened inputs."""
    weight, bias = params
    return x.reshape(len(x), -1) @ weight + bias

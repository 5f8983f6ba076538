"""Gaussian processes on learned features: deep kernel transfer, and ADKF-IFT's first form."""

from __future__ import annotations

import math
from dataclasses import KW_ONLY
from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray, PyTree

from .. import inner, tree
from ..checks import one_of
from ..learner import InnerLoop, Meta
from ..losses import Loss, MixedPrecision, predictive_nll
from ..task import Batch, Model, Source, Task
from ..weights import spread
from .kernels import Kernel, Kind
from .layers import embed, flat, without_head
from .particles import nonempty


class GaussianProcessHead(InnerLoop):
    """A Gaussian process on the features of a network: exact regression of every task.

        y = g(f(x)) + ε,   g ~ GP(0, k),   ε ~ N(0, σ²)
        mean(x) = k_xS (K_SS + σ²)⁻¹ y_S,   variance(x) = k_xx − k_xS (K_SS + σ²)⁻¹ k_Sx + σ²

    where f is the model without its head and k = s² κ(‖f(x) − f(x')‖ / ℓ). Features, amplitude s,
    lengthscale ℓ and noise σ are meta-learned, through the posterior: a deep kernel (Patacchiola et
    al. 2020, arXiv:1910.05199). Adaptation is in closed form, by one Cholesky factor of the
    support; with `inner_steps`, kernel and noise first take as many steps along the support's log
    marginal likelihood, and the meta-gradient goes through these. So hyper-parameters are a task's
    own and features are shared, as in ADKF-IFT (Chen et al. 2023, arXiv:2205.02708), which fits
    them to convergence and differentiates implicitly.

    The adapted model predicts means, and by `predictive(x)` means and standard deviations of new
    targets, noise included; `evaluate` takes these for likelihood and coverage, whatever its
    `noise`. Several outputs are independent processes with one kernel.

    Everything is in units of the support's targets: with `standardise` they are brought to mean 0
    and variance 1, by the support's own, and predictions are brought back.

    Args:
        loss: of the queries, in meta-training and for reports. `adaptax.losses.predictive_nll` is
            `−log N(y; mean, variance)`; `mse` trains the mean alone.
        inner_lr: step size of the logarithms of s, ℓ and σ; see `MAML`.
        inner_steps: steps of theirs in meta-training; 0 leaves them as they are meta-learned.
        kernel: κ, `"rbf"` exp(−r²/2) or `"matern52"` (1 + √5 r + 5r²/3) exp(−√5 r).
        objective: what meta-training descends: the `"predictive"` loss of the queries, or the
            `"marginal"` likelihood of support and queries together, −log p a target.
        head: path of the head in the model, which is taken out; `None` if the model's outputs are
            the features: `adaptax.Functional((), lambda none, x: x)` is a process on the inputs.
        amplitude: s at the start.
        lengthscale: ℓ at the start, in units of the features.
        noise: σ at the start.
        standardise: see above.
        jitter: added to the diagonal of K, in units of s²; if `None`, ten times the precision of
            its numbers a row.
        eval_steps: steps that `adapt` takes; as many as in training if `None`.
        first_order: take inner gradients for constants.

    Raises:
        ValueError: for numbers that are not positive, names that are not known, or a loss in mixed
            precision; in `init`, if there is no layer at `head`.
    """

    title = "deep-kernel Gaussian process"
    loss: Loss = eqx.field(static=True, default=predictive_nll)
    inner_lr: inner.Rate = 0.1
    inner_steps: int = eqx.field(static=True, default=0)
    _: KW_ONLY
    kernel: Kind = eqx.field(static=True, default="rbf")
    objective: Literal["predictive", "marginal"] = eqx.field(static=True, default="predictive")
    head: str | None = eqx.field(static=True, default="head")
    amplitude: float = eqx.field(static=True, default=1.0)
    lengthscale: float = eqx.field(static=True, default=1.0)
    noise: float = eqx.field(static=True, default=0.1)
    standardise: bool = eqx.field(static=True, default=True)
    jitter: float | None = eqx.field(static=True, default=None)
    eval_steps: int | None = eqx.field(static=True, default=None)
    first_order: bool = eqx.field(static=True, default=False)

    def __check_init__(self) -> None:
        one_of(self, kernel=("rbf", "matern52"), objective=("predictive", "marginal"))
        for name in ("amplitude", "lengthscale", "noise"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is above 0, not {getattr(self, name)}")
        if self.jitter is not None and not self.jitter >= 0:
            raise ValueError(f"jitter is 0 or more, not {self.jitter}")
        if isinstance(self.loss, MixedPrecision):
            raise ValueError(
                "a Gaussian process solves linear equations, which half precision is too coarse "
                "for; give it a loss without MixedPrecision"
            )

    def init(self, model: Model, *, key: PRNGKeyArray) -> Meta:
        """Return `{"model": the model without its head, "kernel": s, ℓ and σ as logarithms}`.

        Args:
            model: any; also the meta-parameters of a trained `MAML` or of this learner.
            key: not used.
        """
        given = model if isinstance(model, dict) and "model" in model else {"model": model}
        start = Kernel(self.kernel, self.amplitude, self.lengthscale, self.noise)
        return {
            "model": without_head(given["model"], self.head),
            "kernel": given.get("kernel", start),
        }

    def course(
        self, meta: Meta, support: Source, *, key: PRNGKeyArray, steps: int, keep_path: bool = False
    ) -> Model:
        """Return the posterior after `steps` steps of the hyper-parameters, or all on the way."""
        draw_key, key = jax.random.split(key)
        batch = nonempty(support, "support").draw(meta["model"], draw_key)
        data = Data.of(embed(meta["model"], batch), batch)
        if self.standardise:
            data = data.standardised()
        kernel = self._fitted(meta["kernel"], data, key, steps, keep_path)
        posterior = lambda kernel: self._posterior(meta["model"], kernel, data)  # noqa: E731
        return eqx.filter_vmap(posterior)(kernel) if keep_path else posterior(kernel)

    def meta_loss(
        self, meta: Meta, task: Task, *, key: PRNGKeyArray, progress: float | Array = 1.0
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """Return the loss of the queries, or `−log p(y_S, y_Q)` a target; and s, ℓ and σ."""
        adapt_key, query_key = jax.random.split(key)
        model = self.course(meta, task.support, key=adapt_key, steps=self.inner_steps)
        query = task.query.draw(model, query_key)
        if self.objective == "predictive":
            return self.loss(model, query), meta["kernel"].metrics()
        more = Data.of(embed(meta["model"], query), query)
        every = model.data.joined(more)
        return evidence(model.kernel, every, self.jitter), meta["kernel"].metrics()

    def part_of(self, path: str, meta: Meta) -> str | None:
        """Return the path in the model; the kernel belongs to no leaf of it."""
        first, _, rest = path.partition("/")
        return rest if first == "model" and rest else None

    def _fitted(
        self, kernel: Kernel, data: Data, key: PRNGKeyArray, steps: int, keep_path: bool
    ) -> Kernel:
        return inner.descend(
            lambda kernel, batch: evidence(kernel, batch.x, self.jitter),
            kernel,
            Batch(data, data.y),
            key=key,
            steps=steps,
            lr=self.inner_lr,
            first_order=self.first_order,
            keep_path=keep_path,
        )

    def _posterior(self, body: Model, kernel: Kernel, data: Data) -> GaussianProcess:
        lower, weights = solved(kernel, data, self.jitter)
        return GaussianProcess(body, kernel, data, lower, weights)


class Data(eqx.Module):
    """Features and targets of a support, in groups of outputs that have the same examples.

    Args:
        x: features, `(n, features)`.
        y: targets, `(groups, n, outputs)`, less `shift` and over `scale`.
        weight: what each example counts, `(groups, n)`: its noise has variance σ²/weight, and one
            of weight 0 is not there.
        shift: of every output, `(groups, 1, outputs)`.
        scale: likewise.
        shape: of the targets of an example.
    """

    x: Float[Array, "n features"]
    y: Float[Array, "groups n outputs"]
    weight: Float[Array, "groups n"]
    shift: Float[Array, "groups 1 outputs"]
    scale: Float[Array, "groups 1 outputs"]
    shape: tuple[int, ...] = eqx.field(static=True)

    @classmethod
    def of(cls, features: Float[Array, "n features"], batch: Batch) -> Data:
        """Return the data of a batch.

        Raises:
            ValueError: if its targets are not numbers.
        """
        if batch.y is None or not jnp.issubdtype(batch.y.dtype, jnp.floating):
            what = "none" if batch.y is None else batch.y.dtype
            raise ValueError(
                f"a Gaussian process wants targets that are numbers, not {what}; for classes use "
                "another learner, such as PrototypicalNetwork"
            )
        kind = jnp.result_type(features, tree.wide(batch.y))
        n, shape = len(batch.y), batch.y.shape[1:]
        y, weight = batch.y.astype(kind).reshape(1, n, -1), batch.weight
        if weight is not None and weight.ndim > 1:
            # Gaps are of single targets: every output has examples of its own.
            weight, y = spread(weight, batch.y).reshape(n, -1).T, y.transpose(2, 1, 0)
        weight = jnp.ones((1, n), kind) if weight is None else weight.astype(kind).reshape(-1, n)
        # What is not there may hold anything.
        y = jnp.where(weight[..., None] > 0, y, 0)
        features = jnp.where(jnp.any(weight > 0, axis=0)[:, None], features, 0)
        one = jnp.ones((len(y), 1, y.shape[2]), kind)
        return cls(features.astype(kind), y, weight, 0 * one, one, shape)

    def standardised(self) -> Data:
        """Return the data with targets of mean 0 and variance 1, or 0 where all are equal."""
        weight = self.weight[..., None]
        count = jnp.maximum(jnp.sum(weight, axis=1, keepdims=True), jnp.finfo(weight.dtype).tiny)
        mean = jnp.sum(weight * self.y, axis=1, keepdims=True) / count
        rest = jnp.where(weight > 0, self.y - mean, 0)
        variance = jnp.sum(weight * rest**2, axis=1, keepdims=True) / count
        # Of targets that are equal but for rounding the unit stays.
        some = variance > jnp.finfo(weight.dtype).eps ** 2 * 100 * (mean**2)
        scale = jnp.sqrt(jnp.where(some & (variance > 0), variance, 1))
        return eqx.tree_at(lambda d: (d.y, d.shift, d.scale), self, (rest / scale, mean, scale))

    def joined(self, other: Data) -> Data:
        """Return the examples of both, in the units of the first."""
        y = jnp.where(other.weight[..., None] > 0, (other.y - self.shift) / self.scale, 0)
        new = (
            jnp.concatenate([self.x, other.x]),
            jnp.concatenate([self.y, y], axis=1),
            jnp.concatenate([self.weight, other.weight], axis=1),
        )
        return eqx.tree_at(lambda d: (d.x, d.y, d.weight), self, new)


class GaussianProcess(eqx.Module):
    """The posterior of a task: a model that predicts means and standard deviations.

    Args:
        body: gives features.
        kernel: of the process, and the noise.
        data: of the support.
        lower: Cholesky factor of `K + σ²`, `(groups, n, n)`.
        weights: `(K + σ²)⁻¹ y`, `(groups, n, outputs)`.
    """

    body: Model
    kernel: Kernel
    data: Data
    lower: Float[Array, "groups n n"]
    weights: Float[Array, "groups n outputs"]

    def is_state(self, path: str) -> bool:
        """Whether a leaf is no parameter: what is known of the support."""
        return path.split("/")[0] in ("data", "lower", "weights")

    def __call__(self, x: PyTree) -> Array:
        """Return the posterior mean, of the shape of the targets."""
        cross = self._cross(flat(self.body(x)))
        return self._mean(cross)

    def predictive(self, x: PyTree) -> tuple[Array, Array]:
        """Return mean and standard deviation of new targets, noise included."""
        cross = self._cross(flat(self.body(x)))
        half = jax.vmap(lambda lower, k: jax.scipy.linalg.solve_triangular(lower, k, lower=True))(
            self.lower, cross
        )
        known = jnp.sum(half**2, axis=1)
        prior = jnp.exp(2 * self.kernel.log_amplitude)
        # Rounding may leave less than nothing of what is known well.
        variance = jnp.maximum(prior - known, 0) + self.kernel.noise_variance
        deviation = jnp.sqrt(variance)[..., None] * self.data.scale
        return self._mean(cross), self._targets(deviation)

    def _cross(self, features: Float[Array, "m features"]) -> Float[Array, "groups n m"]:
        """Return the covariance with the support, 0 with what is not there."""
        k = self.kernel(self.data.x, features.astype(self.data.x.dtype))
        return jnp.where(self.data.weight[..., None] > 0, k, 0)

    def _mean(self, cross: Float[Array, "groups n m"]) -> Array:
        mean = jnp.einsum("gnm,gno->gmo", cross, self.weights, precision="highest")
        return self._targets(mean * self.data.scale + self.data.shift)

    def _targets(self, each: Float[Array, "groups m outputs"]) -> Array:
        """Return values in the shape of the targets."""
        return jnp.moveaxis(each, 0, 1).reshape(each.shape[1], *self.data.shape)


def solved(
    kernel: Kernel, data: Data, jitter: float | None
) -> tuple[Float[Array, "groups n n"], Float[Array, "groups n outputs"]]:
    """Return the Cholesky factor of `K + σ²` and `(K + σ²)⁻¹ y`.

    Rows and columns of examples that are not there are those of the identity.
    """
    covariance, amplitude2 = kernel(data.x, data.x), jnp.exp(2 * kernel.log_amplitude)

    def group(
        there: Bool[Array, " n"], weight: Float[Array, " n"], y: Float[Array, "n outputs"]
    ) -> tuple[Array, Array]:
        count = jnp.sum(there)
        extra = 10 * jnp.finfo(y.dtype).eps * count if jitter is None else jitter
        noise = kernel.noise_variance / jnp.where(there, weight, 1) + extra * amplitude2
        k = jnp.where(there[:, None] & there, covariance, 0)
        lower = jnp.linalg.cholesky(k + jnp.diag(jnp.where(there, noise, 1)))
        return lower, jax.scipy.linalg.cho_solve((lower, True), y)

    lower, weights = jax.vmap(group)(data.weight > 0, data.weight, data.y)
    return lower, weights


def evidence(kernel: Kernel, data: Data, jitter: float | None = None) -> Float[Array, ""]:
    """Return `−log p(y)` a target, in nats and in the units that the targets came in.

        −log p(y) = ½ yᵀ (K + σ²)⁻¹ y + Σ_i log L_ii + n/2 log 2π,   L the Cholesky factor

    Args:
        kernel: of the process, and the noise.
        data: features and targets.
        jitter: as in `GaussianProcessHead`.
    """
    lower, weights = solved(kernel, data, jitter)
    outputs = data.y.shape[2]
    fit = jnp.sum(data.y * weights) / 2
    volume = outputs * jnp.sum(jnp.log(jnp.diagonal(lower, axis1=1, axis2=2)))
    there = jnp.sum(data.weight > 0, axis=1)
    count = outputs * jnp.sum(there)
    units = jnp.sum(there[:, None, None] * jnp.log(data.scale))
    return (fit + volume + units) / jnp.maximum(count, 1) + math.log(2 * math.pi) / 2

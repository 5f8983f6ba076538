"""Probabilistic MAML, PLATIPUS (Finn, Xu & Levine 2018, arXiv:1806.02817)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import KW_ONLY
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from .. import inner, tree
from ..learner import Ensemble, Meta, MetaLearner
from ..losses import Loss
from ..task import Model, Source, Task
from .particles import nonempty

Weight = float | int | Callable[[Any], Any]
"""A number, or a schedule from the progress of meta-training, in [0, 1], to one."""


class ProbabilisticMAML(MetaLearner):
    """PLATIPUS: MAML whose initialisation is a distribution, so that adaptation is by samples.

        prior      p(θ | S) = N(μ − γ_p ∘ ∇L_S(μ), σ²)
        inference  q(θ | Q) = N(μ − γ_q ∘ ∇L_Q(μ), v)
        meta-loss  L_Q(U_k(θ; S)) + w KL(q ‖ p),   θ ~ q by reparameterisation, one draw a task
        adapt      U_k(θ_m; S),   θ_m ~ p(θ | S),   m = 1 … M

    minimised over μ, σ², v, γ_p and γ_q. The variances are diagonal and kept as logarithms, so
    they stay positive; the rates γ may change sign. Where several support sets fit, the samples of
    p differ, and so do the adapted models. With `KL = ½ Σ [log(σ²/v) + (v + Δ²)/σ² − 1]`, Δ the
    difference of the means.

    It trains slowly. Users start it from a trained MAML: give its meta-parameters as `init_from`,
    or for the model, `adaptax.fit(learner, maml_result.meta, ...)`; those of `MetaSGD` do as well.

    The loss stands for −log p. Its scale against the KL, which is a sum over parameters, is that of
    `kl_weight`: on a mean loss a weight of w is one of n·w on the sum over n examples.

    Unverified. No code was ever released, and the paper's text was not at hand: the equations are
    rebuilt from a third party's code and from memory. In doubt are: that γ_p and γ_q hold a rate
    for each parameter; one gradient step in each mean (from settings quoted elsewhere); one draw
    of θ a task; the initial values, which are third parties'; the weight of the KL, for which 0.1
    and 1.5 are quoted; and whether the likelihood is summed. What is not adapted (`adapt_only`)
    has no distribution here, and is meta-learned as a point.

    Args:
        loss: of all the loops; `−log p`, by any reduction.
        inner_lr: step size α of adaptation; see `MAML`.
        inner_steps: k, in meta-training.
        samples: M, the models that `adapt` gives.
        kl_weight: w, or a schedule of it over the progress of meta-training. With the number 0
            the prior is left out: neither σ² nor γ_p is trained.
        prior_variance: σ² at the start, in squared units of the parameters.
        inference_variance: v at the start.
        prior_lr: γ_p at the start; 0 or more.
        inference_lr: γ_q at the start; 0 or more.
        rates: γ_p and γ_q hold a rate for each `"parameter"`, each `"tensor"`, or one (`"scalar"`).
        conditioning_steps: gradient steps from μ to the means of prior and inference.
        eval_steps: steps that `adapt` takes; as many as in training if `None`.
        first_order: take every gradient inside the meta-loss for a constant.
        remat: recompute inner steps in the backward pass: memory for time.
        adapt_only: a predicate on leaf paths choosing what is adapted, and random.
        init_from: what μ starts from in place of the model that `init` is given; see there.

    Raises:
        ValueError: for a variance that is not positive, a negative rate or weight, no samples, or
            rates of an unknown kind.
    """

    loss: Loss = eqx.field(static=True)
    inner_lr: inner.Rate = 0.01
    inner_steps: int = eqx.field(static=True, default=1)
    _: KW_ONLY
    samples: int = eqx.field(static=True, default=10)
    kl_weight: Weight = eqx.field(static=True, default=0.1)
    prior_variance: float = eqx.field(static=True, default=4e-4)
    inference_variance: float = eqx.field(static=True, default=4e-4)
    prior_lr: float = eqx.field(static=True, default=0.01)
    inference_lr: float = eqx.field(static=True, default=0.01)
    rates: str = eqx.field(static=True, default="parameter")
    conditioning_steps: int = eqx.field(static=True, default=1)
    eval_steps: int | None = eqx.field(static=True, default=None)
    first_order: bool = eqx.field(static=True, default=False)
    remat: bool = eqx.field(static=True, default=False)
    adapt_only: tree.Predicate | None = eqx.field(static=True, default=None)
    init_from: Model | Meta | None = None

    def __check_init__(self) -> None:
        for name in ("prior_variance", "inference_variance"):
            if not getattr(self, name) > 0:
                raise ValueError(
                    f"{name} is a variance to start from, above 0, not {getattr(self, name)}"
                )
        for name in ("prior_lr", "inference_lr", "kl_weight"):
            value = getattr(self, name)
            if not callable(value) and not value >= 0:
                raise ValueError(f"{name} is 0 or more, not {value}")
        if self.samples < 1:
            raise ValueError(f"samples is 1 or more, not {self.samples}")
        if self.rates not in ("parameter", "tensor", "scalar"):
            raise ValueError(f'rates is "parameter", "tensor" or "scalar", not {self.rates!r}')

    def init(self, model: Model, *, key: PRNGKeyArray) -> Meta:
        """The mean and, for what is adapted, log-variances and rates, in a dict.

        Args:
            model: where μ starts: any model, so also the meta-parameters of a trained MAML; those
                of `MetaSGD`, whose rates are dropped; or those of this learner, to continue.
            key: not used.
        """
        model = model if self.init_from is None else self.init_from
        if isinstance(model, dict) and "mean" in model:
            return model
        mean = model["model"] if isinstance(model, dict) and "model" in model else model
        if not callable(mean):
            raise ValueError(
                f"PLATIPUS starts from a model, and was given a {type(mean).__name__} that cannot "
                "be called; give it a model or the meta-parameters of a trained MAML"
            )
        random = eqx.filter(mean, tree.adaptable(mean, self.adapt_only))
        return {
            "mean": mean,
            "log_prior_variance": tree.full_like(random, math.log(self.prior_variance)),
            "log_inference_variance": tree.full_like(random, math.log(self.inference_variance)),
            "prior_lr": self._rates(random, self.prior_lr),
            "inference_lr": self._rates(random, self.inference_lr),
        }

    def adapt(self, meta: Meta, support: Source, *, key: PRNGKeyArray) -> Model:
        """An `Ensemble` of `samples` models, each a draw from the prior, adapted."""
        return self._draws(meta, support, key, self._eval_steps, keep_path=False)

    def iterates(
        self, meta: Meta, support: Source, *, key: PRNGKeyArray, steps: int | None = None
    ) -> Model:
        """The ensembles after 0, 1, … `steps` (by default `eval_steps`) steps.

        Before the first step they are draws from the prior, whose mean has seen the support.
        """
        steps = self._eval_steps if steps is None else steps
        return self._draws(meta, support, key, steps, keep_path=True)

    def meta_loss(
        self, meta: Meta, task: Task, *, key: PRNGKeyArray, progress: float | Array = 1.0
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """`L_Q(U_k(θ; S)) + w KL(q ‖ p)`, and its two parts, `query_loss` and `kl`."""
        return self._objective(meta, meta, task, key, progress)

    def reference(
        self, meta: Meta, task: Task, *, at: Meta, key: PRNGKeyArray, progress: float | Array = 1.0
    ) -> Float[Array, ""]:
        """The meta-loss; to first order with every gradient inside it computed from `at`."""
        return self._objective(meta, at if self.first_order else meta, task, key, progress)[0]

    def part_of(self, path: str, meta: Meta) -> str | None:
        """What follows the name of the part; nothing where one rate is for all."""
        return path.partition("/")[2] or None

    def describe(self) -> dict[str, Any]:
        """Name, steps, rate, samples and weight of the KL."""
        return {
            "algorithm": "PLATIPUS",
            "inner_steps": self.inner_steps,
            "eval_steps": self._eval_steps,
            "inner_lr": self.inner_lr if isinstance(self.inner_lr, float) else "given",
            "kl_weight": "schedule" if callable(self.kl_weight) else self.kl_weight,
            "rates": self.rates,
            "first_order": self.first_order,
        }

    @property
    def _eval_steps(self) -> int:
        return self.inner_steps if self.eval_steps is None else self.eval_steps

    def _objective(
        self, meta: Meta, at: Meta, task: Task, key: PRNGKeyArray, progress: float | Array
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """The meta-loss of `meta`, gradients inside it computed from `at`."""
        prior_key, inference_key, noise_key, adapt_key, query_key = jax.random.split(key, 5)
        support, query = nonempty(task.support, "support"), nonempty(task.query, "query")
        slope = self._slope(at, query, "inference_lr", inference_key)
        inferred, there = (_moved(m, "inference_lr", slope) for m in (meta, at))
        noise = tree.noise_like(noise_key, meta["log_inference_variance"])
        theta = _sample(inferred, meta["log_inference_variance"], noise)
        start = _sample(there, at["log_inference_variance"], noise)
        model = self._descend(start, support, adapt_key, self.inner_steps).model
        model = tree.shift(model, theta, start)
        loss = self.loss(model, query.draw(model, query_key))
        if not callable(self.kl_weight) and self.kl_weight == 0:
            return loss, {"query_loss": loss}
        slope = self._slope(at, support, "prior_lr", prior_key)
        kl = _kl(
            inferred, meta["log_inference_variance"],
            _moved(meta, "prior_lr", slope), meta["log_prior_variance"],
        )  # fmt: skip
        weight = self.kl_weight(progress) if callable(self.kl_weight) else self.kl_weight
        return loss + weight * kl, {"query_loss": loss, "kl": kl}

    def _draws(
        self, meta: Meta, support: Source, key: PRNGKeyArray, steps: int, keep_path: bool
    ) -> Ensemble:
        """Draws from the prior that knows the support, adapted; or their paths."""
        prior_key, noise_key, adapt_key = jax.random.split(key, 3)
        slope = self._slope(meta, nonempty(support, "support"), "prior_lr", prior_key)
        mean, log_variance = _moved(meta, "prior_lr", slope), meta["log_prior_variance"]

        def draw(key: PRNGKeyArray) -> Model:
            theta = _sample(mean, log_variance, tree.noise_like(key, log_variance))
            end = self._descend(theta, support, adapt_key, steps, keep_path=keep_path)
            return end.path if keep_path else end.model

        keys = jax.random.split(noise_key, self.samples)
        # The axis of steps comes first.
        return Ensemble(eqx.filter_vmap(draw, out_axes=eqx.if_array(int(keep_path)))(keys))

    def _slope(self, meta: Meta, source: Source, rate: str, key: PRNGKeyArray) -> PyTree:
        """The gradients of `conditioning_steps` steps from μ, summed: `Σ_j ∇L(μ_j)`."""
        rule = optax.GradientTransformation(
            lambda params: jax.tree.map(jnp.zeros_like, params),
            lambda g, total, params: (_step(meta[rate], g), jax.tree.map(jnp.add, total, g)),
        )
        return inner.run(
            self.loss, meta["mean"], source, key=key, steps=self.conditioning_steps, optimizer=rule,
            first_order=self.first_order, remat=self.remat, adapt_only=self.adapt_only,
        ).state  # fmt: skip

    def _descend(
        self, model: Model, support: Source, key: PRNGKeyArray, steps: int, **how: Any
    ) -> inner.Descent:
        return inner.run(
            self.loss,
            model,
            support,
            key=key,
            steps=steps,
            lr=self.inner_lr,
            first_order=self.first_order,
            remat=self.remat,
            adapt_only=self.adapt_only,
            **how,
        )

    def _rates(self, random: PyTree, start: float) -> PyTree:
        match self.rates:
            case "parameter":
                return tree.full_like(random, start)
            case "tensor":
                return jax.tree.map(lambda leaf: jnp.asarray(start, leaf.dtype), random)
        return jnp.asarray(start, jnp.result_type(*jax.tree.leaves(random)))


PLATIPUS = ProbabilisticMAML
"""`ProbabilisticMAML` under the name of its paper."""


def _step(rates: PyTree, slope: PyTree) -> PyTree:
    """`−γ ∘ g`, for one rate or a tree of them."""
    if eqx.is_array(rates):
        return jax.tree.map(lambda g: -rates * g, slope)
    return jax.tree.map(lambda rate, g: -rate * g, rates, slope)


def _moved(meta: Meta, rate: str, slope: PyTree) -> Model:
    """`μ − γ ∘ g`."""
    return eqx.apply_updates(meta["mean"], _step(meta[rate], slope))


def _sample(mean: Model, log_variance: PyTree, noise: PyTree) -> Model:
    """`mean + √variance ∘ ε`."""
    scaled = jax.tree.map(lambda s, e: jnp.exp(s / 2) * e, log_variance, noise)
    return eqx.apply_updates(mean, scaled)


def _kl(q_mean: Model, q_log: PyTree, p_mean: Model, p_log: PyTree) -> Float[Array, ""]:
    """`KL(q ‖ p)` of diagonal Gaussians over the leaves that have a variance, in nats."""

    def leaf(q_log: Array, p_log: Array, q_mean: Array, p_mean: Array) -> Array:
        q_log, p_log = tree.wide(q_log), tree.wide(p_log)
        ratio, gap = q_log - p_log, (tree.wide(q_mean) - tree.wide(p_mean)) ** 2
        return jnp.sum(jnp.expm1(ratio) - ratio + gap * jnp.exp(-p_log)) / 2

    parts = jax.tree.map(
        lambda s, *rest: None if s is None else leaf(s, *rest),
        q_log, p_log, q_mean, p_mean, is_leaf=lambda s: s is None,
    )  # fmt: skip
    return sum(jax.tree.leaves(parts), jnp.zeros(()))

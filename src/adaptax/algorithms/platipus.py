"""Probabilistic MAML, PLATIPUS (Finn, Xu & Levine 2018, arXiv:1806.02817)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import KW_ONLY
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from .. import inner, tree
from ..checks import at_least, one_of
from ..learner import Ensemble, InnerLoop, Meta
from ..losses import Loss
from ..task import Model, Source, Task
from .particles import nonempty

Weight = float | int | Callable[[Any], Any]
"""A number, or a schedule from the progress of meta-training, in [0, 1], to one."""


class ProbabilisticMAML(InnerLoop):
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
        meta_gradient: how it goes back through the inner loop; see `adaptax.modes.parse`.
        adapt_only: a predicate on leaf paths choosing what is adapted, and random.
        init_from: what μ starts from in place of the model that `init` is given; see there.

    Raises:
        ValueError: for a variance that is not positive, a negative rate or weight, no samples, or
            rates of an unknown kind.
    """

    title = "PLATIPUS"
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
    meta_gradient: str = eqx.field(static=True, default="auto")
    adapt_only: tree.Predicate | None = eqx.field(static=True, default=None)
    init_from: Model | Meta | None = None

    def __check_init__(self) -> None:
        for name in ("prior_variance", "inference_variance"):
            if not getattr(self, name) > 0:
                raise ValueError(
                    f"{name} is a variance to start from, above 0, not {getattr(self, name)}"
                )
        at_least(self, 0, "prior_lr", "inference_lr", "kl_weight")
        at_least(self, 1, "samples")
        one_of(self, rates=("parameter", "tensor", "scalar"))

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

    def course(
        self, meta: Meta, support: Source, *, key: PRNGKeyArray, steps: int, keep_path: bool = False
    ) -> Model:
        """Return an `Ensemble` of `samples` models, each a draw from the prior, adapted.

        Before the first step they are draws from the prior, whose mean has seen the support.
        """
        prior_key, noise_key, adapt_key = jax.random.split(key, 3)
        mean = self._mean(meta, nonempty(support, "support"), "prior_lr", prior_key)
        log_variance = meta["log_prior_variance"]

        def draw(key: PRNGKeyArray) -> Model:
            theta = _sample(mean, log_variance, tree.noise_like(key, log_variance))
            return self._descend(theta, support, key=adapt_key, steps=steps, keep_path=keep_path)

        keys = jax.random.split(noise_key, self.samples)
        # The axis of steps comes first.
        return Ensemble(eqx.filter_vmap(draw, out_axes=eqx.if_array(int(keep_path)))(keys))

    def meta_loss(
        self, meta: Meta, task: Task, *, key: PRNGKeyArray, progress: float | Array = 1.0
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """Return `L_Q(U_k(θ; S)) + w KL(q ‖ p)`, and its two parts, `query_loss` and `kl`."""
        prior_key, inference_key, noise_key, adapt_key, query_key = jax.random.split(key, 5)
        support, query = nonempty(task.support, "support"), nonempty(task.query, "query")
        inferred = self._mean(meta, query, "inference_lr", inference_key)
        log_v = meta["log_inference_variance"]
        theta = _sample(inferred, log_v, tree.noise_like(noise_key, log_v))
        model = self._descend(theta, support, key=adapt_key, steps=self.inner_steps)
        loss = self.loss(model, query.draw(model, query_key))
        if not callable(self.kl_weight) and self.kl_weight == 0:
            return loss, {"query_loss": loss}
        prior = self._mean(meta, support, "prior_lr", prior_key)
        kl = _kl(inferred, log_v, prior, meta["log_prior_variance"])
        weight = self.kl_weight(progress) if callable(self.kl_weight) else self.kl_weight
        return loss + weight * kl, {"query_loss": loss, "kl": kl}

    def part_of(self, path: str, meta: Meta) -> str | None:
        """What follows the name of the part; nothing where one rate is for all."""
        return path.partition("/")[2] or None

    def _mean(self, meta: Meta, source: Source, rate: str, key: PRNGKeyArray) -> Model:
        """Return `μ − γ ∘ ∇L(μ)`, or what more such steps lead to."""
        steps = self.conditioning_steps
        return self._descend(meta["mean"], source, key=key, steps=steps, lr=meta[rate])

    def _descend(self, model: Model, source: Source, **how: Any) -> Model:
        return inner.descend(
            self.loss,
            model,
            source,
            first_order=self.first_order,
            meta_gradient=self.meta_gradient,
            adapt_only=self.adapt_only,
            **{"lr": self.inner_lr, **how},
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

"""LEO, latent embedding optimisation (Rusu et al. 2019, arXiv:1807.05960)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PRNGKeyArray

from .. import inner, tree
from ..checks import at_least, one_of
from ..learner import InnerLoop, Meta
from ..losses import Loss
from ..task import Batch, Model, Source, Task
from . import leo_terms as terms
from .leo_networks import GENERATORS, Activation, Widths, all_finite

RESCUE = 1e-4
"""Weight of the decay that a task descends whose gradient is not finite."""


class LEO(InnerLoop):
    """Latent embedding optimisation: MAML in a space of codes that generate a model's weights.

        z_0 ~ q(z | S),   w ~ p(w | z)                          a code from the support, decoded
        z ← z − α ∘ ∇_z L_S(w),   w ~ p(w | z)                  `inner_steps` times
        w ← w − γ ∘ ∇_w L_S(w)                                  `finetune_steps` times
        L_Q(w) + β KL(q ‖ N(0, 1)) + ρ ‖stop(z) − z_0‖² + ½λ ‖networks‖² + ω ‖C − I‖²

    where z in the penalty is the adapted code, C are the correlations of the decoder's rows, and
    every ‖·‖² but the weights' is a mean over entries. The networks and the rates α and γ are
    meta-learned. For classification of embeddings there is a code for each class and shot; see
    `adaptax.algorithms.leo_networks.ClassCodes`. `LEORegression` generates a whole network.

        head    = adaptax.models.Linear(640, 5, key=key)    # embeddings of width 640, 5 ways
        learner = adaptax.LEO(adaptax.losses.cross_entropy)
        result  = adaptax.fit(learner, head, tasks.train, steps=100_000, meta_batch=12, key=key)

    The model says what is generated, and not where it starts. The meta-parameters do not depend on
    ways or shots: `adaptax.load` them into `init` of another head to change the ways.

    Decoded weights are drawn anew at every step; `adapt` draws nothing: codes and weights are
    means, and nothing is dropped out.

    Paper and code. The code's inner loss is a sum over the support, which is the default of
    `reduction`, and its query loss a mean; the rates are for that. σ is `exp(u) − (1 − s)`, not
    `exp(u)`, and the KL is that of the sample, `log q(z) − log p(z)`, averaged over entries. The
    paper writes the penalty on C as a 1-norm, the code as the mean square that it is here. What
    becomes of a task whose gradient is NaN, `fallback` says.

    The paper's ablations: `finetune_steps=0`, `inner_steps=0` and both (the conditional generator),
    `prior="random"`, and `stochastic=False`, where the KL, which is of the noise, goes too.

    Args:
        loss: of all the loops, a mean over examples.
        inner_lr: where the rates α start.
        inner_steps: steps in the latent space.
        finetune_lr: where the rates γ start.
        finetune_steps: steps in the space of weights.
        latent: width of a code.
        codes: a code for each `"class"` and shot, or one for the `"task"`.
        hidden: widths in the networks of `TaskCode`.
        activation: in the networks; ReLU in the paper.
        prior: codes depend on the `"data"`, or are `"random"`: in `adapt` then zero.
        stochastic: draw codes and weights in meta-training.
        dropout: rate, on the embeddings, of encoder and classifier, in meta-training.
        kl_weight: β.
        encoder_penalty: ρ.
        l2: λ, of the networks' matrices.
        orthogonality: ω.
        reduction: of the inner loss: `"sum"` multiplies it by the number of examples.
        outer_lr: of Adam.
        clip: of the gradient, by value and then by the norm of each array; `None` for neither.
        inner_clip: largest norm of what the inner loops descend, ours; `None` for any.
    """

    title = "LEO"
    loss: Loss = eqx.field(static=True)
    inner_lr: float = eqx.field(static=True, default=1.0)
    inner_steps: int = eqx.field(static=True, default=5)
    _: KW_ONLY
    finetune_lr: float = eqx.field(static=True, default=1e-3)
    finetune_steps: int = eqx.field(static=True, default=5)
    latent: int = eqx.field(static=True, default=64)
    codes: str = eqx.field(static=True, default="class")
    hidden: Widths = eqx.field(static=True, default=((16,) * 3, (32,) * 3, (32,) * 3))
    activation: Activation = eqx.field(static=True, default=jax.nn.relu)
    prior: str = eqx.field(static=True, default="data")
    stochastic: bool = eqx.field(static=True, default=True)
    dropout: float = eqx.field(static=True, default=0.5)
    kl_weight: float = eqx.field(static=True, default=1e-3)
    encoder_penalty: float = eqx.field(static=True, default=1e-9)
    l2: float = eqx.field(static=True, default=1e-8)
    orthogonality: float = eqx.field(static=True, default=1e-3)
    reduction: str = eqx.field(static=True, default="sum")
    outer_lr: float = eqx.field(static=True, default=1e-4)
    clip: float | None = eqx.field(static=True, default=0.1)
    inner_clip: float | None = eqx.field(static=True, default=None)

    def __check_init__(self) -> None:
        at_least(self, 0, "inner_steps", "finetune_steps", "kl_weight", "encoder_penalty", "l2",
                 "orthogonality")  # fmt: skip
        at_least(self, 1, "latent")
        one_of(self, codes=(*GENERATORS,), prior=("data", "random"), reduction=("sum", "mean"))
        if self.inner_clip is not None and not self.inner_clip > 0:
            raise ValueError(f"inner_clip is a norm above 0, or None, not {self.inner_clip}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is a rate in [0, 1), not {self.dropout}")

    def init(self, model: Model, *, key: PRNGKeyArray) -> Meta:
        """Return networks and rates, in a dict.

        Args:
            model: to be generated, a linear classifier, or with `codes="task"` any network; or
                meta-parameters of this learner, to continue.
            key: of the networks.
        """
        if isinstance(model, dict) and "networks" in model:
            return model
        networks = GENERATORS[self.codes](
            model, self.latent, self.prior, hidden=self.hidden, key=key,
            activation=self.activation, train_only=self.train_only,
        )  # fmt: skip
        return {
            "networks": networks,
            "inner_lr": jnp.full(self.latent, self.inner_lr),
            "finetune_lr": jnp.full(networks.rates, self.finetune_lr),
        }

    def check_support(self, meta: Meta, support: Any, *, key: PRNGKeyArray) -> None:
        """Raise for a support that is not finite, or whose classes have not equally many."""
        meta["networks"].features(support.draw(None, key))

    @property
    def steps(self) -> int:
        """Steps that `adapt` takes, in the latent space and of fine-tuning."""
        return self.inner_steps + self.finetune_steps

    def course(
        self, meta: Meta, support: Source, *, key: PRNGKeyArray, steps: int, keep_path: bool = False
    ) -> Model:
        """Return the model after `steps` steps, or those on the way; nothing is drawn.

        The first `inner_steps` of them are in the latent space, the others fine-tune. Before the
        first the model is the generator's.
        """
        networks = meta["networks"]
        found = self._course(meta, support.draw(None, key), None, steps, keep_path)
        if not keep_path:
            return networks.model(found.tuned.model)
        before = jax.vmap(lambda z: networks.decode(z, None))(found.latent.path[:-1])
        return eqx.filter_vmap(networks.model)(jnp.concatenate([before, found.tuned.path]))

    def meta_loss(
        self, meta: Meta, task: Task, *, key: PRNGKeyArray, progress: float | Array = 1.0
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """Return the objective above, and what of it depends on the task.

        Metrics: `query_loss`, `kl`, `encoder_penalty` before they are weighed, `latent_std`, the
        mean of σ, and `latent_spread`, how far the means of a task's codes are apart (their
        standard deviation; for one code its size).
        """
        networks, query = meta["networks"], task.query.draw(None, key)
        networks.check_query(query)
        found = self._course(meta, task.support.draw(None, key), key, self.steps)
        mean, std, noise, start, latent, tuned = found
        model = terms.dropping(
            networks.model(tuned.model), jax.random.fold_in(key, 1), self.dropout
        )
        loss = self.loss(model, query)
        kl = jnp.zeros(()) if noise is None else terms.sampled_kl(mean, std, noise)
        penalty = terms.encoder_penalty(start, latent.model)
        regularisers = self.l2 * terms.weight_decay(networks)
        regularisers += self.orthogonality * terms.correlation(networks.rows)
        value = loss + self.kl_weight * kl + self.encoder_penalty * penalty + regularisers
        metrics = {"query_loss": loss, "kl": kl, "encoder_penalty": penalty}
        spread = jnp.mean(networks.apart(mean))
        return value, {**metrics, "latent_std": jnp.mean(std), "latent_spread": spread}

    def fallback(self, meta: Meta, task: Task, *, key: PRNGKeyArray) -> Array:
        """Return `10⁻⁴ · ½‖networks‖²`; NaN where the data of the task are not finite.

        The code means to descend it, for the whole meta-batch, and by an exchange of names
        descends along the parameters themselves.
        """
        networks = meta["networks"]
        features = networks.features(task.support.draw(None, key))
        usable = all_finite(features, task.query.draw(None, key).x)
        half = tree.squared_distance(networks, tree.full_like(networks, 0.0)) / 2
        return jnp.where(usable, RESCUE * half, jnp.nan)

    def optimizer(self, steps: int) -> optax.GradientTransformation:
        """Return Adam after both clips.

        With `codes="task"` the steps of the rates are in units of where the rates start: others
        take those of fine-tuning, which start small, from there to where all of them diverge.
        """
        limit = self.clip
        clips = [] if limit is None else [optax.clip(limit), terms.clip_each_by_norm(limit)]
        units = {"inner_lr": self.inner_lr, "finetune_lr": self.finetune_lr}
        own = [terms.scaled(units)] if GENERATORS[self.codes].scaled else []
        return optax.chain(*clips, optax.adam(self.outer_lr), *own)

    def collapsed(self, metrics: Mapping[str, Any]) -> str | None:
        """Return a sentence if metrics, or a record of `fit`, say that the latent has collapsed.

        Either the codes coincide, so that they say nothing of the support, or their noise is gone,
        so that the KL has no hold on them, and not by choice. The command line says it; for `fit`:

            watch=lambda record: print(learner.collapsed(record) or "")
        """
        random, points = self.prior == "random", not self.stochastic
        return terms.collapse(metrics, GENERATORS[self.codes].alike, random=random, points=points)

    def part_of(self, path: str, meta: Meta) -> str | None:
        """None: what `train_only` leaves out is not generated, and stays that of the model."""
        return None

    def _course(
        self,
        meta: Meta,
        batch: Batch,
        key: PRNGKeyArray | None,
        steps: int,
        keep_path: bool = False,
    ) -> terms.Course:
        """Both inner loops on a support; without a key nothing is random."""
        networks = meta["networks"]
        features = networks.features(batch)
        keys: Any = [None] * 6 if key is None else jax.random.split(key, 6)
        for_code, for_weights, for_encoder, for_latent, for_tuning, _ = keys
        drawing = key is not None and self.stochastic
        first = min(steps, self.inner_steps)

        def loss(model: Model, batch: Batch) -> Float[Array, ""]:
            return self.loss(model, batch) * (batch.count if self.reduction == "sum" else 1)

        def decode(z: Array, step: Any) -> Array:
            noise = networks.noise(jax.random.fold_in(for_weights, step), z) if drawing else None
            return networks.decode(z, noise)

        def descend(start: Array, count: int, rates: Array, own: Any, weights: Any) -> Any:
            def view(now: Array, step: Any) -> Model:
                pass_key = None if own is None else jax.random.fold_in(own, step)
                return terms.dropping(networks.model(weights(now, step)), pass_key, self.dropout)

            # Batches do not depend on the key of the draws.
            return inner.run(
                loss, start, batch, key=jax.random.key(0), steps=count, view=view,
                optimizer=optax.chain(terms.bounded(self.inner_clip), inner.sgd(rates)),
                keep_path=keep_path,
            )  # fmt: skip

        seen = terms.dropped(features, for_encoder, self.dropout)
        mean, std = networks.encode(seen, None if batch.weight is None else batch.present)
        noise = jax.random.normal(for_code, mean.shape, mean.dtype) if drawing else None
        start = mean if noise is None else mean + std * noise
        latent = descend(start, first, meta["inner_lr"], for_latent, decode)
        rates = networks.step(meta["finetune_lr"], features)
        drawn = decode(latent.model, first)
        tuned = descend(drawn, steps - first, rates, for_tuning, lambda weights, step: weights)
        return terms.Course(mean, std, noise, start, latent, tuned)

"""LEO, latent embedding optimisation (Rusu et al. 2019, arXiv:1807.05960)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from .. import inner, roles
from ..learner import Meta, MetaLearner
from ..losses import Loss
from ..task import Batch, Model, Source, Task
from .leo_networks import (
    Activation,
    ClassCodes,
    Gaussian,
    TaskCode,
    all_finite,
    check_embeddings,
)
from .leo_terms import (
    bounded,
    clip_each_by_norm,
    correlation,
    dropped,
    dropping,
    encoder_penalty,
    rescue,
    sampled_kl,
    weight_decay,
)

PAPER: dict[str, dict[str, float]] = {
    cell: dict(zip(("outer_lr", "l2", "orthogonality", "dropout", "kl_weight", "encoder_penalty"),
                   values, strict=True))
    for cell, values in {
        "mini_imagenet 5w1s": (2.739071e-4, 3.623413e-10, .188103, .307651, .756143, 5.756821e-6),
        "mini_imagenet 5w5s": (4.102361e-4, 8.540338e-9, 1.523998e-3, .300299, .466387,
                               2.661608e-7),
        "tiered_imagenet 5w1s": (8.659053e-4, 4.148858e-10, 5.451078e-3, .475126, 2.034189e-3,
                                 8.302962e-5),
        "tiered_imagenet 5w5s": (6.110314e-4, 1.690399e-10, 2.481216e-2, .415158, 1.622811,
                                 2.672450e-5),
    }.items()
}  # fmt: skip
"""Arguments of `LEO` for the four cells of the paper's tables, as its code tuned them:
`LEO(loss, **PAPER["mini_imagenet 5w1s"])`."""

COLLAPSED = 1e-6
"""Standard deviations below which `LEO.collapsed` speaks."""


class Course(NamedTuple):
    """What happens to a support set: codes and weights, with a leading axis of steps if kept."""

    prior: Gaussian
    noise: Float[Array, ...] | None
    start: Float[Array, ...]
    code: Float[Array, ...]
    weights: Float[Array, ...]


class LEO(MetaLearner):
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
    paper writes the penalty on C as a 1-norm, the code as the mean square that it is here. Where
    the loss or its gradient is NaN the code means to descend `10⁻⁴ · ½‖networks‖²` instead, and
    by an exchange of names descends along the parameters themselves; here it is what was meant,
    for the task concerned instead of the whole meta-batch, and unless its data are NaN: the metric
    `rescued` is how often.

    The ablations of the paper: `finetune_steps=0` (no fine-tuning), `stochastic=False`
    (deterministic; the KL, which is of the noise, goes too), `prior="random"` (a code that does
    not know the support), `inner_steps=0` (conditional generator and fine-tuning), and with
    `finetune_steps=0` the conditional generator only.

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
        dropout: rate, on the embeddings wherever they enter in meta-training: encoder and
            classifier.
        kl_weight: β.
        encoder_penalty: ρ.
        l2: λ, of the networks' matrices.
        orthogonality: ω.
        reduction: of the inner loss over the support: `"sum"` multiplies the loss by the number
            of examples.
        outer_lr: of Adam.
        clip: of the gradient, by value and then by the norm of each array; `None` for neither.
        inner_clip: largest norm of what the inner loops descend, ours; `None` for any.

    Raises:
        ValueError: for arguments out of range.
    """

    loss: Loss = eqx.field(static=True)
    inner_lr: float = eqx.field(static=True, default=1.0)
    inner_steps: int = eqx.field(static=True, default=5)
    _: KW_ONLY
    finetune_lr: float = eqx.field(static=True, default=1e-3)
    finetune_steps: int = eqx.field(static=True, default=5)
    latent: int = eqx.field(static=True, default=64)
    codes: str = eqx.field(static=True, default="class")
    hidden: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]] = eqx.field(
        static=True, default=((16,) * 3, (32,) * 3, (32,) * 3)
    )
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
        for name in ("inner_steps", "finetune_steps", "kl_weight", "encoder_penalty", "l2",
                     "orthogonality"):  # fmt: skip
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} is 0 or more, not {getattr(self, name)}")
        if self.inner_clip is not None and not self.inner_clip > 0:
            raise ValueError(f"inner_clip is a norm above 0, or None, not {self.inner_clip}")
        if self.latent < 1:
            raise ValueError(f"latent, the width of a code, is 1 or more, not {self.latent}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is a rate in [0, 1), not {self.dropout}")
        for name, choices in (("codes", ("class", "task")), ("prior", ("data", "random")),
                              ("reduction", ("sum", "mean"))):  # fmt: skip
            if getattr(self, name) not in choices:
                raise ValueError(
                    f'{name} is "{choices[0]}" or "{choices[1]}", not {getattr(self, name)!r}'
                )

    def init(self, model: Model, *, key: PRNGKeyArray) -> Meta:
        """Networks and rates, in a dict.

        Args:
            model: what is to be generated: a linear classifier, or with `codes="task"` any
                network. Or meta-parameters of this learner, to continue.
            key: of the networks.
        """
        if isinstance(model, dict) and "networks" in model:
            return model
        how: dict[str, Any] = {"activation": self.activation, "train_only": self.train_only}
        networks: ClassCodes | TaskCode
        if self.codes == "class":
            networks = ClassCodes(model, self.latent, self.prior, key=key, **how)
        else:
            networks = TaskCode(model, self.latent, self.prior, self.hidden, key=key, **how)
        return {
            "networks": networks,
            "inner_lr": jnp.full(self.latent, self.inner_lr),
            "finetune_lr": jnp.full(networks.rates, self.finetune_lr),
        }

    def check_support(self, meta: Meta, support: Any, *, key: PRNGKeyArray) -> None:
        """Raise for a support that is not finite, or whose classes have not equally many."""
        meta["networks"].features(support.draw(None, key))

    def adapt(self, meta: Meta, support: Source, *, key: PRNGKeyArray) -> Model:
        """The model after all steps; nothing is drawn."""
        batch = support.draw(None, key)
        features = meta["networks"].features(batch)
        course = self._course(meta, features, batch, None, self._steps)
        return meta["networks"].model(course.weights)

    def iterates(
        self, meta: Meta, support: Source, *, key: PRNGKeyArray, steps: int | None = None
    ) -> Model:
        """The models after 0, 1, … `steps` steps, by default all; 0 is the generator's.

        The first `inner_steps` of them are in the latent space, the others fine-tune.
        """
        batch, networks = support.draw(None, key), meta["networks"]
        steps = sum(self._steps) if steps is None else steps
        latent = min(steps, self.inner_steps)
        course = self._course(
            meta, networks.features(batch), batch, None, (latent, steps - latent), keep_path=True
        )
        return eqx.filter_vmap(networks.model)(course.weights)

    def meta_loss(
        self, meta: Meta, task: Task, *, key: PRNGKeyArray, progress: float | Array = 1.0
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """The objective above, and what of it depends on the task.

        Metrics: `query_loss`, `kl`, `encoder_penalty` before they are weighed, `latent_std`, the
        mean of σ, `latent_spread`, how far the means of a task's codes are apart (their standard
        deviation; for one code its size), and `rescued`, the fraction of tasks whose gradient was
        not finite.
        """
        return rescue(self._objective, meta, task, key)

    def reference(
        self, meta: Meta, task: Task, *, at: Meta, key: PRNGKeyArray, progress: float | Array = 1.0
    ) -> Float[Array, ""]:
        """The meta-loss, the adapted code of the encoder's penalty computed from `at`."""
        support = task.support.draw(None, key)
        features = at["networks"].features(support)
        end = self._course(at, features, support, key, self._steps).code
        return self._objective(meta, task, key, end)[0]

    def optimizer(self, steps: int) -> optax.GradientTransformation:
        """Adam after both clips.

        With `codes="task"` the steps of the rates are in units of where the rates start: others
        take those of fine-tuning, which start small, from there to where all of them diverge.
        """
        rules = []
        if self.clip is not None:
            rules = [optax.clip(self.clip), clip_each_by_norm(self.clip)]
        rules.append(optax.adam(self.outer_lr))
        if self.codes == "task":
            units = {"networks": 1.0, "inner_lr": self.inner_lr, "finetune_lr": self.finetune_lr}

            def scaled(updates: Meta, _: Any) -> Meta:
                return {name: optax.tree.scale(units[name], part) for name, part in updates.items()}

            rules.append(optax.stateless(scaled))
        return optax.chain(*rules)

    def describe(self) -> dict[str, Any]:
        """Name, steps, rates, and the ablations."""
        return {
            "algorithm": "LEO",
            "inner_steps": self.inner_steps,
            "finetune_steps": self.finetune_steps,
            "inner_lr": "learned",
            "latent": self.latent,
            "codes": self.codes,
            "prior": self.prior,
            "stochastic": self.stochastic,
        }

    def collapsed(self, metrics: Mapping[str, Any]) -> str | None:
        """A sentence if the latent has collapsed, else `None`.

        Either the codes coincide, so that they say nothing of the support, or their noise is gone,
        so that the KL, which holds them near the prior, has no hold. A random prior and a
        deterministic code are so by choice. The command line says it; for `fit`:

            watch=lambda record: print(learner.collapsed(record) or "")

        Args:
            metrics: of `meta_loss`, or a record of `fit`'s history.
        """
        spread, std = (float(metrics.get(name, 1)) for name in ("latent_spread", "latent_std"))
        if spread < COLLAPSED and self.prior == "data":
            which = "the codes of different classes are" if self.codes == "class" else "all codes"
            apart = f"{spread:.1e} apart" if self.codes == "class" else f"are within {spread:.1e}"
            return (
                f"LEO's latent has collapsed: {which} {apart} and say nothing of the support; "
                "lower kl_weight or the outer step size"
            )
        if std < COLLAPSED and self.stochastic:
            return (
                f"LEO's latent has collapsed: the noise of its codes is {std:.1e}, so they are "
                "points; raise kl_weight, or say stochastic=False if that is wanted"
            )
        return None

    def part_of(self, path: str, meta: Meta) -> str | None:
        """None: what `train_only` leaves out is not generated, and stays that of the model."""
        return None

    @property
    def _steps(self) -> tuple[int, int]:
        return self.inner_steps, self.finetune_steps

    def _course(
        self, meta: Meta, features: Float[Array, ...], batch: Batch, key: PRNGKeyArray | None,
        steps: tuple[int, int], keep_path: bool = False,
    ) -> Course:  # fmt: skip
        """Both inner loops on a support; without a key nothing is random."""
        networks = meta["networks"]
        keys: dict[str, Any] = dict.fromkeys(
            ("code", "weights", "encoder", "latent", "tune", "query")
        )
        if key is not None:
            keys = dict(zip(keys, jax.random.split(key, len(keys))))

        def loss(model: Model, batch: Batch) -> Float[Array, ""]:
            return self.loss(model, batch) * (batch.size if self.reduction == "sum" else 1)

        def decode(z: Array, step: Any) -> Array:
            drawn, own = None, keys["weights"]
            if own is not None and self.stochastic:
                drawn = networks.noise(jax.random.fold_in(own, step), z)
            return networks.decode(z, drawn)

        def descend(start: Array, count: int, name: str, rates: Array, to_model: Any) -> Any:
            def view(now: Array, step: Any) -> Model:
                model, own = to_model(now, step), keys[name]
                if own is None:
                    return model
                own = jax.random.fold_in(own, step)
                return dropping(roles.fresh(model, own), own, self.dropout)

            rule = inner.sgd(rates)
            if self.inner_clip is not None:
                rule = optax.chain(bounded(self.inner_clip), rule)
            # Batches do not depend on the key of the draws.
            return inner.run(
                loss, start, batch, key=jax.random.key(0), steps=count, optimizer=rule,
                view=view, keep_path=keep_path,
            )  # fmt: skip

        prior = networks.encode(dropped(features, keys["encoder"], self.dropout))
        noise = None
        if keys["code"] is not None and self.stochastic:
            noise = jax.random.normal(keys["code"], prior.mean.shape, prior.mean.dtype)
        start = prior.at(noise)
        shot = features.shape[1] if self.codes == "class" else 1
        latent = descend(
            start, steps[0], "latent", meta["inner_lr"],
            lambda z, step: networks.model(decode(z, step)),
        )  # fmt: skip
        weights = decode(latent.model, steps[0])
        tuned = descend(
            weights, steps[1], "tune", networks.step(meta["finetune_lr"], shot),
            lambda w, step: networks.model(w),
        )  # fmt: skip
        if not keep_path:
            return Course(prior, noise, start, latent.model, tuned.model)
        before = jax.vmap(lambda z: decode(z, 0))(latent.path[:-1])
        return Course(prior, noise, start, latent.path, jnp.concatenate([before, tuned.path]))

    def _objective(
        self, meta: Meta, task: Task, key: PRNGKeyArray, end: Array | None = None
    ) -> tuple[Float[Array, ""], dict[str, Array], Bool[Array, ""]]:
        """The meta-loss, metrics, and whether the data are finite.

        Args:
            meta: the meta-parameters.
            task: one task.
            key: of the course and the query's dropout.
            end: the adapted code, for the encoder's penalty; by default as adapted here.
        """
        networks = meta["networks"]
        support, query = task.support.draw(None, key), task.query.draw(None, key)
        if self.codes == "class":
            check_embeddings(query, networks.width, "query")
        features = networks.features(support)
        course = self._course(meta, features, support, key, self._steps)
        model = networks.model(course.weights)
        query_loss = self.loss(dropping(model, jax.random.fold_in(key, 1), self.dropout), query)
        penalty = encoder_penalty(course.start, course.code if end is None else end)
        kl = jnp.zeros(())
        if course.noise is not None:
            kl = sampled_kl(course.prior, course.noise)
        regularisers = self.l2 * weight_decay(networks) + self.orthogonality * correlation(
            networks.rows
        )
        total = query_loss + self.kl_weight * kl + self.encoder_penalty * penalty + regularisers
        means = course.prior.mean
        spread = jnp.std(means[:, 0], axis=0) if self.codes == "class" else jnp.abs(means)
        metrics = {
            "query_loss": query_loss,
            "kl": kl,
            "encoder_penalty": penalty,
            "latent_std": jnp.mean(course.prior.std),
            "latent_spread": jnp.mean(spread),
        }
        return total, metrics, all_finite(features, query.x)


def LEORegression(
    loss: Loss, inner_lr: float = 0.001, inner_steps: int = 5, *, latent: int = 32, **how: Any
) -> LEO:
    """LEO that decodes all weights of a small network from one code; see `TaskCode`.

        learner = adaptax.LEORegression(adaptax.losses.mse)
        result  = adaptax.fit(learner, adaptax.models.MLP(1, 1, (40, 40), key=key), tasks.train, …)

    The paper fits noisy sine waves and lines so, from five points. Its sizes (three layers of 16 in
    the encoder, of 32 in relation and decoder) are from memory, and the other settings our own. On
    a task in thousands the steps of the code diverge where nothing bounds them.

    Args:
        loss: of all the loops.
        inner_lr: where the rates of the code start, for the mean of the loss over the support.
        inner_steps: steps in the latent space.
        latent: width of the code.
        how: further arguments of `LEO`.
    """
    defaults: dict[str, Any] = {
        "dropout": 0.0, "reduction": "mean", "outer_lr": 5e-4, "finetune_lr": 1e-4,
        "inner_clip": 100.0,
    }  # fmt: skip
    return LEO(loss, inner_lr, inner_steps, latent=latent, codes="task", **{**defaults, **how})

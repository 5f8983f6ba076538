"""Every learner, and small smooth models, for the tests that hold for all of them."""

import equinox as eqx
import jax
import jax.numpy as jnp

import adaptax as ax

mse, cross_entropy = ax.losses.mse, ax.losses.cross_entropy

LEARNERS = {
    "MAML": lambda loss: ax.MAML(loss, 0.1, 2),
    "MAML schedule": lambda loss: ax.MAML(
        loss, lambda i: 0.1 / (i + 1), 2, meta_gradient="checkpoint=1"
    ),
    "MAML Adam": lambda loss: ax.MAML(
        loss, inner_steps=2, inner_optimizer=ax.inner.adam(0.05, eps_root=0.01)
    ),
    "FOMAML": lambda loss: ax.FOMAML(loss, 0.1, 3),
    "ANIL": lambda loss: ax.ANIL(loss, 0.1, 2),
    "Meta-SGD": lambda loss: ax.MetaSGD(loss, 0.1, 2),
    "Meta-SGD first order": lambda loss: ax.MetaSGD(loss, 0.1, 2, first_order=True),
    "Reptile": lambda loss: ax.Reptile(loss, 0.1, 3),
    "Reptile Adam": lambda loss: ax.Reptile(
        loss, inner_steps=3, inner_optimizer=ax.inner.adam(0.01), include_query=True
    ),
    "Reptile carry": lambda loss: ax.Reptile(
        loss, inner_steps=2, inner_optimizer=ax.inner.adam(0.01), carry_state=True
    ),
    "Reptile minibatches": lambda loss: ax.Reptile(loss, 0.1, 3, inner_batch=2),
    "Reptile last gradient": lambda loss: ax.Reptile(loss, 0.1, 3, skip=2),
    "MAML++": lambda loss: ax.MAMLPlusPlus(loss, 0.1, 2, per_step_batch_norm_statistics="code"),
    "PLATIPUS": lambda loss: ax.PLATIPUS(loss, 0.1, samples=3),
    "BMAML": lambda loss: ax.BayesianMAML(loss, 0.1, 2, particles=3),
    "BMAML heads": lambda loss: ax.BayesianMAML(
        loss, 0.1, 2, particles=3, objective="bfa", adapt_only=ax.tree.under("head")
    ),
    "EMAML": lambda loss: ax.MAMLEnsemble(loss, 0.1, particles=3),
    "CAVIA": lambda loss: ax.ContextAdaptation(loss, 0.5, 2, size=2, where="head"),
}

OF_LABELS = {
    "prototypes": lambda: ax.PrototypicalNetwork(),
    "cosines": lambda: ax.PrototypicalNetwork(distance="cosine"),
    "ProtoMAML": lambda: ax.ProtoMAML(cross_entropy, 0.1, 2),
}
OF_NUMBERS = {
    "CAVIA, modulations": lambda: ax.ContextAdaptation(
        mse, 0.1, 2, size=None, where=("layers/*", "head"), modulation="shift", learn_lr=True
    ),
    "Gaussian process": lambda: ax.GaussianProcessHead(inner_steps=1, noise=0.5),
    "Gaussian process, jointly": lambda: ax.GaussianProcessHead(
        kernel="matern52", noise=0.5, objective="marginal"
    ),
}
"""Learners that do one of the two."""


class ConvNet(eqx.Module):
    """Convolution, batch normalisation, tanh, spatial mean, linear head: small and smooth."""

    conv: ax.models.Conv2d
    norm: ax.models.BatchNorm
    head: ax.models.Linear

    def __init__(self, key, out=2):
        for_conv, for_head = jax.random.split(key)
        self.conv = ax.models.Conv2d(1, 2, 2, key=for_conv)
        self.norm = ax.models.BatchNorm(2, scale=True)
        self.head = ax.models.Linear(2, out, key=for_head)

    def __call__(self, x):
        return self.head(jnp.mean(jnp.tanh(self.norm(self.conv(x))), axis=(1, 2)))


class Images(ax.TaskDistribution):
    """Two classes of noisy 4×4 images, with `each` support and query images a class."""

    split: str = eqx.field(static=True, default="train")
    each: int = eqx.field(static=True, default=2)

    def sample(self, key):
        for_centres, for_noise = jax.random.split(key)
        centres = jax.random.normal(for_centres, (2, 1, 4, 4, 1))
        noise = jax.random.normal(for_noise, (2, 2 * self.each, 4, 4, 1))

        def batch(x):
            return ax.Batch(x.reshape(-1, 4, 4, 1), jnp.repeat(jnp.arange(2), x.shape[1]))

        x = centres + 0.5 * noise
        return ax.Task(batch(x[:, : self.each]), batch(x[:, self.each :]))

"""The posterior of a regressor with precisions of its own (Bayesian MAML, arXiv:1806.03836)."""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from .. import tree
from ..losses import labelled, predicts
from ..task import Batch, Model
from ..weights import spread, total


class Gaussian(eqx.Module):
    """A regressor that also learns how noisy its targets and how wide its weights are.

        y ~ N(f_w(x), 1/γ),   w ~ N(0, 1/λ),   γ ~ Gamma(a_γ, b_γ),   λ ~ Gamma(a_λ, b_λ)

    The precisions are kept as logarithms, so they stay positive, and are adapted like weights:
    they are further coordinates of every particle. With the losses of this file:

        model   = adaptax.Gaussian(net)
        learner = adaptax.BayesianMAML(adaptax.gaussian_nll, 1e-3, prior=adaptax.gamma_prior,
                                       chase=adaptax.tree.under("model"))

    Released code. As there, at the defaults; it also adds noise of 0.001 to the initial
    logarithms. The chaser loss leaves the precisions out, which is what `chase` says.

    Args:
        model: the net f, predicting `(n, out)`.
        noise_variance: 1/γ at the start, in squared units of the targets.
        weight_variance: 1/λ at the start.

    Raises:
        ValueError: if a variance is not positive.
    """

    model: Model
    log_gamma: Float[Array, "*particles"]
    log_lambda: Float[Array, "*particles"]

    def __init__(self, model: Model, noise_variance: float = 0.01, weight_variance: float = 1.0):
        if not (noise_variance > 0 and weight_variance > 0):
            raise ValueError(
                f"noise_variance={noise_variance} and weight_variance={weight_variance} should "
                "both be positive: they are the variances to start from"
            )
        self.model = model
        self.log_gamma = -jnp.log(jnp.asarray(noise_variance, float))
        self.log_lambda = -jnp.log(jnp.asarray(weight_variance, float))

    def __call__(self, x: PyTree) -> PyTree:
        """The predictions of the net."""
        return self.model(x)

    @property
    def noise(self) -> Float[Array, "*particles"]:
        """Standard deviation of the targets, `γ^{−1/2}`; `evaluate(noise="learned")` asks."""
        return jnp.exp(-self.log_gamma / 2)


@predicts("regression")
def gaussian_nll(model: Gaussian, batch: Batch) -> Float[Array, ""]:
    """`−log p(y | x, w, γ) = Σ ½γ(y − f(x))² − ½log γ + ½log 2π`, over examples and outputs.

    A sum, so that likelihood and prior are on one scale. BMAML's code drops the last term.

    Args:
        model: a `Gaussian`.
        batch: float targets `(n, out)`.

    Raises:
        ValueError: if predictions and targets differ in shape, or there are none.
    """
    labelled(batch)
    predictions = batch.predict(model)
    if predictions.shape != batch.y.shape:
        raise ValueError(
            f"the model predicts shape {predictions.shape} for targets of shape {batch.y.shape}; "
            "give both the same shape"
        )
    squares = total((tree.wide(predictions) - batch.targets) ** 2, batch.weight)
    count = batch.y.size if batch.weight is None else jnp.sum(spread(batch.weight, batch.y))
    log_density = model.log_gamma - jnp.log(2 * jnp.pi)
    return (jnp.exp(model.log_gamma) * squares - count * log_density) / 2


def gamma_prior(
    model: Gaussian,
    *,
    noise: tuple[float, float] = (2.0, 0.2),
    weights: tuple[float, float] = (2.0, 2.0),
    on: tree.Predicate = tree.every,
) -> Float[Array, ""]:
    """`−log p(w | λ) − log p(log γ) − log p(log λ)`, up to a constant.

        log p(w | λ) = Σ_w ½log λ − ½λw²,   log p(log γ) = a log γ − bγ

    The densities are of the logarithms: the `a − 1` of the Gamma density becomes `a`.

    Args:
        model: a `Gaussian`.
        noise: shape a and rate b of γ.
        weights: shape a and rate b of λ.
        on: which parameters are weights, by their path in the net. Those of the particles only:
            `adaptax.tree.under("head")` where heads are all that differs.
    """
    net = tree.parameters(model.model)
    chosen = [leaf for leaf, path in zip(jax.tree.leaves(net), jax.tree.leaves(tree.paths(net)))
              if on(path)]  # fmt: skip
    count = sum(leaf.size for leaf in chosen)
    squares = sum((jnp.sum(tree.wide(leaf) ** 2) for leaf in chosen), jnp.zeros(()))
    log_w = (count * model.log_lambda - jnp.exp(model.log_lambda) * squares) / 2
    return -(log_w + _log_gamma(model.log_gamma, *noise) + _log_gamma(model.log_lambda, *weights))


def _log_gamma(log_x: Float[Array, ""], a: float, b: float) -> Float[Array, ""]:
    return a * log_x - b * jnp.exp(log_x)

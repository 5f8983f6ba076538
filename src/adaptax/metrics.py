"""Scores of predictions, reduced over an ensemble by its mixture, for every learner alike.

Predictions are `(n, out)` of one model or `(particles, n, out)` of an ensemble; a mixture weighs
its particles equally. Metrics are means over the queries of one episode.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

BINS = 15
"""Bins of confidence in the calibration error."""


def classification(
    logits: Float[Array, "*particles n way"], labels: Int[Array, " n"]
) -> dict[str, Float[Array, ...]]:
    """Accuracy, negative log-likelihood, Brier score, and the table that calibration needs.

    * `accuracy`: how often the mixture's most probable class is right.
    * `nll`: `−log p(y)` in nats, `p` the mean of the particles' probabilities.
    * `brier`: `Σ_c (p_c − [y = c])²`, between 0 and 2.
    * `bins`: `(BINS, 3)`: queries, summed confidence and summed correctness by confidence.
    """
    log_p = jax.nn.log_softmax(logits)
    if log_p.ndim == 3:
        log_p = jax.nn.logsumexp(log_p, axis=0) - jnp.log(len(log_p))
    p = jnp.exp(log_p)
    right = (jnp.argmax(log_p, axis=-1) == labels).astype(p.dtype)
    confidence = jnp.max(p, axis=-1)
    bin_of = jnp.clip((confidence * BINS).astype(int), 0, BINS - 1)
    rows = jnp.stack([jnp.ones_like(right), confidence, right], axis=-1)
    one_hot = jax.nn.one_hot(labels, logits.shape[-1], dtype=p.dtype)
    return {
        "accuracy": jnp.mean(right),
        "nll": -jnp.mean(jnp.take_along_axis(log_p, labels[:, None], axis=-1)),
        "brier": jnp.mean(jnp.sum((p - one_hot) ** 2, axis=-1)),
        "bins": jnp.zeros((BINS, 3), p.dtype).at[bin_of].add(rows),
    }


def regression(
    predictions: Float[Array, "*any"], targets: Float[Array, "n ..."], noise: float
) -> dict[str, Float[Array, ""]]:
    """Mean squared error, and negative log-likelihood under Gaussian noise.

    * `mse`: of the mean prediction.
    * `particle_mse`: the mean of the particles' errors, for ensembles only. The two differ, and
      papers compare one with the other.
    * `nll`: `−log mean_m N(y; f_m(x), noise²)` in nats a target, noise as given.
    """
    ensemble = predictions if predictions.ndim == targets.ndim + 1 else predictions[None]
    squares = (ensemble - targets) ** 2
    log_p = -squares / (2 * noise**2) - jnp.log(noise) - 0.5 * jnp.log(2 * jnp.pi)
    mixture = jax.nn.logsumexp(log_p, axis=0) - jnp.log(len(log_p))
    out = {
        "mse": jnp.mean((jnp.mean(ensemble, axis=0) - targets) ** 2),
        "nll": -jnp.mean(mixture),
    }
    if len(ensemble) > 1:
        out["particle_mse"] = jnp.mean(squares)
    return out


def calibration_error(bins: Float[Array, "bins 3"]) -> float:
    """Expected calibration error: `Σ_b (n_b / n) |accuracy_b − confidence_b|`."""
    count, confidence, right = bins[:, 0], bins[:, 1], bins[:, 2]
    return float(jnp.sum(jnp.abs(right - confidence)) / jnp.maximum(jnp.sum(count), 1.0))

"""Scores of predictions, reduced over an ensemble by its mixture, for every learner alike.

Predictions are `(n, out)` of one model or `(particles, n, out)` of an ensemble; a mixture weighs
its particles equally. Metrics are means over the queries of one episode, by what each counts:
`weight` is that of a `Batch`, all 1 if `None`.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import entr, ndtr
from jaxtyping import Array, Bool, Float, Int, Shaped

from .tree import wide
from .weights import Weight, average, spread

BINS = 15
"""Bins of confidence in the calibration error."""

LEVELS = (50, 90, 95)
"""Central intervals whose coverage is a metric of regression, in per cent."""

QUANTILES = 40
"""Bins of the targets' quantiles: ends of central intervals of 5, 10, … 100 per cent."""


def classification(
    logits: Float[Array, "*particles n way"], labels: Int[Array, " n"], weight: Weight = None
) -> dict[str, Float[Array, ...]]:
    """Accuracy, negative log-likelihood, Brier score, and the table that calibration needs.

    * `accuracy`: how often the mixture's most probable class is right.
    * `nll`: `−log p(y)` in nats, `p` the mean of the particles' probabilities.
    * `brier`: `Σ_c (p_c − [y = c])²`, between 0 and 2.
    * `bins`: `(BINS, 3)`: queries, summed confidence and summed correctness by confidence.
    """
    log_p = mixture(logits)
    p = jnp.exp(log_p)
    right = (jnp.argmax(log_p, axis=-1) == labels).astype(p.dtype)
    confidence = jnp.max(p, axis=-1)
    bin_of = jnp.clip((confidence * BINS).astype(int), 0, BINS - 1)
    rows = jnp.stack([jnp.ones_like(right), confidence, right], axis=-1)
    rows = rows if weight is None else jnp.where(weight[:, None] > 0, weight[:, None] * rows, 0)
    one_hot = jax.nn.one_hot(labels, logits.shape[-1], dtype=p.dtype)
    return {
        "accuracy": average(right, weight),
        "nll": -average(jnp.take_along_axis(log_p, labels[:, None], axis=-1), weight),
        "brier": average(jnp.sum((p - one_hot) ** 2, axis=-1), weight),
        "bins": jnp.zeros((BINS, 3), p.dtype).at[bin_of].add(rows),
    }


def uncertainty(
    logits: Float[Array, "*particles n way"], weight: Weight = None
) -> dict[str, Float[Array, ""]]:
    """How unsure a classifier is, in nats, and of an ensemble what of it is disagreement.

        H[p̄] = 1/M Σ_m H[p_m] + 1/M Σ_m KL(p_m ‖ p̄),   p̄ = 1/M Σ_m p_m

    * `entropy`: H[p̄] of the prediction, at most log(way).
    * `aleatoric`, for ensembles only: the first part, the mean entropy of the particles: what they
      agree cannot be told from the input.
    * `epistemic`, for ensembles only: the second, the mutual information between the class and
      the particle: 0 where all predict the same, at most log M.
    """
    log_p = mixture(logits)
    out = {"entropy": average(_entropy(log_p), weight)}
    if logits.ndim == 3 and len(logits) > 1:
        each = jax.nn.log_softmax(wide(logits))
        p = jnp.exp(each)
        divergence = jnp.sum(jnp.where(p > 0, p * (each - log_p), 0.0), axis=-1)
        out |= {
            "aleatoric": _over_particles(_entropy(each), weight),
            "epistemic": _over_particles(divergence, weight),
        }
    return out


def binary(
    logits: Float[Array, "*any"], targets: Shaped[Array, "n ..."], weight: Weight = None
) -> dict[str, Float[Array, ""]]:
    """Scores of labels that are each true or false, several an example; means over all of them.

    * `label_accuracy`: how often the mixture's more probable answer is right.
    * `nll`: `−log p(y)` in nats a label, `p` the mean of the particles' probabilities `σ(f_m)`.
    * `brier`: `(p − y)²`.

    Args:
        logits: of one model, of the shape of the targets, or of an ensemble.
        targets: 0 or 1, of any type.
    """
    logits = logits if logits.ndim > targets.ndim else logits[None]
    count = jnp.log(len(logits))
    yes = jax.nn.logsumexp(jax.nn.log_sigmoid(logits), axis=0) - count
    no = jax.nn.logsumexp(jax.nn.log_sigmoid(-logits), axis=0) - count
    y = targets.astype(yes.dtype)
    return {
        "label_accuracy": _fraction((yes > no) == (y > 0.5), weight),
        "nll": -average(
            jnp.where(y > 0, y * yes, 0.0) + jnp.where(y < 1, (1 - y) * no, 0.0), weight
        ),
        "brier": average((jnp.exp(yes) - y) ** 2, weight),
    }


def regression(
    predictions: Float[Array, "*any"],
    targets: Float[Array, "n ..."],
    noise: float | Float[Array, ...],
    weight: Weight = None,
) -> dict[str, Float[Array, ""]]:
    """Mean squared error, and negative log-likelihood under Gaussian noise.

    * `mse`: of the mean prediction.
    * `particle_mse`: the mean of the particles' errors, for ensembles only. The two differ, and
      papers compare one with the other.
    * `epistemic`: the variance of the particles' predictions, for ensembles only: by so much is
      `particle_mse` above `mse`.
    * `nll`: `−log mean_m N(y; f_m(x), noise²)` in nats a target, noise as given.

    Args:
        predictions: of one model, of the shape of the targets, or of an ensemble.
        targets: float.
        noise: standard deviation: a number, one for each particle, or one for each prediction.
    """
    ensemble, noise = _members(predictions, targets, noise)
    squares = (ensemble - targets) ** 2
    log_p = -squares / (2 * noise**2) - jnp.log(noise) - 0.5 * jnp.log(2 * jnp.pi)
    mixture = jax.nn.logsumexp(log_p, axis=0) - jnp.log(len(log_p))
    out = {
        "mse": average((jnp.mean(ensemble, axis=0) - targets) ** 2, weight),
        "nll": -average(mixture, weight),
    }
    if len(ensemble) > 1:
        out["particle_mse"] = _over_particles(squares, weight)
        out["epistemic"] = average(jnp.var(ensemble, axis=0), weight)
    return out


def coverage(
    predictions: Float[Array, "*any"],
    targets: Float[Array, "n ..."],
    noise: float | Float[Array, ...],
    weight: Weight = None,
) -> dict[str, Float[Array, ...]]:
    """How often targets fall in central intervals of the prediction under Gaussian noise.

    Of an ensemble that is the interval of the mixture itself, not of a Gaussian with its moments:
    between the quantiles (1 − c)/2 and (1 + c)/2. A target lies within it just when its own
    quantile `u = 1/M Σ_m Φ((y − f_m(x)) / noise)` does, so no interval is ever solved for.

    * `coverage_50`, `coverage_90`, `coverage_95`: fraction of targets in the intervals of
      `LEVELS`; of a calibrated prediction, 0.5, 0.9 and 0.95. A target that is predicted as NaN is
      outside.
    * `quantiles`: `(QUANTILES,)`, how many targets have u in each of as many equal bins; those
      that are predicted as NaN are in the first.

    Args:
        predictions: of one model, of the shape of the targets, or of an ensemble.
        targets: float.
        noise: standard deviation: a number, one for each particle, or one for each prediction.
    """
    ensemble, noise = _members(predictions, targets, noise)
    u = jnp.mean(ndtr((targets - ensemble) / noise), axis=0)
    # What is not a number is outermost.
    bin_of = jnp.clip(jnp.nan_to_num(u * QUANTILES).astype(int), 0, QUANTILES - 1)
    inside = [jnp.abs(u - 0.5) <= level / 200 for level in LEVELS]
    found = bin_of.reshape(-1, 1) == jnp.arange(QUANTILES)
    if weight is not None:
        found = found * spread(weight, targets).reshape(-1, 1)
    counts = jnp.sum(found, axis=0)
    return {
        **{f"coverage_{level}": _fraction(hit, weight) for level, hit in zip(LEVELS, inside)},
        "quantiles": counts.astype(u.dtype),
    }


def interval(
    values: Float[np.ndarray, "episodes ..."],
) -> tuple[Float[np.ndarray, ...], Float[np.ndarray, ...]]:
    """Mean over episodes, and half its 95 % confidence interval; see `ci95`.

    Of the difference of two learners' scores on the same episodes it is that of pairs. The mean of
    none is NaN.
    """
    if not len(values):
        return np.full(values.shape[1:], math.nan), ci95(values)
    with np.errstate(all="ignore"):
        return np.asarray(np.mean(values, axis=0)), ci95(values)


def ci95(values: Float[np.ndarray, "episodes ..."]) -> Float[np.ndarray, ...]:
    """Half the 95 % confidence interval of the mean over episodes: 1.96 standard errors.

    NaN where there are fewer than two.
    """
    if len(values) < 2:
        return np.full(values.shape[1:], math.nan)
    with np.errstate(all="ignore"):
        return np.asarray(1.96 * np.std(values, axis=0, ddof=1) / math.sqrt(len(values)))


def calibration_error(bins: Float[Array, "bins 3"]) -> float:
    """Expected calibration error: `Σ_b (n_b / n) |accuracy_b − confidence_b|`."""
    count, confidence, right = bins[:, 0], bins[:, 1], bins[:, 2]
    return float(jnp.sum(jnp.abs(right - confidence)) / jnp.maximum(jnp.sum(count), 1.0))


def mixture(logits: Float[Array, "*particles n way"]) -> Float[Array, "n way"]:
    """Log-probabilities of the mixture."""
    log_p = jax.nn.log_softmax(wide(logits))
    if log_p.ndim == 3:
        log_p = jax.nn.logsumexp(log_p, axis=0) - jnp.log(len(log_p))
    return log_p


def _entropy(log_p: Float[Array, "*any way"]) -> Float[Array, "*any"]:
    return jnp.sum(entr(jnp.exp(log_p)), axis=-1)


def _members(
    predictions: Array, targets: Array, noise: float | Array
) -> tuple[Float[Array, "m ..."], Array]:
    """Predictions with an axis of particles, and noise that broadcasts against them."""
    ensemble = predictions if predictions.ndim == targets.ndim + 1 else predictions[None]
    noise = jnp.asarray(noise)
    if noise.shape == predictions.shape:
        return wide(ensemble), wide(noise).reshape(ensemble.shape)
    return wide(ensemble), jnp.reshape(noise, (-1, *(1,) * targets.ndim))


def _fraction(true: Bool[Array, "*any"], weight: Weight) -> Float[Array, ""]:
    return average(true.astype(float), weight)


def _over_particles(each: Float[Array, "m n ..."], weight: Weight) -> Float[Array, ""]:
    """Mean over particles and examples."""
    return jnp.mean(each) if weight is None else average(jnp.mean(each, axis=0), weight)

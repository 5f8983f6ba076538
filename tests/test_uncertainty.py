"""Entropy and its parts, coverage of intervals, and the diagrams of calibration."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import adaptax as ax
from adaptax import metrics
from adaptax.engine.report import Report
from adaptax.report import calibration
from adaptax.testing import Blobs

KEY = jax.random.key(0)
mse, cross_entropy = ax.losses.mse, ax.losses.cross_entropy
uncertainty, coverage = jax.jit(metrics.uncertainty), jax.jit(metrics.coverage)
regression = jax.jit(metrics.regression)


def softmax(x):
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


# Classification


def test_entropy_of_one_model():
    logits = jax.random.normal(KEY, (7, 4))
    out = uncertainty(logits)
    assert set(out) == {"entropy"}
    assert np.isclose(
        out["entropy"], stats.entropy(softmax(np.asarray(logits)).T).mean(), rtol=1e-5
    )
    assert np.isclose(uncertainty(jnp.zeros((3, 4)))["entropy"], np.log(4), rtol=1e-6)


def test_entropy_of_an_ensemble_in_parts():
    logits = 3 * jax.random.normal(KEY, (5, 7, 4))
    out = uncertainty(logits)
    p = softmax(np.asarray(logits, float))
    whole, each = stats.entropy(p.mean(axis=0), axis=-1), stats.entropy(p, axis=-1)
    assert np.isclose(out["entropy"], whole.mean(), rtol=1e-5)
    assert np.isclose(out["aleatoric"], each.mean(), rtol=1e-5)
    assert np.isclose(out["epistemic"], (whole - each.mean(axis=0)).mean(), rtol=1e-4)
    joint = p / 5  # of particle and class: its mutual information, from the definition
    product = joint.sum(axis=0) * joint.sum(axis=-1, keepdims=True)
    mutual = (joint * np.log(joint / product)).sum(axis=(0, 2)).mean()
    assert np.isclose(out["epistemic"], mutual, rtol=1e-4)


def test_agreement_and_disagreement():
    one = jax.random.normal(KEY, (7, 4))
    agreed = uncertainty(jnp.stack([one, one, one]))
    assert abs(agreed["epistemic"]) < 1e-6
    assert np.isclose(agreed["entropy"], agreed["aleatoric"], rtol=1e-6)
    # Each is certain of a class of its own, beyond what probabilities can hold.
    apart = uncertainty(1e4 * jnp.eye(3)[:, None, :])
    assert np.isclose(apart["epistemic"], np.log(3), rtol=1e-6)
    assert np.allclose([apart["entropy"], apart["aleatoric"]], [np.log(3), 0], atol=1e-6)
    assert set(uncertainty(one[None])) == {"entropy"}


# Regression


def test_the_error_of_particles_is_that_of_their_mean_and_their_variance():
    f, y = jax.random.normal(KEY, (6, 9, 2)), jnp.ones((9, 2))
    out = regression(f, y, 0.5)
    assert np.isclose(out["particle_mse"], out["mse"] + out["epistemic"], rtol=1e-5)
    assert np.isclose(out["epistemic"], np.var(np.asarray(f), axis=0).mean(), rtol=1e-5)


def test_coverage_by_one_model():
    n, noise = 4000, 0.7
    keys = jax.random.split(KEY, 2)
    f = 3 * jax.random.normal(keys[0], (n, 1))
    y = f + noise * jax.random.normal(keys[1], (n, 1))
    out = coverage(f, y, noise)
    for level in metrics.LEVELS:
        p = level / 100
        assert abs(out[f"coverage_{level}"] - p) < 4 * np.sqrt(p * (1 - p) / n)
        inside = np.abs(y - f) <= stats.norm.ppf((1 + p) / 2) * noise
        assert np.isclose(out[f"coverage_{level}"], inside.mean(), atol=2 / n)
    assert out["quantiles"].sum() == n
    statistic = ((out["quantiles"] - n / 40) ** 2 / (n / 40)).sum()
    assert statistic < stats.chi2.ppf(1 - 1e-4, 39)
    wide = coverage(f, y, 3 * noise)
    assert wide["coverage_50"] > 0.9


def test_coverage_of_a_mixture_is_not_that_of_a_gaussian():
    """Two particles far apart: half of the mixture lies about them, and none between."""
    n = 4000
    keys = jax.random.split(KEY, 2)
    f = jnp.stack([jnp.full((n, 1), -5.0), jnp.full((n, 1), 5.0)])
    side = jnp.where(jax.random.bernoulli(keys[0], shape=(n, 1)), 5.0, -5.0)
    y = side + jax.random.normal(keys[1], (n, 1))
    out = coverage(f, y, 1.0)
    for level in metrics.LEVELS:
        p = level / 100
        assert abs(out[f"coverage_{level}"] - p) < 4 * np.sqrt(p * (1 - p) / n)
    gaussian = np.abs(y) <= stats.norm.ppf(0.75) * np.sqrt(26)
    assert gaussian.mean() < 0.1
    # The quantiles, solved for: of ±5 with noise 1 they are where half a side is left.
    edges = 5 + stats.norm.ppf([0.05, 0.5, 0.95])
    found = coverage(f[:, :6], jnp.array([*edges, *-edges])[:, None], 1.0)
    u = np.sort(np.repeat(np.arange(40), np.asarray(found["quantiles"], int)))
    expected = np.floor(40 * np.array([0.025, 0.25, 0.475, 0.525, 0.75, 0.975]) + 1e-9)
    assert np.all(np.abs(u - expected) <= 1)


def test_noise_of_its_own_for_each_particle():
    f, noise = jax.random.normal(KEY, (3, 8, 2)), jnp.array([0.1, 1.0, 3.0])
    y = jax.random.normal(jax.random.key(1), (8, 2))
    scales = np.asarray(noise)[:, None, None]
    density = stats.norm.pdf(y, f, scales).mean(axis=0)
    assert np.isclose(regression(f, y, noise)["nll"], -np.log(density).mean(), rtol=1e-4)
    u = stats.norm.cdf(y, f, scales).mean(axis=0)
    out = coverage(f, y, noise)
    assert np.isclose(out["coverage_50"], (np.abs(u - 0.5) <= 0.25).mean())
    assert np.array_equal(out["quantiles"], np.histogram(u, 40, (0, 1))[0])


def test_predictions_that_are_not_numbers_are_outside():
    f = jnp.array([[0.0], [jnp.nan], [jnp.inf], [-jnp.inf]])
    out = coverage(f, jnp.zeros((4, 1)), 1.0)
    assert out["coverage_95"] == 0.25
    assert out["quantiles"].sum() == 4
    assert out["quantiles"][20] == 1


# Reports


def classified(**how):
    model = ax.models.MLP(2, 3, (8,), key=KEY, activation=jnp.tanh)
    learner = ax.MAMLEnsemble(cross_entropy, 0.5, particles=3, **how)
    return ax.evaluate(learner, learner.init(model, key=KEY), Blobs(), episodes=6, key=KEY)


def regressed(learner):
    model, tasks = ax.models.MLP(1, 1, (8,), key=KEY), ax.tasks.sinusoid(5, 10).test
    return ax.evaluate(learner, learner.init(model, key=KEY), tasks, episodes=6, key=KEY)


def test_every_report_says_how_sure_it_is():
    row = classified().to_json()["result"]
    assert np.isclose(row["entropy"], row["aleatoric"] + row["epistemic"], rtol=1e-4)
    assert {"nll", "brier", "ece", "accuracy", "entropy_ci95"} <= set(row)
    single, several = (
        regressed(learner) for learner in (ax.MAML(mse), ax.MAMLEnsemble(mse, particles=2))
    )
    assert {"nll", "coverage_50", "coverage_95"} <= set(single.values)
    assert {"particle_mse", "epistemic", "coverage_50"} <= set(several.values)
    assert single.values["coverage_95"].shape == (6, 2)
    for report in (single, several):
        assert report.quantiles.shape == (2, metrics.QUANTILES)
        for level in metrics.LEVELS:  # the table has the same, to the width of a bin's edge
            assert np.isclose(report.coverage(level / 100), report.mean(f"coverage_{level}"))
        assert report.coverage(1.0) == 1
    with pytest.raises(ValueError, match=r"level is a multiple of 0.05 up to 1, not 0.51"):
        single.coverage(0.51)
    with pytest.raises(ValueError, match="a metric of regression"):
        classified().coverage(0.5)


def test_noise_is_a_number_or_learned():
    for wrong in (0.0, -1.0, "unknown"):
        with pytest.raises(ValueError, match='noise is a positive standard deviation or "learned"'):
            ax.Evaluator(ax.MAML(mse), ax.tasks.sinusoid().test, noise=wrong)


def table(accuracy, confidence, count=100):
    """A calibration table with all queries at a few confidences."""
    bins = np.zeros((1, metrics.BINS, 3))
    for a, c in zip(accuracy, confidence):
        bins[0, int(c * metrics.BINS)] = count, count * c, count * a
    return Report({}, [1], {"accuracy": np.ones((3, 1))}, bins)


def test_a_reliability_diagram():
    sure = table([0.5, 0.6, 0.7], [0.55, 0.75, 0.95])
    figure = calibration.reliability({"BMAML": sure, "MAML": classified()}, title="here")
    above, below = figure.axes
    diagonal, line = above.get_lines()[:2]
    assert np.array_equal(diagonal.get_xdata(), diagonal.get_ydata())
    assert np.allclose(line.get_xdata(), [0.55, 0.75, 0.95])
    assert np.allclose(line.get_ydata(), [0.5, 0.6, 0.7])
    legend = [text.get_text() for text in above.get_legend().get_texts()]
    assert legend[0] == f"BMAML, ECE {(0.05 + 0.15 + 0.25) / 3:.3f}"
    assert len(legend) == 2
    assert np.isclose(below.patches[0].get_data().values.sum(), 1)
    assert above.get_title(loc="left") == "here"


def test_a_coverage_diagram():
    report = regressed(ax.MAMLEnsemble(mse, particles=2))
    figure = calibration.coverage_diagram({"EMAML": report}, step=0)
    line = figure.axes[0].get_lines()[1]
    assert np.allclose(line.get_xdata(), np.arange(21) / 20)
    assert np.isclose(line.get_ydata()[10], report.mean("coverage_50", 0))
    assert np.all(np.diff(line.get_ydata()) >= 0)


def test_diagrams_want_the_right_reports():
    with pytest.raises(ValueError, match="there are no reports"):
        calibration.reliability({})
    with pytest.raises(ValueError, match="A: no report of classification; draw it with coverage"):
        calibration.reliability({"A": regressed(ax.MAML(mse))})
    with pytest.raises(ValueError, match="B: no report of regression; draw it with reliability"):
        calibration.coverage_diagram({"B": table([1.0], [0.9])})

import jax
import jax.numpy as jnp
import numpy as np

from adaptax import metrics

KEY = jax.random.key(0)
LABELS = jnp.array([0, 1, 2, 1, 0, 2, 2])


def softmax(x):
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def check_classification(logits, p):
    out = metrics.classification(logits, LABELS)
    y = np.asarray(LABELS)
    one_hot = np.eye(3)[y]
    assert np.isclose(out["accuracy"], (p.argmax(1) == y).mean())
    assert np.isclose(out["nll"], -np.log(p[np.arange(7), y]).mean(), rtol=1e-5)
    assert np.isclose(out["brier"], ((p - one_hot) ** 2).sum(1).mean(), rtol=1e-5)
    confidence, right = p.max(1), p.argmax(1) == y
    which = np.minimum((confidence * 15).astype(int), 14)
    error = sum(
        (which == b).mean() * abs(right[which == b].mean() - confidence[which == b].mean())
        for b in set(which)
    )
    assert np.isclose(metrics.calibration_error(out["bins"]), error, rtol=1e-5)
    assert out["bins"][:, 0].sum() == 7


def test_classification_by_one_model():
    logits = jax.random.normal(KEY, (7, 3))
    check_classification(logits, softmax(np.asarray(logits, float)))


def test_classification_by_a_mixture_averages_probabilities():
    logits = 3 * jax.random.normal(KEY, (4, 7, 3))
    check_classification(logits, softmax(np.asarray(logits, float)).mean(axis=0))


def test_a_certain_classifier_falls_in_the_last_bin():
    out = metrics.classification(100 * jax.nn.one_hot(LABELS, 3), LABELS)
    assert out["bins"][-1].tolist() == [7, 7, 7]
    assert metrics.calibration_error(out["bins"]) == 0


def log_density(y, mean, noise):
    return -((y - mean) ** 2) / (2 * noise**2) - np.log(noise * np.sqrt(2 * np.pi))


def test_regression_by_one_model():
    f, y = np.asarray(jax.random.normal(KEY, (2, 5, 2)), float)
    out = metrics.regression(jnp.asarray(f), jnp.asarray(y), 0.3)
    assert set(out) == {"mse", "nll"}
    assert np.isclose(out["mse"], ((f - y) ** 2).mean(), rtol=1e-5)
    assert np.isclose(out["nll"], -log_density(y, f, 0.3).mean(), rtol=1e-5)


def test_regression_by_a_mixture():
    f = np.asarray(jax.random.normal(KEY, (4, 5, 2)), float)
    y = np.asarray(jax.random.normal(jax.random.key(1), (5, 2)), float)
    out = metrics.regression(jnp.asarray(f), jnp.asarray(y), 0.5)
    assert np.isclose(out["mse"], ((f.mean(0) - y) ** 2).mean(), rtol=1e-5)
    assert np.isclose(out["particle_mse"], ((f - y) ** 2).mean(), rtol=1e-5)
    mixture = np.log(np.exp(log_density(y, f, 0.5)).mean(axis=0))
    assert np.isclose(out["nll"], -mixture.mean(), rtol=1e-5)


def test_targets_without_an_axis_of_outputs():
    f, y = jax.random.normal(KEY, (2, 5))
    assert np.isclose(metrics.regression(f, y, 1.0)["mse"], jnp.mean((f - y) ** 2))
    assert "particle_mse" in metrics.regression(jnp.stack([f, f]), y, 1.0)

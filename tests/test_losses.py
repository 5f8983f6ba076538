from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import adaptax as ax
from adaptax.losses import cross_entropy, mse, relative_mse

predict = lambda x: x
X = jax.random.normal(jax.random.key(0), (6, 3))


def test_mse_by_numpy():
    y = jnp.cos(X)
    each = np.mean((np.asarray(X) - np.asarray(y)) ** 2, axis=1)
    batch = ax.Batch(X, y)
    assert np.isclose(mse(predict, batch), each.mean(), rtol=1e-6)
    assert np.isclose(mse(predict, batch, reduction="sum"), each.sum(), rtol=1e-6)
    assert np.isclose(mse(predict, ax.Batch(X[:, 0], y[:, 0])), np.mean((X - y)[:, 0] ** 2))


def test_the_relative_error_is_one_less_r2_where_targets_are_large():
    y = 30 * jnp.cos(X)
    batch = ax.Batch(X, y)
    r2 = 1 - np.sum((np.asarray(y) - np.asarray(X)) ** 2) / np.sum(np.asarray(y) ** 2)
    assert np.isclose(relative_mse(predict, batch), 1 - r2, rtol=1e-5)
    assert np.isclose(relative_mse(lambda x: 0 * x, batch), 1)
    standardised = ax.Batch(X, (y - y.mean()) / (1.001 * y.std()))
    assert relative_mse(predict, standardised) == mse(predict, standardised)
    with pytest.raises(ValueError, match="predicts shape"):
        relative_mse(predict, ax.Batch(X, X[:, 0]))


def test_cross_entropy_by_numpy():
    y = np.array([0, 1, 2, 0, 1, 2])
    logits = np.asarray(X, np.float64)
    each = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(6), y]
    batch = ax.Batch(X, jnp.asarray(y))
    for reduction, expected in {
        "mean": each.mean(), "sum": each.sum(), "sum/shot": each.sum() / 2
    }.items():  # fmt: skip
        assert np.isclose(cross_entropy(predict, batch, reduction=reduction), expected, rtol=1e-5)


def test_the_balanced_loss_counts_every_class_once():
    balanced = partial(cross_entropy, reduction="balanced")
    even = ax.Batch(X, jnp.array([0, 1, 2, 0, 1, 2]))
    assert np.isclose(balanced(predict, even), cross_entropy(predict, even), rtol=1e-6)
    y = np.array([2, 0, 0, 2, 0, 0])  # class 1 does not occur
    each = -np.asarray(jax.nn.log_softmax(X))[np.arange(6), y]
    expected = (each[y == 0].mean() + each[y == 2].mean()) / 2
    assert np.isclose(balanced(predict, ax.Batch(X, jnp.asarray(y))), expected, rtol=1e-6)


def test_extreme_logits_stay_finite():
    batch = ax.Batch(jnp.array([[1e4, -1e4]]), jnp.array([1]))
    assert cross_entropy(predict, batch) == 2e4


def test_shapes_that_would_broadcast_are_refused():
    with pytest.raises(ValueError, match=r"predicts shape \(6, 3\) for targets of shape \(6,\)"):
        mse(predict, ax.Batch(X, X[:, 0]))
    for wrong in (jax.nn.one_hot(jnp.zeros(6, int), 3), jnp.zeros(5, int), jnp.zeros(6)):
        with pytest.raises(ValueError, match="wants integer labels of shape \\(6,\\)"):
            cross_entropy(predict, ax.Batch(X, wrong))


def test_normal_is_the_log_density():
    from scipy.stats import norm

    y = jnp.cos(X)
    batch = ax.Batch(X, y)
    each = -norm(np.asarray(X), 0.3).logpdf(np.asarray(y))
    assert np.isclose(ax.losses.normal(predict, batch, noise=0.3), each.mean(), rtol=1e-5)
    summed = ax.losses.normal(predict, batch, noise=0.3, reduction="sum")
    assert np.isclose(summed, each.mean(axis=1).sum(), rtol=1e-5)
    with pytest.raises(ValueError, match="above 0"):
        ax.losses.normal(predict, batch, noise=0.0)


GAUSSIAN = ax.Gaussian(ax.models.MLP(3, 3, (), key=jax.random.key(0)))


@pytest.mark.parametrize(
    ("loss", "model", "y"),
    [(mse, predict, X), (relative_mse, predict, X), (ax.losses.normal, predict, X),
     (cross_entropy, predict, jnp.zeros(6, int)), (ax.gaussian_nll, GAUSSIAN, X)],
)  # fmt: skip
def test_batches_without_examples_or_targets_are_refused(loss, model, y):
    assert np.isfinite(loss(model, ax.Batch(X, y)))
    with pytest.raises(ValueError, match="a batch without targets, y=None"):
        loss(model, ax.Batch(X, None))
    with pytest.raises(ValueError, match="a batch without examples"):
        loss(model, ax.Batch(X[:0], y[:0]))

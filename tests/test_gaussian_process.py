"""The Gaussian-process head: textbook and scikit-learn's posterior, evidence, scores, padding."""

import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

import adaptax as ax
from adaptax.algorithms import kernels
from adaptax.algorithms.gaussian_process import Data, evidence
from adaptax.testing import padded

KEY = jax.random.key(0)
RAW = ax.Functional((), lambda none, x: x)
"""A model that hands on its inputs, for processes on these."""


@pytest.fixture
def task():
    with jax.enable_x64(True):
        x = jax.random.normal(KEY, (14, 3))
        y = 3 + 2 * jnp.sin(x @ jnp.array([[1.0, -2.0], [0.5, 1.0], [2.0, 0.3]]))
        yield ax.Task(ax.Batch(x[:8], y[:8]), ax.Batch(x[8:], y[8:]))


def made(**how):
    how = {"amplitude": 1.5, "lengthscale": 0.8, "noise": 0.3, "head": None, **how}
    return ax.GaussianProcessHead(**how)


def meta_of(learner, model=RAW):
    """The meta-parameters, in float64, where logarithms are of float32 otherwise."""
    meta = learner.init(model, key=KEY)
    return jax.tree.map(lambda a: a.astype(float) if eqx.is_inexact_array(a) else a, meta)


def value_and_grad(learner, meta, task):
    """Of one task, compiled."""
    return eqx.filter_jit(ax.meta_value_and_grad)(
        learner, meta, jax.tree.map(lambda a: a[None], task), key=KEY
    )


def covariance(a, b, kind, amplitude=1.5, lengthscale=0.8):
    r = np.sqrt(((np.asarray(a)[:, None] - np.asarray(b)) ** 2).sum(-1)) / lengthscale
    if kind == "rbf":
        return amplitude**2 * np.exp(-(r**2) / 2)
    return amplitude**2 * (1 + 5**0.5 * r + 5 * r**2 / 3) * np.exp(-(5**0.5) * r)


@pytest.mark.parametrize("standardise", [True, False])
@pytest.mark.parametrize("kind", ["rbf", "matern52"])
def test_the_posterior_of_the_textbook(task, kind, standardise):
    learner = made(kernel=kind, standardise=standardise)
    model = learner.adapt(meta_of(learner), task.support, key=KEY)
    (x, y), q = map(np.asarray, (task.support.x, task.support.y)), np.asarray(task.query.x)
    shift, scale = (y.mean(0), y.std(0)) if standardise else (0.0, np.ones(2))
    k = covariance(x, x, kind) + 0.3**2 * np.eye(len(x))
    cross = covariance(x, q, kind)
    mean = shift + scale * (cross.T @ np.linalg.solve(k, (y - shift) / scale))
    variance = 1.5**2 - (cross * np.linalg.solve(k, cross)).sum(0) + 0.3**2
    found, deviation = model.predictive(task.query.x)
    np.testing.assert_allclose(found, mean, rtol=1e-10)
    np.testing.assert_allclose(model(task.query.x), mean, rtol=1e-10)
    np.testing.assert_allclose(deviation, np.sqrt(variance)[:, None] * scale, rtol=1e-10)
    nll = -scipy.stats.norm.logpdf(np.asarray(task.query.y), mean, np.asarray(deviation)).mean()
    np.testing.assert_allclose(ax.losses.predictive_nll(model, task.query), nll, rtol=1e-10)


@pytest.mark.parametrize("kind", ["rbf", "matern52"])
def test_the_regressor_of_scikit_learn(task, kind):
    sk = pytest.importorskip("sklearn.gaussian_process")
    shape = sk.kernels.RBF(0.8) if kind == "rbf" else sk.kernels.Matern(0.8, nu=2.5)
    kernel = sk.kernels.ConstantKernel(1.5**2) * shape + sk.kernels.WhiteKernel(0.3**2)
    theirs = sk.GaussianProcessRegressor(kernel, alpha=0.0, optimizer=None, normalize_y=True)
    theirs.fit(np.asarray(task.support.x), np.asarray(task.support.y))
    mean, deviation = theirs.predict(np.asarray(task.query.x), return_std=True)
    learner = made(kernel=kind)
    model = learner.adapt(meta_of(learner), task.support, key=KEY)
    found, ours = model.predictive(task.query.x)
    np.testing.assert_allclose(found, mean, rtol=1e-8)
    np.testing.assert_allclose(ours, deviation, rtol=1e-8)
    # Theirs is of all targets, standardised and with the constant's units left out.
    evidence_of = theirs.log_marginal_likelihood_value_
    units = np.log(np.asarray(task.support.y).std(0)).sum() * 8
    value = evidence(meta_of(learner)["kernel"], model.data)
    np.testing.assert_allclose(-16 * value, evidence_of - units, rtol=1e-8)


@pytest.mark.parametrize("kind", ["rbf", "matern52"])
def test_the_evidence_is_a_normal_density_and_its_gradient_that_of_differences(task, kind):
    kernel = meta_of(made(kernel=kind))["kernel"]
    data = Data.of(task.support.x, task.support)
    k = covariance(task.support.x, task.support.x, kind) + 0.09 * np.eye(8)
    y = np.asarray(task.support.y)
    density = sum(scipy.stats.multivariate_normal.logpdf(y[:, i], np.zeros(8), k) for i in (0, 1))
    np.testing.assert_allclose(evidence(kernel, data), -density / 16, rtol=1e-10)
    slope = jax.jit(jax.grad(evidence))(kernel, data)
    for name in ("log_amplitude", "log_lengthscale", "log_noise"):
        at = lambda h, name=name: evidence(
            eqx.tree_at(lambda k: getattr(k, name), kernel, getattr(kernel, name) + h), data
        )
        h = 1e-4
        difference = (8 * (at(h) - at(-h)) - (at(2 * h) - at(-2 * h))) / (12 * h)
        np.testing.assert_allclose(getattr(slope, name), difference, rtol=1e-7)


def test_derivatives_of_matern_where_points_coincide():
    """κ(√q) = 1 − 5/6 q + 25/24 q² + O(q^2.5)."""
    with jax.enable_x64(True):
        first, zero = jax.grad(kernels._matern52), jnp.zeros(())
        assert first(zero) == pytest.approx(-5 / 6, rel=1e-15)
        assert jax.grad(first)(zero) == pytest.approx(25 / 12, rel=1e-15)
        assert np.isfinite(jax.grad(jax.grad(first))(zero))
        q, h = jnp.asarray(0.7), 1e-5
        for f, slope in ((kernels._matern52, first), (first, jax.grad(first))):
            assert np.isclose(slope(q), (f(q + h) - f(q - h)) / (2 * h), rtol=1e-8)


def test_hyper_parameters_adapt_by_the_evidence_of_the_support(task):
    learner = made(inner_steps=3, inner_lr=0.05)
    meta = meta_of(learner)
    path = learner.iterates(meta, task.support, key=KEY)
    values = [evidence(ax.tree.at(path, i).kernel, ax.tree.at(path, i).data) for i in range(4)]
    assert all(b < a for a, b in itertools.pairwise(values))
    data = ax.tree.at(path, 0).data
    slope = jax.grad(evidence)(meta["kernel"], data)
    moved = jax.tree.map(lambda a, g: a - 0.05 * g, meta["kernel"], slope)
    first = ax.tree.at(path, 1).kernel
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(moved), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12)
    exact = learner.adapt(meta, task.support, key=KEY)
    np.testing.assert_allclose(exact(task.query.x), ax.tree.at(path, 3)(task.query.x), rtol=1e-12)


def test_the_joint_objective_is_the_evidence_of_all(task):
    """In the units of the targets, so that standardising leaves it a density of theirs."""
    learner = made(objective="marginal", standardise=False)
    value, metrics = learner.meta_loss(meta_of(learner), task, key=KEY)
    both = ax.Batch.joined(task.support, task.query)
    joint = evidence(meta_of(learner)["kernel"], Data.of(both.x, both))
    np.testing.assert_allclose(value, joint, rtol=1e-12)
    assert metrics["noise"] == pytest.approx(0.3)
    scaled = made(objective="marginal", amplitude=0.7)
    a, _ = scaled.meta_loss(meta_of(scaled), task, key=KEY)
    larger = jax.tree.map(lambda y: y, task)
    larger = eqx.tree_at(lambda t: (t.support.y, t.query.y), larger,
                         (10 * task.support.y, 10 * task.query.y))  # fmt: skip
    b, _ = scaled.meta_loss(meta_of(scaled), larger, key=KEY)
    np.testing.assert_allclose(b - a, np.log(10), rtol=1e-10)


@pytest.mark.parametrize("objective", ["predictive", "marginal"])
def test_padding_is_not_there(task, objective):
    learner = made(inner_steps=1, kernel="matern52", head="head", objective=objective)
    model = ax.models.MLP(3, 2, (6,), key=KEY, activation=jnp.tanh)
    meta = learner.init(model, key=KEY)
    longer = ax.Task(padded(task.support, 11), padded(task.query, 9))
    spoilt = eqx.tree_at(lambda t: t.support.y, longer, longer.support.y.at[8:].set(jnp.nan))
    pairs = [value_and_grad(learner, meta, t) for t in (task, longer, spoilt)]
    for a, b, c in zip(*map(jax.tree.leaves, pairs), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-11, atol=1e-13)
        np.testing.assert_array_equal(c, b)
    one, other = (learner.adapt(meta, t.support, key=KEY) for t in (task, spoilt))
    for a, b in zip(one.predictive(task.query.x), other.predictive(task.query.x), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-12)


def test_gaps_of_single_targets(task):
    """Every output is as if it had been learned alone, from the examples that it has."""
    learner = made(inner_steps=0)
    meta = meta_of(learner)
    weight = jnp.ones((8, 2)).at[2, 0].set(0).at[jnp.array([1, 5]), 1].set(0)
    gaps = ax.Batch(task.support.x, jnp.where(weight > 0, task.support.y, jnp.nan), weight)
    found = learner.adapt(meta, gaps, key=KEY).predictive(task.query.x)
    for output in (0, 1):
        rows = np.flatnonzero(np.asarray(weight[:, output]))
        alone = ax.Batch(task.support.x[rows], task.support.y[rows, output])
        due = learner.adapt(meta, alone, key=KEY).predictive(task.query.x)
        for a, b in zip(found, due, strict=True):
            np.testing.assert_allclose(a[:, output], b, rtol=1e-12)


def test_weights_are_precisions(task):
    """An example of weight 2 is as good as two of weight 1."""
    learner = made(standardise=False)
    meta = meta_of(learner)
    twice = jax.tree.map(lambda a: jnp.concatenate([a, a[:1]]), task.support)
    counted = ax.Batch(task.support.x, task.support.y, jnp.ones(8).at[0].set(2))
    a, b = (
        learner.adapt(meta, batch, key=KEY).predictive(task.query.x) for batch in (twice, counted)
    )
    for x, y in zip(a, b, strict=True):
        np.testing.assert_allclose(y, x, rtol=1e-8)


@pytest.mark.parametrize("transductive", [True, False])
def test_scores_are_by_the_deviations_that_are_predicted(transductive):
    learner = made(head="head")
    tasks = ax.tasks.sinusoid(shot=5, query=8).test
    meta = learner.init(ax.models.MLP(1, 1, (8,), key=KEY), key=KEY)
    how = {"episodes": 3, "key": KEY, "transductive": transductive}
    report = ax.evaluate(learner, meta, tasks, **how)
    assert report.protocol["nll_noise"] == "predicted"
    nll, inside = [], []
    for i in range(3):
        task = tasks.sample(ax.task.episode_key("test", KEY, i))
        mean, deviation = learner.adapt(meta, task.support, key=KEY).predictive(task.query.x)
        z = np.asarray((task.query.y - mean) / deviation)
        nll.append(-scipy.stats.norm.logpdf(z).mean() + np.log(np.asarray(deviation)).mean())
        inside.append((np.abs(z) < scipy.stats.norm.ppf(0.95)).mean())
    np.testing.assert_allclose(report.values["nll"][:, -1], nll, rtol=1e-3)
    np.testing.assert_allclose(report.values["coverage_90"][:, -1], inside, rtol=1e-6)
    again = ax.evaluate(learner, meta, tasks, **how, noise=5.0)
    np.testing.assert_array_equal(again.values["nll"], report.values["nll"])


def test_bands_are_of_the_deviations_that_are_predicted():
    learner = made(head="head")
    tasks = ax.tasks.sinusoid(shot=5, query=8).test
    meta = learner.init(ax.models.MLP(1, 1, (8,), key=KEY), key=KEY)
    figure = ax.report.sampled_functions({"GP": (learner, meta)}, tasks, key=KEY, rows=1)
    band = figure.axes[0].collections[0].get_paths()[0].vertices
    task = tasks.sample(jax.random.split(KEY, 1)[0])
    at = np.unique(band[:, 0])[[20, 100]]
    model = learner.adapt(meta, task.support, key=jax.random.split(KEY, 1)[0])
    mean, deviation = model.predictive(jnp.asarray(at, jnp.float32)[:, None])
    for x, m, s in zip(at, np.ravel(mean), np.ravel(deviation), strict=True):
        ends = np.unique(band[np.isclose(band[:, 0], x), 1])
        due = [m - s * scipy.stats.norm.ppf(0.95), m + s * scipy.stats.norm.ppf(0.95)]
        np.testing.assert_allclose(sorted(ends), due, atol=2e-3)


def test_an_ensemble_of_processes_is_scored_by_its_mixture(task):
    learner = made()
    models = [
        learner.adapt(meta_of(made(noise=noise)), task.support, key=KEY) for noise in (0.2, 0.6)
    ]
    both = ax.Ensemble(ax.tree.stack(models))
    from adaptax.engine.predict import deviations

    found = deviations(both, task.query.x, task.support.x, transductive=True)
    for one, own in zip(models, found, strict=True):
        np.testing.assert_allclose(own, one.predictive(task.query.x)[1], rtol=1e-12)
    scores = ax.metrics.regression(both(task.query.x), task.query.y, found)
    pdf = [
        scipy.stats.norm.pdf(np.asarray(task.query.y), *map(np.asarray, m.predictive(task.query.x)))
        for m in models
    ]
    np.testing.assert_allclose(scores["nll"], -np.log(np.mean(pdf, axis=0)).mean(), rtol=1e-10)


@pytest.mark.parametrize("kind", ["rbf", "matern52"])
def test_float32_where_points_coincide_and_noise_is_small(kind):
    x = jnp.repeat(jnp.linspace(0, 1, 40)[:, None], 5, axis=0)
    support = ax.Batch(x, jnp.sin(6 * x))
    learner = made(kernel=kind, lengthscale=1.0, noise=1e-4, inner_steps=2, inner_lr=0.01)
    model = learner.adapt(learner.init(RAW, key=KEY), support, key=KEY)
    mean, deviation = model.predictive(x)
    np.testing.assert_allclose(mean, support.y, atol=0.05)
    assert jnp.all(jnp.isfinite(deviation) & (deviation > 0))


@pytest.mark.parametrize("n", [1, 3])
def test_a_constant_support_keeps_its_units(n):
    learner = made()
    support = ax.Batch(jnp.arange(3.0 * n).reshape(n, 3), jnp.full((n, 1), 7.0))
    model = learner.adapt(learner.init(RAW, key=KEY), support, key=KEY)
    mean, deviation = model.predictive(support.x + 100)
    np.testing.assert_allclose(mean, 7.0, rtol=1e-6)
    np.testing.assert_allclose(deviation, np.hypot(1.5, 0.3), rtol=1e-4)


def test_what_is_refused(task):
    for name in ("amplitude", "lengthscale", "noise"):
        with pytest.raises(ValueError, match=f"{name} is above 0"):
            made(**{name: 0.0})
    with pytest.raises(ValueError, match="jitter is 0 or more"):
        made(jitter=-1.0)
    with pytest.raises(ValueError, match="too coarse"):
        made(loss=ax.losses.MixedPrecision(ax.losses.mse))
    learner = made()
    meta = learner.init(RAW, key=KEY)
    with pytest.raises(ValueError, match="wants targets that are numbers, not int32"):
        learner.adapt(meta, ax.Batch(task.support.x, jnp.zeros(8, jnp.int32)), key=KEY)
    with pytest.raises(ValueError, match="no examples"):
        learner.adapt(meta, jax.tree.map(lambda a: a[:0], task.support), key=KEY)
    with pytest.raises(ValueError, match=r"wants a model with predictive\(x\)"):
        ax.losses.predictive_nll(RAW, task.query)
    with pytest.raises(ValueError, match="give both the same shape"):
        ax.losses.predictive_nll(
            learner.adapt(meta, task.support, key=KEY), ax.Batch(task.query.x, task.query.y[:, :1])
        )

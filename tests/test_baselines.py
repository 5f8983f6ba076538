"""Ridge regression and the nearest class mean: closed forms, meta-parameters, refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import adaptax as ax

KEY = jax.random.key(0)


@pytest.fixture
def task():
    with jax.enable_x64(True):
        x, y = jax.random.normal(KEY, (12, 3)), jax.random.normal(jax.random.key(1), (12, 2))
        yield ax.Task(ax.Batch(x[:5], y[:5]), ax.Batch(x[5:], y[5:]))


@pytest.mark.parametrize("penalty", [1e-2, 1.0, 30.0])
def test_the_normal_equations(task, penalty):
    learner = ax.RidgeRegression(penalty=penalty)
    predict = learner.adapt(learner.init(None, key=KEY), task.support, key=KEY)
    x, y = np.asarray(task.support.x), np.asarray(task.support.y)
    centred = x - x.mean(axis=0)
    weight = np.linalg.solve(centred.T @ centred + penalty * np.eye(3), centred.T @ (y - y.mean(0)))
    expected = (np.asarray(task.query.x) - x.mean(axis=0)) @ weight + y.mean(axis=0)
    np.testing.assert_allclose(predict(task.query.x), expected, rtol=1e-9)


def test_a_huge_penalty_predicts_the_mean(task):
    learner = ax.RidgeRegression(penalty=1e9)
    predict = learner.adapt(learner.init(None, key=KEY), task.support, key=KEY)
    mean = jnp.broadcast_to(task.support.y.mean(axis=0), (7, 2))
    np.testing.assert_allclose(predict(task.query.x), mean, atol=1e-7)


def test_the_penalty_is_meta_learned(task):
    tasks = ax.tasks.sinusoid(shot=5, query=6).train
    model = ax.models.MLP(1, 1, (2,), key=KEY)
    ax.testing.check_meta_gradient(ax.RidgeRegression(penalty=0.5), model, tasks, key=KEY)
    learner = ax.RidgeRegression(penalty=0.5)
    tasks = jax.tree.map(lambda a: a[None], task)
    (value, _), gradient = ax.meta_value_and_grad(
        learner, learner.init(None, key=KEY), tasks, key=KEY
    )
    assert value > 0
    assert gradient["log_penalty"] != 0


def test_what_it_refuses(task):
    with pytest.raises(ValueError, match="penalty is above 0"):
        ax.RidgeRegression(penalty=0.0)
    learner = ax.RidgeRegression()
    meta = learner.init(None, key=KEY)
    assert learner.init(meta, key=KEY) is meta
    classes = ax.Batch(task.support.x, jnp.zeros(5, jnp.int32))
    with pytest.raises(ValueError, match="targets that are numbers"):
        learner.adapt(meta, classes, key=KEY)
    with pytest.raises(ValueError, match="no examples"):
        learner.adapt(meta, ax.Batch(task.support.x[:0], task.support.y[:0]), key=KEY)


@pytest.fixture
def classes():
    with jax.enable_x64(True):
        x = jax.random.normal(KEY, (11, 3))
        y = jnp.array([0, 1, 2, 0, 1, 2, 1, 0, 1, 2, 2], jnp.int32)
        yield ax.Task(ax.Batch(x[:7], y[:7]), ax.Batch(x[7:], y[7:]))


def test_the_nearest_class_mean(classes):
    learner = ax.NearestClassMean(way=3, scale=4.0)
    predict = learner.adapt(learner.init(None, key=KEY), classes.support, key=KEY)
    x, y = np.asarray(classes.support.x), np.asarray(classes.support.y)
    means = np.stack([x[y == c].mean(axis=0) for c in range(3)])
    away = ((np.asarray(classes.query.x)[:, None] - means) ** 2).sum(axis=-1)
    expected = jax.nn.log_softmax(-4.0 * jnp.asarray(away))
    np.testing.assert_allclose(jax.nn.log_softmax(predict(classes.query.x)), expected, rtol=1e-9)


def test_a_class_without_support_is_never_predicted(classes):
    learner = ax.NearestClassMean(way=4)
    predict = learner.adapt(learner.init(None, key=KEY), classes.support, key=KEY)
    assert jnp.all(jax.nn.softmax(predict(classes.query.x))[:, 3] == 0)


def test_the_scale_is_meta_learned(classes):
    learner, h = ax.NearestClassMean(way=3, scale=4.0), 1e-5
    loss = lambda log_scale: learner.meta_loss({"log_scale": log_scale}, classes, key=KEY)[0]
    at = jnp.log(4.0)
    difference = (loss(at + h) - loss(at - h)) / (2 * h)
    assert np.isclose(jax.grad(loss)(at), difference, rtol=1e-6)
    assert abs(difference) > 1e-3


def test_what_the_class_mean_refuses(task):
    with pytest.raises(ValueError, match="above 0"):
        ax.NearestClassMean(scale=-1.0)
    learner = ax.NearestClassMean()
    with pytest.raises(ValueError, match="integer labels"):
        learner.adapt(learner.init(None, key=KEY), task.support, key=KEY)

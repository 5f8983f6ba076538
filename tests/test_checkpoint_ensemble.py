"""Keeping the best checkpoints, and their ensemble."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adaptax as ax
from adaptax.algorithms.checkpoint_ensemble import MeanOfLogits

KEY = jax.random.key(0)
TASKS = ax.tasks.sinusoid(shot=5, query=5)
LEARNER = ax.MAML(ax.losses.mse, 0.01)


def train(run=None, keep=3, **how):
    # Away and back, so that the best checkpoints are neither the first nor the last ones.
    optimizer = optax.sgd(lambda step: jnp.where(step < 6, 0.01, -0.05))
    return ax.fit(
        LEARNER, ax.models.MLP(1, 1, (8,), key=KEY), TASKS.train, steps=12, meta_batch=4, chunk=3,
        key=KEY, devices=1, optimizer=optimizer, validate=TASKS.val, validate_every=3,
        validation={"episodes": 20}, keep=keep, run=run, **how,
    )  # fmt: skip


def row(stacked, i):
    """One of several stacked models."""
    return jax.tree.map(lambda leaf: leaf[i] if eqx.is_array(leaf) else leaf, stacked)


def assert_same(a, b):
    for x, y in zip(*(jax.tree.leaves(ax.tree.parameters(m)) for m in (a, b)), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.fixture(scope="module")
def trained():
    return train()


def test_the_best_are_kept_in_order(trained):
    scores = [-record["validation"]["mse"] for record in trained.history]
    ranked = sorted(range(len(scores)), key=lambda i: -scores[i])
    assert trained.best_step == 3 * (1 + ranked[0])
    assert_same(row(trained.kept, 0), trained.meta)
    # Each kept checkpoint scores what was measured of it, and there are three.
    judge = ax.Evaluator(LEARNER, TASKS.val, episodes=20)
    validation_key = jax.random.split(KEY, 4)[3]
    for place, i in enumerate(ranked[:3]):
        meta = row(trained.kept, place)
        assert np.isclose(judge(meta, key=validation_key).score, scores[i], rtol=1e-5)
    assert len(jax.tree.leaves(trained.kept)[0]) == 3


def test_fewer_validations_than_asked_for(trained):
    many = train(keep=7)
    assert len(jax.tree.leaves(ax.tree.parameters(many.kept))[0]) == 4
    assert_same(jax.tree.map(lambda a: a[:3] if eqx.is_array(a) else a, many.kept), trained.kept)


def test_the_kept_survive_resumption(trained, tmp_path):
    class Stop(Exception):
        pass

    def stop(record):
        if record["step"] == 6:
            raise Stop

    run = ax.Run(tmp_path / "run")
    with pytest.raises(Stop):
        train(run, watch=stop)
    resumed = train(run, resume=True)
    assert resumed.best_step == trained.best_step
    assert_same(resumed.kept, trained.kept)


def test_without_validation_nothing_is_kept():
    result = ax.fit(LEARNER, ax.models.MLP(1, 1, (8,), key=KEY), TASKS.train, steps=2, key=KEY)
    assert result.kept is None
    with pytest.raises(ValueError, match="keep is a whole number of at least 1, not 0"):
        train(keep=0)


def test_the_ensemble_is_the_mean_of_logits(trained):
    ensemble = ax.CheckpointEnsemble(LEARNER.loss, LEARNER)
    task = TASKS.test.sample(KEY)
    mean = ensemble.adapt(trained.kept, task.support, key=KEY)
    singles = [
        LEARNER.adapt(row(trained.kept, i), task.support, key=KEY)(task.query.x) for i in range(3)
    ]
    assert not np.allclose(singles[0], singles[1])
    np.testing.assert_allclose(mean(task.query.x), np.mean(singles, axis=0), rtol=1e-5, atol=1e-6)
    path = ensemble.iterates(trained.kept, task.support, key=KEY)
    last = row(path, -1)
    np.testing.assert_allclose(last(task.query.x), mean(task.query.x), rtol=1e-6)


def test_an_ensemble_of_one_model_is_the_model(trained):
    same = jax.tree.map(
        lambda a: jnp.repeat(a[None], 4, axis=0) if eqx.is_array(a) else a, trained.meta
    )
    ensemble = ax.CheckpointEnsemble(LEARNER.loss, LEARNER)
    how = {"episodes": 8, "key": KEY}
    many, one = (
        ax.evaluate(learner, meta, TASKS.test, **how)
        for learner, meta in ((ensemble, same), (LEARNER, trained.meta))
    )
    np.testing.assert_allclose(many.values["mse"], one.values["mse"], rtol=1e-5)
    assert many.protocol["model"] == "ensemble of 4"
    assert many.protocol["combined"] == "mean of logits"
    assert one.protocol["model"] == "single"
    assert many.protocol["backbone"] == one.protocol["backbone"]


def test_the_mean_of_logits_is_not_the_mean_of_probabilities():
    logits = jnp.array([[[4.0, 0.0]], [[-1.0, 0.0]]])
    models = ax.Ensemble(ax.Functional(logits, lambda p, x: p))
    mean = MeanOfLogits(models)(None)
    np.testing.assert_allclose(mean, [[1.5, 0.0]])
    found = jax.nn.softmax(mean)[0, 0]
    assert not np.isclose(found, jax.nn.softmax(logits).mean(axis=0)[0, 0], rtol=0.05)


def test_an_ensemble_is_not_trained(trained):
    ensemble = ax.CheckpointEnsemble(LEARNER.loss, LEARNER)
    assert not isinstance(ensemble, ax.MetaLearner)
    with pytest.raises(TypeError):
        ax.fit(ensemble, trained.kept, TASKS.train, steps=1, key=KEY)

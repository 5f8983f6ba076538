import json
import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import adaptax as ax
from adaptax import metrics
from adaptax.engine.evaluate import Evaluator
from adaptax.engine.predict import predictions
from adaptax.task import episode_key
from adaptax.testing import Blobs
from compilations import compilations, fresh_programs  # noqa: F401

KEY = jax.random.key(3)
TASKS = ax.tasks.sinusoid(shot=5, query=6)
mse = ax.losses.mse


def net(**how):
    return ax.models.MLP(1, 1, (8,), key=jax.random.key(0), activation=jnp.tanh, **how)


def evaluate(learner, meta=None, tasks=TASKS.test, **how):
    how = {"episodes": 7, "key": KEY, **how}
    return ax.evaluate(learner, net() if meta is None else meta, tasks, **how)


def strict(value):
    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    return json.loads(json.dumps(value), parse_constant=refuse)


def test_scores_by_hand():
    learner = ax.MAML(mse, 0.05, 2)
    report = evaluate(learner, steps=3)
    assert report.at == [0, 1, 2, 3]
    assert report.values["mse"].shape == (7, 4)
    for i in range(7):
        task = TASKS.test.sample(episode_key("test", KEY, i))
        path = learner.iterates(net(), task.support, key=KEY, steps=3)
        for k in range(4):
            at = jax.tree.map(lambda leaf, k=k: leaf[k] if eqx.is_array(leaf) else leaf, path)
            assert np.isclose(report.values["mse"][i, k], mse(at, task.query), rtol=1e-4)
    last = report.values["mse"][:, -1]
    assert np.isclose(report.mean("mse"), last.mean(), rtol=1e-6)
    assert np.isclose(report.ci95("mse"), 1.96 * last.std(ddof=1) / math.sqrt(7), rtol=1e-5)
    assert report.score == -report.mean("mse")
    row = report.to_json()["result"]
    assert np.isclose(row["median_mse"], np.median(last), rtol=1e-6)
    assert row["mse_not_diverged"] == row["mse"]
    assert row["diverged"] == 0


def test_every_learner_sees_the_same_episodes():
    before = [
        evaluate(learner, learner.init(net(), key=KEY), at=[0]).values["mse"]
        for learner in (ax.MAML(mse), ax.MetaSGD(mse), ax.Reptile(mse, inner_batch=2))
    ]
    assert np.array_equal(before[0], before[1])
    assert np.array_equal(before[0], before[2])
    more = evaluate(ax.MAML(mse), at=[0], episodes=30).values["mse"]
    assert np.allclose(more[:7], before[0], rtol=1e-5)
    assert not np.allclose(
        evaluate(ax.MAML(mse), at=[0], key=jax.random.key(4)).values["mse"], before[0]
    )


def test_mapping_does_not_matter():
    learner = ax.MAML(mse, 0.05, 2)
    expected = evaluate(learner).values["mse"]
    for mapping in ("scan", "vmap", 3):
        assert np.allclose(evaluate(learner, mapping=mapping).values["mse"], expected, rtol=1e-4)


def test_the_protocol_is_part_of_the_report(tmp_path):
    report = evaluate(ax.MAML(mse, 0.05, 2, eval_steps=3), at=[0, 3], noise=0.5)
    protocol = report.protocol
    assert protocol["algorithm"] == "MAML"
    assert protocol["split"] == "test"
    assert (protocol["shot"], protocol["query"], protocol["episodes"]) == (5, 6, 7)
    assert (protocol["steps"], protocol["transductive"], protocol["model"]) == (3, True, "single")
    assert protocol["nll_noise"] == 0.5
    for words in ("mse", "95 % CI", "mse by step: 0:", "transductive True", "episodes 7"):
        assert words in str(report)
    report.save(tmp_path / "deep" / "report.json")
    assert strict(report.to_json()) == json.loads((tmp_path / "deep" / "report.json").read_text())


def test_an_evaluator_is_compiled_once_and_leaves_meta_alone():
    learner = ax.Reptile(mse, inner_steps=2, inner_optimizer=ax.inner.adam(0.01), carry_state=True)
    meta = learner.init(net(), key=KEY)
    before = [np.array(leaf) for leaf in jax.tree.leaves(ax.tree.parameters(meta))]
    done = []
    judge = Evaluator(learner, TASKS.val, episodes=50, mapping="scan", watch=done.append)
    first = judge(meta, key=KEY)
    with compilations() as compiled:
        second = judge(meta, key=KEY)
    assert not compiled
    assert done == [20, 40, 50, 20, 40, 50]
    assert np.array_equal(first.values["mse"], second.values["mse"])
    after = jax.tree.leaves(ax.tree.parameters(meta))
    assert all(np.array_equal(a, b) for a, b in zip(before, after))


# Transduction


@pytest.mark.parametrize("particles", [1, 3])
def test_queries_see_each_other_only_in_transduction(particles):
    model = net(batch_norm=True)
    if particles > 1:
        scaled = [jax.tree.map(lambda leaf, s=s: leaf * s if eqx.is_array(leaf) else leaf, model)
                  for s in (1.0, 1.1, 1.2)]  # fmt: skip
        model = ax.Ensemble(ax.tree.stack(scaled))
    support, x = jax.random.normal(KEY, (4, 1)), jax.random.normal(jax.random.key(1), (20, 1))
    moved = x.at[1:].add(3.0)
    for transductive in (True, False):
        f = jax.jit(lambda x, t=transductive: predictions(model, x, support, transductive=t))
        one, other = f(x), f(moved)
        assert one.shape == ((20, 1) if particles == 1 else (particles, 20, 1))
        unchanged = np.allclose(one[..., 0, :], other[..., 0, :], rtol=1e-5, atol=1e-6)
        assert unchanged == (not transductive)
    alone = model(jnp.concatenate([support, x[7:8]]))[..., -1, :]
    single = predictions(model, x, support, transductive=False)[..., 7, :]
    assert np.allclose(single, alone, rtol=1e-5, atol=1e-6)


def test_predict_adapts_and_predicts():
    learner, model = ax.MAML(mse, 0.05, 2), net(batch_norm=True)
    task = TASKS.test.sample(KEY)
    adapted = learner.adapt(model, task.support, key=KEY)
    for transductive in (True, False):
        found = ax.predict(learner, model, task.support, task.query.x, transductive=transductive)
        want = predictions(adapted, task.query.x, task.support.x, transductive=transductive)
        np.testing.assert_array_equal(found, want)
    together = ax.predict(learner, model, task.support, task.query.x)
    np.testing.assert_allclose(together, adapted(task.query.x), rtol=1e-5, atol=1e-6)


def test_reports_by_transduction_differ_only_with_batch_norm():
    for batch_norm in (False, True):
        scores = [
            evaluate(ax.MAML(mse, 0.01), net(batch_norm=batch_norm), transductive=t, at=[1])
            for t in (True, False)
        ]
        assert [r.protocol["transductive"] for r in scores] == [True, False]
        same = np.allclose(*(r.values["mse"] for r in scores), rtol=1e-4)
        assert same == (not batch_norm)


# Divergence


def test_tasks_that_diverge_are_counted_and_nothing_is_hidden(tmp_path):
    class Alternate(ax.TaskDistribution):
        split: str = eqx.field(static=True, default="test")

        def sample(self, key):
            task = TASKS.test.sample(key)
            huge = jnp.where(jax.random.bernoulli(key), 1e30, 1.0)
            return eqx.tree_at(lambda t: t.support.y, task, task.support.y * huge)

    learner = ax.MAML(lambda m, b: jnp.mean((m(b.x) - b.y) ** 2), 0.01, 3)
    report = evaluate(learner, tasks=Alternate(), episodes=20)
    row = strict(report.to_json())["result"]
    assert 0 < row["diverged"] == report.diverged() < 20
    assert row["mse"] is None
    assert not math.isfinite(report.mean("mse"))
    assert not math.isfinite(report.ci95("mse"))
    assert report.score == -math.inf
    kept = report.values["mse"][np.isfinite(report.values["mse"][:, -1]), -1]
    assert np.isclose(row["mse_not_diverged"], kept.mean(), rtol=1e-5)
    assert f"{report.diverged()} of 20 tasks diverged" in str(report)
    assert f"{kept.mean():.4g}" in str(report)
    report.save(tmp_path / "report.json")
    assert "NaN" not in (tmp_path / "report.json").read_text()


def test_when_everything_diverges():
    report = evaluate(ax.MAML(mse, 1e12, 5))
    assert report.diverged() == 7
    assert report.diverged(0) == 0
    assert math.isnan(report.mean("mse", diverged=False))
    row = strict(report.to_json())
    assert row["result"]["mse_not_diverged"] is None
    assert row["curve"][0]["mse"] > 0
    assert "7 of 7 tasks diverged" in str(report)


def test_classification_that_diverges():
    model = ax.models.MLP(2, 3, (8,), key=KEY)
    report = evaluate(ax.MAML(ax.losses.cross_entropy, 1e30, 4), model, Blobs())
    assert report.diverged() == 7
    strict(report.to_json())
    assert "7 of 7 tasks diverged" in str(report)


# Classification


def test_scores_of_classification():
    model = ax.models.MLP(2, 3, (8,), key=KEY, activation=jnp.tanh)
    learner = ax.MAML(ax.losses.cross_entropy, 0.5, 2)
    report = evaluate(learner, model, Blobs())
    tables = np.zeros((3, metrics.BINS, 3))
    for i in range(7):
        task = Blobs().sample(episode_key("train", KEY, i))
        path = learner.iterates(model, task.support, key=KEY)
        for k in range(3):
            at = jax.tree.map(lambda leaf, k=k: leaf[k] if eqx.is_array(leaf) else leaf, path)
            expected = metrics.classification(at(task.query.x), task.query.y)
            tables[k] += expected.pop("bins")
            for name, value in expected.items():
                assert np.isclose(report.values[name][i, k], value, rtol=1e-3, atol=1e-5)
    assert np.allclose(report.bins, tables, rtol=1e-3, atol=1e-4)
    assert np.isclose(report.ece(), metrics.calibration_error(jnp.asarray(tables[-1])), rtol=1e-3)
    assert report.primary == "accuracy"
    assert report.score == report.mean("accuracy")
    assert {"accuracy", "nll", "brier", "ece", "accuracy_ci95"} <= set(report.to_json()["result"])
    assert " %" in str(report).splitlines()[0]
    with pytest.raises(ValueError, match="a metric of classification"):
        evaluate(ax.MAML(mse)).ece()


def test_differences_are_of_pairs():
    slow, fast = (evaluate(ax.MAML(mse, lr, 2), episodes=30) for lr in (0.001, 0.05))
    mean, half = fast.difference(slow)
    apart = fast.values["mse"][:, -1] - slow.values["mse"][:, -1]
    assert np.isclose(mean, apart.mean())
    assert np.isclose(half, 1.96 * apart.std(ddof=1) / 30**0.5)
    assert half < slow.ci95("mse")
    assert fast.difference(slow, step=0) == (0, 0)
    before = fast.values["mse"][:, 0]
    assert np.isclose(fast.gain()[0], np.mean(fast.values["mse"][:, -1] - before))
    row = fast.to_json()["result"]
    assert (row["gain"], row["gain_ci95"]) == fast.gain()
    for other in (evaluate(ax.MAML(mse)), evaluate(ax.MAML(mse), tasks=TASKS.val, episodes=30)):
        with pytest.raises(ValueError, match="evaluate both on the same"):
            fast.difference(other)
    with pytest.raises(ValueError, match="the gain is over step 0"):
        evaluate(ax.MAML(mse), at=[1]).gain()
    with pytest.raises(ValueError, match="metric is one of coverage_50, "):
        fast.mean("accuracy")


def test_other_rates_at_evaluation():
    given = evaluate(ax.MAML(mse, 0.05, 2), lr=(0.01, 0.02))
    by_hand = evaluate(ax.MAML(mse, lambda step: jnp.array([0.01, 0.02])[step], 2))
    np.testing.assert_allclose(given.values["mse"], by_hand.values["mse"], rtol=1e-5)
    assert given.protocol["inner_lr"] == [0.01, 0.02]


class Pair(ax.Adapter):
    """Predicts with two models."""

    loss: ax.Loss = mse

    def adapt(self, meta, support, *, key):
        moved = jax.tree.map(lambda leaf: leaf + 0.1 if eqx.is_array(leaf) else leaf, meta)
        return ax.Ensemble(ax.tree.stack([meta, moved]))


def test_an_ensemble_is_scored_as_a_mixture():
    report = evaluate(Pair())
    assert report.at == [None]
    assert report.protocol["model"] == "ensemble of 2"
    task = TASKS.test.sample(episode_key("test", KEY, 0))
    f = Pair().adapt(net(), None, key=KEY)(task.query.x)
    assert np.isclose(
        report.values["mse"][0, 0], jnp.mean((f.mean(0) - task.query.y) ** 2), rtol=1e-4
    )
    assert np.isclose(
        report.values["particle_mse"][0, 0], jnp.mean((f - task.query.y) ** 2), rtol=1e-4
    )
    assert "particle_mse" in report.to_json()["result"]


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"episodes": 0}, "episodes is at least 1, not 0"),
        ({"noise": 0.0}, "noise is a positive"),
        ({"steps": -1}, "steps is 0 or more, not -1"),
        ({"trajectories": 3}, "trajectories=3 is for models that act, and these predict"),
        ({"at": [0, 9]}, "between 0 and the last, 1"),
        ({"at": []}, "between 0 and the last, 1"),
        ({"tasks": ax.tasks.sinusoid(query=0).test}, "no queries to score"),
        ({"meta": ax.models.MLP(1, 2, (3,), key=KEY)}, "the model predicts"),
    ],
)
def test_what_cannot_be_evaluated(how, message):
    with pytest.raises(ValueError, match=message):
        evaluate(ax.MAML(lambda m, b: jnp.mean(m(b.x) ** 2)), **how)

"""Intervals and sets that hold for new tasks: the quantile by hand, the promise by simulation."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import adaptax as ax
from adaptax.engine.conformal import Scores, quantile, scored
from adaptax.tasks import from_tasks
from learners import LEARNERS

KEY = jax.random.key(0)


def by_hand(score, weight, coverage):
    """The least score t with F(t) at the coverage, counted one by one."""
    tasks = [(s, w / w.sum()) for s, w in zip(score, weight) if w.sum() > 0]
    for t in sorted(np.concatenate([s[w > 0] for s, w in tasks])):
        if sum((w * (s <= t)).sum() for s, w in tasks) / (len(tasks) + 1) >= coverage - 1e-12:
            return t
    return np.inf


@pytest.mark.parametrize("coverage", [0.2, 0.5, 0.8, 0.9])
def test_the_quantile_counts_tasks_alike_and_infinity_once(coverage):
    rng = np.random.default_rng(0)
    for _ in range(20):
        score = rng.normal(size=(12, 5))
        weight = (rng.random((12, 5)) < 0.7).astype(float)
        weight[3] = 0
        assert quantile(score, weight, coverage) == by_hand(score, weight, coverage)


def test_one_query_a_task_is_split_conformal():
    score = np.arange(1.0, 20)[:, None]  # 19 tasks: 0.9 is the 18th of 20
    assert quantile(score, np.ones((19, 1)), 0.9) == 18
    assert quantile(score, np.ones((19, 1)), 0.95) == 19
    with pytest.raises(ValueError, match=r"0\.96 for new tasks wants 24 calibration tasks .* 19"):
        quantile(score, np.ones((19, 1)), 0.96)
    with pytest.raises(ValueError, match="coverage is between 0 and 1"):
        quantile(score, np.ones((19, 1)), 1.0)


@pytest.mark.parametrize("coverage", [0.5, 0.9])
def test_coverage_of_new_tasks_is_as_promised(coverage):
    """Tasks of other scales and sizes: within three standard errors, and below c + 1/(T + 1)."""
    rng = np.random.default_rng(1)
    tasks, queries, repeats = 24, 8, 3000
    held = np.empty(repeats)
    for i in range(repeats):
        scale = rng.lognormal(sigma=1.0, size=(tasks + 1, 1))
        score = np.abs(rng.normal(size=(tasks + 1, queries))) * scale
        weight = (np.arange(queries) < rng.integers(1, queries + 1, (tasks + 1, 1))).astype(float)
        own = weight[-1] / weight[-1].sum()
        held[i] = (own * (score[-1] <= quantile(score[:-1], weight[:-1], coverage))).sum()
    error = 3 * held.std() / repeats**0.5
    # Above c by at most what 1/(T + 1) at infinity and one query's share of F round up.
    assert coverage - error < held.mean() < coverage + 2 / (tasks + 1) + error


def trained(name, tasks, model, loss, steps=60):
    learner = LEARNERS[name](loss)
    return learner, ax.fit(learner, model, tasks.train, steps=steps, meta_batch=4, key=KEY).meta


@pytest.mark.parametrize("name", ["MAML", "BMAML", "PLATIPUS"])
def test_intervals_of_learners_hold_for_new_waves(name):
    tasks = ax.tasks.sinusoid(shot=5, query=10)
    learner, meta = trained(name, tasks, ax.models.MLP(1, 1, (16,), key=KEY), ax.losses.mse)
    found = ax.conformal(learner, meta, tasks.val, key=KEY, episodes=300, noise=0.1)
    for row in found.check(tasks.test, key=jax.random.key(5), episodes=300):
        # Other test tasks and other calibration tasks: both intervals, at 3 standard errors.
        bound = 3 / 1.96 * np.hypot(row.ci95, row.calibration_ci95)
        assert abs(row.coverage - row.level) < bound, str(row)
        assert bound < 0.12
        assert row.size > 0
    task = tasks.test.sample(KEY)
    low, high = found.interval(task.support, task.query.x, 0.8)
    assert (low < high).all()
    assert low.shape == (10, 1)
    narrow = found.interval(task.support, task.query.x, 0.5)
    assert (narrow[1] - narrow[0] < high - low).all()


def test_an_interval_is_the_prediction_with_the_threshold_on_both_sides():
    tasks = ax.tasks.sinusoid(shot=5, query=10)
    learner, meta = LEARNERS["MAML"](ax.losses.mse), ax.models.MLP(1, 1, (16,), key=KEY)
    found = ax.conformal(learner, meta, tasks.val, key=KEY, episodes=40, noise=0.5)
    task = tasks.test.sample(KEY)
    low, high = found.interval(task.support, task.query.x, 0.9)
    mean = learner.adapt(meta, task.support, key=jax.random.key(0))(task.query.x)
    assert np.allclose((low + high) / 2, mean, atol=1e-5)
    assert np.allclose((high - low) / 2, 0.5 * found.threshold(0.9), rtol=1e-5)
    episode = tasks.val.sample(ax.task.episode_key("val", KEY, 3))
    own = learner.adapt(meta, episode.support, key=KEY)
    due = jnp.abs(own(episode.query.x) - episode.query.y) / 0.5
    assert np.allclose(found.scores.score[3], due, rtol=1e-4, atol=1e-5)


class Blobs(ax.TaskDistribution):
    """Three overlapping classes in the plane."""

    split: str = eqx.field(static=True)

    def sample(self, key):
        for_centres, for_noise = jax.random.split(key)
        centres = jax.random.normal(for_centres, (3, 1, 2))
        x = centres + jax.random.normal(for_noise, (3, 9, 2))
        parts = (x[:, :3], x[:, 3:])
        return ax.Task(
            *(ax.Batch(p.reshape(-1, 2), jnp.repeat(jnp.arange(3), p.shape[1])) for p in parts)
        )


def test_sets_of_classes_hold_for_new_tasks():
    splits = ax.task.Splits.of(Blobs)
    learner, meta = trained("MAML", splits, ax.models.MLP(2, 3, (16,), key=KEY),
                            ax.losses.cross_entropy)  # fmt: skip
    found = ax.conformal(learner, meta, splits.val, key=KEY, episodes=200)
    rows = found.check(splits.test, key=jax.random.key(5), episodes=200)
    for row in rows:
        bound = 3 / 1.96 * np.hypot(row.ci95, row.calibration_ci95)
        assert abs(row.coverage - row.level) < bound, str(row)
    assert rows[0].size < rows[-1].size <= 3
    task = splits.test.sample(KEY)
    sets = found.sets(task.support, task.query.x, 0.9)
    logits = learner.adapt(meta, task.support, key=jax.random.key(0))(task.query.x)
    (largest,) = found.threshold(0.9)
    assert (sets == (1 - np.asarray(jax.nn.softmax(logits)) <= largest)).all()
    with pytest.raises(ValueError, match="take sets"):
        found.interval(task.support, task.query.x)


def lists(count=60, seed=0):
    rng = np.random.default_rng(seed)
    given = {}
    for i in range(count):
        x = rng.normal(size=(rng.integers(8, 30), 3)).astype("f4")
        y = x @ rng.normal(size=3) + 0.2 * rng.normal(size=len(x))
        given[f"m{i}"] = (x, y)
    return given


def test_padding_and_gaps_count_nowhere():
    given = lists()
    two = {k: (x, np.stack([y, np.where(np.arange(len(y)) % 3 == 1, np.nan, -y)], 1))
           for k, (x, y) in given.items()}  # fmt: skip
    tasks = from_tasks(two, shot=(4, 6), splits=(0.3, 0.4, 0.3))
    learner, model = LEARNERS["MAML"](ax.losses.mse), ax.models.MLP(3, 2, (8,), key=KEY)
    found = scored(learner, model, tasks.val, key=KEY)
    assert found.score.shape[0] == len(tasks.val.names)
    for i in range(3):
        key = ax.task.episode_key("val", KEY, i)
        task = tasks.val.episode(key, i)
        adapted, query = learner.adapt(model, task.support, key=KEY), task.unpadded().query
        error = jnp.abs(adapted(query.x) - query.y)
        there = ~np.isnan(np.asarray(error))
        held = found.weight[i] > 0
        assert held.sum() == there.sum()
        assert np.allclose(found.score[i][held], np.asarray(error)[there], rtol=1e-4, atol=1e-5)
    assert ax.Conformal(learner, model, found).threshold(0.9).shape == (2,)


def test_the_scale_may_be_that_of_every_support():
    tasks = from_tasks(lists(), shot=6, query=2, splits=(0.3, 0.4, 0.3))
    learner, model = LEARNERS["MAML"](ax.losses.mse), ax.models.MLP(3, 1, (8,), key=KEY)
    found = scored(learner, model, tasks.val, key=KEY, noise="support")
    task = tasks.val.episode(ax.task.episode_key("val", KEY, 0), 0)
    adapted = learner.adapt(model, task.support, key=KEY)
    rms = jnp.sqrt(jnp.mean((adapted(task.support.x) - task.support.y) ** 2))
    assert np.allclose(found.spread[0], rms, rtol=1e-4)


def test_a_gaussian_process_brings_its_own_deviations():
    tasks = ax.tasks.sinusoid(shot=5, query=6)
    learner = ax.GaussianProcessHead()
    meta = learner.init(ax.models.MLP(1, 1, (16,), key=KEY), key=KEY)
    found = scored(learner, meta, tasks.val, key=KEY, episodes=4)
    task = tasks.val.sample(ax.task.episode_key("val", KEY, 1))
    mean, deviation = learner.adapt(meta, task.support, key=KEY).predictive(task.query.x)
    assert np.allclose(found.spread[1], deviation, rtol=1e-3)
    assert np.allclose(found.score[1], jnp.abs(mean - task.query.y) / deviation, rtol=2e-3,
                       atol=1e-3)  # fmt: skip


def test_a_task_unlike_those_of_calibration_is_told():
    tasks = ax.tasks.sinusoid(shot=5, query=6)
    learner, meta = LEARNERS["MAML"](ax.losses.mse), ax.models.MLP(1, 1, (16,), key=KEY)
    found = ax.conformal(learner, meta, tasks.val, key=KEY, episodes=40)
    task = tasks.test.sample(KEY)
    far = ax.Batch(task.support.x, 100 * task.support.y)
    assert found.resemblance(far) == 1 / 41
    assert found.resemblance(task.support) > 1 / 41
    with pytest.warns(UserWarning, match="the task looks unlike the 40 calibration tasks"):
        found.interval(far, task.query.x)
    found.interval(task.support, task.query.x)


def test_scores_are_saved_joined_and_checked(tmp_path):
    tasks = ax.tasks.sinusoid(shot=5, query=6)
    learner, meta = LEARNERS["MAML"](ax.losses.mse), ax.models.MLP(1, 1, (16,), key=KEY)
    found = ax.conformal(learner, meta, tasks.val, key=KEY, episodes=30)
    found.scores.save(tmp_path / "c.safetensors")
    again = ax.Conformal(learner, meta, Scores.load(tmp_path / "c.safetensors"))
    assert (again.threshold(0.9) == found.threshold(0.9)).all()
    (tmp_path / "bad").write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match="holds no scores of calibration tasks"):
        Scores.load(tmp_path / "bad")
    shorter = scored(learner, meta, ax.tasks.sinusoid(shot=5, query=3).val, key=KEY, episodes=10)
    joined = Scores.joined([found.scores, shorter])
    assert joined.score.shape == (40, 6, 1)
    assert joined.weight.sum() == 30 * 6 + 10 * 3
    few = ax.conformal(learner, meta, tasks.val, key=KEY, episodes=5)
    assert [row.level for row in few.check(tasks.test, key=KEY, episodes=4)] == [0.5, 0.8]
    said = few.check(tasks.test, key=KEY, episodes=4)[0]
    assert "50 %" in str(said)
    assert len(said.to_json()["by_task"]) == 11


def test_what_cannot_be_calibrated_is_refused():
    tasks = ax.tasks.sinusoid(shot=5, query=6)
    learner, meta = LEARNERS["MAML"](ax.losses.mse), ax.models.MLP(1, 1, (16,), key=KEY)
    for noise in (0.0, -1.0, "some"):
        with pytest.raises(ValueError, match="noise is a number above 0"):
            ax.conformal(learner, meta, tasks.val, key=KEY, noise=noise)
    labels = ax.MAML(ax.losses.binary_cross_entropy, 0.1)
    with pytest.raises(ValueError, match="the loss says binary"):
        scored(labels, meta, tasks.val, key=KEY, episodes=2)

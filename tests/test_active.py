"""Active learning: what is asked for, that strategies are paired, and what is refused."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import adaptax as ax
from adaptax.studies import ActiveCurves, acquisition_score, active_learning

KEY = jax.random.key(0)
mse, cross_entropy = ax.losses.mse, ax.losses.cross_entropy
PRIOR, NOISE = 2.0, 0.5


class Lines(ax.TaskDistribution):
    """`y = w₀ + w₁ x` with noise: a pool of 5 and 6 queries."""

    split: str = eqx.field(static=True, default="test")
    pool: int = eqx.field(static=True, default=5)
    query: int = eqx.field(static=True, default=6)

    def sample(self, key):
        for_w, for_x, for_noise = jax.random.split(key, 3)
        x = jax.random.normal(for_x, (self.pool + self.query, 1))
        w = PRIOR * jax.random.normal(for_w, (2,))
        y = w[0] + w[1] * x + NOISE * jax.random.normal(for_noise, x.shape)
        cut = self.pool
        return ax.Task(ax.Batch(x[:cut], y[:cut]), ax.Batch(x[cut:], y[cut:]))


def features(x):
    return jnp.concatenate([jnp.ones_like(x), x], axis=1)


class Posterior(ax.Adapter):
    """Four lines with the mean and the covariance of the exact posterior under N(0, PRIOR²)."""

    loss: ax.Loss = eqx.field(static=True, default=mse)

    def adapt(self, meta, support, *, key):
        phi = features(support.x)
        (a, b), (_, c) = phi.T @ phi / NOISE**2 + jnp.eye(2) / PRIOR**2
        # Inverse and root by hand: compiled once for every number of labels.
        covariance = jnp.array([[c, -b], [-b, a]]) / (a * c - b * b)
        root = jnp.array([[c, -b], [0, jnp.sqrt(a * c - b * b)]]) / jnp.sqrt(c * (a * c - b * b))
        mean = covariance @ phi.T @ support.y[:, 0] / NOISE**2
        weights = mean + jnp.sqrt(2) * jnp.concatenate([root, -root])
        return ax.Ensemble(ax.Functional(weights, lambda w, x: features(x) @ w[:, None]))


class Fixed(ax.Adapter):
    """Learns nothing: answers with its meta-parameters."""

    loss: ax.Loss = eqx.field(static=True, default=cross_entropy)

    def adapt(self, meta, support, *, key):
        return meta


class Classes(ax.TaskDistribution):
    """Three classes in the plane, four of each in the pool and two among the queries."""

    split: str = eqx.field(static=True, default="test")
    each: int = eqx.field(static=True, default=4)

    def sample(self, key):
        for_centres, for_noise = jax.random.split(key)
        centres = 2 * jax.random.normal(for_centres, (3, 1, 2))
        x = centres + jax.random.normal(for_noise, (3, self.each + 2, 2))

        def batch(x):
            return ax.Batch(x.reshape(-1, 2), jnp.repeat(jnp.arange(3), x.shape[1]))

        return ax.Task(batch(x[:, : self.each]), batch(x[:, self.each :]))


def episode(tasks, i):
    return tasks.sample(ax.task.episode_key("test", KEY, i))


@pytest.fixture(scope="module")
def lines():
    return active_learning(
        Posterior(), None, Lines(), start=2, queries=3, episodes=64, key=KEY, noise=NOISE
    )


def test_the_example_of_largest_posterior_variance_is_asked_for(lines):
    """Against a loop that knows the posterior in closed form."""
    for i in range(64):
        x = np.asarray(episode(Lines(), i).support.x, np.float64)
        phi = np.concatenate([np.ones_like(x), x], axis=1)
        chosen = list(lines.asked["entropy"][i, :2])
        assert sorted(chosen) == sorted(set(chosen))
        for asked in lines.asked["entropy"][i, 2:]:
            mine = phi[chosen]
            covariance = np.linalg.inv(mine.T @ mine / NOISE**2 + np.eye(2) / PRIOR**2)
            variance = np.einsum("ni,ij,nj->n", phi, covariance, phi)
            variance[chosen] = -1
            best = np.sort(variance)[-2:]
            assert best[1] - best[0] < 1e-4 * best[1] or asked == np.argmax(variance)
            assert variance[asked] > (1 - 1e-4) * best[1]
            chosen.append(asked)


def test_nothing_is_asked_for_twice_and_all_of_the_pool_can_be(lines):
    assert lines.labels == list(range(2, 6))
    for order in lines.asked.values():
        assert order.shape == (64, 5)
        assert np.array_equal(np.sort(order), np.tile(np.arange(5), (64, 1)))


def test_strategies_differ_in_nothing_but_what_they_ask_for(lines):
    random, entropy = (lines.values[name] for name in ("random", "entropy"))
    assert set(random) == {"mse", "nll", "particle_mse", "epistemic"}
    for name in random:
        assert np.array_equal(random[name][:, 0], entropy[name][:, 0])
        assert not np.allclose(random[name][:, 2], entropy[name][:, 2], rtol=1e-2)
        # In the end all labels are known, in another order.
        assert np.allclose(random[name][:, -1], entropy[name][:, -1], rtol=1e-3, atol=1e-5)
    assert np.array_equal(lines.asked["random"][:, :2], lines.asked["entropy"][:, :2])
    mean, half = lines.difference()
    assert mean[0] == half[0] == 0
    # What is asked for was the most uncertain, so less is left uncertain than by chance.
    mean, half = lines.difference("epistemic")
    assert mean[1] + half[1] < 0


def test_means_and_paired_intervals(lines):
    a, b = lines.values["entropy"]["mse"], lines.values["random"]["mse"]
    mean, half = lines.difference()
    assert np.allclose(lines.mean("entropy"), a.mean(axis=0))
    assert np.allclose(mean, a.mean(axis=0) - b.mean(axis=0), atol=1e-6)
    t = stats.ttest_rel(a[:, 2], b[:, 2]).statistic
    assert np.isclose(1.96 * mean[2] / half[2], t, rtol=1e-4)
    assert np.allclose(lines.ci95("random", "nll"), 1.96 * stats.sem(lines.values["random"]["nll"]))
    back, same = lines.difference(of="random", to="entropy")
    assert np.allclose(back, -mean)
    assert np.allclose(same, half)
    row = lines.to_json()["curve"][2]
    assert row["labels"] == 4
    assert row["difference"] == {"mse": float(mean[2]), "mse_ci95": float(half[2])}
    assert np.isclose(row["entropy"]["mse"], a[:, 2].mean())
    assert lines.to_json()["protocol"]["model"] == "ensemble of 4"
    with pytest.raises(ValueError, match="of random and entropy, not of 'best'"):
        lines.mean("best")
    with pytest.raises(ValueError, match=r"metric is one of .*, not 'accuracy'"):
        lines.mean("random", "accuracy")


def test_one_episode_has_no_interval():
    values = {"random": {"mse": np.ones((1, 2))}, "entropy": {"mse": np.zeros((1, 2))}}
    curves = ActiveCurves({}, [1, 2], values, {})
    assert np.array_equal(curves.difference()[0], [-1, -1])
    assert np.isnan(curves.ci95("random")).all()
    assert curves.to_json()["curve"][0]["random"]["mse_ci95"] is None


def test_a_single_regressor_is_equally_unsure_everywhere():
    """So it asks at random; with the whole pool labelled it scores as `evaluate` says."""
    learner, model = ax.MAML(mse, 0.1, 2), ax.models.MLP(1, 1, (4,), key=KEY)
    how = {"start": 4, "queries": 1, "episodes": 5, "key": KEY}
    curves = active_learning(learner, model, Lines(), **how)
    assert np.array_equal(curves.asked["random"], curves.asked["entropy"])
    assert np.array_equal(curves.values["random"]["mse"], curves.values["entropy"]["mse"])
    report = ax.evaluate(learner, model, Lines(), episodes=5, key=KEY)
    assert np.allclose(
        curves.values["random"]["mse"][:, -1], report.values["mse"][:, -1], rtol=1e-4
    )


def test_the_key_names_what_happens(lines):
    """However many labels and strategies are asked for."""
    how = {"start": 2, "queries": 1, "episodes": 64, "noise": NOISE, "strategies": ["random"]}
    same, other = (
        active_learning(Posterior(), None, Lines(), **how, key=jax.random.key(i)) for i in (0, 1)
    )
    assert np.array_equal(same.asked["random"], lines.asked["random"][:, :3])
    here, there = same.values["random"]["mse"], lines.values["random"]["mse"]
    assert np.allclose(here, there[:, :2], rtol=1e-3)
    assert not np.array_equal(same.asked["random"], other.asked["random"])
    assert "difference" not in same.to_json()["curve"][0]


def logits(weights, x):
    return x @ weights


def test_the_prediction_of_largest_entropy_is_asked_for_first():
    weights = 2 * jax.random.normal(KEY, (3, 2, 3))
    mixture = ax.Ensemble(ax.Functional(weights, logits))
    seen = []
    curves = active_learning(
        Fixed(), mixture, Classes(), start=1, queries=3, episodes=10, key=KEY, watch=seen.append
    )
    assert seen == [10]
    assert curves.labels == [3, 4, 5, 6]
    for i in range(10):
        pool = episode(Classes(), i).support
        labelled = curves.asked["entropy"][i, :3]
        assert sorted(np.asarray(pool.y)[labelled]) == [0, 1, 2]
        p = np.exp(jax.nn.log_softmax(np.asarray(pool.x) @ np.asarray(weights))).mean(axis=0)
        entropy = stats.entropy(p, axis=1)
        entropy[labelled] = -1
        assert np.array_equal(curves.asked["entropy"][i, 3:], np.argsort(-entropy)[:3])
    # It learns nothing, so neither labels nor strategies make a difference.
    accuracy = curves.values["random"]["accuracy"]
    assert np.array_equal(accuracy, np.tile(accuracy[:, :1], 4))
    assert np.array_equal(accuracy, curves.values["entropy"]["accuracy"])
    queries = [episode(Classes(), i).query for i in range(10)]
    right = [np.mean(np.argmax(np.mean(jax.nn.softmax(mixture(q.x)), axis=0), -1) == q.y)
             for q in queries]  # fmt: skip
    assert np.allclose(accuracy[:, 0], right)


def test_several_at_once_are_the_best_of_one_round():
    weights = 2 * jax.random.normal(KEY, (3, 2, 3))
    mixture = ax.Ensemble(ax.Functional(weights, logits))
    how = {"start": 1, "queries": 4, "episodes": 10, "key": KEY}
    # It learns nothing, so the best of one round are those of the rounds to come.
    one, two = (
        active_learning(Fixed(), mixture, Classes(), **how, at_once=count) for count in (1, 2)
    )
    assert two.labels == [3, 5, 7]
    assert two.protocol["at_once"] == 2
    for strategy in ("random", "entropy"):
        assert np.array_equal(one.asked[strategy], two.asked[strategy])
        assert one.values[strategy]["nll"][:, 4] == pytest.approx(two.values[strategy]["nll"][:, 2])


def test_the_start_is_random_and_balanced():
    model = ax.Functional(jnp.zeros((2, 3)), logits)
    curves = active_learning(Fixed(), model, Classes(), start=2, queries=1, episodes=40, key=KEY)
    start = curves.asked["entropy"][:, :6]
    assert np.all(np.sort(start // 4, axis=1) == [0, 0, 1, 1, 2, 2])
    assert set(start.ravel()) == set(range(12))
    # All classes are equally likely everywhere: the next is random.
    assert np.array_equal(curves.asked["entropy"], curves.asked["random"])
    assert len(set(curves.asked["random"][:, 6])) > 6


def test_acquisition_score_of_an_ensemble_and_of_one():
    f, y = jax.random.normal(KEY, (5, 7, 2)), jnp.zeros((7, 2))
    assert np.allclose(
        acquisition_score(f, y), np.var(np.asarray(f), axis=0).sum(axis=1), rtol=1e-5
    )
    assert np.array_equal(acquisition_score(f[0], y), np.zeros(7))
    logits = jnp.array([[0.0, 0.0, 0.0], [50.0, 0.0, 0.0]])
    assert np.allclose(acquisition_score(logits, jnp.array([0])), [np.log(3), 0], atol=1e-6)
    # Two that are sure of different classes are unsure together.
    apart = jnp.stack([logits, logits[:, ::-1]])
    assert np.allclose(acquisition_score(apart, jnp.array([0])), np.log([3, 2]), atol=1e-6)
    # Of the first all know that nothing is known; on the second they disagree.
    found = acquisition_score(apart, jnp.array([0]), "disagreement")
    assert np.allclose(found, [0, np.log(2)], atol=1e-6)


def test_what_the_particles_disagree_on_is_asked_for_first():
    """Not what all of them find ambiguous."""
    weights = 2 * jax.random.normal(KEY, (3, 2, 3))
    mixture = ax.Ensemble(ax.Functional(weights, logits))
    curves = active_learning(
        Fixed(), mixture, Classes(), start=1, queries=2, episodes=10, key=KEY,
        strategies=("random", "entropy", "disagreement"),
    )  # fmt: skip
    for i in range(10):
        x = np.asarray(episode(Classes(), i).support.x)
        p = np.exp(jax.nn.log_softmax(x @ np.asarray(weights)))
        gain = stats.entropy(p.mean(axis=0), axis=1) - stats.entropy(p, axis=2).mean(axis=0)
        gain[curves.asked["disagreement"][i, :3]] = -1
        assert np.array_equal(curves.asked["disagreement"][i, 3:], np.argsort(-gain)[:2])
    assert not np.array_equal(curves.asked["disagreement"], curves.asked["entropy"])
    row = curves.to_json()["curve"][1]
    assert row["difference_disagreement"]["accuracy"] == 0
    single = ax.Functional(weights[0], logits)
    alone = active_learning(
        Fixed(), single, Classes(), start=1, queries=1, episodes=4, key=KEY,
        strategies=("random", "disagreement"),
    )  # fmt: skip
    assert np.array_equal(alone.asked["random"], alone.asked["disagreement"])
    assert "difference" not in alone.to_json()["curve"][0]


@pytest.mark.parametrize(
    "learner",
    [
        ax.MAML(cross_entropy, 0.5),
        ax.MAMLEnsemble(cross_entropy, 0.5, particles=2),
        ax.BayesianMAML(cross_entropy, 0.5, particles=2),
    ],
    ids=lambda learner: type(learner).__name__,
)
def test_every_kind_of_learner_asks(learner):
    meta = learner.init(ax.models.MLP(2, 3, (4,), key=KEY), key=KEY)
    curves = active_learning(learner, meta, Classes(), start=1, queries=1, episodes=6, key=KEY)
    assert curves.primary == "accuracy"
    for strategy in ("random", "entropy"):
        assert curves.mean(strategy).shape == (2,)
        assert np.isfinite(curves.mean(strategy, "nll")).all()
        assert all(len(set(row)) == 4 for row in curves.asked[strategy])
    assert not np.array_equal(curves.asked["random"], curves.asked["entropy"])
    assert np.array_equal(curves.asked["random"][:, :3], curves.asked["entropy"][:, :3])


def test_data_on_the_host_gives_the_same_curves():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(100, 2)).astype(np.float32), np.repeat(np.arange(20), 5)
    made = [
        ax.tasks.from_arrays(x, y, way=3, shot=3, query=2, **how).test
        for how in ({}, {"memory_budget": 0})
    ]
    assert [tasks.on_host for tasks in made] == [False, True]
    model = ax.Functional(jnp.array(rng.normal(size=(2, 3)), jnp.float32), logits)
    one, two = (
        active_learning(Fixed(), model, tasks, start=1, queries=1, episodes=70, key=KEY)
        for tasks in made
    )
    for strategy in ("random", "entropy"):
        assert one.asked[strategy].shape == (70, 4)
        assert np.array_equal(one.asked[strategy], two.asked[strategy])
        assert np.allclose(one.values[strategy]["nll"], two.values[strategy]["nll"], rtol=1e-5)


def ask(tasks=None, model=None, learner=None, **how):
    defaults = {"start": 1, "queries": 1, "episodes": 2, "key": KEY}
    return active_learning(
        Fixed() if learner is None else learner,
        ax.Functional(jnp.zeros((2, 3)), logits) if model is None else model,
        Classes() if tasks is None else tasks,
        **(defaults | how),
    )


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"start": 0}, "start is 1 or more labelled examples, not 0"),
        ({"queries": 0}, "queries is 1 or more, not 0"),
        ({"episodes": 0}, "episodes is 1 or more, not 0"),
        ({"strategies": ["best"]}, r"a sequence of random, entropy, disagreement, not \['best'\]"),
        ({"strategies": "entropy"}, "a sequence of random, entropy, disagreement, not 'entropy'"),
        ({"strategies": []}, "a sequence of random, entropy, disagreement"),
        ({"at_once": 0}, "at_once is 1 or more and divides queries=1, not 0"),
        ({"queries": 3, "at_once": 2}, "divides queries=3, not 2"),
        ({"noise": 0.0}, "noise is a positive standard deviation, not 0.0"),
        ({"start": 2, "queries": 7}, r"pool has 12 examples.*ask for 6 \+ 7 of them"),
        ({"tasks": Lines(query=0), "learner": Posterior()}, "no queries to score"),
        ({"tasks": Lines()}, r"predicts \(6, 3\) for targets of shape \(6, 1\)"),
        (
            {"model": ax.Functional(jnp.zeros((2, 5)), logits)},
            "a pool has 0 examples of one of the 5 classes .* start=1 asks for as many",
        ),
    ],
)
def test_what_cannot_be_asked(how, message):
    if isinstance(how.get("tasks"), Lines) and "learner" not in how:
        how = how | {"model": ax.Functional(jnp.zeros((1, 3)), logits)}
    with pytest.raises(ValueError, match=message):
        ask(**how)


def test_the_pool_is_data_at_rest():
    class Shuffled(Classes):
        def sample(self, key):
            task = super().sample(key)
            return ax.Task(ax.Minibatches(task.support, 4, key), task.query)

    with pytest.raises(TypeError, match="as a Batch, not Minibatches"):
        ask(Shuffled())

"""PLATIPUS (Finn, Xu & Levine 2018) against formulas, and where it is MAML."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import adaptax as ax
from references import check_meta_gradient

KEY = jax.random.key(0)
mse = ax.losses.mse
double = pytest.mark.usefixtures("x64")


def quadratic(model, batch):
    """`½ (θ − a)ᵀ A (θ − a)`, the mean over the examples `(A, a)` of a batch."""
    d = model.params - batch.y
    return jnp.mean(jnp.einsum("ni,nij,nj->n", d, batch.x, d)) / 2


def constant(params, x):
    return params


def point(theta):
    return ax.Functional(jnp.atleast_1d(jnp.asarray(theta, float)), constant)


def well(matrix, centre):
    a = jnp.atleast_1d(jnp.asarray(centre, float))
    return ax.Batch(jnp.reshape(jnp.asarray(matrix, float), (1, len(a), len(a))), a[None])


def net(**how):
    return ax.models.MLP(1, 1, (5, 5), key=KEY, activation=jnp.tanh, **how)


def waves(n=3, shot=5, query=6):
    sample = ax.tasks.sinusoid(shot, query).train.sample
    return jax.vmap(sample)(jax.random.split(jax.random.key(1), n))


def first(tasks):
    return jax.tree.map(lambda leaf: leaf[0], tasks)


def adapt(learner, meta, support):
    return eqx.filter_jit(learner.adapt)(meta, support, key=KEY)


def iterates(learner, meta, support, steps):
    return eqx.filter_jit(learner.iterates)(meta, support, key=KEY, steps=steps)


def gradient(learner, meta, tasks):
    run = eqx.filter_jit(lambda meta, tasks: ax.meta_value_and_grad(learner, meta, tasks, key=KEY))
    return run(meta, tasks)[1]


def leaves(tree):
    return jax.tree.leaves(ax.tree.parameters(tree))


def assert_equal(a, b, rtol=1e-10):
    for x, y in zip(leaves(a), leaves(b), strict=True):
        assert np.allclose(x, y, rtol=rtol, atol=1e-14)


def certain(meta, *names):
    """With no variance at all."""
    none = {name: jax.tree.map(lambda s: jnp.full_like(s, -jnp.inf), meta[name]) for name in names}
    return {**meta, **none}


# Where it is MAML


@double
@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("batch_norm", [False, True])
def test_with_point_masses_and_no_kl_meta_training_is_maml(first_order, batch_norm):
    how = {"first_order": first_order}
    learner = ax.PLATIPUS(mse, 0.1, 3, kl_weight=0, inference_lr=0.0, **how)
    model, tasks = net(batch_norm=batch_norm), waves()
    meta = certain(learner.init(model, key=KEY), "log_inference_variance")
    ours, theirs = (
        gradient(learner, meta, tasks),
        gradient(ax.MAML(mse, 0.1, 3, **how), model, tasks),
    )
    assert_equal(ours["mean"], theirs)
    for name in ("log_prior_variance", "prior_lr"):  # nothing but the KL reaches them
        assert not any(np.any(leaf) for leaf in leaves(ours[name]))
    assert all(np.all(np.isfinite(leaf)) for leaf in leaves(ours))


@double
def test_with_point_masses_every_sample_adapts_as_maml():
    learner = ax.PLATIPUS(mse, 0.1, 3, samples=4, prior_lr=0.0, eval_steps=5)
    meta = certain(learner.init(net(), key=KEY), "log_prior_variance")
    support = first(waves()).support
    ensemble = adapt(learner, meta, support)
    expected = adapt(ax.MAML(mse, 0.1, 5), net(), support)
    assert ensemble.particles == 4
    for ours, theirs in zip(leaves(ensemble.models), leaves(expected), strict=True):
        assert np.allclose(ours, theirs, rtol=1e-12)


# Golden values: a scalar quadratic, A=2, a=1, B=3, b=−1


GOLDEN = ax.PLATIPUS(
    quadratic, 0.1, kl_weight=0.1, inference_lr=0.05, prior_lr=0.02, inference_variance=0.04,
    prior_variance=0.25,
)  # fmt: skip


def exactly(learner, theta, task, monkeypatch):
    """Value and gradient of the expected objective, which is quadratic in ε: ±1 give its mean."""
    meta = learner.init(point(theta), key=KEY)
    out = []
    for sign in (1.0, -1.0):
        ones = lambda key, tree, sign=sign: jax.tree.map(lambda s: jnp.full_like(s, sign), tree)
        monkeypatch.setattr(ax.tree, "noise_like", ones)
        value = lambda meta: learner.meta_loss(meta, task, key=KEY)
        run = eqx.filter_jit(eqx.filter_value_and_grad(value, has_aux=True))
        out.append(run(meta))
    return jax.tree.map(lambda a, b: (a + b) / 2, *out)


@double
def test_golden_values(monkeypatch):
    task = ax.Task(well(2, 1), well(3, -1))
    (value, parts), grads = exactly(GOLDEN, 0.5, task, monkeypatch)
    assert np.isclose(parts["query_loss"], 3.063, rtol=1e-12)
    assert np.isclose(parts["kl"], 0.616340732, atol=5e-10)
    assert np.isclose(value, 3.124634073, atol=5e-10)
    assert np.isclose(grads["mean"].params, 2.90758, atol=5e-6)
    assert np.isclose(grads["inference_lr"].params, -14.895, atol=5e-4)
    assert np.isclose(grads["prior_lr"].params, 0.098, rtol=1e-9)
    assert np.isclose(grads["log_inference_variance"].params, 0.04 * -0.09, rtol=1e-9)
    assert np.isclose(grads["log_prior_variance"].params, 0.25 * 0.11998, rtol=1e-9)


@double
def test_the_means_of_prior_and_inference():
    task = ax.Task(well(2, 1), well(3, -1))
    meta = certain(GOLDEN.init(point(0.5), key=KEY), "log_prior_variance", "log_inference_variance")
    prior = iterates(GOLDEN, meta, task.support, 0)
    assert np.allclose(prior.models.params, 0.52, rtol=1e-14)
    still = ax.PLATIPUS(quadratic, 0.0, kl_weight=0, inference_lr=0.05)
    value, _ = still.meta_loss(meta, task, key=KEY)
    assert np.isclose(value, 1.5 * (0.275 + 1) ** 2, rtol=1e-14)


@double
@pytest.mark.parametrize("centre", [1.0, -0.5])
def test_the_best_variance(centre, monkeypatch):
    """For fixed means it is `1 / (1/σ² + B c²/w)` with `c = 1 − αA`."""
    best = 1 / (1 / 0.5 + 3 * 0.8**2 / 0.2)
    assert np.isclose(best, 0.0862069, atol=5e-8)
    task = ax.Task(well(2, centre), well(3, -1))
    slopes = []
    for v in (best / 2, best, 2 * best):
        learner = ax.PLATIPUS(
            quadratic, 0.1, kl_weight=0.2, inference_variance=v, prior_variance=0.5
        )
        grads = exactly(learner, 0.5, task, monkeypatch)[1]
        slopes.append(float(grads["log_inference_variance"].params[0]))
    assert slopes[0] < -1e-3
    assert abs(slopes[1]) < 1e-14
    assert slopes[2] > 1e-3


@double
def test_monte_carlo_converges_to_the_golden_values():
    task = ax.Task(well(2, 1), well(3, -1))
    meta = GOLDEN.init(point(0.5), key=KEY)

    def value(p, key):
        new = {"mean": p[0], "inference_lr": p[1], "log_inference_variance": p[2]}
        held = meta | {name: point(value) for name, value in new.items()}
        return GOLDEN.meta_loss(held, task, key=key)[0]

    each = jax.jit(jax.vmap(jax.value_and_grad(value), (None, 0)))
    p = jnp.array([0.5, 0.05, np.log(0.04)])
    values, slopes = each(p, jax.random.split(KEY, 20_000))
    for found, expected in (
        (values, 3.124634073), (slopes[:, 0], 2.90758), (slopes[:, 1], -14.895),
        (slopes[:, 2], 0.04 * -0.09),
    ):  # fmt: skip
        error = jnp.std(found) / np.sqrt(len(found))
        assert abs(jnp.mean(found) - expected) < 4 * error


@double
def test_the_kl_of_many_parameters():
    learner = ax.PLATIPUS(mse, 0.1, prior_variance=0.09, inference_variance=0.04, prior_lr=0.1,
                          inference_lr=0.3)  # fmt: skip
    task, meta = first(waves()), learner.init(net(), key=KEY)
    noise = ax.tree.noise_like(KEY, meta["log_prior_variance"])
    meta["log_prior_variance"] = ax.tree.axpy(0.5, noise, meta["log_prior_variance"])
    slope = lambda batch: leaves(eqx.filter_jit(eqx.filter_grad(mse))(net(), batch))
    flat = lambda parts: np.concatenate([np.ravel(part) for part in parts])
    gap = 0.1 * flat(slope(task.support)) - 0.3 * flat(slope(task.query))
    p = np.exp(flat(leaves(meta["log_prior_variance"])))
    q = np.exp(flat(leaves(meta["log_inference_variance"])))
    expected = 0.5 * (np.sum(q / p) + np.sum(gap**2 / p) - len(p) + np.sum(np.log(p / q)))
    loss, parts = eqx.filter_jit(learner.meta_loss)(meta, task, key=KEY)
    assert np.isclose(parts["kl"], expected, rtol=1e-10)
    assert np.isclose(loss, parts["query_loss"] + 0.1 * parts["kl"], rtol=1e-12)
    # By the mean of q it grows as (μ_q − μ_p)/σ², and γ_q moves that mean against the gradient.
    kl = lambda meta: learner.meta_loss(meta, task, key=KEY)[1]["kl"]
    found = eqx.filter_jit(eqx.filter_grad(kl))(meta)["inference_lr"]
    assert np.allclose(flat(leaves(found)), -flat(slope(task.query)) * gap / p, rtol=1e-9)


@double
def test_equal_distributions_have_no_kl():
    learner = ax.PLATIPUS(mse, 0.1, prior_lr=0.0, inference_lr=0.0)
    meta = learner.init(net(), key=KEY)
    kl = lambda meta, task: learner.meta_loss(meta, task, key=KEY)[1]["kl"]
    kl, grads = eqx.filter_jit(eqx.filter_value_and_grad(kl))(meta, first(waves()))
    assert kl == 0
    assert not any(np.any(leaf) for leaf in leaves(grads["mean"]))
    assert not any(np.any(leaf) for leaf in leaves(grads["log_prior_variance"]))


# Sampling


@double
def test_the_samples_of_the_prior():
    rng = np.random.default_rng(3)
    root = rng.normal(size=(3, 3))
    matrix, a, mu = root @ root.T + np.eye(3), rng.normal(size=3), np.array([0.5, -1.0, 2.0])
    learner = ax.PLATIPUS(quadratic, samples=4000, prior_lr=0.1, prior_variance=0.36, eval_steps=0)
    theta = adapt(learner, learner.init(point(mu), key=KEY), well(matrix, a)).models.params
    mean = mu - 0.1 * matrix @ (mu - a)
    assert np.all(np.abs(theta.mean(axis=0) - mean) < 4 * 0.6 / np.sqrt(4000))
    low, high = stats.chi2.ppf([1e-4, 1 - 1e-4], 4000 - 1) / (4000 - 1)
    ratios = theta.var(axis=0, ddof=1) / 0.36
    assert np.all((low < ratios) & (ratios < high))
    assert np.all(np.abs(np.corrcoef(theta.T)[np.triu_indices(3, 1)]) < 4 / np.sqrt(4000))


@double
def test_the_samples_adapt_each_on_its_own():
    learner = ax.PLATIPUS(mse, 0.1, 2, samples=3, prior_variance=0.04)
    meta, support = learner.init(net(), key=KEY), first(waves()).support
    path = iterates(learner, meta, support, 2)
    end = adapt(learner, meta, support)
    member = lambda tree, *at: jax.tree.map(lambda a: a[at] if eqx.is_array(a) else a, tree)
    for m in range(3):
        adapted = adapt(ax.MAML(mse, 0.1, 2), member(path.models, 0, m), support)
        assert_equal(member(end.models, m), adapted)
        assert_equal(member(path.models, 2, m), adapted)
    assert not np.allclose(*(leaves(member(end.models, m))[0] for m in (0, 1)), rtol=1e-2)


def test_a_key_names_the_samples():
    learner = ax.PLATIPUS(mse, 0.1, samples=2)
    meta, task = learner.init(net(), key=KEY), first(waves())
    loss = eqx.filter_jit(lambda key: learner.meta_loss(meta, task, key=key)[0])
    adapt = eqx.filter_jit(lambda key: learner.adapt(meta, task.support, key=key)(task.query.x))
    other = jax.random.key(1)
    assert loss(KEY) == loss(KEY) != loss(other)
    assert np.array_equal(adapt(KEY), adapt(KEY))
    assert not np.allclose(adapt(KEY), adapt(other))


@double
def test_what_is_not_adapted_is_not_random():
    model = net(batch_norm=True)
    learner = ax.PLATIPUS(mse, 0.1, samples=3, prior_variance=0.1)
    meta, tasks = learner.init(model, key=KEY), waves()
    assert meta["log_prior_variance"].norms[0].shift is None
    ensemble = adapt(learner, meta, first(tasks).support)
    assert np.array_equal(ensemble.models.norms[0].shift, jnp.zeros((3, 5)))
    assert np.any(gradient(learner, meta, tasks)["mean"].norms[0].shift)
    heads = ax.PLATIPUS(mse, 0.1, samples=3, adapt_only=ax.tree.under("head"))
    meta = heads.init(model, key=KEY)
    assert ax.tree.count(meta["log_prior_variance"]) == ax.tree.count(model.head)
    adapted = adapt(heads, meta, first(tasks).support).models
    assert np.ptp(adapted.layers[0].weight, axis=0).max() == 0
    assert np.ptp(adapted.head.weight, axis=0).min() > 0


# Options


@double
def test_kinds_of_rates():
    tasks, found = waves(), {}
    for rates in ("parameter", "tensor", "scalar"):
        learner = ax.PLATIPUS(mse, 0.1, rates=rates, conditioning_steps=2)
        found[rates] = gradient(learner, learner.init(net(), key=KEY), tasks)
    assert_equal(found["tensor"]["mean"], found["parameter"]["mean"])
    for name in ("prior_lr", "inference_lr"):
        each = leaves(found["parameter"][name])
        by_tensor = leaves(found["tensor"][name])
        assert [leaf.shape for leaf in by_tensor] == [()] * len(each)
        assert np.allclose(by_tensor, [leaf.sum() for leaf in each], rtol=1e-9)
        assert np.isclose(found["scalar"][name], np.sum(by_tensor), rtol=1e-9)


@double
def test_more_steps_to_the_conditioned_mean():
    learner = ax.PLATIPUS(mse, prior_lr=0.1, conditioning_steps=3, eval_steps=0, samples=1)
    meta = certain(learner.init(net(), key=KEY), "log_prior_variance")
    support = first(waves()).support
    found = adapt(learner, meta, support)
    expected = adapt(ax.MAML(mse, 0.1, 3), net(), support)
    for ours, theirs in zip(leaves(found.models), leaves(expected), strict=True):
        assert np.allclose(ours[0], theirs, rtol=1e-12)


def test_the_weight_of_the_kl_may_follow_the_progress():
    learner = ax.PLATIPUS(mse, 0.1, kl_weight=lambda progress: 2.0 * progress)
    meta, task = learner.init(net(), key=KEY), first(waves())
    run = eqx.filter_jit(lambda p: learner.meta_loss(meta, task, key=KEY, progress=p))
    for progress in (0.0, 0.25, 1.0):
        loss, parts = run(jnp.array(progress))
        assert parts["kl"] > 0
        assert np.isclose(loss, parts["query_loss"] + 2 * progress * parts["kl"], rtol=1e-6)
    assert learner.describe()["kl_weight"] == "given"


def test_it_starts_from_what_was_trained():
    tasks = ax.tasks.sinusoid(5, 5)
    learner, trained = ax.PLATIPUS(mse, 0.05, samples=2), net()  # a MAML's meta is a model
    meta = learner.init(trained, key=KEY)
    assert meta["mean"] is trained
    assert_equal(learner.init(ax.MetaSGD(mse).init(trained, key=KEY), key=KEY), meta)
    assert learner.init(meta, key=KEY) is meta
    result = ax.fit(learner, trained, tasks.train, steps=2, meta_batch=2, key=KEY)
    assert {"query_loss", "kl"} <= set(result.history[0])
    report = ax.evaluate(learner, result.meta, tasks.test, episodes=3, key=KEY)
    assert report.protocol["algorithm"] == "PLATIPUS"
    assert report.protocol["model"] == "ensemble of 2"
    assert report.at == [0, 1]
    with pytest.raises(ValueError, match="was given a tuple that cannot be called"):
        learner.init((), key=KEY)


@pytest.mark.parametrize(
    "how",
    [
        {"first_order": True, "rates": "tensor", "conditioning_steps": 2},
        {
            "kl_weight": lambda progress: 0.3 * progress,
            "meta_gradient": "checkpoint=1",
            "rates": "scalar",
        },
    ],
)
def test_meta_gradients_of_variants(how):
    check_meta_gradient(ax.PLATIPUS(mse, 0.1, 2, samples=2, **how), net())


@pytest.mark.parametrize("name", ["prior_variance", "inference_variance"])
@pytest.mark.parametrize("value", [0.0, -0.1, float("nan")])
def test_variances_are_positive(name, value):
    with pytest.raises(ValueError, match=f"{name} is a variance to start from, above 0, not"):
        ax.PLATIPUS(mse, **{name: value})


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"prior_lr": -0.1}, "prior_lr is 0 or more, not -0.1"),
        ({"inference_lr": -1.0}, "inference_lr is 0 or more"),
        ({"kl_weight": -1.0}, "kl_weight is 0 or more"),
        ({"samples": 0}, "samples is 1 or more, not 0"),
        ({"rates": "layer"}, 'rates is "parameter", "tensor" or "scalar", not'),
    ],
)
def test_options_that_make_no_sense(how, message):
    with pytest.raises(ValueError, match=message):
        ax.PLATIPUS(mse, **how)


def test_tasks_without_examples_are_refused():
    learner = ax.PLATIPUS(mse, 0.1)
    meta, task = learner.init(net(), key=KEY), first(waves())
    none = jax.tree.map(lambda leaf: leaf[:0], task.support)
    with pytest.raises(ValueError, match="the task's support has no examples"):
        adapt(learner, meta, none)
    with pytest.raises(ValueError, match="the task's query has no examples"):
        learner.meta_loss(meta, ax.Task(task.support, none), key=KEY)
    unlabelled = ax.Task(task.support, ax.Batch(task.query.x, None))
    with pytest.raises(ValueError, match="a loss was asked of a batch without targets"):
        learner.meta_loss(meta, unlabelled, key=KEY)
    # To predict no labels are needed.
    assert adapt(learner, meta, task.support)(unlabelled.query.x).shape == (10, 6, 1)


def test_queries_without_targets_cannot_be_scored():
    class Unlabelled(ax.TaskDistribution):
        split: str = eqx.field(static=True, default="test")

        def sample(self, key):
            task = first(waves())
            return ax.Task(task.support, ax.Batch(task.query.x, None))

    with pytest.raises(ValueError, match="queries have no targets, y=None, to score"):
        ax.evaluate(ax.MAML(mse, 0.1), net(), Unlabelled(), episodes=2, key=KEY)


def test_it_starts_from_what_init_from_says():
    maml, given = (ax.models.MLP(1, 1, (3,), key=jax.random.key(i)) for i in range(2))
    learner = ax.PLATIPUS(ax.losses.mse, 0.1, init_from=maml)
    meta = learner.init(given, key=jax.random.key(0))
    assert eqx.tree_equal(meta["mean"], maml)
    assert eqx.tree_equal(ax.PLATIPUS(ax.losses.mse, init_from=meta).init(given, key=KEY), meta)

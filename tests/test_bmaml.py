"""Bayesian MAML (Yoon et al. 2018) against formulas, and where it is MAML."""

import math
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import adaptax as ax
from adaptax import svgd
from references import check_meta_gradient

KEY = jax.random.key(0)
mse = ax.losses.mse
double = pytest.mark.usefixtures("x64")


def quadratic(model, batch):
    """`½ A (θ − a)²`, the mean over the examples `(A, a)` of a batch."""
    return jnp.mean(batch.x * (model.params - batch.y) ** 2) / 2


def constant(params, x):
    return params


def point(theta):
    return ax.Functional(jnp.asarray(theta, float), constant)


def well(a, centre):
    return ax.Batch(jnp.array([[float(a)]]), jnp.array([[float(centre)]]))


def net(seed=0, **how):
    return ax.models.MLP(1, 1, (5, 5), key=jax.random.key(seed), activation=jnp.tanh, **how)


def nets(count, **how):
    return ax.Ensemble(ax.tree.stack([net(seed, **how) for seed in range(count)]))


def waves(n=3, shot=5, query=6):
    sample = ax.tasks.sinusoid(shot, query).train.sample
    return jax.vmap(sample)(jax.random.split(jax.random.key(1), n))


def first(tasks):
    return jax.tree.map(lambda leaf: leaf[0], tasks)


def member(models, m):
    return jax.tree.map(lambda leaf: leaf[m] if eqx.is_array(leaf) else leaf, models)


def value_and_gradient(learner, meta, tasks):
    run = eqx.filter_jit(lambda meta, tasks: ax.meta_value_and_grad(learner, meta, tasks, key=KEY))
    (value, _), grads = run(meta, tasks)
    return value, grads


def adapt(learner, meta, support):
    return eqx.filter_jit(learner.adapt)(meta, support, key=KEY)


def iterates(learner, meta, support, steps):
    return eqx.filter_jit(learner.iterates)(meta, support, key=KEY, steps=steps)


def flat(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(ax.tree.parameters(tree))])


def close(a, b, rtol=1e-11):
    """Whether two trees are equal, as vectors."""
    a, b = flat(a), flat(b)
    return a.shape == b.shape and np.linalg.norm(a - b) <= rtol * np.linalg.norm(b)


def union(task):
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), task.support, task.query)


# One particle


@double
@pytest.mark.parametrize("how", [{}, {"first_order": True}, {"meta_gradient": "checkpoint=1"}])
def test_one_particle_under_bfa_is_maml(how):
    model, tasks = net(batch_norm=True), waves()
    ours = ax.BayesianMAML(mse, 0.1, 3, particles=1, objective="bfa", eval_steps=4, **how)
    theirs = ax.MAML(mse, 0.1, 3, eval_steps=4, **how)
    meta = ours.init(model, key=KEY)
    value, grads = value_and_gradient(ours, meta, tasks)
    expected, slope = value_and_gradient(theirs, model, tasks)
    assert np.isclose(value, expected, rtol=1e-14)
    both = eqx.combine(member(grads.models, 0), grads.shared)
    assert close(both, slope)
    support = first(tasks).support
    assert close(adapt(ours, meta, support).member(0), adapt(theirs, model, support))
    path = iterates(ours, meta, support, 2)
    only = jax.tree.map(lambda leaf: leaf[:, 0] if eqx.is_array(leaf) else leaf, path.models)
    assert close(eqx.combine(only, path.shared), iterates(theirs, model, support, 2))


@double
def test_golden_chaser_of_one_particle():
    # Together they are C = 2.5, c = 0.2.
    task = jax.tree.map(lambda leaf: leaf[None], ax.Task(well(2, 1), well(3, -1 / 3)))
    learner = ax.BayesianMAML(quadratic, 0.1, particles=1)
    value, grads = value_and_gradient(learner, learner.init(point([0.5]), key=KEY), task)
    assert np.isclose(value, (0.1 * 2.5 * 0.4) ** 2, rtol=1e-13)
    assert np.isclose(grads.models.params[0, 0], 0.16, rtol=1e-13)


@double
def test_the_chaser_of_one_particle_has_mamls_gradient():
    """`2α` times that of the loss on support and query, at the chaser."""
    tasks, model = waves(), net()
    learner = ax.BayesianMAML(mse, 0.1, 2, particles=1)
    _, ours = value_and_gradient(learner, learner.init(model, key=KEY), tasks)
    together = ax.Task(tasks.support, jax.vmap(union)(tasks))
    _, theirs = value_and_gradient(ax.MAML(mse, 0.1, 2), model, together)
    assert np.allclose(flat(ours), 0.2 * flat(theirs), rtol=1e-10, atol=1e-14)


# Many particles


@double
def test_the_chaser_takes_steps_of_svgd():
    task, rule = first(waves()), svgd.RBF("median-all", half=True)
    learner = ax.BayesianMAML(mse, 0.1, 2, particles=4, kernel=rule)
    meta = learner.init(nets(4), key=KEY)
    x, unravel = jax.flatten_util.ravel_pytree(member(meta.models, 0))
    x = jax.vmap(lambda m: jax.flatten_util.ravel_pytree(m)[0])(meta.models)
    static = eqx.filter(net(), eqx.is_inexact_array, inverse=True)
    slope = jax.jit(
        jax.vmap(jax.grad(lambda v: mse(eqx.combine(unravel(v), static), task.support)))
    )
    for _ in range(2):
        scores = -slope(x)
        squares = np.sum((x[:, None] - x) ** 2, axis=-1)
        h = np.median(squares) / math.log(4)
        k = np.exp(-squares / h)
        repulsion = np.einsum("ij,ijd->id", k, x[:, None] - x) / h
        x = x + 0.1 * (k @ scores + repulsion) / 4
    adapted = adapt(learner, meta, task.support).models
    found = jax.vmap(lambda m: jax.flatten_util.ravel_pytree(ax.tree.parameters(m))[0])(adapted)
    assert np.allclose(found, x, rtol=1e-10)


@double
@pytest.mark.parametrize("objective", ["chaser", "bfa"])
def test_the_order_of_particles_does_not_matter(objective):
    learner = ax.BayesianMAML(mse, 0.1, particles=4, objective=objective)
    order = jnp.array([2, 0, 3, 1])
    values, grads = zip(*(
        value_and_gradient(learner, learner.init(start, key=KEY), waves())
        for start in (nets(4), ax.Ensemble(member(nets(4).models, order)))
    ))  # fmt: skip
    assert np.isclose(*values, rtol=1e-12)
    moved = member(grads[0].models, order)
    assert close(moved, grads[1].models)


@double
def test_the_loss_of_the_mixture():
    task = first(waves())
    loss = partial(mse, reduction="sum")
    learner = ax.BayesianMAML(loss, 0.01, particles=4, objective="bfa")
    meta = learner.init(nets(4), key=KEY)
    value = float(learner.meta_loss(meta, task, key=KEY)[0])
    models = adapt(learner, meta, task.support).models
    each = np.array([float(loss(member(models, m), task.query)) for m in range(4)])
    assert np.isclose(value, -np.log(np.mean(np.exp(-(each - each.min())))) + each.min())
    assert each.min() <= value <= each.mean()
    assert each.std() > 0.1


@double
def test_the_mixture_of_very_improbable_particles():
    start = ax.Ensemble(point(jnp.array([[100.0], [100.1], [99.0]])))
    learner = ax.BayesianMAML(quadratic, 0.0, particles=3, objective="bfa", inner_steps=0)
    task = jax.tree.map(lambda leaf: leaf[None], ax.Task(well(1, 0), well(10, 0)))
    value, grads = value_and_gradient(learner, learner.init(start, key=KEY), task)
    each = 5 * np.array([100.0, 100.1, 99.0]) ** 2  # about 10⁴: exp of them is 0
    assert np.isclose(value, each[2] + np.log(3), rtol=1e-12)
    assert np.isclose(grads.models.params[2, 0], 990, rtol=1e-9)


@double
def test_a_chaser_with_nothing_to_chase():
    tasks = waves()
    learner = ax.BayesianMAML(mse, 0.1, particles=3, leader_steps=0)
    value, grads = value_and_gradient(learner, learner.init(nets(3), key=KEY), tasks)
    assert value == 0
    assert not np.any(flat(grads))
    # At a fixed point of SVGD, where no query moves the leader on.
    rest = math.sqrt(math.log(3) / 2)
    start = ax.Ensemble(point([[rest], [-rest]]))
    learner = ax.BayesianMAML(quadratic, 0.1, particles=2)
    one = well(1, 0)
    none = jax.tree.map(lambda leaf: leaf[:0], one)
    task = jax.tree.map(lambda leaf: leaf[None], ax.Task(one, none))
    value, grads = value_and_gradient(learner, learner.init(start, key=KEY), task)
    assert value < 1e-30
    assert np.all(np.abs(flat(grads)) < 1e-15)


@double
def test_the_leader_is_held_fixed():
    """The gradient is `2 J (Θ_n − Θ_{n+s})`, J the derivative of the chaser alone."""
    learner = ax.BayesianMAML(quadratic, 0.1, 2, particles=2, leader_steps=3)
    task = ax.Task(well(2, 1), well(3, -1))
    start = jnp.array([[0.5], [-0.7]])

    def chaser(theta):
        meta = learner.init(ax.Ensemble(point(theta)), key=KEY)
        return adapt(learner, meta, task.support).models.params

    follow = ax.BayesianMAML(quadratic, 0.1, 3, particles=2)
    there = jax.jit(chaser)(start)
    leader = follow.adapt(
        ax.Ensemble(point(there), ax.Functional(None, constant)), union(task), key=KEY
    ).models.params
    tasks = jax.tree.map(lambda leaf: leaf[None], task)
    meta = learner.init(ax.Ensemble(point(start)), key=KEY)
    value, grads = value_and_gradient(learner, meta, tasks)
    assert np.isclose(value, jnp.sum((there - leader) ** 2), rtol=1e-12)
    jacobian = jax.jacobian(lambda t: chaser(t[:, None])[:, 0])(start[:, 0])
    expected = 2 * jacobian.T @ (there - leader)[:, 0]
    assert np.allclose(grads.models.params[:, 0], expected, rtol=1e-11)


@pytest.mark.parametrize("objective", ["chaser", "bfa"])
def test_first_order_gradients(objective):
    learner = ax.BayesianMAML(mse, 0.1, 2, particles=3, objective=objective, first_order=True)
    check_meta_gradient(learner, net(batch_norm=True))


@double
def test_rates_may_be_a_schedule_or_a_tree():
    task = first(waves())
    meta = ax.BayesianMAML(mse, particles=3).init(nets(3), key=KEY)
    equal = ax.tree.full_like(net(), 0.1)
    ends = [
        flat(adapt(ax.BayesianMAML(mse, rate, 2, particles=3), meta, task.support).models)
        for rate in (0.1, lambda step: 0.1 + 0 * step, equal)
    ]
    assert np.allclose(ends[0], ends[1], rtol=1e-14)
    assert np.allclose(ends[0], ends[2], rtol=1e-14)


# Heads on shared features


@double
def test_heads_on_shared_features():
    learner = ax.BayesianMAML(
        mse, 0.1, 2, particles=3, objective="bfa", adapt_only=ax.tree.under("head")
    )
    tasks, meta = waves(), learner.init(net(), key=KEY)
    assert ax.tree.count(meta.models) == 3 * ax.tree.count(net().head)
    assert np.array_equal(meta.shared.layers[0].weight, net().layers[0].weight)
    support, x = first(tasks).support, first(tasks).query.x
    adapted = adapt(learner, meta, support)
    assert np.array_equal(adapted.shared.layers[1].weight, net().layers[1].weight)
    assert np.ptp(adapted.models.head.weight, axis=0).min() > 1e-3
    assert adapted.particles == 3
    assert adapted.size == ax.tree.count(net())
    alone = adapted.stacked()
    assert alone.shared is None
    assert np.array_equal(alone.models.layers[1].weight, jnp.stack([net().layers[1].weight] * 3))
    each = [adapted.member(m)(x) for m in range(3)]
    assert np.array_equal(each, [alone.member(m)(x) for m in range(3)])
    assert np.allclose(adapted(x), each, rtol=1e-12)
    assert np.allclose(alone(x), each, rtol=1e-12)
    path = iterates(learner, meta, support, 2)
    last = jax.tree.map(lambda leaf: leaf[-1] if eqx.is_array(leaf) else leaf, path)
    assert close(last, adapted)
    _, grads = value_and_gradient(learner, meta, tasks)
    assert np.any(grads.shared.layers[0].weight)


def test_the_features_are_computed_once_for_all_heads():
    model = ax.models.MLP(8, 5, (64, 64), key=KEY)
    x = jnp.zeros((20, 8))

    def work(count, adapt_only):
        learner = ax.BayesianMAML(
            ax.losses.cross_entropy, particles=count, objective="bfa", adapt_only=adapt_only
        )
        meta = learner.init(model, key=KEY)
        path = learner.iterates(meta, ax.Batch(x, jnp.zeros(20, int)), key=KEY, steps=1)
        last = jax.tree.map(lambda leaf: leaf[-1] if eqx.is_array(leaf) else leaf, path)
        return [flops(meta), flops(last)]

    def flops(ensemble):
        arrays, rest = eqx.partition(ensemble, eqx.is_array)
        call = jax.jit(lambda arrays: eqx.combine(arrays, rest)(x))
        return call.lower(arrays).compile().cost_analysis()["flops"]

    for one, heads, whole in zip(
        work(1, None), work(10, ax.tree.under("head")), work(10, None), strict=True
    ):
        assert whole > 9 * one
        assert heads < 2.5 * one


# Where particles start


@double
def test_particles_around_a_model():
    model = ax.models.MLP(1, 1, (60, 60), key=KEY)
    for spread in (1.0, 0.1):
        meta = ax.BayesianMAML(mse, particles=50, spread=spread).init(model, key=KEY)
        assert np.array_equal(flat(member(meta.models, 0)), flat(model))
        weight = np.asarray(meta.models.layers[1].weight)
        std = float(jnp.std(model.layers[1].weight))
        others = weight[1:].reshape(49, -1)
        assert np.allclose(others.std(axis=1), std, rtol=5 / np.sqrt(2 * 3600))
        related = [np.corrcoef(weight[0].ravel(), other)[0, 1] for other in others]
        assert np.allclose(related, math.sqrt(1 - spread**2), atol=5 / 60)
        assert not np.any(meta.models.layers[1].bias)  # constant arrays stay as they are
    small = np.asarray(meta.models.layers[1].weight)
    distance = np.sqrt(np.mean((small[1:] - small[0]) ** 2))
    assert np.isclose(distance, std * math.sqrt(2 - 2 * math.sqrt(1 - 0.01)), rtol=0.02)


def test_particles_from_what_was_trained():
    tasks = ax.tasks.sinusoid(5, 5)
    emaml = ax.MAMLEnsemble(mse, 0.05, particles=3)
    ensemble = ax.fit(emaml, nets(3), tasks.train, steps=2, meta_batch=2, key=KEY).meta
    learner = ax.BayesianMAML(mse, 0.05, particles=3, adapt_only=ax.tree.under("head"))
    meta = learner.init(ensemble, key=KEY)
    assert np.array_equal(meta.models.head.weight, ensemble.models.head.weight)
    assert np.array_equal(meta.shared.layers[0].weight, ensemble.models.layers[0].weight[0])
    assert close(learner.init(meta, key=KEY), meta)
    assert emaml.init(ensemble, key=KEY) is ensemble
    result = ax.fit(learner, ensemble, tasks.train, steps=2, meta_batch=2, key=KEY)
    assert isinstance(result.meta, ax.Ensemble)
    for start in (nets(2), meta):
        with pytest.raises(ValueError, match="particles=4, and was given an ensemble of"):
            ax.BayesianMAML(mse, particles=4).init(start, key=KEY)
    with pytest.raises(ValueError, match="particles=4, and was given an ensemble of 2"):
        ax.MAMLEnsemble(mse, particles=4).init(nets(2), key=KEY)
    with pytest.raises(ValueError, match="nothing tells how far apart to start"):
        ax.BayesianMAML(mse, particles=4).init(point(1.0), key=KEY)


# A regressor with precisions


def regressor(seed=0):
    return ax.Gaussian(net(seed), noise_variance=0.04, weight_variance=0.25)


@double
def test_the_posterior_of_a_regressor():
    batch, (a, b) = first(waves()).support, (regressor(0), regressor(1))
    b = eqx.tree_at(lambda m: (m.log_gamma, m.log_lambda), b, (jnp.array(1.3), jnp.array(-0.4)))

    def log_p(model):
        """By the densities of scipy, the Gammas with the Jacobian of the logarithm."""
        gamma, lam = float(jnp.exp(model.log_gamma)), float(jnp.exp(model.log_lambda))
        noise = stats.norm.logpdf(batch.y, model(batch.x), gamma**-0.5).sum()
        weights = stats.norm.logpdf(flat(model.model), 0, lam**-0.5).sum()
        priors = [stats.gamma.logpdf(gamma, 2, scale=1 / 0.2) + np.log(gamma),
                  stats.gamma.logpdf(lam, 2, scale=1 / 2) + np.log(lam)]  # fmt: skip
        return noise, weights + sum(priors)

    assert np.isclose(a.noise, 0.2, rtol=1e-12)
    for model in (a, b):
        assert np.isclose(ax.gaussian_nll(model, batch), -log_p(model)[0], rtol=1e-12)
    difference = ax.gamma_prior(a) - ax.gamma_prior(b)  # it leaves a constant out
    assert np.isclose(difference, log_p(b)[1] - log_p(a)[1], rtol=1e-10)
    only = ax.gamma_prior(a, on=ax.tree.under("head")) - ax.gamma_prior(a)
    body = flat(a.model.layers)
    assert np.isclose(
        only, stats.norm.logpdf(body, 0, 0.5).sum() + len(body) / 2 * np.log(2 * np.pi)
    )


@double
def test_the_released_regression():
    """Posterior, chaser without the precisions, and scores under the noise that was learned."""
    learner = ax.BayesianMAML(
        ax.gaussian_nll, 1e-3, particles=3, prior=ax.gamma_prior, chase=ax.tree.under("model")
    )
    tasks, meta = waves(), learner.init(regressor(), key=KEY)
    assert meta.models.log_gamma.shape == (3,)
    task = first(tasks)
    value, _ = value_and_gradient(learner, meta, jax.tree.map(lambda leaf: leaf[:1], tasks))
    chaser = adapt(learner, meta, task.support).models
    assert not np.allclose(chaser.log_gamma, meta.models.log_gamma)
    assert not np.allclose(chaser.log_lambda, meta.models.log_lambda)
    follow = ax.Ensemble(ax.tree.parameters(chaser), meta.shared)
    leader = adapt(learner, follow, union(task)).models
    squares = np.sum((flat(chaser.model) - flat(leader.model)) ** 2)
    assert np.isclose(value, squares, rtol=1e-12)
    whole = ax.BayesianMAML(ax.gaussian_nll, 1e-3, particles=3, prior=ax.gamma_prior)
    one = jax.tree.map(lambda leaf: leaf[:1], tasks)
    assert value_and_gradient(whole, meta, one)[0] > 1.001 * value


def test_scores_under_learned_noise():
    learner = ax.BayesianMAML(
        ax.gaussian_nll, 1e-3, particles=3, prior=ax.gamma_prior, objective="bfa"
    )
    tasks = ax.tasks.sinusoid(5, 6).test
    meta = learner.init(regressor(), key=KEY)
    meta = eqx.tree_at(lambda m: m.models.log_gamma, meta, jnp.log(1 / jnp.array([0.1, 1.0, 4.0])))
    report = ax.evaluate(learner, meta, tasks, episodes=1, at=[0], noise="learned", key=KEY)
    task = tasks.sample(ax.task.episode_key("test", KEY, 0))
    f = np.asarray(meta(task.query.x))
    density = stats.norm.pdf(task.query.y, f, np.sqrt([0.1, 1.0, 4.0])[:, None, None]).mean(axis=0)
    assert np.isclose(report.mean("nll"), -np.log(density).mean(), rtol=1e-4)
    assert report.protocol["nll_noise"] == "learned"
    with pytest.raises(ValueError, match="MLP has none; wrap it"):
        ax.evaluate(ax.MAML(mse), net(), tasks, episodes=1, noise="learned", key=KEY)


@double
def test_gradients_with_precisions():
    learner = ax.BayesianMAML(
        ax.gaussian_nll, 1e-2, particles=3, prior=ax.gamma_prior, chase=ax.tree.under("model")
    )
    tasks = ax.tasks.sinusoid(3, 3).train
    check_meta_gradient(learner, regressor(), tasks)


@pytest.mark.parametrize("how", [{"noise_variance": 0.0}, {"weight_variance": -1.0}])
def test_variances_of_a_regressor_are_positive(how):
    with pytest.raises(ValueError, match="should both be positive"):
        ax.Gaussian(net(), **how)


def test_a_likelihood_of_other_shapes():
    task = first(waves())
    flat_targets = ax.Batch(task.support.x, task.support.y[:, 0])
    with pytest.raises(ValueError, match=r"predicts shape \(5, 1\) for targets of shape \(5,\)"):
        ax.gaussian_nll(regressor(), flat_targets)


# Ensembles of MAMLs


@double
@pytest.mark.parametrize("first_order", [False, True])
def test_members_of_an_ensemble_are_mamls(first_order):
    how = {"eval_steps": 4, "first_order": first_order}
    learner = ax.MAMLEnsemble(mse, 0.1, 2, particles=3, **how)
    maml, tasks = ax.MAML(mse, 0.1, 2, **how), waves()
    meta = learner.init(nets(3, batch_norm=True), key=KEY)
    value, grads = value_and_gradient(learner, meta, tasks)
    support = first(tasks).support
    adapted = adapt(learner, meta, support)
    path = iterates(learner, meta, support, 3)
    values = []
    for m in range(3):
        expected, slope = value_and_gradient(maml, member(meta.models, m), tasks)
        values.append(expected)
        assert close(member(grads.models, m), slope)
        alone = adapt(maml, member(meta.models, m), support)
        assert close(member(adapted.models, m), alone)
        steps = iterates(maml, member(meta.models, m), support, 3)
        found = jax.tree.map(lambda a, m=m: a[:, m] if eqx.is_array(a) else a, path.models)
        assert close(found, steps)
    assert np.isclose(value, np.sum(values), rtol=1e-13)


def test_both_errors_for_both_learners():
    tasks = ax.tasks.sinusoid(5, 6).test
    for learner in (
        ax.BayesianMAML(mse, 0.05, particles=3),
        ax.MAMLEnsemble(mse, 0.05, particles=3),
    ):
        report = ax.evaluate(learner, learner.init(net(), key=KEY), tasks, episodes=4, key=KEY)
        assert report.protocol["model"] == "ensemble of 3"
        assert report.at == [0, 1]
        assert report.mean("mse") < report.mean("particle_mse")
    assert report.protocol["algorithm"] == "EMAML"


# Options


@pytest.mark.parametrize("make", [ax.BayesianMAML, ax.MAMLEnsemble])
@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"particles": 0}, "particles is 1 or more, not 0"),
        ({"spread": 0.0}, "spread is above 0 and at most 1, not 0.0: particles that start equal"),
        ({"spread": 1.5}, "spread is above 0 and at most 1"),
    ],
)
def test_particles_that_make_no_sense(make, how, message):
    with pytest.raises(ValueError, match=message):
        make(mse, **how)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"objective": "elbo"}, 'objective is "chaser" or "bfa", not \'elbo\''),
        ({"objective": "bfa", "leader_steps": 1}, "leader_steps and chase belong to"),
        ({"objective": "bfa", "chase": ax.tree.every}, "leader_steps and chase belong to"),
        ({"leader_steps": -1}, "leader_steps is 0 or more, not -1"),
    ],
)
def test_options_that_make_no_sense(how, message):
    with pytest.raises(ValueError, match=message):
        ax.BayesianMAML(mse, **how)


def test_what_cannot_be_learned_from():
    task = first(waves())
    none = jax.tree.map(lambda leaf: leaf[:0], task.support)
    learner = ax.BayesianMAML(mse, 0.1, particles=2, objective="bfa")
    meta = learner.init(net(), key=KEY)
    with pytest.raises(ValueError, match="the task's support has no examples"):
        adapt(learner, meta, none)
    with pytest.raises(ValueError, match="the task's query has no examples"):
        learner.meta_loss(meta, ax.Task(task.support, none), key=KEY)
    unlabelled = ax.Task(task.support, ax.Batch(task.query.x, None))
    for how, said in (("bfa", "without targets"), ("chaser", "the leader learns from them")):
        with pytest.raises(ValueError, match=said):
            ax.BayesianMAML(mse, particles=2, objective=how).meta_loss(meta, unlabelled, key=KEY)
    members = ax.MAMLEnsemble(mse, particles=2)
    with pytest.raises(ValueError, match="a batch without examples"):
        members.adapt(nets(2), none, key=KEY)
    nothing = ax.BayesianMAML(mse, 0.1, particles=2, chase=ax.tree.under("tail"))
    with pytest.raises(ValueError, match="chase chose no parameter that particles differ in"):
        nothing.meta_loss(meta, task, key=KEY)
    with pytest.raises(ValueError, match="0 or more steps, not -1"):
        adapt(ax.BayesianMAML(mse, 0.1, -1, particles=2), meta, task.support)


def test_the_outer_rate_falls_as_in_the_code():
    rule = ax.BayesianMAML(mse).optimizer(200)
    state, sizes = rule.init(jnp.zeros(1)), []
    for _ in range(5):
        update, state = rule.update(jnp.ones(1), state)
        sizes.append(-float(update[0]))
    assert np.allclose(sizes, 1e-3 * 0.98 ** (np.arange(5) / 2), rtol=1e-4)

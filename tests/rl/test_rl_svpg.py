"""Bayesian MAML in reinforcement learning: the step, the objectives, the outer steps."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_rl_rollout import policy_for

import adaptax as ax
import references
from adaptax import rl

KEY = jax.random.key(0)
ENV = rl.Navigation()
TASKS = rl.Tasks(ENV, trajectories=2, horizon=3)


def squared(model, batch):
    """Of one particle, pulled to its own point."""
    return jnp.sum((model.params - batch.x) ** 2) / 2


def points(params):
    return rl.Policies(ax.Functional(jnp.asarray(params), lambda params, x: params))


def batch_at(x):
    return ax.Batch(jnp.asarray(x), jnp.zeros(len(x)))


def rows(policies):
    return np.asarray(policies.models.params)


def one_of(tree, m):
    return jax.tree.map(lambda leaf: leaf[m] if eqx.is_array(leaf) else leaf, tree)


# The kernel and the step


def test_the_kernel_of_the_code(x64):
    """`exp(−d²/2h²)`, `h² = ½ (mean distance)²/log(M + 1)`, repulsion `Σ_j k (θ_i − θ_j)/h²`."""
    x = np.asarray(jax.random.normal(KEY, (4, 3)))
    away = x[:, None] - x[None]
    squares = (away**2).sum(-1)
    mean = np.sqrt(squares[np.triu_indices(4, 1)]).mean()
    h2 = mean**2 / 2 / math.log(5)
    k = np.exp(-squares / (2 * h2))
    matrix, repulsion = rl.CODE_KERNEL(jnp.asarray(x))
    np.testing.assert_allclose(matrix, k, rtol=1e-12)
    np.testing.assert_allclose(repulsion, (k[..., None] * away).sum(1) / h2, rtol=1e-10)
    np.testing.assert_allclose(np.sum(repulsion, axis=0), 0, atol=1e-12)
    assert np.abs(repulsion).max() > 0.01
    # h is differentiated: the matrix does not change with the scale of the particles.
    slope = jax.jvp(lambda c: rl.CODE_KERNEL(c * x)[0], (1.0,), (1.0,))[1]
    np.testing.assert_allclose(slope, 0, atol=1e-12)


@pytest.mark.parametrize("kernel", [rl.CODE_KERNEL, ax.svgd.RBF()], ids=["code", "exact"])
def test_the_step_by_hand(kernel, x64):
    """`θ + ε/M (K·(−∇L/α) + repulsion)`, each pulled to its own point."""
    start, to = np.asarray(jax.random.normal(KEY, (2, 3, 2)))
    learner = rl.BayesianMAML(squared, 0.3, particles=3, temperature=2.0, kernel=kernel)
    new = learner.adapt(points(start), batch_at(to), key=KEY)
    matrix, repulsion = map(np.asarray, kernel(jnp.asarray(start)))
    by_hand = start + 0.3 / 3 * (matrix @ (to - start) / 2 + repulsion)
    np.testing.assert_allclose(rows(new), by_hand, rtol=1e-10)
    alone = rl.BayesianMAML(squared, 0.3, particles=3, kernel=None)
    new = alone.adapt(points(start), batch_at(to), key=KEY)
    np.testing.assert_allclose(rows(new), start + 0.3 * (to - start), rtol=1e-12)


def test_one_particle_is_maml(x64):
    policy = policy_for(ENV)
    batch = TASKS.sample(KEY).support.draw(policy, KEY)
    learner = rl.BayesianMAML(rl.log_prob, 0.1, 2, particles=1)
    several = learner.adapt(
        learner.init(policy, key=KEY), jax.tree.map(lambda leaf: leaf[None], batch), key=KEY
    )
    alone = ax.MAML(rl.log_prob, 0.1, 2).adapt(policy, batch, key=KEY)
    for a, b in zip(jax.tree.leaves(one_of(several.models, 0)), jax.tree.leaves(alone)):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-15)
    assert not np.allclose(alone.log_std, policy.log_std)


# The objectives


@pytest.mark.parametrize("objective", ["policy-gradient", "chaser", "reptile"])
def test_the_order_of_particles_does_not_matter(objective, x64):
    start, to, then = np.asarray(jax.random.normal(KEY, (3, 4, 2)))
    order = np.array([2, 0, 3, 1])
    learner = rl.BayesianMAML(squared, 0.3, particles=4, objective=objective)

    def gradient(rows):
        task = ax.Task(batch_at(to[rows]), batch_at(then[rows]))
        loss = lambda policies: learner.meta_loss(policies, task, key=KEY)[0]
        value, slope = eqx.filter_value_and_grad(loss)(points(start[rows]))
        return float(value), np.asarray(slope.models.params)

    value, slope = gradient(np.arange(4))
    other, permuted = gradient(order)
    np.testing.assert_allclose(value, other, rtol=1e-12)
    np.testing.assert_allclose(slope[order], permuted, rtol=1e-9)
    assert np.linalg.norm(slope) > 1e-3


def test_leaders_and_goals_carry_no_derivative(x64):
    """One particle in one dimension: `θ' = θ − ε(θ − a)`, `leader = θ' − ε(θ' − b)`."""
    theta, a, b, rate = 0.5, 2.0, -1.0, 0.1
    task = ax.Task(batch_at([[a]]), batch_at([[b]]))
    adapted = theta - rate * (theta - a)

    def gradient(**how):
        learner = rl.BayesianMAML(squared, rate, particles=1, **how)
        loss = lambda policies: learner.meta_loss(policies, task, key=KEY)[0]
        value, slope = eqx.filter_value_and_grad(loss)(points([[theta]]))
        return np.array([value, slope.models.params[0, 0]])

    distance = rate * abs(adapted - b)
    np.testing.assert_allclose(gradient(objective="chaser"), [distance, 1 - rate], rtol=1e-12)
    np.testing.assert_array_equal(gradient(objective="chaser", leader_steps=0), 0)
    np.testing.assert_allclose(
        gradient(objective="reptile"), [rate * abs(theta - a), -1.0], rtol=1e-12
    )


@pytest.mark.parametrize("objective", ["policy-gradient", "chaser", "reptile"])
def test_the_gradient_is_that_of_the_reference(objective, x64):
    start, to, then = jax.random.normal(KEY, (3, 3, 2))
    learner = rl.BayesianMAML(
        squared, 0.3, 2, particles=3, objective=objective, leader_steps=2, kernel=rl.CODE_KERNEL
    )
    task = ax.Task(batch_at(to), batch_at(then))

    @jax.jit
    def reference(x):
        return references.policies(learner)(points(x), task, at=points(start), key=KEY)

    slope = jax.grad(lambda x: learner.meta_loss(points(x), task, key=KEY)[0])(start)
    along, step = jax.random.normal(jax.random.key(1), start.shape), 1e-4
    ends = [reference(start + i * step * along) for i in (-2, -1, 1, 2)]
    difference = (ends[0] - 8 * ends[1] + 8 * ends[2] - ends[3]) / (12 * step)
    np.testing.assert_allclose(jnp.sum(slope * along), difference, rtol=1e-7)
    assert abs(difference) > 1e-3


# Roll-outs of several policies


def test_each_policy_acts_in_roll_outs_of_its_own():
    learner = rl.BayesianMAML(rl.log_prob, particles=2)
    policies = learner.init(policy_for(ENV), key=KEY)
    source = TASKS.sample(KEY).support
    batch = source.draw(policies, KEY)
    assert batch.y.rewards.shape == (2, 2, 3)
    each = [source.draw(one_of(policies.models, m), jax.random.split(KEY, 2)[m]) for m in range(2)]
    for m, alone in enumerate(each):
        for a, b in zip(jax.tree.leaves(one_of(batch, m)), jax.tree.leaves(alone)):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(batch.y.total, (each[0].y.total + each[1].y.total) / 2, rtol=1e-6)
    assert not np.allclose(batch.y.actions[0], batch.y.actions[1])
    logs = policies(batch.x).log_prob(batch.y.actions)
    np.testing.assert_allclose(logs, batch.y.log_probs, rtol=1e-4)


@pytest.mark.parametrize("discrete", [False, True])
def test_laws_of_several(discrete):
    def law(key):
        rows = jax.random.normal(key, (2, 3, 4))
        if discrete:
            return rl.Categorical(rows)
        return eqx.filter_vmap(rl.Gaussian)(rows, jnp.array([[0.1] * 4, [0.5] * 4]))

    ours, theirs = law(KEY), law(jax.random.key(1))
    laws, others = rl.Laws(ours), rl.Laws(theirs)
    assert (laws.discrete, laws.action_size) == (discrete, 4)
    actions = laws.sample(KEY)
    logs, kl, entropy = laws.log_prob(actions), laws.kl(others), laws.entropy()
    assert logs.shape == kl.shape == entropy.shape == (2, 3)
    for m in range(2):
        one, other = one_of(ours, m), one_of(theirs, m)
        np.testing.assert_allclose(logs[m], one.log_prob(actions[m]), rtol=1e-5)
        np.testing.assert_allclose(kl[m], one.kl(other), rtol=1e-5)
        np.testing.assert_allclose(entropy[m], one.entropy(), rtol=1e-5)


# The outer steps


def same(a, b, **how):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, **how)


def stepped(outer, learner, policies, key=KEY):
    tasks = eqx.filter_vmap(TASKS.sample)(jax.random.split(KEY, 2))

    @eqx.filter_jit
    def step(policies):
        new, _, loss, metrics = outer.step(learner, policies, (), tasks, key=key, progress=0.0)
        return ax.tree.parameters(new), loss, metrics

    return step(policies)


def test_a_region_for_each_of_one_is_a_region(x64):
    learner = rl.BayesianMAML(rl.lvc, 0.1, 2, particles=1)
    policies = learner.init(policy_for(ENV, hidden=(3,)), key=KEY)
    trpo = rl.TRPO(damping=0.1, curvature=0.5)
    new, loss, metrics = stepped(rl.ParticleTRPO(trpo), learner, policies)
    joint, joint_loss, joint_metrics = stepped(trpo, learner, policies)
    same(new, joint, rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(loss, joint_loss, rtol=1e-8)
    same(metrics, joint_metrics, rtol=1e-8)
    assert metrics["step_fraction"] > 0


def test_particles_that_do_not_interact_are_stepped_alone(x64):
    """A kernel `M·1` without repulsion is none, by another way through the program."""
    alone = lambda x: (len(x) * jnp.eye(len(x)), jnp.zeros_like(x))
    trpo = rl.TRPO(damping=1e-3)
    found = []
    for kernel in (alone, None):
        learner = rl.BayesianMAML(rl.lvc, 0.1, particles=2, kernel=kernel)
        policies = learner.init(policy_for(ENV, hidden=(3,)), key=KEY)
        found.append(stepped(rl.ParticleTRPO(trpo), learner, policies))
    same(*found, rtol=1e-7, atol=1e-9)
    moved = ax.tree.squared_distance(found[0][0], ax.tree.parameters(policies))
    assert moved > 1e-6


RUNS = {
    "SVPG-TRPO": ({"kernel": rl.CODE_KERNEL}, rl.ParticleTRPO()),
    "SVPG, one region": ({}, rl.TRPO()),
    "SVPG-chaser": ({"objective": "chaser", "temperature": 0.1}, None),
}


@pytest.mark.parametrize("name", list(RUNS))
def test_runs_on_navigation(name):
    how, outer = RUNS[name]
    learner, policy = rl.BayesianMAML(rl.log_prob, 0.1, particles=2, **how), policy_for(ENV)
    result = ax.fit(learner, policy, TASKS, steps=2, meta_batch=2, chunk=1, key=KEY, outer=outer,
                    mapping="vmap", devices=1)  # fmt: skip
    assert result.step == 2
    assert ax.tree.finite(result.last)
    first, second = (one_of(result.last.models, m) for m in range(2))
    assert ax.tree.squared_distance(first, second) > 0.1
    if outer is not None:
        assert all(record["kl"] <= 0.01 for record in result.history)
        return
    returns = rl.evaluate(learner, result.meta, TASKS, goals=3, steps=1, trajectories=2,
                          lr=(0.1, 0.05), key=KEY)  # fmt: skip
    assert returns.values["return"].shape == (3, 2)
    assert returns.protocol["return"] == "mean over particles"
    assert returns.protocol["particles"] == 2


# What makes no sense


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"objective": "bfa"}, 'objective is "policy-gradient", "chaser" or "reptile"'),
        ({"temperature": 0.0}, "temperature is positive"),
        ({"leader_steps": -1}, "leader_steps is 0 or more, not -1"),
        ({"particles": 0}, "particles is 1 or more"),
    ],
)
def test_learners_that_make_no_sense(how, message):
    with pytest.raises(ValueError, match=message):
        rl.BayesianMAML(rl.log_prob, **how)


def test_steps_that_make_no_sense():
    step = lambda outer, learner: outer.step(
        learner, None, (), ax.Task(None, None), key=KEY, progress=0.0
    )
    with pytest.raises(ValueError, match="for those of MAML take TRPO"):
        step(rl.ParticleTRPO(), ax.MAML(rl.log_prob))
    with pytest.raises(ValueError, match="ensemble of 2"):
        rl.BayesianMAML(rl.log_prob).init(ax.Ensemble(points(jnp.ones((2, 1))).models), key=KEY)

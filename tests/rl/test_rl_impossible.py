"""Forbidden actions, impossible ones, and trajectories without a step."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import adaptax as ax
from adaptax import rl
from adaptax.rl.advantages import masked_mean, standardise
from adaptax.rl.baseline import fitted_values

KEY = jax.random.key(0)
NO = -jnp.inf


def masked(net):
    """Three logits of which the second is forbidden, and the two others alone."""
    return rl.Categorical(jnp.array([net[0], NO, net[1]])), rl.Categorical(net)


def test_a_forbidden_action_adds_nothing():
    """Entropy, divergence, log-probabilities and their derivatives are those without it."""
    with jax.enable_x64(True):
        here, there = jnp.array([0.3, -0.5]), jnp.array([-0.2, 0.4])

        def quantities(pick, net):
            law, old = masked(net)[pick], masked(there)[pick]
            last = jnp.array(2 if pick == 0 else 1)
            return jnp.stack([law.entropy(), law.kl(old), old.kl(law), law.log_prob(last)])

        for order in range(4):
            found, wanted = (
                jax.tree.reduce(lambda f, _: jax.jacfwd(jax.tree_util.Partial(f)), range(order),
                                lambda net, pick=pick: quantities(pick, net))(here)
                for pick in (0, 1)
            )  # fmt: skip
            assert np.isfinite(found).all()
            assert np.allclose(found, wanted, rtol=1e-12, atol=1e-14)
        back = jax.jacrev(jax.jacrev(lambda net: quantities(0, net)))(here)
        assert np.allclose(back, jax.hessian(lambda net: quantities(1, net))(here), atol=1e-14)


def test_divergences_by_hand():
    law = rl.Categorical(jnp.array([0.0, 0.0, NO]))
    assert np.isclose(law.entropy(), np.log(2))
    assert law.kl(law) == 0
    assert np.isclose(law.kl(rl.Categorical(jnp.zeros(3))), np.log(1.5))
    assert rl.Categorical(jnp.zeros(3)).kl(law) == jnp.inf  # which may what the other may not
    curvature = jax.hessian(lambda z: law.kl(rl.Categorical(z)))(law.logits)
    assert np.allclose(curvature, [[0.25, -0.25, 0], [-0.25, 0.25, 0], [0, 0, 0]])


def steps(mask, actions, log_probs):
    shape = mask.shape
    return rl.Steps(actions, jnp.zeros(shape), mask, log_probs, jnp.zeros(shape), jnp.ones(shape))


@pytest.mark.parametrize("name", ["log_prob", "lvc", "dice", "importance"])
def test_what_follows_the_end_does_not_count(name):
    """Actions after the end are zeros, which the policy may forbid."""
    mask = jnp.array([[1.0, 1.0, 0.0]])
    actions, log_probs = jnp.array([[2, 2, 1]]), jnp.array([[-0.7, -0.7, 0.0]])
    objective = rl.OBJECTIVES[name]

    def loss(net, length):
        taken = jax.tree.map(lambda a: a[:, :length], steps(mask, actions, log_probs))
        batch = ax.Batch(jnp.zeros((1, length, 1)), taken)
        many = jnp.broadcast_to(masked(net)[0].logits, (1, length, 3))
        return objective(lambda x: rl.Categorical(many), batch)

    net = jnp.array([0.3, -0.5])
    for function in (loss, jax.grad(loss), jax.hessian(loss)):
        assert np.allclose(function(net, 3), function(net, 2), rtol=1e-6)
        assert np.isfinite(function(net, 3)).all()


def test_an_impossible_action():
    """Its log-probability is −∞ and its importance 0; both have the derivative 0."""
    net, one = jnp.array([0.3, -0.5]), jnp.ones((1, 1))
    batch = ax.Batch(jnp.zeros((1, 1, 1)), steps(one, jnp.array([[1]]), jnp.array([[-1.0]])))
    law = lambda net: lambda x: rl.Categorical(masked(net)[0].logits[None, None])
    log_prob = lambda net: masked(net)[0].log_prob(jnp.array(1))
    assert log_prob(net) == NO
    assert not jax.grad(log_prob)(net).any()
    for name, value in {"importance": 0.0, "lvc": -1.0, "dice": 0.0}.items():
        loss = lambda net, f=rl.OBJECTIVES[name]: f(law(net), batch)
        if name != "dice":
            assert loss(net) == value
        assert not jax.grad(loss)(net).any()
        assert not jax.hessian(loss)(net).any()
    assert rl.PPO().loss(law(net), batch) == 0


def test_no_step_at_all():
    none = jnp.zeros((2, 3))
    odd = jnp.full((2, 3), jnp.nan)
    assert masked_mean(odd, none) == 0
    assert not standardise(odd, none).any()
    assert not fitted_values(jnp.full((2, 3, 4), jnp.nan), odd, none).any()
    some = none.at[0, 0].set(1.0)
    values = fitted_values(jnp.ones((2, 3, 4)), 5 * some, some)
    assert np.isclose(values[0, 0], 5, atol=1e-3)
    assert not values[1].any()
    assert not standardise(5 * some, some).any()
    batch = ax.Batch(jnp.zeros((2, 3, 1)), steps(none, jnp.zeros((2, 3), int), none))
    for objective in rl.OBJECTIVES.values():
        loss = lambda net, f=objective: f(
            lambda x: rl.Categorical(jnp.broadcast_to(net, (2, 3, 2))), batch
        )
        assert not jax.grad(loss)(jnp.ones(2)).any()


class Masked(eqx.Module):
    net: rl.CategoricalMLP

    def __call__(self, observations):
        logits = self.net(observations).logits
        return rl.Categorical(jnp.where(jnp.arange(5) < 4, logits, NO))


class Mute(eqx.Module):
    """A bandit of which no step ever counts."""

    source: rl.RollOut

    def draw(self, model, key):
        batch = self.source.draw(model, key)
        zero = jax.tree.map(jnp.zeros_like, batch.y)
        return ax.Batch(batch.x, zero)


@pytest.mark.parametrize("outer", [rl.TRPO(), rl.PPO()], ids=["TRPO", "PPO"])
def test_outer_steps_with_forbidden_actions(outer):
    env = rl.Bandit()
    start = Masked(rl.CategoricalMLP(env.observation_size, 5, (8,), key=KEY))
    tasks = rl.Tasks(env, trajectories=20, horizon=10)
    result = ax.fit(ax.MAML(rl.log_prob, 0.5), start, tasks, steps=3, meta_batch=4, outer=outer,
                    key=KEY, devices=1, chunk=3)  # fmt: skip
    assert ax.tree.finite(result.meta)
    assert ax.tree.squared_distance(result.meta, start) > 0

    one = tasks.sample(KEY)
    mute = ax.Task(Mute(one.support), Mute(one.query))
    stacked = jax.tree.map(lambda leaf: leaf[None], mute)
    learner = ax.MAML(rl.log_prob, 0.5)
    state = outer.init(ax.tree.parameters(start))
    step = eqx.filter_jit(lambda: outer.step(learner, start, state, stacked, key=KEY, progress=0.0))
    meta, _, value, metrics = step()
    assert value == 0
    assert all(np.isfinite(m) for m in metrics.values())
    assert ax.tree.squared_distance(meta, start) == 0


def test_half_precision_policies():
    env = rl.Bandit()
    net = rl.CategoricalMLP(env.observation_size, 5, (8,), key=KEY)
    half = jax.tree.map(lambda a: a.astype(jnp.bfloat16) if eqx.is_inexact_array(a) else a, net)
    for outer in (rl.TRPO(), rl.PPO()):
        result = ax.fit(ax.MAML(rl.log_prob, 0.5), half, rl.Tasks(env, trajectories=5, horizon=4),
                        steps=1, meta_batch=2, outer=outer, key=KEY, devices=1)  # fmt: skip
        assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(result.meta)
                   if eqx.is_inexact_array(leaf))  # fmt: skip

"""The learners of the library, unchanged, on roll-outs: training, resuming, evaluation."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_rl_rollout import Countdown, policy_for

import adaptax as ax
from adaptax import rl
from adaptax.engine.mapping import local_mesh

KEY = jax.random.key(0)
ENV = rl.Navigation()
TASKS = rl.Tasks(ENV, trajectories=2, horizon=3)
HOW = {"steps": 2, "meta_batch": 2, "chunk": 1, "key": KEY}

LEARNERS = {
    "MAML": ax.MAML(rl.log_prob, 0.1),
    "FOMAML": ax.FOMAML(rl.log_prob, 0.1, 2),
    "Reptile": ax.Reptile(rl.log_prob, 0.1, 2),
    "Meta-SGD": ax.MetaSGD(rl.dice, 0.1),
}


def same(a, b):
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.array_equal(x, y) for x, y in pairs)


@pytest.mark.parametrize("name", list(LEARNERS))
def test_learners_run_unchanged(name):
    learner, policy = LEARNERS[name], policy_for(ENV)
    result = ax.fit(learner, policy, TASKS, mapping="vmap", devices=1, **HOW)
    start = learner.init(policy, key=KEY)
    assert result.step == 2
    assert ax.tree.finite(result.last)
    assert not same(ax.tree.parameters(start), ax.tree.parameters(result.last))


class Stop(Exception):
    pass


OUTER = {"TRPO": rl.TRPO(), "PPO": rl.PPO(epochs=2), "each": rl.ParticleTRPO(rl.TRPO(cg_steps=2))}


@pytest.mark.parametrize("outer", OUTER.values(), ids=OUTER)
def test_a_killed_run_goes_on_bit_by_bit(outer, tmp_path):
    learner = ax.MAML(rl.log_prob, 0.1)
    if isinstance(outer, rl.ParticleTRPO):
        learner = rl.BayesianMAML(rl.log_prob, 0.1, particles=2)
    how = {**HOW, "steps": 3, "outer": outer}
    if isinstance(outer, rl.TRPO):
        how |= {"validate": TASKS, "validation": {"goals": 2, "steps": 1, "trajectories": 2},
                "validate_every": 1}  # fmt: skip
    whole = ax.fit(learner, policy_for(ENV), TASKS, **how)

    def kill(record):
        if record["step"] == 2:
            raise Stop

    with pytest.raises(Stop):
        ax.fit(learner, policy_for(ENV), TASKS, run=str(tmp_path), watch=kill, **how)
    resumed = ax.fit(learner, policy_for(ENV), TASKS, run=str(tmp_path), resume=True, **how)
    assert [record["step"] for record in resumed.history] == [1, 2, 3]
    assert same(whole.last, resumed.last)
    assert same(whole.meta, resumed.meta)
    last = whole.history[-1]
    assert {"loss", "return_before", "return_after", "gradient_norm"} <= set(last)
    if isinstance(outer, rl.TRPO):
        assert all(record["kl"] <= 0.01 for record in whole.history)
        assert whole.best_score == max(r["validation"]["return"] for r in whole.history)
        assert not same(whole.last, policy_for(ENV))


@pytest.mark.parametrize("outer", OUTER.values(), ids=OUTER)
def test_devices_share_the_tasks(outer, x64):
    assert jax.local_device_count() == 4
    learner = LEARNERS["MAML"]
    if isinstance(outer, rl.ParticleTRPO):
        learner = rl.BayesianMAML(rl.log_prob, 0.1, particles=2)
    meta = learner.init(policy_for(ENV), key=KEY)
    batch = eqx.filter_vmap(TASKS.sample)(jax.random.split(KEY, 4))

    @eqx.filter_jit
    def stepped(mesh):
        state = outer.init(ax.tree.parameters(meta))
        how = {"key": KEY, "progress": 0.0, "mesh": mesh}
        new, _, loss, metrics = outer.step(learner, meta, state, batch, **how)
        return ax.tree.parameters(new), loss, metrics

    alone = stepped(None)
    assert not same(alone[0], ax.tree.parameters(meta))
    for devices in (2, 4):
        pairs = zip(jax.tree.leaves(alone), jax.tree.leaves(stepped(local_mesh(4, devices))))
        for one, shared in pairs:
            np.testing.assert_allclose(shared, one, rtol=1e-5, atol=1e-8)


def test_devices_share_the_goals():
    """Five goals are for one device, four for four."""
    how = {"steps": 1, "trajectories": 2, "key": KEY}
    given = [rl.evaluate(LEARNERS["MAML"], policy_for(ENV), TASKS, goals=goals, **how)
             for goals in (5, 4)]  # fmt: skip
    np.testing.assert_allclose(given[1].values["return"], given[0].values["return"][:4], rtol=1e-5)


def test_an_outer_step_and_an_optimizer_contradict_each_other():
    import optax

    with pytest.raises(ValueError, match="give no optimizer with it"):
        ax.fit(LEARNERS["MAML"], policy_for(ENV), TASKS, outer=rl.TRPO(),
               optimizer=optax.sgd(0.1), **HOW)  # fmt: skip


def test_a_learner_without_inner_steps():
    with pytest.raises(ValueError, match="RidgeRegression has no inner_steps"):
        rl.frozen.inner_steps(ax.RidgeRegression())


def test_returns_by_gradient_step(tmp_path):
    learner, policy = LEARNERS["MAML"], policy_for(ENV)
    how = {"goals": 5, "steps": 2, "trajectories": 3, "batch": 2, "key": KEY}
    given = rl.evaluate(learner, policy, TASKS, lr=(0.1, 0.05), **how)
    values = given.values["return"]
    assert values.shape == (5, 3)
    schedule = ax.MAML(rl.log_prob, lambda step: jnp.where(step == 0, 0.1, 0.05))
    by_hand = rl.evaluate(schedule, policy, TASKS, **how)
    np.testing.assert_allclose(values, by_hand.values["return"], rtol=1e-5)
    own = rl.evaluate(learner, policy, TASKS, **how).values["return"]
    np.testing.assert_allclose(own[:, :2], values[:, :2], rtol=1e-5)
    assert not np.allclose(own[:, 2], values[:, 2], rtol=1e-5)
    assert "function" not in str(given)
    column = values[:, 1]
    np.testing.assert_allclose(given.mean(step=1), column.mean())
    np.testing.assert_allclose(given.ci95(step=1), 1.96 * column.std(ddof=1) / 5**0.5)
    np.testing.assert_allclose(given.score, (given.mean(step=1) + given.mean(step=2)) / 2)
    still = rl.Returns({}, [0], {"return": values[:, :1]})
    np.testing.assert_allclose(still.score, given.mean(step=0))
    assert f"2: {given.mean():.4g} ± {given.ci95():.2g}" in str(given)
    given.save(tmp_path / "returns.json")
    record = given.to_json()
    assert [row["step"] for row in record["curve"]] == [0, 1, 2]
    apart = values[:, 2] - values[:, 0]
    np.testing.assert_allclose(given.gain(2), (apart.mean(), 1.96 * apart.std(ddof=1) / 5**0.5))
    assert (record["curve"][2]["gain"], record["curve"][2]["gain_ci95"]) == given.gain()
    assert "gain" not in record["curve"][0]
    assert record["protocol"]["inner_lr"] == [0.1, 0.05]
    assert record["protocol"]["goals"] == 5
    assert {"step", "return", "return_ci95", "diverged"} <= set(record["curve"][0])
    how = {"episodes": 5, "mapping": 2, "steps": 2, "trajectories": 3, "key": KEY}
    again = ax.evaluate(learner, policy, TASKS, lr=(0.1, 0.05), **how)
    assert np.array_equal(again.values["return"], values)
    with pytest.raises(ValueError, match="metric is one of return, not 'mse'"):
        given.mean("mse")


class Broken(Countdown):
    """Pays NaN."""

    def step(self, state, action, key):
        return state, jnp.nan * jnp.sum(action), state < 0


def test_rewards_that_are_not_numbers():
    env = Broken()
    tasks = rl.Tasks(env, trajectories=2, horizon=2)
    with pytest.raises(ValueError, match="Broken paid rewards that are not finite in 2 of 2 tasks"):
        rl.evaluate(LEARNERS["MAML"], policy_for(env), tasks, goals=2, steps=0, key=KEY)
    with pytest.raises(ax.TrainingDiverged, match="look for NaN"):
        ax.fit(LEARNERS["MAML"], policy_for(env), tasks, outer=rl.TRPO(), **HOW)


@pytest.mark.parametrize(
    ("learner", "how", "message"),
    [
        ("MAML", {"goals": 0}, "episodes is at least 1, not 0"),
        ("MAML", {"trajectories": 0}, "trajectories is at least 1, not 0"),
        ("MAML", {"goals": 3, "episodes": 3}, "goals= is another name of episodes="),
        ("MAML", {"transductive": False}, "transductive=False is for models that predict"),
        ("MAML", {"select": "nll"}, "select='nll' is for models that predict"),
        ("MAML", {"steps": -1}, "steps is 0 or more"),
        ("MAML", {"lr": ()}, "one or more positive step sizes"),
        ("Meta-SGD", {"lr": (0.1,)}, "MetaSGD has no step size to replace"),
    ],
)
def test_evaluations_that_make_no_sense(learner, how, message):
    with pytest.raises(ValueError, match=message):
        rl.evaluate(LEARNERS[learner], None, TASKS, key=KEY, **how)

"""TrainingDiverged says what was not finite first, of which task of which step."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adaptax as ax

KEY = jax.random.key(0)
BAD = 4  # of the episodes: task 1 of meta-step 2, three tasks a step


class Lines(ax.TaskDistribution):
    """Support y = 1, query y = 2 for x = 1; and one episode of its own."""

    odd: ax.Task
    split: str = eqx.field(static=True, default="train", kw_only=True)

    def sample(self, key):
        return self.episode(key, jnp.zeros((), jnp.uint32))

    def episode(self, key, i):
        one = jnp.ones((2, 1))
        usual = ax.Task(ax.Batch(one, one), ax.Batch(one, 2 * one))
        return jax.tree.map(lambda a, b: jnp.where(i == BAD, b, a), usual, self.odd)


def lines(sx=1.0, sy=1.0, qx=1.0, qy=2.0):
    full = lambda value: jnp.full((2, 1), value)
    return Lines(ax.Task(ax.Batch(full(sx), full(sy)), ax.Batch(full(qx), full(qy))))


def root(model, batch):
    """No derivative where the error is zero."""
    return jnp.sqrt(ax.losses.mse(model, batch))


class Own(ax.MetaLearner):
    """A learner that has no inner loop of ours."""

    loss: ax.Loss = eqx.field(static=True, default=ax.losses.mse)

    def adapt(self, meta, support, *, key):
        slope = jax.grad(self.loss)(meta, support)
        return jax.tree.map(lambda w, g: w - 0.1 * g, meta, slope)

    def meta_loss(self, meta, task, *, key, progress):
        return self.loss(self.adapt(meta, task.support, key=key), task.query), {}


LINE = ax.Functional(jnp.zeros((1, 1)), lambda p, x: x @ p)


def fit(learner, tasks, start=LINE, **how):
    how = {"steps": 3, "meta_batch": 3, "chunk": 3, "key": KEY, "devices": 1,
           "optimizer": optax.sgd(0.0), **how}  # fmt: skip
    with pytest.raises(ax.TrainingDiverged) as caught:
        ax.fit(learner, start, tasks, **how)
    assert isinstance(caught.value, FloatingPointError)
    assert caught.value.result.stopped == "diverged"
    assert caught.value.__cause__ is None
    return caught.value


mse, nan, inf = ax.losses.mse, float("nan"), float("inf")
KINDS = {
    "support inputs": (ax.MAML(mse), lines(sx=nan), None, "look for NaN in the data"),
    "support targets": (ax.MAML(mse), lines(sy=inf), None, "look for NaN in the data"),
    "query inputs": (ax.MAML(mse), lines(qx=inf), None, "look for NaN in the data"),
    "query targets": (ax.MAML(mse), lines(qy=nan), None, "look for NaN in the data"),
    "support loss": (ax.MAML(mse), lines(sy=1e30), 0, "No inner step was taken yet"),
    "inner gradient": (ax.MAML(root), lines(sy=0.0), 0, "look for a root"),
    "adapted weights": (
        ax.MAML(mse, 2e18),
        lines(sx=100.0, sy=1e19),
        0,
        "lower the inner step size",
    ),
    "query loss": (ax.MAML(mse), lines(qy=1e30), None, "take fewer inner steps"),
    "meta-gradient": (ax.MAML(root, 0.0), lines(qy=0.0), None, "first_order=True"),
}


@pytest.mark.parametrize("name", KINDS)
def test_what_was_not_finite_first(name):
    learner, tasks, inner_step, advice = KINDS[name]
    error = fit(learner, tasks)
    assert error.cause == type(error.cause)(2, name, 1, inner_step, 1)
    assert f"the {name} of task 1 of the meta-batch" in str(error)
    assert "not finite at meta-step 2; the state before it is kept" in str(error)
    assert advice in str(error)
    assert error.result.step == 1


def test_steps_that_lead_out():
    """Each inner step multiplies the error by some −2e10: after two its square is infinite."""
    error = fit(ax.MAML(mse, 1e10, 6), lines())
    assert error.cause == type(error.cause)(1, "support loss", 0, 2, 3)
    assert "of task 0 of the meta-batch, inner step 3, was not finite" in str(error)
    assert "lower the inner step size" in str(error)


@pytest.mark.parametrize(
    ("learner", "quantity"),
    [
        (Own(), "query loss"),
        (ax.FOMAML(mse), "support loss"),
        (ax.MAML(mse, inner_steps=2, meta_gradient="checkpoint=1"), "support loss"),
        (ax.MetaSGD(mse), "support loss"),
        (ax.Reptile(mse), "support loss"),
        (ax.BayesianMAML(mse, 0.01, 1, particles=2), "support loss"),
        (ax.ProbabilisticMAML(mse), "support loss"),
        (ax.MAMLPlusPlus(mse, 0.01, 2), "support loss"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, ax.MetaLearner) else value,
)
def test_every_learner_reports(learner, quantity):
    net = ax.models.MLP(1, 1, (4,), key=KEY)
    error = fit(learner, lines(sy=1e30), net if hasattr(learner, "particles") else LINE)
    assert (error.cause.step, error.cause.quantity, error.cause.task) == (2, quantity, 1)


def test_an_outer_step_that_is_not_finite():
    rates = optax.sgd(lambda step: jnp.where(step == 1, jnp.nan, 0.1))
    error = fit(ax.MAML(mse), lines(), optimizer=rates)
    assert error.cause == type(error.cause)(2, "outer update")
    assert ax.tree.finite(error.result.last)
    assert "check the schedule" in str(error)


def test_sums_that_overflow():
    class Steep(Lines):
        def episode(self, key, i):
            return jax.tree.map(lambda a: jnp.full_like(a, 1e19), super().episode(key, i))

    error = fit(ax.MAML(mse, 0.0), Steep(lines().odd), mapping="scan")
    assert error.cause == type(error.cause)(1, "mean meta-gradient")


def test_a_model_that_is_not_finite():
    start = ax.Functional(jnp.full((1, 1), jnp.nan), lambda p, x: x @ p)
    with pytest.raises(ax.TrainingDiverged, match="the meta-parameters were not finite") as caught:
        ax.fit(ax.MAML(mse), start, lines(), steps=1, meta_batch=3, key=KEY, devices=1)
    assert caught.value.cause.quantity == "meta-parameters"


def test_devices_and_several_tasks():
    class Half(Lines):
        def episode(self, key, i):
            return super().episode(key, jnp.where((i >= 5) & (i % 2 == 1), BAD, 0))

    error = fit(ax.MAML(mse), Half(lines(qy=nan).odd), meta_batch=4, devices=2)
    assert error.cause == type(error.cause)(2, "query targets", 1, None, 2)
    assert "(and something in 1 other tasks)" in str(error)


def test_tasks_from_the_host():
    class Hosted(ax.HostTaskDistribution):
        split: str = eqx.field(static=True, default="train", kw_only=True)

        def plan(self, key):
            return jax.random.bits(key)

        def fetch(self, plan):
            x = np.ones((*plan.shape, 2, 1), np.float32)
            y = x.copy()
            if plan.ndim == 2:
                y[1, 2] = np.nan
            return ax.Task(ax.Batch(x, x), ax.Batch(x, y))

        def sample(self, key):
            raise NotImplementedError

    error = fit(ax.MAML(mse), Hosted())
    assert error.cause == type(error.cause)(2, "query targets", 2, None, 1)


def test_a_replay_that_fails_loses_nothing(monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("out of memory")

    monkeypatch.setattr("adaptax.engine.train.diagnose", broken)
    with pytest.raises(ax.TrainingDiverged, match="the loss or its gradient was not") as caught:
        ax.fit(ax.MAML(mse), LINE, lines(qy=nan), steps=3, meta_batch=3, key=KEY, devices=1)
    assert str(caught.value.__cause__) == "out of memory"
    assert caught.value.result.step == 1

"""What holds for every learner, and that the public checks find learners for which it does not."""

import dataclasses
import functools
import itertools
import json

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import adaptax as ax
import references
from adaptax.testing import check_learner, check_meta_gradient
from learners import LEARNERS, OF_LABELS, OF_NUMBERS, ConvNet, Images, cross_entropy, mse

KEY = jax.random.key(0)
VARIANTS = ("MAML schedule", "Meta-SGD first order", "cosines", "Gaussian process, jointly")
"""Their gradients are checked, which is enough."""


@pytest.mark.parametrize("name", [name for name in LEARNERS if name not in VARIANTS])
def test_every_learner_keeps_the_contract(name):
    check_learner(LEARNERS[name](mse))


@pytest.mark.parametrize("name", [*OF_LABELS, *OF_NUMBERS])
def test_learners_of_labels_or_of_numbers_keep_the_contract(name):
    learner = {**OF_LABELS, **OF_NUMBERS}[name]()
    check_meta_gradient(learner)
    if name not in VARIANTS:
        check_learner(learner)


@pytest.mark.parametrize("name", LEARNERS)
def test_meta_gradient_of_a_perceptron(name):
    references.check_meta_gradient(LEARNERS[name](mse))


@pytest.mark.parametrize("name", LEARNERS)
def test_meta_gradient_of_a_convolutional_net_with_batch_norm(name):
    references.check_meta_gradient(
        LEARNERS[name](cross_entropy), ConvNet(jax.random.key(5)), Images()
    )


def test_a_loss_of_labels_gets_tasks_with_labels():
    check_learner(ax.MAML(cross_entropy, 0.1))
    with pytest.raises(ValueError, match="neither regression nor classification"):
        check_learner(ax.MAML(lambda model, batch: batch.nothing))


# First order, exactly: no finite differences of what the learner itself says is held fixed.


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("adapt_only", [None, ax.tree.under("head")])
def test_fomaml_is_the_gradient_at_the_adapted_point(adapt_only):
    model = ax.models.MLP(1, 1, (8, 8), key=KEY, activation=jnp.tanh)
    task = ax.tasks.sinusoid().train.sample(KEY)
    learner = ax.FOMAML(mse, 0.1, 3, adapt_only=adapt_only)
    tasks = jax.tree.map(lambda leaf: leaf[None], task)
    _, grads = ax.meta_value_and_grad(learner, model, tasks, key=KEY)
    adapted = learner.adapt(model, task.support, key=KEY)
    flat, unravel = jax.flatten_util.ravel_pytree(ax.tree.parameters(adapted))
    static = eqx.filter(adapted, eqx.is_inexact_array, inverse=True)
    loss = jax.jit(lambda v: mse(eqx.combine(unravel(v), static), task.query))
    steps = 1e-5 * jnp.eye(len(flat))
    slope = (jax.vmap(loss)(flat + steps) - jax.vmap(loss)(flat - steps)) / 2e-5
    found = jax.flatten_util.ravel_pytree(grads)[0]
    assert jnp.linalg.norm(found - slope) < 1e-8 * jnp.linalg.norm(slope)


@pytest.mark.usefixtures("x64")
def test_reptile_is_the_way_back_from_the_adapted_point():
    model = ax.models.MLP(1, 1, (8, 8), key=KEY, activation=jnp.tanh)
    tasks = jax.vmap(ax.tasks.sinusoid().train.sample)(jax.random.split(KEY, 3))
    learner = ax.Reptile(mse, 0.1, 4)
    _, grads = ax.meta_value_and_grad(learner, model, tasks, key=KEY)
    params = ax.tree.parameters
    ends = jax.vmap(lambda s: params(learner.adapt(model, s, key=KEY)))(tasks.support)
    for g, start, end in zip(*map(jax.tree.leaves, (grads, params(model), ends))):
        assert np.allclose(g, start - end.mean(axis=0), rtol=1e-12, atol=1e-15)


# Models of any library


def functional():
    keys = jax.random.split(KEY, 2)
    params = {"in": jax.random.normal(keys[0], (1, 16)), "bias": jnp.zeros(16),
              "out": jax.random.normal(keys[1], (16, 1)) / 4}  # fmt: skip
    return ax.Functional(params, lambda p, x: jnp.tanh(x @ p["in"] + p["bias"]) @ p["out"])


class Net(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(1, 16, rngs=rngs)
        self.head = nnx.Linear(16, 1, rngs=rngs)

    def __call__(self, x):
        return self.head(jnp.tanh(self.first(x)))


MODELS = {
    "equinox": lambda: ax.models.MLP(1, 1, (16,), key=KEY, activation=jnp.tanh),
    "flax": lambda: Net(nnx.Rngs(0)),
    "functional": functional,
}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("name", ["MAML", "Meta-SGD", "Reptile carry"])
def test_any_model_is_meta_trained_by_the_same_code(kind, name):
    learner, tasks = LEARNERS[name](mse), ax.tasks.sinusoid(shot=5, query=5)
    result = ax.fit(learner, MODELS[kind](), tasks.train, steps=6, meta_batch=4, key=KEY)
    support = tasks.test.sample(KEY).support
    adapted = learner.adapt(result.meta, support, key=KEY)
    assert adapted(support.x).shape == (5, 1)
    assert np.isfinite(
        ax.evaluate(learner, result.meta, tasks.test, episodes=4, key=KEY).mean("mse")
    )


# Planted faults


class Fake(ax.MetaLearner):
    """MAML that drops the second order and does not say so."""

    loss: ax.Loss = mse

    def adapt(self, meta, support, *, key):
        slope = eqx.filter_grad(self.loss)(jax.lax.stop_gradient(ax.tree.parameters(meta)), support)
        return eqx.apply_updates(meta, jax.tree.map(lambda g: -0.1 * g, slope))

    def meta_loss(self, meta, task, *, key, progress):
        return self.loss(self.adapt(meta, task.support, key=key), task.query), {}


class Stopped(Fake):
    """The same, by `inner.run`."""

    def adapt(self, meta, support, *, key):
        return ax.inner.descend(
            self.loss, meta, support, key=key, steps=1, lr=0.1, first_order=True
        )


class Honest(Stopped):
    def adapt(self, meta, support, *, key):
        return ax.inner.descend(self.loss, meta, support, key=key, steps=1, lr=0.1)


def test_a_first_order_fake_is_found():
    with pytest.raises(AssertionError, match=r"meta-gradient along .* finite differences give"):
        check_meta_gradient(Stopped())
    check_meta_gradient(Honest())


def test_what_is_stopped_on_purpose_is_said_by_a_reference():
    """As docs/own-algorithm.md has it."""
    fomaml, reptile = ax.FOMAML(mse, 0.1, 1), ax.Reptile(mse, 0.1, 2)

    def held(meta, task, *, at, key, progress):
        adapt_key, query_key = jax.random.split(key)
        model = ax.tree.shift(fomaml.adapt(at, task.support, key=adapt_key), meta, at)
        return mse(model, task.query.draw(model, query_key))

    def goal(meta, task, *, at, key, progress):
        return ax.tree.squared_distance(meta, reptile.adapt(at, task.support, key=key)) / 2

    for learner, reference in ((fomaml, held), (reptile, goal)):
        check_meta_gradient(learner, reference=reference)
        with pytest.raises(AssertionError, match="says by reference= what it holds fixed"):
            check_meta_gradient(learner)
    with pytest.raises(AssertionError, match=r"meta-gradient along .* finite differences give"):
        check_meta_gradient(Honest(), reference=held)


def test_a_wrong_derivative_of_the_loss_is_found():
    @jax.custom_jvp
    def square(x):
        return x * x

    square.defjvp(lambda x, t: (square(*x), 2.001 * x[0] * t[0]))
    loss = lambda model, batch: jnp.mean(square(model(batch.x) - batch.y))
    with pytest.raises(AssertionError, match=r"relative error"):
        references.check_meta_gradient(ax.Reptile(loss, 0.1, 2))


def spoilt(**methods):
    """An honest learner with some methods replaced."""
    return type("Spoilt", (Honest,), methods)()


CALLS = itertools.count()


def first_example(self, meta, task, *, key, progress):
    only = jax.tree.map(lambda leaf: leaf[:1], task.query)
    return self.loss(meta, only), {}


FAULTS = {
    "init differs": {
        "init": lambda self, model, *, key: jax.tree.map(
            lambda leaf: leaf + next(CALLS) if eqx.is_array(leaf) else leaf, model
        )
    },
    "not finite": {"init": lambda self, model, *, key: ax.tree.full_like(model, jnp.inf)},
    "cannot be called": {"adapt": lambda self, meta, support, *, key: {"model": meta}},
    "predicts shape": {
        "adapt": lambda self, meta, support, *, key: eqx.tree_at(
            lambda m: m.head, meta, ax.models.Linear(8, 2, key=KEY)
        )
    },
    "adapt differs": {
        "adapt": lambda self, meta, support, *, key: jax.tree.map(
            lambda leaf: leaf + next(CALLS) if eqx.is_array(leaf) else leaf, meta
        )
    },
    "adapt cannot be traced": {
        "adapt": lambda self, meta, support, *, key: meta if meta.head.bias[0] > 0 else None
    },
    "last of iterates": {
        "iterates": lambda self, meta, support, *, key, steps=None: ax.tree.stack([meta, meta])
    },
    "not a scalar": {"meta_loss": lambda self, m, t, *, key, progress: (m(t.query.x).sum(1), {})},
    "a dict of metrics": {"meta_loss": lambda self, m, t, *, key, progress: self.loss(m, t.query)},
    "the metric 'errors'": {
        "meta_loss": lambda self, m, t, *, key, progress: (
            self.loss(m, t.query), {"errors": m(t.query.x)},
        )
    },
    "changes nothing": {"optimizer": lambda self, steps: optax.sgd(0.0)},
    "order of the examples": {"meta_loss": first_example},
}  # fmt: skip


@pytest.mark.parametrize("sentence", FAULTS)
def test_a_planted_fault_is_named(sentence):
    with pytest.raises(AssertionError, match=sentence):
        check_learner(spoilt(**FAULTS[sentence]))


def test_learners_that_lack_something_cannot_be_made():
    class Lossless(ax.MetaLearner):
        loss: ax.Loss = mse

        def adapt(self, meta, support, *, key):
            return meta

    class Idle(ax.Adapter):
        loss: ax.Loss = mse

    with pytest.raises(TypeError, match="abstract"):
        Lossless()
    with pytest.raises(TypeError, match="Idle defines neither adapt nor iterates"):
        Idle()


def test_one_of_adapt_and_iterates_is_enough():
    class Stepping(ax.Adapter):
        loss: ax.Loss = mse

        def iterates(self, meta, support, *, key, steps=None):
            return ax.inner.iterates(self.loss, meta, support, key=key, steps=steps or 3, lr=0.1)

    model = ax.models.MLP(1, 1, (4,), key=KEY)
    support = ax.tasks.sinusoid().train.sample(KEY).support
    last = ax.MAML(mse, 0.1, 3).adapt(model, support, key=KEY)(support.x)
    assert np.allclose(Stepping().adapt(model, support, key=KEY)(support.x), last, rtol=1e-6)
    alone = Honest().iterates(model, support, key=KEY)
    once = Honest().adapt(model, support, key=KEY)
    assert np.allclose(ax.tree.at(alone, 0)(support.x), once(support.x), rtol=1e-6)
    report = ax.evaluate(Stepping(), model, ax.tasks.sinusoid().test, episodes=2, key=KEY)
    assert report.protocol["algorithm"] == "Stepping"


def test_a_report_has_every_hyper_parameter():
    class Own(Honest.__bases__[0]):
        clip: float = 0.5
        rule: object = eqx.field(static=True, default=ax.tree.under("head"))
        unset: int | None = None
        array: jax.Array = eqx.field(default_factory=lambda: jnp.ones(3))

    own = Own(loss=functools.partial(mse, reduction="sum")).describe()
    assert own == {"algorithm": "Own", "loss": "mse(reduction=sum)", "clip": 0.5,
                   "rule": "under(head)", "array": "given"}  # fmt: skip
    platipus = ax.PLATIPUS(mse, 0.1, eval_steps=3, prior_variance=0.2).describe()
    assert (platipus["prior_variance"], platipus["eval_steps"]) == (0.2, 3)
    assert ax.MAMLPlusPlus(mse, clip=10.0).describe()["clip"] == 10.0
    kernel = ax.BayesianMAML(mse).describe()["kernel"]
    assert kernel == "RBF(bandwidth=median, half=False, stop=False)"
    schedule = optax.cosine_decay_schedule(0.1, 10)
    assert ax.MAML(mse, schedule, inner_optimizer=None).describe()["inner_lr"].startswith("cosine")
    assert ax.MAML(lambda model, batch: 0.0, lambda step: 0.1).describe()["loss"] == "given"
    json.dumps([LEARNERS[name](mse).describe() for name in LEARNERS])


def test_learners_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        ax.MAML(mse).inner_lr = 3.0

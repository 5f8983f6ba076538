"""A padded task is the task itself, for every loss, metric and learner, to the last digits."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import adaptax as ax
from adaptax import metrics, weights
from adaptax.algorithms.gaussian import Gaussian, gaussian_nll
from adaptax.engine import scoring
from adaptax.task import Minibatches, _permutation
from adaptax.testing import padded
from learners import LEARNERS, ConvNet, Images

pytestmark = pytest.mark.usefixtures("x64")
KEY = jax.random.key(0)
MORE = {
    "LEO": lambda loss: ax.LEO(loss, inner_steps=2, finetune_steps=1, latent=4, codes="task"),
    "ridge": lambda loss: ax.RidgeRegression(),
    "Reptile minibatches of both": lambda loss: ax.Reptile(
        loss, 0.1, 3, inner_batch=4, include_query=True
    ),
    "MAML in half the steps": lambda loss: ax.MAML(
        functools.partial(loss, reduction="sum"), 0.01, 2, adapt_only=ax.tree.under("head")
    ),
}


def equal(a, b):
    pairs = list(zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))
    size = sum(float(np.sum(np.square(x))) for x, _ in pairs) ** 0.5
    assert all(x.shape == y.shape for x, y in pairs)
    apart = sum(float(np.sum(np.square(x - y))) for x, y in pairs) ** 0.5
    assert apart <= 1e-12 * (size + 1e-6), (apart, size)
    assert size > 0


def value_and_grad(learner, meta, task):
    trained, fixed = eqx.partition(meta, learner.trained(meta))

    def loss(trained, task):
        return learner.meta_loss(eqx.combine(trained, fixed), task, key=KEY, progress=0.5)[0]

    return jax.jit(jax.value_and_grad(loss))(trained, task)


def longer(task, support=3, query=2):
    sources, more = (task.support, task.query), (support, query)
    return ax.Task(*(padded(own, own.size + n) for own, n in zip(sources, more)))


def waves():
    model = ax.models.MLP(1, 1, (8, 8), key=KEY, activation=jnp.tanh)
    return model, ax.tasks.sinusoid(shot=5, query=6).train.sample(KEY)


@pytest.mark.parametrize("name", [*LEARNERS, *MORE])
def test_a_padded_task_has_the_value_and_the_meta_gradient_of_the_task(name):
    learner = {**LEARNERS, **MORE}[name](ax.losses.mse)
    model, task = waves()
    meta = learner.init(model, key=KEY)
    plain, more = (value_and_grad(learner, meta, t) for t in (task, longer(task)))
    equal(plain, more)


@pytest.mark.parametrize("name", ["MAML", "FOMAML", "MAML++", "BMAML heads", "PLATIPUS"])
def test_batch_normalisation_of_ours_leaves_padding_out(name):
    learner = LEARNERS[name](ax.losses.cross_entropy)
    task = Images(each=3).sample(KEY)
    meta = learner.init(ConvNet(jax.random.key(5)), key=KEY)
    plain, more = (value_and_grad(learner, meta, t) for t in (task, longer(task)))
    equal(plain, more)


@pytest.mark.parametrize("transductive", [True, False])
def test_scores_of_padded_tasks_are_those_of_the_tasks(transductive):
    class Padded(ax.TaskDistribution):
        tasks: Images
        split: str = eqx.field(static=True, kw_only=True, default="test")

        def sample(self, key):
            return longer(self.tasks.sample(key))

    learner = ax.MAML(ax.losses.cross_entropy, 0.1, 2)
    meta, how = (
        ConvNet(jax.random.key(5)),
        {"episodes": 3, "key": KEY, "transductive": transductive},
    )
    plain = ax.evaluate(learner, meta, Images(split="test"), **how)
    more = ax.evaluate(learner, meta, Padded(Images(split="test")), **how)
    equal(plain.values, more.values)
    equal(plain.bins, more.bins)
    ensemble = LEARNERS["BMAML heads"](ax.losses.cross_entropy)
    meta = ensemble.init(meta, key=KEY)
    pair = [ax.evaluate(ensemble, meta, t, **how) for t in (Images(split="test"),
            Padded(Images(split="test")))]  # fmt: skip
    equal(*(r.values for r in pair))


def test_ones_are_as_no_weights_and_whole_weights_are_repetitions():
    model, task = waves()
    x, y = task.support.x, task.support.y
    counts = jnp.array([1.0, 2.0, 0.0, 3.0, 1.0])
    rows = np.repeat(np.arange(5), counts.astype(int))
    for loss in (
        ax.losses.mse,
        functools.partial(ax.losses.mse, reduction="sum"),
        functools.partial(ax.losses.normal, noise=0.5, reduction="sum"),
        ax.losses.relative_mse,
    ):
        repeated = loss(model, ax.Batch(x[rows], y[rows]))
        assert np.isclose(loss(model, ax.Batch(x, y, counts)), repeated, rtol=1e-13)
        assert np.isclose(loss(model, ax.Batch(x, y, jnp.ones(5))), loss(model, ax.Batch(x, y)),
                          rtol=1e-13)  # fmt: skip
    noisy = Gaussian(model)
    both = (gaussian_nll(noisy, b) for b in (ax.Batch(x, y, counts), ax.Batch(x[rows], y[rows])))
    assert np.isclose(*both, rtol=1e-13)


@pytest.mark.parametrize("reduction", ["mean", "sum", "sum/shot", "balanced"])
@pytest.mark.parametrize("tokens", [(), (3,)])
def test_weighted_cross_entropies(reduction, tokens):
    keys = jax.random.split(KEY)
    logits = jax.random.normal(keys[0], (6, *tokens, 4))
    labels = jax.random.randint(keys[1], (6, *tokens), 0, 4)
    counts = jnp.array([2.0, 1, 0, 1, 3, 1])
    rows = np.repeat(np.arange(6), counts.astype(int))
    loss = functools.partial(ax.losses.cross_entropy, reduction=reduction)
    repeated = loss(lambda x: x, ax.Batch(logits[rows], labels[rows]))
    assert np.isclose(loss(lambda x: x, ax.Batch(logits, labels, counts)), repeated, rtol=1e-13)


def test_gaps_in_some_of_several_targets():
    x = jax.random.normal(KEY, (5, 2))
    y = jax.random.normal(jax.random.key(1), (5, 2))
    there = jnp.array([[1, 1], [1, 0], [0, 1], [1, 1], [0, 0.0]])
    batch = ax.Batch(x, jnp.where(there > 0, y, jnp.nan), there)
    errors = jnp.where(there > 0, (x - y) ** 2, 0)
    assert np.isclose(ax.losses.mse(lambda x: x, batch), errors.sum() / 6, rtol=1e-13)
    total = ax.losses.mse(lambda x: x, batch, reduction="sum")
    assert np.isclose(total, errors.sum() / 2, rtol=1e-13)
    slope = jax.grad(lambda a: ax.losses.mse(lambda x: a * x, batch))(1.0)
    assert np.isclose(slope, jnp.where(there > 0, 2 * (x - y) * x, 0).sum() / 6, rtol=1e-12)
    found = metrics.regression(x, batch.y, 0.5, there)
    assert np.isclose(found["mse"], errors.sum() / 6, rtol=1e-13)
    assert metrics.coverage(x, batch.y, 0.5, there)["quantiles"].sum() == 6
    ridge = ax.RidgeRegression()
    meta = ridge.init(None, key=KEY)
    slopes, offset = ridge.adapt(meta, batch, key=KEY).params
    for i in range(2):
        rows = np.flatnonzero(there[:, i])
        own = ridge.adapt(meta, ax.Batch(x[rows], y[rows, i : i + 1]), key=KEY).params
        assert np.allclose(slopes[:, i], own[0][:, 0], rtol=1e-12)
        assert np.allclose(offset[i], own[1][0], rtol=1e-12)


def test_metrics_count_what_weights_say():
    logits = jax.random.normal(KEY, (2, 6, 3))
    labels = jnp.array([0, 1, 2, 0, 1, 2])
    counts = jnp.array([1.0, 0, 2, 1, 1, 1])
    rows = np.repeat(np.arange(6), counts.astype(int))
    found = metrics.classification(logits, labels, counts) | metrics.uncertainty(logits, counts)
    due = metrics.classification(logits[:, rows], labels[rows])
    due |= metrics.uncertainty(logits[:, rows])
    equal(due, found)
    yes = (labels > 0).astype(float)
    equal(metrics.binary(logits[..., 0][:, rows], yes[rows]),
          metrics.binary(logits[..., 0], yes, counts))  # fmt: skip


@pytest.mark.parametrize("count", [1, 2, 7, 30])
def test_permutations_of_a_traced_count_are_those_of_jax(count):
    for key in jax.random.split(KEY, 3):
        order = jax.jit(_permutation, static_argnums=1)(key, 30, jnp.asarray(count))
        assert (order[:count] == jax.random.permutation(key, count)).all()
        assert sorted(order.tolist()) == list(range(30))


def test_permutations_beyond_one_round_of_sorting():
    for count in (1600, 1625, 1626, 1700):
        order = jax.jit(_permutation, static_argnums=1)(KEY, 1700, jnp.asarray(count))
        assert (order[:count] == jax.random.permutation(KEY, count)).all()


def test_minibatches_never_draw_padding():
    x = jnp.arange(5.0)[:, None]
    plain = Minibatches(ax.Batch(x, x), 4, KEY)
    more = Minibatches(padded(ax.Batch(x, x), 9), 4, KEY)
    for step in range(6):
        one, other = plain.at(step).draw(None, KEY), more.at(step).draw(None, KEY)
        assert (one.x == other.x).all()
        assert (other.weight == 1).all()


def test_joined_batches_keep_what_examples_count():
    x = jnp.arange(3.0)[:, None]
    two = ax.Batch.joined(ax.Batch(x, x), padded(ax.Batch(x, x), 4))
    assert two.weight.tolist() == [1, 1, 1, 1, 1, 1, 0]
    assert ax.Batch.joined(ax.Batch(x, x), ax.Batch(x, x)).weight is None
    y = jnp.ones((3, 2))
    gaps = ax.Batch(x, y, jnp.array([[1, 0], [1, 1], [0, 0.0]]))
    assert ax.Batch.joined(gaps, padded(ax.Batch(x, y), 4)).weight.sum() == 9
    task = ax.Task(gaps, padded(ax.Batch(x, y), 5)).unpadded()
    assert (task.support.size, task.query.size) == (2, 3)
    assert np.isnan(task.support.y).tolist() == [[False, True], [False, False]]


def test_weights_that_do_not_fit_are_refused():
    x = jnp.ones((3, 2))
    with pytest.raises(ValueError, match=r"weights of shape \(2,\) do not fit targets"):
        ax.losses.mse(lambda x: x, ax.Batch(x, x, jnp.ones(2)))
    with pytest.raises(ValueError, match="no argument weight to leave padding out by"):
        scoring.own(lambda predictions, y: {}, x, ax.Batch(x, x, jnp.ones(3)), "scores=")
    found = scoring.own(
        lambda predictions, y, weight: {"all": weights.average(y, weight)}, x,
        ax.Batch(x, x, jnp.ones(3)), "scores=",
    )  # fmt: skip
    assert found["all"] == 1
    head = ax.models.Linear(4, 2, key=KEY)
    learner = ax.LEO(ax.losses.cross_entropy)
    support = ax.Batch(jnp.ones((2, 4)), jnp.arange(2), jnp.ones(2))
    with pytest.raises(ValueError, match='use codes="task"'):
        learner.adapt(learner.init(head, key=KEY), support, key=KEY)


def test_a_learner_that_counts_padding_is_found():
    class Careless(ax.MetaLearner):
        loss: ax.Loss = ax.losses.mse

        def adapt(self, meta, support, *, key):
            return ax.inner.descend(self.loss, meta, support, key=key, steps=1, lr=0.1)

        def meta_loss(self, meta, task, *, key, progress):
            return jnp.mean((self.adapt(meta, task.support, key=key)(task.query.x)
                             - task.query.y) ** 2), {}  # fmt: skip

    with pytest.raises(AssertionError, match="examples of weight 0 change the gradient"):
        ax.testing.check_learner(Careless())

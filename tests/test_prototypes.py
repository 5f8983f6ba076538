"""Prototypical networks and ProtoMAML: closed forms, reductions, any number of ways."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import adaptax as ax
from adaptax.algorithms import layers
from adaptax.testing import padded
from learners import ConvNet, Images

KEY = jax.random.key(0)
CE = ax.losses.cross_entropy


def net(out=3, key=KEY):
    return ax.models.MLP(2, out, (6,), key=key, activation=jnp.tanh)


@pytest.fixture
def task():
    """Three classes, unequal numbers of examples."""
    with jax.enable_x64(True):
        x = jax.random.normal(KEY, (13, 2))
        y = jnp.array([0, 1, 2, 0, 1, 2, 1, 0, 1, 2, 2, 0, 1], jnp.int32)
        yield ax.Task(ax.Batch(x[:8], y[:8]), ax.Batch(x[8:], y[8:]))


def log_p(learner, meta, task):
    predict = learner.adapt(meta, task.support, key=KEY)
    return np.asarray(jax.nn.log_softmax(predict(task.query.x)))


def value_and_grad(learner, meta, task):
    """Of one task, compiled."""
    return eqx.filter_jit(ax.meta_value_and_grad)(
        learner, meta, jax.tree.map(lambda a: a[None], task), key=KEY
    )


def by_hand(features, task, way=3):
    """Squared distances of queries to the means of the classes."""
    s, y = features(task.support.x), np.asarray(task.support.y)
    centres = np.stack([s[y == c].mean(axis=0) for c in range(way)])
    return ((features(task.query.x)[:, None] - centres) ** 2).sum(axis=-1), centres


def hidden(model):
    layer = model.layers[0]
    return lambda x: np.tanh(np.asarray(x) @ np.asarray(layer.weight) + np.asarray(layer.bias))


def test_squared_distances_to_the_means_of_features(task):
    learner, model = ax.PrototypicalNetwork(), net()
    away, centres = by_hand(hidden(model), task)
    expected = np.asarray(jax.nn.log_softmax(-jnp.asarray(away)))
    meta = learner.init(model, key=KEY)
    np.testing.assert_allclose(log_p(learner, meta, task), expected, rtol=1e-12)
    head = learner.adapt(meta, task.support, key=KEY).head
    np.testing.assert_allclose(head.weight, 2 * centres.T, rtol=1e-12)
    np.testing.assert_allclose(head.bias, -(centres**2).sum(axis=1), rtol=1e-12)
    outputs = ax.PrototypicalNetwork(head=None)
    away, _ = by_hand(lambda x: np.asarray(model(x)), task)
    expected = np.asarray(jax.nn.log_softmax(-jnp.asarray(away)))
    found = log_p(outputs, outputs.init(model, key=KEY), task)
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_cosines(task):
    learner, model = ax.PrototypicalNetwork(distance="cosine", scale=7.0), net()
    _, centres = by_hand(hidden(model), task)
    f = hidden(model)(task.query.x)
    unit = lambda x: x / np.linalg.norm(x, axis=1, keepdims=True)
    expected = np.asarray(jax.nn.log_softmax(jnp.asarray(7 * unit(f) @ unit(centres).T)))
    meta = learner.init(model, key=KEY)
    np.testing.assert_allclose(log_p(learner, meta, task), expected, rtol=1e-9)
    (_, _), slope = value_and_grad(learner, meta, task)
    assert slope["log_scale"] != 0


def test_the_nearest_class_mean_is_the_prototypical_network_of_the_inputs(task):
    same = ax.Functional(jnp.zeros(()), lambda none, x: 2.0 * x + none)
    learner = ax.PrototypicalNetwork(head=None, way=3)
    nearest = ax.NearestClassMean(way=3, scale=4.0)
    found = log_p(learner, learner.init(same, key=KEY), task)
    expected = log_p(nearest, nearest.init(None, key=KEY), task)
    np.testing.assert_allclose(found, expected, rtol=1e-7)  # its scale is kept in float32


def test_without_steps_protomaml_is_a_prototypical_network(task):
    first, then = ax.PrototypicalNetwork(), ax.ProtoMAML(CE, 0.1, 0)
    model = net()
    (value, _), slope = value_and_grad(first, first.init(model, key=KEY), task)
    (other, _), gradient = value_and_grad(then, then.init(model, key=KEY), task)
    np.testing.assert_allclose(other, value, rtol=1e-14)
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(slope["model"]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-15)
    path = ax.ProtoMAML(CE, 0.1, 2).iterates(then.init(model, key=KEY), task.support, key=KEY)
    start = ax.tree.at(path, 0)(task.query.x)
    np.testing.assert_allclose(
        jax.nn.log_softmax(start), log_p(first, first.init(model, key=KEY), task), rtol=1e-12
    )


def test_the_inner_loop_is_gradient_descent_from_the_head_of_the_prototypes(task):
    """Of the head alone, whose gradient is known: X'ᵀ(p − y)/n."""
    learner = ax.ProtoMAML(CE, 0.3, 2, adapt_only=ax.tree.under("head"), multiplier=0.5)
    model = net()
    adapted = learner.adapt(learner.init(model, key=KEY), task.support, key=KEY)
    f, y = hidden(model)(task.support.x), np.eye(3)[np.asarray(task.support.y)]
    _, centres = by_hand(hidden(model), task)
    w, b = centres.T, -(centres**2).sum(axis=1) / 4
    for _ in range(2):
        p = np.asarray(jax.nn.softmax(jnp.asarray(f @ w + b)))
        w, b = w - 0.3 * f.T @ (p - y) / len(y), b - 0.3 * (p - y).mean(axis=0)
    np.testing.assert_allclose(adapted.head.weight, w, rtol=1e-11)
    np.testing.assert_allclose(adapted.head.bias, b, rtol=1e-11)
    np.testing.assert_array_equal(adapted.body.layers[0].weight, model.layers[0].weight)


def test_what_of_the_meta_gradient_goes_through_the_prototypes(task):
    """Stopped and of first order, it is the gradient at the adapted point, as FOMAML's is."""
    model = net()
    learner = ax.ProtoMAML(CE, 0.1, 2, first_order=True, stop_prototypes=True)
    meta = learner.init(model, key=KEY)
    adapted = learner.adapt(meta, task.support, key=KEY)
    at_the_end = eqx.filter_grad(lambda body: CE(layers.Headed(body, adapted.head), task.query))
    _, gradient = value_and_grad(learner, meta, task)
    pairs = zip(jax.tree.leaves(gradient), jax.tree.leaves(at_the_end(adapted.body)), strict=True)
    for a, b in pairs:
        np.testing.assert_allclose(a, b, rtol=1e-11)
    flowing = ax.ProtoMAML(CE, 0.1, 2, first_order=True)
    _, other = value_and_grad(flowing, meta, task)
    a, b = (ax.tree.norm(g) for g in (gradient, jax.tree.map(jnp.subtract, gradient, other)))
    assert b > 0.1 * a


@pytest.mark.parametrize("make", [ax.PrototypicalNetwork, lambda: ax.ProtoMAML(CE, 0.1, 2)])
def test_any_number_of_ways_after_training_on_another(make):
    learner = make()
    few, many = (ax.tasks.glyphs(way=way, shot=1, query=2) for way in (3, 7))
    model = ax.models.MLP(784, 3, (8,), key=KEY)
    result = ax.fit(learner, model, few.train, steps=2, meta_batch=2, key=KEY)
    assert "head" not in {path.split("/")[-2] for path in ax.tree.by_path(
        ax.tree.parameters(result.meta))}  # fmt: skip
    task = many.test.sample(KEY)
    assert learner.adapt(result.meta, task.support, key=KEY)(task.query.x).shape == (14, 7)
    report = ax.evaluate(learner, result.meta, many.test, episodes=3, key=KEY)
    assert report.protocol["way"] == 7
    assert np.isfinite(report.mean("nll"))
    # Of nine ways, two have no support, and no probability.
    nine = learner.with_way(9)
    logits = nine.adapt(result.meta, task.support, key=KEY)(task.query.x)
    assert jnp.all(jax.nn.softmax(logits)[:, 7:] == 0)
    seven = learner.adapt(result.meta, task.support, key=KEY)(task.query.x)
    np.testing.assert_allclose(logits[:, :7], seven, rtol=1e-4, atol=1e-4)


def test_ways_where_labels_are_traced(task):
    learner, model = ax.PrototypicalNetwork(), net(out=3)
    meta = learner.init(model, key=KEY)

    @jax.jit
    def logits(support):
        return learner.adapt(meta, support, key=KEY)(task.query.x)

    # As many as the head had that was taken out; a label beyond is no silent mistake.
    np.testing.assert_allclose(
        jax.nn.log_softmax(logits(task.support)), log_p(learner, meta, task), rtol=1e-12
    )
    assert jnp.all(jnp.isnan(logits(ax.Batch(task.support.x, task.support.y + 1))))
    nameless = ax.PrototypicalNetwork(head=None)
    with pytest.raises(ValueError, match="give the learner way="):
        jax.jit(lambda s: nameless.adapt({"model": model}, s, key=KEY)(s.x))(task.support)


@pytest.mark.parametrize("make", [ax.PrototypicalNetwork, lambda: ax.ProtoMAML(CE, 0.1, 2)])
def test_meta_gradient_of_a_convolutional_net_with_batch_norm(make):
    ax.testing.check_meta_gradient(make(), ConvNet(jax.random.key(5)), Images())


@pytest.mark.parametrize("make", [ax.PrototypicalNetwork, lambda: ax.ProtoMAML(CE, 0.1, 2)])
def test_padding_is_not_there(task, make):
    learner = make()
    meta = learner.init(net(), key=KEY)
    longer = ax.Task(padded(task.support, 11), padded(task.query, 7))
    odd = eqx.tree_at(lambda t: t.support.y, longer, longer.support.y.at[8:].set(5))
    pairs = [value_and_grad(learner, meta, t) for t in (task, longer, odd)]
    for a, b, c in zip(*map(jax.tree.leaves, pairs), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-12, atol=1e-14)
        np.testing.assert_array_equal(c, b)  # no matter how padding is labelled
    assert learner.adapt(meta, odd.support, key=KEY)(task.query.x).shape == (5, 3)


def test_models_of_other_kinds():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.Linear(2, 6, rngs=rngs)
            self.head = nnx.Linear(6, 3, rngs=rngs)

        def __call__(self, x):
            return self.head(jnp.tanh(self.first(x)))

    x = jax.random.normal(KEY, (6, 2))
    support = ax.Batch(x, jnp.array([0, 1, 2, 3, 0, 1]))
    batched = ax.Batched(eqx.nn.MLP(2, 3, 6, 1, key=KEY))
    for model, head in ((Net(nnx.Rngs(0)), "head"), (batched, "model/layers/1")):
        for learner in (ax.PrototypicalNetwork(head=head), ax.ProtoMAML(CE, 0.1, 2, head=head)):
            meta = learner.init(model, key=KEY)
            assert learner.adapt(meta, support, key=KEY)(x).shape == (6, 4)
            assert layers.way_of(meta["model"] if isinstance(meta, dict) else meta, head) == 3


def test_what_is_refused(task):
    with pytest.raises(Exception, match="distance"):
        ax.PrototypicalNetwork(distance="manhattan")
    with pytest.raises(ValueError, match="scale is above 0"):
        ax.PrototypicalNetwork(scale=0.0)
    for learner in (ax.PrototypicalNetwork, ax.ProtoMAML):
        with pytest.raises(ValueError, match="way is the number of classes"):
            learner(way=0)
        with pytest.raises(ValueError, match=r"no layer at head='top'.* one of layers/0, head"):
            learner(head="top").init(net(), key=KEY)
        own = learner(way=2)
        meta = own.init(net(), key=KEY)
        with pytest.raises(ValueError, match="has the label 2 of a task of 2 ways"):
            own.adapt(meta, task.support, key=KEY)
        with pytest.raises(ValueError, match="want an integer label"):
            own.adapt(meta, ax.Batch(task.support.x, task.support.x), key=KEY)
        with pytest.raises(ValueError, match="no examples"):
            own.adapt(meta, jax.tree.map(lambda a: a[:0], task.support), key=KEY)
    with pytest.raises(ValueError, match="multiplier is above 0"):
        ax.ProtoMAML(multiplier=-1.0)


def test_it_starts_from_what_others_learned():
    trained = {"model": net(), "lr": ax.tree.full_like(net(), 0.1)}
    for learner in (ax.PrototypicalNetwork(), ax.ProtoMAML()):
        for start in (trained, net(), learner.init(net(), key=KEY)):
            meta = learner.init(start, key=KEY)
            body = meta["model"] if isinstance(meta, dict) else meta
            np.testing.assert_array_equal(body.layers[0].weight, net().layers[0].weight)


@pytest.mark.parametrize("head", ["zero", "tied"])
def test_a_shared_head_takes_any_number_of_ways(head, task):
    """As a model of so many ways does whose head is the same for all."""
    maml, model = ax.MAML(CE, 0.5, 2), net(out=5)
    tied = {path: leaf.mean(-1, keepdims=True) for path, leaf in ax.tree.by_path(model).items()
            if path.startswith("head")}  # fmt: skip
    wanted = {path: jnp.broadcast_to(leaf, (*leaf.shape[:-1], 3)) * (head == "tied")
              for path, leaf in tied.items()}  # fmt: skip
    due = maml.adapt(ax.tree.replace(net(out=3), ax.tree.by_path(model) | wanted),
                     task.support, key=KEY)(task.query.x)  # fmt: skip
    shared = ax.SharedHead(maml, head, way=3)
    found = shared.adapt(model, task.support, key=KEY)(task.query.x)
    np.testing.assert_allclose(found, due, rtol=1e-12)
    assert ax.SharedHead(maml, head).adapt(model, task.support, key=KEY)(task.query.x).shape[1] == 5
    rates = ax.SharedHead(ax.MetaSGD(CE, 0.1), head, way=3)
    with pytest.raises(ValueError, match="whose meta-parameters are a model"):
        rates.adapt(rates.init(model, key=KEY), task.support, key=KEY)


@pytest.mark.parametrize("make", [ax.PrototypicalNetwork, lambda: ax.ProtoMAML(CE, 0.1, 1)])
def test_tasks_of_unequal_numbers_of_classes(make):
    rng, tasks = np.random.default_rng(0), {}
    for i in range(9):
        centres = 5 * rng.normal(size=(2 + i % 3, 2))
        y = np.repeat(np.arange(len(centres)), 8)
        tasks[f"task {i}"] = (centres[y] + 0.1 * rng.normal(size=(len(y), 2)), y)
    splits = ax.tasks.from_tasks(tasks, shot=12, classes="task")
    learner = make()
    result = ax.fit(learner, net(), splits.train, steps=3, meta_batch=2, key=KEY)
    report = ax.evaluate(learner, result.meta, splits.test, episodes=6, key=KEY)
    assert report.mean("accuracy") > 0.8
    assert report.protocol["way"] == 4

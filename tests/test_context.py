"""Context adaptation: closed forms of linear models, places where a context enters, functa."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import adaptax as ax
from adaptax.algorithms import context, layers
from adaptax.testing import padded
from learners import ConvNet, Images

KEY = jax.random.key(0)
MSE = ax.losses.mse


@pytest.fixture
def task():
    with jax.enable_x64(True):
        x, y = jax.random.normal(KEY, (9, 2)), jax.random.normal(jax.random.key(1), (9, 1))
        yield ax.Task(ax.Batch(x[:5], y[:5]), ax.Batch(x[5:], y[5:]))


def mlp(width=2, **how):
    how = {"hidden": (6, 5), "activation": jnp.tanh, **how}
    return ax.models.MLP(width, 1, key=KEY, **how)


def value_and_grad(learner, meta, task):
    """Of one task, compiled."""
    return eqx.filter_jit(ax.meta_value_and_grad)(
        learner, meta, jax.tree.map(lambda a: a[None], task), key=KEY
    )


def test_the_context_of_a_linear_model_in_closed_form(task):
    """f = x w + φ v + b is linear in φ, and its mean squared error a parabola."""
    learner = ax.ContextAdaptation(MSE, 0.3, 3, size=4)
    model = ax.models.Linear(6, 1, key=KEY)
    meta = learner.init(model, key=KEY)
    w, v, b = model.weight[:2], model.weight[2:], model.bias
    phi = np.zeros(4)
    for _ in range(3):
        residual = np.asarray(task.support.x @ w + b - task.support.y) + phi @ np.asarray(v)
        phi = phi - 0.3 * 2 * residual.mean() * np.asarray(v)[:, 0]
    adapted = learner.adapt(meta, task.support, key=KEY)
    np.testing.assert_allclose(adapted.context, phi, rtol=1e-12)
    expected = np.asarray(task.query.x @ w + b) + phi @ np.asarray(v)
    np.testing.assert_allclose(adapted(task.query.x), expected, rtol=1e-12)

    def value(parameters):  # φ_3 = −(1 − (1 − 2α‖v‖²)³) r̄ v / ‖v‖², r̄ the mean residual
        w, v, b = parameters
        residual = jnp.mean(task.support.x @ w + b - task.support.y)
        shift = -(1 - (1 - 0.6 * jnp.sum(v**2)) ** 3) * residual
        return jnp.mean((task.query.x @ w + b + shift - task.query.y) ** 2)

    (found, _), slope = value_and_grad(learner, meta, task)
    expected, due = jax.value_and_grad(value)((w, v, b))
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    np.testing.assert_allclose(slope["model"].weight, jnp.concatenate(due[:2]), rtol=1e-10)
    np.testing.assert_allclose(slope["model"].bias, due[2], rtol=1e-10)


def test_of_first_order_the_context_is_a_constant(task):
    learner = ax.ContextAdaptation(MSE, 0.3, 2, size=3, first_order=True)
    meta = learner.init(mlp(5), key=KEY)
    adapted = learner.adapt(meta, task.support, key=KEY)
    due = eqx.filter_grad(
        lambda model: MSE(eqx.tree_at(lambda a: a.model, adapted, model), task.query)
    )(meta["model"])
    _, found = value_and_grad(learner, meta, task)
    for a, b in zip(jax.tree.leaves(found["model"]), jax.tree.leaves(due), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-15)


def test_a_shift_of_the_first_layer_is_an_input_that_is_joined(task):
    """As an affine first layer has it: W [x, φ] + b = W_x x + b + φ W_φ."""
    joined = ax.ContextAdaptation(MSE, 0.5, 3, size=3)
    shifted = ax.ContextAdaptation(MSE, 0.5, 3, size=3, where="layers/0", modulation="shift")
    wide, narrow = mlp(5), mlp(2)
    weight = wide.layers[0].weight
    weights = {"layers/0/weight": weight[:2]}
    narrow = ax.tree.replace(narrow, ax.tree.by_path(ax.tree.parameters(wide)) | weights)
    one, other = joined.init(wide, key=KEY), {"model": narrow, "maps": {"layers/0": weight[2:]}}
    a, b = (
        learner.adapt(meta, task.support, key=KEY)
        for learner, meta in ((joined, one), (shifted, other))
    )
    np.testing.assert_allclose(a.context, b.context, rtol=1e-11)
    np.testing.assert_allclose(a(task.query.x), b(task.query.x), rtol=1e-11)


@pytest.mark.parametrize("scaled", [True, False])
def test_modulated_layers(task, scaled):
    """φ A of two layers, written out."""
    kind = "film" if scaled else "shift"
    learner = ax.ContextAdaptation(MSE, 0.5, 1, size=3, where="layers/*", modulation=kind)
    model = mlp()
    meta = learner.init(model, key=KEY)
    assert {path: a.shape for path, a in meta["maps"].items()} == {
        "layers/0": (3, 12 if scaled else 6), "layers/1": (3, 10 if scaled else 5),
    }  # fmt: skip

    def predict(phi, x):
        for path, layer in zip(meta["maps"], model.layers, strict=True):
            h, m = layer(x), phi @ meta["maps"][path]
            n = h.shape[1]
            x = jnp.tanh(h * (1 + m[:n]) + m[n:] if scaled else h + m)
        return model.head(x)

    error = lambda phi: jnp.mean((predict(phi, task.support.x) - task.support.y) ** 2)
    phi = -0.5 * jax.grad(error)(jnp.zeros(3))
    adapted = learner.adapt(meta, task.support, key=KEY)
    np.testing.assert_allclose(adapted.context, phi, rtol=1e-11)
    np.testing.assert_allclose(adapted(task.query.x), predict(phi, task.query.x), rtol=1e-11)
    start = ax.tree.at(learner.iterates(meta, task.support, key=KEY), 0)
    np.testing.assert_allclose(start(task.query.x), model(task.query.x), rtol=1e-13)


def test_layers_within_layers(task):
    """A pattern may choose a layer and those that it is made of."""
    inner = eqx.nn.Sequential([eqx.nn.Linear(2, 3, key=KEY), eqx.nn.Linear(3, 1, key=KEY)])
    model = ax.Batched(inner)
    learner = ax.ContextAdaptation(
        MSE, 0.1, 1, size=None, where=("model/layers/0", "model/layers/1"), modulation="shift"
    )
    nested = context.Contextual(
        {"all": inner}, None, {"all": jnp.array([5.0]), "all/layers/0": jnp.ones(3)}, False
    )._modulated({"all": jnp.array([5.0]), "all/layers/0": jnp.ones(3)})["all"]
    x, (first, last) = task.query.x[0], inner.layers
    np.testing.assert_allclose(nested(x), last(first(x) + 1) + 5, rtol=1e-6)
    adapted = learner.adapt(learner.init(model, key=KEY), task.support, key=KEY)
    assert {path: m.shape for path, m in adapted.context.items()} == {
        "model/layers/0": (3,), "model/layers/1": (1,),
    }  # fmt: skip


def test_modulations_that_are_the_context_and_rates_that_are_learned(task):
    learner = ax.ContextAdaptation(
        MSE, 0.2, 2, size=None, where=("layers/1", "head"), modulation="shift", learn_lr=True
    )
    meta = learner.init(mlp(), key=KEY)
    assert {path: lr.shape for path, lr in meta["lr"].items()} == {"layers/1": (5,), "head": (1,)}
    adapted = learner.adapt(meta, task.support, key=KEY)
    assert adapted.maps is None
    # The shift of the last layer alone is that of the closed form of a mean.
    alone = ax.ContextAdaptation(MSE, 0.2, 1, size=None, where="head", modulation="shift")
    model = mlp()
    shift = alone.adapt(alone.init(model, key=KEY), task.support, key=KEY).context["head"]
    residual = np.asarray(model(task.support.x) - task.support.y).mean()
    np.testing.assert_allclose(shift, [-0.4 * residual], rtol=1e-11)
    twice = ax.tree.replace(meta, {"lr/head": 2 * meta["lr"]["head"]})
    moved = learner.adapt(twice, task.support, key=KEY)
    assert not np.allclose(moved.context["head"], adapted.context["head"])


def test_nothing_of_the_context_is_meta_trained():
    learner = ax.ContextAdaptation(MSE, 1.0, 1, size=3)
    tasks = ax.tasks.sinusoid(shot=5, query=5).train
    model = ax.models.MLP(4, 1, (8,), key=KEY)
    result = ax.fit(learner, model, tasks, steps=3, meta_batch=2, key=KEY)
    assert [*result.meta] == ["model"]
    path = learner.iterates(result.meta, tasks.sample(KEY).support, key=KEY)
    np.testing.assert_array_equal(path.context[0], 0)
    assert np.all(path.context[1] != 0)
    frozen = ax.ContextAdaptation(MSE, where="layers/0", train_only=ax.tree.under("head"))
    meta = frozen.init(mlp(1), key=KEY)
    trained = ax.tree.by_path(frozen.trained(meta))
    assert {path for path, yes in trained.items() if yes} == {
        "model/head/weight", "model/head/bias", "maps/layers/0",
    }  # fmt: skip


@pytest.mark.parametrize(
    "how",
    [
        {"size": 3, "where": "norm"},
        {"size": None, "where": "conv", "modulation": "film", "learn_lr": True},
    ],
)
def test_meta_gradient_of_a_convolutional_net_with_batch_norm(how):
    learner = ax.ContextAdaptation(ax.losses.cross_entropy, 0.5, 2, **how)
    ax.testing.check_meta_gradient(learner, ConvNet(jax.random.key(5)), Images())


def test_padding_is_not_there(task):
    learner = ax.ContextAdaptation(MSE, 0.5, 2, size=3, where="layers/*")
    meta = learner.init(mlp(), key=KEY)
    longer = ax.Task(padded(task.support, 9), padded(task.query, 6))
    pairs = [value_and_grad(learner, meta, t) for t in (task, longer)]
    for a, b in zip(*map(jax.tree.leaves, pairs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14)


def test_models_of_other_kinds():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.Linear(2, 6, rngs=rngs)
            self.head = nnx.Linear(6, 1, rngs=rngs)

        def __call__(self, x):
            return self.head(jnp.tanh(self.first(x)))

    x = jax.random.normal(KEY, (6, 2))
    support = ax.Batch(x, x[:, :1])
    images = jax.random.normal(KEY, (4, 1, 5, 5))
    perceptron = ax.Batched(eqx.nn.MLP(2, 1, 6, 1, key=KEY))
    conv = ax.Batched(eqx.nn.Sequential([
        eqx.nn.Conv2d(1, 3, 3, key=KEY), eqx.nn.Lambda(lambda h: jnp.mean(jnp.tanh(h), (1, 2))),
        eqx.nn.Linear(3, 1, key=KEY),
    ]))  # fmt: skip
    of_images = ax.Batch(images, images[:, 0, 0, :1])
    for model, where, batch in (
        (Net(nnx.Rngs(0)), "first", support),
        (perceptron, "model/layers/0", support),
        (conv, "model/layers/0", of_images),
    ):
        learner = ax.ContextAdaptation(MSE, 0.5, 2, where=where)
        meta = learner.init(model, key=KEY)
        adapted = learner.adapt(meta, batch, key=KEY)
        assert MSE(adapted, batch) < MSE(model, batch)
    # Channels of Equinox's convolutions come first.
    width = layers.width(layers.find(conv, "model/layers/0"))
    assert width == 3
    layer = context.Modulated(layers.find(conv, "model/layers/0"), jnp.arange(6.0), True)
    h = layers.find(conv, "model/layers/0")(images[0])
    np.testing.assert_allclose(layer(images[0])[1], 2 * h[1] + 4, rtol=1e-6)


def test_what_is_refused():
    with pytest.raises(ValueError, match="size=None makes the modulations"):
        ax.ContextAdaptation(MSE, size=None)
    with pytest.raises(ValueError, match="size is 1 or more"):
        ax.ContextAdaptation(MSE, size=0)
    with pytest.raises(ValueError, match="learn_lr=True learns rates"):
        ax.ContextAdaptation(MSE, learn_lr=True, inner_optimizer=ax.inner.adam(0.1))
    nowhere = ax.ContextAdaptation(MSE, where="blocks/*")
    with pytest.raises(ValueError, match=r"no layer .* 'blocks/\*'; it has layers/0, layers/1"):
        nowhere.init(mlp(), key=KEY)
    silent = eqx.nn.Sequential([eqx.nn.Lambda(jnp.tanh)])
    with pytest.raises(ValueError, match="does not say how many features it gives"):
        ax.ContextAdaptation(MSE, where="layers/0").init(silent, key=KEY)
    learner = ax.ContextAdaptation(MSE, size=3)
    support = ax.Batch(jnp.ones((4, 2)), jnp.ones((4, 1)))
    with pytest.raises(ValueError, match="make it for a width of 5"):
        learner.adapt(learner.init(mlp(2), key=KEY), support, key=KEY)
    flat = ax.Batch(jnp.ones(4), jnp.ones((4, 1)))
    with pytest.raises(ValueError, match="not such an array"):
        learner.adapt(learner.init(mlp(5), key=KEY), flat, key=KEY)

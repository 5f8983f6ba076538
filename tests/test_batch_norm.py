"""Batch normalisation of any library: what it has, and updates told by gradients."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import adaptax as ax
from adaptax import batch_norm
from adaptax.models import MLP, BatchNorm, Conv4
from learners import ConvNet, Images, cross_entropy

KEY = jax.random.key(0)
pytestmark = pytest.mark.usefixtures("x64")


def numbers(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def doubled(tree):
    return jax.tree.map(lambda a: jnp.asarray(a, float) if eqx.is_inexact_array(a) else a, tree)


class Flax(nnx.Module):
    """Two blocks in a list, the second without weights; and a layer that is no batch norm."""

    def __init__(self, rngs):
        self.blocks = nnx.List([
            nnx.BatchNorm(3, momentum=0.8, rngs=rngs),
            nnx.BatchNorm(3, use_scale=False, use_bias=False, rngs=rngs),
        ])  # fmt: skip
        self.norm = nnx.LayerNorm(3, rngs=rngs)

    def __call__(self, x):
        for block in self.blocks:
            x = jnp.sin(block(x))
        return self.norm(x)


def flax_net():
    return doubled(Flax(nnx.Rngs(0)))


# What a model has


def test_weights_and_statistics_by_path():
    net = ConvNet(KEY)
    assert set(batch_norm.weights(net)) == {"norm/scale", "norm/shift"}
    assert batch_norm.weights(net)["norm/scale"] is net.norm.scale
    assert batch_norm.statistics(net) == {}
    tracked = batch_norm.track(net)
    assert set(batch_norm.weights(tracked)) == {"norm/scale", "norm/shift"}
    assert set(batch_norm.statistics(tracked)) == {"norm/mean", "norm/var"}
    assert batch_norm.statistics(net) == {}  # a copy was made
    flax = {f"blocks/0/{name}/value" for name in ("scale", "bias")}
    assert set(batch_norm.weights(flax_net())) == flax
    both = {f"blocks/{i}/{name}/value" for i in (0, 1) for name in ("mean", "var")}
    assert set(batch_norm.statistics(flax_net())) == both
    assert set(batch_norm.weights(MLP(1, 1, (4, 4), key=KEY, batch_norm=True))) == {
        "norms/0/shift", "norms/1/shift",
    }  # fmt: skip
    conv4 = batch_norm.track(Conv4(5, key=KEY, filters=2))
    assert set(batch_norm.statistics(conv4)) == {
        f"blocks/{i}/1/{name}" for i in range(4) for name in ("mean", "var")
    }
    for model in (MLP(1, 1, (4,), key=KEY), ax.Functional(jnp.ones(2), lambda p, x: x)):
        assert batch_norm.weights(model) == batch_norm.statistics(model) == {}
        assert batch_norm.track(model) is not None
    assert set(batch_norm.statistics(BatchNorm(2).tracking())) == {"mean", "var"}


def test_tracking_starts_once():
    layer = BatchNorm(2).tracking()
    assert np.array_equal(layer.mean, [0, 0])
    assert np.array_equal(layer.var, [1, 1])
    moved = eqx.tree_at(lambda m: m.mean, layer, jnp.array([3.0, 4.0]))
    assert np.array_equal(batch_norm.track(moved).mean, [3, 4])
    flax = flax_net()
    same = zip(*(jax.tree.leaves(batch_norm.statistics(m)) for m in (batch_norm.track(flax), flax)))
    assert all(np.array_equal(a, b) for a, b in same)


# Normalising by the batch or by what is stored


def test_a_tracking_layer_normalises_by_the_batch():
    x, plain = numbers(5, 3), doubled(BatchNorm(3, scale=True))
    assert np.array_equal(plain.tracking()(x), plain(x))


@pytest.mark.parametrize("shape", [(6, 3), (2, 4, 5, 3)])
def test_running_averages_normalise_by_what_is_stored(shape):
    x, rows = 2 + numbers(*shape), [numbers(3, seed=seed) for seed in range(4)]
    scale, shift, mean, var = rows[0], rows[1], rows[2], rows[3] ** 2
    layer = eqx.tree_at(
        lambda m: (m.scale, m.shift, m.mean, m.var),
        doubled(BatchNorm(3, scale=True)).tracking(),
        (scale, shift, mean, var),
    )
    stored = batch_norm.use_running_average(layer)
    formula = scale * (x - mean) / np.sqrt(var + 1e-3) + shift
    assert np.allclose(stored(x), formula, rtol=1e-12)
    assert np.allclose(stored(x[:1]), formula[:1], rtol=1e-12)
    assert not layer.use_running_average
    assert not np.allclose(layer(x), formula, rtol=1e-2)
    untracked = doubled(BatchNorm(3))  # has nothing stored
    assert np.array_equal(batch_norm.use_running_average(untracked)(x), untracked(x))


def test_the_layers_of_flax_are_switched_in_a_copy():
    x, net = 2 + numbers(7, 3), flax_net()
    stored = batch_norm.use_running_average(net)
    assert [block.use_running_average for block in stored.blocks] == [True, True]
    assert [block.use_running_average for block in net.blocks] == [False, False]
    assert np.allclose(stored(x)[:2], stored(x[:2]), rtol=1e-12)
    assert not np.allclose(net(x)[:2], flax_net()(x[:2]), rtol=1e-2)


# Updates as gradients


def test_a_gradient_tells_the_update_whatever_comes_after():
    running, updated = {"mean": numbers(2), "var": numbers(2, seed=1)}, numbers(2, seed=2)

    def loss(y, running, factor):
        told = {"mean": 3 * updated, "var": jnp.sum(y) * updated}
        return factor * jnp.sum(jnp.sin(batch_norm.observe(y, running, told)))

    y = numbers(3, seed=3)
    for factor in (1.0, -2.0, 0.0):
        value, (by_y, by_running) = jax.value_and_grad(loss, (0, 1))(y, running, factor)
        assert np.allclose(value, factor * np.sum(np.sin(y)), rtol=1e-14)
        assert np.allclose(by_y, factor * np.cos(y), rtol=1e-14)
        assert np.allclose(by_running["mean"], running["mean"] - 3 * updated, rtol=1e-14)
        assert np.allclose(by_running["var"], running["var"] - np.sum(y) * updated, rtol=1e-12)


def through_a_convolution(layer, x):
    """The layer, and a 1×1 convolution that changes nothing, for `conv.fast` to replace."""
    y, kernel = layer(x)[:, None], jnp.eye(3)[None]
    return jax.lax.conv_general_dilated(
        y, kernel, (1,), "VALID", dimension_numbers=("NWC", "WIO", "NWC")
    )[:, 0]


@pytest.mark.parametrize("how", ["plain", "jit", "remat", "scan", "rewritten", "second order"])
def test_no_transformation_loses_an_update(how):
    """The gradient of the running statistics is what the batch would move them by."""
    x, target = numbers(6, 3), numbers(6, 3, seed=1)
    layer = eqx.tree_at(
        lambda m: (m.mean, m.var),
        doubled(BatchNorm(3)).tracking(),
        (numbers(3, seed=2), numbers(3, seed=3) ** 2),
    )
    loss = lambda layer, x: jnp.mean((jnp.tanh(through_a_convolution(layer, x)) - target) ** 2)

    def after_a_step(layer, x):
        slope = jax.grad(loss)(layer, x).shift
        return loss(eqx.tree_at(lambda m: m.shift, layer, layer.shift - 0.1 * slope), x)

    def scanned(layer, x):
        add = lambda total, x: (total + loss(layer, x), None)
        return jax.lax.scan(add, jnp.zeros(()), x[None])[0]

    function = {
        "plain": loss,
        "jit": jax.jit(loss),
        "remat": jax.checkpoint(loss),
        "scan": scanned,
        "rewritten": ax.conv.fast(loss, True),
        "second order": after_a_step,  # of which the last pass is the one that counts
    }[how]
    gradient = jax.grad(function)(layer, x)
    assert np.allclose(layer.mean - gradient.mean, 0.9 * layer.mean + 0.1 * x.mean(0), rtol=1e-12)
    assert np.allclose(layer.var - gradient.var, 0.9 * layer.var + 0.1 * x.var(0), rtol=1e-12)


def test_flax_tells_its_updates_and_stays_as_it_was():
    x, net = numbers(6, 3), flax_net()
    before = {path: np.array(leaf) for path, leaf in batch_norm.statistics(net).items()}
    observed = batch_norm.Observed(net)
    loss = lambda model: jnp.sum(jnp.sin(model(x)))
    value, gradient = eqx.filter_jit(eqx.filter_value_and_grad(loss))(observed)
    told = batch_norm.statistics(gradient.model)
    after = {path: before[path] - told[path] for path in before}
    assert all(np.array_equal(leaf, before[path])
               for path, leaf in batch_norm.statistics(net).items())  # fmt: skip
    assert np.allclose(value, loss(net), rtol=1e-12)  # which updates the net in place
    for path, leaf in batch_norm.statistics(net).items():
        assert np.allclose(leaf, after[path], rtol=1e-12)
    first = net.blocks[0]
    assert np.allclose(first.mean[...], 0.2 * x.mean(0), rtol=1e-12)
    assert np.allclose(first.var[...], 0.8 + 0.2 * x.var(0), rtol=1e-12)


def test_a_model_that_updates_nothing_is_only_called():
    model, x = MLP(3, 2, (4,), key=KEY), numbers(5, 3)
    assert np.array_equal(batch_norm.Observed(model)(x), model(x))
    ours = doubled(BatchNorm(3)).tracking()  # passes its own result through `observe`
    gradient = jax.grad(lambda m: jnp.sum(jnp.sin(m(x))))(batch_norm.Observed(ours)).model
    assert np.allclose(gradient.mean, -0.1 * x.mean(0), rtol=1e-12)


# A layer of one's own, as in docs/batch-norm.md


class RunningNorm(eqx.Module):
    gain: jax.Array
    mean: jax.Array
    var: jax.Array
    use_running_average: bool = eqx.field(static=True, default=False)

    def __call__(self, x):
        if self.use_running_average:
            return self.gain * (x - self.mean) / jnp.sqrt(self.var + 1e-5)
        mean, var = jnp.mean(x, axis=0), jnp.var(x, axis=0)
        y = self.gain * (x - mean) / jnp.sqrt(var + 1e-5)
        updated = (0.9 * self.mean + 0.1 * mean, 0.9 * self.var + 0.1 * var)
        return ax.batch_norm.observe(y, (self.mean, self.var), updated)


class OwnNet(eqx.Module):
    norm: RunningNorm
    head: ax.models.Linear

    def __call__(self, x):
        return self.head(jnp.tanh(self.norm(x.reshape(len(x), -1))))


def test_a_layer_of_ones_own_takes_part():
    start = jnp.zeros(16), jnp.ones(16)
    model = OwnNet(RunningNorm(jnp.ones(16), *start), ax.models.Linear(16, 2, key=KEY))
    learner = ax.MAMLPlusPlus(
        cross_entropy, 0.1, 1, multi_step_loss=0.0, derivative_order_annealing=0.0,
        per_step_batch_norm_statistics="paper",
    )  # fmt: skip
    meta = learner.init(model, key=KEY)
    assert set(meta["norm_weights"]) == {"norm/gain"}
    tasks = jax.vmap(Images().sample)(jax.random.split(KEY, 2))
    run = eqx.filter_jit(lambda: ax.meta_value_and_grad(learner, meta, tasks, key=KEY)[1])
    told = run()["norm_statistics"]
    rows = {path: (meta["norm_statistics"][path] - told[path])[0] for path in told}
    support, query = (
        jax.vmap(lambda x: x.reshape(4, 16))(b.x) for b in (tasks.support, tasks.query)
    )
    mean = 0.9 * (0.1 * support.mean(1)) + 0.1 * query.mean(1)
    var = 0.9 * (0.9 + 0.1 * support.var(1)) + 0.1 * query.var(1)
    assert np.allclose(rows["norm/mean"], mean.mean(0), rtol=1e-12)
    assert np.allclose(rows["norm/var"], var.mean(0), rtol=1e-12)
    first = jax.tree.map(lambda leaf: leaf[0], tasks.support)
    adapted = eqx.filter_jit(learner.adapt)(meta, first, key=KEY)
    x = tasks.query.x[0]
    assert np.allclose(adapted(x)[:1], adapted(x[:1]), rtol=1e-12)

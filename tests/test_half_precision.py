"""Half precision: sums in float32, and computing in bfloat16 with parameters in float32."""

import dataclasses
import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adaptax as ax
from adaptax import metrics, svgd
from adaptax.engine.mapping import local_mesh, sum_over

KEY = jax.random.key(0)
HALVES = (jnp.bfloat16, jnp.float16)


def cast(tree, dtype):
    change = lambda leaf: leaf.astype(dtype) if eqx.is_inexact_array(leaf) else leaf
    return jax.tree.map(change, tree)


@pytest.mark.parametrize("devices", [None, 2])
@pytest.mark.parametrize("mapping", ["vmap", "scan", 8, 1000])
def test_the_mean_of_equal_gradients_is_that_gradient(mapping, devices):
    """1,024 of them: in bfloat16 the sum of 2s stops at 512."""
    x, y = jnp.ones((1024, 5, 1), jnp.bfloat16), jnp.zeros((1024, 5, 1), jnp.bfloat16)
    start = ax.Functional(jnp.ones((1, 1), jnp.bfloat16), lambda p, x: x @ p)
    task = ax.Task(ax.Batch(x, y), ax.Batch(x, y))
    mesh = devices and local_mesh(1024, devices)
    (value, _), grads = ax.meta_value_and_grad(
        ax.MAML(ax.losses.mse, 0.0), start, task, key=KEY, mapping=mapping, mesh=mesh
    )
    assert value == 1
    assert value.dtype == jnp.float32
    assert grads.params == 2
    assert grads.params.dtype == jnp.bfloat16


@pytest.mark.parametrize("dtype", HALVES)
def test_sums_of_half_precision_are_of_single(dtype):
    values = jnp.linspace(0.1, 1, 500).astype(dtype)
    exact = float(jnp.sum(values.astype(jnp.float32)))
    for mapping in ("vmap", "scan", 7):
        total = sum_over(lambda x: x, (values,), mapping)
        assert total.dtype == jnp.float32
        assert np.isclose(total, exact, rtol=1e-6)
    model = {"a": values, "b": values[:7].reshape(7, 1)}
    single = cast(model, jnp.float32)
    zero = jax.tree.map(jnp.zeros_like, model)
    assert ax.tree.norm(model) == ax.tree.norm(single)
    assert np.isclose(ax.tree.squared_distance(model, zero), ax.tree.norm(single) ** 2, rtol=1e-6)
    assert ax.tree.full_like(model, 1.0)["a"].dtype == dtype


@pytest.mark.parametrize("dtype", HALVES)
def test_losses_and_metrics_of_half_precision_are_of_single(dtype):
    logits = (3 * jax.random.normal(KEY, (2, 40, 5))).astype(dtype)
    labels = jnp.arange(40) % 5
    y = logits[1].astype(jnp.float32) + 1
    for reduction in ("mean", "sum", "sum/shot", "balanced"):
        loss = functools.partial(ax.losses.cross_entropy, reduction=reduction)
        pair = [loss(lambda x, d=d: logits[0].astype(d), ax.Batch(y, labels))
                for d in (dtype, jnp.float32)]  # fmt: skip
        assert pair[0] == pair[1]
        assert pair[0].dtype == jnp.float32
    pair = [ax.losses.mse(lambda x, d=d: logits[0].astype(d), ax.Batch(y, y))
            for d in (dtype, jnp.float32)]  # fmt: skip
    assert pair[0] == pair[1]
    assert pair[0].dtype == jnp.float32
    scores = [
        metrics.classification(z, labels) | metrics.uncertainty(z)
        | metrics.regression(z, y, 0.5) | metrics.coverage(z, y, 0.5)
        for z in (logits, logits.astype(jnp.float32))
    ]  # fmt: skip
    for name in scores[1]:
        assert np.array_equal(scores[0][name], scores[1][name]), name


def test_particles_of_half_precision_repel_at_distances_of_single():
    wide = {"w": jax.random.normal(KEY, (4, 300)), "b": jnp.ones((4, 2))}
    half = cast(wide, jnp.bfloat16)
    slopes = jax.tree.map(jnp.zeros_like, half)
    found = svgd.descent(half, slopes)
    exact = svgd.descent(cast(half, jnp.float32), cast(slopes, jnp.float32))
    for name in found:
        assert found[name].dtype == jnp.bfloat16
        assert np.array_equal(found[name], exact[name].astype(jnp.bfloat16))


def test_batch_norm_takes_statistics_in_single_precision():
    x = 10 + jax.random.normal(KEY, (500, 3))
    norm = ax.models.BatchNorm(3)
    half = cast(norm, jnp.bfloat16)(x.astype(jnp.bfloat16))
    assert half.dtype == jnp.bfloat16
    assert np.allclose(half, norm(x.astype(jnp.bfloat16).astype(jnp.float32)), atol=0.02)


LEARNERS = {
    "MAML": lambda loss: ax.MAML(loss, 0.01, 2),
    "MAML, Adam": lambda loss: ax.MAML(
        loss, inner_steps=2, inner_optimizer=optax.adam(0.01, eps=0.1)
    ),
    "Reptile": lambda loss: ax.Reptile(loss, 0.01, 2),
    "Bayesian": lambda loss: ax.BayesianMAML(loss, 0.01, 2, particles=3),
}


@pytest.mark.parametrize("name", LEARNERS)
def test_mixed_precision_is_close_to_single(name):
    learner = LEARNERS[name](ax.losses.mse)
    mixed = dataclasses.replace(learner, loss=ax.losses.MixedPrecision(ax.losses.mse))
    tasks = jax.vmap(ax.tasks.sinusoid(shot=10).train.sample)(jax.random.split(KEY, 4))
    net = ax.models.MLP(1, 1, (40, 40), key=KEY, activation=jnp.tanh)
    meta = learner.init(net, key=KEY)
    (value, _), grads = ax.meta_value_and_grad(learner, meta, tasks, key=KEY)
    (half, _), rough = ax.meta_value_and_grad(mixed, meta, tasks, key=KEY)
    assert half.dtype == jnp.float32
    assert half != value
    assert np.isclose(half, value, rtol=0.02)
    flat, other = (jax.flatten_util.ravel_pytree(g)[0] for g in (grads, rough))
    assert other.dtype == jnp.float32
    assert flat @ other / jnp.linalg.norm(flat) / jnp.linalg.norm(other) > 0.995
    support = jax.tree.map(lambda leaf: leaf[0], tasks.support)
    adapted = mixed.adapt(meta, support, key=KEY)
    assert {leaf.dtype for leaf in jax.tree.leaves(ax.tree.parameters(adapted))} == {
        jnp.dtype("float32")
    }


def test_mixed_precision_computes_in_half_and_trains():
    loss = ax.losses.MixedPrecision(ax.losses.mse)
    assert loss == ax.losses.MixedPrecision(ax.losses.mse)
    assert hash(loss)
    net = ax.models.MLP(1, 1, (8,), key=KEY)
    batch = ax.Batch(jnp.ones((5, 1)), jnp.ones((5, 1)))
    products = [e for e in jax.make_jaxpr(lambda m: loss(m, batch))(net).jaxpr.eqns
                if e.primitive.name == "dot_general"]  # fmt: skip
    assert products
    assert all(v.aval.dtype == jnp.bfloat16 for e in products for v in (*e.invars, *e.outvars))
    tasks = ax.tasks.sinusoid(shot=10).train
    result = ax.fit(ax.MAML(loss, 0.01), net, tasks, steps=60, meta_batch=8, key=KEY, chunk=20,
                    devices=1, optimizer=optax.adam(1e-2))  # fmt: skip
    assert result.history[-1]["loss"] < result.history[0]["loss"]
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(result.meta)
               if eqx.is_inexact_array(leaf))  # fmt: skip


def test_a_model_in_half_precision_trains():
    net = cast(ax.models.MLP(1, 1, (8,), key=KEY), jnp.bfloat16)
    tasks = ax.tasks.sinusoid(shot=5).train
    result = ax.fit(ax.MAML(ax.losses.mse, 0.01), net, tasks, steps=6, chunk=3, meta_batch=4,
                    key=KEY, devices=1)  # fmt: skip
    assert {leaf.dtype for leaf in jax.tree.leaves(result.meta) if eqx.is_array(leaf)} == {
        jnp.dtype("bfloat16")
    }

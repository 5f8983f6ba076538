"""Learners that reduce to one another, and ways of mapping that must not matter."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import adaptax as ax
from adaptax.engine.mapping import local_mesh

KEY = jax.random.key(0)
pytestmark = pytest.mark.usefixtures("x64")
mse = ax.losses.mse


def tanh_net(batch_norm=False):
    return ax.models.MLP(1, 1, (6, 6), key=KEY, activation=jnp.tanh, batch_norm=batch_norm)


def meta_batch(n=4):
    return jax.vmap(ax.tasks.sinusoid(shot=5, query=7).train.sample)(jax.random.split(KEY, n))


def gradient(learner, model=None, tasks=None, **how):
    meta = learner.init(tanh_net() if model is None else model, key=KEY)
    tasks = meta_batch() if tasks is None else tasks
    return eqx.filter_jit(lambda: ax.meta_value_and_grad(learner, meta, tasks, key=KEY, **how)[1])()


def assert_close(a, b, rtol=1e-11):
    norm = sum(float(jnp.sum(leaf**2)) for leaf in jax.tree.leaves(b)) ** 0.5
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert np.abs(x - y).max() <= rtol * norm


def joint(source):
    """Gradient of the mean loss over all tasks, without any adaptation."""
    tasks = meta_batch()
    loss = lambda m: jnp.mean(jax.vmap(lambda b: mse(m, b))(getattr(tasks, source)))
    return eqx.filter_jit(eqx.filter_grad(loss))(tanh_net())


@pytest.mark.parametrize("make", [ax.MAML, ax.FOMAML])
def test_without_adaptation_maml_is_joint_training(make):
    assert_close(gradient(make(mse, 0.0, 3)), joint("query"))
    assert_close(gradient(make(mse, 0.1, 0)), joint("query"))


def test_one_step_of_reptile_is_joint_training_scaled_by_the_rate():
    scaled = jax.tree.map(lambda g: 0.3 * g, joint("support"))
    assert_close(gradient(ax.Reptile(mse, 0.3, 1)), scaled)


def test_meta_sgd_with_equal_rates_is_maml():
    for first_order in (False, True):
        ours = gradient(ax.MetaSGD(mse, 0.1, 3, first_order=first_order))
        assert_close(ours["model"], gradient(ax.MAML(mse, 0.1, 3, first_order=first_order)))
    value = lambda rate: ax.meta_value_and_grad(
        ax.MAML(mse, rate, 3), tanh_net(), meta_batch(), key=KEY
    )[0][0]
    rates = gradient(ax.MetaSGD(mse, 0.1, 3))["lr"]
    by_one_rate = sum(jnp.sum(leaf) for leaf in jax.tree.leaves(rates))
    slope = (value(0.1 + 1e-5) - value(0.1 - 1e-5)) / 2e-5
    assert np.allclose(by_one_rate, slope, rtol=1e-6)


def test_a_tree_of_rates_is_a_rate_for_each_leaf():
    model = tanh_net()
    equal = ax.tree.full_like(model, 0.1)
    assert_close(gradient(ax.MAML(mse, equal, 2)), gradient(ax.MAML(mse, 0.1, 2)))
    head = jax.tree.map(
        lambda leaf, path: leaf if path.startswith("head/") else 0 * leaf,
        equal,
        ax.tree.paths(equal),
    )
    assert_close(gradient(ax.MAML(mse, head, 2)), gradient(ax.ANIL(mse, 0.1, 2)))


def test_anil_leaves_the_body_alone():
    task, model = jax.tree.map(lambda leaf: leaf[0], meta_batch()), tanh_net()
    adapted = ax.ANIL(mse, 0.1, 3).adapt(model, task.support, key=KEY)
    for before, after in zip(model.layers, adapted.layers):
        assert jnp.array_equal(before.weight, after.weight)
    assert not jnp.array_equal(model.head.weight, adapted.head.weight)


def test_batch_norm_is_adapted_only_on_request():
    task, model = jax.tree.map(lambda leaf: leaf[0], meta_batch()), tanh_net(batch_norm=True)
    adapted = ax.MAML(mse, 0.1, 3).adapt(model, task.support, key=KEY)
    assert jnp.array_equal(adapted.norms[0].shift, model.norms[0].shift)
    everything = ax.MAML(mse, 0.1, 3, adapt_only=ax.tree.every)
    adapted = everything.adapt(model, task.support, key=KEY)
    assert not jnp.array_equal(adapted.norms[0].shift, model.norms[0].shift)
    grads = gradient(ax.MAML(mse, 0.1, 3), model)
    assert np.abs(grads.norms[0].shift).max() > 1e-6  # and meta-trained all the same


@pytest.mark.parametrize("learner", [ax.MAML(mse, 0.1, 3), ax.Reptile(mse, 0.1, 3, inner_batch=2)])
def test_every_way_of_mapping_gives_one_gradient(learner):
    def grads(mapping, devices):
        return gradient(learner, mapping=mapping, mesh=local_mesh(4, devices))

    assert jax.local_device_count() == 4
    expected = grads("vmap", 1)
    for mapping, devices in (("scan", 1), (2, 1), (3, 1), ("auto", 1), ("scan", 2), ("vmap", 4)):
        assert_close(grads(mapping, devices), expected, rtol=1e-13)


def test_wrong_mappings_are_refused():
    for wrong in (0, -1):
        with pytest.raises(ValueError, match="mapping is"):
            gradient(ax.MAML(mse), mapping=wrong)
    with pytest.raises(ValueError, match="do not divide a meta-batch of 3"):
        gradient(ax.MAML(mse), tasks=meta_batch(3), mesh=local_mesh(4, 4))
    uneven = ax.Task(meta_batch(3).support, meta_batch(2).query)
    with pytest.raises(ValueError, match="same task axis"):
        gradient(ax.MAML(mse), tasks=uneven)

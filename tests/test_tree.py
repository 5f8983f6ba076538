import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import adaptax as ax
from adaptax import tree

KEY = jax.random.key(0)


@pytest.fixture
def model():
    return ax.models.MLP(2, 1, (3,), key=KEY, batch_norm=True)


def test_paths_name_every_leaf(model):
    assert jax.tree.leaves(tree.paths(model)) == [
        "layers/0/weight", "layers/0/bias", "norms/0/shift", "head/weight", "head/bias",
    ]  # fmt: skip
    assert tree.paths({"a": [1, {"b": 2}]}) == {"a": ["a/0", {"b": "a/1/b"}]}


def test_under_chooses_whole_names():
    chosen = tree.under("head", "layers/1")
    assert chosen("head")
    assert chosen("head/weight")
    assert chosen("layers/1/bias")
    assert not chosen("header/weight")
    assert not chosen("layers/10/bias")


def test_adaptable_leaves_out_batch_norm_unless_asked(model):
    names = jax.tree.leaves(tree.paths(model))
    chosen = lambda mask: [n for n, m in zip(names, jax.tree.leaves(mask)) if m]
    assert chosen(tree.adaptable(model)) == [n for n in names if "norms" not in n]
    assert chosen(tree.adaptable(model, tree.every)) == names
    assert chosen(tree.adaptable(model, tree.under("norms"))) == ["norms/0/shift"]


def test_integers_are_no_parameters():
    value = {"weight": jnp.ones(3), "count": jnp.arange(3), "name": "x", "rate": 0.5}
    assert jax.tree.leaves(tree.parameters(value))[0].shape == (3,)
    assert tree.count(value) == 3
    assert tree.adaptable(value) == {"weight": True, "count": False, "name": False, "rate": False}
    with pytest.raises(ValueError, match="which has no inexact arrays"):
        tree.adaptable({"count": jnp.arange(3)})


def test_algebra(model):
    ones, twos = tree.full_like(model, 1.0), tree.full_like(model, 2.0)
    assert tree.count(model) == 6 + 3 + 3 + 3 + 1
    three = tree.axpy(0.5, twos, twos)
    assert all(np.all(leaf == 3) for leaf in jax.tree.leaves(three))
    assert tree.squared_distance(ones, three) == 4 * 16
    moved = tree.shift(model, three, ones)
    assert np.allclose(moved.head.weight, model.head.weight + 2)
    assert moved.activation is model.activation


def test_noise_is_normal_and_independent_between_leaves(model):
    noise = tree.noise_like(KEY, {"a": jnp.zeros(4000), "b": jnp.zeros(4000)})
    assert abs(noise["a"].mean()) < 0.06
    assert abs(noise["a"].std() - 1) < 0.05
    assert abs(jnp.corrcoef(noise["a"], noise["b"])[0, 1]) < 0.06
    assert tree.noise_like(KEY, model).head.weight.shape == (3, 1)
    with jax.enable_x64(True):
        assert tree.noise_like(KEY, jnp.zeros(2, jnp.float64)).dtype == jnp.float64


def test_stacked_models_are_an_ensemble(model):
    other = jax.tree.map(lambda leaf: leaf + 1 if eqx.is_array(leaf) else leaf, model)
    ensemble = ax.Ensemble(tree.stack([model, other]))
    x = jax.random.normal(KEY, (5, 2))
    assert ensemble.particles == 2
    expected = np.stack([model(x), other(x)])
    assert np.allclose(ensemble(x), expected, rtol=1e-5, atol=1e-6)
    for i in (1, -1):
        assert np.array_equal(tree.at(ensemble.models, i)(x), other(x))


def test_finite(model):
    assert tree.finite(model)
    spoilt = eqx.tree_at(lambda m: m.head.bias, model, jnp.array([jnp.nan]))
    assert not tree.finite(spoilt)
    assert not tree.finite({"a": jnp.ones(2), "b": jnp.array(jnp.inf)})

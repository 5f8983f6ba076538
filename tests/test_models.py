import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from adaptax import tree
from adaptax.models import CONV4, MLP, BatchNorm, Conv2d, Conv4, Linear, layers, max_pool
from adaptax.models.layers import _INITIALIZERS

KEY = jax.random.key(0)


def numbers(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def close(a, b, tolerance=1e-5):
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), tolerance, tolerance)


def norm(size, shift, scale=None):
    layer = BatchNorm(size, scale=scale is not None)
    object.__setattr__(layer, "shift", jnp.asarray(shift))
    if scale is not None:
        object.__setattr__(layer, "scale", jnp.asarray(scale))
    return layer


@pytest.mark.parametrize("shape", [(6, 3), (4, 5, 3), (3, 4, 5, 3)])
@pytest.mark.parametrize("scale", [None, numbers(3, seed=2)])
def test_batch_norm_is_its_formula(shape, scale):
    # An offset of 1e3 standard deviations would cost E[x²] − E[x]² all its digits.
    x, shift = 1e3 + numbers(*shape), numbers(3, seed=1)
    axes = tuple(range(len(shape) - 1))
    gain = 1 if scale is None else scale
    expected = gain * (x - x.mean(axes)) / np.sqrt(x.var(axes) + 1e-3) + shift
    with jax.enable_x64(True):
        close(norm(3, shift, scale)(jnp.asarray(x)), expected, 1e-9)
    exact = np.asarray(x, np.float32).astype(np.float64)  # as the layer sees x
    expected = gain * (exact - exact.mean(axes)) / np.sqrt(exact.var(axes) + 1e-3) + shift
    how = [None if a is None else np.asarray(a, np.float32) for a in (shift, scale)]
    close(norm(3, *how)(jnp.asarray(x, jnp.float32)), expected, 2e-3)


def test_batch_norm_gradient_is_that_of_finite_differences():
    with jax.enable_x64(True):
        x, layer = jnp.asarray(numbers(5, 2, 3)), norm(3, numbers(3), numbers(3, seed=1))
        weights = jnp.asarray(numbers(5, 2, 3, seed=4))
        scalar = jax.jit(lambda x, layer: jnp.sum(jnp.sin(layer(x)) * weights))
        gx, glayer = jax.jit(jax.grad(scalar, (0, 1)))(x, layer)
        h = 1e-6
        for seed in range(3):
            d = jnp.asarray(numbers(5, 2, 3, seed=10 + seed))
            slope = (scalar(x + h * d, layer) - scalar(x - h * d, layer)) / (2 * h)
            close(jnp.sum(gx * d), slope, 1e-7)
        for name in ("shift", "scale"):
            d = {"shift": np.zeros(3), "scale": np.zeros(3)} | {name: numbers(3, seed=20)}
            moved = lambda s, d=d: norm(
                3, layer.shift + s * d["shift"], layer.scale + s * d["scale"]
            )
            slope = (scalar(x, moved(h)) - scalar(x, moved(-h))) / (2 * h)
            close(jnp.sum(getattr(glayer, name) * d[name]), slope, 1e-7)


def test_batch_norm_second_derivative():
    def plain(x, shift):
        mean, variance = jnp.mean(x, 0), jnp.var(x, 0)
        return (x - mean) / jnp.sqrt(variance + 1e-3) + shift

    with jax.enable_x64(True):
        x, shift = jnp.asarray(numbers(4, 2)), numbers(2)
        ours = lambda x: jnp.sum(jnp.sin(norm(2, shift)(x)))
        theirs = lambda x: jnp.sum(jnp.sin(plain(x, shift)))
        close(jax.jit(jax.hessian(ours))(x), jax.jit(jax.hessian(theirs))(x), 1e-9)


def test_batch_norm_does_not_see_shifts_and_scales_of_its_input():
    x, layer = numbers(8, 3), BatchNorm(3, eps=0.0)
    y = layer(jnp.asarray(x))
    close(layer(jnp.asarray(5 - 3 * x)), -y, 1e-4)
    close(jnp.mean(y, 0), np.zeros(3))
    close(jnp.var(y, 0), np.ones(3), 1e-4)


def test_batch_norm_declares_what_is_adapted():
    chosen = lambda **how: tree.adaptable([BatchNorm(2, **how), jnp.ones(1)])[0]
    assert chosen().shift is False
    assert chosen(adapted=True).shift is True
    assert chosen(adapted=True, scale=True).scale is True


def windows(x, padding):
    return lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), padding)


@pytest.mark.parametrize("padding", ["VALID", "SAME"])
@pytest.mark.parametrize("size", [(4, 6), (5, 6), (4, 7), (5, 3), (21, 21)])
def test_max_pool_equals_reduce_window(size, padding):
    x = jnp.asarray(numbers(2, *size, 3))
    weights = jnp.asarray(numbers(*windows(x, padding).shape, seed=1))
    run = lambda pool: jax.jit(
        jax.value_and_grad(lambda x: jnp.sum(weights * pool(x, padding) ** 2))
    )(x)
    assert max_pool(x, padding).shape == weights.shape
    (value, grad), (expected, expected_grad) = run(max_pool), run(windows)
    close(value, expected)
    close(grad, expected_grad)


def test_conv2d_and_linear():
    x, layer = jnp.asarray(numbers(2, 5, 6, 3)), Conv2d(3, 4, 2, key=KEY)
    expected = lax.conv_general_dilated(
        x, layer.weight, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    close(layer(x), expected)
    limit = np.sqrt(6 / (9 * 3 + 9 * 4))
    assert 0.9 * limit < np.abs(layer.weight).max() <= limit
    line = Linear(3, 2, key=KEY)
    x = jnp.asarray(numbers(4, 3))
    close(line(x), x @ line.weight)
    assert not line.bias.any()


def test_initialisers():
    spread = {"glorot": (2 / 300) ** 0.5, "he": (2 / 100) ** 0.5, "truncated": 0.01, "normal": 1.0}
    assert {*spread, "zero"} == set(_INITIALIZERS)
    assert not np.any(Linear(100, 200, key=KEY, init="zero").weight)
    for init, sigma in spread.items():
        weight = np.asarray(Linear(100, 200, key=KEY, init=init).weight)
        close(weight.std(), sigma, 0.02)
        assert abs(weight.mean()) < 0.02 * sigma


SIZES = {  # features the head sees, parameters of 5-way networks
    "maml omniglot": (64, 3 * 3 * 64 * (1 + 3 * 64) + 4 * 2 * 64 + 65 * 5),
    "maml mini_imagenet": (800, 3 * 3 * 32 * (3 + 3 * 32) + 4 * 2 * 32 + 801 * 5),
    "reptile omniglot": (256, 3 * 3 * 64 * (1 + 3 * 64) + 4 * 3 * 64 + 257 * 5),
    "reptile mini_imagenet": (1152, 3 * 3 * 32 * (3 + 3 * 32) + 4 * 3 * 32 + 1153 * 5),
    "maml++ omniglot": (64, 3 * 3 * 64 * (1 + 3 * 64) + 4 * 3 * 64 + 65 * 5),
    "maml++ mini_imagenet": (800, 3 * 3 * 32 * (3 + 3 * 32) + 4 * 3 * 32 + 801 * 5),
}


@pytest.mark.parametrize("name", CONV4)
def test_conv4_of_the_papers(name):
    features, parameters = SIZES[name]
    model = Conv4(out=5, key=KEY, **CONV4[name])
    x = jax.ShapeDtypeStruct((7, *model.image), jnp.float32)
    assert jax.eval_shape(model, x).shape == (7, 5)
    assert jax.eval_shape(model.features, x).shape == (7, features)
    assert model.head.weight.shape == (features, 5)
    assert tree.count(model) == parameters
    spread = 1.0 if name == "maml omniglot" else (2 / (features + 5)) ** 0.5
    close(model.head.weight.std(), spread, 0.1)
    assert model.blocks[0][1].eps == (1e-5 if "++" in name else 1e-3)


def test_a_leaky_relu_lets_a_little_through():
    how = {"image": (16, 16, 1), "filters": 2, "key": KEY}
    x = jnp.asarray(numbers(3, 16, 16, 1))
    plain, leaky, linear = (Conv4(5, slope=slope, **how)(x) for slope in (0.0, 0.01, 1.0))
    assert 0 < np.abs(leaky - plain).max() < np.abs(linear - plain).max()


def test_conv4_pools_before_or_after_relu_alike():
    how = {"image": (21, 21, 2), "filters": 4, "head": "flatten", "padding": "SAME"}
    x = jnp.asarray(numbers(3, 21, 21, 2))
    before, after = (Conv4(out=5, key=KEY, down=down, **how) for down in ("pool-relu", "relu-pool"))
    close(*jax.jit(lambda x: (before(x), after(x)))(x))


@pytest.mark.parametrize("scale", [None, [1.5, -0.7, 0.4]])
def test_pooling_before_batch_norm_is_pooling_after_it(scale, x64):
    norm = BatchNorm(3, scale=scale is not None)
    if scale is not None:
        norm = eqx.tree_at(lambda norm: norm.scale, norm, jnp.array(scale))
    norm = eqx.tree_at(lambda norm: norm.shift, norm, jnp.array([0.1, -0.2, 0.3]))
    x, weights = jnp.asarray(numbers(4, 6, 5, 3)), jnp.asarray(numbers(4, 3, 2, 3))

    def run(function):
        energy = lambda norm, x: jnp.sum(weights * jnp.sin(function(norm, x)))
        slopes = lambda norm, x: jax.tree.leaves(jax.grad(energy, (0, 1))(norm, x))
        again = lambda norm, x: sum(jnp.sum(jnp.cos(s)) for s in slopes(norm, x))
        return energy(norm, x), slopes(norm, x), jax.grad(again, (0, 1))(norm, x)

    before = jax.jit(lambda: run(lambda norm, x: norm(x, max_pool)))()
    after = jax.jit(lambda: run(lambda norm, x: max_pool(norm(x))))()
    for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("shape", [(4, 6, 5, 3), (80, 20, 8, 32), (300, 1000), (20, 70, 64, 4)])
def test_moments_by_rows_are_those_of_numpy(shape, x64):
    x = jnp.asarray(numbers(*shape)) + 1000.0
    about, axes = x[(0,) * (len(shape) - 1)], tuple(range(len(shape) - 1))
    plain = lambda x: (jnp.mean(x, axes) - about, jnp.var(x, axes))

    def run(moments):
        energy = lambda x: sum(jnp.sum(jnp.sin(each)) for each in moments(x))
        slope = jax.grad(energy)
        return moments(x), slope(x), jax.grad(lambda x: jnp.sum(slope(x) ** 2))(x)

    found = jax.jit(lambda: (run(lambda x: layers.moments(x, about)), run(plain)))()
    for a, b in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-9 * float(jnp.abs(b).max()))


def test_of_equal_maxima_the_first_has_the_derivative():
    x = jnp.zeros((1, 2, 2, 1)).at[0, 0, 0, 0].set(-1.0)
    slope = jax.grad(lambda x: max_pool(x).sum())(x)
    np.testing.assert_allclose(slope.ravel(), [0, 1, 0, 0])
    rows = jax.vmap(jax.grad(lambda x: max_pool(x).sum()))(jnp.stack([x, x + 1]))
    np.testing.assert_array_equal(rows[1], slope)


def test_a_maximum_of_what_is_recomputed_keeps_its_derivative():
    """Compiled, values may be rounded otherwise where they are compared than where they are."""
    x, a, b = (jnp.asarray(numbers(16, 8, 8, 3) * s, jnp.float32) for s in (1.0, 0.3, 0.7))
    slope = jax.jit(jax.grad(lambda x: max_pool(jax.nn.leaky_relu(x * a / 3 + b * x + a)).sum()))
    counts = (np.asarray(slope(x)) != 0).reshape(16, 4, 2, 4, 2, 3).sum((2, 4))
    np.testing.assert_array_equal(counts, 1)


def test_conv4_says_which_images_it_wants():
    model = Conv4(out=5, key=KEY, filters=2)
    with pytest.raises(ValueError, match=r"\(28, 28, 1\).*was given \(84, 84, 3\)"):
        model(jnp.ones((2, 84, 84, 3)))
    with pytest.raises(ValueError, match="too small"):
        Conv4(out=5, key=KEY, image=(8, 8, 1), down="relu-pool")
    assert jax.eval_shape(
        Conv4(out=5, key=KEY, image=(8, 8, 1)), jnp.ones((2, 8, 8, 1))
    ).shape == (2, 5)  # fmt: skip


def test_mlp_is_its_formula():
    model = MLP(3, 2, (5, 4), key=KEY, activation=jnp.tanh)
    x = jnp.asarray(numbers(6, 3))
    h = x
    for layer in model.layers:
        h = jnp.tanh(h @ layer.weight + layer.bias)
    close(model(x), h @ model.head.weight + model.head.bias)
    assert tree.count(model) == 3 * 5 + 5 + 5 * 4 + 4 + 4 * 2 + 2


def test_mlp_of_the_sinusoid_and_of_omniglot():
    assert tree.count(MLP(1, 1, (40, 40), key=KEY)) == 80 + 1640 + 41
    model = MLP(784, 5, (256, 128, 64, 64), key=KEY, batch_norm=True, init="truncated")
    assert jax.eval_shape(model, jnp.ones((7, 28, 28, 1))).shape == (7, 5)
    shapes = [layer.weight.shape for layer in (*model.layers, model.head)]
    assert shapes == [(784, 256), (256, 128), (128, 64), (64, 64), (64, 5)]
    assert len(model.norms) == 4
    weight = np.asarray(model.layers[0].weight)
    # JAX keeps the standard deviation at 0.01 after cutting at two standard deviations.
    close(weight.std(), 0.01, 0.02)
    assert np.abs(weight).max() <= 2 * 0.01 / 0.87962566103423978 + 1e-6


def test_mlp_with_batch_norm_normalises_before_the_activation():
    model = MLP(3, 2, (5,), key=KEY, batch_norm=True)
    x = jnp.asarray(numbers(6, 3))
    h = jax.nn.relu(model.norms[0](model.layers[0](x)))
    close(model(x), model.head(h))
    close(model(x), model(7 * x), 2e-2)


def test_context_is_a_bias_that_the_inner_loop_may_move():
    model = MLP(2, 1, (4,), key=jax.random.key(0), context=3)
    x = jax.random.normal(jax.random.key(1), (5, 2))
    first = model.layers[0]
    by_hand = model.head(jax.nn.relu(x @ first.weight[:2] + first.bias))
    assert model.context.shape == (3,)
    assert jnp.allclose(model(x), by_hand, atol=1e-6)
    gradient = jax.grad(lambda c: jnp.sum(eqx.tree_at(lambda m: m.context, model, c)(x)))
    assert jnp.any(gradient(model.context) != 0)

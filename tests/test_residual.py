"""The residual networks: counts, shapes, formulas, and the path their convolutions take."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from adaptax import batch_norm, tree
from adaptax.conv import fast
from adaptax.engine.classifier import computing_in
from adaptax.models import ResNet12, WideResNet
from adaptax.models.residual import Convolution

KEY = jax.random.key(0)
SMALL = {
    "resnet12": lambda: ResNet12(5, key=KEY, channels=2, widths=(4, 5)),
    "wide_resnet": lambda: WideResNet(5, key=KEY, channels=2, depth=10, width=1),
}


def images(n=3, side=8, channels=2):
    return jnp.asarray(np.random.default_rng(0).normal(size=(n, side, side, channels)), jnp.float32)


@pytest.fixture(scope="module", params=SMALL)
def network(request):
    return SMALL[request.param]()


@pytest.mark.parametrize(
    ("make", "body", "features"),
    [
        # 12.4 million, as MetaOptNet's; 36,479,194 with ten classes, as of Zagoruyko & Komodakis.
        (lambda: ResNet12(64, key=KEY), 12_424_320, 640),
        (lambda: WideResNet(10, key=KEY), 36_479_194 - 6410, 640),
        (lambda: WideResNet(10, key=KEY, depth=16, width=4), 2_748_890 - 2570, 256),
    ],
    ids=["resnet12", "wrn28-10", "wrn16-4"],
)
def test_parameter_counts(make, body, features):
    model = eqx.filter_eval_shape(make)
    counted = lambda part: sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(part))
    assert counted(eqx.filter(model, lambda x: hasattr(x, "shape"))) - counted(model.head) == body
    assert model.head.weight.shape[0] == features
    x = jax.ShapeDtypeStruct((2, 84, 84, 3), jnp.float32)
    assert eqx.filter_eval_shape(lambda m, x: m.features(x), model, x).shape == (2, features)


def test_logits_are_the_head_of_the_features(network):
    program = eqx.filter_jit(lambda m, x: (m(x), m.head(m.features(x))))
    logits, again = program(network, images())
    assert logits.shape == (3, 5)
    np.testing.assert_array_equal(logits, again)
    assert np.ptp(logits) > 0


def test_every_parameter_matters(network):
    loss = eqx.filter_jit(eqx.filter_grad(lambda m, x: jnp.sum(jnp.sin(m(x)) * jnp.arange(5.0))))
    gradient = tree.by_path(loss(network, images()))
    assert len(gradient) == len(jax.tree.leaves(network)) > 20
    assert [path for path, leaf in gradient.items() if not float(jnp.abs(leaf).max()) > 0] == []


def test_fast_path_takes_all_convolutions_and_agrees(network):
    x = images()
    left = lambda f: str(jax.make_jaxpr(f)(x)).count("conv_general_dilated")
    assert left(network.features) == sum(
        isinstance(node, Convolution)
        for node in jax.tree.leaves(network, is_leaf=lambda n: isinstance(n, Convolution))
    )
    rewritten = fast(network.features, True)
    assert left(rewritten) == 0
    np.testing.assert_allclose(jax.jit(rewritten)(x), network.features(x), 1e-4, 1e-4)


def test_running_statistics_become_those_of_the_batch(network):
    """With momentum 0, one pass of SGD on the statistics makes the two modes agree."""
    model = batch_norm.track(network)
    norms = lambda m: [n for n in jax.tree.leaves(m, is_leaf=_is_norm) if _is_norm(n)]
    for norm in norms(model):
        object.__setattr__(norm, "momentum", 0.0)
    gradient, y = eqx.filter_jit(lambda m, x: (eqx.filter_grad(lambda m: jnp.sum(m(x)))(m), m(x)))(
        model, images()
    )
    rows, steps = batch_norm.statistics(model), batch_norm.statistics(gradient)
    assert len(rows) == 2 * len(norms(model)) > 10
    model = tree.replace(model, {path: rows[path] - steps[path] for path in rows})
    still = eqx.filter_jit(batch_norm.use_running_average(model))
    np.testing.assert_allclose(still(images()), y, 1e-3, 1e-3)
    # Each image alone: no image sees another.
    alone = jnp.concatenate([still(images()[i : i + 1]) for i in range(3)])
    np.testing.assert_allclose(alone, y, 1e-3, 1e-3)


def _is_norm(node):
    return hasattr(node, "use_running_average")


def test_wide_resnet_block_is_its_formula():
    model = SMALL["wide_resnet"]()
    convolve = lambda layer, x, s=1: lax.conv_general_dilated(
        x, layer.weight, (s, s), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    standard = lambda x: (x - x.mean((0, 1, 2))) / jnp.sqrt(x.var((0, 1, 2)) + 1e-5)

    @jax.jit
    def by_hand(x):
        x = convolve(model.stem, x)
        for block, stride in zip(model.blocks, (1, 2, 2)):
            y = jax.nn.relu(standard(x))
            around = x if stride == 1 else convolve(block.shortcut, y, 2)
            y = convolve(block.convolutions[0], y, stride)
            x = around + convolve(block.convolutions[1], jax.nn.relu(standard(y)))
        return x.mean((1, 2)), jax.nn.relu(standard(x)).mean((1, 2))

    x = images()
    sums, final = by_hand(x)
    assert model.blocks[0].shortcut is None  # 16 channels in and out
    np.testing.assert_allclose(model.features(x), final, 1e-3, 1e-4)
    at_seven = jax.jit(lambda x: model.features(x, layer=7))
    np.testing.assert_allclose(at_seven(x), sums, 1e-3, 1e-4)
    with pytest.raises(ValueError, match=r"layer=6; blocks end with the convolutions 3, 5, 7"):
        model.features(x, layer=6)


def test_layer_21_of_leo_exists():
    model = eqx.filter_eval_shape(lambda: WideResNet(64, key=KEY))
    x = jax.ShapeDtypeStruct((1, 84, 84, 3), jnp.float32)
    assert eqx.filter_eval_shape(lambda m, x: m.features(x, 21), model, x).shape == (1, 640)


def test_half_precision_is_of_the_convolutions_alone(network):
    half = computing_in(jnp.bfloat16, network)
    kinds = {path: leaf.dtype for path, leaf in tree.by_path(half).items() if eqx.is_array(leaf)}
    assert {path.rsplit("/", 1)[1] for path, kind in kinds.items() if kind == jnp.bfloat16} == {
        "weight"
    }
    assert kinds["head/weight"] == jnp.float32
    features = eqx.filter_jit(lambda m, x: m.features(x))
    low, full = features(half, images()), features(network, images())
    assert low.dtype == jnp.float32
    error = float(jnp.abs(low - full).max() / jnp.abs(full).max())
    assert 1e-4 < error < 0.1


@pytest.mark.parametrize(
    ("make", "shape", "said"),
    [
        (SMALL["resnet12"], (1, 16, 16, 3), r"height, width, 2\).*given \(1, 16, 16, 3\)"),
        (SMALL["resnet12"], (1, 3, 16, 2), "at least 4×4"),
        (SMALL["wide_resnet"], (1, 3, 16, 2), "at least 4×4"),
    ],
)
def test_images_that_do_not_fit_are_refused(make, shape, said):
    with pytest.raises(ValueError, match=said):
        make().features(jnp.zeros(shape))


def test_depths_that_are_none():
    for depth in (4, 12, 27):
        with pytest.raises(ValueError, match=f"not {depth}"):
            WideResNet(5, key=KEY, depth=depth)

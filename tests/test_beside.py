"""Queries that are predicted beside the support: what is shared changes no number."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import adaptax as ax
from adaptax.beside import beside
from adaptax.conv import fast
from learners import ConvNet

KEY = jax.random.key(0)
pytestmark = pytest.mark.usefixtures("x64")


def one_by_one(function, shared, each):
    """Every query in a batch of its own, as a loop says it."""
    batches = [jax.tree.map(lambda s, q, i=i: jnp.concatenate([s, q[i : i + 1]]), shared, each)
               for i in range(len(jax.tree.leaves(each)[0]))]  # fmt: skip
    last = [jax.tree.map(lambda out: out[-1], function(batch)) for batch in batches]
    return jax.tree.map(lambda *rows: jnp.stack(rows), *last)


def assert_same(function, shared, each):
    found = jax.jit(lambda s, q: beside(function, s, q, size=2))(shared, each)
    expected = one_by_one(jax.jit(function), shared, each)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        assert np.allclose(a, b, rtol=1e-12, atol=1e-13)


def normal(i, *shape):
    return jax.random.normal(jax.random.fold_in(KEY, i), shape)


FUNCTIONS = {
    "elementwise": lambda x: jnp.tanh(x) * 2 + jnp.arange(3.0),
    "a number for each example": lambda x: x * jnp.arange(float(len(x)))[:, None] + len(x),
    "mean and variance": lambda x: (x - x.mean(0)) / jnp.sqrt(x.var(0) + 1e-3),
    "the first example": lambda x: x - x[0],
    "the last example": lambda x: x - x[-1],
    "an example in the middle": lambda x: x * x[2] + x[:1],
    "largest and smallest": lambda x: (x - x.min(0)) / (x.max(0) - x.min(0) + 1),
    "attention over the batch": lambda x: jax.nn.softmax(x @ x.T) @ x,
    "reversed": lambda x: x[::-1] * 2 + x,
    "shuffled": lambda x: x[jnp.array([3, 1, 0, 2, 4])] + x,
    "every second": lambda x: x + x[::2].sum(0),
    "sorted over the batch": lambda x: jnp.sort(x, axis=0),
    "sorted in a row": lambda x: jnp.sort(x, axis=1) + jnp.cumsum(x, 1) + jnp.argmax(x, 1)[:, None],
    "summed along the batch": lambda x: jnp.cumsum(x, axis=0),
    "reshaped and back": lambda x: (x.reshape(-1, 1) * 2).reshape(len(x), 3) @ jnp.ones((3, 2)),
    "transposed": lambda x: (x.T * jnp.arange(float(len(x)))).T,
    "in rows of a loop": lambda x: x - jax.lax.scan(
        lambda c, row: (c + row**2, None), jnp.zeros(3), x)[0],
    "a loop that gives rows": lambda x: jax.lax.scan(lambda c, row: (c + row, c * row),
                                                     jnp.ones(3), x)[1],
    "a loop from the end": lambda x: jax.lax.scan(lambda c, row: (c + row, c), jnp.ones(3), x,
                                                  reverse=True)[1],
    "a branch": lambda x: jax.lax.cond(x.sum() > 0, jnp.sin, jnp.cos, x),
    "vmap": lambda x: jax.vmap(lambda row: jnp.ones((2, 3)) @ jnp.tanh(row))(x),
    "a derivative rule": lambda x: jax.nn.relu(x) + jax.nn.logsumexp(x, axis=0),
    "padded": lambda x: jnp.pad(x, ((1, 1), (0, 2)))[1:-1],
    "padded beside": lambda x: jnp.pad(x, ((0, 0), (1, 0))),
    "repeated": lambda x: jnp.repeat(x[:, None], 2, 1) + x.mean(0),
    "joined": lambda x: jnp.concatenate([x, x * 2, jnp.ones_like(x)], axis=1),
    "stacked": lambda x: jnp.concatenate([x, x[:1]])[1:],
    "two outputs": lambda x: {"a": x.sum(1), "b": (x > 0) & (x < x.mean())},
    "a constant": lambda x: jnp.zeros((len(x), 2)),
}  # fmt: skip


@pytest.mark.parametrize("name", FUNCTIONS)
def test_operations(name):
    assert_same(FUNCTIONS[name], normal(0, 4, 3), normal(1, 5, 3))


def test_a_window_as_large_as_the_batch():
    """Sizes that agree by chance are not taken for the examples."""
    assert_same(lambda x: (x.T @ x)[:, :3] + x[:3].sum() + 0 * x[:, :3].sum(),
                normal(0, 2, 3), normal(1, 4, 3))  # fmt: skip
    assert_same(lambda x: jnp.tanh(x.reshape(3, 3, 1).sum(1)) + x.mean(), normal(0, 2, 3),
                normal(1, 4, 3))  # fmt: skip


def test_no_shared_examples_and_trees():
    function = lambda x: {"y": x["a"] * x["b"][:, None] - x["a"].mean(0)}
    tree = lambda i, n: {"a": normal(i, n, 3), "b": normal(i + 1, n)}
    assert_same(function, tree(0, 4), tree(2, 3))
    assert_same(function, tree(0, 0), tree(2, 3))


@pytest.mark.parametrize("fast_path", [True, False])
@pytest.mark.parametrize(
    "make",
    [
        ConvNet,
        lambda key: ax.models.Conv4(2, key=key, image=(16, 16, 1), filters=4, scale=True),
        lambda key: ax.models.Conv4(2, key=key, image=(16, 16, 1), filters=3, down="pool-relu",
                                    head="flatten"),
    ],
    ids=["ConvNet", "strides", "pooling"],
)  # fmt: skip
def test_networks(make, fast_path):
    model, side = make(KEY), 4 if make is ConvNet else 16
    call = fast(lambda x: model(x), fast_path)
    assert_same(call, normal(0, 5, side, side, 1), normal(1, 3, side, side, 1))


def test_large_images_whose_moments_are_sums_of_rows():
    norm = ax.models.BatchNorm(32)
    assert_same(lambda x: norm(x), normal(0, 3, 64, 64, 32), normal(1, 2, 64, 64, 32))


def test_the_support_is_computed_once():
    """The convolution of the support stands outside of the loop over queries."""
    model = ax.models.Conv4(2, key=KEY, image=(16, 16, 1), filters=4, down="pool-relu")
    call = fast(lambda x: model(x), True)
    jaxpr = jax.make_jaxpr(lambda s, q: beside(call, s, q))(
        normal(0, 5, 16, 16, 1), normal(1, 32, 16, 16, 1)
    )
    convs = [e for e in jaxpr.jaxpr.eqns if e.primitive.name == "conv_forward"]
    assert [e.invars[0].aval.shape for e in convs] == [(5, 16, 16, 1)]


def test_evaluation_does_not_change():
    """The scores of episodes by queries alone with the support, against predictions by hand."""
    tasks = ax.tasks.glyphs(way=2, shot=2, query=2)
    image = tasks.test.sample(KEY).query.x.shape[1:]
    model = ax.models.Conv4(2, key=KEY, image=image, filters=4)
    task = tasks.test.sample(KEY)
    found = ax.predict(ax.MAML(ax.losses.cross_entropy, 0.1, 1), model, task.support, task.query.x,
                       transductive=False, key=KEY)  # fmt: skip
    adapted = ax.MAML(ax.losses.cross_entropy, 0.1, 1).adapt(model, task.support, key=KEY)
    expected = one_by_one(eqx.filter_jit(adapted), task.support.x, task.query.x)
    assert np.allclose(found, expected, rtol=1e-4, atol=1e-5)

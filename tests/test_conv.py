import functools
import itertools
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from adaptax import conv_forms
from adaptax.conv import conv, fast


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def close(a, b, tolerance=1e-10):
    a, b = jax.tree.leaves(a), jax.tree.leaves(b)
    assert len(a) == len(b)
    for left, right in zip(a, b):
        assert left.shape == right.shape
        assert left.dtype == right.dtype
        np.testing.assert_allclose(
            np.asarray(left, np.float64), np.asarray(right, np.float64), tolerance, tolerance
        )


def normal(seed, *shape, dtype=None):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype or jnp.float64)


def quick(function):
    """Compiled in little time, to run once."""
    return jax.jit(function, compiler_options={"xla_llvm_disable_expensive_passes": True})


def agree(function, other, *args, tolerance=1e-10):
    """Two functions, compiled in one program, give equal results."""
    close(*quick(lambda *args: (function(*args), other(*args)))(*args), tolerance)


def convolutions(function, *args):
    """How many `conv_general_dilated` a function's jaxpr has, nested ones too."""
    return str(jax.make_jaxpr(function)(*args)).count("conv_general_dilated[")


LAST = {1: ("NHC", "HIO", "NHC"), 2: ("NHWC", "HWIO", "NHWC"), 3: ("NHWDC", "HWDIO", "NHWDC")}


def native(x, kernel, strides, padding, layout=None):
    layout = layout or LAST[len(strides)]
    return lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=layout)


PADDINGS = {
    1: ("SAME", "VALID", [(2, 1)], [(-1, 2)], [(-2, -1)]),
    2: ("SAME", "VALID", [(1, 2), (0, 3)], [(-1, 2), (1, -2)]),
    3: ("SAME", "VALID", [(1, 0), (-1, 1), (2, 2)]),
}
SIZES = {1: ((9,), (4,)), 2: ((7, 6), (3, 2)), 3: ((5, 4, 6), (2, 3, 2))}


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_equals_the_native_convolution_for_all_strides_and_paddings(dims):
    size, window = SIZES[dims]
    x, kernel = normal(0, 2, *size, 3), normal(1, *window, 3, 4)
    strides = [(1,), (2,), (3,)] if dims == 1 else [(1,) * dims, (2,) * dims, (2, 1, 3)[:dims]]
    cases = list(itertools.product(strides, PADDINGS[dims]))
    agree(
        lambda x, k: [conv(x, k, strides=stride, padding=padding) for stride, padding in cases],
        lambda x, k: [native(x, k, stride, padding) for stride, padding in cases],
        *(x, kernel),
    )


@pytest.mark.parametrize("x", [(0, 5, 5, 2), (2, 5, 5, 0), (2, 2, 5, 2), (2, 0, 5, 2)])
def test_empty_arrays(x):
    x, kernel = jnp.ones(x), jnp.ones((3, 3, x[-1], 4))
    y = conv(x, kernel, strides=(1, 2), padding="VALID")
    close(y, native(x, kernel, (1, 2), "VALID"))
    assert y.shape == (len(x), max(x.shape[1] - 2, 0), 2, 4)


def derivatives(function, order):
    """A scalar that has every derivative up to `order` in it, of both arguments."""

    def scalar(x, kernel):
        return jnp.sum(jnp.sin(function(x, kernel)))

    for _ in range(order):

        def scalar(x, kernel, below=scalar):
            gx, gk = jax.grad(below, (0, 1))(x, kernel)
            return jnp.sum(jnp.sin(gx)) + jnp.sum(gk * jnp.cos(gk))

    return scalar


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize(
    ("strides", "padding"), [((2, 2), "SAME"), ((1, 2), [(-1, 2), (1, 0)])], ids=["same", "crop"]
)
def test_derivatives_equal_the_native_ones(order, strides, padding):
    x, kernel = normal(0, 2, 5, 6, 2), normal(1, 3, 2, 2, 3)
    ours = derivatives(lambda x, k: conv(x, k, strides=strides, padding=padding), order - 1)
    theirs = derivatives(lambda x, k: native(x, k, strides, padding), order - 1)
    agree(jax.grad(ours, (0, 1)), jax.grad(theirs, (0, 1)), x, kernel)


def test_forward_mode_over_reverse():
    x, kernel = normal(0, 2, 5, 6, 2), normal(1, 3, 3, 2, 3)
    hvp = lambda f: lambda x, k: jax.jvp(jax.grad(derivatives(f, 0)), (x, k), (x + 1, k - 1))
    ours, theirs = (
        lambda x, k: conv(x, k, strides=(2, 2)),
        lambda x, k: native(x, k, (2, 2), "SAME"),
    )
    agree(hvp(ours), hvp(theirs), x, kernel)


def test_kernels_of_many_tasks():
    xs, kernels = normal(0, 4, 2, 5, 5, 3), normal(1, 4, 3, 3, 3, 2)
    plain = lambda x, k: native(x, k, (2, 2), "SAME")
    rewritten = jax.vmap(fast(plain, True))
    assert convolutions(rewritten, xs, kernels) == 0
    one_by_one = lambda xs, ks: jnp.stack([plain(x, k) for x, k in zip(xs, ks)])
    agree(rewritten, one_by_one, xs, kernels)
    agree(jax.vmap(lambda x, k: conv(x, k, strides=(2, 2))), one_by_one, xs, kernels)


@pytest.mark.parametrize(
    "layout",
    [
        ("NHWC", "HWIO", "NHWC"),
        ("NCHW", "OIHW", "NCHW"),
        ("NCHW", "HWIO", "NHWC"),
        ("CHNW", "IHOW", "WNCH"),
    ],
)
def test_fast_in_any_layout(layout):
    axes = {"N": 2, "C": 3, "H": 7, "W": 6}
    x = normal(0, *(axes[a] for a in layout[0]))
    kernel = normal(1, *({"O": 4, "I": 3, "H": 3, "W": 2}[a] for a in layout[1]))
    plain = lambda x, k: native(x, k, (2, 1), [(1, 0), (-1, 2)], layout)
    assert convolutions(fast(plain, True), x, kernel) == 0
    agree(fast(plain, True), plain, x, kernel)
    grad = lambda f: jax.grad(derivatives(f, 1), (0, 1))
    agree(grad(fast(plain, True)), grad(plain), x, kernel)


def same(x, kernel, padding="SAME", **how):
    return lax.conv_general_dilated(x, kernel, (1, 1), padding, dimension_numbers=LAST[2], **how)


X, K = (2, 6, 6, 4), (3, 3, 4, 4)
IN_GROUPS = {
    "groups": lambda x, k: same(x, k[:, :, :2], feature_group_count=2),
    "depthwise": lambda x, k: same(x, k[:, :, :1], feature_group_count=4),
    "depthwise, two each": lambda x, k: same(
        x, jnp.concatenate([k, k + 1], -1)[:, :, :1], feature_group_count=4
    ),
    "strided": lambda x, k: lax.conv_general_dilated(
        x, k[:, :, :2], (2, 1), [(1, 0), (2, 1)], dimension_numbers=LAST[2], feature_group_count=2
    ),
    "dilated kernel": lambda x, k: same(x, k, rhs_dilation=(2, 3)),
    "dilated, in groups": lambda x, k: same(
        x, k[:, :, :2], rhs_dilation=(2, 1), feature_group_count=2
    ),
}


@pytest.mark.parametrize("name", IN_GROUPS)
def test_groups_and_dilated_kernels(name):
    x, kernel = normal(0, *X), normal(1, *K)
    plain = IN_GROUPS[name]
    assert convolutions(fast(plain, True), x, kernel) == 0
    agree(fast(plain, True), plain, x, kernel)
    grad = lambda f: jax.grad(derivatives(f, 1), (0, 1))
    agree(grad(fast(plain, True)), grad(plain), x, kernel)


FORMS = [
    ("forward_native", "forward_windows"),
    ("to_input_mirrored", "to_input_windows"),
    ("to_kernel_split", "to_kernel_windows"),
    ("to_kernel_planes", "to_kernel_windows"),
]


@pytest.mark.parametrize("names", FORMS, ids=lambda names: names[0])
@pytest.mark.parametrize("cache", [1, 2**20], ids=["image by image", "at once"])
def test_forms_of_a_contraction_are_equal(names, cache, monkeypatch):
    monkeypatch.setattr(conv_forms, "CACHE", cache)
    for window, padding in (((3, 3), "SAME"), ((3, 2), ((0, 2), (1, 0))), ((1, 1), "VALID")):
        size = (6, 5)
        pads = (
            lax.padtype_to_pads(size, window, (1, 1), padding)
            if padding in ("SAME", "VALID")
            else padding
        )
        geometry = conv_forms.Geometry(size, window, (1, 1), tuple(pads), (1, 1))
        assert geometry.plain
        x, kernel = normal(0, 3, *size, 2), normal(1, *window, 2, 4)
        y = normal(2, 3, *geometry.outsize, 4)
        given = {"forward": (x, kernel), "to_input": (kernel, y), "to_kernel": (x, y)}
        of = given[names[0].rpartition("_")[0]]
        ours, theirs = (
            functools.partial(getattr(conv_forms, name), geometry=geometry) for name in names
        )
        agree(ours, theirs, *of)


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_derivatives_of_plain_convolutions_are_our_own_and_equal_the_native_ones(order, dtype):
    x, kernel = normal(0, 2, 5, 6, 9) / 9, normal(1, 3, 2, 9, 3)
    ours = jax.grad(derivatives(lambda x, k: conv(x, k, strides=(1, 1)), order - 1), (0, 1))
    theirs = jax.grad(derivatives(lambda x, k: native(x, k, (1, 1), "SAME"), order - 1), (0, 1))
    given = x.astype(dtype), kernel.astype(dtype)
    found, expected = quick(ours)(*given), quick(theirs)(x, kernel)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == dtype
        error = float(jnp.abs(a - b).max() / jnp.abs(b).max())
        assert error < (1e-12 if dtype == "float64" else 1e-4)
    text = str(jax.make_jaxpr(ours)(*given))
    assert "conv_general" not in text
    assert {"conv_forward", "conv_to_kernel"} <= set(re.findall(r"conv_\w+", text))


def test_one_kernel_for_mapped_images_is_one_convolution():
    xs, kernel = normal(0, 4, 2, 5, 5, 3), normal(1, 3, 3, 3, 2)
    one = lambda x: conv(x, kernel, strides=(1, 1))
    mapped = jax.vmap(one)
    assert str(jax.make_jaxpr(mapped)(xs)).count("conv_forward") == 1
    agree(mapped, lambda xs: jnp.stack([one(x) for x in xs]), xs)
    slope = lambda f: jax.grad(lambda xs: jnp.sum(jnp.sin(f(xs))))
    agree(slope(mapped), slope(lambda xs: jnp.stack([one(x) for x in xs])), xs)
    both = jax.vmap(
        lambda x, k: jax.grad(lambda k: jnp.sum(jnp.sin(conv(x, k, strides=(1, 1)))))(k)
    )
    kernels = normal(2, 4, 3, 3, 3, 2)
    each = lambda x, k: jax.grad(lambda k: jnp.sum(jnp.sin(native(x, k, (1, 1), "SAME"))))(k)
    agree(both, lambda xs, ks: jnp.stack([each(*pair) for pair in zip(xs, ks)]), xs, kernels)


def reduced(x, window=(1, 2, 2, 1), padding="VALID", **how):
    return lax.reduce_window(x, -jnp.inf, lax.max, window, how.get("strides", window), padding)


@pytest.mark.parametrize("window", [(1, 2, 2, 1), (1, 3, 2, 1), (1, 1, 2, 2), (2, 1, 3, 1)])
def test_maxima_over_windows_side_by_side_are_replaced(window):
    x = normal(0, 4, 7, 6, 4)
    plain = lambda x: reduced(x, window)
    assert "reduce_window" not in str(jax.make_jaxpr(fast(plain, True))(x))
    agree(fast(plain, True), plain, x)
    slope = lambda f: jax.grad(lambda x: jnp.sum(jnp.sin(f(x))))
    twice = lambda f: jax.grad(lambda x: jnp.sum(jnp.sin(slope(f)(x))))
    agree(lambda x: twice(fast(plain, True))(x), lambda x: twice(plain)(x), x)


@pytest.mark.parametrize(
    "other",
    [
        lambda x: reduced(x, strides=(1, 1, 1, 1)),
        lambda x: reduced(x, padding="SAME"),
        lambda x: reduced(x, (1, 2, 1, 1)),
        lambda x: lax.reduce_window(x, 0.0, lax.add, (1, 2, 2, 1), (1, 2, 2, 1), "VALID"),
    ],
)
def test_other_windows_are_left_alone(other):
    x = normal(0, 2, 5, 5, 3)
    assert "reduce_window" in str(jax.make_jaxpr(fast(other, True))(x))
    agree(fast(other, True), other, x)


LEFT_ALONE = {
    "batch groups": lambda x, k: same(x, k, batch_group_count=2),
    "dilated input": lambda x, k: same(x, k, [(2, 2), (2, 2)], lhs_dilation=(2, 1)),
    "transposed": lambda x, k: lax.conv_transpose(x, k, (2, 2), "SAME"),
    "integer": lambda x, k: same(x.astype(int), (9 * k).astype(int)).astype(float),
    "complex": lambda x, k: same(x + 1j * x, k + 0j).real,
}


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_other_convolutions_are_left_alone(name):
    x, kernel = normal(0, *X), normal(1, *K)
    other = LEFT_ALONE[name]
    # Alone, and beside a plain one that is replaced.
    both = lambda x, k: other(x, k).sum() + same(x, k).sum()
    assert convolutions(fast(other, True), x, kernel) == convolutions(other, x, kernel) >= 1
    assert convolutions(fast(both, True), x, kernel) == convolutions(both, x, kernel) - 1
    agree(fast(other, True), other, x, kernel)
    agree(jax.value_and_grad(fast(both, True), 1), jax.value_and_grad(both, 1), x, kernel)


@pytest.mark.parametrize(
    ("dtype", "preferred"), [("bfloat16", None), ("bfloat16", "float32"), ("float32", None)]
)
def test_types(dtype, preferred):
    x, kernel = normal(0, *X, dtype=dtype), normal(1, *K, dtype=dtype)
    preferred = preferred and jnp.dtype(preferred)
    plain = lambda x, k: same(x, k, preferred_element_type=preferred)
    assert convolutions(fast(plain, True), x, kernel) == 0
    exact = lambda x, k: same(x.astype(float), k.astype(float))
    y = quick(fast(plain, True))(x, kernel)
    assert y.dtype == plain(x, kernel).dtype == (preferred or dtype)
    # Accumulated in float32: only the inputs' and the result's own rounding is lost.
    tolerance = 1e-5 if y.dtype == jnp.float32 else 2e-2
    close(y.astype(float), quick(exact)(x, kernel), tolerance)
    grads = jax.eval_shape(
        jax.grad(lambda x, k: jnp.sum(fast(plain, True)(x, k)), (0, 1)), x, kernel
    )
    assert {g.dtype for g in grads} == {jnp.dtype(dtype)}


def scanned(x, k):
    return lax.scan(lambda x, _: (jnp.tanh(same(x, k)), x.sum()), x, None, length=3)


def branched(x, k):
    branches = [lambda x: same(x, k), lambda x: 2 * x, lambda x: same(same(x, k), k)]
    return [lax.switch(i, branches, x) for i in range(3)]


def conditional(x, k):
    return lax.cond(x.sum() > 1e9, lambda x: same(x, k), lambda x: -x, x)


def looped(x, k):
    def go_on(state):
        return (state[0] < 3) & (same(state[1], k).sum() < 1e9)

    return lax.while_loop(go_on, lambda s: (s[0] + 1, jnp.tanh(same(s[1], k))), (0, x))[1]


def counted(x, k):
    return lax.fori_loop(0, 3, lambda i, x: jnp.tanh(same(x, k) + i), x)


def rematerialised(x, k):
    return jax.checkpoint(lambda x: jnp.tanh(same(jnp.tanh(same(x, k)), k)))(x)


def nested(x, k):
    @jax.jit
    def inner(x):
        return jax.checkpoint(jax.jit(lambda x: jnp.sin(same(x, k)) + np.arange(4.0)))(x)

    return lax.scan(lambda x, _: (lax.cond(x.sum() > 0, inner, inner, x), None), x, None, 2)[0]


NESTS = [scanned, branched, conditional, looped, counted, rematerialised, nested]


@pytest.mark.parametrize("function", NESTS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_descends_into_control_flow(function, jit):
    x, kernel = normal(0, *X), normal(1, *K)
    rewritten = fast(jax.jit(function) if jit else function, True)
    assert convolutions(function, x, kernel) >= 1
    assert convolutions(rewritten, x, kernel) == 0
    if not jit or function is looped:  # which has no gradient
        return agree(rewritten, function, x, kernel)
    scalar = lambda f: lambda x, k: sum(map(jnp.sum, jax.tree.leaves(f(x, k))))
    grad = lambda f: jax.value_and_grad(scalar(f), (0, 1))
    agree(grad(rewritten), grad(function), x, kernel)
    assert convolutions(grad(rewritten), x, kernel) == 0


def test_gradients_inside_the_function_are_rewritten_too():
    x, kernel = normal(0, *X), normal(1, *K)
    energy = lambda x, k: jnp.sum(jnp.sin(same(x, k)))
    inner = lambda x, k: k - 0.1 * jax.grad(energy, 1)(x, k)
    agree(fast(inner, True), inner, x, kernel)
    agree(
        fast(jax.vmap(energy, (0, None)), True), lambda x, k: energy(x[0], k)[None], x[None], kernel
    )


def test_closed_over_arrays_are_differentiated():
    x, kernel = normal(0, *X), normal(1, *K)
    both = lambda how: lambda k: jnp.sum(how(lambda x: jnp.sin(same(x, k)))(x))
    rewritten = both(lambda f: fast(f, True))
    plain = both(lambda f: f)
    agree(jax.grad(rewritten), jax.grad(plain), kernel)
    agree(jax.hessian(rewritten), jax.hessian(plain), kernel[:1, :1])


def test_custom_derivatives_keep_their_rules():
    @jax.custom_vjp
    def odd(x, k):
        return same(x, k)

    odd.defvjp(lambda x, k: (same(x, k), (x, k)), lambda res, g: (res[0] * 0 + 17, res[1] * 0 - 3))

    @jax.custom_jvp
    def strange(x):
        return x**2

    strange.defjvp(lambda primals, tangents: (primals[0] ** 2, 100 * tangents[0]))

    x, kernel = normal(0, *X), normal(1, *K)
    model = lambda x, k: jnp.sum(strange(odd(x, k))) + jnp.sum(same(x, k))
    rewritten = fast(model, True)
    assert convolutions(rewritten, x, kernel) == convolutions(model, x, kernel) - 1
    agree(jax.value_and_grad(rewritten, (0, 1)), jax.value_and_grad(model, (0, 1)), x, kernel)
    gradient = jax.grad(fast(lambda x: jnp.sum(odd(x, kernel) + 0 * same(x, kernel)), True))(x)
    close(gradient, jnp.full(X, 17.0))


def test_switched_off_it_is_the_function_itself(monkeypatch):
    function = lambda x: x
    assert fast(function, False) is function
    assert fast(function, "auto") is not function
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert fast(function, "auto") is function
    assert fast(function, True) is not function


def test_functions_without_convolution_are_unchanged():
    function = lambda x: {"y": jnp.sin(x), "name": "sine", "none": None}
    x = normal(0, 3)
    out = fast(function, True)(x)
    close(out["y"], jnp.sin(x))
    assert (out["name"], out["none"]) == ("sine", None)
    assert str(jax.make_jaxpr(fast(jnp.sin, True))(x)) == str(jax.make_jaxpr(jnp.sin)(x))


def test_arguments_and_results_that_are_not_arrays():
    def function(batch, times, activation, *, name, rest=None, table):
        x, kernel = batch["x"], batch["kernel"]
        assert isinstance(times, int)
        assert rest is None
        assert table.shape == (3,)
        for _ in range(times):
            x = activation(same(x, kernel))
        return {"x": x, "name": name, "call": activation, "n": times, "none": None, "t": (table,)}

    batch = {"x": normal(0, *X), "kernel": normal(1, *K), "static": "text"}
    how = {"name": "net", "table": np.ones(3)}
    out = fast(function, True)(batch, 2, jnp.tanh, **how)
    expected = function(batch, 2, jnp.tanh, **how)
    close(out["x"], expected["x"])
    assert (out["name"], out["n"], out["none"], out["call"]) == ("net", 2, None, jnp.tanh)
    np.testing.assert_array_equal(out["t"][0], np.ones(3))
    assert fast(function, True).__name__ == "function"


def test_keys_and_randomness_pass():
    def function(key, x, k):
        return same(x, k) + jax.random.normal(key, x.shape), jax.random.fold_in(key, 1)

    args = jax.random.key(3), normal(0, *X), normal(1, *K)
    (y, key), (y0, key0) = fast(function, True)(*args), function(*args)
    close(y, y0)
    assert key == key0


def test_effects_happen_once():
    seen = []

    def function(x, k):
        jax.debug.callback(lambda value: seen.append(float(value)), x.sum())
        return same(x, k)

    fast(function, True)(normal(0, *X), normal(1, *K))
    jax.effects_barrier()
    assert len(seen) == 1


class Net(eqx.Module):
    convs: list
    pool: eqx.nn.MaxPool2d
    head: eqx.nn.Linear

    def __init__(self, key):
        k1, k2, k3 = jax.random.split(key, 3)
        self.convs = [
            eqx.nn.Conv2d(1, 4, 3, stride=2, padding=1, key=k1),
            eqx.nn.Conv2d(4, 4, 3, padding="SAME", key=k2),
        ]
        self.pool = eqx.nn.MaxPool2d(2, 2)
        self.head = eqx.nn.Linear(36, 5, key=k3)

    def __call__(self, x):
        def one(image):
            y = jnp.moveaxis(image, -1, 0)
            for layer in self.convs:
                y = jax.nn.relu(layer(y))
            return self.head(self.pool(y).ravel())

        return jax.vmap(one)(x)


def loss(model, x):
    return jnp.mean(jnp.sin(model(x)))


def check_model(model, x, second_order):
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def meta(loss):
        if not second_order:
            return jax.value_and_grad(lambda params: loss(eqx.combine(params, static), x))

        def step(params):
            grads = jax.grad(lambda p: loss(eqx.combine(p, static), x))(params)
            return loss(eqx.combine(jax.tree.map(lambda p, g: p - g, params, grads), static), x + 1)

        return jax.value_and_grad(step)

    assert convolutions(lambda p: loss(eqx.combine(p, static), x), params) == 2
    assert convolutions(lambda p: fast(loss, True)(eqx.combine(p, static), x), params) == 0
    assert convolutions(meta(fast(loss, True)), params) == 0
    tolerance = 1e-10 if jax.tree.leaves(params)[0].dtype == jnp.float64 else 2e-4
    agree(meta(fast(loss, True)), meta(loss), params, tolerance=tolerance)


def test_equinox_model_that_maps_over_examples():
    check_model(Net(jax.random.key(0)), normal(1, 7, 12, 12, 1), second_order=True)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_flax_model_with_batch_norm():
    nnx = pytest.importorskip("flax.nnx")

    class FlaxNet(nnx.Module):
        def __init__(self, rngs):
            how = {"param_dtype": jnp.float64, "rngs": rngs}
            self.conv1 = nnx.Conv(1, 4, (3, 3), strides=2, **how)
            self.norm = nnx.BatchNorm(4, use_running_average=False, **how)
            self.norm.mean, self.norm.var = (
                nnx.BatchStat(jnp.zeros(4)),
                nnx.BatchStat(jnp.ones(4)),
            )
            self.conv2 = nnx.Conv(4, 4, (3, 3), **how)
            self.head = nnx.Linear(4, 5, **how)

        def __call__(self, x):
            x = nnx.relu(self.norm(self.conv1(x)))
            return self.head(jnp.mean(nnx.relu(self.conv2(x)), (1, 2)))

    check_model(FlaxNet(nnx.Rngs(0)), normal(1, 7, 12, 12, 1), second_order=False)

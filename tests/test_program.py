"""Programs are compiled once, hold no data, and see every change that matters."""

import gc
import os
import threading
import types
import weakref
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adaptax as ax
from adaptax import program
from compilations import compilations, fresh_programs  # noqa: F401

KEY = jax.random.key(3)
TASKS = ax.tasks.sinusoid(shot=5, query=6)
mse = ax.losses.mse
scale = 1.0


@pytest.fixture(autouse=True)
def no_programs():
    program.clear()


def net(seed=0):
    return ax.models.MLP(1, 1, (4,), key=jax.random.key(seed), activation=jnp.tanh)


def batch(seed=0, n=5):
    x, y = jax.random.normal(jax.random.key(seed), (2, n, 1))
    return ax.Batch(x, y)


def leaves(tree):
    return jax.tree.leaves(eqx.filter(tree, eqx.is_array))


def equal(a, b):
    return all(np.array_equal(x, y) for x, y in zip(leaves(a), leaves(b), strict=True))


def plain(learner, meta, support, **how):
    """What `adapt` gives without a program."""
    return type(learner).adapt.__wrapped__(learner, meta, support, key=KEY, **how)


class Own(ax.MetaLearner):
    """Meta-SGD as a user writes it."""

    loss: ax.Loss
    inner_lr: float = 0.1

    def init(self, model, *, key):
        return {"model": model, "lr": ax.tree.full_like(model, self.inner_lr)}

    def adapt(self, meta, support, *, key):
        return ax.inner.descend(self.loss, meta["model"], support, lr=meta["lr"], steps=1, key=key)

    def meta_loss(self, meta, task, *, key, progress):
        model = self.adapt(meta, task.support, key=key)
        return self.loss(model, task.query.draw(model, key)), {}


# Compiled once


@pytest.mark.parametrize("make", [lambda: ax.MAML(mse, 0.1, 3), lambda: Own(mse)])
def test_adapt_is_compiled_once(make):
    metas = [make().init(net(seed), key=KEY) for seed in range(2)]
    batches, keys = [batch(seed) for seed in range(2)], jax.random.split(KEY)
    first = make().adapt(metas[0], batches[0], key=keys[0])
    with compilations() as compiled:
        second = make().adapt(metas[1], batches[1], key=keys[1])
    assert not compiled
    assert not equal(first, second)
    want = type(make()).adapt.__wrapped__(make(), metas[1], batches[1], key=keys[1])
    for a, b in zip(leaves(second), leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)


def test_the_last_of_the_iterates_is_the_adapted_model():
    learner = ax.MAML(mse, 0.1, 3)
    path = learner.iterates(net(), batch(), key=KEY)
    with compilations() as compiled:
        learner.iterates(net(), batch(1), key=KEY)
    assert not compiled
    assert learner.iterates(net(), batch(), key=KEY, steps=2).head.weight.shape[0] == 3
    adapted = learner.adapt(net(), batch(), key=KEY)
    for a, b in zip(leaves(adapted), leaves(ax.tree.at(path, -1)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_evaluate_predict_and_fit_compile_nothing_again():
    def all_of_them(seed):
        learner = ax.MAML(lambda model, batch: mse(model, batch), 0.05, 2)
        key = jax.random.key(seed)
        result = ax.fit(
            learner, net(seed), TASKS.train, steps=4, chunk=2, meta_batch=2, key=key,
            optimizer=optax.chain(optax.clip(1.0), optax.adam(optax.linear_schedule(1e-2, 0, 4))),
            validate=TASKS.val, validation={"episodes": 3},
        )  # fmt: skip
        ax.evaluate(learner, result.meta, TASKS.test, episodes=5, key=key, at=[0, 2])
        support = batch(seed)
        return result, ax.predict(
            learner, result.meta, support, support.x, key=key, transductive=False
        )

    all_of_them(0)
    with compilations() as compiled:
        result, predictions = all_of_them(1)
    assert not compiled
    program.clear()
    again, same = all_of_them(1)
    assert equal(result.last, again.last)
    assert np.array_equal(predictions, same)


def test_what_tracing_does_to_variables_is_no_reason_to_compile_again():
    traced, count, done = [], 0, 0

    def loss(model, batch):
        nonlocal count
        count += 1
        traced.append(count)
        return mse(model, batch)

    for seed in range(3):
        ax.MAML(loss, 0.1).adapt(net(seed), batch(seed), key=KEY)
        ax.evaluate(ax.MAML(loss, 0.1), net(seed), TASKS.test, episodes=3, key=KEY)
        done = done if seed else len(traced)
    assert len(traced) == count == done


# Changes are seen


def test_models_of_flax_are_told_apart():
    from flax import nnx

    class Stack(nnx.Module):
        def __init__(self, depth, tied, seed):
            rngs = nnx.Rngs(seed)
            self.layers = nnx.List([nnx.Linear(1, 1, rngs=rngs) for _ in range(depth)])
            if tied:
                self.layers[-1].kernel = self.layers[0].kernel

        def __call__(self, x):
            for layer in self.layers:
                x = layer(x)
            return x

    def adapt(*which):
        return ax.MAML(mse, 0.1).adapt(Stack(*which), batch(), key=KEY)

    for depth, tied in ((2, False), (2, True), (3, True)):
        adapt(depth, tied, 0)
        with compilations() as compiled:
            adapted = adapt(depth, tied, 1)
        assert not [c for c in compiled if c["fun_name"] == "jit(_call)"]
        kernels = [layer.kernel for layer in adapted.layers]
        assert (kernels[0] is kernels[-1]) is tied
    assert len(program._programs) == 3


def test_a_variable_that_changes_is_seen():
    global scale
    learner = ax.MAML(lambda model, batch: scale * mse(model, batch), 0.1)
    scale = 1.0
    moved = learner.adapt(net(), batch(), key=KEY)
    scale = 0.0
    assert equal(learner.adapt(net(), batch(), key=KEY), net())
    assert not equal(moved, net())


@pytest.mark.parametrize("zero", [0.0, np.zeros(1), jnp.zeros(1)])
def test_what_a_loss_closes_over_is_seen(zero):
    def of(weight):
        loss = lambda model, batch: jnp.sum(weight * mse(model, batch))
        return ax.MAML(loss, 0.1).adapt(net(), batch(), key=KEY)

    assert not equal(of(zero + 1), net())
    assert equal(of(zero), net())


SETTINGS = {"scale": [1.0]}


@pytest.mark.parametrize(
    ("held", "of", "change"),
    [
        ([1.0], lambda held: held[0], lambda held, v: held.__setitem__(0, v)),
        ([[3], [1.0]], lambda held: held[1][0], lambda held, v: held[1].__setitem__(0, v)),
        ({"a": 1.0}, lambda held: held["a"], lambda held, v: held.update(a=v)),
        ({1}, lambda held: float(sum(held)), lambda held, v: (held.clear(), held.add(int(v)))),
        ([jnp.ones(1)], lambda held: held[0], lambda held, v: held.__setitem__(0, jnp.full(1, v))),
        (types.SimpleNamespace(a=1.0), lambda held: held.a, lambda held, v: setattr(held, "a", v)),
    ],
    ids=["list", "nested", "dict", "set", "arrays", "namespace"],
)
def test_a_container_that_changes_in_place_is_seen(held, of, change):
    loss = lambda model, batch: jnp.sum(of(held) * mse(model, batch))
    learner = ax.MAML(loss, 0.1)
    moved = learner.adapt(net(), batch(), key=KEY)
    with compilations() as compiled:
        learner.adapt(net(), batch(1), key=KEY)
    assert not compiled
    change(held, 0)
    assert equal(learner.adapt(net(), batch(), key=KEY), net())
    assert not equal(moved, net())


def test_a_global_container_and_a_variable_of_a_class_are_seen():
    class Scaled(Own):
        scale = 1.0

        def adapt(self, meta, support, *, key):
            rate = SETTINGS["scale"][0] * self.scale
            return ax.inner.descend(self.loss, meta["model"], support, lr=rate, steps=1, key=key)

    learner = Scaled(mse)
    adapt = lambda: learner.adapt(learner.init(net(), key=KEY), batch(), key=KEY)
    for rate in (1.0, 0.0, 1.0):
        SETTINGS["scale"][0] = rate
        assert equal(adapt(), net()) == (rate == 0)
    Scaled.scale = 0.0
    assert equal(adapt(), net())


def test_a_container_that_tracing_changes_is_compared_no_more():
    log, held = [], [1.0]

    def loss(model, batch):
        log.append(mse(model, batch))  # a tracer
        return held[0] * log[-1]

    held.append(loss)  # a circle
    learner = ax.MAML(loss, 0.1)
    moved = learner.adapt(net(), batch(), key=KEY)
    with compilations() as compiled:
        learner.adapt(net(), batch(1), key=KEY)
    assert not compiled
    held[0] = 0.0
    assert equal(learner.adapt(net(), batch(), key=KEY), net())
    assert not equal(moved, net())


def test_attributes_of_a_loss_are_seen():
    def of(kind):
        def loss(model, batch):
            return mse(model, batch)

        loss.kind = kind
        return program.call(lambda loss: jnp.asarray(float(loss.kind)), loss)

    assert [of(1), of(2), of(1)] == [1, 2, 1]


def test_numbers_that_compare_equal_are_told_apart():
    of = lambda value: program.call(lambda: jnp.array(value))
    assert [str(of(0.0)), str(of(-0.0))] == ["0.0", "-0.0"]
    assert [of(value).dtype for value in (1, True, 1.0)] == [jnp.int32, bool, jnp.float32]


def test_precision_is_seen():
    with jax.enable_x64(True):
        wide = ax.MAML(mse, 0.1).adapt(net(), batch(), key=KEY)
    narrow = ax.MAML(mse, 0.1).adapt(net(), batch(), key=KEY)
    assert {leaf.dtype for leaf in leaves(wide)} == {jnp.dtype("float64")}
    assert {leaf.dtype for leaf in leaves(narrow)} == {jnp.dtype("float32")}


@pytest.mark.filterwarnings("ignore:A JAX array is being set as static")
def test_an_array_in_a_static_field_is_a_constant():
    class Fixed(eqx.Module):
        values: tuple = eqx.field(static=True)

        def __call__(self, x):
            return x * self.values[0]

    call = lambda value: program.call(lambda f, x: f(x), Fixed((value,)), jnp.ones(2))
    assert np.array_equal(call(jnp.full(2, 3.0)), [3, 3])
    assert np.array_equal(call(jnp.full(2, 4.0)), [4, 4])
    assert np.array_equal(call(np.full(2, 5.0)), [5, 5])
    assert np.array_equal(call(np.full(20_000, 6.0)[:2]), [6, 6])


# What cannot be compiled, or not kept


class Lookup:
    """A source of the user's own, no pytree, whose answers differ."""

    def __init__(self):
        self.batches = iter([batch(0), batch(1)])

    def draw(self, model, key):
        return next(self.batches)


def test_a_source_that_is_no_pytree_is_asked_every_time():
    learner, source = ax.MAML(mse, 0.1), Lookup()
    for seed in range(2):
        adapted = learner.adapt(net(), source, key=KEY)
        for a, b in zip(leaves(adapted), leaves(plain(learner, net(), batch(seed))), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6)


class ByValue(ax.Adapter):
    """Steps by the values of the support, which no program can."""

    loss: ax.Loss = eqx.field(static=True, default=mse)
    log: list = eqx.field(static=True, default_factory=list)

    def adapt(self, meta, support, *, key):
        steps = int(np.sum(np.asarray(support.y) > 0))
        return ax.inner.descend(self.loss, meta, support, lr=0.1, steps=steps, key=key)


def test_what_asks_for_values_runs_as_it_is_written():
    for seed in range(3):
        adapted = ByValue().adapt(net(), batch(seed), key=KEY)
        assert equal(adapted, plain(ByValue(), net(), batch(seed)))


@pytest.mark.filterwarnings("ignore:A JAX array is being set as static")
def test_what_cannot_be_compared_is_not_kept():
    class Odd(Own):
        rates: list = eqx.field(static=True, default_factory=lambda: [np.zeros((200, 200)), {1}])

    learner, meta = Odd(mse), Own(mse).init(net(), key=KEY)
    for a, b in zip(
        leaves(learner.adapt(meta, batch(), key=KEY)), leaves(plain(learner, meta, batch())),
        strict=True,
    ):  # fmt: skip
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_errors_are_those_of_the_function():
    with pytest.raises(ValueError, match="0 or more steps, not -1"):
        ax.MAML(mse, 0.1, -1).adapt(net(), batch(), key=KEY)


def test_within_a_transformation_a_call_is_a_plain_one():
    learner = ax.MAML(mse, 0.1, 2)
    one = lambda b: learner.adapt(net(), b, key=KEY).head.weight
    batches = jax.tree.map(lambda *each: jnp.stack(each), batch(0), batch(1))
    mapped = jax.vmap(one)(batches)
    rated = jax.vmap(lambda lr: ax.MAML(mse, lr).adapt(net(), batch(), key=KEY).head.weight)
    weighed = jax.vmap(
        lambda w: ax.MAML(lambda m, b: w * mse(m, b), 0.1).adapt(net(), batch(), key=KEY)
    )
    assert not program._programs
    for i in range(2):
        np.testing.assert_allclose(mapped[i], one(batch(i)), rtol=1e-5, atol=1e-7)
    slope = jax.grad(lambda lr: jnp.sum(rated(lr[None])))(jnp.array(0.1))
    assert 0 < abs(slope) < jnp.inf
    assert equal(ax.tree.at(weighed(jnp.zeros(1)), 0), net())


# Bounded, and nothing kept


def test_only_so_many_programs_are_kept():
    times = lambda x, steps: x * steps
    for steps in range(program.LIMIT + 3):
        program.call(times, jnp.ones(1), steps)
    assert len(program._programs) == program.LIMIT
    with compilations() as compiled:
        program.call(times, jnp.ones(1), program.LIMIT + 2)
    assert not compiled


def images(seed):
    pixels = np.random.default_rng(seed).integers(0, 255, (24, 6, 6, 1), np.uint8)
    labels = np.repeat(np.arange(8), 3)
    return pixels, labels


@pytest.mark.parametrize("budget", [2**30, 0], ids=["device", "host"])
def test_no_data_is_kept(budget):
    from adaptax.tasks.bank import designs, make_splits

    pixels = np.random.default_rng(0).integers(0, 255, (24, 6, 6, 1), np.uint8)
    names = {"train": range(4), "val": range(4, 6), "test": range(6, 8)}
    classes = {s: {str(c): np.arange(3 * c, 3 * c + 3) for c in some} for s, some in names.items()}
    tasks = make_splits(
        pixels, classes, designs(2, 1, 2, None, None), name="noise", memory_budget=budget
    )
    model = ax.Functional(
        {"w": jnp.zeros((36, 2))}, lambda params, x: x.reshape(len(x), -1) @ params["w"]
    )
    learner = ax.MAML(ax.losses.cross_entropy, 0.1)
    result = ax.fit(learner, model, tasks.train, steps=2, meta_batch=2, key=KEY, validate=tasks.val)
    ax.evaluate(learner, result.meta, tasks.test, episodes=3, key=KEY)
    kept = [tasks.train.bank, tasks.test.bank, result.meta.params["w"], model.params["w"]]
    kept = [weakref.ref(data) for data in kept]
    assert program._programs
    del tasks, model, result, pixels
    gc.collect()
    assert [data() for data in kept] == [None] * len(kept)


def test_the_data_of_a_loss_goes_with_it():
    def once():
        weights = jnp.ones(1)
        loss = lambda model, batch: jnp.sum(weights * mse(model, batch))
        ax.MAML(loss, 0.1).adapt(net(), batch(), key=KEY)

    once()
    gc.collect()
    ax.MAML(mse, 0.1).adapt(net(), batch(), key=KEY)
    assert len(program._programs) == 1


def maps():
    return len(Path("/proc/self/maps").read_text().splitlines())


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="Linux counts memory maps")
def test_nothing_grows(tmp_path):
    """A short form of `benchmarks/leaks.py`."""

    def calls(first, last):
        for i in range(first, last):
            learner, key = ax.MAML(lambda model, batch: mse(model, batch), 0.1), jax.random.key(i)
            learner.adapt(net(i), batch(i), key=key)
            ax.evaluate(learner, net(i), TASKS.test, episodes=3, key=key)
            ax.fit(
                learner, net(i), TASKS.train, steps=2, meta_batch=2, chunk=1, key=key,
                run=str(tmp_path / str(i)),
            )  # fmt: skip
        gc.collect()
        return threading.active_count(), len(os.listdir("/proc/self/fd")), maps()

    threads, files, before = calls(0, 3)
    now = calls(3, 18)
    assert now[:2] == (threads, files)
    assert now[2] < before + 15  # a program has hundreds

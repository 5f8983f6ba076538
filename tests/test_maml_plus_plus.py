"""MAML++: each of its six parts, the numbers and learners that it reduces to, and the heads."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax import lax

import adaptax as ax
from adaptax import MAMLPlusPlus, testing
from adaptax.algorithms.maml_plus_plus import multi_step_weights
from learners import LEARNERS, ConvNet, Images, cross_entropy, mse
from references import check_meta_gradient

KEY = jax.random.key(0)
pytestmark = pytest.mark.usefixtures("x64")

CODE = {"per_step_batch_norm_statistics": "code"}
OFF = {
    "multi_step_loss": 0.0, "derivative_order_annealing": 0.0,
    "per_step_batch_norm_statistics": None, "per_step_batch_norm_weights": False,
    "learned_rates": False, "cosine_annealing": False,
}  # fmt: skip


def only(loss, steps=2, lr=0.1, **parts):
    """MAML++ with these parts alone."""
    return MAMLPlusPlus(loss, lr, steps, **{**OFF, **parts})


def doubled(tree):
    return jax.tree.map(lambda a: jnp.asarray(a, float) if eqx.is_inexact_array(a) else a, tree)


def assert_close(found, expected, rtol=1e-12):
    pairs = list(zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True))
    size = sum(float(np.sum(np.square(b))) for _, b in pairs) ** 0.5
    for a, b in pairs:
        assert np.max(np.abs(a - b), initial=0) <= rtol * size


def same(a, b):
    """Equal to the bit."""
    pairs = zip(*(jax.tree.leaves(eqx.filter(t, eqx.is_array)) for t in (a, b)), strict=True)
    return all(np.array_equal(x, y) for x, y in pairs)


def different(a, b, by=1e-6):
    return np.max(np.abs(a - b)) > by


# Quadratics: support ½·2 (θ − 1)², query ½·3 (θ + 1)², θ_0 = ½, rates .1 and .2


def quadratic(model, batch):
    return jnp.mean(batch.x * (model.params - batch.y) ** 2) / 2


def well(curvature, centre):
    return ax.Batch(jnp.array([[curvature]], float), jnp.array([[centre]], float))


WELLS = (2.0, 1.0), (3.0, -1.0)
RATES = (0.1, 0.2)


@functools.cache
def compiled(learner):
    def gradient(theta, rates, progress):
        meta = learner.init(ax.Functional(theta, lambda params, x: params), key=KEY)
        if learner.learned_rates:
            meta["rates"] = {"params": rates}
        task = ax.Task(well(*WELLS[0]), well(*WELLS[1]))
        loss = lambda meta: learner.meta_loss(meta, task, key=KEY, progress=progress)[0]
        value, grads = jax.value_and_grad(loss)(meta)
        return value, grads["model"].params[0], grads.get("rates", {}).get("params")

    return jax.jit(gradient)


def golden(learner, progress=1.0, rates=RATES):
    """Meta-loss, derivative by θ_0, derivatives by the rates."""
    return compiled(learner)(jnp.array([0.5]), jnp.array(rates, float), progress)


def test_learned_rates_of_a_quadratic():
    learner = only(quadratic, learned_rates=True)
    loss, by_theta, by_rates = golden(learner)
    assert np.allclose(loss, 4.6464, rtol=1e-14)
    assert np.allclose(by_theta, 2.5344, rtol=1e-13)
    assert np.allclose(by_rates, [3.168, 4.224], rtol=1e-13)
    meta = learner.init(ax.Functional(jnp.zeros(1), lambda params, x: params), key=KEY)
    assert meta["rates"]["params"].shape == (2,)  # and none for a step that is never taken


def test_multi_step_loss_of_a_quadratic():
    learner = only(quadratic, learned_rates=True, multi_step_loss=0.5)
    loss, by_theta, _ = golden(learner, 0.0)
    assert np.allclose([loss, by_theta], [4.2432, 3.1872], rtol=1e-13)
    for progress, first in ((0.1, 0.4), (0.25, 0.25), (0.4, 0.1), (0.499, 0.015)):
        loss, by_theta, by_rates = golden(learner, progress)
        last = 1 - first
        assert np.allclose(loss, first * 3.84 + last * 4.6464, rtol=1e-13)
        assert np.allclose(by_theta, first * 3.84 + last * 2.5344, rtol=1e-13)
        assert np.allclose(by_rates, [first * 4.8 + last * 3.168, last * 4.224], rtol=1e-13)
    for progress in (0.5, 0.75, 1.0):  # the last step alone, without the formula's floor
        assert np.allclose(golden(learner, progress)[0], 4.6464, rtol=1e-14)
    always = only(quadratic, learned_rates=True, multi_step_loss=1.0)
    assert np.allclose(golden(always, 1.0)[0], 0.015 * 3.84 + 0.985 * 4.6464, rtol=1e-13)
    assert np.allclose(golden(only(quadratic, 1, multi_step_loss=1.0), 0.3)[0], 3.84, rtol=1e-14)


def test_four_phases_of_a_quadratic():
    """First order or second, every step or the last."""
    for order, multi, phases in (
        (0.3, 0.6, [("first", 0.5), ("second", 0.5 * (1 - 0.3 / 0.6)), ("second", 0.0)]),
        (0.6, 0.3, [("first", 0.5), ("first", 0.0), ("second", 0.0)]),
    ):
        learner = only(
            quadratic, learned_rates=True, derivative_order_annealing=order, multi_step_loss=multi
        )
        for progress, (kind, first) in zip((0.0, 0.3, 0.6), phases):
            loss, by_theta, by_rates = golden(learner, progress)
            a, b = (4.8, 5.28) if kind == "first" else (3.84, 2.5344)
            assert np.allclose(loss, first * 3.84 + (1 - first) * 4.6464, rtol=1e-13)
            assert np.allclose(by_theta, first * a + (1 - first) * b, rtol=1e-13)
            b = 5.28 if kind == "first" else 3.168
            assert np.allclose(
                by_rates, [first * 4.8 + (1 - first) * b, (1 - first) * 4.224], rtol=1e-13
            )
    for order, slope in ((0.0, 2.5344), (1.0, 5.28)):
        learner = only(quadratic, learned_rates=True, derivative_order_annealing=order)
        for progress in (0.0, 1.0):
            assert np.allclose(golden(learner, progress)[1], slope, rtol=1e-13)


def test_schedules_may_move_from_epoch_to_epoch():
    parts = {"learned_rates": True, "multi_step_loss": 0.4, "derivative_order_annealing": 0.2}
    smooth, stepped = only(quadratic, **parts), only(quadratic, **parts, epochs=10)
    for progress, epoch in ((0.0, 0.0), (0.05, 0.0), (0.1999, 0.1), (0.39, 0.3), (0.4, 0.4)):
        assert np.allclose(golden(stepped, progress)[:2], golden(smooth, epoch)[:2], rtol=1e-13)
    assert different(golden(smooth, 0.05)[0], golden(smooth, 0.0)[0])


def test_negative_rates_are_kept():
    learner = only(quadratic, learned_rates=True)
    model = ax.Functional(jnp.array([0.5]), lambda params, x: params)
    meta = {**learner.init(model, key=KEY), "rates": {"params": jnp.array([-0.1, 0.2])}}
    path = learner.iterates(meta, well(*WELLS[0]), key=KEY).params[:, 0]
    assert np.allclose(path, [0.5, 0.4, 0.64], rtol=1e-14)
    assert np.allclose(learner.adapt(meta, well(*WELLS[0]), key=KEY).params, 0.64, rtol=1e-14)
    # A rate that the outer loop takes through zero goes on below it.
    meta["rates"] = {"params": jnp.array([1e-4, 0.2])}
    rule = learner.optimizer(10)
    grads = jax.tree.map(jnp.ones_like, ax.tree.parameters(meta))
    updates, _ = rule.update(grads, rule.init(ax.tree.parameters(meta)))
    meta = eqx.apply_updates(meta, updates)
    assert np.allclose(meta["rates"]["params"], [-9e-4, 0.199], rtol=1e-6)
    path = learner.iterates(meta, well(*WELLS[0]), key=KEY).params[:, 0]
    assert path[1] < path[0] < path[2]


# The weights of the multi-step loss


def test_golden_weights_of_the_multi_step_loss():
    for epoch, early, last in (
        (0, 0.2, 0.2), (7, 0.106667, 0.573333), (14, 0.013333, 0.946667), (15, 0.006, 0.976),
        (40, 0.006, 0.976),
    ):  # fmt: skip
        assert np.allclose(multi_step_weights(5, epoch / 15), [early] * 4 + [last], atol=5e-7)


def test_the_weights_sum_to_one():
    fractions = jnp.array([e / epochs for epochs in (1, 15, 50) for e in range(epochs + 2)])
    for steps in (1, 2, 3, 5, 10):
        weights = jax.jit(jax.vmap(functools.partial(multi_step_weights, steps)))(fractions)
        assert weights.shape == (len(fractions), steps)
        assert np.allclose(np.sum(weights, axis=1), 1, rtol=1e-14)
        assert np.all(np.asarray(weights) > 0)


# Cosine annealing


def outer_rates(learner, steps):
    """The outer rate at every step: what Adam moves by while the gradient is 1."""
    rule = learner.optimizer(steps)

    def step(state, _):
        update, state = rule.update(jnp.ones(()), state)
        return state, -update

    with jax.enable_x64(False):  # as meta-training counts
        return np.asarray(
            jax.jit(lambda: lax.scan(step, rule.init(jnp.ones(())), None, steps + 1))()[1]
        )


def test_the_outer_rate_follows_a_cosine_of_the_epoch():
    each = 3
    rates = outer_rates(only(quadratic, cosine_annealing=True, epochs=100), 100 * each)
    for epoch, rate in ((0, 1e-3), (25, 8.55018e-4), (50, 5.05e-4), (75, 1.54982e-4), (100, 1e-5)):
        assert np.allclose(rates[epoch * each], rate, rtol=2e-5)
    formula = 1e-5 + (1e-3 - 1e-5) * (1 + np.cos(np.pi * np.arange(100) / 100)) / 2
    assert np.allclose(rates[:-1], np.repeat(formula, each), rtol=1e-4)


def test_the_outer_rate_follows_a_cosine_of_the_step():
    learner = only(quadratic, cosine_annealing=True, outer_lr=0.02, outer_lr_min=0.004)
    formula = 0.004 + (0.02 - 0.004) * (1 + np.cos(np.pi * np.arange(41) / 40)) / 2
    assert np.allclose(outer_rates(learner, 40), formula, rtol=1e-4)
    assert np.allclose(outer_rates(only(quadratic, outer_lr=0.02), 40), 0.02, rtol=1e-4)


@pytest.mark.parametrize("total", [100, 150, 250])
def test_no_epoch_is_late_by_rounding(total):
    """`step / steps` in single precision, compiled, falls short of the boundary now and then."""
    learner = only(quadratic, multi_step_loss=0.2, derivative_order_annealing=0.1, epochs=total)
    with jax.enable_x64(False):
        place = lambda step: (learner._in_epochs(step / (3 * total)), learner._phase(
            learner._in_epochs(step / (3 * total))
        ))  # fmt: skip
        progress, phase = jax.jit(jax.vmap(place))(jnp.arange(3 * total))
    epoch = np.repeat(np.arange(total), 3)
    assert np.array_equal(np.round(progress * total), epoch)
    assert np.array_equal(phase, 0 + (epoch >= total // 10) + (epoch >= total // 5))


def test_the_gradient_is_clipped_but_not_the_rates_nor_the_statistics():
    learner = MAMLPlusPlus(quadratic, clip=10.0, cosine_annealing=False, **CODE)
    meta = {"model": jnp.zeros(3), "norm_statistics": {"norm/mean": jnp.zeros((5, 1))},
            "rates": {"": jnp.zeros(5)}}  # fmt: skip
    free = optax.adam(1e-3)
    free_state = free.init(meta["rates"])
    rule, plain = learner.optimizer(10), optax.chain(optax.clip(10.0), optax.adam(1e-3))
    state, plain_state = rule.init(meta), plain.init(meta["model"])
    for size in (1e6, 1.0):
        grads = {"model": jnp.array([size, -1.0, 2.0]),
                 "norm_statistics": {"norm/mean": jnp.full((5, 1), size)},
                 "rates": {"": jnp.full(5, size)}}  # fmt: skip
        updates, state = rule.update(grads, state, meta)
        rates, free_state = free.update(grads["rates"], free_state)
        assert np.allclose(updates["rates"][""], rates[""], rtol=1e-14)
        expected, plain_state = plain.update(grads["model"], plain_state)
        assert np.allclose(updates["model"], expected, rtol=1e-14)
        assert np.allclose(updates["norm_statistics"]["norm/mean"], -size, rtol=1e-14)
    unbounded = MAMLPlusPlus(quadratic, cosine_annealing=False, **CODE).optimizer(10)
    state = unbounded.init(meta)
    for size in (1e6, 1.0):
        grads["model"] = jnp.array([size, -1.0, 2.0])
        updates, state = unbounded.update(grads, state, meta)
    assert different(updates["model"][0], expected[0])


# Reductions


def conv_net():
    return doubled(ConvNet(jax.random.key(5)))


def perceptron():
    return ax.models.MLP(1, 1, (6, 6), key=KEY, activation=jnp.tanh)


@functools.cache
def images(count=3):
    with jax.ensure_compile_time_eval():  # kept, whoever asks first, inside a trace or not
        return jax.vmap(Images().sample)(jax.random.split(KEY, count))


@functools.cache
def waves(count=3):
    sample = ax.tasks.sinusoid(shot=5, query=7).train.sample
    with jax.ensure_compile_time_eval():
        return jax.vmap(sample)(jax.random.split(KEY, count))


def gradients(learner, model, tasks, at=(1.0,), **how):
    """Meta-loss and meta-gradient at several points of meta-training."""
    meta = learner.init(model, key=KEY)
    run = lambda now: ax.meta_value_and_grad(learner, meta, tasks, key=KEY, progress=now, **how)
    (values, _), grads = jax.jit(lambda now: lax.map(run, now))(jnp.array(at))
    return [jax.tree.map(lambda leaf, i=i: leaf[i], (values, grads)) for i in range(len(at))]


def test_with_every_part_off_it_is_maml_to_the_bit():
    ours, theirs = only(cross_entropy, 3), ax.MAML(cross_entropy, 0.1, 3)
    assert set(ours.init(conv_net(), key=KEY)) == {"model"}
    trained = [
        ax.fit(learner, conv_net(), Images(), steps=4, meta_batch=2, key=KEY, devices=1)
        for learner in (ours, theirs)
    ]
    assert same(trained[0].meta["model"], trained[1].meta)
    assert not same(trained[0].meta["model"], conv_net())
    for name in ("loss", "gradient_norm"):
        assert trained[0].history[0][name] == trained[1].history[0][name]
    task = jax.tree.map(lambda leaf: leaf[0], images())
    predictions = [
        eqx.filter_jit(learner.adapt)(run.meta, task.support, key=KEY)(task.query.x)
        for learner, run in zip((ours, theirs), trained)
    ]
    assert same(*predictions)


def test_equal_rates_make_maml():
    ours, theirs = only(cross_entropy, 3, learned_rates=True), ax.MAML(cross_entropy, 0.1, 3)
    value, grads = gradients(ours, conv_net(), images())[0]
    expected, expected_grads = gradients(theirs, conv_net(), images())[0]
    assert_close((value, grads["model"]), (expected, expected_grads))
    assert {path: leaf.shape for path, leaf in grads["rates"].items()} == {
        "conv/weight": (3,), "conv/bias": (3,), "head/weight": (3,), "head/bias": (3,),
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["perceptron", "convolutions"])
def test_derivative_order_annealing_goes_from_fomaml_to_maml(kind):
    loss, model, tasks = {
        "perceptron": (mse, perceptron(), waves()),
        "convolutions": (cross_entropy, conv_net(), images()),
    }[kind]
    ours = only(loss, 3, derivative_order_annealing=0.3)
    before, just, after = gradients(ours, model, tasks, (0.0, 0.2999, 0.3))
    first = gradients(ax.FOMAML(loss, 0.1, 3), model, tasks)[0]
    exact = gradients(ax.MAML(loss, 0.1, 3), model, tasks)[0]
    for found in (before, just):
        assert_close((found[0], found[1]["model"]), first)
    assert_close((after[0], after[1]["model"]), exact)
    assert different(before[1]["model"].head.weight, after[1]["model"].head.weight, 1e-3)


def equations(jaxpr):
    """Every equation, those inside others too."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.tree.leaves(list(equation.params.values())):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def products(jaxpr):
    return sum(equation.primitive.name == "dot_general" for equation in equations(jaxpr))


def traced(learner, model, tasks):
    meta = learner.init(model, key=KEY)
    params, rest = eqx.partition(meta, eqx.is_inexact_array)
    gradient = lambda params, now: ax.meta_value_and_grad(
        learner, eqx.combine(params, rest), tasks, key=KEY, progress=now, mapping="scan"
    )
    return jax.make_jaxpr(lambda *a: eqx.filter(gradient(*a), eqx.is_array))(params, 0.0).jaxpr


@pytest.mark.parametrize("parts", [OFF, CODE], ids=["alone", "with all others"])
def test_no_second_order_graph_before_the_threshold(parts):
    """The meta-gradient is one switch, and its first branch does what FOMAML does."""
    model = ax.models.MLP(16, 2, (4, 4), key=KEY, activation=jnp.tanh, batch_norm=True)
    tasks = images()
    make = lambda order: MAMLPlusPlus(
        cross_entropy,
        0.1,
        3,
        **{**parts, "derivative_order_annealing": order, "multi_step_loss": 0.0},
    )
    jaxpr = traced(make(0.5), model, tasks)
    switches = [e for e in equations(jaxpr) if e.primitive.name == "cond"]
    assert len(switches) == 1  # differentiated as a whole, it would be two
    (switch,) = switches
    leaves = jax.tree.leaves(ax.tree.parameters(make(0.5).init(model, key=KEY)))
    assert len(switch.outvars) == 1 + len(leaves)  # value and gradient, nothing kept for later
    first, second = (products(branch.jaxpr) for branch in switch.params["branches"])
    assert first == products(traced(ax.FOMAML(cross_entropy, 0.1, 3), model, tasks))
    assert second == products(traced(make(0.0), model, tasks))
    assert second > first


# All parts together, against a loop written by hand

STEPS = 3
AT = (0.0, 0.3, 0.9)  # first order and every step, second order and every step, the last step


class Flax(nnx.Module):
    """The layers of `ConvNet`, by Flax NNX."""

    def __init__(self, rngs):
        self.conv = nnx.Conv(1, 2, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(2, rngs=rngs)
        self.head = nnx.Linear(2, 2, rngs=rngs)

    def __call__(self, x):
        return self.head(jnp.mean(jnp.tanh(self.norm(self.conv(x))), axis=(1, 2)))


class Kind:
    """A model, what its leaves are called, and the same network written out."""

    def __init__(self, build, names, stride, momentum, eps):
        self.build, self.stride, self.momentum, self.eps = build, stride, momentum, eps
        self.body, self.gamma, self.beta, self.mean, self.var = names[:4], *names[4:]

    def net(self, params, gamma, beta, x, statistics=None):
        kernel, bias, head, head_bias = params
        strides, layout = (self.stride,) * 2, ("NHWC", "HWIO", "NHWC")
        z = lax.conv_general_dilated(x, kernel, strides, "SAME", dimension_numbers=layout) + bias
        seen = jnp.mean(z, (0, 1, 2)), jnp.var(z, (0, 1, 2))
        mean, var = seen if statistics is None else statistics
        y = gamma * (z - mean) / jnp.sqrt(var + self.eps) + beta
        return jnp.mean(jnp.tanh(y), (1, 2)) @ head + head_bias, seen

    def loss(self, params, gamma, beta, batch, statistics=None):
        logits, seen = self.net(params, gamma, beta, batch.x, statistics)
        return -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(len(batch.y)), batch.y]), seen

    def taken_apart(self, meta):
        """Adapted parameters, rates in their order, rows of γ and β, rows of statistics."""
        leaves = ax.tree.by_path(meta["model"])
        return (
            [leaves[name] for name in self.body], [meta["rates"][name] for name in self.body],
            [meta["norm_weights"][name] for name in (self.gamma, self.beta)],
            [meta["norm_statistics"][name] for name in (self.mean, self.var)],
        )  # fmt: skip

    def meta_loss(self, params, rates, norm, statistics, task, weights, order):
        """The meta-loss, and the rows after the support passes and after the query passes too.

        Its derivative is exact for order 1, and of first order for order 0.
        """
        total, after_support, after_query = 0.0, [], []
        for j in range(STEPS):
            gamma, beta = (rows[j] for rows in norm)
            slope = jax.value_and_grad(self.loss, has_aux=True)
            (_, seen), g = slope(params, gamma, beta, task.support)
            g = [lax.stop_gradient(d) + order * (d - lax.stop_gradient(d)) for d in g]
            params = [p - rate[j] * d for p, rate, d in zip(params, rates, g)]
            value, seen_then = self.loss(params, gamma, beta, task.query)
            total += weights[j] * value
            move = lambda old, new: [
                self.momentum * o + (1 - self.momentum) * n for o, n in zip(old, new)
            ]
            after_support.append(move([rows[j] for rows in statistics], seen))
            after_query.append(move(after_support[-1], seen_then))
        stacked = [[jnp.stack(rows) for rows in zip(*a)] for a in (after_support, after_query)]
        return total, stacked

    def adapted(self, params, rates, norm, statistics, support, x, steps, stored):
        """Predictions after every step, by what is stored or by the batch; steps by the batch."""
        shown = []
        for j in range(-1, steps):
            row = min(max(j, 0), STEPS - 1)
            gamma, beta, *rows = (rows[row] for rows in (*norm, *statistics))
            rows = rows if stored else None
            if j >= 0:
                g = jax.grad(lambda p: self.loss(p, gamma, beta, support, None)[0])(params)  # noqa: B023
                params = [p - rate[row] * d for p, rate, d in zip(params, rates, g)]
            shown.append(self.net(params, gamma, beta, x, rows)[0])
        return jnp.stack(shown)


KINDS = {
    "ours": Kind(
        conv_net,
        ("conv/weight", "conv/bias", "head/weight", "head/bias",
         "norm/scale", "norm/shift", "norm/mean", "norm/var"),
        2, 0.9, 1e-3,
    ),
    "flax": Kind(
        lambda: doubled(Flax(nnx.Rngs(0))),
        tuple(f"{name}/value" for name in (
            "conv/kernel", "conv/bias", "head/kernel", "head/bias",
            "norm/scale", "norm/bias", "norm/mean", "norm/var")),
        1, 0.99, 1e-5,
    ),
}  # fmt: skip


def started(kind, **how):
    """A learner and meta-parameters, all of whose rows and rates differ."""
    how = {"multi_step_loss": 0.5, "derivative_order_annealing": 0.2, **CODE, **how}
    learner = MAMLPlusPlus(cross_entropy, 0.1, STEPS, **how)
    meta = learner.init(KINDS[kind].build(), key=KEY)
    rng = np.random.default_rng(7)
    for name in ("rates", "norm_weights", "norm_statistics"):
        for path in sorted(meta[name]):
            noise = rng.uniform(-0.2, 0.4, meta[name][path].shape)
            meta[name] = {**meta[name], path: meta[name][path] + noise}
    return learner, meta


@functools.cache
def found(kind, mapping="scan"):
    """Meta-loss and meta-gradient at every point of `AT`."""
    learner, meta = started(kind, meta_gradient="checkpoint=1" if mapping == "scan" else "auto")
    run = lambda now: ax.meta_value_and_grad(
        learner, meta, images(), key=KEY, progress=now, mapping=mapping, fast_path=mapping == "scan"
    )
    (values, _), grads = jax.jit(lambda now: lax.map(run, now))(jnp.array(AT))
    return {at: jax.tree.map(lambda leaf, i=i: leaf[i], (values, grads)) for i, at in enumerate(AT)}


@functools.cache
def expected(kind):
    """The same by hand, and the rows after it."""
    _, meta = started(kind)
    *trained, statistics = KINDS[kind].taken_apart(meta)

    @jax.jit
    @jax.vmap
    def run(weights, order):
        def mean(trained):
            one = lambda task: KINDS[kind].meta_loss(*trained, statistics, task, weights, order)
            return jax.tree.map(lambda leaf: leaf.mean(axis=0), jax.vmap(one)(images()))

        return jax.value_and_grad(mean, has_aux=True)(trained)

    weights = [multi_step_weights(STEPS, at / 0.5) if at < 0.5 else [0, 0, 1] for at in AT]
    (values, (support, query)), grads = run(jnp.array(weights, float), jnp.array([0.0, 1, 1]))
    rows = {at: [leaf[i] for leaf in query] for i, at in enumerate(AT)}
    last = jnp.arange(STEPS)[:, None] == STEPS - 1
    rows[0.9] = [jnp.where(last, *(leaf[2] for leaf in both)) for both in zip(query, support)]
    return {
        at: (values[i], jax.tree.map(lambda leaf, i=i: leaf[i], grads), rows[at])
        for i, at in enumerate(AT)
    }


BOTH = pytest.mark.parametrize("kind", KINDS)


@BOTH
def test_meta_loss_by_hand(kind):
    for at in AT:
        assert np.allclose(found(kind)[at][0], expected(kind)[at][0], rtol=1e-13)


@BOTH
def test_meta_gradient_by_hand(kind):
    """By the model, the rates and batch normalisation's weights, in every phase."""
    for at in AT:
        params, rates, norm, _ = KINDS[kind].taken_apart(found(kind)[at][1])
        assert_close([params, rates, norm], expected(kind)[at][1], rtol=1e-11)


@BOTH
def test_running_statistics_by_hand(kind):
    """The support pass of step j and its query pass move row j; the mean over the meta-batch."""
    learner, meta = started(kind)
    rule, before = learner.optimizer(10), ax.tree.parameters(meta)
    for at in AT:
        updates, _ = rule.update(found(kind)[at][1], rule.init(before), before)
        after = KINDS[kind].taken_apart(eqx.apply_updates(meta, updates))[-1]
        for rows, by_hand, old in zip(
            after, expected(kind)[at][2], KINDS[kind].taken_apart(meta)[-1]
        ):
            assert np.allclose(rows, by_hand, rtol=1e-13, atol=1e-15)
            assert np.all(rows != old)


def test_every_way_of_mapping_moves_the_statistics_alike():
    """One task after another with remat and the fast convolution, or all at once without."""
    for at in AT:
        assert_close(found("ours", "vmap")[at], found("ours")[at], rtol=1e-11)


# Steps and rows


def test_a_step_that_does_nothing_leaves_its_weights_without_a_gradient():
    """γ_j is seen by the passes of step j alone."""
    learner, meta = started("ours", multi_step_loss=0.0, derivative_order_annealing=0.0)

    def sizes(rates):
        given = {**meta, "rates": {p: leaf * rates for p, leaf in meta["rates"].items()}}
        _, grads = ax.meta_value_and_grad(learner, given, images(), key=KEY)
        return [jnp.abs(leaf).max(axis=1) for leaf in grads["norm_weights"].values()]

    rates = jnp.array([[1.0, 1, 1], [0, 1, 1], [1, 0, 1], [1, 1, 0], [0, 0, 0]])
    for leaf in jax.jit(lambda: lax.map(sizes, rates))():
        moved = [[1, 1, 1], [0, 1, 1], [1, 0, 1], [1, 1, 1], [0, 0, 1]]
        assert np.array_equal(leaf > 1e-7, np.array(moved, bool))
        assert np.all((leaf > 1e-7) | (leaf == 0))


@BOTH
@pytest.mark.parametrize("statistics", ["paper", "code"])
def test_adaptation_by_hand(kind, statistics):
    """Also for more steps than were trained: they repeat the last row."""
    learner, meta = started(kind, per_step_batch_norm_statistics=statistics, eval_steps=5)
    support, query = jax.tree.map(lambda leaf: leaf[0], (images().support, images().query))
    kept = jax.tree.map(lambda leaf: np.array(leaf), eqx.filter(meta, eqx.is_array))

    @jax.jit
    def predictions():
        path = learner.iterates(meta, support, key=KEY)
        shown = jax.vmap(lambda model: model(query.x))(path)
        return shown, learner.adapt(meta, support, key=KEY)(query.x)

    shown, last = predictions()
    by_hand = jax.jit(
        lambda: KINDS[kind].adapted(
            *KINDS[kind].taken_apart(meta), support, query.x, 5, statistics == "paper"
        )
    )()
    assert_close(shown, by_hand)
    assert_close(last, by_hand[-1])
    assert same(meta, kept)


def test_the_paper_normalises_by_the_rows_in_evaluation_and_the_code_does_not():
    support, query = jax.tree.map(lambda leaf: leaf[0], (images().support, images().query))
    others = query.x.at[1:].add(1.0)
    for statistics, sees_rows in (("paper", True), ("code", False)):
        learner, meta = started("ours", per_step_batch_norm_statistics=statistics)

        @jax.jit
        def predict(rows, x, learner=learner, meta=meta):
            given = {**meta, "norm_statistics": rows}
            return learner.adapt(given, support, key=KEY)(x)

        rows = meta["norm_statistics"]
        shown = predict(rows, query.x)
        moved = predict({p: leaf + 0.5 for p, leaf in rows.items()}, query.x)
        assert different(shown, moved) is np.bool_(sees_rows)
        alone = different(shown[0], predict(rows, others)[0], 1e-9)
        assert alone is np.bool_(not sees_rows)  # a query sees the others, or it does not


def test_evaluation_changes_nothing():
    """Not even a model that changes itself in place."""
    learner, meta = started("flax")
    kept = jax.tree.map(lambda leaf: np.array(leaf), eqx.filter(meta, eqx.is_array))
    tasks = Images(split="test")
    ax.evaluate(learner, meta, tasks, episodes=2, key=KEY, transductive=False)
    assert same(meta, kept)
    adapted = eqx.filter_jit(learner.adapt)(
        meta, jax.tree.map(lambda leaf: leaf[0], images().support), key=KEY
    )
    x = images().query.x[0]
    first = adapted(x)
    assert same(first, adapted(x))


# Meta-training


def test_meta_training_changes_every_part():
    """With a model of Flax NNX."""
    kind = KINDS["flax"]
    learner = MAMLPlusPlus(
        cross_entropy, 0.1, 2, multi_step_loss=1.0, derivative_order_annealing=1.0,
        per_step_batch_norm_statistics="paper",
    )  # fmt: skip
    start = learner.init(kind.build(), key=KEY)
    meta = ax.fit(learner, kind.build(), Images(), steps=8, meta_batch=2, key=KEY, devices=1).meta
    for before, after in zip(*map(kind.taken_apart, (start, meta))):
        for i, (old, new) in enumerate(zip(before, after)):
            assert np.all(np.isfinite(new))
            # Batch normalisation undoes what the bias of the convolution does.
            assert different(old, new, 1e-5) or (i == 1 and len(before) == 4)
    for rows in (*meta["norm_statistics"].values(), *meta["norm_weights"].values()):
        assert different(rows[0], rows[1], 1e-7)
    # The rows of another step give other predictions.
    support, query = jax.tree.map(lambda leaf: leaf[0], (images().support, images().query))
    turned = {p: rows[::-1] for p, rows in meta["norm_statistics"].items()}
    predict = eqx.filter_jit(
        lambda rows: learner.adapt({**meta, "norm_statistics": rows}, support, key=KEY)(query.x)
    )
    assert different(predict(meta["norm_statistics"]), predict(turned))


def test_learned_rates_are_used_after_saving_and_loading(tmp_path):
    learner, meta = started("ours")
    support, query = jax.tree.map(lambda leaf: leaf[0], (images().support, images().query))
    ax.save(tmp_path / "meta.safetensors", meta)
    initial = learner.init(conv_net(), key=KEY)
    loaded = ax.load(tmp_path / "meta.safetensors", initial)
    arrays = lambda meta: eqx.filter(meta, eqx.is_array)
    predict = eqx.filter_jit(lambda meta: learner.adapt(meta, support, key=KEY)(query.x))
    assert same(predict(loaded), predict(meta))
    assert different(predict({**loaded, "rates": initial["rates"]}), predict(meta), 1e-4)
    assert same(arrays(loaded), arrays(meta))


def test_a_model_without_batch_norm_has_the_other_parts():
    learner = MAMLPlusPlus(mse, 0.1, 2, **CODE)
    meta = learner.init(perceptron(), key=KEY)
    assert meta["norm_weights"] == meta["norm_statistics"] == {}
    assert set(meta["rates"]) == set(ax.tree.by_path(perceptron()))


# The public checks, in every phase; `test_every_learner` has the last


@pytest.mark.parametrize(("progress", "order"), [(0.0, 0.2), (0.1, 0.0)], ids=["first", "second"])
def test_meta_gradient_while_every_step_counts(progress, order):
    learner = MAMLPlusPlus(mse, 0.1, 2, derivative_order_annealing=order)
    check_meta_gradient(learner, progress=progress)


def test_meta_gradient_of_a_convolutional_net_in_first_order():
    learner = MAMLPlusPlus(
        cross_entropy, 0.1, 2, multi_step_loss=1.0, derivative_order_annealing=1.0, **CODE
    )
    check_meta_gradient(learner, ConvNet(jax.random.key(5)), Images(), progress=0.0)


class Late(ax.MetaLearner):
    """Drops the second order in the first half of meta-training, and does not say so."""

    loss: ax.Loss = mse

    def meta_loss(self, meta, task, *, key, progress):
        slope = eqx.filter_grad(self.loss)(meta, task.support)
        held = jax.tree.map(lambda g: jnp.where(progress < 0.5, lax.stop_gradient(g), g), slope)
        model = eqx.apply_updates(meta, jax.tree.map(lambda g: -0.1 * g, held))
        return self.loss(model, task.query), {}

    def adapt(self, meta, support, *, key):
        return meta


def test_a_fault_in_one_phase_is_found_in_that_phase():
    testing.check_meta_gradient(Late())
    with pytest.raises(AssertionError, match="finite differences"):
        testing.check_meta_gradient(Late(), progress=0.2)


# Heads


def squares(model, batch):
    return jnp.mean((model(batch.x) - jax.nn.one_hot(batch.y, 2)) ** 2)


def swapped(task):
    """The two ways under each other's name."""
    turn = lambda batch: ax.Batch(batch.x, 1 - batch.y)
    return ax.Task(turn(task.support), turn(task.query))


@functools.cache
def with_head(head):
    """Predictions for a task and for it swapped, before and after adapting, and gradients."""
    learner = only(squares, learned_rates=True)
    learner = learner if head == "free" else ax.SharedHead(learner, head)
    model = ax.models.MLP(16, 2, (4,), key=KEY, activation=jnp.tanh)
    meta = learner.init(doubled(model), key=KEY)

    @jax.jit
    def run(task):
        path = learner.iterates(meta, task.support, key=KEY)
        shown = jax.vmap(lambda model: model(task.query.x))(path)
        value = lambda meta: learner.meta_loss(meta, task, key=KEY)[0]
        loss, grads = eqx.filter_value_and_grad(value)(meta)
        return shown, loss, grads["model"].head.weight

    task = jax.tree.map(lambda leaf: leaf[0], images())
    return run(task), run(swapped(task))


@pytest.mark.parametrize("head", ["free", "tied", "zero"])
def test_a_shared_head_does_not_care_which_way_is_which(head):
    (shown, loss, slope), (turned, turned_loss, turned_slope) = with_head(head)
    assert np.allclose(shown[..., ::-1], turned, rtol=1e-12) is (head != "free")
    assert np.allclose(loss, turned_loss, rtol=1e-12) is (head != "free")
    assert different(shown[-1, :, 0], shown[-1, :, 1], 1e-3)
    if head == "tied":
        assert np.allclose(shown[0, :, 0], shown[0, :, 1], rtol=1e-12)
        assert different(shown[0], 0, 0.1)
        assert np.allclose(slope[:, 0], slope[:, 1], rtol=1e-12)
        assert np.allclose(slope, turned_slope, rtol=1e-9)
        assert different(slope, 0, 1e-3)
    if head == "zero":
        assert np.all(shown[0] == 0)
        assert np.all(slope == 0)


def test_the_head_is_where_head_path_says():
    model = ax.Functional(
        {"body": jnp.ones((2, 3)), "out": jnp.arange(6.0).reshape(3, 2)},
        lambda p, x: jnp.tanh(x @ p["body"]) @ p["out"],
    )
    batch = ax.Batch(jnp.ones((4, 2)), jnp.array([0, 1, 0, 1]))
    learner = ax.SharedHead(ax.MAML(cross_entropy, inner_steps=0), "tied", "params/out")
    start = learner.adapt(learner.init(model, key=KEY), batch, key=KEY)
    assert np.allclose(start.params["out"], np.array([[0.5] * 2, [2.5] * 2, [4.5] * 2]))
    assert np.array_equal(start.params["body"], model.params["body"])
    for head in ("tied", "zero"):
        lost = ax.SharedHead(MAMLPlusPlus(cross_entropy, 0.1, 1), head)
        with pytest.raises(ValueError, match="nothing below 'head'; give head_path="):
            lost.adapt(lost.init(model, key=KEY), batch, key=KEY)
    # The types of arguments are checked in tests alone, and before their values.
    object.__setattr__(learner, "head", "none")
    with pytest.raises(ValueError, match='head is "tied" or "zero", not'):
        learner.__check_init__()


@pytest.mark.parametrize("name", ["MAML", "Meta-SGD", "PLATIPUS", "BMAML heads", "EMAML"])
def test_any_learner_may_share_its_head(name):
    learner = ax.SharedHead(LEARNERS[name](cross_entropy), "zero")
    tasks = images()
    task = jax.tree.map(lambda leaf: leaf[0], tasks)
    meta = learner.init(conv_net(), key=KEY)
    start = learner.iterates(meta, task.support, key=KEY, steps=0)
    first = jax.tree.map(lambda leaf: leaf[0] if eqx.is_array(leaf) else leaf, start)
    if name != "PLATIPUS":  # whose prior has seen the support
        assert np.all(first(task.query.x) == 0)
    assert np.any(learner.adapt(meta, task.support, key=KEY)(task.query.x) != 0)
    assert learner.describe()["head"] == "zero"
    assert learner.describe()["algorithm"] == learner.learner.describe()["algorithm"]
    assert (
        ax.fit(learner, conv_net(), Images(), steps=1, meta_batch=2, key=KEY, devices=1).step == 1
    )


# Arguments and reports


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("inner_steps", 0, "1 or more inner steps, not 0"),
        ("multi_step_loss", 1.5, r"multi_step_loss is a fraction .* in \[0, 1\], not 1.5"),
        (
            "derivative_order_annealing",
            -0.1,
            "derivative_order_annealing is a fraction .* not -0.1",
        ),
        ("per_step_batch_norm_statistics", "both", 'is "paper", "code" or None, not \'both\''),
    ],
)
def test_arguments_that_make_no_sense(name, value, sentence):
    learner = MAMLPlusPlus(mse)
    # The types of arguments are checked in tests alone, and before their values.
    object.__setattr__(learner, name, value)
    with pytest.raises(ValueError, match=sentence):
        learner.__check_init__()


def test_a_report_names_the_parts_that_are_on():
    described = MAMLPlusPlus(mse, eval_steps=7).describe()
    assert described["algorithm"] == "MAML++"
    assert (described["inner_steps"], described["eval_steps"]) == (5, 7)
    assert described["parts"] == (
        "multi-step loss, derivative-order annealing, "
        "per-step batch-norm weights, learned rates, cosine annealing"
    )
    for name in ("code", "paper"):
        parts = MAMLPlusPlus(mse, per_step_batch_norm_statistics=name).describe()["parts"]
        assert f"per-step statistics ({name})" in parts
    assert only(mse).describe()["parts"] == "none"


def test_statistics_that_are_only_collected_change_nothing():
    """`"code"` keeps rows in the meta-parameters, and learns and predicts what `None` does."""
    task = jax.tree.map(lambda leaf: leaf[0], images())
    found = []
    for statistics in ("code", None):
        learner = MAMLPlusPlus(cross_entropy, 0.1, 2, per_step_batch_norm_statistics=statistics)
        assert MAMLPlusPlus(cross_entropy).per_step_batch_norm_statistics is None
        result = ax.fit(learner, conv_net(), Images(), steps=3, meta_batch=2, key=KEY, devices=1)
        assert ("norm_statistics" in result.meta) == (statistics == "code")
        adapted = learner.adapt(result.meta, task.support, key=KEY)
        rest = {name: result.meta[name] for name in ("rates", "norm_weights")}
        found.append((rest, result.meta["model"].conv.weight, adapted(task.query.x)))
    assert_close(*found)

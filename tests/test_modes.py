"""Ways to differentiate the inner loop: all exact ones agree, and the others are what they say."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import adaptax as ax
from adaptax import batch_norm, inner, modes
from adaptax.testing import check_meta_gradient
from learners import LEARNERS, ConvNet, Images

KEY = jax.random.key(0)
pytestmark = pytest.mark.usefixtures("x64")
mse, cross_entropy = ax.losses.mse, ax.losses.cross_entropy
EXACT = ["forward", "checkpoint=1", "reverse, checkpoint=2", "forward, checkpoint=3"]
SECOND_ORDER = [
    "MAML", "MAML schedule", "MAML Adam", "ANIL", "Meta-SGD", "PLATIPUS", "BMAML", "BMAML heads",
    "EMAML",
]  # fmt: skip


def net(out=1):
    return ax.models.MLP(1, out, (5, 4), key=KEY, activation=jnp.tanh)


def waves(n=2):
    return jax.vmap(ax.tasks.sinusoid(shot=4, query=3).train.sample)(jax.random.split(KEY, n))


def gradient(learner, model=None, tasks=None):
    meta = learner.init(net() if model is None else model, key=KEY)
    tasks = waves() if tasks is None else tasks
    return eqx.filter_jit(lambda: ax.meta_value_and_grad(learner, meta, tasks, key=KEY))()


def assert_close(a, b, rtol=1e-11):
    pairs = list(zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))
    norm = sum(float(jnp.sum(leaf**2)) for _, leaf in pairs) ** 0.5
    assert norm > 0
    for x, y in pairs:
        assert np.abs(x - y).max() <= rtol * norm


def in_mode(make, mode, **how):
    """A learner of the tests, in another mode."""
    learner = make(mse) if not how else make(mse, **how)
    object.__setattr__(learner, "meta_gradient", mode)
    return learner


def assert_modes_agree(make, model=None, tasks=None, exact=EXACT):
    """`make(mode)` gives one value and gradient in all of these modes."""
    expected = gradient(make("reverse"), model, tasks)
    for mode in exact:
        assert_close(gradient(make(mode), model, tasks), expected)


@pytest.mark.parametrize("name", SECOND_ORDER)
def test_every_learner(name):
    exact = ["forward, checkpoint=1"] if name == "Meta-SGD" else ["forward"]
    assert_modes_agree(lambda mode: in_mode(LEARNERS[name], mode), exact=exact)


@pytest.mark.parametrize("mode", EXACT)
def test_steps_that_checkpoints_do_not_divide(mode):
    assert_modes_agree(lambda m: ax.MAML(mse, 0.1, 5, meta_gradient=m), exact=[mode])


def test_the_default_is_reverse_over_reverse_to_the_bit():
    for model in (net(), ax.models.MLP(1, 1, (40, 40), key=KEY)):
        ours, plain = (
            gradient(ax.MAML(mse, 0.1, 3, meta_gradient=mode), model)
            for mode in ("auto", "reverse")
        )
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(plain), strict=True):
            assert np.array_equal(a, b)


def test_which_order_auto_takes():
    """Forward where activations are large and nothing is convolved."""

    def takes_forward(model, batch):
        jaxpr = jax.make_jaxpr(lambda m: jnp.sum(m(batch)))(model)
        return modes.suits_forward(jaxpr.jaxpr)

    class Recurrent(eqx.Module):
        weight: jax.Array

        def __call__(self, x):
            step = lambda h, x: (new := jnp.tanh(h @ self.weight + x), new)
            return jax.lax.scan(step, jnp.zeros_like(x[0]), x)[1]

    wide = ax.models.MLP(8, 8, (256, 256), key=KEY)
    conv = ax.models.Conv4(5, key=KEY)
    assert takes_forward(wide, jnp.ones((256, 8)))
    assert not takes_forward(wide, jnp.ones((5, 8)))
    assert not takes_forward(conv, jnp.ones((75, 28, 28, 1)))
    assert takes_forward(Recurrent(jnp.eye(32)), jnp.ones((256, 8, 32)))
    assert not takes_forward(Recurrent(jnp.eye(32)), jnp.ones((4, 8, 32)))


def test_batch_norm_and_convolutions():
    """The parameters of batch norm are constants of the inner loop, and trained all the same."""
    images = jax.vmap(Images().sample)(jax.random.split(KEY, 2))
    assert_modes_agree(
        lambda mode: ax.MAML(cross_entropy, 0.1, 2, meta_gradient=mode),
        ConvNet(KEY), images, ["forward", "forward, checkpoint=2"],
    )  # fmt: skip


def test_maml_plus_plus():
    """With rows of weights for each step, which its view closes over, and a multi-step loss."""
    images = jax.vmap(Images().sample)(jax.random.split(KEY, 2))
    make = lambda mode: ax.MAMLPlusPlus(
        cross_entropy, 0.1, 3, derivative_order_annealing=0.0, multi_step_loss=1.0,
        meta_gradient=mode,
    )  # fmt: skip
    assert_modes_agree(make, ConvNet(KEY), images, ["forward", "forward, checkpoint=2"])


def test_dropout():
    """Every pass draws a mask of its own, and the same one when it is computed again."""

    class Net(eqx.Module):
        first: eqx.nn.Linear
        dropout: eqx.nn.Dropout
        last: eqx.nn.Linear

        def __call__(self, x, key):
            return self.last(self.dropout(jnp.tanh(self.first(x)), key=key))

    keys = jax.random.split(KEY)
    with jax.enable_x64(True):
        inside = Net(eqx.nn.Linear(1, 8, key=keys[0]), eqx.nn.Dropout(0.5),
                     eqx.nn.Linear(8, 1, key=keys[1]))  # fmt: skip
    model = ax.Batched(inside, key=KEY)
    assert_modes_agree(lambda mode: ax.MAML(mse, 0.1, 3, meta_gradient=mode), model)


class Acting(eqx.Module):
    """Draws inputs that depend on the model, differentiably, as roll-outs of a policy do."""

    centre: jax.Array

    def draw(self, model, key):
        x = self.centre + 0.3 * model(self.centre) + jax.random.normal(key, self.centre.shape)
        return ax.Batch(x, jnp.sin(x) * self.centre)


def test_sources_that_draw_with_the_model():
    """The inner gradient depends on the parameters through what is drawn, too."""
    at = jax.random.normal(KEY, (2, 4, 1))
    tasks = ax.Task(Acting(at), Acting(at + 1))
    make = lambda mode: ax.MAML(mse, 0.1, 3, meta_gradient=mode)
    assert_modes_agree(make, net(), tasks, ["forward", "reverse, checkpoint=2"])


def test_minibatches_and_a_loss_with_parameters_of_its_own():
    """What the loss closes over has its derivative: through every inner gradient."""
    support = ax.tasks.sinusoid(shot=6).train.sample(KEY).support
    source, model = ax.Minibatches(support, 2, KEY), net()

    def outer(weights, mode):
        loss = lambda m, b: jnp.mean((m(b.x) - b.y) ** 2 @ weights)
        end = inner.descend(loss, model, source, key=KEY, steps=4, lr=0.1, meta_gradient=mode)
        return mse(end, support)

    weights = jnp.array([0.7])
    expected = jax.jit(jax.grad(outer), static_argnums=1)(weights, "reverse")
    assert np.abs(expected) > 1e-6
    for mode in ("forward", "forward, checkpoint=3"):
        found = jax.jit(jax.grad(outer), static_argnums=1)(weights, mode)
        assert np.allclose(found, expected, rtol=1e-11)


def test_the_path_is_kept():
    support = ax.tasks.sinusoid(shot=6).train.sample(KEY).support
    how = {"key": KEY, "steps": 5, "lr": 0.1}

    def total(model, mode):
        path = inner.iterates(mse, model, support, meta_gradient=mode, **how)
        return jnp.sum(jax.vmap(lambda m: mse(m, support))(path))

    run = eqx.filter_jit(eqx.filter_value_and_grad(total))
    expected = run(net(), "reverse")
    for mode in EXACT:
        assert_close(run(net(), mode), expected)
    value, _ = run(net(), "truncate=2")
    assert np.allclose(value, expected[0], rtol=1e-13)


@pytest.mark.parametrize("mode", EXACT)
def test_against_finite_differences(mode):
    check_meta_gradient(ax.MetaSGD(mse, 0.1, 3, meta_gradient=mode), net())


def test_a_rule_of_optax_against_finite_differences():
    rule = ax.inner.adam(0.05, eps_root=0.01)
    how = {"inner_steps": 2, "inner_optimizer": rule, "meta_gradient": "forward, checkpoint=2"}
    check_meta_gradient(ax.MAML(mse, **how), net())


def test_bayesian_learners_against_finite_differences():
    check_meta_gradient(ax.PLATIPUS(mse, 0.1, samples=2, meta_gradient="forward"), net())


# Truncation


@pytest.mark.parametrize("last", [0, 1, 2, 3])
@pytest.mark.parametrize("order", ["reverse", "forward", "checkpoint=2"])
def test_truncation_by_hand(last, order):
    """Three steps by hand, with a `stop_gradient` round the gradients of the first."""
    steps, task = 3, jax.tree.map(lambda leaf: leaf[0], waves())

    def outer(meta):
        model, lr = meta
        for j in range(steps):
            slope = eqx.filter_grad(mse)(model, task.support)
            if j < steps - last:
                slope = jax.lax.stop_gradient(slope)
            model = jax.tree.map(lambda p, g, r: p - r * g, model, slope, lr)
        return mse(model, task.query)

    params, static = eqx.partition(net(), eqx.is_inexact_array)
    rates = jax.tree.map(lambda leaf: jnp.full_like(leaf, 0.1), params)

    def by_hand(params, rates):
        whole = eqx.combine(params, static)
        return outer((whole, eqx.combine(rates, static)))

    def ours(params, rates):
        end = inner.descend(
            mse, eqx.combine(params, static), task.support, key=KEY, steps=steps, lr=rates,
            meta_gradient=f"{order}, truncate={last}",
        )  # fmt: skip
        return mse(end, task.query)

    expected = jax.jit(jax.value_and_grad(by_hand, (0, 1)))(params, rates)
    assert_close(jax.jit(jax.value_and_grad(ours, (0, 1)))(params, rates), expected)


def test_truncation_goes_from_first_order_to_the_exact_gradient():
    of = lambda mode: gradient(ax.MAML(mse, 0.3, 3, meta_gradient=mode))
    assert_close(of("truncate=0"), gradient(ax.FOMAML(mse, 0.3, 3)))
    exact = of("reverse")
    for mode in ("truncate=3", "truncate=9", "forward, truncate=3"):
        assert_close(of(mode), exact)
    away = [jnp.linalg.norm(of(f"truncate={n}")[1].head.weight - exact[1].head.weight)
            for n in (0, 1, 2)]  # fmt: skip
    assert min(away) > 1e-4 * jnp.linalg.norm(exact[1].head.weight)  # biased


def test_truncation_reaches_what_a_view_closes_over():
    """MAML++'s weights of a step whose gradient is a constant have no derivative by it."""
    images = jax.vmap(Images().sample)(jax.random.split(KEY, 2))
    learner = ax.MAMLPlusPlus(
        cross_entropy, 0.1, 3, derivative_order_annealing=0.0, multi_step_loss=0.0,
        meta_gradient="truncate=1",
    )  # fmt: skip
    _, grads = gradient(learner, ConvNet(KEY), images)
    for leaf in grads["norm_weights"].values():
        assert np.all(leaf[:2] == 0)
        assert np.abs(leaf[2]).max() > 1e-8


# What is kept


def stored(mode, steps):
    """Bytes that the meta-gradient of a deep net, on many examples, needs beside its arguments."""
    model = ax.models.MLP(8, 8, (8,) * 6, key=KEY, activation=jnp.tanh)
    x = jnp.ones((1, 256, 8))
    task = ax.Task(ax.Batch(x, x), ax.Batch(x, x))
    learner = ax.MAML(mse, 0.1, steps, meta_gradient=mode)
    run = eqx.filter_jit(lambda m: ax.meta_value_and_grad(learner, m, task, key=KEY)[1])
    return run.lower(model).compile().compiled.memory_analysis().temp_size_in_bytes


def test_what_a_step_costs_in_memory():
    """Activations in reverse, parameters in forward order, and less with checkpoints."""
    steps, params = 16, ax.tree.count(ax.models.MLP(8, 8, (8,) * 6, key=KEY)) * 8
    grows = {
        mode: (stored(mode, 2 * steps) - stored(mode, steps)) / steps
        for mode in ("reverse", "forward", "forward, checkpoint=8", "truncate=4")
    }
    activations = 256 * 8 * 6 * 8
    assert grows["reverse"] > 2 * activations
    assert params / 2 < grows["forward"] < 2 * params
    assert grows["forward, checkpoint=8"] < params / 3
    assert grows["truncate=4"] < params / 3


# What is refused


@pytest.mark.parametrize(
    "text",
    ["", "remat", "forward,", "forward, reverse", "checkpoint=0", "checkpoint", "truncate=-1",
     "truncate=1, truncate=2", "checkpoint=1.5"],
)  # fmt: skip
def test_what_is_no_mode(text):
    with pytest.raises(ValueError, match=r"meta_gradient is .*expected auto, reverse or forward"):
        ax.MAML(mse, meta_gradient=text)
    support = ax.Batch(jnp.ones((2, 1)), jnp.ones((2, 1)))
    with pytest.raises(ValueError, match="meta_gradient is"):
        inner.descend(mse, net(), support, key=KEY, steps=1, lr=0.1, meta_gradient=text)


def test_modes_are_words():
    assert modes.parse(" forward ,checkpoint=2, truncate=0") == modes.Mode("forward", 2, 0)
    assert modes.parse("truncate=3") == modes.Mode("auto", None, 3)


def test_losses_with_a_derivative_rule_of_their_own():
    """Whose gradient may be that of no scalar, so that its derivative is not symmetric."""

    @jax.custom_vjp
    def odd(w):
        return w

    # The derivative of the first by the second is 0, but not that of the second by the first.
    odd.defvjp(lambda w: (w, w), lambda w, v: (v * jnp.array([1.0, 1 + w[0] ** 2]),))
    start = ax.Functional(jnp.array([0.4, 0.9]), lambda p, x: x @ odd(p)[:, None])
    x = jax.random.normal(KEY, (1, 5, 2))
    tasks = ax.Task(ax.Batch(x, x[..., :1]), ax.Batch(-x, x[..., 1:]))
    make = lambda mode: ax.MAML(mse, 0.1, 2, meta_gradient=mode)
    with pytest.raises(ValueError, match="derivative rule of its own"):
        gradient(make("forward"), start, tasks)
    assert_modes_agree(make, start, tasks, ["auto", "checkpoint=1"])


def test_running_statistics_need_reverse_order():
    """They travel as a derivative that is none: see `batch_norm.observe`."""
    images = jax.vmap(Images().sample)(jax.random.split(KEY, 2))
    make = lambda mode: ax.MAMLPlusPlus(
        cross_entropy, 0.1, 2, per_step_batch_norm_statistics="paper",
        derivative_order_annealing=0.0, multi_step_loss=0.0, meta_gradient=mode,
    )  # fmt: skip
    assert batch_norm.observe is not None
    with pytest.raises(ValueError, match="derivative rule of its own"):
        gradient(make("forward"), ConvNet(KEY), images)
    assert_modes_agree(make, ConvNet(KEY), images, ["auto", "checkpoint=1"])


def test_where_adaptation_is_differentiated_in_forward_mode(monkeypatch):
    """`auto` is reverse over reverse there, whatever it would be else; TRPO asks for that."""
    monkeypatch.setattr(modes, "suits_forward", lambda jaxpr: True)
    support = ax.tasks.sinusoid(shot=6).train.sample(KEY).support

    def end(shift, mode):
        model = eqx.tree_at(lambda m: m.head.bias, net(), net().head.bias + shift)
        how = {"key": KEY, "steps": 2, "lr": 0.1, "meta_gradient": mode}
        return inner.descend(mse, model, support, **how).head.weight

    slope = jax.jacrev(end)(0.3, "reverse")
    assert np.allclose(jax.jacrev(end)(0.3, "auto"), slope, rtol=1e-12)
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jacfwd(end)(0.3, "auto")
    with modes.forward_mode():
        assert np.allclose(jax.jacfwd(end)(0.3, "auto"), slope, rtol=1e-12)
        with pytest.raises(ValueError, match="as TRPO does"):
            jax.jacfwd(end)(0.3, "forward")

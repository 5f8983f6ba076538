import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adaptax as ax
from adaptax import roots

KEY = jax.random.key(0)
mse = ax.losses.mse


@pytest.fixture
def model():
    return ax.models.MLP(1, 1, (4,), key=KEY, activation=jnp.tanh)


@pytest.fixture
def support():
    return ax.tasks.sinusoid(shot=6).train.sample(KEY).support


def same(a, b, **how):
    pairs = zip(jax.tree.leaves(ax.tree.parameters(a)), jax.tree.leaves(ax.tree.parameters(b)))
    return all(np.allclose(x, y, **how) for x, y in pairs)


def by_hand(model, batches, rates):
    for batch, rate in zip(batches, rates):
        slope = eqx.filter_grad(mse)(model, batch)
        model = eqx.apply_updates(model, jax.tree.map(lambda g, r=rate: -r * g, slope))
    return model


def test_descent_by_hand(model, support):
    how = {"key": KEY, "steps": 3}
    found = ax.inner.descend(mse, model, support, lr=0.1, **how)
    assert same(found, by_hand(model, [support] * 3, [0.1] * 3), rtol=1e-5, atol=1e-6)
    falling = ax.inner.descend(mse, model, support, lr=lambda i: 0.1 / (i + 1), **how)
    assert same(falling, by_hand(model, [support] * 3, [0.1, 0.05, 0.1 / 3]), rtol=1e-5, atol=1e-6)
    rule = ax.inner.descend(mse, model, support, optimizer=optax.sgd(0.1), **how)
    assert same(rule, found, rtol=1e-5, atol=1e-6)


def test_a_path_starts_at_the_model_and_ends_adapted(model, support):
    path = ax.inner.iterates(mse, model, support, key=KEY, steps=4, lr=0.1)
    assert path.head.weight.shape == (5, 4, 1)
    at = lambda i: jax.tree.map(lambda leaf: leaf[i] if eqx.is_array(leaf) else leaf, path)
    assert same(at(0), model, rtol=0)
    for steps in (2, 4):
        end = ax.inner.descend(mse, model, support, key=KEY, steps=steps, lr=0.1)
        assert same(at(steps), end, rtol=1e-5, atol=1e-6)
    head = ax.tree.under("head")
    path = ax.inner.iterates(mse, model, support, key=KEY, steps=2, lr=0.1, adapt_only=head)
    assert path.layers[0].weight.shape == (3, 1, 4)  # what is fixed leads with the axis too


def test_no_steps_give_the_model_back(model, support):
    assert same(ax.inner.descend(mse, model, support, key=KEY, steps=0, lr=0.1), model, rtol=0)
    path = ax.inner.iterates(mse, model, support, key=KEY, steps=0, lr=0.1)
    assert path.head.weight.shape == (1, 4, 1)


def test_minibatches_follow_the_step(model, support):
    source = ax.Minibatches(support, 2, KEY)
    batches = [source.at(i).draw(model, KEY) for i in range(4)]
    found = ax.inner.descend(mse, model, source, key=KEY, steps=4, lr=0.1)
    assert same(found, by_hand(model, batches, [0.1] * 4), rtol=1e-5, atol=1e-6)


def test_a_state_goes_on_where_it_was(model, support):
    rule = optax.adam(0.01)
    once = ax.inner.run(mse, model, support, key=KEY, steps=5, optimizer=rule)
    half = ax.inner.run(mse, model, support, key=KEY, steps=2, optimizer=rule)
    rest = ax.inner.run(
        mse, half.model, support, key=KEY, steps=3, optimizer=rule, state=half.state
    )
    assert same(once.model, rest.model, rtol=1e-5, atol=1e-6)


# Where a support gradient is zero


@pytest.mark.parametrize(
    "rule",
    [
        optax.chain(optax.clip_by_global_norm(10.0), optax.sgd(0.01)),
        ax.inner.adam(0.01),
        optax.adam(0.01),
        optax.rmsprop(0.01),
    ],
    ids=["clip_by_global_norm", "ax.inner.adam", "optax.adam", "rmsprop"],
)
def test_a_zero_support_gradient_has_a_meta_gradient(rule):
    """The derivative of the rule's step at g = 0, times the Hessian, which is 2 here."""
    ones = jnp.ones((1, 5, 1))
    start = ax.Functional(jnp.zeros((1, 1)), lambda p, x: x @ p)
    task = ax.Task(ax.Batch(ones, 0 * ones), ax.Batch(ones, ones))
    learner = ax.MAML(mse, inner_optimizer=rule)
    for mapping in ("vmap", "scan"):
        _, grads = ax.meta_value_and_grad(learner, start, task, key=KEY, mapping=mapping)
        slope = jax.grad(lambda g: rule.update(g, rule.init(g), g)[0])(1e-12)
        assert np.isclose(grads.params[0, 0], -2 * (1 + 2 * slope), rtol=1e-2)


ROOTS = {
    "adam": optax.adam(1.0, eps=0.1),
    "adam without momentum": ax.inner.adam(1.0, eps=0.1),
    "adamw": optax.adamw(1.0, eps=0.1),
    "amsgrad": optax.amsgrad(1.0, eps=0.1),
    "adabelief": optax.adabelief(1.0, eps=0.1, eps_root=0.0),
    "yogi": optax.chain(optax.scale_by_yogi(eps=0.1, eps_root=0.0, initial_accumulator_value=0.0)),
    "rmsprop": optax.rmsprop(1.0, eps=0.1, eps_in_sqrt=False),
    "novograd": optax.novograd(1.0, eps=0.1),
    "normalize": optax.normalize_by_update_norm(eps=0.1),
    "clip_by_global_norm": optax.clip_by_global_norm(1.0),
    "clip_by_block_rms": optax.clip_by_block_rms(1.0),
    "adaptive_grad_clip": optax.adaptive_grad_clip(0.1),
}


@pytest.mark.parametrize("name", ROOTS)
def test_a_root_at_zero(name):
    """Derivatives of two steps of a rule at g = 0 are those nearby, and finite in second order."""
    with jax.enable_x64(True):
        rule, params, unit = ROOTS[name], jnp.array([0.7, -0.4]), jnp.array([0.6, -0.8])

        def end(rule_update, size):
            now, state = params, rule.init(params)
            for _ in range(2):
                updates, state = rule_update(size * unit, state, now)
                now = optax.apply_updates(now, updates)
            return now

        safe = jax.jit(lambda s: end(roots.safe(rule.update), s))
        step = 1e-9
        assert not np.isfinite(jax.jacrev(lambda s: end(rule.update, s))(0.0)).all()
        near = (safe(step) - safe(-step)) / (2 * step)
        assert np.allclose(jax.jacrev(safe)(0.0), near, rtol=1e-5, atol=1e-6)
        assert np.allclose(jax.jacfwd(safe)(0.0), near, rtol=1e-5, atol=1e-6)
        assert np.isfinite(jax.jacfwd(jax.jacrev(safe))(0.0)).all()
        for size in (0.0, 0.3):  # elsewhere nothing changes
            assert np.array_equal(safe(size), jax.jit(lambda s: end(rule.update, s))(size))
        derivative = jax.jacrev(jax.jacrev(lambda s: end(rule.update, s)))(0.3)
        assert np.allclose(jax.jacrev(jax.jacrev(safe))(0.3), derivative, rtol=1e-12)


@pytest.mark.parametrize("rule", [optax.lamb(1.0), optax.lars(1.0)], ids=["lamb", "lars"])
def test_norm_ratios_at_zero(rule):
    """They jump there, and are finite."""
    params = jnp.array([0.7, -0.4])
    step = lambda grads: roots.safe(rule.update)(grads, rule.init(params), params)[0]
    assert np.isfinite(jax.jacrev(step)(jnp.zeros(2))).all()
    assert np.isfinite(jax.jacrev(jax.jacrev(step))(jnp.zeros(2))).all()


def test_roots_anywhere_in_a_rule():
    """In control flow, under transformations, in third order; a rule of one's own keeps its."""

    @jax.custom_jvp
    def own(x):
        return jnp.sqrt(x)

    own.defjvp(lambda x, t: (own(*x), 7.0 * t[0]))
    loop = lambda x: jax.lax.scan(lambda c, _: (c + jnp.sqrt(x), None), 0.0, length=3)[0]
    many = [
        (jnp.sqrt, 0.0), (jnp.cbrt, 0.0), (lambda x: x**0.5, 0.0),
        (lambda x: jnp.where(x > 0, jnp.log(x), x), 1.0), (lambda x: x + jax.lax.rsqrt(x), 1.0),
        (lambda x: jnp.where(x > 0, x**-2, x), 1.0), (lambda x: jnp.where(x > 0, 1 / x, x), 1.0),
        (lambda x: jnp.linalg.norm(jnp.stack([x, 2 * x])), 0.0), (loop, 0.0), (own, 7.0),
        (lambda x: jax.lax.cond(x < 1, jnp.sqrt, jnp.cos, x), 0.0),
        (lambda x: jax.lax.fori_loop(0, 2, lambda _, c: c + jnp.sqrt(x), 0.0), 0.0),
        (jax.checkpoint(jnp.sqrt), 0.0),
    ]  # fmt: skip
    for function, slope in many:
        f = roots.safe(function)
        assert np.array_equal(f(jnp.zeros(())), function(jnp.zeros(())))
        assert jax.jit(jax.grad(f))(0.0) == slope
        assert np.array_equal(jax.vmap(jax.jacfwd(f))(jnp.zeros(2)), [slope] * 2)
        assert jax.jacfwd(jax.jacrev(jax.jacrev(f)))(0.0) == 0
    assert np.isnan(jax.grad(roots.safe(jnp.sqrt))(jnp.nan))
    assert jax.grad(roots.safe(lambda x: x**1.0))(0.0) == 1  # a derivative there is


def test_arguments_that_make_no_sense(model, support):
    with pytest.raises(ValueError, match="either `lr` or `optimizer`"):
        ax.inner.descend(mse, model, support, key=KEY, steps=1)
    with pytest.raises(ValueError, match="either `lr` or `optimizer`"):
        ax.inner.descend(mse, model, support, key=KEY, steps=1, lr=1.0, optimizer=optax.sgd(1.0))
    with pytest.raises(ValueError, match="0 or more steps, not -1"):
        ax.inner.descend(mse, model, support, key=KEY, steps=-1, lr=0.1)
    with pytest.raises(ValueError, match=r"no parameter is left to adapt.*layers/0/weight"):
        ax.inner.descend(
            mse, model, support, key=KEY, steps=1, lr=0.1, adapt_only=ax.tree.under("body")
        )

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adaptax as ax

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


def test_adam_can_be_differentiated_where_a_gradient_is_zero(model, support):
    rule = ax.inner.adam(0.1, eps_root=1e-6)
    model = jax.tree.map(lambda leaf: 0 * leaf if eqx.is_array(leaf) else leaf, model)
    learner = ax.MAML(mse, inner_steps=2, inner_optimizer=rule)
    loss = lambda m: learner.meta_loss(m, ax.Task(support, support), key=KEY)[0]
    assert ax.tree.finite(eqx.filter_grad(loss)(model))


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

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import adaptax as ax
from adaptax.task import episode_key

KEY = jax.random.key(0)


def minibatches(n, size, steps):
    batch = ax.Batch(jnp.arange(n), 10 * jnp.arange(n))
    source = ax.Minibatches(batch, size, KEY)
    draws = [source.at(i).draw(None, KEY) for i in range(steps)]
    assert all(np.array_equal(d.y, 10 * d.x) for d in draws)
    return np.concatenate([d.x for d in draws])


@pytest.mark.parametrize(("n", "size"), [(6, 3), (10, 4), (7, 5), (5, 5), (4, 9), (3, 8), (1, 3)])
def test_every_epoch_covers_every_example(n, size):
    steps = 3 * n
    seen = minibatches(n, size, steps)
    epochs = seen[: len(seen) // n * n].reshape(-1, n)
    assert len(epochs) >= 3
    assert np.array_equal(np.sort(epochs, axis=1), np.tile(np.arange(n), (len(epochs), 1)))
    if n > 3:
        assert len({tuple(epoch) for epoch in epochs}) > 1


def test_minibatches_are_a_function_of_key_and_step():
    batch = ax.Batch(jnp.arange(10), jnp.arange(10))
    source = ax.Minibatches(batch, 3, KEY)
    draw = jax.jit(lambda step: source.at(step).draw(None, KEY).x)
    for step in (0, 3, 7):
        assert np.array_equal(draw(step), source.at(step).draw(None, jax.random.key(9)).x)
    other = ax.Minibatches(batch, 10, jax.random.key(1))
    assert not np.array_equal(
        other.draw(None, KEY).x, ax.Minibatches(batch, 10, KEY).draw(None, KEY).x
    )


def test_a_batch_is_a_source():
    batch = ax.Batch({"image": jnp.zeros((4, 2)), "mask": jnp.zeros(4)}, jnp.zeros(4))
    assert batch.size == 4
    assert batch.draw(None, KEY) is batch
    for source in (batch, ax.Minibatches(batch, 2, KEY)):
        assert isinstance(source, ax.Source)


def test_splits_and_episodes_have_streams_of_their_own():
    draws = {
        (split, seed, i): tuple(
            jax.random.key_data(episode_key(split, jax.random.key(seed), i)).tolist()
        )
        for split in ("train", "val", "test")
        for seed in (0, 1)
        for i in range(20)
    }
    assert len(set(draws.values())) == len(draws)

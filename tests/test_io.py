import json
import os
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import adaptax as ax

KEY = jax.random.key(0)


def assert_same(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        if jnp.issubdtype(getattr(x, "dtype", float), jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        if hasattr(x, "dtype"):
            assert x.dtype == y.dtype
            assert np.asarray(x).tobytes() == np.asarray(y).tobytes()
        else:
            assert x == y


def blank(value):
    is_key = lambda leaf: jnp.issubdtype(getattr(leaf, "dtype", float), jax.dtypes.prng_key)
    empty = lambda leaf: jax.random.key(7) if is_key(leaf) else jnp.zeros_like(leaf)
    return jax.tree.map(lambda leaf: empty(leaf) if hasattr(leaf, "dtype") else leaf, value)


@pytest.mark.parametrize(
    "value",
    [
        ax.models.MLP(2, 1, (3,), key=KEY, batch_norm=True),
        {
            "a": jnp.arange(3),
            "b": (jnp.ones((2, 0)), None, True, 2.5, "text"),
            "c": jnp.array(True),
        },
        {"key": jax.random.key(5), "old": jnp.zeros(2, jnp.uint32)},
        {"half": jnp.linspace(0, 1, 7, dtype=jnp.bfloat16), "float16": jnp.ones(3, jnp.float16)},
        {"nan": jnp.array([jnp.nan, -jnp.inf, -0.0])},
    ],
    ids=["model", "mixed", "keys", "bfloat16", "not finite"],
)
def test_round_trip(value, tmp_path):
    file = tmp_path / "deep" / "value.safetensors"
    ax.save(file, value, note="hello", numbers=[1, 2])
    assert_same(ax.load(file, blank(value)), value)
    assert ax.io.read_metadata(file) == {"note": "hello", "numbers": [1, 2]}
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_a_row_of_keys_comes_back(tmp_path):
    keys = jax.random.split(KEY, 3)
    ax.save(tmp_path / "keys", keys)
    assert_same(ax.load(tmp_path / "keys", jax.random.split(jax.random.key(1), 3)), keys)


def test_a_file_holds_arrays_and_no_code(tmp_path):
    file = tmp_path / "x"
    ax.save(file, {"a": jnp.ones(3)})
    data = file.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    assert header["a"] == {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]}
    file.write_bytes(pickle.dumps({"a": np.ones(3)}))
    with pytest.raises(ValueError, match="truncated or not a checkpoint"):
        ax.load(file, {"a": jnp.ones(3)})


@pytest.mark.parametrize("keep", [0, 5, 40, -1])
def test_a_truncated_file_is_named(keep, tmp_path):
    file = tmp_path / "x"
    ax.save(file, {"a": jnp.ones(300)})
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"x is truncated or not a checkpoint"):
        ax.load(file, {"a": jnp.ones(300)})


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no checkpoint at"):
        ax.load(tmp_path / "none", {})
    with pytest.raises(FileNotFoundError, match="there is no checkpoint at"):
        ax.io.read_metadata(tmp_path / "none")


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"a": jnp.ones(3)}, "it also has b"),
        ({"a": jnp.ones(3), "b": jnp.ones(1), "c": jnp.ones(1)}, "it lacks c"),
        ({"a": jnp.ones(4), "b": jnp.ones(1)}, r"a is float32\[3\] there and float32\[4\] here"),
        ({"a": jnp.arange(3), "b": jnp.ones(1)}, "a is float32.* and int32"),
    ],
)
def test_another_model_is_refused(other, message, tmp_path):
    ax.save(tmp_path / "x", {"a": jnp.ones(3), "b": jnp.ones(1)})
    with pytest.raises(ValueError, match=f"another model.*{message}"):
        ax.load(tmp_path / "x", other)


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_file(failing, tmp_path, monkeypatch):
    file = tmp_path / "x"
    ax.save(file, {"a": jnp.ones(3)})
    before = file.read_bytes()

    def fail(*args):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, failing, fail)
    with pytest.raises(OSError, match="no space"):
        ax.save(file, {"a": jnp.zeros(3)})
    assert file.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["x"]

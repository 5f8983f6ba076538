import functools
import json
import os
import re
import subprocess
import sys
import threading

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adaptax as ax
from adaptax.engine.fingerprint import MOST_ENTRIES, fingerprint

SCRIPT = """
import functools, json, re, sys
import jax, jax.numpy as jnp, numpy as np, optax, equinox as eqx
from flax import nnx
import flax.linen as nn
import adaptax as ax
from adaptax.engine.fingerprint import fingerprint
KEY = jax.random.key(0)
SCALE = {"b": 1, "a": 2}
class Settings:
    rate = 3
    def __init__(self): self.names = {"x", "y", "z"}
SETTINGS = Settings()
def helper(x): return x * SCALE["a"] if x in {"p", "q", "r"} else SETTINGS.names
def loss(model, batch): return helper(model) + [lambda: helper(batch)]
class Own(ax.Adapter):
    loss: object = eqx.field(static=True)
    def adapt(self, meta, support, *, key): return helper(meta)
    @property
    def twice(self): return 2
class Module(nnx.Module):
    def __init__(self, rngs):
        self.a, self.d = nnx.Linear(3, 4, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)
    def __call__(self, x): return self.d(self.a(x))
class Linen(nn.Module):
    n: int = 3
    @nn.compact
    def __call__(self, x): return nn.Dense(self.n)(x)
print(json.dumps(fingerprint(
    learners=[ax.MAML(loss, 0.01, inner_optimizer=ax.inner.adam(0.1)), Own(functools.partial(loss)),
              ax.LEO(ax.losses.cross_entropy), ax.MAMLPlusPlus(ax.losses.mse, 0.1, 3)],
    rules=[optax.chain(optax.clip(1.0), optax.adam(optax.cosine_decay_schedule(1e-3, 9))),
           optax.multi_transform({"a": optax.sgd(0.1), "b": optax.adamw(0.1)}, lambda p: p)],
    models=[ax.models.Conv4(out=5, key=KEY), Module(nnx.Rngs(0)), ax.Functional({}, Linen().apply),
            eqx.nn.Sequential([eqx.nn.Linear(2, 3, key=KEY), eqx.nn.Lambda(jax.nn.relu)])],
    functions=[jax.jit(loss), eqx.filter_jit(loss), jax.checkpoint(loss), jnp.tanh, np.add, print],
    others=[{"b": {3, 1, 2}, "a": frozenset("abc")}, np.random.default_rng(0), re.compile("a"),
            KEY, jnp.float32, object(), SETTINGS],
    tasks=ax.tasks.sinusoid(), outer=ax.rl.TRPO(),
)))
"""


def test_two_processes_agree():
    def told(seed):
        out = subprocess.run(
            [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True,
            env={**os.environ, "PYTHONHASHSEED": seed},
        )  # fmt: skip
        return json.loads(out.stdout)

    found = told("1")
    assert found == told("2")
    assert len(found) > 300
    assert not re.search(r"0x[0-9a-f]{6}|cannot be compared| at /", json.dumps(found))


def loss(model, batch):
    return jnp.mean(model(batch.x))


def test_names_and_texts():
    learner = ax.MAML(functools.partial(loss), 0.01, inner_steps=3)
    found = fingerprint(learner=learner, x=np.arange(9), y={"a": (1, "b"), 3: None})
    assert found["learner"] == "adaptax.algorithms.maml.MAML"
    assert found["learner.loss.function"] == "loss"
    assert found["learner.inner_steps"] == "3"
    assert found["x"].startswith("int64[9] #")
    assert (found["y"], found["y['a']"], found["y[3]"]) == ("dict of 2", "tuple(1, 'b')", "None")


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (1, 1.0), (1, True), (0.0, -0.0), ("1", 1), ([1], (1,)), ({1, 2}, {1, 3}),
        (np.float32(1), np.float64(1)), (np.zeros(9), np.zeros((3, 3))),
        (np.zeros(9), np.eye(3).ravel()), (jax.random.key(0), jax.random.key(1)),
        (jnp.float32, jnp.bfloat16), (optax.sgd(0.1), optax.sgd(0.2)), (max, min),
        (lambda x: x + 1, lambda x: x + 2), (lambda x, y=1: x, lambda x, y=2: x),
        (lambda x, *, y=1: x, lambda x, *, y=2: x), ([1, [2, [3]]], [1, [2, [4]]]),
        (jax.jit(lambda x: x + 1), jax.jit(lambda x: x + 2)), ("a" * 99, "a" * 98 + "b"),
        (jax.ShapeDtypeStruct((2,), float), jax.ShapeDtypeStruct((3,), float)),
        (np.random.default_rng(0), np.random.default_rng(1)), ("x".join, "y".join),
        (re.compile("a"), re.compile("b")), (eqx.nn.Dropout(0.1), eqx.nn.Dropout(0.2)),
    ],
    ids=range(24),
)  # fmt: skip
def test_what_differs_differs(a, b):
    assert fingerprint(v=a) == fingerprint(v=a)
    assert fingerprint(v=a) != fingerprint(v=b)


def test_what_does_not_matter():
    """Names of local variables, docstrings, places, the order of sets and dictionaries."""

    def one(value):
        """Says one thing."""
        return value + 1

    def other(number):
        """Says another."""
        return number + 1

    other.__name__ = other.__qualname__ = one.__qualname__
    assert fingerprint(v=one) == fingerprint(v=other)
    assert fingerprint(v={"a": 1, "b": 2}) == fingerprint(v={"b": 2, "a": 1})


def test_what_cannot_be_looked_into_is_named():
    table = {"lock": threading.Lock(), "x": 1}
    assert fingerprint(v=table)["v['lock']"] == "_thread.lock, which cannot be compared"


def test_circles_and_crowds():
    circle = [1, object()]
    circle.append(circle)
    assert fingerprint(v=circle)["v[2]"] == "itself"
    crowd = {f"a{i}": {"b": np.arange(i)} for i in range(3 * MOST_ENTRIES)}
    found = fingerprint(v=crowd)
    assert len(found) <= MOST_ENTRIES
    crowd["a7"]["b"][3] += 1
    assert fingerprint(v=crowd) != found
    doubled = []
    for _ in range(60):  # 2^60 leaves
        doubled = [doubled, doubled, object]
    assert any("too large" in text or "#" in text for text in fingerprint(v=doubled).values())


def test_a_large_array_on_the_host_counts_by_rows(monkeypatch):
    monkeypatch.setattr("adaptax.engine.fingerprint.SAMPLED", 1000)
    array = np.zeros((4096, 4))
    before = fingerprint(v=array)
    array[-1] = 1
    assert fingerprint(v=array) != before

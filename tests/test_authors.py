"""Losses and gradients of the recipes' own settings on fixed episodes, in float64.

The golden values are of PyTorch programs below, written from the authors' code in the authors' own
units: MAML's sum over examples divided by the shots, Reptile's sum, MAML++'s mean. Without
PyTorch the values stand, and ours are held against them all the same.
"""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adaptax import tree
from adaptax.recipes import RECIPES
from adaptax.task import Batch, Task

KEY = jax.random.key(0)
STATISTICS = {"norm_statistics", "mean", "var"}  # whose gradient is their update
pytestmark = pytest.mark.usefixtures("x64")


def drawn(model, seed=0):
    """Parameters by path, uniform within Glorot's bound, shifts and scales apart from 0 and 1."""
    numbers, found = np.random.RandomState(seed), {}
    for path, leaf in tree.by_path(tree.parameters(model)).items():
        fans = leaf.shape[-2:] if leaf.ndim > 1 else (1, 1)
        bound = math.sqrt(6 / (sum(fans) * math.prod(leaf.shape[:-2]))) if leaf.ndim > 1 else 0.3
        found[path] = numbers.uniform(-bound, bound, leaf.shape) + ("scale" in path)
    return found


def images(seed, count, way=5):
    """Binary drawings, class by class, and their labels."""
    numbers = np.random.RandomState(seed)
    classes = numbers.uniform(size=(way, 1, 28, 28, 1))
    x = 0.5 * classes + 0.5 * numbers.uniform(size=(way, count // way, 28, 28, 1)) > 0.6
    return x.reshape(count, 28, 28, 1).astype(float), np.arange(count) // (count // way)


def waves(seed, amplitude=3.0, phase=1.0):
    x = np.random.RandomState(seed).uniform(-5, 5, (10, 1))
    return x, amplitude * np.sin(x - phase)


def minibatches(seed, count):
    """Five batches, or so many, of ten drawings or five, as a training or a test has them."""
    x, y = images(seed, 50)
    order = np.random.RandomState(seed).permutation(50).reshape(-1, count)
    return x[order], y[order]


class Fixed(eqx.Module):
    """Given minibatches, one a step."""

    batches: Batch

    def at(self, step):
        return tree.at(self.batches, step)

    def draw(self, model, key):
        raise AssertionError("every step has a batch of its own")


def summary(loss, gradient):
    """Loss, norm of the gradient, and a projection of it for every parameter."""
    gradient = {path: np.asarray(g) for path, g in gradient.items()}
    found = {"loss": float(getattr(loss, "detach", lambda: loss)()),
             "norm": math.sqrt(sum(float(np.sum(g**2)) for g in gradient.values()))}  # fmt: skip
    for path, g in gradient.items():
        found[path] = float(np.sum(g * np.cos(np.arange(g.size)).reshape(g.shape)))
    return found


def meta_of(experiment, seed=0):
    """Learner, and its meta-parameters with the drawn values."""
    learner = experiment.build_learner()
    meta = learner.init(experiment.model(), key=KEY)
    return learner, arrays(tree.replace(meta, drawn(meta, seed)))


def arrays(values):
    return jax.tree.map(lambda leaf: jnp.asarray(leaf) if eqx.is_array_like(leaf) else leaf, values)


def maml_omniglot():
    """MAML, 5-way 1-shot: one step, second order, one query a class."""
    learner, meta = meta_of(RECIPES["maml-omniglot-5w1s"].experiment)
    task = Task(Batch(*map(jnp.asarray, images(1, 5))), Batch(*map(jnp.asarray, images(2, 5))))
    return gradient_of(learner, meta, task)


def maml_sinusoid():
    """MAML, ten points and ten queries of a wave, from the drawn weights."""
    learner, meta = meta_of(RECIPES["maml-sinusoid"].experiment)
    task = Task(Batch(*map(jnp.asarray, waves(1))), Batch(*map(jnp.asarray, waves(2))))
    return gradient_of(learner, meta, task)


def maml_plus_plus(progress):
    """MAML++, 5-way 1-shot Omniglot, with per-step norm weights apart from 0 and 1."""
    experiment = RECIPES["maml++-omniglot-5w1s"].experiment
    learner, model = experiment.build_learner(), experiment.model()
    meta = learner.init(model, key=KEY)
    meta["model"] = arrays(tree.replace(meta["model"], drawn(model)))
    meta["norm_weights"] = arrays(drawn(meta["norm_weights"], 3))
    task = Task(Batch(*map(jnp.asarray, images(1, 5))), Batch(*map(jnp.asarray, images(2, 5))))
    return gradient_of(learner, meta, task, progress)


def gradient_of(learner, meta, task, progress=1.0):
    def loss(meta):
        return learner.meta_loss(meta, task, key=KEY, progress=progress)[0]

    value, gradient = eqx.filter_jit(eqx.filter_value_and_grad(loss))(meta)
    flat = tree.by_path(tree.parameters(gradient))
    return summary(
        value, {path: g for path, g in flat.items() if not STATISTICS & set(path.split("/"))}
    )


def carried(meta):
    """Reptile's state after 25 inner steps."""
    numbers = np.random.RandomState(4)
    return {path: numbers.uniform(0.05, 0.15, leaf.shape) if "/nu/" in path else 25.0
            for path, leaf in tree.by_path(tree.parameters(meta["state"])).items()
            if "/nu/" in path or path.endswith("count")}  # fmt: skip


def reptile(kind):
    """`θ − φ` after five steps on ten examples each, or after two of a test on five each."""
    learner = RECIPES["reptile-omniglot-5w1s"].experiment.build_learner()
    meta = learner.init(RECIPES["reptile-omniglot-5w1s"].experiment.model(), key=KEY)
    meta["model"] = arrays(tree.replace(meta["model"], drawn(meta["model"])))
    meta["state"] = arrays(tree.replace(meta["state"], carried(meta)))
    if kind == "training":
        x, y = minibatches(1, 10)
        task = Task(Fixed(Batch(jnp.asarray(x), jnp.asarray(y))), None)
        loss = lambda meta: learner.meta_loss(meta, task, key=KEY)[0]
        away = eqx.filter_jit(eqx.filter_grad(loss))(meta)["model"]
    else:
        x, y = minibatches(1, 5)
        support = Fixed(Batch(jnp.asarray(x), jnp.asarray(y)))
        path = eqx.filter_jit(lambda m: learner.iterates(m, support, key=KEY, steps=2))(meta)
        away = jax.tree.map(jnp.subtract, meta["model"], tree.at(path, 2))
    flat = tree.by_path(tree.parameters(away))
    return summary(sum(float(jnp.sum(g**2)) for g in flat.values()) / 2, flat)


OURS = {
    "MAML, Omniglot": maml_omniglot,
    "MAML, sinusoid": maml_sinusoid,
    "MAML++, first epoch": lambda: maml_plus_plus(0.0),
    "MAML++, second order": lambda: maml_plus_plus(0.5),
    "Reptile, training": lambda: reptile("training"),
    "Reptile, test": lambda: reptile("test"),
}


# The same in PyTorch


def torch_conv4(p, x, stride, slope, eps, flatten, normed=None):
    """Logits; `normed(block)` gives shift and scale, where they are not the parameters'."""
    import torch
    from torch.nn import functional as F

    x = x.permute(0, 3, 1, 2)
    for i in range(4):
        weight = p[f"blocks/{i}/0/weight"].permute(3, 2, 0, 1)
        total = max((math.ceil(x.shape[-1] / stride) - 1) * stride + 3 - x.shape[-1], 0)
        x = F.pad(x, (total // 2, total - total // 2) * 2)  # TensorFlow's SAME
        x = F.conv2d(x, weight, p[f"blocks/{i}/0/bias"], stride=stride)
        mean, var = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), keepdim=True, correction=0)
        shift, scale = normed(i) if normed else (p[f"blocks/{i}/1/shift"],
                                                 p.get(f"blocks/{i}/1/scale"))  # fmt: skip
        x = (x - mean) / torch.sqrt(var + eps)
        x = (x if scale is None else x * scale[:, None, None]) + shift[:, None, None]
        x = F.leaky_relu(x, slope)
        x = F.max_pool2d(x, 2) if stride == 1 else x
    x = x.permute(0, 2, 3, 1).flatten(1) if flatten else x.mean((2, 3))
    return x @ p["head/weight"] + p["head/bias"]


def torch_maml(loss, p, support, query, lr):
    """Query loss and gradient after one step on everything but batch normalisation."""
    import torch

    adapted = [path for path in p if "/1/s" not in path]
    g = torch.autograd.grad(loss(p, *support), [p[path] for path in adapted], create_graph=True)
    fast = {**p, **{path: p[path] - lr * d for path, d in zip(adapted, g)}}
    value = loss(fast, *query)
    return value, dict(zip(p, torch.autograd.grad(value, list(p.values()))))


def tensors(values):
    import torch

    return {path: torch.tensor(value, requires_grad=True) for path, value in values.items()}


def torch_maml_omniglot():
    import torch
    from torch.nn import functional as F

    def loss(p, x, y):
        logits = torch_conv4(p, torch.tensor(x), 2, 0.0, 1e-3, flatten=False)
        return F.cross_entropy(logits, torch.tensor(y), reduction="sum") / 1  # shot

    p = tensors(drawn(RECIPES["maml-omniglot-5w1s"].experiment.model()))
    value, g = torch_maml(loss, p, images(1, 5), images(2, 5), 0.4)
    return summary(value / 5, {path: d / 5 for path, d in g.items()})  # of the mean over queries


def torch_maml_sinusoid():
    import torch

    def loss(p, x, y):
        h = torch.tensor(x)
        for i in range(2):
            h = torch.relu(h @ p[f"layers/{i}/weight"] + p[f"layers/{i}/bias"])
        return ((h @ p["head/weight"] + p["head/bias"] - torch.tensor(y)) ** 2).mean()

    p = tensors(drawn(RECIPES["maml-sinusoid"].experiment.model()))
    return summary(*torch_maml(loss, p, waves(1), waves(2), 0.01))


def torch_maml_plus_plus(epoch):
    """The loss of an epoch: 20 of them anneal the losses of all steps, 50 are in first order."""
    import torch
    from torch.nn import functional as F

    model = RECIPES["maml++-omniglot-5w1s"].experiment.model()
    p = tensors(drawn(model))
    shapes = {f"blocks/{i}/1/{name}": np.zeros((5, 64))
              for i in range(4) for name in ("shift", "scale")}  # fmt: skip
    rows = tensors(drawn(shapes, 3))
    adapted = [path for path in p if "/1/s" not in path]
    rates = {path: torch.full((5,), 0.1, dtype=torch.float64, requires_grad=True)
             for path in adapted}  # fmt: skip

    def loss(p, x, y, step):
        def normed(i):
            return rows[f"blocks/{i}/1/shift"][step], rows[f"blocks/{i}/1/scale"][step]

        logits = torch_conv4(p, torch.tensor(x), 1, 0.01, 1e-5, True, normed)
        return F.cross_entropy(logits, torch.tensor(y))

    fast, total = dict(p), 0.0
    for step in range(5):
        g = torch.autograd.grad(loss(fast, *images(1, 5), step), [fast[a] for a in adapted],
                                create_graph=epoch > 50)  # fmt: skip
        fast |= {a: fast[a] - rates[a][step] * d for a, d in zip(adapted, g)}
        if epoch < 20:
            last = step == 4
            weight = min(0.2 + epoch * 4 / 100, 0.976) if last else max(0.2 - epoch / 100, 0.006)
            total = total + weight * loss(fast, *images(2, 5), step)
        elif step == 4:
            total = loss(fast, *images(2, 5), step)
    wanted = {**{f"model/{a}": v for a, v in p.items()},
              **{f"norm_weights/{a}": v for a, v in rows.items()},
              **{f"rates/{a}": v for a, v in rates.items()}}  # fmt: skip
    g = torch.autograd.grad(total, list(wanted.values()), allow_unused=True, materialize_grads=True)
    return summary(total, dict(zip(wanted, g)))


def torch_reptile(kind):
    import torch
    from torch.nn import functional as F

    experiment = RECIPES["reptile-omniglot-5w1s"].experiment
    start = drawn(experiment.model())
    p, numbers = tensors(start), np.random.RandomState(4)
    v = {path: torch.tensor(numbers.uniform(0.05, 0.15, value.shape))
         for path, value in start.items()}  # fmt: skip
    x, y = minibatches(1, 10 if kind == "training" else 5)
    for step in range(5 if kind == "training" else 2):
        logits = torch_conv4(p, torch.tensor(x[step]), 2, 0.0, 1e-3, flatten=True)
        loss = F.cross_entropy(logits, torch.tensor(y[step]), reduction="sum")
        g = dict(zip(p, torch.autograd.grad(loss, list(p.values()))))
        v = {path: 0.999 * v[path] + 0.001 * g[path] ** 2 for path in p}
        unbiased = {path: v[path] / (1 - 0.999 ** (25 + step + 1)) for path in p}
        p = {path: (p[path] - 1e-3 * g[path] / (unbiased[path].sqrt() + 1e-8)).detach()
             .requires_grad_() for path in p}  # fmt: skip
    away = {path: start[path] - p[path].detach().numpy() for path in p}
    return summary(sum(float(np.sum(a**2)) for a in away.values()) / 2, away)


THEIRS = {
    "MAML, Omniglot": torch_maml_omniglot,
    "MAML, sinusoid": torch_maml_sinusoid,
    "MAML++, first epoch": lambda: torch_maml_plus_plus(0),
    "MAML++, second order": lambda: torch_maml_plus_plus(125),
    "Reptile, training": lambda: torch_reptile("training"),
    "Reptile, test": lambda: torch_reptile("test"),
}


GOLDEN = {
    "MAML, Omniglot": {
        "loss": 3.4082675217154885,
        "norm": 42.36038888176234,
        "blocks/0/0/weight": -0.44333889353931877,
        "blocks/3/1/shift": 0.13953105444969205,
        "head/weight": 1.9897853650750936,
    },
    "MAML, sinusoid": {
        "loss": 3.6581490831275616,
        "norm": 3.6491217196936327,
        "layers/0/bias": -1.3070283978116983,
        "layers/1/weight": -0.70070393291759,
        "head/weight": -0.6903163693454112,
    },
    "MAML++, first epoch": {
        "loss": 3.141836302050875,
        "norm": 17.319464337702676,
        "model/blocks/0/0/weight": 1.2022887195804797,
        "model/head/weight": -0.47867764716319006,
        "norm_weights/blocks/3/1/shift": -0.05454419752226787,
        "rates/blocks/0/0/weight": 1.0858697913770732,
        "rates/head/weight": 7.671417828753516,
    },
    "MAML++, second order": {
        "loss": 2.313969813223788,
        "norm": 261.06270959271035,
        "model/blocks/0/0/weight": -71.48178580535479,
        "model/head/weight": 2.0535193569157393,
        "norm_weights/blocks/3/1/shift": 0.32804778358619474,
        "rates/blocks/0/0/weight": -20.32707416621138,
        "rates/head/weight": -24.685367467107532,
    },
    "Reptile, training": {
        "loss": 0.031924722687154475,
        "norm": 0.2526844779053691,
        "blocks/0/0/weight": 0.17108328993428012,
        "blocks/3/1/shift": 0.0016555231905765314,
        "head/weight": 0.031730061295582514,
    },
    "Reptile, test": {
        "loss": 0.005377153674972711,
        "norm": 0.10370297657225382,
        "blocks/0/0/weight": 0.06381862834792969,
        "blocks/3/1/shift": -0.0002809347308403928,
        "head/weight": 0.006509071268617147,
    },
}
"""Of the programs in PyTorch: loss, norm of the gradient, projections of some parameters'."""


def agree(found, name):
    golden = GOLDEN[name]
    for what, value in golden.items():
        assert found[what] == pytest.approx(value, rel=1e-9, abs=1e-10 * golden["norm"]), what


@pytest.mark.parametrize("name", GOLDEN)
def test_recipes_have_the_authors_losses_and_gradients(name):
    agree(OURS[name](), name)


@pytest.mark.parametrize("name", GOLDEN)
def test_the_golden_values_are_those_of_the_authors_programs(name):
    pytest.importorskip("torch")
    agree(THEIRS[name](), name)

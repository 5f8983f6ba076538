import os
import subprocess
import sys
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import adaptax as ax
from adaptax.conv import fast
from adaptax.models.bridge import from_torch, to_torch

torch = pytest.importorskip("torch")
pytest.importorskip("torchax")
nn = torch.nn

SHARED = Path(__file__).parents[2] / "shared" / "data"


def small(dtype=torch.float32, dropout=0.5, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, stride=2, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.Conv2d(4, 4, 3, padding="same"),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(4 * 2 * 2, 3),
    ).to(dtype)


def images(n=6, dtype=np.float32, seed=0):
    return np.random.default_rng(seed).random((n, 8, 8, 1)).astype(dtype)


def to_nchw(x):
    return torch.tensor(x).permute(0, 3, 1, 2)


def close(a, b, tolerance=1e-5):
    b = b.detach().float().numpy() if isinstance(b, torch.Tensor) else b
    np.testing.assert_allclose(np.asarray(a, np.float64), b, tolerance, tolerance)


def arrays(params, prefix=""):
    """Parameters by their PyTorch names."""
    for name, value in params.items():
        if isinstance(value, dict):
            yield from arrays(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def test_outputs_and_gradients_equal_torch():
    module, x = small(dropout=0.0), images()
    model = from_torch(module)
    close(model(jnp.asarray(x)), module(to_nchw(x)))
    loss = lambda model, x: jnp.sum(jnp.sin(model(x)))
    grads = jax.jit(jax.grad(loss))(model, jnp.asarray(x)).params
    torch.sin(module(to_nchw(x))).sum().backward()
    expected = dict(module.named_parameters())
    assert {name for name, _ in arrays(grads)} == set(expected)
    for name, grad in arrays(grads):
        close(grad, expected[name].grad, 1e-5)


def test_maml_gradient_equals_double_backward():
    module = small(torch.float64, dropout=0.0)
    xs, ys, xq, yq = (images(6), np.arange(6) % 3, images(9, seed=1), np.arange(9) % 3)

    def adapted():
        params = dict(module.named_parameters())
        for _ in range(2):
            logits = torch.func.functional_call(module, params, (to_nchw(xs).double(),))
            loss = nn.functional.cross_entropy(logits, torch.tensor(ys))
            grads = torch.autograd.grad(loss, list(params.values()), create_graph=True)
            params = {name: p - 0.4 * g for (name, p), g in zip(params.items(), grads)}
        return torch.func.functional_call(module, params, (to_nchw(xq).double(),))

    value = nn.functional.cross_entropy(adapted(), torch.tensor(yq))
    expected = dict(
        zip(
            dict(module.named_parameters()),
            torch.autograd.grad(value, list(module.parameters())),
        )
    )
    with jax.enable_x64(True):
        task = ax.Task(
            ax.Batch(jnp.asarray(xs), jnp.asarray(ys)), ax.Batch(jnp.asarray(xq), jnp.asarray(yq))
        )
        tasks = jax.tree.map(lambda leaf: leaf[None], task)
        learner = ax.MAML(ax.losses.cross_entropy, inner_lr=0.4, inner_steps=2)
        call = lambda how: jax.jit(
            lambda model: ax.meta_value_and_grad(
                learner, model, tasks, key=jax.random.key(0), **how
            )
        )
        (ours, _), grads = call({"fast_path": True})(from_torch(module))
    close(ours, value.detach().numpy(), 1e-10)
    for name, grad in arrays(grads.params):
        assert grad.dtype == jnp.float64
        close(grad, expected[name].numpy(), 1e-9)


def test_the_fast_convolution_catches_torch_convolutions():
    model, x = from_torch(small()), jnp.asarray(images())
    count = lambda f: str(jax.make_jaxpr(f)(model, x)).count("conv_general_dilated[")
    call = lambda model, x: model(x)
    assert count(call) == 2
    assert count(fast(call, True)) == 0
    close(fast(call, True)(model, x), np.asarray(model(x)))


def test_it_is_mapped_over_models_and_batches():
    model, x = from_torch(small()), jnp.asarray(np.stack([images(seed=s) for s in range(3)]))
    models = jax.vmap(lambda s: jax.tree.map(lambda leaf: s * leaf, model))(jnp.arange(1.0, 4.0))
    together = jax.vmap(lambda model, x: model(x))(models, x)
    apart = [jax.tree.map(lambda leaf, i=i: leaf[i], models)(x[i]) for i in range(3)]
    close(together, np.stack(apart), 1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_there_and_back_is_exact(dtype):
    module = small(dtype)
    with jax.enable_x64(dtype == torch.float64):
        model = from_torch(module)
        name = str(dtype).removeprefix("torch.")
        assert {leaf.dtype.name for leaf in jax.tree.leaves(model)} == {name}
        assert model(jnp.asarray(images())).dtype.name == name
        back = to_torch(model, module)
    assert back is not module
    for p, q in zip(module.parameters(), back.parameters(), strict=True):
        assert p.dtype == q.dtype
        assert p is not q
        assert torch.equal(p, q)
    assert back.training is module.training


def test_adapted_parameters_are_written_back():
    module, x = small(dropout=0.0), images()
    model = jax.tree.map(lambda leaf: 1.5 * leaf, from_torch(module))
    back = to_torch(model, module)
    close(model(jnp.asarray(x)), back(to_nchw(x)))
    assert torch.equal(back[0].weight, 1.5 * module[0].weight)


def test_batch_norm_uses_the_batch_and_dropout_is_off():
    module, x = small(), images()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    for mode in (True, False):
        module.train(mode)
        model = from_torch(module)
        y = model(jnp.asarray(x))
        close(y, model(jnp.asarray(x)), 0)
        reference = small(dropout=0.0).train()
        close(y, reference(to_nchw(x)))
        assert module.training is mode
    after = module.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert {name for name, _ in arrays(model.params)} == {
        name for name, _ in module.named_parameters()
    }


def test_with_a_key_dropout_draws_anew_at_every_pass_of_training():
    module, x = small(), jnp.asarray(images())
    model = from_torch(module, key=jax.random.key(0))
    close(model(x), model(x), 0)  # the same key
    keyed = ax.roles.fresh(model, jax.random.key(1))
    assert not np.allclose(model(x), keyed(x))
    batch, learner = ax.Batch(x, jnp.arange(6) % 3), ax.MAML(ax.losses.cross_entropy, 0.1)
    ends = [learner.adapt(model, batch, key=jax.random.key(i)) for i in range(2)]
    assert not np.allclose(ends[0].params["7"]["bias"], ends[1].params["7"]["bias"])
    assert ax.tree.count(model) == ax.tree.count(from_torch(module))
    assert torch.equal(to_torch(ends[0], module)[0].bias, torch.tensor(
        np.array(ends[0].params["0"]["bias"])))  # fmt: skip
    module.eval()
    close(from_torch(module, key=jax.random.key(0))(x), from_torch(module)(x))


def test_tied_weights_take_one_step():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = (nn.Linear(3, 3, bias=False) for _ in "ab")
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(torch.tanh(self.a(x)))

    module = Tied()
    x, y = np.random.default_rng(0).random((2, 4, 3)).astype(np.float32)
    adapted = ax.MAML(ax.losses.mse, 0.1, 1).adapt(
        from_torch(module), ax.Batch(jnp.asarray(x), jnp.asarray(y)), key=jax.random.key(0)
    )
    loss = ((module(torch.tensor(x)) - torch.tensor(y)) ** 2).mean()
    (slope,) = torch.autograd.grad(loss, [module.a.weight])
    back = to_torch(adapted, module)
    assert back.a.weight is back.b.weight
    close(back.b.weight.detach().numpy(), module.a.weight - 0.1 * slope)


def test_drawing_random_numbers_is_an_error():
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 2)

        def forward(self, x):
            return nn.functional.dropout(self.layer(x))

    with pytest.raises(ValueError, match=r"training=self\.training"):
        from_torch(Noisy())(jnp.ones((3, 2)))
    with pytest.raises(ValueError, match=r"training=self\.training"):
        eqx.filter_jit(lambda model, x: model(x))(from_torch(Noisy()), jnp.ones((3, 2)))


class Odd(nn.Module):
    """Tied, frozen, integer and buffered tensors, two inputs."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)
        self.b.weight = self.a.weight
        self.frozen = nn.Parameter(torch.tensor([1.0, 2.0, 3.0]), requires_grad=False)
        self.register_buffer("table", torch.tensor([2, 0, 1]))
        self.register_buffer("offset", torch.ones(3))
        self.plain = torch.full((3,), 5.0)

    def forward(self, x, scale):
        return (self.b(self.a(x)) * self.frozen + self.offset)[:, self.table] * scale + self.plain


def test_only_trainable_parameters_are_trained():
    module = Odd()
    model = from_torch(module)
    assert jax.tree.map(jnp.shape, model.params) == {
        "a": {"weight": (3, 3), "bias": (3,)},
        "b": {"bias": (3,)},
    }
    x = np.random.default_rng(0).random((4, 3)).astype(np.float32)
    expected = module(torch.tensor(x), torch.tensor(2.0))
    close(model({"x": jnp.asarray(x), "scale": jnp.asarray(2.0)}), expected)
    back = to_torch(jax.tree.map(lambda leaf: leaf + 1, model), module)
    assert back.a.weight is back.b.weight
    assert torch.equal(back.a.weight, module.a.weight + 1)
    assert torch.equal(back.frozen, module.frozen)
    module.requires_grad_(False)
    with pytest.raises(ValueError, match="nothing to meta-learn"):
        from_torch(module)


def test_the_module_may_change_afterwards():
    module, x = nn.Linear(3, 2), jnp.ones((4, 3))
    model = from_torch(module)
    y = np.asarray(model(x))
    with torch.no_grad():
        module.weight.fill_(7.0)
    close(model(x), y, 0)
    close(eqx.filter_jit(lambda model, x: model(x))(model, x), y)


def test_layouts():
    module, x = small(dropout=0.0), images()
    expected = module(to_nchw(x))
    close(from_torch(module, channels_last=False)(jnp.asarray(x.transpose(0, 3, 1, 2))), expected)
    sequence = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True).eval()
    z = np.random.default_rng(0).random((2, 5, 4)).astype(np.float32)
    close(from_torch(sequence)(jnp.asarray(z)), sequence(torch.tensor(z)))


def test_paths_name_the_submodules():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.fc = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x):
            return self.fc(torch.relu(self.body(x)))

    model = from_torch(Net())
    mask = ax.tree.adaptable(model, ax.tree.under("params/fc")).params
    assert mask == {
        "body": {"weight": False, "bias": False},
        "fc": {"weight": True, "bias": True},
    }


def test_global_settings_stay():
    module = small()
    state = lambda: (
        torch.get_default_dtype(),
        torch.backends.mha.get_fastpath_enabled(),
        torch.initial_seed(),
        torch.get_rng_state().tolist(),
        torch.is_grad_enabled(),
        jax.config.jax_enable_x64,
        jax.config.jax_default_matmul_precision,
        jax.config.jax_default_prng_impl,
        torch.overrides._get_current_function_mode(),
        torch.utils._python_dispatch._get_current_dispatch_mode(),
    )
    before = state()
    model = from_torch(module)
    jax.jit(jax.grad(lambda model, x: jnp.sum(model(x))))(model, jnp.asarray(images()))
    with pytest.raises(ValueError, match="conv_general_dilated"):
        model(jnp.ones((2, 8, 8, 5)))
    to_torch(model, module)
    assert state() == before
    assert type(torch.ones(2) + 1) is torch.Tensor


def test_errors():
    module = small()
    model = from_torch(module)
    with pytest.raises(TypeError, match="not a Functional"):
        from_torch(model)
    with pytest.raises(ValueError, match="'1' is parametrized"):
        from_torch(nn.Sequential(nn.ReLU(), nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))))
    with pytest.warns(FutureWarning):
        hooked = nn.utils.weight_norm(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="'1' computes its weight in a hook, WeightNorm"):
        from_torch(nn.Sequential(nn.ReLU(), hooked))
    ensemble = ax.Ensemble(ax.tree.stack([model, model]))
    with pytest.raises(TypeError, match="Ensemble"):
        to_torch(ensemble, module)
    assert to_torch(ensemble.member(1), module)(torch.zeros(2, 1, 8, 8)).shape == (2, 3)
    with pytest.raises(ValueError, match=r"of shape \(2, 4"):
        to_torch(ax.tree.stack([model, model]), module)
    with pytest.raises(ValueError, match="no such parameter"):
        to_torch(model, nn.Linear(2, 2))


def test_without_torch_the_error_says_what_to_install():
    code = (
        "import sys; sys.modules['torchax'] = None\n"
        "from adaptax.models.bridge import from_torch\n"
        "try: from_torch(None)\n"
        "except ImportError as error: print(error)\n"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install adaptax[torch]" in out.stdout


def test_importing_adaptax_does_not_import_torch():
    code = "import sys, adaptax, adaptax.models.bridge; print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"


def meta_train(module, tasks, steps):
    learner = ax.MAML(ax.losses.cross_entropy, inner_lr=0.4, inner_steps=1)
    model = from_torch(module)
    result = ax.fit(
        learner, model, tasks.train, steps=steps, meta_batch=4, chunk=steps // 2,
        fast_path=True, devices=1, key=jax.random.key(0),
    )  # fmt: skip
    losses = [record["loss"] for record in result.history]
    assert losses[-1] < losses[0]
    task = tasks.test.sample(jax.random.key(1))
    adapted = learner.adapt(result.meta, task.support, key=jax.random.key(2))
    back = to_torch(adapted, module)
    close(adapted(task.query.x), back(to_nchw(np.asarray(task.query.x))), 1e-4)


def test_meta_training_on_arrays():
    rng = np.random.default_rng(0)
    centres = rng.random((20, 8, 8, 1))
    x = (centres[:, None] + 0.2 * rng.random((20, 10, 8, 8, 1))).reshape(200, 8, 8, 1)
    tasks = ax.tasks.from_arrays(
        x.astype(np.float32), np.repeat(np.arange(20), 10), way=3, shot=1, query=3
    )
    meta_train(small(dropout=0.0), tasks, 40)


def test_meta_training_on_omniglot(tmp_path, monkeypatch):
    root = Path(os.environ.get("ADAPTAX_DATA") or SHARED)
    if not (root / "omniglot").is_dir():
        pytest.skip(f"no Omniglot: ADAPTAX_DATA is not set and {root} does not have it")
    monkeypatch.setenv("ADAPTAX_CACHE", str(tmp_path))
    tasks = ax.tasks.omniglot(way=5, shot=1, query=2, data_root=root)
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Flatten(), nn.Linear(8 * 7 * 7, 5),
    )  # fmt: skip
    meta_train(net, tasks, 20)

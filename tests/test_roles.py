"""What of a model is trained, state, randomness and shared, for the models of every library."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import adaptax as ax
from adaptax import roles, tree
from adaptax.engine.mapping import local_mesh
from adaptax.engine.state import initial_state
from learners import LEARNERS

KEY = jax.random.key(0)
mse = ax.losses.mse


def chosen(model):
    """The paths of the parameters."""
    mask = tree.by_path(roles.trained(model))
    return {path for path, is_trained in mask.items() if is_trained}


def same(a, b):
    """Equal structures and bits."""
    data = lambda leaf: np.asarray(jax.random.key_data(leaf) if roles.is_key(leaf) else leaf)
    a, b = (tree.by_path(eqx.filter(x, eqx.is_array)) for x in (a, b))
    return a.keys() == b.keys() and all(np.array_equal(data(a[p]), data(b[p])) for p in a)


def sines(count=4):
    return jax.vmap(ax.tasks.sinusoid(shot=5, query=5).train.sample)(jax.random.split(KEY, count))


class Everything(nnx.Module):
    """Tied weights, running statistics, dropout, a stray array and a frozen variable."""

    def __init__(self, rngs):
        self.first = nnx.Linear(1, 6, rngs=rngs)
        self.norm = nnx.BatchNorm(6, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.tied = nnx.List([nnx.Linear(6, 6, use_bias=False, rngs=rngs) for _ in "ab"])
        self.tied[1].kernel = self.tied[0].kernel
        self.head = nnx.Linear(6, 1, rngs=rngs)
        self.stray = nnx.data(jnp.ones(6))
        self.buffer = nnx.Cache(jnp.full(6, 0.5))

    def __call__(self, x):
        h = self.drop(jnp.tanh(self.norm(self.first(x)))) * self.stray + self.buffer[...]
        return self.head(jnp.tanh(self.tied[1](jnp.tanh(self.tied[0](h)))))


# What is what


def test_of_an_nnx_module_params_alone_are_trained():
    class Lora(nnx.Module):
        def __init__(self, rngs):
            self.base = nnx.BatchStat(jnp.ones((2, 2)))
            self.lora = nnx.LoRA(2, 1, 2, rngs=rngs)

    assert chosen(Everything(nnx.Rngs(0))) == {
        "first/kernel/value", "first/bias/value", "norm/scale/value", "norm/bias/value",
        "tied/0/kernel/value", "tied/1/kernel/value", "head/kernel/value", "head/bias/value",
    }  # fmt: skip
    assert chosen(Lora(nnx.Rngs(0))) == {"lora/lora_a/value", "lora/lora_b/value"}
    # Also inside of other modules, and as a state.
    net = nnx.BatchNorm(2, rngs=nnx.Rngs(0))
    inside = ax.Functional({"net": net, "scale": jnp.ones(())}, lambda p, x: p["net"](x))
    wanted = {"params/net/scale/value", "params/net/bias/value", "params/scale"}
    assert chosen(inside) == wanted
    assert {p.split("/")[0] for p in chosen(nnx.state(net))} == {"scale", "bias"}


def test_equinox_state_and_running_statistics_are_no_parameters():
    net, state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(3, "batch", mode="batch")
    assert chosen({"net": net, "state": state}) == {"net/weight", "net/bias"}
    assert chosen(eqx.nn.BatchNorm(3, "batch", mode="batch")) == {"weight", "bias"}
    layer = ax.models.BatchNorm(3, scale=True).tracking()
    assert chosen(layer) == {"shift", "scale"}


def test_a_node_may_say_what_its_state_is():
    class Scaled(eqx.Module):
        weight: jax.Array
        mean: jax.Array

        def is_state(self, path):
            return path == "mean"

        def __call__(self, x):
            return (x - self.mean) * self.weight

    model = {"a": [Scaled(jnp.ones(1), jnp.zeros(1))]}
    assert chosen(model) == {"a/0/weight"}
    out = ax.MAML(mse, 0.1).adapt(model["a"][0], ax.Batch(jnp.ones((2, 1)), jnp.zeros((2, 1))),
                                  key=KEY)  # fmt: skip
    assert np.array_equal(out.mean, [0.0])
    assert np.allclose(out.weight, 0.8)


def test_complex_parameters_are_refused():
    model = ax.Functional({"w": jnp.ones(1, jnp.complex64)}, lambda p, x: jnp.real(x * p["w"]))
    for call in (
        lambda: ax.MAML(mse).adapt(model, sines().support, key=KEY),
        lambda: ax.meta_value_and_grad(ax.MAML(mse), model, sines(), key=KEY),
        lambda: tree.norm(model),
        lambda: ax.svgd.direction({"w": jnp.ones((2, 1), jnp.complex64)}, None),
    ):
        with pytest.raises(ValueError, match=r"w is complex64, and parameters are real"):
            call()
    fixed = ax.Functional({"w": jnp.ones(1), "c": jnp.ones(1, jnp.complex64)},
                          lambda p, x: jnp.real(x * p["w"] * p["c"]), tree.under("w"))  # fmt: skip
    assert chosen(fixed) == {"params/w"}


def test_keys_of_the_old_kind_are_refused():
    model = ax.Functional({"w": jnp.ones(1), "rng": jax.random.PRNGKey(0)}, lambda p, x: x * p["w"])
    with pytest.raises(ValueError, match=r"params/rng .* is uint32\[2\].*wrap_key_data"):
        ax.fit(ax.MAML(mse), model, ax.tasks.sinusoid().train, steps=1, key=KEY)


# Shared


def test_shared_variables_are_one_parameter():
    net = Everything(nnx.Rngs(0))
    once = roles.deduplicate(net)
    assert type(once) is Everything
    assert "tied/1/kernel/value" not in tree.by_path(once)
    back = roles.reshare(jax.tree.map(lambda leaf: leaf, once))
    assert back.tied[0].kernel is back.tied[1].kernel
    assert same(back, net)
    assert net.tied[0].kernel is not back.tied[0].kernel  # the user's own is never touched
    assert tree.count(net) == 12 + 12 + 36 + 7
    assert tree.squared_distance(net, net) == 0
    empty = eqx.filter(once, lambda leaf: False)
    again = roles.deduplicate(roles.reshare(empty))
    assert jax.tree.structure(again) == jax.tree.structure(empty)
    stacked = tree.stack([net, net])
    assert stacked.tied[0].kernel is stacked.tied[1].kernel
    one = tree.at(stacked, 1)
    assert one.tied[0].kernel is one.tied[1].kernel
    assert roles.deduplicate(model := ax.models.MLP(1, 1, (2,), key=KEY)) is model


def test_a_shared_module_is_shared():
    class Twice(nnx.Module):
        def __init__(self, rngs):
            self.a = nnx.Linear(1, 1, rngs=rngs)
            self.deep = nnx.Dict(b=self.a)

        def __call__(self, x):
            return self.deep.b(self.a(x))

    net = Twice(nnx.Rngs(0))
    assert tree.count(net) == 2
    meta = {"model": net, "other": Twice(nnx.Rngs(1))}
    back = roles.reshare(roles.deduplicate(meta))
    assert back["model"].deep.b.kernel is back["model"].a.kernel
    assert back["other"].a.kernel is not back["model"].a.kernel
    x = jnp.arange(3.0)[:, None]
    w, b = net.a.kernel[...], net.a.bias[...]
    adapted = ax.MAML(mse, 0.1, 1).adapt(net, ax.Batch(x, 2 * x), key=KEY)
    loss = lambda w, b: jnp.mean(((x @ w + b) @ w + b - 2 * x) ** 2)
    slope = jax.grad(loss, (0, 1))(w, b)
    assert np.allclose(adapted.deep.b.kernel[...], w - 0.1 * slope[0], atol=1e-6)
    assert np.allclose(adapted.deep.b.bias[...], b - 0.1 * slope[1], atol=1e-6)


class Tied(nnx.Module):
    """Two convolutions of one kernel."""

    def __init__(self, rngs):
        self.a, self.b = (nnx.Conv(1, 1, (3, 3), use_bias=False, rngs=rngs) for _ in "ab")
        self.b.kernel = self.a.kernel

    def __call__(self, x):
        return self.b(jnp.tanh(self.a(x)))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("how", [{"mapping": "scan", "fast_path": True}, {"mapping": "vmap"}])
def test_the_second_order_gradient_of_a_shared_kernel(how):
    x, y = (jax.random.normal(k, (3, 2, 4, 4, 1)) for k in jax.random.split(KEY))
    net = jax.tree.map(lambda leaf: leaf.astype(float), roles.deduplicate(Tied(nnx.Rngs(0))))
    net = roles.reshare(net)
    w = net.a.kernel[...]
    conv = lambda x, w: jax.lax.conv_general_dilated(
        x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    loss = lambda w, x, y: jnp.mean((conv(jnp.tanh(conv(x, w)), w) - y) ** 2)

    def meta_loss(w):
        end = lambda x, y: w - 0.5 * jax.grad(loss)(w, x, y)
        return jnp.mean(jax.vmap(lambda x, y: loss(end(x, y), x[::-1], y))(x, y))

    tasks = ax.Task(ax.Batch(x, y), ax.Batch(x[:, ::-1], y))
    (value, _), grads = ax.meta_value_and_grad(ax.MAML(mse, 0.5), net, tasks, key=KEY, **how)
    assert np.allclose(value, meta_loss(w), rtol=1e-12)
    assert grads.a.kernel is grads.b.kernel
    assert np.allclose(grads.b.kernel[...], jax.grad(meta_loss)(w), rtol=1e-10)


@pytest.mark.parametrize("name", ["Meta-SGD", "Reptile carry", "MAML++", "PLATIPUS", "EMAML"])
def test_every_learner_keeps_what_is_shared_and_what_is_state(name, tmp_path):
    learner, net = LEARNERS[name](mse), Everything(nnx.Rngs(0))
    tasks = ax.tasks.sinusoid(shot=5, query=5)
    result = ax.fit(learner, net, tasks.train, steps=2, meta_batch=2, key=KEY, optimizer=None)
    shared = [v for v in variables(result.meta) if v.shape[-2:] == (6, 6)]
    assert shared
    assert len(set(map(id, shared))) * 2 == len(shared)
    start = tree.by_path(jax.tree.map(lambda leaf: leaf, learner.init(net, key=KEY)))
    for path, leaf in tree.by_path(result.meta).items():
        still = any(name in path for name in ("/mean/value", "/var/value", "stray", "buffer"))
        if still and not path.startswith("norm_statistics"):  # MAML++'s own
            assert np.array_equal(leaf, start[path]), path
    task = tasks.test.sample(KEY)
    adapted = learner.adapt(result.meta, task.support, key=KEY)
    kernels = [v for v in variables(adapted) if v.shape[-2:] == (6, 6)]
    assert len(kernels) == 2
    assert np.array_equal(kernels[0][...], kernels[1][...])
    assert np.all(np.isfinite(adapted(task.query.x)))
    ax.save(tmp_path / "meta.safetensors", result.meta)
    loaded = ax.load(tmp_path / "meta.safetensors", learner.init(net, key=KEY))
    assert same(loaded, result.meta)
    if name == "Meta-SGD":
        report = ax.evaluate(learner, loaded, tasks.test, episodes=2, key=KEY)
        assert report.protocol["backbone"] == "Everything, 67 parameters"


def variables(value):
    is_variable = lambda node: isinstance(node, nnx.Param)
    found = jax.tree.leaves(value, is_leaf=is_variable)
    return [leaf for leaf in found if is_variable(leaf) and jax.tree.leaves(leaf)]


# Randomness


class Masked(nnx.Module):
    """Dropout in two places from one stream, whose masks it is asked for."""

    def __init__(self, rngs):
        self.a, self.b = nnx.Linear(1, 40, rngs=rngs), nnx.Linear(40, 1, rngs=rngs)
        self.rngs, self.drop = rngs, nnx.Dropout(0.5)
        self.seen = []

    def __call__(self, x):
        for _ in range(2):
            mask = self.drop(jnp.ones((len(x), 40)), rngs=self.rngs)
            jax.debug.callback(lambda m: SEEN.append(np.asarray(m).tobytes()), mask)
        return self.b(mask * jnp.tanh(self.a(x)))


SEEN: list[bytes] = []


def test_every_pass_draws_other_masks():
    net, tasks = Masked(nnx.Rngs(0)), ax.tasks.sinusoid(shot=5, query=5)
    SEEN.clear()
    how = {"steps": 3, "meta_batch": 2, "mapping": "scan", "key": KEY}
    first = ax.fit(ax.MAML(mse, 0.01, 2), net, tasks.train, **how)
    jax.effects_barrier()
    assert len(SEEN) == len(set(SEEN)) == 3 * 2 * 3 * 2
    again = ax.fit(ax.MAML(mse, 0.01, 2), net, tasks.train, **how)
    assert same(first.meta, again.meta)
    net.eval()
    SEEN.clear()
    ax.fit(ax.MAML(mse, 0.01, 2), net, tasks.train, **how)
    jax.effects_barrier()
    assert len(set(SEEN)) == 1


def test_masks_do_not_depend_on_the_mapping_or_devices():
    net = Everything(nnx.Rngs(0))
    gradients = [
        ax.meta_value_and_grad(ax.MAML(mse, 0.1, 2), net, sines(), key=KEY, **how)[1]
        for how in ({"mapping": "scan"}, {"mapping": "vmap"},
                    {"mesh": local_mesh(4, 2)})
    ]  # fmt: skip
    for other in gradients[1:]:
        for a, b in zip(jax.tree.leaves(gradients[0]), jax.tree.leaves(other), strict=True):
            assert np.allclose(a, b, rtol=1e-4, atol=1e-6)


def test_a_run_with_dropout_resumes_to_the_bit(tmp_path):
    net, tasks = Everything(nnx.Rngs(0)), ax.tasks.sinusoid(shot=5, query=5)
    learner = ax.MAML(mse, 0.1, train_only=lambda path: "first" not in path)
    fit = lambda steps, **how: ax.fit(learner, net, tasks.train, steps=4, meta_batch=2, key=KEY,
                                      chunk=2, optimizer=optax.adam(1e-3), **how)  # fmt: skip
    whole = fit(4)
    stop = lambda record: (_ for _ in ()).throw(KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        fit(4, run=str(tmp_path), watch=stop)
    resumed = fit(4, run=str(tmp_path), resume=True)
    assert len(resumed.history) == len(whole.history)
    assert same(resumed.meta, whole.meta)
    assert same(resumed.meta.first, net.first)


# Other libraries


class Net(eqx.Module):
    layers: list

    def __init__(self, key):
        keys = jax.random.split(key)
        self.layers = [
            eqx.nn.Linear(1, 8, key=keys[0]), eqx.nn.BatchNorm(8, "batch", mode="batch"),
            eqx.nn.Dropout(0.5), eqx.nn.Linear(8, 1, key=keys[1]),
        ]  # fmt: skip

    def __call__(self, x, state=None, *, key=None):
        first, norm, drop, last = self.layers
        x = first(x)
        x, state = norm(x, state)
        return last(drop(jnp.tanh(x), key=key)), state


def test_equinox_with_state_and_dropout():
    net, state = eqx.nn.make_with_state(Net)(KEY)
    model, tasks = ax.Batched(net, state, KEY), sines()
    assert {path.split("/")[0] for path in chosen(model)} == {"model"}
    result = ax.fit(ax.MAML(mse, 0.1), model, ax.tasks.sinusoid().train, steps=3, key=KEY)
    assert same(result.meta.state, state)
    support = jax.tree.map(lambda leaf: leaf[0], tasks.support)
    adapted = ax.MAML(mse, 0.1).adapt(result.meta, support, key=KEY)
    assert same(adapted.state, state)
    assert adapted(support.x).shape == adapted(support.x).shape == (5, 1)
    # By hand: what the layer makes of the batch, with the key that the pass has.
    keyed = roles.fresh(model, jax.random.fold_in(KEY, 0))
    slope = eqx.filter_grad(lambda net: mse(dataclasses.replace(keyed, model=net), support))(net)
    ours = ax.MAML(mse, 0.1).adapt(model, support, key=KEY).model
    for path, leaf in tree.by_path(eqx.filter(slope, eqx.is_array)).items():
        want = tree.by_path(net)[path] - 0.1 * leaf
        assert np.allclose(tree.by_path(ours)[path], want, atol=1e-6), path


def test_layers_that_lack_something_are_named():
    net, _ = eqx.nn.make_with_state(Net)(KEY)
    batch = jax.tree.map(lambda leaf: leaf[0], sines().support)
    with pytest.raises(ValueError, match=r"layer model/layers/1 .*make_with_state"):
        ax.MAML(mse).adapt(ax.Batched(net), batch, key=KEY)
    drop = eqx.nn.Sequential([eqx.nn.Linear(1, 1, key=KEY), eqx.nn.Dropout(0.5)])
    with pytest.raises(ValueError, match=r"model/layers/1 .* dropout, .*key=key"):
        ax.meta_value_and_grad(ax.MAML(mse), ax.Batched(drop), sines(), key=KEY)
    ax.MAML(mse).adapt(ax.Batched(drop, key=KEY), batch, key=KEY)
    ax.MAML(mse).adapt(ax.Batched(eqx.nn.inference_mode(drop)), batch, key=KEY)


class LinenNet(linen.Module):
    @linen.compact
    def __call__(self, x):
        x = linen.BatchNorm(use_running_average=True)(linen.Dense(8)(x))
        return linen.Dense(1)(linen.Dropout(0.5, deterministic=False)(jnp.tanh(x)))


def linen_model():
    net = LinenNet()
    variables = net.init({"params": KEY, "dropout": KEY}, jnp.ones((2, 1)))

    def apply(v, x):
        rest = {name: v[name] for name in v if name != "key"}
        return net.apply(rest, x, rngs={"dropout": v["key"]})

    return ax.Functional({**variables, "key": KEY}, apply), "batch_stats"


def haiku_model():
    haiku = pytest.importorskip("haiku")

    def forward(x, training=False):
        x = haiku.BatchNorm(True, True, 0.9)(haiku.Linear(8)(x), training)
        return haiku.Linear(1)(haiku.dropout(haiku.next_rng_key(), 0.5, jnp.tanh(x)))

    net = haiku.transform_with_state(forward)
    params, state = net.init(KEY, jnp.ones((2, 1)), True)
    apply = lambda v, x: net.apply(v["params"], v["state"], v["key"], x)[0]
    return ax.Functional({"params": params, "state": state, "key": KEY}, apply), "state"


@pytest.mark.parametrize("make", [linen_model, haiku_model])
def test_functional_models_of_flax_linen_and_haiku(make):
    model, state = make()
    assert {path.split("/")[1] for path in chosen(model)} == {"params"}
    tasks = ax.tasks.sinusoid(shot=5, query=5)
    result = ax.fit(ax.MAML(mse, 0.1), model, tasks.train, steps=3, key=KEY)
    assert same(result.meta.params[state], model.params[state])
    support = tasks.test.sample(KEY).support
    one, two = (ax.MAML(mse, 0.1).adapt(model, support, key=jax.random.key(i)) for i in range(2))
    assert same(one.params[state], model.params[state])
    assert not same(one.params["params"], two.params["params"])  # other masks


# What the outer loop trains


@pytest.mark.parametrize("name", LEARNERS)
def test_every_learner_trains_only_what_it_should(name):
    model = ax.models.MLP(1, 1, (8,), key=KEY)
    learner = dataclasses.replace(LEARNERS[name](mse), train_only=tree.under("head"))
    start = learner.init(model, key=jax.random.split(KEY, 4)[2])
    how = {"optimizer": optax.adam(0.1)} if "Reptile" not in name and name != "MAML++" else {}
    tasks = ax.tasks.sinusoid(shot=5, query=5).train
    result = ax.fit(learner, model, tasks, steps=3, meta_batch=2, key=KEY, **how)
    before, after = tree.by_path(start), tree.by_path(result.meta)
    moved = {path for path in before if not np.array_equal(before[path], after[path])}
    # The state that Reptile carries is no parameter, and moves.
    assert any("head" in path for path in moved)
    assert all("head" in path or path.startswith("state/") for path in moved), moved
    assert [p for p in after if "layers/0/weight" in p]
    if hasattr(after, "particles"):
        assert np.array_equal(after.models.layers[0].weight[0], model.layers[0].weight)
    state, _ = initial_state(learner, model, optax.adam(0.1), KEY)
    held = [path for path in tree.by_path(state.opt_state) if "layers/0/" in path]
    assert all("state/" in path for path in held), held


def test_particles_start_alike_where_nothing_trains():
    model = ax.models.MLP(1, 1, (8,), key=KEY)
    how = {"particles": 3, "train_only": tree.under("head")}
    for learner in (ax.BayesianMAML(mse, **how), ax.MAMLEnsemble(mse, **how)):
        models = learner.init(model, key=KEY).models
        assert np.array_equal(models.layers[0].weight, jnp.stack([model.layers[0].weight] * 3))
        assert not np.array_equal(models.head.weight[1], model.head.weight)


def test_leo_generates_only_what_trains():
    model = ax.models.MLP(1, 1, (4, 4), key=KEY)
    learner = ax.LEORegression(mse, latent=4, train_only=tree.under("head"))
    tasks = ax.tasks.sinusoid(shot=5, query=5)
    result = ax.fit(learner, model, tasks.train, steps=2, meta_batch=2, key=KEY)
    adapted = learner.adapt(result.meta, tasks.test.sample(KEY).support, key=KEY)
    assert same(adapted.layers, model.layers)
    assert not np.array_equal(adapted.head.weight, model.head.weight)
    assert result.meta["networks"].count == 5


def test_nothing_left_to_train_is_an_error():
    model = ax.models.MLP(1, 1, (8,), key=KEY)
    with pytest.raises(ValueError, match="`train_only` chose none of layers/0/weight"):
        ax.fit(ax.MAML(mse, train_only=tree.under("haed")), model, ax.tasks.sinusoid().train,
               steps=1, key=KEY)  # fmt: skip


# Random models, one step by hand

KINDS = ["linear", "batch", "layer", "dropout", "embed", "conv"]


def nnx_layer(kind, rngs, draw):
    match kind:
        case "linear":
            return nnx.Linear(4, 4, use_bias=draw(st.booleans()), rngs=rngs)
        case "batch":
            return nnx.BatchNorm(4, use_running_average=draw(st.booleans()), rngs=rngs)
        case "layer":
            return nnx.LayerNorm(4, rngs=rngs)
        case "dropout":
            return nnx.Dropout(0.5, rngs=rngs, deterministic=draw(st.booleans()))
        case "embed":
            return nnx.Embed(3, 4, rngs=rngs)
        case "conv":
            return nnx.Conv(1, 1, (3,), rngs=rngs)


class Stack(nnx.Module):
    """Layers in nested lists and dicts, called in order."""

    def __init__(self, layers, nest):
        self.layers = nnx.List(layers) if nest == "list" else nnx.Dict(
            {str(i): nnx.List([layer]) for i, layer in enumerate(layers)}
        )  # fmt: skip

    def __call__(self, x):
        layers = self.layers
        if isinstance(layers, nnx.Dict):
            layers = [getattr(layers, name)[0] for name in sorted(vars(layers)) if name.isdigit()]
        for layer in layers:
            if isinstance(layer, nnx.Embed):
                x = x + layer(jnp.arange(len(x)) % 3)
            elif isinstance(layer, nnx.Conv):
                x = layer(x[..., None])[..., 0]
            else:
                x = layer(x)
            x = jnp.tanh(x)
        return x


@st.composite
def nnx_models(draw):
    rngs = nnx.Rngs(draw(st.integers(0, 99)))
    kinds = draw(st.lists(st.sampled_from(KINDS), max_size=5))
    layers = [nnx.Linear(4, 4, rngs=rngs), *(nnx_layer(kind, rngs, draw) for kind in kinds)]
    linear = [layer for layer in layers if isinstance(layer, nnx.Linear)]
    if draw(st.booleans()):
        linear[-1].kernel = linear[0].kernel
    if draw(st.booleans()):
        layers.append(draw(st.sampled_from(layers)))
    return Stack(layers, draw(st.sampled_from(["list", "dict"])))


def double(model):
    cast = lambda leaf: jnp.asarray(leaf, float) if eqx.is_inexact_array(leaf) else leaf
    return roles.kept(lambda once: jax.tree.map(cast, once), model)


def batch_of(seed):
    x, y = np.random.default_rng(seed).normal(size=(2, 6, 4))
    return ax.Batch(jnp.asarray(x), jnp.asarray(y))


@pytest.mark.usefixtures("x64")
def test_one_step_of_random_nnx_modules():
    @settings(max_examples=25, deadline=None, database=None, derandomize=True)
    @given(nnx_models(), st.integers(0, 99))
    def check(model, seed):
        model, batch, key = double(model), batch_of(seed), jax.random.key(seed)
        # By hand: Flax's own split knows what is a parameter and what is shared.
        graph, params, rest = nnx.split(model, nnx.Param, ...)
        _, _, keyed = nnx.split(roles.kept(lambda m: roles.fresh(m, jax.random.fold_in(key, 0)),
                                           model), nnx.Param, ...)  # fmt: skip

        def loss(params):
            rest = jax.tree.map(lambda leaf: leaf, keyed)  # which the layers update in place
            return jnp.mean((nnx.merge(graph, params, rest)(batch.x) - batch.y) ** 2)

        want = jax.tree.map(lambda p, g: p - 0.1 * g, params, jax.grad(loss)(params))
        out = ax.MAML(mse, 0.1, 1).adapt(model, batch, key=key)
        assert type(out) is Stack
        _, found, other = nnx.split(out, nnx.Param, ...)
        assert jax.tree.structure(found) == jax.tree.structure(want)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
            assert np.allclose(a, b, rtol=1e-12, atol=1e-14)
        assert same(other, rest)

    check()


class EquinoxStack(eqx.Module):
    """Layers of one example, in order; the last may share the weight of the first."""

    layers: list
    tied: eqx.nn.Shared | None

    def __call__(self, x, state=None, *, key=None):
        layers = list(self.layers)
        if self.tied is not None:
            layers += self.tied()
        for i, layer in enumerate(layers):
            if isinstance(layer, dict):
                layer = layer["layer"]
            if isinstance(layer, eqx.nn.BatchNorm):
                x, state = layer(x, state)
            elif isinstance(layer, eqx.nn.Dropout):
                x = layer(x, key=jax.random.fold_in(key, i))
            elif isinstance(layer, eqx.nn.Conv1d):
                x = layer(x[None])[0]
            elif isinstance(layer, eqx.nn.Embedding):
                x = x + layer(jnp.argmax(x) % 3)
            else:
                x = layer(x)
            x = jnp.tanh(x)
        return x, state


def equinox_stack(kinds, tied, inference, mode, key):
    def layer(kind, key):
        match kind:
            case "linear":
                return {"layer": eqx.nn.Linear(4, 4, key=key)}
            case "batch":
                return eqx.nn.BatchNorm(4, "batch", mode=mode, inference=inference)
            case "layer":
                return eqx.nn.LayerNorm(4)
            case "dropout":
                return {"layer": eqx.nn.Dropout(0.5, inference=inference)}
            case "embed":
                return eqx.nn.Embedding(3, 4, key=key)
            case "conv":
                return eqx.nn.Conv1d(1, 1, 3, padding=1, key=key)

    keys = jax.random.split(key, len(kinds) + 2)
    shared = None
    if tied:
        pair = [eqx.nn.Linear(4, 4, key=k) for k in keys[:2]]
        shared = eqx.nn.Shared(pair, lambda p: p[1].weight, lambda p: p[0].weight)
    return EquinoxStack([layer(*one) for one in zip(kinds, keys[2:])], shared)


@st.composite
def equinox_models(draw):
    kinds = draw(st.lists(st.sampled_from(KINDS), max_size=5))
    how = (draw(st.booleans()), draw(st.booleans()), draw(st.sampled_from(["ema", "batch"])))
    key = jax.random.key(draw(st.integers(0, 99)))
    net, state = eqx.nn.make_with_state(equinox_stack)(["linear", *kinds], *how, key)
    return ax.Batched(net, state, key)


@pytest.mark.usefixtures("x64")
def test_one_step_of_random_equinox_modules():
    @settings(max_examples=25, deadline=None, database=None, derandomize=True)
    @given(equinox_models(), st.integers(0, 99))
    def check(model, seed):
        model, batch, key = double(model), batch_of(seed), jax.random.key(seed)
        keyed = roles.fresh(model, jax.random.fold_in(key, 0))

        def loss(net):
            keys = jax.random.split(keyed.key, 6)
            call = lambda x, k: net(x, jax.tree.map(lambda s: s, model.state), key=k)[0]
            return jnp.mean((jax.vmap(call, axis_name="batch")(batch.x, keys) - batch.y) ** 2)

        want = eqx.apply_updates(
            model.model, jax.tree.map(lambda g: -0.1 * g, eqx.filter_grad(loss)(model.model))
        )
        out = ax.MAML(mse, 0.1, 1).adapt(model, batch, key=key)
        found, want = tree.by_path(out.model), tree.by_path(want)
        for path in want:
            if eqx.is_array(want[path]):
                assert np.allclose(found[path], want[path], rtol=1e-12, atol=1e-14), path
        assert same((out.state, out.key), (model.state, model.key))

    check()

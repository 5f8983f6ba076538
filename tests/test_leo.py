"""LEO (Rusu et al. 2019): golden values, identities, and where it is something simpler."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adaptax as ax
from adaptax.algorithms import leo_networks, leo_terms
from adaptax.recipes import RECIPES
from adaptax.testing import check_learner
from references import check_meta_gradient

KEY, STEADY = jax.random.key(0), jax.random.key(22)
mse, cross_entropy = ax.losses.mse, ax.losses.cross_entropy
double = pytest.mark.usefixtures("x64")
NO_TERMS = {"kl_weight": 0.0, "encoder_penalty": 0.0, "l2": 0.0, "orthogonality": 0.0}
PLAIN = {**NO_TERMS, "stochastic": False, "dropout": 0.0, "reduction": "mean"}


class Embeddings(ax.TaskDistribution):
    """Vectors around a direction for each class; 3 ways, 2 shots and 3 queries."""

    split: str = eqx.field(static=True, default="train")
    way: int = eqx.field(static=True, default=3)
    shot: int = eqx.field(static=True, default=2)
    width: int = eqx.field(static=True, default=4)
    length: float = eqx.field(static=True, default=1.0)

    def sample(self, key):
        for_centres, for_noise = jax.random.split(key)
        centres = jax.random.normal(for_centres, (self.way, 1, self.width))
        noise = jax.random.normal(for_noise, (self.way, self.shot + 3, self.width))
        x = centres + 0.3 * noise
        x = self.length * x / jnp.linalg.norm(x, axis=-1, keepdims=True)

        def batch(x):
            labels = jnp.repeat(jnp.arange(self.way), x.shape[1])
            return ax.Batch(x.reshape(-1, self.width), labels)

        return ax.Task(batch(x[:, : self.shot]), batch(x[:, self.shot :]))


TASKS = Embeddings()


def head(width=4, way=3):
    return ax.models.Linear(width, way, key=KEY)


def small(**how):
    """A learner with every term at work."""
    settings = {
        "inner_lr": 0.3, "inner_steps": 1, "finetune_lr": 0.1, "finetune_steps": 1, "latent": 3,
        "dropout": 0.0, "kl_weight": 0.1, "encoder_penalty": 0.3, "l2": 0.1, "orthogonality": 0.2,
        "outer_lr": 1e-2, "reduction": "mean",
    }  # fmt: skip
    return ax.LEO(cross_entropy, **{**settings, **how})


def classifier(learner, meta, support):
    """Weights `(way, d)` of the adapted classifier."""
    return eqx.filter_jit(learner.adapt)(meta, support, key=KEY).weight.T


@functools.cache
def program(learner):
    """Value, metrics and gradient of the meta-loss, compiled once for each learner."""
    each = lambda meta, task, key: learner.meta_loss(meta, task, key=key)
    return eqx.filter_jit(eqx.filter_value_and_grad(each, has_aux=True))


@functools.cache
def guarded(learner):
    """The same of a meta-batch, where tasks that are not finite fall back."""
    each = lambda meta, tasks: ax.meta_value_and_grad(learner, meta, tasks, key=KEY)
    return eqx.filter_jit(each)


def assert_close(a, b, rtol=1e-10, atol=1e-13):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert np.allclose(x, y, rtol=rtol, atol=atol)


# The contract


def test_it_keeps_the_contract():
    check_learner(small(dropout=0.3, finetune_steps=0), head(), TASKS)


def test_meta_gradient():
    # Differences want no ReLU and no σ near its kink, where log σ is steep: the embeddings are
    # long, and the key is one for which none is there.
    check_meta_gradient(small(inner_steps=2), head(), Embeddings(length=4.0), key=STEADY)


def regressor(**how):
    settings = {"inner_steps": 1, "finetune_steps": 1, "finetune_lr": 0.01, "latent": 2,
                "hidden": ((4, 3), (5,), (4,)), "kl_weight": 0.1, "encoder_penalty": 0.3,
                "orthogonality": 0.1, "l2": 0.01, "inner_clip": 0.3}  # fmt: skip
    return ax.LEORegression(mse, **{**settings, **how})


def test_regression_keeps_the_contract():
    model = ax.models.MLP(1, 1, (4,), key=KEY, activation=jnp.tanh)
    check_learner(regressor(stochastic=False), model)
    check_meta_gradient(regressor(), model)


def test_from_training_to_a_loaded_classifier(tmp_path):
    learner = small(dropout=0.2)
    result = ax.fit(learner, head(), TASKS, steps=3, meta_batch=2, key=KEY)
    assert {"query_loss", "kl", "latent_std", "latent_spread", "rescued"} <= set(result.history[0])
    assert result.history[0]["rescued"] == 0
    report = ax.evaluate(learner, result.meta, Embeddings("test"), episodes=3, key=KEY)
    assert report.at == [0, 1, 2]
    assert report.protocol["algorithm"] == "LEO"
    assert report.protocol["backbone"] == "Linear, 15 parameters"
    # Other ways and shots, from the same meta-parameters.
    ax.save(tmp_path / "leo.safetensors", result.meta)
    other = ax.load(tmp_path / "leo.safetensors", learner.init(head(way=5), key=KEY))
    task = Embeddings(way=5, shot=4).sample(KEY)
    assert learner.adapt(other, task.support, key=KEY)(task.query.x).shape == (15, 5)
    assert learner.init(result.meta, key=KEY) is result.meta


# Shapes and counts


@pytest.mark.parametrize(("way", "shot"), [(5, 1), (5, 5), (20, 1)])
def test_shapes_at_the_papers_sizes(way, shot):
    learner = ax.LEO(cross_entropy)
    meta = learner.init(head(640, way), key=KEY)
    networks = meta["networks"]
    assert networks.encoder.size == 640 * 64 == 40_960
    assert sum(matrix.size for matrix in networks.relation) == 128 * 128 * 3 == 49_152
    assert networks.decoder.size == 64 * 1280 == 81_920
    assert meta["inner_lr"].size + meta["finetune_lr"].size == 704
    assert ax.tree.count(meta) == 172_736
    x = jax.ShapeDtypeStruct((way, shot, 640), jnp.float32)
    code = jax.eval_shape(networks.encode, x)
    assert code[0].shape == code[1].shape == (way, shot, 64)
    noise = jax.eval_shape(networks.noise, KEY, code[0])
    assert noise.shape == (way, shot, 640)
    weights = jax.eval_shape(networks.decode, code[0], noise)
    assert weights.shape == (way, 640)
    made = jax.eval_shape(networks.model, weights)
    assert made.weight.shape == (640, way)


@double
def test_the_networks_against_plain_loops():
    """All ordered pairs, the mean over them, over the class, and a weight for each shot."""
    rng = np.random.default_rng(0)
    networks = jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(size=leaf.shape)) if eqx.is_array(leaf) else leaf,
        leo_networks.ClassCodes(head(), 3, "data", key=KEY),
    )
    x, noise = rng.normal(size=(3, 2, 4)), rng.normal(size=(3, 2, 4))
    e = x.reshape(6, 4) @ networks.encoder
    r = []
    for i in range(6):
        pairs = []
        for j in range(6):
            h = np.concatenate([e[i], e[j]])
            h = np.maximum(np.maximum(h @ networks.relation[0], 0) @ networks.relation[1], 0)
            pairs.append(h @ networks.relation[2])
        r.append(np.mean(pairs, axis=0))
    by_class = np.reshape(r, (3, 2, 6)).mean(axis=1)
    mean, std = networks.encode(jnp.asarray(x))
    for k in range(2):
        assert np.allclose(mean[:, k], by_class[:, :3], rtol=1e-12)
        sigma = np.maximum(np.exp(by_class[:, 3:]) - 1, 1e-10)
        assert np.allclose(std[:, k], sigma, rtol=1e-12)
    z = rng.normal(size=(3, 2, 3))
    m, u = np.split(z @ networks.decoder, 2, axis=-1)
    sigma = np.maximum(np.exp(u) - (1 - np.sqrt(2 / (4 + 3))), 1e-10)
    weights = networks.decode(jnp.asarray(z), jnp.asarray(noise))
    assert np.allclose(weights, (m + sigma * noise).mean(axis=1), rtol=1e-12)
    assert np.allclose(networks.decode(jnp.asarray(z), None), m.mean(axis=1), rtol=1e-12)


@double
def test_fine_tuning_is_that_of_a_weight_for_each_shot():
    learner = small(**PLAIN, inner_steps=0, finetune_steps=3, finetune_lr=0.7)
    meta, task = learner.init(head(), key=KEY), TASKS.sample(KEY)
    networks = meta["networks"]
    x = networks.features(task.support)
    w = networks.encode(x)[0] @ networks.decoder[:, :4]
    classify = lambda w: ax.Functional(w, lambda w, x: jnp.mean(x[:, None, None] * w, 2).sum(-1))
    loss = lambda w: cross_entropy(classify(w), task.support)
    for _ in range(3):
        w = w - 0.7 * jax.grad(loss)(w)
    assert np.allclose(classifier(learner, meta, task.support), w.mean(axis=1), rtol=1e-12)


# Golden values


@double
def test_sigma():
    for offset, golden in ((0.0, 1e-10), (np.sqrt(2 / 645), 0.05568)):
        assert np.isclose(leo_networks.deviation(jnp.array(0.0), offset), golden, rtol=2e-4)
    assert np.isclose(leo_networks.deviation(jnp.log(2.0)), 1, rtol=1e-15)
    slope = jax.grad(leo_networks.deviation)
    assert leo_networks.deviation(jnp.array(-0.5)) == 1e-10
    assert slope(-0.5) == 0
    assert np.isclose(slope(0.5), np.exp(0.5), rtol=1e-12)


@double
def test_the_kl_of_a_sample():
    closed = lambda m, s: (s**2 + m**2 - 1 - np.log(s**2)) / 2
    assert closed(0, 1) == 0
    assert np.isclose(closed(1, 0.5), 0.818147181, atol=5e-10)
    noise = jax.random.normal(KEY, (200_000,))
    for m, s in ((0.0, 1.0), (1.0, 0.5), (-2.0, 1e-10)):
        q = jnp.full(noise.shape, m), jnp.full(noise.shape, s)
        found = leo_terms.sampled_kl(*q, noise)
        each = (noise * s + m) ** 2 / 2 - noise**2 / 2
        assert abs(found - closed(m, s)) <= 4 * np.std(each) / np.sqrt(len(noise))
        # A sum would be larger by its length; one entry at a time is the same mean.
        z = m + s * noise[:3]
        ratio = -np.log(s) - (z - m) ** 2 / (2 * s**2) + z**2 / 2
        three = leo_terms.sampled_kl(q[0][:3], q[1][:3], noise[:3])
        assert np.isclose(three, np.mean(ratio), rtol=1e-5 if s < 1e-5 else 1e-12)
    assert leo_terms.sampled_kl(jnp.zeros(9), jnp.ones(9), noise[:9]) == 0


@double
def test_the_correlation_of_rows():
    rows = jnp.array([[1.0, 2.0, 2.0], [2.0, 1.0, -2.0], [2.0, -2.0, 1.0]])
    assert leo_terms.correlation(rows) < 1e-30
    twins = jnp.array([[1.0, -3.0, 2.0]] * 2)
    assert np.isclose(leo_terms.correlation(twins), 0.5, rtol=1e-14)
    assert np.isclose(leo_terms.correlation(twins * jnp.array([[7.0], [0.01]])), 0.5, rtol=1e-14)
    assert np.isclose(leo_terms.correlation(twins * jnp.array([[1.0], [-1.0]])), 0.5, rtol=1e-14)
    # Columns have no say: those of the twins are orthogonal to nothing.
    assert leo_terms.correlation(jnp.ones((2, 1))) == 0.5
    assert leo_terms.correlation(jnp.ones((1, 2))) < 1e-30


@double
def test_the_encoders_penalty_reaches_the_encoder_alone():
    z, end = jnp.array([[1.0, -2.0], [0.5, 3.0]]), jnp.array([[0.0, 1.0], [1.0, -1.0]])
    to_start, to_end = jax.grad(leo_terms.encoder_penalty, (0, 1))(z, end)
    assert np.isclose(leo_terms.encoder_penalty(z, end), np.mean((z - end) ** 2), rtol=1e-15)
    assert np.allclose(to_start, 2 * (z - end) / 4, rtol=1e-15)
    assert not np.any(to_end)


@double
def test_weight_decay_is_of_the_matrices():
    networks = {"a": jnp.array([[1.0, 2.0]]), "b": jnp.array([[3.0], [1.0]]), "bias": jnp.ones(9)}
    assert leo_terms.weight_decay(networks) == 7.5


def test_dropout_keeps_the_mean():
    x = jnp.full((300, 100), 2.0)
    found = leo_terms.dropped(x, KEY, 0.3)
    assert np.allclose(np.unique(found), [0, 2 / 0.7], rtol=1e-4)
    assert abs(np.mean(np.asarray(found) == 0) - 0.3) < 4 * np.sqrt(0.3 * 0.7 / x.size)
    assert leo_terms.dropped(x, None, 0.3) is x


def test_both_clips():
    rng = np.random.default_rng(1)
    grads = {"a": jnp.asarray(rng.normal(size=(5, 7))), "b": jnp.array([0.01, -0.02]),
             "c": jnp.zeros(3), "d": jnp.array([5.0])}  # fmt: skip
    clips = optax.chain(optax.clip(0.1), leo_terms.clip_each_by_norm(0.1))
    found, _ = clips.update(grads, clips.init(grads), grads)
    for leaf in found.values():
        assert np.max(np.abs(leaf)) <= 0.1 * (1 + 1e-6)
        assert np.linalg.norm(leaf) <= 0.1 * (1 + 1e-6)
    by_value = np.clip(grads["a"], -0.1, 0.1)
    assert np.allclose(found["a"], 0.1 * by_value / np.linalg.norm(by_value), rtol=1e-5)
    assert np.array_equal(found["b"], grads["b"])  # not above, not touched
    # They are what the learner brings: Adam cannot tell a scale, so look at its first moment.
    meta = small().init(head(), key=KEY)
    huge = jax.tree.map(lambda leaf: 1e3 * jnp.ones_like(leaf), ax.tree.parameters(meta))
    optimizer = small().optimizer(1)
    _, state = optimizer.update(huge, optimizer.init(ax.tree.parameters(meta)), huge)
    for moment in jax.tree.leaves(optax.tree_utils.tree_get(state, "mu")):
        assert np.isclose(np.linalg.norm(moment), 0.1 * 0.1, rtol=1e-5)


@double
def test_a_bound_on_what_inner_loops_descend():
    bound = lambda g: leo_terms.bounded(2.0).update(g, optax.EmptyState())[0]
    small = {"a": jnp.array([1.0, -1.0]), "b": jnp.array(1.0)}
    assert_close(bound(small), small)
    assert_close(bound({"a": jnp.array([6.0]), "b": jnp.array(8.0)}),
                 {"a": jnp.array([1.2]), "b": jnp.array(1.6)})  # fmt: skip
    still = jax.jacobian(lambda g: bound({"a": g})["a"])(jnp.zeros(3))
    assert np.array_equal(still, np.eye(3))
    # A step of rate 0.1 along a gradient of (8, …) goes no further than 0.2.
    loss = lambda model, batch: 8.0 * jnp.sum(model.weight)
    learner = ax.LEO(loss, 0.1, 1, finetune_steps=0, latent=1, inner_clip=2.0)
    meta = learner.init(ax.models.Linear(1, 1, key=KEY), key=KEY)
    meta["networks"] = eqx.tree_at(lambda n: n.decoder, meta["networks"], jnp.array([[1.0, 0.0]]))
    path = learner.iterates(meta, ax.Batch(jnp.ones((1, 1)), jnp.array([0])), key=KEY).weight
    assert np.isclose(path[0, 0, 0] - path[1, 0, 0], 0.2, rtol=1e-12)


@double
def test_the_latent_step_in_closed_form():
    """Identity encoder and decoder, loss x z²: z ← z (1 − 2 α x)."""
    loss = lambda model, batch: jnp.sum(batch.x) * jnp.sum(model.weight**2)
    learner = ax.LEO(loss, 0.1, 3, finetune_steps=0, latent=1)
    meta = learner.init(ax.models.Linear(1, 1, key=KEY), key=KEY)
    half, keep = jnp.array([[0.5, 0.0], [0.5, 0.0]]), jnp.array([[1.0, 0.0], [0.0, 0.0]])
    meta["networks"] = eqx.tree_at(
        lambda n: (n.encoder, n.relation, n.decoder), meta["networks"],
        (jnp.ones((1, 1)), (half, keep, keep), jnp.array([[1.0, 0.0]])),
    )  # fmt: skip
    support = ax.Batch(jnp.array([[4.0]]), jnp.array([0]))
    path = learner.iterates(meta, support, key=KEY).weight
    assert np.allclose(path.ravel(), [4, 0.8, 0.16, 0.032], rtol=1e-12)


# What it reduces to


@double
def test_with_constant_code_and_identity_decoder_it_is_meta_sgd_on_the_head():
    learner = small(**PLAIN, inner_steps=3, finetune_steps=0, latent=4)
    meta, task = learner.init(head(), key=KEY), TASKS.sample(KEY)
    rates = jnp.array([0.5, -0.1, 1.5, 2.0])
    constant = lambda n: (n.relation, n.decoder)
    first, second, third = meta["networks"].relation
    decoder = jnp.concatenate([jnp.eye(4), jnp.ones((4, 4))], axis=1)
    meta["networks"] = eqx.tree_at(
        constant, meta["networks"], ((first, second, 0 * third), decoder)
    )
    meta["inner_lr"] = rates
    start = eqx.tree_at(lambda m: m.weight, head(), jnp.zeros((4, 3)))
    # The mean over K shots moves a K-th as far as each of their weights.
    lr = eqx.tree_at(lambda m: (m.weight, m.bias), start,
                     (jnp.tile(rates[:, None] / 2, 3), jnp.zeros(3)))  # fmt: skip
    meta_sgd, theirs = ax.MetaSGD(cross_entropy, inner_steps=3), {"model": start, "lr": lr}
    expected = meta_sgd.adapt(theirs, task.support, key=KEY)
    assert np.allclose(classifier(learner, meta, task.support), expected.weight.T, rtol=1e-12)
    (value, _), grads = program(learner)(meta, task, KEY)
    (loss, _), wanted = program(meta_sgd)(theirs, task, KEY)
    assert np.isclose(value, loss, rtol=1e-14)
    assert np.allclose(grads["inner_lr"], wanted["lr"].weight.sum(axis=1) / 2, rtol=1e-11)


@double
def test_without_steps_it_is_its_generator():
    task = TASKS.sample(KEY)
    generator = small(**PLAIN, inner_steps=0, finetune_steps=0)
    meta = generator.init(head(), key=KEY)
    networks = meta["networks"]
    made = networks.model(
        networks.decode(networks.encode(networks.features(task.support))[0], None)
    )
    still = {**meta, "inner_lr": jnp.zeros(3), "finetune_lr": jnp.zeros(4)}
    (value, _), grads = program(generator)(meta, task, KEY)
    assert np.isclose(value, cross_entropy(made, task.query), rtol=1e-14)
    assert not np.any(grads["inner_lr"])
    (other, _), _ = program(small(**PLAIN))(still, task, KEY)
    assert np.isclose(value, other, rtol=1e-14)
    assert_close(generator.adapt(meta, task.support, key=KEY), made)


@double
def test_a_support_in_another_order_and_other_classes():
    learner = small(dropout=0.3)
    meta, support = learner.init(head(), key=KEY), TASKS.sample(KEY).support
    found = classifier(learner, meta, support)
    assert np.array_equal(found, classifier(learner, meta, support))
    assert np.array_equal(found, eqx.filter_jit(learner.adapt)(
        meta, support, key=jax.random.key(7)).weight.T)  # fmt: skip
    swap = np.array([3, 1, 4, 0, 5, 2])
    mixed = ax.Batch(support.x[swap], support.y[swap])
    assert np.allclose(classifier(learner, meta, mixed), found, rtol=1e-11)
    renamed = ax.Batch(support.x, jnp.array([2, 0, 1])[support.y])
    assert np.allclose(classifier(learner, meta, renamed)[jnp.array([2, 0, 1])], found, rtol=1e-11)
    assert np.min(np.abs(found[0] - found[1])) > 1e-6


# Randomness and the terms


@double
def test_the_meta_loss_is_the_sum_of_its_terms():
    learner, task = small(), TASKS.sample(KEY)
    meta = learner.init(head(), key=KEY)
    (value, parts), _ = program(learner)(meta, task, KEY)
    networks = meta["networks"]
    expected = (
        parts["query_loss"] + 0.1 * parts["kl"] + 0.3 * parts["encoder_penalty"]
        + 0.1 * leo_terms.weight_decay(networks) + 0.2 * leo_terms.correlation(networks.decoder)
    )  # fmt: skip
    assert np.isclose(value, expected, rtol=1e-14)
    assert parts["encoder_penalty"] > 0
    assert parts["kl"] != 0
    mean, std = networks.encode(networks.features(task.support))
    assert np.isclose(parts["latent_std"], np.mean(std), rtol=1e-12)
    assert np.isclose(parts["latent_spread"], np.std(mean[:, 0], axis=0).mean(), rtol=1e-12)


@double
def test_the_meta_loss_against_plain_loops():
    """A sum over the support, fresh noise and dropout at every step, a weight for each shot."""
    learner = small(inner_steps=2, finetune_steps=2, dropout=0.3, reduction="sum")
    meta, task = learner.init(head(), key=KEY), TASKS.sample(KEY)
    networks, at = meta["networks"], jax.random.fold_in
    code, noise, encoder, latent, tune, _ = jax.random.split(KEY, 6)

    def drop(x, key):
        return jnp.where(leo_terms.kept(key, 0.3, x.shape), x / (round(0.7 * 2**16) / 2**16), 0)

    def loss(w, batch, key):
        logits = drop(batch.x, key) @ w.mean(axis=1).T
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch.y).sum()

    def decode(z, step):
        m, u = jnp.split(z @ networks.decoder, 2, axis=-1)
        sigma = jnp.maximum(jnp.exp(u) - (1 - np.sqrt(2 / (4 + 3))), 1e-10)
        return m + sigma * jax.random.normal(at(noise, step), (3, 2, 4))

    def plain():
        mean, std = networks.encode(drop(task.support.x.reshape(3, 2, 4), encoder))
        drawn = jax.random.normal(code, (3, 2, 3))
        z = start = mean + std * drawn
        for i in range(2):
            step = lambda z, i=i: loss(decode(z, i), task.support, at(latent, i))
            z = z - 0.3 * jax.grad(step)(z)
        w = decode(z, 2)
        for i in range(2):
            w = w - 0.1 * jax.grad(loss)(w, task.support, at(tune, i))
        kl = jnp.mean(start**2 / 2 - drawn**2 / 2 - jnp.log(std))
        query = loss(w, task.query, at(KEY, 1)) / task.query.size
        return query, kl, jnp.mean((z - start) ** 2)

    _, parts = program(learner)(meta, task, KEY)[0]
    found = [parts[name] for name in ("query_loss", "kl", "encoder_penalty")]
    assert np.allclose(found, jax.jit(plain)(), rtol=1e-11, atol=0)


def test_every_step_draws_anew_and_every_shot_for_itself():
    task, seen = TASKS.sample(KEY), []
    meta = small().init(head(), key=KEY)
    networks = meta["networks"]
    learner = small(inner_steps=2, finetune_steps=0)
    course = learner._course(meta, task.support, KEY, learner.steps)
    assert course.noise.shape == (3, 2, 3)
    assert len(np.unique(course.noise)) == 18
    for step in range(3):
        keys = jax.random.split(KEY, 6)
        seen.append(networks.noise(jax.random.fold_in(keys[1], step), course.start))
    assert len(np.unique(np.stack(seen))) == 3 * 3 * 2 * 4
    # The last of them makes the weights that are left after the latent steps.
    weights = networks.decode(course.latent.model, seen[2])
    assert np.allclose(course.tuned.model, weights, rtol=1e-5)


@double
def test_ablations():
    task, losses = TASKS.sample(KEY), {}
    other = jax.random.key(5)
    for name, how in {
        "whole": {}, "deterministic": {"stochastic": False}, "random": {"prior": "random"},
        "no fine-tuning": {"finetune_steps": 0},
        "generator": {"inner_steps": 0, "finetune_steps": 0},
    }.items():  # fmt: skip
        learner = small(**how)
        meta = learner.init(head(), key=KEY)
        (losses[name], parts), grads = program(learner)(meta, task, KEY)
        again = program(learner)(meta, task, other)[0][0]
        assert (again == losses[name]) == (name == "deterministic")
        assert np.any(grads["inner_lr"]) == (name != "generator")
        assert np.any(grads["finetune_lr"]) == (name not in ("generator", "no fine-tuning"))
        if name == "deterministic":
            assert parts["kl"] == 0
        if name == "random":
            assert parts["kl"] == 0
            first = learner.iterates(meta, task.support, key=KEY, steps=0)
            assert not np.any(first.weight)
            # Nothing but decay reaches the encoder.
            assert np.allclose(grads["networks"].encoder, 0.1 * meta["networks"].encoder)
    assert len(set(map(float, losses.values()))) == 5


def test_a_loss_that_is_nan_leaves_a_step_of_decay():
    broken = lambda model, batch: jnp.nan * cross_entropy(model, batch)
    learner = ax.LEO(broken, latent=3, inner_steps=1)
    meta, task = learner.init(head(), key=KEY), TASKS.sample(KEY)
    one = jax.tree.map(lambda leaf: leaf[None], task)
    (value, parts), grads = guarded(learner)(meta, one)
    assert parts["rescued"] == 1
    assert np.isclose(value, 1e-4 * ax.tree.norm(meta["networks"]) ** 2 / 2, rtol=1e-5)
    for name in ("encoder", "relation", "decoder"):
        wanted = jax.tree.map(lambda w: 1e-4 * w, getattr(meta["networks"], name))
        assert_close(getattr(grads["networks"], name), wanted, rtol=1e-6)
    assert not np.any(grads["inner_lr"])
    assert not np.any(grads["finetune_lr"])
    # The data's fault is not covered up: NaN, or a class that is missing.
    wrong = {"x": task.support.x.at[0, 0].set(jnp.nan), "y": jnp.zeros_like(task.support.y)}
    for name, values in wrong.items():
        at = lambda tasks, name=name: getattr(tasks.support, name)
        (value, parts), _ = guarded(learner)(meta, eqx.tree_at(at, one, values[None]))
        assert np.isnan(value)
        assert parts["rescued"] == 0


@double
def test_one_task_in_a_meta_batch_is_rescued_alone():
    """The gradient of the others is what it is without."""
    tasks = jax.vmap(TASKS.sample)(jax.random.split(KEY, 3))

    class Marked(ax.MetaLearner):
        loss: ax.Loss = cross_entropy
        spoil: bool = eqx.field(static=True, default=True)

        def adapt(self, meta, support, *, key):
            return meta

        def meta_loss(self, meta, task, *, key, progress):
            factor = jnp.where(task.query.x[0, 0] > 0, jnp.nan, 1.0) if self.spoil else 1.0
            return factor * self.loss(meta, task.query), {}

        def fallback(self, meta, task, *, key):
            return ax.tree.norm(meta) ** 2 / 2 if self.spoil else None

    positive = tasks.query.x[:, 0, 0] > 0
    assert 0 < positive.sum() < 3
    run = lambda learner, tasks: ax.meta_value_and_grad(learner, head(), tasks, key=KEY)
    (_, parts), found = run(Marked(), tasks)
    assert np.isclose(parts["rescued"], positive.mean())
    each = [run(Marked(spoil=False), jax.tree.map(lambda leaf, i=i: leaf[i : i + 1], tasks))[1]
            for i in range(3)]  # fmt: skip
    plain = ax.tree.parameters(head())
    wanted = [plain if bad else one for bad, one in zip(positive, each)]
    assert_close(found, jax.tree.map(lambda *leaves: sum(leaves) / 3, *wanted))
    assert "rescued" not in run(Marked(spoil=False), tasks)[0][1]


def test_training_on_nan_is_an_error():
    class Spoilt(Embeddings):
        def sample(self, key):
            task = Embeddings.sample(self, key)
            return eqx.tree_at(lambda t: t.query.x, task, task.query.x.at[0, 0].set(jnp.nan))

    with pytest.raises(ax.TrainingDiverged, match="look for NaN in the data"):
        ax.fit(small(finetune_steps=0), head(), Spoilt(), steps=2, meta_batch=2, key=KEY)


def test_a_collapsed_latent_is_said():
    learner, task = small(), TASKS.sample(KEY)
    fine = {"latent_spread": 0.3, "latent_std": 0.1}
    one, none = {**fine, "latent_spread": 1e-9}, {**fine, "latent_std": 1e-10}
    assert learner.collapsed(fine) is None
    assert "codes of different classes are 1.0e-09 apart" in learner.collapsed(one)
    assert "all codes are within 1.0e-09" in regressor().collapsed(one)
    assert "noise of its codes" in learner.collapsed(none)
    # What is so by choice is no collapse.
    assert small(prior="random").collapsed(one) is None
    assert small(stochastic=False).collapsed(none) is None
    # As it happens: an encoder of zeros.
    meta = learner.init(head(), key=KEY)
    assert learner.collapsed(program(learner)(meta, task, KEY)[0][1]) is None
    meta["networks"] = eqx.tree_at(lambda n: n.encoder, meta["networks"], jnp.zeros((4, 3)))
    assert "codes of different" in learner.collapsed(program(learner)(meta, task, KEY)[0][1])


# Regression


@double
def test_regression_generates_every_weight_and_starts_about_the_model():
    model = ax.models.MLP(1, 1, (4, 4), key=KEY)
    learner = ax.LEORegression(mse)
    meta = learner.init(model, key=KEY)
    networks = meta["networks"]
    assert networks.count == ax.tree.count(model) == 33
    assert_close(
        ax.tree.parameters(networks.model(networks.decode(jnp.zeros(32), None))),
        ax.tree.parameters(model), rtol=1e-6,
    )  # fmt: skip
    assert meta["finetune_lr"].shape == (33,)
    support = ax.tasks.sinusoid(5, 5).train.sample(KEY).support
    code, _ = networks.encode(networks.features(support))
    assert code.shape == (32,)
    turned = ax.Batch(support.x[::-1], support.y[::-1])
    assert np.allclose(networks.encode(networks.features(turned))[0], code, rtol=1e-6)
    labels = ax.Batch(jnp.ones((2, 1)), jnp.array([0, 2]))
    hidden = ((4,), (4,), (4,))
    classes = leo_networks.TaskCode(
        ax.models.MLP(1, 3, (4,), key=KEY), 2, "data", hidden=hidden, key=KEY
    )
    assert np.array_equal(classes.features(labels), [[1, 1, 0, 0], [1, 0, 0, 1]])


def test_regression_learns_its_rates_in_units_of_where_they_start():
    learner = regressor(inner_lr=0.05, outer_lr=1e-3)
    meta = learner.init(ax.models.MLP(1, 1, (4,), key=KEY), key=KEY)
    trained = ax.tree.parameters(meta)
    ones, optimizer = jax.tree.map(jnp.ones_like, trained), learner.optimizer(1)
    updates, _ = optimizer.update(ones, optimizer.init(trained), trained)
    for name, size in (("networks", 1e-3), ("inner_lr", 5e-5), ("finetune_lr", 1e-5)):
        for leaf in jax.tree.leaves(updates[name]):
            assert np.allclose(leaf, -size, rtol=1e-4)


# What it refuses


def support(x=None, y=None):
    x = jnp.zeros((6, 4)) if x is None else x
    return ax.Batch(x, jnp.array([0, 0, 1, 1, 2, 2]) if y is None else y)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (
            support(jnp.zeros((6, 5))),
            r"embeddings of shape \(6, 5\), and LEO was made for \(n, 4\)",
        ),
        (support(y=jnp.array([0, 0, 0, 1, 1, 1])), r"\{0: 3, 1: 3\} examples by class where each"),
        (support(y=jnp.array([0, 0, 1, 1, 2, 3])), "classes 0 to 2 should have 2"),
        (support(jnp.zeros((4, 4)), jnp.arange(4)), "4 examples cannot hold equally many of 3"),
        (support(jnp.zeros((0, 4)), jnp.arange(0)), "0 examples cannot hold equally many"),
        (support(y=jnp.zeros((6, 3))), "LEO wants integer labels"),
        (support(jnp.zeros((6, 4)).at[2:4, 1].set(jnp.nan)), "2 of the 6 examples of the support"),
    ],
)
def test_supports_that_make_no_sense(batch, message):
    learner = small()
    with pytest.raises(ValueError, match=message):
        learner.adapt(learner.init(head(), key=KEY), batch, key=KEY)


def test_a_compiled_program_answers_nan_to_a_missing_class():
    learner, missing = small(), support(y=jnp.array([0, 0, 0, 1, 1, 1]))
    found = classifier(learner, learner.init(head(), key=KEY), missing)
    assert np.all(np.isnan(found))


def test_queries_of_another_width():
    learner, task = small(), TASKS.sample(KEY)
    wide = ax.Task(task.support, ax.Batch(jnp.zeros((9, 5)), task.query.y))
    with pytest.raises(ValueError, match=r"the query has embeddings of shape \(9, 5\)"):
        learner.meta_loss(learner.init(head(), key=KEY), wide, key=KEY)


def test_models_that_cannot_be_generated():
    with pytest.raises(ValueError, match="LEO makes linear classifiers on embeddings"):
        small().init(ax.models.MLP(4, 3, (5,), key=KEY), key=KEY)
    with pytest.raises(ValueError, match="reads the widths of inputs and targets"):
        regressor().init(ax.Functional(jnp.zeros(3), lambda p, x: x), key=KEY)
    learner = regressor()
    meta = learner.init(ax.models.MLP(2, 1, (4,), key=KEY), key=KEY)
    with pytest.raises(ValueError, match="inputs of width 1 and targets of width 1, and LEO was"):
        learner.adapt(meta, ax.tasks.sinusoid(5, 5).train.sample(KEY).support, key=KEY)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"inner_steps": -1}, "inner_steps is 0 or more, not -1"),
        ({"kl_weight": float("nan")}, "kl_weight is 0 or more, not nan"),
        ({"inner_clip": 0.0}, "inner_clip is a norm above 0, or None, not 0.0"),
        ({"latent": 0}, "latent is 1 or more, not 0"),
        ({"dropout": 1.0}, r"dropout is a rate in \[0, 1\), not 1.0"),
        ({"codes": "shot"}, 'codes is "class" or "task", not \'shot\''),
        ({"prior": "none"}, 'prior is "data" or "random"'),
        ({"reduction": "sum/shot"}, 'reduction is "sum" or "mean"'),
    ],
)
def test_options_that_make_no_sense(how, message):
    with pytest.raises(ValueError, match=message):
        ax.LEO(cross_entropy, **how)


def test_the_papers_settings_are_arguments():
    for name in ("mini_imagenet-5w1s", "mini_imagenet-5w5s", "tiered_imagenet-5w1s"):
        settings = RECIPES[f"leo-{name}"].experiment.learner
        assert ax.LEO(cross_entropy, **settings).latent == 64
    assert RECIPES["leo-mini_imagenet-5w1s"].experiment.learner["kl_weight"] == 0.756143

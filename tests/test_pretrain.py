"""Pretraining: the update is SGD's, resumption is exact, other splits are refused."""

import dataclasses
import os
import signal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import adaptax as ax
from adaptax import batch_norm, tree
from adaptax.engine.augment import Augmentation
from adaptax.engine.classifier import Order
from adaptax.engine.extract import extract
from adaptax.engine.pretrain import check_train, pretrain, restore, step_count
from adaptax.engine.run import Run
from adaptax.models import Conv4, WideResNet
from adaptax.tasks import from_arrays

KEY = jax.random.key(3)
SIDE = 16


def coloured(classes=6, each=12, seed=0):
    """Noise around a colour for each class."""
    rng = np.random.default_rng(seed)
    colours = rng.uniform(20, 235, (classes, 3))
    x = colours.repeat(each, 0)[:, None, None] + rng.normal(size=(classes * each, SIDE, SIDE, 3))
    return np.clip(x, 0, 255).astype(np.uint8), np.repeat(np.arange(classes), each)


def splits(**how):
    x, labels = coloured()
    part = lambda names: (x[np.isin(labels, names)], labels[np.isin(labels, names)])
    three = {"train": part([0, 1, 2]), "val": part([3, 4]), "test": part([5])}
    return from_arrays(three, way=1, shot=1, query=1, **how)


def network(out=3, **how):
    return Conv4(out, key=KEY, image=(SIDE, SIDE, 3), filters=8, head="flatten",
                 head_init="glorot", scale=True, **how)  # fmt: skip


HOW = {"key": KEY, "epochs": 14, "batch": 9, "held_out": 0.25, "devices": 1}  # 42 steps, 3 an epoch


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A training, with its run folder."""
    run = tmp_path_factory.mktemp("pretrain") / "run"
    how = {"augmentation": Augmentation(1, True, 0.1), "label_smoothing": 0.1, "run": str(run)}
    return pretrain(network(), splits().train, **HOW, **how), run, how


def test_it_learns_and_reports(whole):
    result, run, _ = whole
    assert (result.step, result.stopped) == (42, "done")
    assert [record["step"] for record in result.history] == [20, 40, 42]
    assert all("validation" in record for record in result.history)
    assert result.history[-1]["accuracy"] > max(result.history[0]["accuracy"], 0.8)
    assert result.history[-1]["loss"] < result.history[0]["loss"]
    # By hand: the images that are held out, by running statistics.
    images = splits().train
    order = Order(np.asarray(jax.random.key_data(jax.random.split(KEY)[0])), images, 0.25, 9)
    still = eqx.filter_jit(batch_norm.use_running_average(result.model))
    said = still(jnp.asarray(images.bank[order.held]) / 255).argmax(axis=-1)
    accuracy = float(np.mean(np.asarray(said) == order.labels[order.held]))
    assert result.accuracy == result.history[-1]["validation"]["accuracy"] == accuracy
    assert Run(run).metrics() == result.history


def test_a_restored_model_is_the_trained_one(whole):
    result, run, _ = whole
    other = Conv4(3, key=jax.random.key(9), image=(SIDE, SIDE, 3), filters=8, head="flatten",
                  head_init="glorot", scale=True)  # fmt: skip
    model, step = restore(Run(run), other)
    assert step == 42
    assert bool(eqx.tree_equal(model, result.model))


def test_a_metric_that_is_nan_is_kept_without_a_plot(tmp_path, caplog):
    with Run(tmp_path) as run:
        run.log({"step": 1, "seconds": 0.5, "loss": float("nan")})
    assert "NaN" not in caplog.text
    assert run.metrics() == [{"step": 1, "seconds": 0.5, "loss": None}]


def test_interrupted_and_resumed_is_uninterrupted(whole, tmp_path):
    result, _, how = whole
    how = {**HOW, **how, "run": str(tmp_path / "run")}
    press = lambda record: os.kill(os.getpid(), signal.SIGINT)
    first = pretrain(network(), splits().train, **how, watch=press)
    assert (first.step, first.stopped) == (20, "interrupted")
    second = pretrain(network(), splits().train, **how, resume=True)
    assert bool(eqx.tree_equal(second.model, result.model))
    strip = lambda records: [{k: v for k, v in r.items() if k != "seconds"} for r in records]
    assert strip(second.history) == strip(result.history)
    again = pretrain(network(), splits().train, **how, resume=True)
    assert again.accuracy == result.accuracy
    with pytest.raises(
        ValueError, match=r"other settings: recipe.weight_decay was 0.0005 and is 0.1"
    ):
        pretrain(network(), splits().train, **how, resume=True, weight_decay=0.1)
    with pytest.raises(ValueError, match="already holds a run"):
        pretrain(network(), splits().train, **how)


def test_streamed_images_and_more_devices_train_alike(whole):
    result, _, how = whole
    how = {name: value for name, value in how.items() if name != "run"}
    streamed = pretrain(network(), splits(memory_budget=0).train, **{**HOW, **how, "devices": 3})
    a, b = (ravel_pytree(eqx.filter(m, eqx.is_inexact_array))[0]
            for m in (streamed.model, result.model))  # fmt: skip
    np.testing.assert_allclose(a, b, 0.02, 0.02)
    assert float(jnp.abs(a - b).max()) < 0.02 < float(jnp.abs(a).max())


def test_steps_are_nesterovs_with_decay():
    """Three steps written out: momentum, decay of kernels alone, the cosine, running statistics."""
    images = splits().train
    how = {**HOW, "epochs": 1, "rate": 0.05, "momentum": 0.8, "weight_decay": 0.01}
    result = pretrain(network(), images, **how)
    order = Order(np.asarray(jax.random.key_data(jax.random.split(KEY)[0])), images, 0.25, 9)
    model = batch_norm.track(network())
    weights = {path: leaf for path, leaf in tree.by_path(eqx.filter(model, eqx.is_array)).items()}
    statistics = batch_norm.statistics(model)
    velocity = {path: jnp.zeros_like(leaf) for path, leaf in weights.items()}

    @jax.jit
    def gradient(weights, x, y):
        def loss(weights):
            logits = tree.replace(model, weights)(x)
            return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

        return jax.grad(loss)(weights)

    for step, rows in enumerate(order.rows(0, 3)):
        x = jnp.asarray(images.bank[rows]) / 255
        grads = gradient(weights, x, order.labels[rows])
        rate = 0.05 * 0.5 * (1 + np.cos(np.pi * step / 3))
        for path, g in grads.items():
            if path in statistics:
                weights[path] = weights[path] - g
                continue
            g = g + 0.01 * weights[path] * (g.ndim > 1)
            velocity[path] = 0.8 * velocity[path] + g
            weights[path] = weights[path] - rate * (g + 0.8 * velocity[path])
    found = tree.by_path(eqx.filter(result.model, eqx.is_array))
    assert len(statistics) == 8
    for path, leaf in weights.items():
        np.testing.assert_allclose(found[path], leaf, 2e-3, 2e-4, err_msg=path)


def test_each_image_is_seen_once_an_epoch_and_held_out_ones_never():
    images = splits().train
    order = Order(np.array([1, 2]), images, 0.25, 9)
    assert [len(part) for part in (order.held, order.train)] == [9, 27]
    assert np.bincount(order.labels[order.held]).tolist() == [3, 3, 3]
    epochs = [order.rows(3 * e, 3 * e + 3) for e in range(3)]
    for rows in epochs:
        np.testing.assert_array_equal(np.sort(rows.ravel()), order.train)
    assert not np.array_equal(epochs[0], epochs[1])
    np.testing.assert_array_equal(order.rows(2, 8), np.concatenate(epochs)[2:8])
    assert step_count(images, 7, 9, 0.25) == 21
    assert len(Order(np.array([1]), images, 0.99, 2).train) == 3  # one of each class remains


def test_only_the_train_split_is_taken(monkeypatch):
    every = splits()
    for part in (every.val, every.test):
        with pytest.raises(ValueError, match=f"was given the {part.split} split, whose classes"):
            pretrain(network(), part, **HOW)
    with pytest.raises(TypeError, match="wants the train split of image episodes"):
        pretrain(network(), ax.tasks.sinusoid().train, **HOW)
    with pytest.raises(TypeError):
        pretrain(network(), every, **HOW)
    # By construction: the bank of the train split holds the images of its classes and no others.
    x, labels = coloured()
    np.testing.assert_array_equal(check_train(every.train).bank, x[labels < 3])


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"epochs": 0}, "epochs=0; expected a number of at least 1"),
        ({"held_out": 1.0}, "held_out=1.0; expected a number from 0 to below 1"),
        ({"label_smoothing": -0.1}, "label_smoothing=-0.1"),
        ({"batch": 40}, "batch=40, but there are 27 images"),
        ({"resume": True}, "resume=True wants run="),
        ({"rate": float("nan")}, r"not finite in steps 1 to 20; lower the rate"),
    ],
)
def test_arguments_that_make_no_sense(how, said):
    kind = FloatingPointError if "rate" in how else ValueError
    with pytest.raises(kind, match=said):
        pretrain(network(), splits().train, **{**HOW, **how})


def test_the_head_must_fit_the_classes():
    with pytest.raises(ValueError, match=r"\(2, 5\) of 2 images, but there are 3 meta-train"):
        pretrain(network(5), splits().train, **HOW)


def test_features_do_not_depend_on_the_batch(whole):
    result, _, _ = whole
    images, done = splits().test, []
    x = extract(result.model, images, batch=5, watch=done.append)
    assert x.shape == (12, 8)
    assert done == [5, 10, 12]
    np.testing.assert_allclose(extract(result.model, images, batch=100), x, 1e-4, 1e-5)
    still = eqx.filter_jit(batch_norm.use_running_average(result.model).features)
    np.testing.assert_allclose(still(jnp.asarray(images.bank) / 255), x, 1e-4, 1e-5)
    assert np.ptp(x, axis=0).max() > 0
    streamed = extract(result.model, splits(memory_budget=0).test, batch=5)
    np.testing.assert_array_equal(streamed, x)


def test_features_of_a_layer():
    model = WideResNet(3, key=KEY, depth=10, width=1)
    x = extract(model, splits().test, layer=7)
    assert x.shape == (12, 64)
    assert not np.allclose(x, extract(model, splits().test), 0.1)
    with pytest.raises(TypeError, match="by a model with a method `features`"):
        extract(ax.models.MLP(3, 3, key=KEY), splits().test)


def test_half_precision_trains_almost_alike():
    model = WideResNet(3, key=KEY, depth=10, width=1)
    how = {**HOW, "epochs": 1, "rate": 0.01, "held_out": 0.0}
    full, half = (pretrain(model, splits().train, **how, precision=p)
                  for p in ("float32", "bfloat16"))  # fmt: skip
    losses = [r.history[-1]["loss"] for r in (full, half)]
    assert 0 < abs(losses[0] - losses[1]) < 0.05
    assert all(leaf.dtype == jnp.float32
               for leaf in jax.tree.leaves(eqx.filter(half.model, eqx.is_array)))  # fmt: skip


IMAGES = jnp.asarray(np.random.default_rng(0).uniform(0.3, 0.7, (40, 6, 5, 3)), jnp.float32)


def test_no_augmentation_changes_nothing():
    np.testing.assert_array_equal(Augmentation()(KEY, IMAGES), IMAGES)


def test_a_crop_is_a_window_of_the_padded_image():
    x, pad = np.asarray(IMAGES), 2
    y = np.asarray(Augmentation(crop=pad)(KEY, IMAGES))
    padded = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)), mode="reflect")
    found = [
        [(i, j) for i in range(5) for j in range(5)
         if np.array_equal(y[n], padded[n, i : i + 6, j : j + 5])]
        for n in range(len(x))
    ]  # fmt: skip
    assert all(len(places) == 1 for places in found)
    places = {places[0] for places in found}
    assert {i for i, _ in places} == {j for _, j in places} == set(range(5))


def test_a_flip_mirrors_about_half():
    x, y = np.asarray(IMAGES), np.asarray(Augmentation(flip=True)(KEY, IMAGES))
    mirrored = [np.array_equal(b, a[:, ::-1]) for a, b in zip(x, y)]
    same = [np.array_equal(a, b) for a, b in zip(x, y)]
    assert sum(mirrored) + sum(same) == 40
    assert 8 < sum(mirrored) < 32


def test_jitter_changes_light_and_not_place():
    x, y = np.asarray(IMAGES), np.asarray(Augmentation(jitter=0.2)(KEY, IMAGES))
    luma = np.array([0.299, 0.587, 0.114])
    # Brightness and contrast map the grey of an image by a line, which saturation leaves.
    for a, b in zip(x @ luma, y @ luma):
        slope, offset = np.polyfit(a.ravel(), b.ravel(), 1)
        np.testing.assert_allclose(slope * a + offset, b, atol=1e-5)
        assert 0.8**2 - 1e-4 < slope < 1.2**2 + 1e-4
    ratio = y.mean((1, 2, 3)) / x.mean((1, 2, 3))
    assert 0.75 < ratio.min() < 0.9 < 1.1 < ratio.max() < 1.25
    bright = np.asarray(Augmentation(jitter=1.0)(KEY, IMAGES))
    assert (bright.min(), bright.max()) == (0, 1)
    grey = Augmentation(jitter=0.2)(KEY, IMAGES[..., :1])
    assert grey.shape == (40, 6, 5, 1)


def test_augmentations_that_are_none():
    for how in ({"crop": -1}, {"jitter": 1.5}):
        with pytest.raises(ValueError, match="expected a number of pixels, and a number from 0"):
            Augmentation(**how)


def test_the_result_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Augmentation().crop = 3

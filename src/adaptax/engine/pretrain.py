"""Supervised training of a feature extractor on the meta-train classes, and what it extracts.

A classifier of all meta-train classes at once, whose penultimate layer is kept: LEO's authors call
it the standard method. Images of validation and test classes are never seen.
"""

from __future__ import annotations

import dataclasses
import math
import os
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from .. import batch_norm, io, program, roles, tree
from ..conv import fast
from ..models.residual import convolve_in
from ..process import check_not_forked, interruptible
from ..task import Model, TaskDistribution
from ..tasks.episodes import Design, Episodes
from . import feed
from .augment import Augmentation
from .fingerprint import fingerprint, made_by, settings
from .mapping import everywhere, local_mesh
from .run import Facts, Resume, Run, as_run, lets_go

Precision = Literal["auto", "float32", "bfloat16"]
"""Of the convolutions of the residual networks: `"auto"` is bfloat16 on accelerators, float32 on a
CPU. Weights, batch normalisation, head and loss are float32 always, and so are features."""

CHUNK = 20
"""Steps in one compiled program, after which the host may validate, save and stop."""

SAVE_EVERY = 60.0
"""Seconds between checkpoints, beside those after each validation."""


class State(eqx.Module):
    """What a checkpoint of pretraining holds: the step, the model's arrays, the optimizer's."""

    step: Array
    model: PyTree
    opt_state: PyTree


@dataclasses.dataclass(frozen=True)
class Pretraining:
    """The outcome of `pretrain`.

    Args:
        model: the classifier, with running statistics of batch normalisation.
        step: steps done.
        accuracy: on the images held out of the meta-train classes; `None` where none are.
        history: a record for every chunk of steps.
        stopped: `"done"` or `"interrupted"`.
    """

    model: Model
    step: int
    accuracy: float | None
    history: list[dict[str, Any]]
    stopped: str


@lets_go
def pretrain(
    model: Model,
    images: TaskDistribution,
    *,
    key: PRNGKeyArray,
    epochs: int = 90,
    batch: int = 64,
    rate: float = 0.1,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    label_smoothing: float = 0.0,
    augmentation: Augmentation | None = None,
    held_out: float = 0.1,
    precision: Precision = "auto",
    validate_every: int = 1,
    devices: int | None = None,
    run: Run | str | os.PathLike[str] | None = None,
    resume: Resume = False,
    watch: Callable[[dict[str, Any]], None] | None = None,
) -> Pretraining:
    """Train a classifier of all meta-train classes by SGD with Nesterov momentum.

    The rate follows half a cosine to zero; kernels and matrices decay, shifts, scales and biases
    do not. Batch normalisation is by the batch in training and by running statistics in
    validation. Images come in random order, each once an epoch, but for the rest that fills no
    batch. A resumed run equals an uninterrupted one bit by bit; Ctrl-C ends it after the current
    chunk of steps, with the state saved.

    Args:
        model: maps images to as many logits as there are classes; such as `ResNet12`.
        images: the train split of a family of image episodes, such as
            `tasks.mini_imagenet().train`; its ways, shots and rotations do not matter here.
        key: all the randomness there is.
        epochs: passes over the images.
        batch: images a step.
        rate: of SGD at the start.
        momentum: of SGD.
        weight_decay: times the weights, added to their gradient.
        label_smoothing: the share of the target that is spread evenly over all classes.
        augmentation: random changes of the images; none if `None`.
        held_out: fraction of the images of each class that are kept for validation.
        precision: see `Precision`.
        validate_every: epochs between validations.
        devices: local devices to share a batch, a divisor of it; as many as divide it if `None`.
        run: folder for checkpoints, metrics and TensorBoard events.
        resume: continue the run in that folder; `"auto"`: if there is one, else begin it.
        watch: called with each new record of `history`.

    Raises:
        TypeError: for tasks that are not episodes of classified examples.
        ValueError: for a split other than train, a model with other outputs than classes,
            arguments that make no sense, or a run that cannot be resumed with them.
        FloatingPointError: when the loss is not finite; the run folder keeps an earlier state.
    """
    check_not_forked()
    classified = check_train(images)
    for name, value, good in (
        ("epochs", epochs, epochs >= 1),
        ("batch", batch, batch >= 1),
        ("validate_every", validate_every, validate_every >= 1),
        ("label_smoothing", label_smoothing, 0 <= label_smoothing < 1),
        ("held_out", held_out, 0 <= held_out < 1),
    ):
        if not good:
            least = "from 0 to below 1" if isinstance(value, float) else "of at least 1"
            raise ValueError(f"{name}={value}; expected a number {least}")
    if resume and run is None:
        raise ValueError("resume=True wants run=, the folder of the run to continue")
    order_key, noise_key = jax.random.split(key)
    order = _Order(np.asarray(io.plain(order_key)), classified, held_out, batch)
    steps = epochs * order.an_epoch
    if precision == "auto":
        precision = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    recipe = _Recipe(
        len(classified.classes), steps, rate, momentum, weight_decay, label_smoothing,
        augmentation or Augmentation(), precision,
    )  # fmt: skip
    state, fixed = initial_state(model, recipe.optimizer())
    _check_outputs(eqx.combine(state.model, fixed), classified)
    run = as_run(run)
    recorded = {} if run is None else run.recorded(resume).get("plan", {})
    mesh = local_mesh(batch, devices or recorded.get("devices"))
    history: list[dict[str, Any]] = []
    facts: Facts = {}
    if run is not None:
        shapes = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), state.model
        )
        facts = {
            "plan": {
                "batch": batch, "held_out": held_out, "validate_every": validate_every,
                "devices": 1 if mesh is None else mesh.size, **settings(),
                **fingerprint(recipe=recipe, model=eqx.combine(shapes, fixed), images=images,
                              key=key),
            },
            "made_by": made_by(),
        }  # fmt: skip
        state, history = run.begin(state, facts, resume)
    bank = None if classified.on_host else classified.bank
    # Once, and not at every call of the program: the bank of images may be large.
    state, bank, given_fixed = everywhere((state, bank, fixed), mesh)
    steps_of = _program(recipe, classified.design, mesh)
    judge = _judge(fixed, classified, order)

    def bounds() -> Iterator[tuple[int, int]]:
        start = int(state.step)
        while start < steps:
            # Ends at multiples of the chunk, so that a resumed run makes the same calls.
            end = min(start - start % CHUNK + CHUNK, steps)
            yield start, end
            start = end

    def job(start: int, end: int) -> tuple[int, int, PyTree]:
        rows = order.rows(start, end)
        pixels = jnp.asarray(rows) if bank is not None else pixels_of(classified, rows)
        return start, end, (pixels, jnp.asarray(order.labels[rows]))

    jobs = (lambda b=b: job(*b) for b in list(bounds()))
    every = validate_every * order.an_epoch
    accuracy: float | None = None
    stopped, saved = "done", -math.inf
    with interruptible() as interrupted:
        for start, end, loaded in feed.prefetch(classified, jobs):
            began = time.perf_counter()
            given = bank, given_fixed, noise_key, loaded
            state, logs = program.call(steps_of, given, state, donate=[1])
            means = {name: float(np.mean(values)) for name, values in logs.items()}
            if not math.isfinite(means["loss"]):
                raise FloatingPointError(
                    f"the loss was not finite in steps {start + 1} to {end}; lower the rate of "
                    f"{rate:g}, or look for broken images"
                )
            record: dict[str, Any] = {"step": end, "seconds": time.perf_counter() - began, **means}
            due = end // every > start // every or end == steps
            if due:
                accuracy = judge(state.model)
            if due and accuracy is not None:
                record["validation"] = {"accuracy": accuracy}
            history.append(record)
            if run is not None:
                run.log(record)
            if watch is not None:
                watch(record)
            stop = interrupted() and end < steps
            # Not at every chunk: a wide network's checkpoint has hundreds of megabytes.
            if run is not None and (due or stop or time.monotonic() > saved + SAVE_EVERY):
                run.checkpoint(state, facts)
                saved = time.monotonic()
            if stop:
                stopped = "interrupted"
                break
    if stopped == "done" and accuracy is None:
        accuracy = judge(state.model)  # a finished run, resumed
    trained = roles.reshare(eqx.combine(_on_one_device(state.model), fixed))
    return Pretraining(trained, int(state.step), accuracy, history, stopped)


def step_count(images: TaskDistribution, epochs: int, batch: int, held_out: float) -> int:
    """The steps that `pretrain` takes with these arguments."""
    order = _Order(np.zeros(1, int), check_train(images), held_out, batch)
    return epochs * order.an_epoch


def check_train(images: TaskDistribution) -> Episodes:
    """The images, if they are of the meta-train classes.

    Raises:
        TypeError: if they are no episodes of classified images.
        ValueError: if they are of another split, whose classes must stay unseen.
    """
    if not isinstance(images, Episodes):
        raise TypeError(
            f"pretraining wants the train split of image episodes, such as mini_imagenet().train, "
            f"and was given {type(images).__name__}"
        )
    if images.split != "train":
        raise ValueError(
            f"pretraining was given the {images.split} split, whose classes the extractor must "
            "never have seen; give it the train split"
        )
    return images


def initial_state(model: Model, optimizer: optax.GradientTransformation) -> tuple[State, PyTree]:
    """The state before the first step, and what of the model is not trained."""
    model = batch_norm.track(roles.deduplicate(model))
    moved = batch_norm.statistics(model)
    trained, fixed = eqx.partition(
        model,
        jax.tree.map(lambda t, path: t or path in moved, roles.trained(model), tree.paths(model)),
    )
    # Copies: the compiled program reuses the memory of its arguments, and the caller's stay.
    trained = jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), trained)
    return State(jnp.zeros((), jnp.int32), trained, optimizer.init(_split(trained)[0])), fixed


def restore(run: Run, model: Model) -> tuple[Model, int]:
    """The model of a run's checkpoint, and its step.

    Args:
        run: the folder of the run.
        model: as `pretrain` was given, of any weights.

    Raises:
        FileNotFoundError: if the run has no checkpoint.
        ValueError: if the checkpoint is broken or of another model.
    """
    recipe = _Recipe(1, 1, 0.1, 0.9, 0.0, 0.0, Augmentation(), "float32")
    state, fixed = initial_state(model, recipe.optimizer())
    state = io.load(run.checkpoint_file, state)
    return roles.reshare(eqx.combine(state.model, fixed)), int(state.step)


def extract(
    model: Model,
    images: TaskDistribution,
    *,
    batch: int = 256,
    layer: int | None = None,
    watch: Callable[[int], None] | None = None,
) -> Float[np.ndarray, "n features"]:
    """Features of all images of a split, in its order: class by class.

    Batch normalisation is by running statistics where the model has some, so that the features of
    an image do not depend on the others.

    Args:
        model: has `features`, as the networks in `adaptax.models` do.
        images: any split of a family of image episodes.
        batch: images at once, which bounds the memory.
        layer: passed on to `features` if given; see `WideResNet.features`.
        watch: called with the number of images done.

    Raises:
        TypeError: if the model has no features, or the tasks are no episodes of images.
    """
    if not isinstance(images, Episodes) or not hasattr(model, "features"):
        raise TypeError(
            "features are extracted by a model with a method `features` from episodes of images, "
            f"not by {type(model).__name__} from {type(images).__name__}"
        )
    how = {} if layer is None else {"layer": layer}
    model = batch_norm.use_running_average(model)
    rows, found = np.arange(int(np.sum(images.count))), []
    for first in range(0, len(rows), batch):
        some = rows[first : first + batch]
        # The last batch is filled up, so that there is one program.
        pixels = pixels_of(images, np.resize(some, min(batch, len(rows))))
        features = program.call(_features, model, images.design, how, pixels)
        found.append(np.asarray(features)[: len(some)])
        if watch is not None:
            watch(first + len(some))
    return np.concatenate(found)


def _features(model: Any, design: Design, how: dict[str, int], pixels: PyTree) -> Array:
    return fast(lambda model, x: model.features(x, **how))(model, design.inputs(pixels))


def pixels_of(images: Episodes, rows: Int[np.ndarray, "*any"]) -> PyTree:
    """Examples by their rows, on the device."""
    return jax.tree.map(jnp.asarray, images.examples(rows))


@dataclasses.dataclass(frozen=True)
class _Recipe:
    """What a step of training is; arguments as of `pretrain`."""

    classes: int
    steps: int
    rate: float
    momentum: float
    weight_decay: float
    label_smoothing: float
    augmentation: Augmentation
    precision: str

    def optimizer(self) -> optax.GradientTransformation:
        """SGD along half a cosine; arrays of one dimension do not decay."""
        decays = lambda weights: jax.tree.map(lambda leaf: leaf.ndim > 1, weights)  # noqa: E731
        rate = optax.cosine_decay_schedule(self.rate, self.steps)
        return optax.chain(
            optax.add_decayed_weights(self.weight_decay, decays),
            optax.sgd(rate, self.momentum, nesterov=True),
        )

    def loss(self, model: Model, x: Array, y: Array) -> tuple[Array, Array]:
        """Cross-entropy with smoothed labels, and accuracy."""
        if self.precision != "float32":
            model = convolve_in(jnp.dtype(self.precision), model)
        logits = roles.apply(model, x)
        targets = optax.smooth_labels(jax.nn.one_hot(y, self.classes), self.label_smoothing)
        loss = jnp.mean(optax.softmax_cross_entropy(logits, targets))
        return loss, jnp.mean(jnp.argmax(logits, axis=-1) == y)


def _program(
    recipe: _Recipe, design: Design, mesh: Mesh | None
) -> Callable[[PyTree, State], tuple[State, dict[str, Array]]]:
    """A chunk of steps, of (bank, what is not trained, key, (rows or pixels, labels)) and state."""
    optimizer, inputs = recipe.optimizer(), design.inputs

    def step(given: PyTree, state: State, loaded: PyTree) -> tuple[State, dict[str, Array]]:
        (bank, fixed, key), (pixels, y) = given, loaded

        @fast
        def loss(trained: PyTree, x: Array, y: Array, key: PRNGKeyArray) -> tuple[Array, Array]:
            return recipe.loss(roles.fresh(eqx.combine(trained, fixed), key), x, y)

        if bank is not None:
            pixels = bank[pixels]
        step_key = jax.random.fold_in(key, state.step)
        x = recipe.augmentation(step_key, inputs(pixels))
        if mesh is not None:
            x = jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P(mesh.axis_names[0])))
        slope = jax.value_and_grad(loss, has_aux=True)
        (value, accuracy), grads = slope(state.model, x, y, step_key)
        weights, running = _split(state.model)
        for_weights, for_running = _split(grads)
        updates, opt_state = optimizer.update(for_weights, state.opt_state, weights)
        # The gradient of running statistics is their update: see `batch_norm.observe`.
        running = jax.tree.map(jnp.subtract, running, for_running)
        model = eqx.combine(optax.apply_updates(weights, updates), running)
        return State(state.step + 1, model, opt_state), {"loss": value, "accuracy": accuracy}

    def steps(given: PyTree, state: State) -> tuple[State, dict[str, Array]]:
        *given, loaded = given
        return jax.lax.scan(lambda carry, each: step(given, carry, each), state, loaded)

    return steps


def _judge(fixed: PyTree, images: Episodes, order: _Order) -> Callable[[PyTree], float | None]:
    """The accuracy on the images that are held out, by running statistics."""
    held = order.held

    def judge(trained: PyTree) -> float | None:
        model = eqx.combine(_on_one_device(trained), fixed)
        right, size = 0, min(order.batch, len(held))
        for first in range(0, len(held), size or 1):
            rows = held[first : first + size]
            pixels = pixels_of(images, np.resize(rows, size))
            said = np.asarray(program.call(_logits, model, images.design, pixels))
            right += int(np.sum(said.argmax(axis=-1)[: len(rows)] == order.labels[rows]))
        return right / len(held) if len(held) else None

    return judge


def _logits(model: Model, design: Design, pixels: Array) -> Array:
    return fast(roles.apply)(batch_norm.use_running_average(model), design.inputs(pixels))


def _on_one_device(trained: PyTree) -> PyTree:
    """The arrays, which every device of a mesh has, of the first alone."""
    return jax.device_put(trained, jax.local_devices()[0])


def _split(trained: PyTree) -> tuple[PyTree, PyTree]:
    """Weights, and running statistics of batch normalisation."""
    statistics = batch_norm.statistics(trained)
    return eqx.partition(trained, jax.tree.map(lambda p: p not in statistics, tree.paths(trained)))


def _check_outputs(model: Model, images: Episodes) -> None:
    pixels = jax.eval_shape(lambda: images.design.inputs(pixels_of(images, np.zeros(2, int))))
    shape = eqx.filter_eval_shape(model, pixels).shape
    if shape != (2, len(images.classes)):
        raise ValueError(
            f"the model makes outputs of shape {shape} of 2 images, but there are "
            f"{len(images.classes)} meta-train classes; build it with out={len(images.classes)}"
        )


class _Order:
    """Which images are held out, and in which order the others are seen.

    Args:
        seed: words that name both.
        images: the split.
        held_out: fraction of each class.
        batch: images a step.
    """

    def __init__(self, seed: np.ndarray, images: Episodes, held_out: float, batch: int):
        count = np.asarray(images.count)
        self.labels = np.repeat(np.arange(len(count), dtype=np.int32), count)
        self.seed, self.batch = [int(word) for word in seed], batch
        held = []
        for first, n in zip(np.cumsum(count) - count, count):
            shuffled = first + np.random.default_rng([*self.seed, 0, first]).permutation(n)
            held.append(shuffled[: min(round(held_out * n), n - 1)])
        self.held = np.sort(np.concatenate(held))
        self.train = np.setdiff1d(np.arange(len(self.labels)), self.held)
        if len(self.train) < batch:
            raise ValueError(f"batch={batch}, but there are {len(self.train)} images to train on")
        self.an_epoch = len(self.train) // batch

    def rows(self, start: int, end: int) -> Int[np.ndarray, "steps batch"]:
        """Rows of the images of these steps."""
        epochs = range(start // self.an_epoch, (end - 1) // self.an_epoch + 1)
        each = [
            np.random.default_rng([*self.seed, 1, epoch]).permutation(self.train)
            for epoch in epochs
        ]
        whole = [rows[: self.an_epoch * self.batch].reshape(-1, self.batch) for rows in each]
        first = start - epochs[0] * self.an_epoch
        return np.concatenate(whole)[first : first + end - start]

"""Supervised training of a feature extractor on the meta-train classes, and what it extracts.

A classifier of all meta-train classes at once, whose penultimate layer is kept: LEO's authors call
it the standard method. Images of validation and test classes are never seen.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray, PyTree

from .. import io, processes, program, roles
from ..process import check_not_forked
from ..protocols import Images
from ..task import Model, TaskDistribution
from .augment import Augmentation
from .classifier import Order, Recipe, State, classifier_steps, initial_state
from .extract import outputs, pixels_of
from .fingerprint import fingerprint, made_by, settings
from .loop import Loop, Means, averages
from .mapping import everywhere, task_mesh
from .run import Facts, Resume, Run, lets_go, opened
from .state import shaped

Precision = Literal["auto", "float32", "bfloat16"]
"""Of the convolutions of the residual networks: `"auto"` is bfloat16 on accelerators, float32 on a
CPU. Weights, batch normalisation, head and loss are float32 always, and so are features."""

CHUNK = 20
"""Steps in one compiled program, after which the host may validate, save and stop."""

SAVE_EVERY = 60.0
"""Seconds between checkpoints, beside those after each validation."""


@dataclasses.dataclass(frozen=True)
class Pretraining:
    """The outcome of `pretrain`.

    Args:
        model: the classifier, with running statistics of batch normalisation.
        step: steps done.
        accuracy: on the images held out of the meta-train classes; `None` where none are.
        history: a record for every chunk of steps.
        stopped: `"done"`, `"interrupted"` or `"out of time"`.
    """

    model: Model
    step: int
    accuracy: float | None
    history: list[dict[str, Any]]
    stopped: str


@lets_go
@processes.ends_with_the_others
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
    run, recorded = opened(run, resume)
    order_key, noise_key = jax.random.split(key)
    order = Order(np.asarray(io.plain(order_key)), classified, held_out, batch)
    steps = epochs * order.an_epoch
    if precision == "auto":
        precision = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    recipe = Recipe(
        len(classified.classes), steps, rate, momentum, weight_decay, label_smoothing,
        augmentation or Augmentation(), precision,
    )  # fmt: skip
    state, fixed = initial_state(model, recipe.optimizer())
    _check_outputs(eqx.combine(state.model, fixed), classified)
    moved = int(recorded.get("made_by", {}).get("processes", 1)) != 1 or processes.several()
    before = None if moved else recorded.get("plan", {}).get("devices")
    mesh = task_mesh(batch, devices or before)
    history: list[dict[str, Any]] = []
    facts: Facts = {}
    if run is not None:
        facts = {
            "plan": {
                "batch": batch, "held_out": held_out, "validate_every": validate_every,
                "devices": 1 if mesh is None else mesh.size, **settings(),
                **fingerprint(recipe=recipe, model=shaped(state.model, fixed), images=images,
                              key=key),
            },
            "made_by": made_by(),
        }  # fmt: skip
        processes.agree(**facts["plan"])
        state, history = run.begin(state, facts, resume, free=("devices",) if moved else ())
    bank = None if classified.on_host else classified.bank
    # Once, and not at every call of the program: the bank of images may be large.
    bank, given_fixed = everywhere((bank, fixed), mesh)
    state = state if processes.several() else everywhere(state, mesh)
    steps_of = classifier_steps(recipe, classified.design, mesh)

    def load(start: int, end: int) -> PyTree:
        rows = order.rows(start, end)[:, processes.own(batch)]
        pixels = jnp.asarray(rows) if bank is not None else pixels_of(classified, rows)
        return pixels, jnp.asarray(order.labels[rows])

    def advance(state: State, loaded: PyTree, start: int) -> tuple[State, Means, None]:
        if processes.several():
            assert mesh is not None
            state, loaded = everywhere(state, mesh), processes.sharded(loaded, mesh, 1)
        given = bank, given_fixed, noise_key, loaded
        state, logs = processes.here(program.call(steps_of, given, state, donate=[1]))
        means = averages(logs)
        if not math.isfinite(means["loss"]):
            raise FloatingPointError(
                f"the loss was not finite in steps {start + 1} to {int(state.step)}; lower the "
                f"rate of {rate:g}, or look for broken images"
            )
        return state, means, None

    def accuracy(state: State) -> float | None:
        """On the images that are held out, by running statistics."""
        model = eqx.combine(_on_one_device(state.model), fixed)
        if not len(order.held):
            return None
        mine = np.array_split(order.held, jax.process_count())[jax.process_index()]
        found = outputs(roles.apply, model, classified, mine, batch)
        said = [logits.argmax(axis=-1) for logits in found]
        right = int(np.sum(np.concatenate(said) == order.labels[mine])) if said else 0
        return processes.total(right) / len(order.held)

    def validate(state: State) -> tuple[State, Means | None]:
        found = accuracy(state)
        return state, None if found is None else {"accuracy": found}

    loop = Loop(
        steps, CHUNK, images, load, advance, validate, validate_every * order.an_epoch, history,
        run, facts, save_every=SAVE_EVERY, watch=watch,
    )  # fmt: skip
    state, stopped = loop(state, int(state.step))
    scores = [record["validation"]["accuracy"] for record in history if "validation" in record]
    best = scores[-1] if scores else accuracy(state) if stopped == "done" else None
    trained = roles.reshare(eqx.combine(_on_one_device(state.model), fixed))
    return Pretraining(trained, int(state.step), best, history, stopped)


def step_count(images: TaskDistribution, epochs: int, batch: int, held_out: float) -> int:
    """The steps that `pretrain` takes with these arguments."""
    order = Order(np.zeros(1, int), check_train(images), held_out, batch)
    return epochs * order.an_epoch


def check_train(images: TaskDistribution) -> Any:
    """The images, if they are of the meta-train classes.

    Raises:
        TypeError: if they are no episodes of classified images.
        ValueError: if they are of another split, whose classes must stay unseen.
    """
    if not isinstance(images, Images):
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


def restore(run: Run, model: Model) -> tuple[Model, int]:
    """The model of a run's checkpoint, and its step.

    Args:
        run: the folder of the run.
        model: as `pretrain` was given, of any weights.

    Raises:
        FileNotFoundError: if the run has no checkpoint.
        ValueError: if the checkpoint is broken or of another model.
    """
    recipe = Recipe(1, 1, 0.1, 0.9, 0.0, 0.0, Augmentation(), "float32")
    state, fixed = initial_state(model, recipe.optimizer())
    state = io.load(run.checkpoint_file, state)
    return roles.reshare(eqx.combine(state.model, fixed)), int(state.step)


def _check_outputs(model: Model, images: Images) -> None:
    pixels = jax.eval_shape(lambda: images.design.inputs(pixels_of(images, np.zeros(2, int))))
    shape = eqx.filter_eval_shape(model, pixels).shape
    if shape != (2, len(images.classes)):
        raise ValueError(
            f"the model makes outputs of shape {shape} of 2 images, but there are "
            f"{len(images.classes)} meta-train classes; build it with out={len(images.classes)}"
        )


def _on_one_device(trained: PyTree) -> PyTree:
    """The arrays, which every device of a mesh has, of the first alone."""
    return jax.device_put(trained, jax.local_devices()[0])

"""A step of training a classifier, and which images it sees when."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Int, PRNGKeyArray, PyTree

from .. import batch_norm, roles, tree
from ..conv import fast
from ..protocols import Casting, Images
from ..task import Model
from .augment import Augmentation
from .state import copied


class State(eqx.Module):
    """What a checkpoint of pretraining holds: the step, the model's arrays, the optimizer's."""

    step: Array
    model: PyTree
    opt_state: PyTree


def initial_state(model: Model, optimizer: optax.GradientTransformation) -> tuple[State, PyTree]:
    """The state before the first step, and what of the model is not trained."""
    model = batch_norm.track(roles.deduplicate(model))
    moved = batch_norm.statistics(model)
    trained, fixed = eqx.partition(
        model,
        jax.tree.map(lambda t, path: t or path in moved, roles.trained(model), tree.paths(model)),
    )
    state = State(jnp.zeros((), jnp.int32), trained, optimizer.init(_split(trained)[0]))
    return copied(state), fixed


@dataclasses.dataclass(frozen=True)
class Recipe:
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
            model = computing_in(jnp.dtype(self.precision), model)
        logits = roles.apply(model, x)
        targets = optax.smooth_labels(jax.nn.one_hot(y, self.classes), self.label_smoothing)
        loss = jnp.mean(optax.softmax_cross_entropy(logits, targets))
        return loss, jnp.mean(jnp.argmax(logits, axis=-1) == y)


def classifier_steps(
    recipe: Recipe, design: Any, mesh: Mesh | None
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


def computing_in(dtype: Any, model: Model) -> Model:
    """The model, every layer of it that can computing in that type; others keep theirs."""
    casts = lambda node: isinstance(node, Casting)  # noqa: E731
    cast = lambda node: node.computing_in(dtype) if casts(node) else node  # noqa: E731
    return jax.tree.map(cast, model, is_leaf=casts)


def _split(trained: PyTree) -> tuple[PyTree, PyTree]:
    """Weights, and running statistics of batch normalisation."""
    statistics = batch_norm.statistics(trained)
    return eqx.partition(trained, jax.tree.map(lambda p: p not in statistics, tree.paths(trained)))


class Order:
    """Which images are held out, and in which order the others are seen.

    Args:
        seed: words that name both.
        images: the split.
        held_out: fraction of each class.
        batch: images a step.
    """

    def __init__(self, seed: np.ndarray, images: Images, held_out: float, batch: int):
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

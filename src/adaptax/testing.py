"""Checks that any learner must pass, one's own included.

    from adaptax.testing import check_learner, check_meta_gradient

    check_learner(MyLearner(loss=adaptax.losses.mse))
    check_meta_gradient(MyLearner(loss=adaptax.losses.mse))

Each check that fails raises an `AssertionError` of one sentence.
"""

from __future__ import annotations

import functools
import itertools
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from . import io, losses, roles, tree
from .engine.evaluate import evaluate
from .engine.mapping import meta_value_and_grad
from .learner import Ensemble, Meta, MetaLearner
from .models import MLP
from .task import Batch, Model, Task, TaskDistribution
from .tasks.sinusoid import sinusoid

TASKS = 3
"""Tasks in the meta-batches of the checks."""

AGREE = 1e-8
"""How closely two ways to the same float64 gradient agree, relative to its norm."""

ROUNDING = 1e-3
"""The same of values in float32."""


Reference = Callable[..., Float[Array, ""]]
"""`reference(meta, task, *, at, key, progress)`: see `check_meta_gradient`."""


class Blobs(TaskDistribution):
    """Three classes in the plane, Gaussian around centres that differ from task to task."""

    split: str = eqx.field(static=True, default="train")

    def sample(self, key: PRNGKeyArray) -> Task:
        """x `(n, 2)` and labels `(n,)`: 6 of support, 9 of query, class by class."""
        for_centres, for_noise = jax.random.split(key)
        centres = 2 * jax.random.normal(for_centres, (3, 1, 2))
        x = centres + jax.random.normal(for_noise, (3, 5, 2))

        def batch(x: Array) -> Batch:
            return Batch(x.reshape(-1, 2), jnp.repeat(jnp.arange(3), x.shape[1]))

        return Task(batch(x[:, :2]), batch(x[:, 2:]))


def check_learner(
    learner: MetaLearner,
    model: Model | None = None,
    tasks: TaskDistribution | None = None,
    *,
    key: PRNGKeyArray | None = None,
) -> None:
    """Check that a learner keeps the contract of `MetaLearner`.

    * `init`, `adapt` and `meta_loss` are deterministic in the key; `init` gives finite arrays.
    * `adapt` gives a model, or an `Ensemble`, whose predictions fit the targets, and `iterates`
      ends with it.
    * `meta_loss` gives a finite scalar and a dict of scalars, under `jit` and `vmap` too.
    * The gradient has the structure of the trained part of the meta-parameters, is the mean of
      the tasks' gradients, and is the same by scan, chunks and vmap, and, for a learner that
      makes no use of its key, in any order of the tasks and of the examples in a batch, and
      whether or not batches are padded by examples of weight 0, unless it refuses weights by a
      `ValueError` or its loss does not know them.
    * A step of the default optimizer changes the meta-parameters and keeps them finite.
    * Evaluation leaves the meta-parameters as they were; saving and loading restores them.

    Args:
        learner: any.
        model: a small model; a tanh MLP if `None`.
        tasks: a distribution to sample tasks from; if `None`, sine waves or, for losses that want
            labels, three classes in the plane.
        key: what is random in the checks.

    Raises:
        AssertionError: saying in one sentence what the learner gets wrong.
    """
    key = jax.random.key(0) if key is None else key
    model, tasks = _defaults(learner, roles.deduplicate(model), tasks)
    init_key, task_key, key = jax.random.split(key, 3)
    batch = _sample(tasks, task_key)
    meta = _check_init(learner, model, init_key)
    _check_program(learner, meta, batch, key)
    _check_evaluation(learner, meta, tasks, key)
    _check_round_trip(learner, model, meta)
    with jax.enable_x64(True):
        _check_agreement(_double(learner), _double(model), _double(meta), _double(batch), key)


def check_meta_gradient(
    learner: MetaLearner,
    model: Model | None = None,
    tasks: TaskDistribution | None = None,
    *,
    key: PRNGKeyArray | None = None,
    rtol: float = 1e-6,
    progress: float = 1.0,
    reference: Reference | None = None,
) -> None:
    """Check the meta-gradient against finite differences in float64.

    The differences are central, of fourth order, and taken along the gradient, along random
    directions of all meta-parameters and of each array, and along the largest coordinate of each
    array. The gradient of the learner's loss at an adapted model, which the inner loop descends,
    is checked likewise.

    The model must be smooth: use `tanh`, since a kink of ReLU in the range of a difference spoils
    it. Everything that is float is converted to float64 for the check.

    Args:
        learner: any.
        model: a small smooth model; a tanh MLP if `None`.
        tasks: as in `check_learner`.
        key: what is random in the checks.
        rtol: largest relative error, of a derivative that is not much smaller than is usual for
            its direction.
        progress: how far meta-training is, in `[0, 1]`: a learner whose schedule changes the
            gradient (MAML++) is to be checked in every phase.
        reference: what is differenced: the meta-loss itself if `None`, which a learner with the
            exact gradient passes. One that stops gradients on purpose (first order, Reptile) says
            here what it holds fixed: `reference(meta, task, at=, key=, progress=)`, the value of
            the meta-loss with all that is stopped computed from `at` instead of `meta`.

    Raises:
        AssertionError: saying in one sentence which derivative is wrong.
    """
    key = jax.random.key(0) if key is None else key
    model, tasks = _defaults(learner, roles.deduplicate(model), tasks)
    init_key, task_key, key, loss_key = jax.random.split(key, 4)
    batch = _sample(tasks, task_key)
    with jax.enable_x64(True):
        learner, model, batch = _double(learner), _double(model), _double(batch)
        meta = _double(learner.init(model, key=init_key))
        trained, fixed = eqx.partition(meta, learner.trained(meta))
        keys, now = jax.random.split(key, TASKS), jnp.array(progress, float)

        def differenced(here: PyTree) -> Float[Array, ""]:
            def one(task: Task, key: PRNGKeyArray) -> Array:
                at = eqx.combine(here, fixed)
                if reference is None:
                    return learner.meta_loss(at, task, key=key, progress=now)[0]
                return reference(at, task, at=meta, key=key, progress=now)

            return jnp.mean(eqx.filter_vmap(one)(batch, keys))

        def found(trained: PyTree) -> tuple[Array, PyTree]:
            meta = eqx.combine(trained, fixed)
            (value, _), grads = meta_value_and_grad(learner, meta, batch, key=key, progress=now)
            return value, grads

        hint = "; a learner that stops gradients says by reference= what it holds fixed"
        _compare("meta-gradient", differenced, trained, found, 0, rtol, "" if reference else hint)

        task = _rows(batch, 0)
        model = _Compiled(lambda m: learner.adapt(m, task.support, key=loss_key), meta)(meta)
        model = model.member(0) if isinstance(model, Ensemble) else model
        params, rest = eqx.partition(model, roles.trained(model))
        data = task.support.draw(model, loss_key)
        loss = lambda p: learner.loss(eqx.combine(p, rest), data)  # noqa: E731
        _compare("inner gradient", loss, params, jax.value_and_grad(loss), 1, rtol)


def _defaults(
    learner: MetaLearner, model: Model | None, tasks: TaskDistribution | None
) -> tuple[Model, TaskDistribution]:
    if tasks is not None and model is not None:
        return model, tasks
    keys = jax.random.split(jax.random.key(1))
    waves = sinusoid(shot=5, query=6).train
    choices: list[tuple[Model, TaskDistribution]] = [
        (MLP(1, 1, (8, 8), activation=jnp.tanh, key=keys[0]), waves),
        (MLP(2, 3, (8, 8), activation=jnp.tanh, key=keys[1]), Blobs()),
    ]
    if learner.loss is losses.predictive_nll:  # of adapted models alone
        default, distribution = choices[0]
        return default if model is None else model, distribution if tasks is None else tasks
    for default, distribution in choices:
        pair = (default if model is None else model, distribution if tasks is None else tasks)
        try:
            batch = pair[1].sample(keys[0]).support
            eqx.filter_eval_shape(roles.pure(learner.loss), pair[0], batch)
        except Exception:  # whatever a loss says of data that is not for it
            continue
        return pair
    raise ValueError(
        "the learner's loss takes neither regression nor classification batches of the default "
        "model and tasks; give the check a model and tasks that fit it"
    )


def _sample(tasks: TaskDistribution, key: PRNGKeyArray) -> Task:
    keys = jax.random.split(key, TASKS)
    return _Compiled(jax.vmap(tasks.sample), keys)(keys)


def _check_init(learner: MetaLearner, model: Model, key: PRNGKeyArray) -> Meta:
    meta = learner.init(model, key=key)
    _demand(_same(meta, learner.init(model, key=key)), "init differs between calls with one key")
    _demand(bool(jax.tree.leaves(tree.parameters(meta))), "init gives nothing to train: no arrays")
    _demand(bool(tree.finite(meta)), "init gives meta-parameters that are not finite")
    return meta


def _check_program(learner: MetaLearner, meta: Meta, batch: Task, key: PRNGKeyArray) -> None:
    """Check `adapt`, `iterates`, `meta_loss` and a meta-step, in one compiled program."""
    task, keys = _rows(batch, 0), jax.random.split(key, TASKS)
    optimizer, half = learner.optimizer(10), jnp.array(0.5)
    learner.check_support(meta, task.support, key=key)

    def predict(model: Model) -> tuple[PyTree, PyTree]:
        query = task.query.draw(model, key)
        return roles.apply(model, query.x), query.y

    def losses(meta: Meta) -> Array:
        one = lambda task, key: learner.meta_loss(meta, task, key=key, progress=half)[0]  # noqa: E731
        return jax.vmap(one)(batch, keys)

    def step(meta: Meta) -> tuple[PyTree, PyTree]:
        trained = eqx.filter(meta, learner.trained(meta))
        _, grads = meta_value_and_grad(learner, meta, batch, key=key, progress=0.5)
        updates, _ = optimizer.update(grads, optimizer.init(trained), trained)
        return grads, optax.apply_updates(trained, updates)

    def program(meta: Meta) -> Any:
        adapt = lambda meta: learner.adapt(meta, task.support, key=key)  # noqa: E731
        model = _traced("adapt", adapt, meta)
        _demand(callable(model), f"adapt gives a {type(model).__name__}, which cannot be called")
        _check_predictions(model, *_traced("the adapted model", predict, model))
        iterates = lambda meta: learner.iterates(meta, task.support, key=key)  # noqa: E731
        path = _traced("iterates", iterates, meta)
        loss = lambda meta: learner.meta_loss(meta, task, key=keys[0], progress=half)  # noqa: E731
        out = _traced("meta_loss", loss, meta)
        _check_meta_loss(out)
        values = _traced("meta_loss, vmapped over tasks,", losses, meta)
        return model, path, out[0], values, _traced("a meta-step", step, meta)

    run = _Compiled(program, meta)
    adapted, path, value, values, (grads, new) = map(_arrays, run(meta))
    # Traced anew: what is random on the host differs.
    again = _Compiled(program, meta)
    if not again.does_as(run):
        other, _, otherwise, *_ = map(_arrays, again(meta))
        _demand(_close(other, adapted, ROUNDING), "adapt differs between calls with one key")
        _demand(_close(otherwise, value, ROUNDING), "meta_loss differs between calls with one key")
    _demand(bool(np.isfinite(value)), f"meta_loss gives {value}, which is not finite")
    _demand(_close(values[0], value, ROUNDING), "meta_loss by vmap is not meta_loss")
    ends = jax.tree.map(lambda leaf: leaf if roles.is_key(leaf) else np.asarray(leaf)[-1], path)
    _demand(_close(ends, adapted, ROUNDING), "the last of iterates is not what adapt gives")
    trained = eqx.filter(meta, learner.trained(meta))
    _demand(
        _structure(grads) == _structure(trained),
        "the gradient does not have the structure of the trained part of the meta-parameters",
    )
    _demand(bool(tree.finite(grads)), "the meta-gradient is not finite")
    _demand(bool(tree.finite(new)), "a meta-step makes the meta-parameters infinite or NaN")
    _demand(not _same(new, trained), "a meta-step of the default optimizer changes nothing")


def _check_predictions(model: Model, predictions: PyTree, targets: PyTree) -> None:
    """Check the shape of what an adapted model predicts."""
    lead = jax.tree.leaves(model)[0].shape[:1] if isinstance(model, Ensemble) else ()
    if hasattr(predictions, "shape") and hasattr(targets, "shape"):
        labels = jnp.issubdtype(targets.dtype, jnp.integer)
        due = (*lead, *targets.shape, *(predictions.shape[-1:] if labels else ()))
        _demand(
            predictions.shape == due,
            f"the adapted model predicts shape {predictions.shape} where {due} is due",
        )


def _check_meta_loss(out: Any) -> None:
    """Check that there is a pair of a scalar and a dict of scalars."""
    _demand(
        isinstance(out, tuple) and len(out) == 2 and isinstance(out[1], dict),
        "meta_loss does not give a pair of a scalar and a dict of metrics",
    )
    _demand(jnp.shape(out[0]) == (), f"meta_loss gives shape {jnp.shape(out[0])}, not a scalar")
    for name, metric in out[1].items():
        shape = jnp.shape(metric)
        _demand(shape == (), f"the metric {name!r} of meta_loss has shape {shape}, not a scalar's")


def _check_evaluation(
    learner: MetaLearner, meta: Meta, tasks: TaskDistribution, key: PRNGKeyArray
) -> None:
    before = jax.tree.map(lambda leaf: _data(leaf).copy(), _arrays(meta))
    evaluate(learner, meta, tasks, episodes=2, key=key)
    _demand(
        _same(before, jax.tree.map(_data, _arrays(meta))), "evaluation changes the meta-parameters"
    )


def _check_round_trip(learner: MetaLearner, model: Model, meta: Meta) -> None:
    like = learner.init(model, key=jax.random.key(99))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "meta.safetensors"
        io.save(file, meta)
        _demand(_same(meta, io.load(file, like)), "saving and loading changes the meta-parameters")


def _check_agreement(
    learner: MetaLearner, model: Model, meta: Meta, batch: Task, key: PRNGKeyArray
) -> None:
    """Check different ways to one gradient, in float64."""
    trained, fixed = eqx.partition(meta, learner.trained(meta))

    def mapped(batch: Task) -> list[PyTree]:
        ways: tuple[Any, ...] = ("vmap", "scan", 2)
        run = lambda way: meta_value_and_grad(learner, meta, batch, key=key, mapping=way)[1]  # noqa: E731
        return [run(way) for way in ways]

    def alone(task: Task, key: PRNGKeyArray) -> PyTree:
        def loss(trained: PyTree) -> Array:
            here = eqx.combine(trained, fixed)
            return learner.meta_loss(here, task, key=key, progress=jnp.array(1.0))[0]

        return jax.grad(loss)(trained)

    keys, task = jax.random.split(key, TASKS), _rows(batch, 0)
    gradients, single = _Compiled(mapped, batch), _Compiled(alone, task, key)
    whole, scanned, chunked = gradients(batch)
    _demand(_close(scanned, whole), "the gradient by scan is not that by vmap")
    _demand(_close(chunked, whole), "the gradient by chunks of 2 tasks is not that by vmap")
    each = [single(_rows(batch, i), keys[i]) for i in range(TASKS)]
    mean = jax.tree.map(lambda *leaves: sum(map(_data, leaves)) / TASKS, *each)
    _demand(_close(mean, whole), "the gradient of a meta-batch is not the mean over its tasks")

    if not _same(single(task, keys[1]), each[0]):
        return  # the key matters: what follows would compare different draws
    _demand(
        _close(gradients(_rows(batch, np.arange(TASKS)[::-1]))[0], whole),
        "the order of the tasks changes the gradient",
    )
    _demand(
        _close(gradients(_rows(batch, np.zeros(TASKS, int)))[0], each[0]),
        "a meta-batch of equal tasks has another gradient than one of them",
    )
    if isinstance(batch.support, Batch) and isinstance(batch.query, Batch):
        turn = lambda source: _rows(source, np.roll(np.arange(source.size), 1)[::-1])  # noqa: E731
        mixed = Task(turn(task.support), turn(task.query))
        _demand(
            _close(single(mixed, keys[0]), each[0]),
            "the order of the examples within a batch changes the gradient",
        )
        if _knows_weights(learner.loss, model, task.support):
            _check_padding(alone, task, keys[0], each[0])


def _check_padding(gradient: Callable[..., PyTree], task: Task, key: Any, due: PyTree) -> None:
    """Check that rows of weight 0 change nothing; a learner that refuses weights is not asked."""
    longer = Task(*(padded(source, source.size + more) for source, more in
                    ((task.support, 2), (task.query, 3))))  # fmt: skip
    try:
        found = _Compiled(gradient, longer, key)(longer, key)
    except ValueError:
        return
    _demand(
        _close(found, due),
        "examples of weight 0 change the gradient; reduce by adaptax.weights.average(each, "
        "batch.weight), and call models by batch.predict(model), or raise ValueError for weights",
    )


def _knows_weights(loss: Any, model: Model, batch: Batch) -> bool:
    """Return whether a loss itself leaves out examples of weight 0."""
    pair = (batch, padded(batch, batch.size + 1))
    try:
        one, other = (float(roles.pure(loss)(model, each)) for each in pair)
    except Exception:  # of a loss that wants another model, say
        return False
    return bool(np.isclose(one, other, rtol=1e-9))


def padded(batch: Batch, size: int) -> Batch:
    """Return the batch with copies of its first example up to a size, of weight 0.

    Args:
        batch: with or without weights.
        size: at least that of the batch.
    """
    rows = np.r_[np.arange(batch.size), np.zeros(size - batch.size, int)]
    weight = jnp.ones(batch.size) if batch.weight is None else batch.weight
    there = jnp.arange(size) < batch.size
    more = jax.tree.map(lambda a: a[rows], Batch(batch.x, batch.y, weight))
    return Batch(more.x, more.y, jnp.where(there.reshape(-1, *(1,) * (weight.ndim - 1)),
                                           more.weight, 0))  # fmt: skip


def _compare(
    what: str,
    function: Callable[[PyTree], Float[Array, ""]],
    point: PyTree,
    value_and_grad: Callable[[PyTree], tuple[Array, PyTree]],
    seed: int,
    rtol: float,
    hint: str = "",
) -> None:
    """Compare a gradient with finite differences of `function` at `point`."""
    value, gradient = _Compiled(value_and_grad, point)(point)
    slope = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(gradient)])
    size = float(np.linalg.norm(slope))
    _demand(np.isfinite(size), f"the {what} is not finite")
    h = 2e-4
    weights = {-2: 1 / (12 * h), -1: -8 / (12 * h), 1: 8 / (12 * h), 2: -1 / (12 * h)}

    def differences(point: PyTree, directions: PyTree) -> tuple[Array, Array]:
        def along(direction: PyTree) -> Array:
            def at(step: Array) -> Array:
                return function(jax.tree.map(lambda p, d: p + step * d, point, direction))

            values = jax.lax.map(at, h * jnp.array([*weights], float))
            return jnp.array([*weights.values()]) @ values

        return function(point), jax.lax.map(along, directions)

    names, directions = zip(*_directions(point, slope, np.random.default_rng(seed)))
    leaves, structure = jax.tree.flatten(point)
    ends = np.cumsum([leaf.size for leaf in leaves])[:-1]
    split = np.split(np.stack(directions), ends, axis=1)
    parts = [jnp.asarray(part.reshape(-1, *leaf.shape)) for part, leaf in zip(split, leaves)]
    along = jax.tree.unflatten(structure, parts)
    at_point, measured = _Compiled(differences, point, along)(point, along)
    _demand(
        abs(float(at_point) - float(value)) <= rtol * (1e-3 + abs(float(value))),
        f"the {what} belongs to the value {value}, and its reference has the value {at_point}",
    )
    for name, direction, fd in zip(names, directions, map(float, measured)):
        found = float(slope @ direction)
        # A derivative far below the usual is lost in the differences' own error.
        usual = size / np.sqrt(len(slope))
        error = abs(found - fd) / max(abs(fd), usual, 1e-12)
        _demand(
            error <= rtol,
            f"the {what} along {name} is {found:.10g}, and finite differences give {fd:.10g}: "
            f"relative error {error:.1e}, above {rtol:.0e}{hint}",
        )


def _directions(
    point: PyTree, slope: np.ndarray, rng: np.random.Generator
) -> Iterator[tuple[str, np.ndarray]]:
    """Names and unit vectors."""
    size = np.linalg.norm(slope)
    if size > 0:
        yield "itself", slope / size
    for _ in range(3):
        direction = rng.normal(size=len(slope))
        yield "a random direction", direction / np.linalg.norm(direction)
    start = 0
    for name, leaf in zip(jax.tree.leaves(tree.paths(point)), jax.tree.leaves(point)):
        inside = slice(start, start + leaf.size)
        start += leaf.size
        name = name or "the parameters"
        direction = np.zeros(len(slope))
        direction[inside] = rng.normal(size=leaf.size)
        yield f"a random direction of {name}", direction / np.linalg.norm(direction)
        direction = np.zeros(len(slope))
        direction[inside.start + np.argmax(np.abs(slope[inside]))] = 1
        yield f"one coordinate of {name}", direction


class _Compiled:
    """A function as a compiled program, which goes when this object does.

    Args:
        function: of pytrees, as are its results.
        like: arguments of the structure and shapes that it will be called with.
    """

    def __init__(self, function: Callable[..., Any], *like: Any):
        arrays, rest = eqx.partition(like, eqx.is_array)

        def traced(arrays: Any) -> Any:
            found, self._rest = eqx.partition(function(*eqx.combine(arrays, rest)), eqx.is_array)
            return found

        self._traced = jax.jit(traced).trace(arrays)

    def __call__(self, *args: Any) -> Any:
        return eqx.combine(self._run(eqx.filter(args, eqx.is_array)), self._rest)

    @functools.cached_property
    def _run(self) -> Any:
        return self._traced.lower().compile()

    def does_as(self, other: _Compiled) -> bool:
        """Whether the two are one program, constants included."""
        texts, constants = [], []
        for jaxpr in (self._traced.jaxpr, other._traced.jaxpr):
            texts.append(re.sub("0x[0-9a-f]+", "", str(jaxpr.jaxpr)))
            constants.append([_data(one) for one in jaxpr.consts])
        return texts[0] == texts[1] and _same(*constants)


def _double(value: PyTree) -> PyTree:
    """Every floating-point array in float64."""
    return jax.tree.map(
        lambda leaf: jnp.asarray(np.asarray(leaf, np.float64)) if eqx.is_inexact_array(leaf)
        else leaf, value
    )  # fmt: skip


def _traced(what: str, function: Callable[[Any], Any], argument: Any) -> Any:
    """What the function gives, or a sentence on why it cannot be traced."""
    try:
        return function(argument)
    except Exception as error:
        first = (str(error).splitlines() or [""])[0]
        raise AssertionError(
            f"{what} cannot be traced by JAX: {type(error).__name__}: {first}"
        ) from error


def _arrays(value: PyTree) -> PyTree:
    return eqx.filter(value, eqx.is_array)


def _structure(value: PyTree) -> list[tuple[str, tuple[int, ...]]]:
    shapes = (leaf.shape for leaf in jax.tree.leaves(value))
    return list(zip(jax.tree.leaves(tree.paths(value)), shapes))


def _data(leaf: Any) -> np.ndarray:
    return np.asarray(jax.random.key_data(leaf) if roles.is_key(leaf) else leaf)


def _number(leaf: np.ndarray) -> np.ndarray:
    return leaf.astype(float) if leaf.dtype == bool else leaf


def _same(a: PyTree, b: PyTree) -> bool:
    """Whether structures and bits are equal."""
    a, b = eqx.filter(a, eqx.is_array_like), eqx.filter(b, eqx.is_array_like)
    if jax.tree.leaves(tree.paths(a)) != jax.tree.leaves(tree.paths(b)):
        return False
    pairs = zip(map(_data, jax.tree.leaves(a)), map(_data, jax.tree.leaves(b)))
    return all(
        x.dtype == y.dtype and x.shape == y.shape and x.tobytes() == y.tobytes() for x, y in pairs
    )


def _close(a: PyTree, b: PyTree, rtol: float = AGREE) -> bool:
    """Whether trees are equal but for keys and `rtol` of the second's norm."""
    pairs = list(itertools.zip_longest(jax.tree.leaves(a), jax.tree.leaves(b)))
    pairs = [(_number(_data(x)), _number(_data(y))) for x, y in pairs if not roles.is_key(y)]
    if not all(x.shape == y.shape for x, y in pairs):
        return False
    norm = lambda parts: sum(float(np.sum(np.abs(part) ** 2.0)) for part in parts) ** 0.5  # noqa: E731
    return bool(norm(x - y for x, y in pairs) <= rtol * (norm(y for _, y in pairs) + 1e-12))


def _rows(value: PyTree, rows: Any) -> PyTree:
    """Rows of every array, taken on the host: nothing to compile."""

    def take(leaf: Any) -> Any:
        return leaf[rows] if roles.is_key(leaf) else jnp.asarray(np.asarray(leaf)[rows])

    return jax.tree.map(take, value)


def _demand(condition: Any, sentence: str) -> None:
    if not condition:
        raise AssertionError(sentence)

"""Checks that any learner must pass, one's own included.

    from adaptax.testing import check_learner, check_meta_gradient

    check_learner(MyLearner(loss=adaptax.losses.mse))
    check_meta_gradient(MyLearner(loss=adaptax.losses.mse))

Each check that fails raises an `AssertionError` of one sentence.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from . import io, tree
from .evaluate import evaluate
from .learner import Ensemble, Meta, MetaLearner
from .mapping import meta_value_and_grad
from .models import MLP
from .task import Batch, Model, Task, TaskDistribution
from .tasks import sinusoid

TASKS = 3
"""Tasks in the meta-batches of the checks."""

AGREE = 1e-8
"""How closely two ways to the same float64 gradient agree, relative to its norm."""


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
      makes no use of its key, in any order of the tasks and of the examples in a batch.
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
    model, tasks = _defaults(learner, model, tasks)
    init_key, task_key, key = jax.random.split(key, 3)
    batch = jax.vmap(tasks.sample)(jax.random.split(task_key, TASKS))
    task = jax.tree.map(lambda leaf: leaf[0], batch)

    meta = _check_init(learner, model, init_key)
    _check_adapt(learner, meta, task, key)
    _check_meta_loss(learner, meta, batch, key)
    _check_step(learner, meta, batch, key)
    _check_evaluation(learner, meta, tasks, key)
    _check_round_trip(learner, model, meta)
    with jax.enable_x64(True):
        _check_agreement(_double(learner), _double(meta), _double(batch), key)


def check_meta_gradient(
    learner: MetaLearner,
    model: Model | None = None,
    tasks: TaskDistribution | None = None,
    *,
    key: PRNGKeyArray | None = None,
    rtol: float = 1e-6,
) -> None:
    """Check the meta-gradient against finite differences in float64.

    The differences are central, of fourth order, of `learner.reference`: the meta-loss itself for
    a learner that claims the exact gradient, and the meta-loss with some of it held fixed for one
    that stops gradients and says so. They are taken along the gradient, along random directions
    of all meta-parameters and of each array, and along the largest coordinate of each array. The
    gradient of the learner's loss at an adapted model, which the inner loop descends, is checked
    likewise.

    The model must be smooth: use `tanh`, since a kink of ReLU in the range of a difference spoils
    it. Everything that is float is converted to float64 for the check.

    Args:
        learner: any.
        model: a small smooth model; a tanh MLP if `None`.
        tasks: as in `check_learner`.
        key: what is random in the checks.
        rtol: largest relative error, of a derivative that is not much smaller than is usual for
            its direction.

    Raises:
        AssertionError: saying in one sentence which derivative is wrong.
    """
    key = jax.random.key(0) if key is None else key
    model, tasks = _defaults(learner, model, tasks)
    init_key, task_key, key, loss_key, direction_key = jax.random.split(key, 5)
    batch = jax.vmap(tasks.sample)(jax.random.split(task_key, TASKS))
    with jax.enable_x64(True):
        learner, model, batch = _double(learner), _double(model), _double(batch)
        meta = _double(learner.init(model, key=init_key))
        trained, fixed = eqx.partition(meta, eqx.is_inexact_array)
        keys = jax.random.split(key, TASKS)

        def reference(trained: PyTree, at: PyTree) -> Float[Array, ""]:
            def one(task: Task, key: PRNGKeyArray) -> Array:
                here, there = eqx.combine(trained, fixed), eqx.combine(at, fixed)
                return learner.reference(here, task, at=there, key=key, progress=jnp.array(1.0))

            return jnp.mean(eqx.filter_vmap(one)(batch, keys))

        (value, _), gradient = eqx.filter_jit(meta_value_and_grad)(learner, meta, batch, key=key)
        _compare("meta-gradient", lambda t: reference(t, trained), trained, value, gradient,
                 direction_key, rtol)  # fmt: skip

        task = jax.tree.map(lambda leaf: leaf[0], batch)
        params, rest, data = _adapted(learner, meta, task, loss_key)
        loss = lambda p: learner.loss(eqx.combine(p, rest), data)  # noqa: E731
        value, gradient = jax.jit(jax.value_and_grad(loss))(params)
        _compare("inner gradient", loss, params, value, gradient, direction_key, rtol)


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
    for default, distribution in choices:
        pair = (default if model is None else model, distribution if tasks is None else tasks)
        try:
            batch = pair[1].sample(keys[0]).support
            eqx.filter_eval_shape(learner.loss, pair[0], batch)
        except Exception:  # whatever a loss says of data that is not for it
            continue
        return pair
    raise ValueError(
        "the learner's loss takes neither regression nor classification batches of the default "
        "model and tasks; give the check a model and tasks that fit it"
    )


def _check_init(learner: MetaLearner, model: Model, key: PRNGKeyArray) -> Meta:
    meta = learner.init(model, key=key)
    _demand(_same(meta, learner.init(model, key=key)), "init differs between calls with one key")
    _demand(bool(jax.tree.leaves(tree.parameters(meta))), "init gives nothing to train: no arrays")
    _demand(bool(tree.finite(meta)), "init gives meta-parameters that are not finite")
    return meta


def _check_adapt(learner: MetaLearner, meta: Meta, task: Task, key: PRNGKeyArray) -> None:
    adapt = _traceable("adapt", lambda m: learner.adapt(m, task.support, key=key))
    model = adapt(meta)
    _demand(callable(model), f"adapt gives a {type(model).__name__}, which cannot be called")
    query = task.query.draw(model, key)
    predictions = model(query.x)
    lead = (model.particles,) if isinstance(model, Ensemble) else ()
    if eqx.is_array(query.y) and eqx.is_array(predictions):
        labels = jnp.issubdtype(query.y.dtype, jnp.integer)
        shape = (*query.y.shape, *predictions.shape[-1:]) if labels else query.y.shape
        _demand(
            predictions.shape == lead + shape,
            f"the adapted model predicts shape {predictions.shape} where {lead + shape} is due",
        )
    _demand(_same(model, adapt(meta)), "adapt differs between calls with one key")
    path = _traceable("iterates", lambda m: learner.iterates(m, task.support, key=key))(meta)
    last = jax.tree.map(lambda leaf: leaf[-1] if eqx.is_array(leaf) else leaf, path)
    pairs = zip(jax.tree.leaves(_arrays(last)), jax.tree.leaves(_arrays(model)), strict=True)
    close = all(np.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in pairs)
    _demand(close, "the last of iterates is not what adapt gives")


def _check_meta_loss(learner: MetaLearner, meta: Meta, batch: Task, key: PRNGKeyArray) -> None:
    keys = jax.random.split(key, TASKS)

    def one(meta: Meta, task: Task, key: PRNGKeyArray) -> Any:
        return learner.meta_loss(meta, task, key=key, progress=jnp.array(0.5))

    task = jax.tree.map(lambda leaf: leaf[0], batch)
    single = _traceable("meta_loss", lambda m: one(m, task, keys[0]))
    out = single(meta)
    _demand(
        isinstance(out, tuple) and len(out) == 2 and isinstance(out[1], dict),
        "meta_loss does not give a pair of a scalar and a dict of metrics",
    )
    value, metrics = out
    _demand(jnp.shape(value) == (), f"meta_loss gives shape {jnp.shape(value)}, not a scalar")
    _demand(bool(jnp.isfinite(value)), f"meta_loss gives {value}, which is not finite")
    for name, metric in metrics.items():
        shape = jnp.shape(metric)
        _demand(shape == (), f"the metric {name!r} of meta_loss has shape {shape}, not a scalar's")
    _demand(_same(out, single(meta)), "meta_loss differs between calls with one key")
    many = _traceable("meta_loss, vmapped over tasks,", lambda m: jax.vmap(
        lambda task, key: one(m, task, key)[0])(batch, keys))(meta)  # fmt: skip
    _demand(many.shape == (TASKS,), f"meta_loss of {TASKS} tasks by vmap has shape {many.shape}")


def _check_step(learner: MetaLearner, meta: Meta, batch: Task, key: PRNGKeyArray) -> None:
    trained = tree.parameters(meta)
    optimizer = learner.optimizer(10)

    def step(meta: Meta) -> tuple[PyTree, PyTree]:
        _, grads = meta_value_and_grad(learner, meta, batch, key=key, progress=0.5)
        updates, _ = optimizer.update(grads, optimizer.init(trained), trained)
        return grads, optax.apply_updates(trained, updates)

    grads, new = _traceable("a meta-step", step)(meta)
    _demand(
        jax.tree.structure(grads) == jax.tree.structure(trained)
        and [g.shape for g in jax.tree.leaves(grads)]
        == [t.shape for t in jax.tree.leaves(trained)],
        "the gradient does not have the structure of the trained part of the meta-parameters",
    )
    _demand(bool(tree.finite(grads)), "the meta-gradient is not finite")
    _demand(bool(tree.finite(new)), "a meta-step makes the meta-parameters infinite or NaN")
    _demand(not _same(new, trained), "a meta-step of the default optimizer changes nothing")


def _check_evaluation(
    learner: MetaLearner, meta: Meta, tasks: TaskDistribution, key: PRNGKeyArray
) -> None:
    before = jax.tree.map(lambda leaf: _data(leaf).copy(), _arrays(meta))
    evaluate(learner, meta, tasks, episodes=2, key=key)
    _demand(
        _same(before, jax.tree.map(_data, _arrays(meta))), "evaluation changes the meta-parameters"
    )


def _check_round_trip(learner: MetaLearner, model: Model, meta: Meta) -> None:
    blank = learner.init(model, key=jax.random.key(99))
    like = jax.tree.map(lambda leaf: jnp.zeros_like(leaf) if eqx.is_array(leaf) else leaf, blank,
                        is_leaf=_is_key)  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "meta.safetensors"
        io.save(file, meta)
        _demand(_same(meta, io.load(file, like)), "saving and loading changes the meta-parameters")


def _check_agreement(learner: MetaLearner, meta: Meta, batch: Task, key: PRNGKeyArray) -> None:
    """Different ways to one gradient, in float64."""
    trained, fixed = eqx.partition(meta, eqx.is_inexact_array)

    @eqx.filter_jit
    def gradient(batch: Task, key: PRNGKeyArray, mapping: Any = "vmap") -> PyTree:
        return meta_value_and_grad(learner, meta, batch, key=key, mapping=mapping)[1]

    @jax.jit
    def single(task: Task, key: PRNGKeyArray) -> PyTree:
        loss = lambda t: learner.meta_loss(  # noqa: E731
            eqx.combine(t, fixed), task, key=key, progress=jnp.array(1.0)
        )[0]
        return jax.grad(loss)(trained)

    def row(i: int) -> Task:
        return jax.tree.map(lambda leaf: leaf[i], batch)

    whole = gradient(batch, key)
    for mapping in ("scan", 2):
        _demand(_close(gradient(batch, key, mapping), whole),
                f"the gradient by mapping={mapping!r} is not that by vmap")  # fmt: skip
    keys = jax.random.split(key, TASKS)
    alone = [single(row(i), keys[i]) for i in range(TASKS)]
    mean = jax.tree.map(lambda *leaves: sum(leaves) / TASKS, *alone)
    _demand(_close(mean, whole), "the gradient of a meta-batch is not the mean over its tasks")

    if not _same(single(row(0), keys[1]), alone[0]):
        return  # the key matters: what follows would compare different draws
    turned = jax.tree.map(lambda leaf: leaf[::-1], batch)
    _demand(_close(gradient(turned, key), whole), "the order of the tasks changes the gradient")
    same = jax.tree.map(lambda leaf: jnp.stack([leaf] * TASKS), row(0))
    _demand(_close(gradient(same, key), alone[0]),
            "a meta-batch of equal tasks has another gradient than one of them")  # fmt: skip
    if isinstance(batch.support, Batch) and isinstance(batch.query, Batch):
        mixed = jax.tree.map(lambda leaf: jnp.roll(leaf[::-1], 1, axis=0), row(0))
        _demand(_close(single(mixed, keys[0]), alone[0]),
                "the order of the examples within a batch changes the gradient")  # fmt: skip


def _adapted(
    learner: MetaLearner, meta: Meta, task: Task, key: PRNGKeyArray
) -> tuple[PyTree, PyTree, Batch]:
    """Parameters and rest of an adapted model, and a batch for the loss."""
    model = eqx.filter_jit(learner.adapt)(meta, task.support, key=key)
    if isinstance(model, Ensemble):
        model = jax.tree.map(lambda leaf: leaf[0] if eqx.is_array(leaf) else leaf, model.models)
    params, rest = eqx.partition(model, eqx.is_inexact_array)
    return params, rest, task.support.draw(model, key)


def _compare(
    what: str,
    function: Callable[[PyTree], Float[Array, ""]],
    point: PyTree,
    value: Float[Array, ""],
    gradient: PyTree,
    key: PRNGKeyArray,
    rtol: float,
) -> None:
    """Compare a gradient with finite differences of `function` at `point`."""
    flat, unravel = ravel_pytree(point)
    slope = ravel_pytree(gradient)[0]
    size = float(jnp.linalg.norm(slope))
    _demand(np.isfinite(size), f"the {what} is not finite")
    h = 1e-3
    offsets = h * jnp.array([-2.0, -1.0, 1.0, 2.0])
    weights = jnp.array([1.0, -8.0, 8.0, -1.0]) / (12 * h)

    @jax.jit
    def differences(flat: Array, directions: Array) -> tuple[Array, Array]:
        along = lambda d: weights @ jax.lax.map(lambda t: function(unravel(flat + t * d)), offsets)  # noqa: E731
        return function(unravel(flat)), jax.lax.map(along, directions)

    names, directions = zip(*_directions(point, slope, key))
    at_point, measured = differences(flat, jnp.stack(directions))
    _demand(
        bool(jnp.abs(at_point - value) <= rtol * (1e-3 + jnp.abs(value))),
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
            f"relative error {error:.1e}, above {rtol:.0e}",
        )


def _directions(point: PyTree, slope: Array, key: PRNGKeyArray) -> Iterator[tuple[str, Array]]:
    """Names and unit vectors."""
    size = jnp.linalg.norm(slope)
    unit = lambda v: v / jnp.linalg.norm(v)  # noqa: E731
    if size > 0:
        yield "itself", slope / size
    for i in range(3):
        direction = jax.random.normal(jax.random.fold_in(key, i), slope.shape, slope.dtype)
        yield "a random direction", unit(direction)
    start = 0
    for name, leaf in zip(jax.tree.leaves(tree.paths(point)), jax.tree.leaves(point)):
        inside = (jnp.arange(len(slope)) >= start) & (jnp.arange(len(slope)) < start + leaf.size)
        random = jax.random.normal(jax.random.fold_in(key, 3 + start), slope.shape, slope.dtype)
        yield f"a random direction of {name or 'the parameters'}", unit(random * inside)
        largest = jnp.argmax(jnp.where(inside, jnp.abs(slope), -1.0))
        yield (
            f"one coordinate of {name or 'the parameters'}",
            jnp.eye(1, len(slope), int(largest))[0],
        )
        start += leaf.size


def _double(value: PyTree) -> PyTree:
    """Every floating-point array in float64."""
    return jax.tree.map(
        lambda leaf: jnp.asarray(leaf, jnp.float64) if eqx.is_inexact_array(leaf) else leaf, value
    )


def _traceable(what: str, function: Callable[[Meta], Any]) -> Callable[[Meta], Any]:
    """The function under `jit`, failing with a sentence."""
    compiled = eqx.filter_jit(function)

    def call(meta: Meta) -> Any:
        try:
            return compiled(meta)
        except Exception as error:
            first = (str(error).splitlines() or [""])[0]
            raise AssertionError(
                f"{what} cannot be traced and run under jit: {type(error).__name__}: {first}"
            ) from error

    return call


def _arrays(value: PyTree) -> PyTree:
    return eqx.filter(value, eqx.is_array)


def _is_key(leaf: Any) -> bool:
    return eqx.is_array(leaf) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _data(leaf: Any) -> np.ndarray:
    return np.asarray(jax.random.key_data(leaf) if _is_key(leaf) else leaf)


def _same(a: PyTree, b: PyTree) -> bool:
    """Equal structures and bits."""
    a, b = eqx.filter(a, eqx.is_array_like), eqx.filter(b, eqx.is_array_like)
    if jax.tree.structure(a) != jax.tree.structure(b):
        return False
    pairs = zip(map(_data, jax.tree.leaves(a)), map(_data, jax.tree.leaves(b)))
    return all(x.dtype == y.dtype and x.shape == y.shape and x.tobytes() == y.tobytes()
               for x, y in pairs)  # fmt: skip


def _close(a: PyTree, b: PyTree) -> bool:
    difference = jax.tree.map(lambda x, y: x - y, a, b)
    return bool(optax.global_norm(difference) <= AGREE * (optax.global_norm(b) + 1e-12))


def _demand(condition: bool, sentence: str) -> None:
    if not condition:
        raise AssertionError(sentence)

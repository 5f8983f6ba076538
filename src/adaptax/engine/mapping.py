"""The one place where a learner, written for one task, is mapped over a meta-batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from .. import processes, roles, tree
from ..conv import FastPath, fast
from ..learner import Adapter, Meta, MetaLearner
from ..task import Task
from .work import Work, work

L = TypeVar("L", bound=Adapter)

Mapping = Literal["auto", "scan", "vmap"] | int
"""How to map over tasks: one after another, all at once, or in chunks of n.

`"scan"` needs the memory of one task whatever the size of the meta-batch, and keeps a task's
activations in a CPU's cache; `"vmap"` fills an accelerator. `"auto"` is `"vmap"` on accelerators
and for tasks whose intermediate results are small, else `"scan"`.
"""


def meta_value_and_grad(
    learner: MetaLearner,
    meta: Meta,
    tasks: Task,
    *,
    key: PRNGKeyArray,
    progress: float | Float[Array, ""] = 1.0,
    mapping: Mapping = "auto",
    mesh: Mesh | None = None,
    fast_path: FastPath = "auto",
) -> tuple[tuple[Float[Array, ""], dict[str, Array]], Meta]:
    """`((value, metrics), grads)` of the meta-loss, averaged over a meta-batch of tasks.

    The papers of MAML and BMAML write sums over tasks; their codes and we take means.

    Args:
        learner: any `MetaLearner`.
        meta: its meta-parameters; gradients have their structure, `None` where not trained.
        tasks: a `Task` whose arrays lead with the task axis.
        key: split into one key for each task, whatever the mapping.
        progress: how far meta-training is, in `[0, 1]`.
        mapping: how to map over tasks; see `Mapping`. All give equal results, up to the order of
            summation.
        mesh: shard the task axis over these devices; it must divide the meta-batch.
        fast_path: rewrite the model's convolutions; see `adaptax.conv.fast`.

    Raises:
        ValueError: if the tasks do not agree on the size of the meta-batch, or the mapping is not
            known, or the devices do not divide the meta-batch.
    """
    arrays, rest = eqx.partition(tasks, eqx.is_array)
    once = roles.deduplicate(meta)
    result, grads = meta_gradient(
        with_fast_path(learner, fast_path), once, arrays, lambda task: eqx.combine(task, rest),
        key=key, count=task_count(tasks), progress=progress, mapping=mapping, mesh=mesh,
    )  # fmt: skip
    return result, grads if once is meta else roles.reshare(grads)


def meta_gradient(
    learner: MetaLearner,
    meta: Meta,
    loaded: PyTree,
    task: Callable[[PyTree], Task],
    *,
    key: PRNGKeyArray,
    count: int,
    progress: float | Array,
    mapping: Mapping,
    mesh: Mesh | None,
) -> tuple[tuple[Float[Array, ""], dict[str, Array]], Meta]:
    """`meta_value_and_grad` of tasks that are made where they are used, one by one.

    Args:
        learner: any.
        meta: its meta-parameters.
        loaded: what tasks are made of, leading with the task axis: keys, say.
        task: makes one task; a pytree, so that the arrays it needs reach every device.
        key: as in `meta_value_and_grad`, as are the rest.
        count: tasks in the meta-batch.
        progress: in `[0, 1]`.
        mapping: over tasks.
        mesh: of devices.
    """
    trained, fixed = eqx.partition(meta, learner.trained(meta))
    size = count // (mesh.size if mesh else 1)

    def on_device(across: Across, common: PyTree, mine: PyTree) -> Any:
        trained, fixed, make, progress = common
        total = sum_over(
            lambda *each: task_gradient(learner, trained, fixed, make, progress, *each),
            mine,
            mapping,
        )
        return across(jax.tree.map(lambda leaf: leaf / size, total))

    common = (trained, fixed, task, jnp.asarray(progress, float))
    out, grads = over_devices(on_device, mesh, common, (loaded, jax.random.split(key, count)))
    return out, tree.in_types_of(trained, grads)


def task_gradient(
    learner: MetaLearner,
    trained: PyTree,
    fixed: PyTree,
    make: Callable[[PyTree], Task],
    progress: float | Array,
    loaded: PyTree,
    key: PRNGKeyArray,
) -> tuple[tuple[Float[Array, ""], dict[str, Array]], PyTree]:
    """`((value, metrics), grads)` of one task.

    Args:
        learner: any.
        trained: the meta-parameters to differentiate with respect to.
        fixed: the others.
        make: makes the task.
        progress: in `[0, 1]`.
        loaded: what the task is made of.
        key: of the meta-loss.
    """

    def scalar(trained: PyTree) -> tuple[Array, dict[str, Array]]:
        meta = roles.fresh(eqx.combine(trained, fixed), key)
        return learner.meta_loss(meta, make(loaded), key=key, progress=progress)

    found = jax.value_and_grad(scalar, has_aux=True)(trained)
    if type(learner).fallback is MetaLearner.fallback:
        return found

    def instead(trained: PyTree) -> Array | None:
        return learner.fallback(eqx.combine(trained, fixed), make(loaded), key=key)

    return found if instead(trained) is None else _rescued(found, instead, trained)


def _rescued(found: Any, instead: Callable[[PyTree], Any], trained: PyTree) -> Any:
    """`((value, metrics), grads)`; those of `instead` where they are not finite and it is."""
    ((value, metrics), grads), (other, slope) = found, jax.value_and_grad(instead)(trained)
    lost = ~(jnp.isfinite(value) & tree.finite(grads))
    pick = lambda old, new: jnp.where(lost, new, old)  # noqa: E731
    rescued = (lost & jnp.isfinite(other)).astype(value.dtype)
    return (pick(value, other), {**metrics, "rescued": rescued}), jax.tree.map(pick, grads, slope)


Across = Callable[[PyTree], PyTree]
"""Averages over devices; what comes of it is the same on all."""


def over_devices(
    function: Callable[[Across, PyTree, PyTree], PyTree],
    mesh: Mesh | None,
    common: PyTree,
    tasks: PyTree,
) -> PyTree:
    """`function(across, common, tasks)`, the tasks shared among the devices of a mesh.

    Args:
        function: pure, and called on every device with its share of the tasks. Its results are
            arrays and have to be the same on all devices: means of `across`, and what follows
            from them.
        mesh: of devices; all is done on one if `None`.
        common: what every device has whole.
        tasks: arrays lead with the task axis, which the devices have to divide.

    Raises:
        ValueError: if they do not.
    """
    if mesh is None or mesh.size == 1:
        return function(lambda own: own, common, tasks)
    if (count := task_count(tasks)) % mesh.size:
        raise ValueError(f"{mesh.size} devices do not divide a meta-batch of {count} tasks")
    axes = mesh.axis_names
    arrays, rest = eqx.partition((common, tasks), eqx.is_array)

    def on_device(*mine: PyTree) -> PyTree:
        return function(lambda own: jax.lax.pmean(own, axes), *eqx.combine(mine, rest))

    return jax.shard_map(
        on_device, mesh=mesh, in_specs=(P(), P(axes)), out_specs=P(), check_vma=False
    )(*arrays)


def sum_over(function: Callable[..., PyTree], xs: tuple[PyTree, ...], mapping: Mapping) -> PyTree:
    """`Σ_i function(*xs[i])` over the leading axis of every array in `xs`.

    Args:
        function: pure; its results are summed leaf by leaf, those in half precision in float32.
        xs: arguments with a leading axis.
        mapping: how; see `Mapping`. Memory does not grow with the axis unless it is `"vmap"`.
    """
    count = len(jax.tree.leaves(xs)[0])
    size = chunk_size(mapping, count, function, xs)
    if size >= count:
        return jax.tree.map(_sum, jax.vmap(function)(*xs))
    whole = count - count % size

    def chunk(carry: PyTree, xs: tuple[PyTree, ...]) -> tuple[PyTree, None]:
        if size == 1:
            out = function(*jax.tree.map(lambda leaf: leaf[0], xs))
        else:
            out = jax.tree.map(_sum, jax.vmap(function)(*xs))
        return jax.tree.map(jnp.add, carry, out), None

    shapes = jax.eval_shape(function, *jax.tree.map(lambda leaf: leaf[0], xs))
    zeros = jax.tree.map(lambda s: tree.wide(jnp.zeros(s.shape, s.dtype)), shapes)
    chunks = jax.tree.map(
        lambda leaf: leaf[:whole].reshape(whole // size, size, *leaf.shape[1:]), xs
    )
    out, _ = jax.lax.scan(chunk, zeros, chunks)
    if whole < count:
        left = sum_over(function, jax.tree.map(lambda leaf: leaf[whole:], xs), "vmap")
        out = jax.tree.map(jnp.add, out, left)
    return out


def map_over(function: Callable[[PyTree], PyTree], xs: PyTree, size: int) -> PyTree:
    """`function(xs[i])` for every i along the leading axis of `xs`, stacked.

    Args:
        function: pure.
        xs: with a leading axis.
        size: how many at once.
    """
    if size >= len(jax.tree.leaves(xs)[0]):
        return jax.vmap(function)(xs)
    return jax.lax.map(function, xs, batch_size=None if size == 1 else size)


def map_shared(
    function: Callable[[PyTree, PyTree], PyTree],
    common: PyTree,
    xs: PyTree,
    size: int,
    mesh: Mesh | None,
) -> PyTree:
    """`function(common, xs[i])` for every i, stacked, shared among the devices of a mesh.

    Args:
        function: pure.
        common: what every device has whole.
        xs: with a leading axis.
        size: how many at once, on each device.
        mesh: of devices, a divisor of their number; all is done on one if `None`.
    """
    if mesh is None:
        return map_over(lambda x: function(common, x), xs, size)
    arrays, rest = eqx.partition(common, eqx.is_array)
    axes = P(mesh.axis_names)

    def on_device(arrays: PyTree, mine: PyTree) -> PyTree:
        whole = eqx.combine(arrays, rest)
        return map_over(lambda x: function(whole, x), mine, size)

    return jax.shard_map(
        on_device, mesh=mesh, in_specs=(P(), axes), out_specs=axes, check_vma=False
    )(arrays, xs)


def chunk_size(mapping: Mapping, count: int, function: Callable[..., Any], xs: Any) -> int:
    """How many tasks to map at once."""
    if mapping == "auto":
        mapping = suited(work(function, *first(xs)))
    if mapping == "scan":
        return 1
    if mapping == "vmap":
        return count
    if isinstance(mapping, int) and mapping >= 1:
        return min(mapping, count)
    raise ValueError(f'mapping is "auto", "scan", "vmap" or a positive integer, not {mapping!r}')


def suited(task: Work) -> Mapping:
    """Return how to map over such tasks."""
    return "vmap" if jax.default_backend() != "cpu" or task.small else "scan"


def first(xs: Any) -> Any:
    """Return the shapes of the first of what arrays lead with."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), xs)


def local_mesh(count: int, size: int | None = None) -> Mesh | None:
    """A mesh of local devices to share `count` tasks, or `None` for one device.

    Args:
        count: tasks in a meta-batch.
        size: number of devices; by default as many as divide `count`.

    Raises:
        ValueError: if there are not so many, or they do not divide `count`.
    """
    devices = jax.local_devices()
    size = size or max(d for d in range(1, len(devices) + 1) if count % d == 0)
    if size < 1 or size > len(devices) or count % size:
        raise ValueError(
            f"devices={size} should be at most the {len(devices)} local devices and divide the "
            f"batch of {count}; a run goes on with as many as it began with, and "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={size} makes a CPU so many"
        )
    if size == 1:
        return None
    return Mesh(np.array(devices[:size]), ("tasks",), axis_types=(AxisType.Auto,))


def task_mesh(count: int, size: int | None = None) -> Mesh | None:
    """`local_mesh`, or, of several processes, a mesh of the devices of all; see there."""
    return (processes.mesh_of_all if processes.several() else local_mesh)(count, size)


def with_fast_path(learner: L, fast_path: FastPath) -> L:
    """The learner, its loss with fast convolutions, and pure; see `adaptax.roles.pure`."""
    return learner.with_loss(fast(roles.pure(learner.loss), fast_path))


def everywhere(given: PyTree, mesh: Mesh | None) -> PyTree:
    """The arrays of a tree on every device of a mesh; without one, where they are."""
    if mesh is None:
        return given
    if processes.several():
        return processes.replicated(given, mesh)
    arrays, rest = eqx.partition(given, lambda leaf: isinstance(leaf, jax.Array | np.ndarray))
    return eqx.combine(jax.device_put(arrays, NamedSharding(mesh, P())), rest)


def task_count(tasks: PyTree) -> int:
    """How many tasks the arrays of a meta-batch lead with.

    Raises:
        ValueError: if they do not agree.
    """
    counts = {leaf.shape[:1] for leaf in jax.tree.leaves(eqx.filter(tasks, eqx.is_array))}
    if len(counts) != 1 or counts == {()}:
        raise ValueError(
            "a meta-batch is a Task whose arrays all lead with the same task axis, and these lead "
            f"with {sorted(counts)}; sample it with jax.vmap(tasks.sample)(keys)"
        )
    return counts.pop()[0]


def _sum(leaf: Array) -> Array:
    return jnp.sum(tree.wide(leaf), axis=0)

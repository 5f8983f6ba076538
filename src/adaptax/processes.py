"""Several processes as one: how they find each other, what each has, and what they agree on.

Every process runs the same program. Tasks are shared over the devices of all; what is between the
compiled programs is done by each of them alike, on arrays of its own. The first one writes.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import equinox as eqx
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import PyTree

from .process import ProcessLost

HEARTBEAT, FAREWELL = 100, 900
"""Seconds after which a silent process counts as dead, and that processes wait for each other in
the end, when the first one draws and writes.

A process that was killed is missed at the next exchange, which ends the others with a sentence. The
heartbeat is for those that hang: JAX's runtime then aborts all, so it should not come first.
"""

Arguments = ParamSpec("Arguments")
Value = TypeVar("Value")


def ends_with_the_others(function: Callable[Arguments, Value]) -> Callable[Arguments, Value]:
    """Decorate what works together with other processes: that one is gone is said in a sentence."""

    @functools.wraps(function)
    def call(*args: Arguments.args, **how: Arguments.kwargs) -> Value:
        try:
            return function(*args, **how)
        except Exception as error:
            if not isinstance(error, ProcessLost) and several() and _is_of_a_lost_one(error):
                raise ProcessLost(
                    f"another of the {jax.process_count()} processes has ended, and so does "
                    f"process {jax.process_index()}"
                ) from None
            raise

    return call


def _is_of_a_lost_one(error: Exception) -> bool:
    """Whether JAX raised it since it does not hear from a process any more."""
    said = str(error)
    return any(word in said for word in ("Gloo", "NCCL", "oordination", "peer", "UNAVAILABLE"))


def distributed(
    coordinator: str | None = None, processes: int | None = None, process_id: int | None = None
) -> None:
    """Join the other processes of a job; before anything is computed.

    Without arguments Slurm, Open MPI, Kubernetes and TPU pods are found by JAX. From here on `fit`,
    `evaluate` and `pretrain` share their work with the other processes, which have to make the
    same calls.

    Args:
        coordinator: `"host:port"` of the first process, a port that is free there.
        processes: how many there are.
        process_id: which one this is, from 0.

    Raises:
        ValueError: if only some arguments are given, or none and no cluster is found.
        RuntimeError: if JAX has computed before, or the others cannot be reached.
    """
    check(coordinator, processes, process_id)
    how: dict[str, Any] = {}
    if coordinator is not None:  # not one device a process, as clusters have it
        how = {"coordinator_address": coordinator, "num_processes": processes,
               "process_id": process_id, "cluster_detection_method": "deactivate"}  # fmt: skip
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(
            **how, heartbeat_timeout_seconds=HEARTBEAT, shutdown_timeout_seconds=FAREWELL
        )
    except ValueError as error:
        raise ValueError(
            f"no cluster was found that says which process this is ({error}); give coordinator, "
            "processes and process_id"
        ) from None


def check(coordinator: str | None, processes: int | None, process_id: int | None) -> None:
    """Raise unless the arguments of `distributed` say which process this is, or say nothing.

    Raises:
        ValueError: naming what is missing or wrong.
    """
    given = (coordinator, processes, process_id)
    if any(value is not None for value in given):
        if any(value is None for value in given):
            raise ValueError(
                "a process is told the coordinator, how many there are and which it is "
                f"(coordinator={coordinator!r}, processes={processes}, process_id={process_id}); "
                "give all three, or none where a cluster says so"
            )
        assert processes is not None
        assert process_id is not None
        if ":" not in str(coordinator) or not str(coordinator).rpartition(":")[2].isdigit():
            raise ValueError(f"coordinator={coordinator!r}; expected host:port, such as node1:1234")
        if not 0 <= process_id < processes:
            raise ValueError(
                f"process_id={process_id}; expected a number from 0 to {processes - 1}, as there "
                f"are {processes} processes"
            )


def detected() -> bool:
    """Return whether a cluster has started this process beside others: Slurm, MPI, a TPU pod."""
    tasks = ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS") if "SLURM_PROCID" in os.environ else ()
    for name in (*tasks, "OMPI_COMM_WORLD_SIZE"):
        if name in os.environ:
            return os.environ[name].isdigit() and int(os.environ[name]) > 1
    return "," in os.environ.get("TPU_WORKER_HOSTNAMES", "")


def several() -> bool:
    """Return whether there are other processes."""
    return jax.process_count() > 1


def first() -> bool:
    """Return whether this process is the one that writes."""
    return jax.process_index() == 0


def own(count: int) -> slice:
    """Return which of `count` tasks are this process's: those that its devices have."""
    each = count // jax.process_count()
    return slice(jax.process_index() * each, (jax.process_index() + 1) * each)


def mesh_of_all(count: int, size: int | None = None) -> Mesh:
    """Return a mesh of `shared_devices`."""
    axes = (jax.sharding.AxisType.Auto,)
    return Mesh(np.array(shared_devices(count, size)), ("tasks",), axis_types=axes)


def shared_devices(count: int, size: int | None = None) -> list[Any]:
    """Return devices of all processes, the same number of each, in the order of `own`.

    Args:
        count: tasks to share.
        size: number of devices; by default as many as divide `count`.

    Raises:
        ValueError: if processes or devices do not divide `count`.
    """
    processes = jax.process_count()
    if count % processes:
        raise ValueError(
            f"{processes} processes cannot share {count} tasks evenly; let a meta-step, or a "
            f"batch, be of a multiple of {processes}"
        )
    devices: list[list[Any]] = [[] for _ in range(processes)]
    for device in jax.devices():
        devices[device.process_index].append(device)
    least = min(map(len, devices))
    each = count // processes
    per = max(d for d in range(1, least + 1) if each % d == 0)
    if size is not None:
        if size % processes or size // processes > least or each % (size // processes):
            raise ValueError(
                f"devices={size} cannot be shared evenly by {processes} processes of {least} "
                f"devices for {count} tasks; leave it out"
            )
        per = size // processes
    return [device for own in devices for device in sorted(own, key=lambda d: d.id)[:per]]


def replicated(given: PyTree, mesh: Mesh) -> PyTree:
    """Return the tree with its arrays, which all processes have alike, on every device."""
    everywhere = NamedSharding(mesh, P())
    mine = list(mesh.local_devices)

    def place(leaf: Any) -> Any:
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            return leaf
        each = [jax.device_put(leaf, device) for device in mine]
        return jax.make_array_from_single_device_arrays(each[0].shape, everywhere, each)

    return jax.tree.map(lambda leaf: place(leaf) if _is_array(leaf) else leaf, given)


def sharded(given: PyTree, mesh: Mesh, axis: int = 0) -> PyTree:
    """Return one tree of all processes' tasks, of which each gives its own; see `own`.

    Args:
        given: arrays that have the tasks of this process along an axis.
        mesh: of `mesh_of_all`.
        axis: of the tasks.
    """
    placed = NamedSharding(mesh, P(*[None] * axis, mesh.axis_names))

    def place(leaf: Any) -> Any:
        shape = list(leaf.shape)
        shape[axis] *= jax.process_count()
        return jax.make_array_from_process_local_data(placed, leaf, tuple(shape))

    return jax.tree.map(lambda leaf: place(leaf) if _is_array(leaf) else leaf, given)


def here(given: PyTree) -> PyTree:
    """Return the tree with arrays that are the same on all devices as arrays of this process."""

    def local(leaf: Any) -> Any:
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            return leaf.addressable_data(0)
        return leaf

    return jax.tree.map(local, given)


@ends_with_the_others
def gathered(given: PyTree) -> PyTree:
    """Return arrays that are shared over the devices whole, as NumPy's, in every process."""
    if not several():
        return jax.tree.map(np.asarray, given)
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(given, tiled=True)


@ends_with_the_others
def anyone(*flags: bool) -> list[bool]:
    """Return of each flag whether any process has raised it; every process has to ask."""
    if not several():
        return list(flags)
    from jax.experimental import multihost_utils

    each = multihost_utils.process_allgather(np.array([0, *flags], np.int32))
    return [bool(flag) for flag in each.reshape(jax.process_count(), -1).max(axis=0)[1:]]


@ends_with_the_others
def total(value: int) -> int:
    """Return the sum of a number over the processes; every one has to ask."""
    if not several():
        return value
    from jax.experimental import multihost_utils

    return int(np.sum(multihost_utils.process_allgather(np.array(value, np.int32))))


def from_first(make: Callable[[], Value]) -> Value:
    """Return the JSON value that the first process makes, in all of them.

    Args:
        make: called in the first process alone.

    Raises:
        Exception: in all processes, if it raises in the first.
    """
    if not several():
        return make()
    made: Any = None
    failure: Exception | None = None
    if first():
        try:
            made = make()
        except Exception as error:
            failure = error
    wrong = None if failure is None else [type(failure).__name__, str(failure)]
    said = _from_first(json.dumps([wrong, made]).encode() if first() else b"")
    if failure is not None:
        raise failure
    wrong, found = json.loads(said)
    if wrong is not None:
        kind: Any = {"FileNotFoundError": FileNotFoundError, "BlockingIOError": BlockingIOError}
        raised = kind.get(wrong[0], ValueError)(wrong[1])
        raised.said_by_first = True
        raise raised
    return made if first() else found


def state_from_first(make: Callable[[], tuple[PyTree, Value]], like: PyTree) -> tuple[Any, Value]:
    """Return the arrays and the JSON value that the first process makes, in all of them.

    Args:
        make: called in the first process alone.
        like: a tree of arrays, as those are.
    """
    if not several():
        return make()
    arrays: list[PyTree] = []

    def value() -> Value:
        state, found = make()
        arrays.append(state)
        return found

    found = from_first(value)
    data = _from_first(b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(arrays)))
    if first():
        return arrays[0], found
    leaves, structure = jax.tree.flatten(like)
    filled, at = [], 0
    for leaf in map(np.asarray, leaves):
        new = np.frombuffer(data, leaf.dtype, leaf.size, at).reshape(leaf.shape)
        filled.append(jax.numpy.asarray(new))
        at += leaf.nbytes
    return jax.tree.unflatten(structure, filled), found


@ends_with_the_others
def _from_first(data: bytes) -> bytes:
    """The bytes that the first process has."""
    from jax.experimental import multihost_utils

    size = int(multihost_utils.broadcast_one_to_all(np.array(len(data), np.int32)))
    content = np.frombuffer(data, np.uint8) if first() else np.zeros(size, np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(content)).tobytes()


def agree(**values: Any) -> None:
    """Raise unless all processes have the same of each of these JSON values.

    Raises:
        ValueError: naming what another process has otherwise than the first.
    """
    if not several():
        return
    theirs = from_first(lambda: values)
    wrong = [name for name in values if json.loads(json.dumps(values[name])) != theirs.get(name)]
    if any(anyone(bool(wrong))):
        raise ValueError(
            f"process {jax.process_index()} was given {', '.join(wrong) or 'the same'}, and "
            "another one something else than the first; start all with the same command and data"
        )


def _is_array(leaf: Any) -> bool:
    return eqx.is_array(leaf) or isinstance(leaf, np.ndarray)

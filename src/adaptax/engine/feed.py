"""How episodes reach the device: sampled there, or planned there and fetched from the host."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
from jaxtyping import Array, Integer, PRNGKeyArray, PyTree

from .. import program
from ..task import HostTaskDistribution, Task, TaskDistribution, episode_key


def load(tasks: TaskDistribution, key: PRNGKeyArray, episodes: Integer[Array, " *shape"]) -> PyTree:
    """What a compiled program needs of these episodes: keys and indices, or fetched data.

    Args:
        tasks: the distribution.
        key: the stream that episodes are counted in.
        episodes: indices, of any shape; the result leads with it.
    """
    if not tasks.on_host:
        return program.call(_keys, tasks.split, key, episodes), episodes
    assert isinstance(tasks, HostTaskDistribution)
    return tasks.fetch(program.call(_plan, tasks, key, episodes))


def task(tasks: TaskDistribution, loaded: PyTree) -> Task:
    """One task from one episode's share of `load`; traceable."""
    return loaded if tasks.on_host else tasks.episode(*loaded)


def prefetch(tasks: TaskDistribution, jobs: Iterable[Callable[[], Any]]) -> Iterator[Any]:
    """The results of jobs in order; for data on the host each runs one ahead, in a thread."""
    if not tasks.on_host:
        for job in jobs:
            yield job()
        return
    ready: queue.Queue[Any] = queue.Queue(maxsize=1)
    stop = threading.Event()

    def offer(item: Any) -> bool:
        while not stop.is_set():
            try:
                ready.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        try:
            for job in jobs:
                if not offer((True, job())):
                    return
            offer((True, stop))
        except BaseException as error:  # handed to the consumer, who raises it
            offer((False, error))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while True:
            good, item = ready.get()
            if not good:
                raise item
            if item is stop:
                return
            yield item
    finally:
        stop.set()
        thread.join()


def _plan(
    tasks: HostTaskDistribution, key: PRNGKeyArray, episodes: Integer[Array, " *shape"]
) -> PyTree:
    plan: Any = tasks.plan_episode
    for _ in episodes.shape:
        plan = jax.vmap(plan)
    return plan(_keys(tasks.split, key, episodes), episodes)


def _keys(split: str, key: PRNGKeyArray, episodes: Integer[Array, " *shape"]) -> Array:
    one: Any = lambda i: episode_key(split, key, i)  # noqa: E731
    for _ in episodes.shape:
        one = jax.vmap(one)
    return one(episodes)

"""Environments of the gymnasium interface, stepped on the host from inside a compiled roll-out."""

from __future__ import annotations

import dataclasses
import itertools
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

from .environment import EnvTask

ABANDONED = 16
"""Roll-outs that are left alone in the middle before the first of them is forgotten."""


class Episode(eqx.Module):
    """What the compiled program knows of an episode on the host.

    Args:
        task: which task.
        seed: with which `env.reset(seed=...)` was called.
        time: steps taken.
        handle: the host's number for it.
        observation: the last.
    """

    task: EnvTask
    seed: Int[Array, ""]
    time: Int[Array, ""]
    handle: Int[Array, ""]
    observation: Float[Array, " observation_size"]


class Gymnasium(eqx.Module):
    """A family of `gymnasium.Env`s as an `Environment`: learners and roll-outs as ever.

    The policy stays in the compiled program; at every time step one call to the host steps the
    environments of all trajectories of all tasks that are mapped over. An episode is a function
    of its key: the key makes the seed of `env.reset`, which is to make the environment forget
    what came before. Environments are kept for the next roll-outs of their task.

    A continuous action is clipped to the bounds of its space; an observation is flattened.
    `terminated` and `truncated` both end an episode.

    Args:
        make: `make(task) -> gymnasium.Env`; the task's arrays are NumPy's.
        sample_task: `sample_task(key)`, traceable: what differs between tasks.
        keep: how many environments at rest to keep; the oldest are closed.
        horizon: of the roll-out, which sets it: after so many steps an environment is at rest.
        host: what holds the environments; made from `make`.

    Raises:
        ModuleNotFoundError: without gymnasium.
        TypeError: if `make` makes something else, or its spaces are not ones that a policy of
            vectors can deal with.
    """

    make: Callable[[Any], Any] = eqx.field(static=True)
    sample_task: Callable[[PRNGKeyArray], EnvTask] = eqx.field(static=True)
    keep: int = eqx.field(static=True, default=1024)
    horizon: int | None = eqx.field(static=True, default=None)
    host: Host | None = eqx.field(static=True, default=None)

    def __post_init__(self) -> None:
        if self.host is None:
            task = jax.tree.map(np.asarray, self.sample_task(jax.random.key(0)))
            self.host = Host(self.make, self.make(task), self.keep)

    @property
    def observation_size(self) -> int:
        """Length of the flattened observation."""
        return self._host.observation_size

    @property
    def action_size(self) -> int:
        """Length of the flattened action, or how many to choose from."""
        return self._host.action_size

    @property
    def discrete(self) -> bool:
        """Whether the action space is `Discrete`."""
        return self._host.discrete

    @property
    def _host(self) -> Host:
        assert self.host is not None
        return self.host

    def until(self, horizon: int) -> Gymnasium:
        """The same environments, of which no more than `horizon` steps will be asked."""
        return dataclasses.replace(self, horizon=horizon)

    def reset(self, key: PRNGKeyArray, task: EnvTask) -> Episode:
        """An episode begins: `env.reset(seed=...)`, the seed made from the key."""
        seed = (jax.random.bits(key, dtype=jnp.uint32) >> 1).astype(jnp.int32)
        handle, observation = self._call(self._host.reset, (_INT, self._sight), task, seed)
        return Episode(task, seed, jnp.zeros((), jnp.int32), handle, observation)

    def step(
        self, state: Episode, action: Array, key: PRNGKeyArray
    ) -> tuple[Episode, Float[Array, ""], Bool[Array, ""]]:
        """`env.step(action)`; the key is not used."""
        last = state.time + 1 >= (self.horizon or np.iinfo(np.int32).max)
        handle, observation, reward, done = self._call(
            self._host.step, (_INT, self._sight, _float(), jax.ShapeDtypeStruct((), bool)),
            state.task, state.seed, state.time, state.handle, last, action,
        )  # fmt: skip
        after = Episode(state.task, state.seed, state.time + 1, handle, observation)
        return after, reward, done

    def observe(self, state: Episode) -> Float[Array, " observation_size"]:
        """The last observation."""
        return state.observation

    @property
    def _sight(self) -> jax.ShapeDtypeStruct:
        return _float(self.observation_size)

    def _call(self, function: Callable[..., Any], result: PyTree, *arguments: Any) -> Any:
        def host(*arguments: Any) -> Any:
            out = function(*arguments)
            return jax.tree.map(lambda x, like: np.asarray(x, like.dtype), out, result)

        # Every axis that is mapped over arrives as one more leading axis.
        return jax.pure_callback(host, result, *arguments, vmap_method="broadcast_all")


class Host:
    """The environments, outside of the compiled program.

    To the program its methods are pure: the results of `reset` and of a first step depend on task
    and seed alone, so a compiler may drop, merge or repeat them. Later steps follow each other by
    the handle that the one before gave.

    Args:
        make: makes one environment.
        first: one of them, for the spaces.
        keep: how many environments at rest to keep.
    """

    def __init__(self, make: Callable[[Any], Any], first: Any, keep: int):
        spaces = _gymnasium()
        if not isinstance(first, spaces.Env):
            raise TypeError(f"make(task) makes a gymnasium.Env, and made {type(first).__name__}")
        sight, acts = first.observation_space, first.action_space
        if not isinstance(sight, spaces.spaces.Box):
            raise TypeError(
                f"observations are vectors, of a Box, and those of {_name(first)} are of {sight}; "
                "wrap it in gymnasium.wrappers.FlattenObservation"
            )
        if not isinstance(acts, spaces.spaces.Box | spaces.spaces.Discrete):
            raise TypeError(
                f"actions are of a Box or Discrete space, and those of {_name(first)} of {acts}; "
                "wrap it in gymnasium.wrappers.TransformAction"
            )
        self.observation_size = int(np.prod(sight.shape))
        self.discrete = isinstance(acts, spaces.spaces.Discrete)
        self.action_size = int(acts.n if self.discrete else np.prod(acts.shape))
        self._make, self._keep, self._space = make, keep, acts
        self._lock = threading.Lock()
        self._numbers = itertools.count()
        self._running: dict[int, _Running] = {}
        self._begun: deque[list[int]] = deque()
        self._resting: dict[bytes, list[Any]] = {}
        first.close()

    def reset(self, task: PyTree, seed: Array) -> tuple[np.ndarray, np.ndarray]:
        """Handles and first observations, with the leading axes of `seed`."""
        with self._lock:
            each, lead = _rows((task, seed))
            begun = [self._begin(*row) for row in each]
            self._note(begun)
            seen = [self._running[handle].seen for handle in begun]
            return _stack(begun, lead), _stack(seen, lead)

    def step(
        self, task: PyTree, seed: Array, time: Array, handle: Array, last: Array, action: Array
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Handles, observations, rewards and ends, with the leading axes of `seed`."""
        with self._lock:
            each, lead = _rows((task, seed, time, handle, last, action))
            again: list[int] = []
            out = [self._step(again, *row) for row in each]
            if again:
                self._note(again)
            handles, seen, rewards, done = (_stack(column, lead) for column in zip(*out))
            return handles, seen, rewards, done

    def _step(
        self,
        again: list[int],
        task: PyTree,
        seed: Any,
        time: Any,
        handle: Any,
        last: Any,
        action: Any,
    ) -> tuple[int, np.ndarray, float, bool]:
        handle, running = int(handle), self._running.get(int(handle))
        if (running is None or running.time != time) and time == 0:
            handle = self._begin(task, seed)
            again.append(handle)
            running = self._running[handle]
        if running is None or running.time != time:
            raise RuntimeError(
                f"an episode was stepped at time {time} that is not there: it was stepped before "
                f"or is older than {ABANDONED} roll-outs; begin again with reset()"
            )
        reward = 0.0
        if running.env is not None:
            seen, reward, terminated, truncated, _ = running.env.step(self._action(action))
            running.seen = self._seen(running.env, seen)
            if terminated or truncated:
                self._rest(task, running)
        running.time += 1
        done = running.env is None
        if last:
            self._rest(task, running)
            del self._running[handle]
        return handle, running.seen, float(reward), done

    def _begin(self, task: PyTree, seed: Any) -> int:
        name = _bytes(task)
        resting = self._resting.pop(name, [])
        env = resting.pop() if resting else self._make(task)
        if resting:
            self._resting[name] = resting
        seen, _ = env.reset(seed=int(seed))
        handle = next(self._numbers) % 2**31
        self._running[handle] = _Running(env, self._seen(env, seen))
        return handle

    def _note(self, begun: list[int]) -> None:
        """Forget the oldest of the roll-outs that nobody ends."""
        self._begun = deque(b for b in self._begun if any(h in self._running for h in b))
        self._begun.append(begun)
        while len(self._begun) > ABANDONED:
            for handle in self._begun.popleft():
                running = self._running.pop(handle, None)
                if running is not None and running.env is not None:
                    running.env.close()

    def _rest(self, task: PyTree, running: _Running) -> None:
        """An environment is done with; another roll-out of its task may have it."""
        if running.env is None:
            return
        name = _bytes(task)
        # To the end of the order, in which environments are closed.
        self._resting[name] = [*self._resting.pop(name, []), running.env]
        running.env = None
        while sum(map(len, self._resting.values())) > self._keep:
            oldest = next(iter(self._resting))
            self._resting[oldest].pop(0).close()
            if not self._resting[oldest]:
                del self._resting[oldest]

    def _action(self, action: Any) -> Any:
        space = self._space
        if self.discrete:
            return int(action) + int(space.start)
        clipped = np.clip(action.reshape(space.shape), space.low, space.high)
        return clipped.astype(space.dtype)

    def _seen(self, env: Any, observation: Any) -> np.ndarray:
        flat = np.asarray(observation, float).ravel()
        if len(flat) != self.observation_size:
            raise ValueError(
                f"{_name(env)} gave an observation of size {len(flat)}, and the first "
                f"environment's space says {self.observation_size}; all tasks share one space"
            )
        return flat


@dataclasses.dataclass
class _Running:
    """An environment in the middle of an episode; without one after its end."""

    env: Any
    seen: np.ndarray
    time: int = 0


_INT = jax.ShapeDtypeStruct((), jnp.int32)


def _float(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.zeros(()).dtype)


def _rows(arguments: tuple[PyTree, ...]) -> tuple[list[PyTree], tuple[int, ...]]:
    """One tuple of arguments for each episode, and the leading axes; the second is a scalar's."""
    arguments = jax.tree.map(np.asarray, arguments)
    lead = arguments[1].shape
    flat = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[len(lead) :]), arguments)
    leaves, structure = jax.tree.flatten(flat)
    return [jax.tree.unflatten(structure, row) for row in zip(*leaves)], lead


def _stack(rows: Any, lead: tuple[int, ...]) -> np.ndarray:
    out = np.asarray(rows)
    return out.reshape((*lead, *out.shape[1:]))


def _bytes(task: PyTree) -> bytes:
    return b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(task))


def _name(env: Any) -> str:
    return type(env.unwrapped).__name__


def _gymnasium() -> Any:
    try:
        import gymnasium
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "rl.Gymnasium needs gymnasium, which is not installed; pip install 'adaptax[rl]'"
        ) from error
    return gymnasium

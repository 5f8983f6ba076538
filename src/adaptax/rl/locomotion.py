"""Locomotion with brax: half-cheetah and ant, at a velocity or in a direction, as in MAML."""

from __future__ import annotations

import contextlib
import functools
import io
import warnings
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PRNGKeyArray

Backend = Literal["spring", "positional", "generalized", "mjx"]
"""How brax solves the dynamics; see docs/rl-environments.md."""

Goal = Literal["velocity", "direction"]
"""What a robot is paid for."""


class Body(eqx.Module):
    """Where a robot is, and what it is to do.

    Args:
        state: brax's.
        goal: a velocity, or a direction, 1 or −1.
    """

    state: Any
    goal: Float[Array, ""]


class Robot(NamedTuple):
    """What a robot is paid, but for its speed.

    Args:
        name: brax's.
        max_velocity: goals are uniform from 0 to it.
        effort: c, of `−c ‖a‖²`.
        alive: for every time step: where the goal is a velocity, and where it is a direction.
    """

    name: str
    max_velocity: float
    effort: float
    alive: dict[str, float]


ROBOTS = {
    "half-cheetah": Robot("halfcheetah", 2.0, 0.05, {"velocity": 0.0, "direction": 0.0}),
    "ant": Robot("ant", 3.0, 0.005, {"velocity": 1.05, "direction": 0.05}),
}
"""Rewards of MAML's code, but for the ant's cost of contacts, which brax does not compute."""


class Locomotion(eqx.Module):
    """The robots of MAML (Finn, Abbeel & Levine 2017), section 5.3, in brax.

    | robot | goal | reward | task |
    |---|---|---|---|
    | half-cheetah | velocity | `−|v − g| − 0.05 ‖a‖²` | `g ~ U[0, 2]` |
    | half-cheetah | direction | `g v − 0.05 ‖a‖²` | `g = ±1` |
    | ant | velocity | `−|v − g| + 1.05 − 0.005 ‖a‖²` | `g ~ U[0, 3]` |
    | ant | direction | `g v + 0.05 − 0.005 ‖a‖²` | `g = ±1` |

    v is the mean velocity of the torso along x in the time step; a the action, clipped to
    `[−1, 1]`, the full strength of the motors. The half-cheetah's observation has 17 numbers and
    its action 6; the ant's 27 and 8. The ant's episode is over when its torso is lower than 0.2
    or higher than 1. The physics are not those of the paper: see docs/rl-environments.md.

    Args:
        robot: `"half-cheetah"` or `"ant"`.
        goal: `"velocity"` or `"direction"`.
        backend: how brax solves the dynamics.

    Raises:
        ModuleNotFoundError: without brax.
        ValueError: for a robot, goal or backend that is not known.
    """

    discrete: ClassVar[bool] = False
    robot: Literal["half-cheetah", "ant"] = eqx.field(static=True, default="half-cheetah")
    goal: Goal = eqx.field(static=True, default="velocity")
    backend: Backend = eqx.field(static=True, default="spring")

    def __check_init__(self) -> None:
        for name, given, known in (
            ("robot", self.robot, tuple(ROBOTS)),
            ("goal", self.goal, get_args(Goal)),
            ("backend", self.backend, get_args(Backend)),
        ):
            if given not in known:
                raise ValueError(f"{name} is one of {', '.join(known)}, not {given!r}")
        self._simulator  # noqa: B018 - to fail here, where brax is missing

    @property
    def observation_size(self) -> int:
        """Positions, but for those along the ground, and velocities."""
        return self._simulator.observation_size

    @property
    def action_size(self) -> int:
        """The motors."""
        return self._simulator.action_size

    def sample_task(self, key: PRNGKeyArray) -> Float[Array, ""]:
        """A velocity, or a sign, each as likely."""
        if self.goal == "velocity":
            return jax.random.uniform(key, maxval=ROBOTS[self.robot].max_velocity)
        return jnp.where(jax.random.bernoulli(key), 1.0, -1.0)

    @property
    def all_tasks(self) -> Float[Array, " 2"] | None:
        """Both directions; velocities are without number."""
        return jnp.array([1.0, -1.0]) if self.goal == "direction" else None

    def reset(self, key: PRNGKeyArray, task: Float[Array, ""]) -> Body:
        """At rest but for noise, as brax has it."""
        return Body(self._simulator.reset(key), task)

    def step(
        self, state: Body, action: Float[Array, " action_size"], key: PRNGKeyArray
    ) -> tuple[Body, Float[Array, ""], Bool[Array, ""]]:
        """Let the motors act for a time step."""
        robot, action = ROBOTS[self.robot], jnp.clip(action, -1.0, 1.0)
        after = self._simulator.step(state.state, action)
        speed = after.metrics["x_velocity"]
        gain = -jnp.abs(speed - state.goal) if self.goal == "velocity" else state.goal * speed
        reward = gain + robot.alive[self.goal] - robot.effort * jnp.sum(action**2)
        return Body(after, state.goal), reward, after.done > 0

    def observe(self, state: Body) -> Float[Array, " observation_size"]:
        """What brax observes."""
        return state.state.obs

    @property
    def seconds(self) -> float:
        """Between two actions."""
        return self._simulator.seconds

    @property
    def radii(self) -> np.ndarray:
        """Of the capsules that the robot is made of."""
        return self._simulator.shape.radii

    def capsules(self, state: Body) -> Float[Array, "capsules 2 3"]:
        """Where the two ends of each are in space: x forward, z up."""
        shape, at = self._simulator.shape, state.state.pipeline_state.x
        ends = _rotated(jnp.asarray(shape.ends), at.rot[shape.links][:, None])
        return ends + at.pos[shape.links][:, None]

    @property
    def _simulator(self) -> Simulator:
        return _made(ROBOTS[self.robot].name, self.backend)


class Shape(NamedTuple):
    """The capsules of a robot; spheres are short ones.

    Args:
        links: which link of the robot each belongs to.
        ends: of its axis, `(capsules, 2, 3)`, as the link sees them.
        radii: `(capsules,)`.
    """

    links: np.ndarray
    ends: np.ndarray
    radii: np.ndarray


class Simulator(NamedTuple):
    """An environment of brax, traced once however many roll-outs a program has.

    Args:
        reset: from a key.
        step: from its state and an action.
        observation_size: of its observations.
        action_size: of an action.
        seconds: of a step.
        shape: of the robot.
    """

    reset: Any
    step: Any
    observation_size: int
    action_size: int
    seconds: float
    shape: Shape


@functools.cache
def _made(name: str, backend: str) -> Simulator:
    # What brax and the packages it imports deprecate, and what they miss, is no news to their user.
    silent = contextlib.redirect_stdout(io.StringIO())
    with warnings.catch_warnings(), silent, jax.ensure_compile_time_eval():
        warnings.simplefilter("ignore")
        try:
            from brax import envs  # isort: skip  (first: it is what a user lacks, and brings MuJoCo)

            import mujoco
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"rl.Locomotion needs {error.name}, which is not installed; "
                "pip install 'adaptax[rl]'"
            ) from error
        # MuJoCo, which reads the description, warns on the console and in a file.
        warn = mujoco.get_mju_user_warning()
        mujoco.set_mju_user_warning(lambda text: None)
        try:
            env = envs.get_environment(name, backend=backend)
        finally:
            mujoco.set_mju_user_warning(warn)
        reset, step = jax.jit(env.reset), jax.jit(env.step)
        seen = jax.eval_shape(reset, jax.random.key(0)).obs
        seconds, shape = float(env.dt), _shape(env.sys)
        return Simulator(reset, step, seen.shape[-1], env.action_size, seconds, shape)


SPHERE, CAPSULE = 2, 3
"""MuJoCo's numbers for them."""


def _shape(model: Any) -> Shape:
    """Of a robot in MuJoCo's description, where body 0 is the world."""
    kinds = np.asarray(model.geom_type)
    part = (np.asarray(model.geom_bodyid) > 0) & np.isin(kinds, (SPHERE, CAPSULE))
    size = np.asarray(model.geom_size)[part]
    half = np.where(kinds[part] == CAPSULE, size[:, 1], 0.0)
    axis = np.stack([np.zeros_like(half), np.zeros_like(half), half], axis=-1)
    along = _rotated(axis, np.asarray(model.geom_quat)[part])
    middle = np.asarray(model.geom_pos)[part]
    ends = np.stack([middle - along, middle + along], axis=1)
    return Shape(np.asarray(model.geom_bodyid)[part] - 1, np.asarray(ends), size[:, 0])


def _rotated(vector: Any, quaternion: Any) -> Any:
    """Vectors turned by unit quaternions `(w, x, y, z)`."""
    w, axis = quaternion[..., :1], quaternion[..., 1:]
    axis, vector = jnp.broadcast_arrays(axis, vector)
    turned = jnp.cross(axis, vector)
    return vector + 2 * (w * turned + jnp.cross(axis, turned))

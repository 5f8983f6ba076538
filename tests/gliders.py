"""A body whose motion is known, in the place of brax's robots."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from adaptax.rl.locomotion import Shape, Simulator

SPEED = 1.25
SECONDS = 0.1


class Pose(eqx.Module):
    pos: jax.Array
    rot: jax.Array


class Physics(eqx.Module):
    x: Pose


class Gliding(eqx.Module):
    """What brax's environments answer."""

    obs: jax.Array
    done: jax.Array
    metrics: dict
    action: jax.Array
    pipeline_state: Physics


def _at(x, obs, done, action):
    # The second link is turned by a right angle about the axis that points away, its x then down.
    turned = jnp.array([[1.0, 0, 0, 0], [0.5**0.5, 0, 0.5**0.5, 0]])
    place = Physics(Pose(jnp.array([[0.0, 0, 1], [0.5, 0, 1]]) + x * jnp.eye(3)[0], turned))
    return Gliding(obs, done, {"x_velocity": jnp.array(SPEED)}, action, place)


def reset(key):
    return _at(jnp.zeros(()), jnp.zeros(4), jnp.zeros(()), jnp.zeros(3))


def step(state, action):
    fallen = jnp.where(action[0] >= 1, 1.0, 0.0)
    x = state.pipeline_state.x.pos[0, 0] + SPEED * SECONDS
    return _at(x, state.obs + 1, fallen, action)


SHAPE = Shape(
    links=np.array([0, 1]),
    ends=np.array([[[-0.5, 0, 0], [0.5, 0, 0]], [[0.0, 0, 0], [0.4, 0, 0]]]),
    radii=np.array([0.1, 0.05]),
)
GLIDER = Simulator(reset, step, 4, 3, SECONDS, SHAPE)

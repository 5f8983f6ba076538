"""Roll-outs as a source of batches, so that every learner of the library does reinforcement."""

from __future__ import annotations

from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer, PRNGKeyArray, PyTree

from .. import inner, roles, tree
from ..learner import Adapter, Meta
from ..protocols import Listed, Particles, Timed
from ..task import Batch, Model, Task, TaskDistribution
from .advantages import discounted, gae, standardise
from .baseline import fitted_values
from .environment import Environment, EnvTask


class Steps(eqx.Module):
    """What happened in n trajectories of t steps; the targets of a batch of roll-outs.

    Args:
        actions: as they were sampled.
        rewards: 0 after the end of an episode.
        mask: 1 up to the step that ends the episode, that one included, and 0 after.
        log_probs: of the actions under the policy that took them.
        returns: discounted, from each step on.
        advantages: what the objectives weigh log-probabilities with, 0 where the mask is.
    """

    actions: Array
    rewards: Float[Array, "n t"]
    mask: Float[Array, "n t"]
    log_probs: Float[Array, "n t"]
    returns: Float[Array, "n t"]
    advantages: Float[Array, "n t"]

    @property
    def total(self) -> Float[Array, ""]:
        """Undiscounted return, averaged over trajectories."""
        return jnp.mean(jnp.sum(self.rewards, axis=-1))


class RollOut(eqx.Module):
    """The source that answers with roll-outs of the policy it is handed.

    `draw(policy, key)` gives a `Batch` of trajectories: `x` the observations `(n, t, o)`, `y` the
    `Steps`. It carries no derivative with respect to the policy: the objectives bring it back
    through the log-probabilities of the actions.

    Advantages are generalised advantage estimates over a baseline fitted to the same batch, then
    standardised over it, as in MAML's experiments.

    Args:
        env: the environment.
        task: which of its tasks; see `Environment.sample_task`.
        trajectories: n.
        horizon: t, the steps after which an episode is cut.
        discount: γ.
        gae_lambda: λ.
        baseline: `"linear"`, the ridge regression of `fitted_values`, or `"none"`.
        standardised: whether advantages are.
    """

    env: Environment
    task: EnvTask
    trajectories: int = eqx.field(static=True, default=20)
    horizon: int = eqx.field(static=True, default=100)
    discount: float = eqx.field(static=True, default=0.99)
    gae_lambda: float = eqx.field(static=True, default=1.0)
    baseline: Literal["linear", "none"] = eqx.field(static=True, default="linear")
    standardised: bool = eqx.field(static=True, default=True)

    def draw(self, model: Model, key: PRNGKeyArray) -> Batch:
        """Roll-outs of this policy; of each in an ensemble, leading with the axis of policies."""
        if isinstance(model, Particles):
            return model.map(self.draw, jax.random.split(key, model.particles))
        policy = inner.stop(model)
        env = self.env.until(self.horizon) if isinstance(self.env, Timed) else self.env
        reset_key, step_key = jax.random.split(key)
        keys = jax.random.split(reset_key, self.trajectories)
        state = jax.vmap(env.reset, in_axes=(0, None))(keys, self.task)
        _check(env, policy, state)

        def step(
            carry: tuple[Any, Array], keys: Array
        ) -> tuple[tuple[Any, Array], tuple[Any, ...]]:
            (state, alive), (act_key, env_key) = carry, keys
            seen = jax.vmap(env.observe)(state)
            law = roles.apply(policy, seen)
            action = law.sample(act_key)
            keys = jax.random.split(env_key, self.trajectories)
            state, reward, done = jax.vmap(env.step)(state, action, keys)
            # After the end nothing counts, not even a NaN.
            reward = jnp.where(alive, reward, 0.0)
            return (state, alive & ~done), (seen, action, reward, alive, law.log_prob(action))

        alive = jnp.ones(self.trajectories, bool)
        # All keys at once: within the loop they would take longer than a small policy.
        keys_of = lambda t: jax.random.split(jax.random.fold_in(step_key, t))  # noqa: E731
        keys = jax.vmap(keys_of)(jnp.arange(self.horizon))
        _, steps = jax.lax.scan(step, (state, alive), keys)
        seen, actions, rewards, alive, log_probs = inner.stop(
            jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 0, 1), steps)
        )
        mask = alive.astype(rewards.dtype)
        seen, actions, log_probs = (_where(alive, leaf) for leaf in (seen, actions, log_probs))
        returns = discounted(rewards, self.discount)
        if self.baseline == "linear":
            values = fitted_values(seen, returns, mask)
        else:
            values = jnp.zeros_like(returns)
        advantages = gae(rewards, values, self.discount, self.gae_lambda) * mask
        if self.standardised:
            advantages = standardise(advantages, mask)
        return Batch(seen, Steps(actions, rewards, mask, log_probs, returns, advantages))


class Tasks(TaskDistribution):
    """The tasks of an environment: support and query are roll-outs of whatever policy comes.

    Adaptation learns from roll-outs of the policy at each of its steps; the outer loop judges the
    adapted policy on roll-outs of its own.

    Args:
        env: the environment.
        trajectories: for each batch: 20 in MAML's 2-D navigation.
        horizon: the steps after which an episode is cut.
        discount: γ.
        gae_lambda: λ of the generalised advantages.
        baseline: `"linear"` or `"none"`; see `RollOut`.
        standardised: whether advantages are shifted and scaled to mean 0 and deviation 1.
        split: `"train"`, `"val"` or `"test"`: which stream of tasks.

    Raises:
        ValueError: if a number makes no sense.
    """

    env: Environment
    trajectories: int = eqx.field(static=True, default=20)
    horizon: int = eqx.field(static=True, default=100)
    discount: float = eqx.field(static=True, default=0.99)
    gae_lambda: float = eqx.field(static=True, default=1.0)
    baseline: Literal["linear", "none"] = eqx.field(static=True, default="linear")
    standardised: bool = eqx.field(static=True, default=True)
    split: str = eqx.field(static=True, default="train", kw_only=True)

    def __check_init__(self) -> None:
        if self.horizon < 1 or self.trajectories < 1:
            raise ValueError(
                "horizon and trajectories are at least 1, not "
                f"{self.horizon} and {self.trajectories}"
            )
        if not (0 <= self.discount <= 1 and 0 <= self.gae_lambda <= 1):
            raise ValueError(
                "discount and gae_lambda lie between 0 and 1, and are "
                f"{self.discount} and {self.gae_lambda}"
            )
        if self.baseline not in ("linear", "none"):
            raise ValueError(f'baseline is "linear" or "none", not {self.baseline!r}')

    def sample(self, key: PRNGKeyArray) -> Task:
        """The task that this key names."""
        return self._of(self.env.sample_task(key))

    def episode(self, key: PRNGKeyArray, i: int | Integer[Array, ""]) -> Task:
        """The task that this key names; of an environment's `all_tasks`, if it has them, number
        `i`, and so on from the first again.

        With two directions to run in, drawn by chance, most meta-batches would want one more
        often than the other, and a policy that is to be fit for both oscillates.
        """
        few = self.env.all_tasks if isinstance(self.env, Listed) else None
        if few is None:
            return self.sample(key)
        count = len(jax.tree.leaves(few)[0])
        return self._of(jax.tree.map(lambda leaf: leaf[i % count], few))

    def _of(self, task: EnvTask) -> Task:
        source = RollOut(
            self.env, task, self.trajectories, self.horizon,
            self.discount, self.gae_lambda, self.baseline, self.standardised,
        )  # fmt: skip
        return Task(source, source)

    def judged(self, learner: Adapter, meta: Meta, loaded: PyTree, steps: int) -> dict[str, Array]:
        """The return of one task's roll-outs after 0, 1, … gradient steps, and whether the policy
        is finite then; see `adaptax.protocols.Acting`."""
        key, i = loaded
        task_key, adapt_key, judge_key = jax.random.split(key, 3)
        task = self.episode(task_key, i)
        path = learner.iterates(roles.fresh(meta, key), task.support, key=adapt_key, steps=steps)
        arrays, rest = eqx.partition(path, eqx.is_array)

        def judge(arrays: PyTree) -> tuple[Array, Array]:
            policy = eqx.combine(arrays, rest)
            return task.query.draw(policy, judge_key).y.total, tree.finite(policy)

        total, sound = jax.lax.map(judge, arrays)
        return {"return": total, "sound": sound}

    def settled(self, found: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The returns, NaN where the policy was not finite.

        Raises:
            ValueError: if the environment paid what is not a number.
        """
        returns, sound = found["return"], found["sound"]
        wrong = sound & ~np.isfinite(returns)
        if wrong.any():
            raise ValueError(
                f"{type(self.env).__name__} paid rewards that are not finite in "
                f"{wrong.any(axis=1).sum()} of {len(wrong)} tasks, first after "
                f"{np.argmax(wrong.any(axis=0))} gradient steps; check its step()"
            )
        return {"return": np.where(sound, returns, np.nan)}

    def describe(self) -> dict[str, Any]:
        """Environment, split, trajectories and horizon."""
        return {
            "tasks": type(self.env).__name__,
            "split": self.split,
            "trajectories": self.trajectories,
            "horizon": self.horizon,
            "discount": self.discount,
        }


def _where(alive: Array, leaf: Array) -> Array:
    """What was seen and done before the end; zeros after."""
    return jnp.where(alive.reshape(*alive.shape, *(1,) * (leaf.ndim - 2)), leaf, 0)


def _check(env: Environment, policy: Model, states: Any) -> None:
    """That policy and environment speak of the same actions."""
    law = eqx.filter_eval_shape(lambda p, s: p(jax.vmap(env.observe)(s)), policy, states)
    if law.discrete != env.discrete or law.action_size != env.action_size:
        kinds = {True: "{} actions to choose from", False: "actions of size {}"}
        wants = kinds[bool(env.discrete)].format(env.action_size)
        gives = kinds[bool(law.discrete)].format(law.action_size)
        raise ValueError(
            f"{type(env).__name__} has {wants} and the policy {gives}; make the policy with the "
            "environment's observation_size and action_size"
        )

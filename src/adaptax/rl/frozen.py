"""Roll-outs kept, so that adaptation from them is a function of the meta-parameters alone."""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Key, PRNGKeyArray, PyTree

from .. import inner, roles, tree
from ..engine.mapping import Mapping, chunk_size
from ..learner import Adapter, Meta
from ..protocols import Stepping, Stepwise
from ..task import Batch, Frozen, Model, Source, Task


class Collected(eqx.Module):
    """What one task gave in one meta-iteration: all that the outer step needs.

    Args:
        support: roll-outs of the policy before each inner step.
        query: roll-outs of the adapted policy.
        key: of adaptation.
    """

    support: Frozen
    query: Batch
    key: PRNGKeyArray


def collect(
    learner: Adapter, meta: Meta, task: Task, *, key: PRNGKeyArray, mapping: Mapping = "vmap"
) -> Collected:
    """Roll out the policies on the way of adaptation and the adapted one; no derivative.

    Args:
        learner: any that has `inner_steps`. With `inner_steps=0` nothing adapts, and one batch of
            support is drawn for the record.
        meta: its meta-parameters.
        task: its environment.
        key: of roll-outs and adaptation.
        mapping: of adaptation under a `vmap` over tasks: unless one after another, all at once.
    """
    steps = inner_steps(learner)
    meta = inner.stop(meta)
    adapt_key, query_key, *keys = jax.random.split(key, 2 + max(steps, 1))
    source = task.support
    # One that answers with what was rolled out before answers step by step.
    at = source.at if isinstance(source, Stepwise) else lambda step: source
    policy = _after(learner, meta, source, adapt_key, 0)
    batches: list[Batch] = []
    for i, draw_key in enumerate(keys):
        batches.append(at(i).draw(policy, draw_key))
        support = Frozen(tree.stack(batches))
        if i < steps:
            policy = _adapted(learner, meta, policy, support.batches, adapt_key, i + 1, mapping)
    return Collected(support, task.query.draw(policy, query_key), adapt_key)


def collect_all(
    learner: Adapter,
    meta: Meta,
    tasks: Task,
    keys: Key[Array, " tasks"],
    mapping: Mapping = "auto",
) -> Collected:
    """`collect` of every task of a meta-batch, each with its key of `keys`; roll-outs at once."""
    each = lambda task, key: collect(learner, meta, task, key=key, mapping=mapping)  # noqa: E731
    return eqx.filter_vmap(each)(tasks, keys)


def adapt(learner: Adapter, meta: Meta, collected: Collected) -> Model:
    """The adapted policy `θ'(θ)`, the roll-outs it learns from held fixed; differentiable."""
    steps = inner_steps(learner)
    return _after(learner, meta, collected.support, collected.key, steps)


def inner_steps(learner: Adapter) -> int:
    """How many steps the learner takes in meta-training.

    Raises:
        ValueError: for a learner that has no such number.
    """
    steps = learner.inner_steps if isinstance(learner, Stepping) else None
    if not isinstance(steps, int):
        raise ValueError(
            f"{type(learner).__name__} has no inner_steps, which an outer step on roll-outs needs "
            "to know; use a learner that has, or meta-train with an optax optimizer"
        )
    return steps


def _adapted(
    learner: Adapter,
    meta: Meta,
    policy: Model,
    batches: Batch,
    key: PRNGKeyArray,
    steps: int,
    mapping: Mapping,
) -> Model:
    """The policy after a step on each of the stacked batches; another of the kind is `policy`."""

    def after(batches: Batch, key: PRNGKeyArray) -> PyTree:
        adapted = _after(learner, meta, Frozen(batches), key, steps)
        return eqx.filter(adapted, eqx.is_array)

    inputs = batches, key
    # The activations of one task stay in a CPU's cache; those of all do not.
    if chunk_size(mapping, 2, after, jax.tree.map(lambda leaf: leaf[None], inputs)) == 1:
        after = jax.custom_batching.sequential_vmap(after)
    return eqx.combine(after(*inputs), eqx.filter(policy, eqx.is_array, inverse=True))


def _after(learner: Adapter, meta: Meta, source: Source, key: PRNGKeyArray, steps: int) -> Model:
    """The last of the learner's iterates."""
    path = learner.iterates(roles.fresh(meta, key), source, key=key, steps=steps)
    return tree.at(path, -1)


def returns(collected: Collected) -> dict[str, Array]:
    """Mean undiscounted returns before adaptation and after, of tasks with a leading axis."""
    before = jax.tree.map(lambda leaf: leaf[:, 0], collected.support.batches.y)
    mean = lambda steps: jnp.mean(jnp.sum(steps.rewards, axis=-1))  # noqa: E731
    return {"return_before": mean(before), "return_after": mean(collected.query.y)}

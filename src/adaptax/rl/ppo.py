"""Proximal policy optimisation of the meta-parameters, through the adaptation."""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

from .. import tree
from ..engine.mapping import Across, Mapping, sum_over
from ..task import Batch, Model
from .advantages import masked_mean
from .frozen import adapt, collect_all, returns
from .objectives import ratio
from .outer import OnRollOuts


class PPO(OnRollOuts):
    """The simple outer step: PPO (Schulman et al. 2017, arXiv:1707.06347) on the *post-update*
    policies, as in ProMP (Rothfuss et al. 2019).

    Every task is rolled out before adaptation (D) and after (D'); then several steps of an
    optimizer are taken, D and D' held fixed, on

        −mean over tasks and steps of min(r Â, clip(r, 1 − ε, 1 + ε) Â),   r = π_θ'(θ) / π_old'

    on D'. As `fit(..., outer=PPO())`.

    Args:
        optimizer: any optax rule; Adam, 1e-3, if `None`.
        epochs: steps of it a meta-iteration.
        clip: ε.
        mapping: over tasks, of all but the roll-outs, which run together; see
            `adaptax.engine.mapping.Mapping`.
    """

    optimizer: optax.GradientTransformation | None = eqx.field(static=True, default=None)
    epochs: int = eqx.field(static=True, default=5)
    clip: float = eqx.field(static=True, default=0.2)
    mapping: Mapping = eqx.field(static=True, default="auto")

    def __check_init__(self) -> None:
        if self.epochs < 1 or not self.clip > 0:
            raise ValueError(
                f"epochs is at least 1 and clip positive, not {self.epochs} and {self.clip}"
            )

    @property
    def _rule(self) -> optax.GradientTransformation:
        return self.optimizer or optax.adam(1e-3)

    def init(self, trained: PyTree) -> PyTree:
        """The optimizer's state."""
        return self._rule.init(trained)

    def loss(self, policy: Model, batch: Batch) -> Float[Array, ""]:
        """The clipped surrogate."""
        r, advantages = ratio(policy, batch), batch.y.advantages
        clipped = jnp.clip(r, 1 - self.clip, 1 + self.clip)
        return -masked_mean(jnp.minimum(r * advantages, clipped * advantages), batch.y.mask)

    def on_device(self, across: Across, common: PyTree, mine: PyTree) -> PyTree:
        """The step; see `OnRollOuts`. The surrogate is that before the last epoch.

        The metrics are the mean returns before and after adaptation.
        """
        learner, meta, state = common
        trained, fixed = eqx.partition(meta, learner.trained(meta))
        tasks, keys = mine
        found = collect_all(learner, meta, tasks, keys, self.mapping)
        rolled_out, rest = eqx.partition(found, eqx.is_array)
        count = len(jax.tree.leaves(rolled_out)[0])

        def each(trained: PyTree, one: PyTree) -> Array:
            one = eqx.combine(one, rest)
            return self.loss(adapt(learner, eqx.combine(trained, fixed), one), one.query)

        def mean(trained: PyTree) -> tuple[Array, PyTree]:
            slope = lambda one: jax.value_and_grad(each)(trained, one)  # noqa: E731
            summed = sum_over(slope, (rolled_out,), self.mapping)
            return across(jax.tree.map(lambda leaf: leaf / count, summed))

        def epoch(carry: PyTree, _: None) -> tuple[PyTree, tuple[Array, Array]]:
            trained, state = carry
            value, grads = mean(trained)
            grads = tree.in_types_of(trained, grads)
            updates, state = self._rule.update(grads, state, trained)
            return (optax.apply_updates(trained, updates), state), (value, tree.norm(grads))

        (trained, state), (values, norms) = jax.lax.scan(
            epoch, (trained, state), None, length=self.epochs
        )
        metrics = across(returns(eqx.combine(rolled_out, rest))) | {"gradient_norm": norms[0]}
        return trained, state, values[-1], metrics

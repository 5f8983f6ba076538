"""The ensemble of the best checkpoints, by which MAML++ reports its scores."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from .. import tree
from ..learner import Adapter, Ensemble, Meta
from ..losses import Loss
from ..task import Model, Source


class CheckpointEnsemble(Adapter):
    """Adapts several checkpoints of one meta-training to a task, and averages their predictions.

    MAML++ (Antoniou, Edwards & Storkey 2019, arXiv:1810.09502) reports the ensemble of its best
    checkpoints by validation: three in older versions of its code, five in the last. The mean is
    over logits, as in the code, and not over probabilities. It is for evaluation; its
    meta-parameters are `adaptax.fit(..., keep=k).kept`:

        ensemble = adaptax.CheckpointEnsemble(learner.loss, learner)
        adaptax.evaluate(ensemble, result.kept, tasks.test, key=key)

    Args:
        loss: of the learner.
        learner: that was trained.
    """

    loss: Loss = eqx.field(static=True)
    learner: Adapter

    def check_support(self, meta: Meta, support: Any, *, key: PRNGKeyArray) -> None:
        """As the learner checks it."""
        self.learner.check_support(tree.at(meta, 0), support, key=key)

    def adapt(self, meta: Meta, support: Source, *, key: PRNGKeyArray) -> Model:
        """The mean of the checkpoints that have learnt from the support."""
        return self._each(meta, lambda meta: self._inner.adapt(meta, support, key=key), 0)

    def iterates(
        self, meta: Meta, support: Source, *, key: PRNGKeyArray, steps: int | None = None
    ) -> Model:
        """The means after 0, 1, … steps."""
        adapt = lambda meta: self._inner.iterates(meta, support, key=key, steps=steps)  # noqa: E731
        return self._each(meta, adapt, 1)

    def describe(self) -> dict[str, Any]:
        """As the learner describes itself, and how predictions are combined."""
        return {**self.learner.describe(), "combined": "mean of logits"}

    @property
    def _inner(self) -> Adapter:
        return self.learner.with_loss(self.loss)

    def _each(self, meta: Meta, adapt: Any, axis: int) -> MeanOfLogits:
        count = len(jax.tree.leaves(tree.parameters(meta))[0])
        adapted = [adapt(tree.at(meta, i)) for i in range(count)]
        arrays = [eqx.filter(model, eqx.is_array) for model in adapted]
        rest = eqx.filter(adapted[0], eqx.is_array, inverse=True)
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves, axis), *arrays)
        return MeanOfLogits(Ensemble(eqx.combine(stacked, rest)))


class MeanOfLogits(eqx.Module):
    """The mean of an ensemble's predictions, as one model.

    Args:
        ensemble: of models that predict logits or values.
    """

    ensemble: Ensemble

    def __call__(self, x: PyTree) -> Float[Array, "n out"]:
        """The mean over particles."""
        return jnp.mean(self.ensemble(x), axis=0)

    @property
    def models(self) -> Model:
        """The models, stacked."""
        return self.ensemble.models

    @property
    def particles(self) -> int:
        """Number of models."""
        return self.ensemble.particles

    @property
    def size(self) -> int:
        """Number of parameters of a model."""
        return self.ensemble.size

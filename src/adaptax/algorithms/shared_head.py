"""Heads that do not tell the ways of a task apart before it is learnt."""

from __future__ import annotations

from typing import Any, Literal

import equinox as eqx
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PRNGKeyArray

from .. import tree
from ..checks import at_least, one_of
from ..learner import Meta, MetaLearner
from ..losses import Loss
from ..task import Model, Source, Task


class SharedHead(MetaLearner):
    """Any learner, of which every task starts from a head that is the same for every way.

    So nothing depends on the order in which a task names its ways. With the cross-entropy both
    kinds give the same probabilities, since adding the same to all logits changes nothing.

        learner = adaptax.SharedHead(adaptax.MAML(adaptax.losses.cross_entropy, 0.4), "tied")

    The last axis of the head's arrays is taken for that of the ways, as it is in `adaptax.models`
    and Flax NNX, and is not in Equinox's and PyTorch's linear layers.

    Nor does it depend on how many ways there are: with `way` tasks have other ways than those that
    the model was made for.

    Args:
        learner: whose meta-parameters are a model, or a dict with a `"model"` or a `"mean"`.
        head: the learned weights' mean over the ways (`"tied"`), or `"zero"`.
        head_path: path of the head in the model; `adaptax.models` call it `head`.
        way: number of ways; as many as the model was made for if `None`. For learners whose
            meta-parameters are a model: others have rates or variances for every way.

    Raises:
        ValueError: for another kind; when it is used, if there is nothing at that path, or `way`
            is not for the learner.
    """

    loss: Loss = eqx.field(static=True)
    learner: MetaLearner
    head: Literal["tied", "zero"] = eqx.field(static=True)
    head_path: str = eqx.field(static=True)
    way: int | None = eqx.field(static=True)

    def __init__(
        self,
        learner: MetaLearner,
        head: Literal["tied", "zero"] = "tied",
        head_path: str = "head",
        way: int | None = None,
    ):
        self.loss, self.learner, self.train_only = learner.loss, learner, learner.train_only
        self.head, self.head_path, self.way = head, head_path, way

    def __check_init__(self) -> None:
        one_of(self, head=("tied", "zero"))
        at_least(self, 1, "way")

    def init(self, model: Model, *, key: PRNGKeyArray) -> Meta:
        """Return the learner's meta-parameters."""
        return self.learner.init(model, key=key)

    def check_support(self, meta: Meta, support: Any, *, key: PRNGKeyArray) -> None:
        """Check it as the learner does."""
        self.learner.check_support(meta, support, key=key)

    def adapt(self, meta: Meta, support: Source, *, key: PRNGKeyArray) -> Model:
        """Return the model that has learnt from `support`."""
        return self._inner.adapt(self._shared(meta), support, key=key)

    def iterates(
        self, meta: Meta, support: Source, *, key: PRNGKeyArray, steps: int | None = None
    ) -> Model:
        """Return the models on the way."""
        return self._inner.iterates(self._shared(meta), support, key=key, steps=steps)

    def meta_loss(
        self, meta: Meta, task: Task, *, key: PRNGKeyArray, progress: float | Array = 1.0
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """Return the learner's, from that head."""
        return self._inner.meta_loss(self._shared(meta), task, key=key, progress=progress)

    def fallback(self, meta: Meta, task: Task, *, key: PRNGKeyArray) -> Array | None:
        """Return the learner's."""
        return self._inner.fallback(meta, task, key=key)

    def part_of(self, path: str, meta: Meta) -> str | None:
        """Return the learner's."""
        return self.learner.part_of(path, meta)

    def optimizer(self, steps: int) -> optax.GradientTransformation:
        """Return the learner's."""
        return self.learner.optimizer(steps)

    def describe(self) -> dict[str, Any]:
        """Return name and hyper-parameters of the learner, and the kind of head."""
        own = {"head": self.head, "head_path": self.head_path}
        return {**self.learner.describe(), **own, **({"way": self.way} if self.way else {})}

    def with_way(self, way: int | None) -> Any:
        """Return the same: the ways are those of the model unless it says otherwise."""
        return self

    @property
    def _inner(self) -> MetaLearner:
        return self.learner.with_loss(self.loss)

    def _shared(self, meta: Meta) -> Meta:
        """The meta-parameters, their model with that head."""
        if isinstance(meta, dict):
            if self.way is not None:
                raise ValueError(
                    f"way={self.way} is for learners whose meta-parameters are a model, such as "
                    "MAML, and these are {}; make a model of that many ways".format(", ".join(meta))
                )
            name = "mean" if "mean" in meta else "model"
            return {**meta, name: self._shared(meta.get(name))}
        below = tree.under(self.head_path)
        own = lambda path: path.partition("/")[2] if hasattr(meta, "particles") else path  # noqa: E731
        leaves = tree.by_path(tree.parameters(meta))
        head = {path: leaf for path, leaf in leaves.items() if below(own(path))}
        if not head:
            raise ValueError(
                f"head={self.head!r} wants the model's head, and it has nothing below "
                f"{self.head_path!r}; give head_path="
            )
        new = {path: self._same_for_all(leaf) for path, leaf in head.items()}
        return tree.replace(meta, new)

    def _same_for_all(self, leaf: Array) -> Array:
        """Return an array of the head with equal entries along its last axis, the ways."""
        shape = (*leaf.shape[:-1], self.way or leaf.shape[-1])
        if self.head == "zero":
            return jnp.zeros(shape, leaf.dtype)
        return jnp.broadcast_to(leaf.mean(-1, keepdims=True), shape)

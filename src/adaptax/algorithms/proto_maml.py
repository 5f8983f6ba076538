"""ProtoMAML (Triantafillou et al. 2020, arXiv:1903.03096)."""

from __future__ import annotations

from dataclasses import KW_ONLY
from typing import Any

import equinox as eqx
import jax
import optax
from jaxtyping import Array, Float, PRNGKeyArray

from .. import inner, tree
from ..learner import InnerLoop, Meta
from ..losses import Loss, cross_entropy
from ..task import Model, Source, Task
from .layers import Headed, embed, way_of, without_head
from .particles import nonempty
from .prototypes import check_labels, check_way, known_way, linear_head, prototypes


class ProtoMAML(InnerLoop):
    """MAML whose head starts, in each task, as the classifier by the task's prototypes.

        w_k = 2 c_k,   b_k = −‖c_k‖²,   c_k the mean of f(x) over the support of class k
        (θ, w, b) ← (θ, w, b) − α ∇L_S,   meta-loss  L_Q

    Before the first step it predicts as `PrototypicalNetwork` does. Nothing that is learned
    depends on which way is which, nor on how many there are: a task may have any number of ways,
    and `way` is as in `PrototypicalNetwork`.

    The head is a function of θ, through which the meta-gradient flows, of first order as well.
    With `stop_prototypes=True` the head is where the inner loop starts and no more: then with
    `first_order=True` it is the first-order MAML of a network with that head.

    Code. In Meta-Dataset's released (experimental) learner the head is assigned to variables,
    through which no gradient flows, which is `stop_prototypes=True`; it multiplies prototypes by
    a factor, `multiplier`; and a class without support has a prototype of zero there, and no
    probability here.

    Args:
        loss: of both loops.
        inner_lr: step size α; see `MAML`.
        inner_steps: in meta-training; with 0 it is a prototypical network.
        way: number of classes; see `PrototypicalNetwork`.
        head: path of the head in the model, which is taken out; `None` if the model has none.
        eval_steps: steps that `adapt` takes; as many as in training if `None`.
        first_order: take inner gradients for constants.
        stop_prototypes: take the head that the inner loop starts from for a constant.
        multiplier: of the prototypes, before the head is made.
        meta_gradient: how it goes back through the inner loop; see `adaptax.modes.parse`.
        adapt_only: a predicate on the paths of the adapted model, which are below `"body"` and
            `"head"`, choosing what is adapted: `adaptax.tree.under("head")` adapts the head alone.
        inner_optimizer: any optax rule instead of gradient descent by `inner_lr`.

    Raises:
        ValueError: for a way or multiplier that is not positive; in `init`, if there is no layer
            at `head`.
    """

    loss: Loss = eqx.field(static=True, default=cross_entropy)
    inner_lr: inner.Rate = 0.01
    inner_steps: int = eqx.field(static=True, default=1)
    _: KW_ONLY
    way: int | None = eqx.field(static=True, default=None)
    head: str | None = eqx.field(static=True, default="head")
    eval_steps: int | None = eqx.field(static=True, default=None)
    first_order: bool = eqx.field(static=True, default=False)
    stop_prototypes: bool = eqx.field(static=True, default=False)
    multiplier: float = eqx.field(static=True, default=1.0)
    meta_gradient: str = eqx.field(static=True, default="auto")
    adapt_only: tree.Predicate | None = eqx.field(static=True, default=None)
    inner_optimizer: optax.GradientTransformation | None = eqx.field(static=True, default=None)

    def __check_init__(self) -> None:
        check_way(self.way)
        if not self.multiplier > 0:
            raise ValueError(f"multiplier is above 0, not {self.multiplier}")

    def init(self, model: Model, *, key: PRNGKeyArray) -> Meta:
        """Return the model without its head.

        Args:
            model: any; also the meta-parameters of a trained `MAML` or `PrototypicalNetwork`.
            key: not used.
        """
        given = model["model"] if isinstance(model, dict) and "model" in model else model
        return without_head(given, self.head)

    def check_support(self, meta: Meta, support: Any, *, key: PRNGKeyArray) -> None:
        """Raise for labels that are none, or more than there are ways.

        Raises:
            ValueError: for targets that are not labels in `[0, way)`.
        """
        check_labels(support, self._way(meta))

    def course(self, meta: Meta, support: Source, *, key: PRNGKeyArray, **how: Any) -> Model:
        """Return the model after `steps` steps from the head of the prototypes, or all of them."""
        draw_key, key = jax.random.split(key)
        return inner.descend(
            self.loss,
            self._start(meta, support, draw_key),
            support,
            key=key,
            lr=None if self.inner_optimizer else self.inner_lr,
            optimizer=self.inner_optimizer,
            first_order=self.first_order,
            meta_gradient=self.meta_gradient,
            adapt_only=self.adapt_only,
            **how,
        )

    def meta_loss(
        self, meta: Meta, task: Task, *, key: PRNGKeyArray, progress: float | Array = 1.0
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """Return the loss of the queries after `inner_steps` steps."""
        adapt_key, query_key = jax.random.split(key)
        model = self.course(meta, task.support, key=adapt_key, steps=self.inner_steps)
        return self.loss(model, task.query.draw(model, query_key)), {}

    def _start(self, meta: Meta, support: Source, key: PRNGKeyArray) -> Headed:
        """Return the model with the head of the prototypes."""
        batch = nonempty(support, "support").draw(meta, key)
        centres, present = prototypes(embed(meta, batch), batch, known_way(self._way(meta)))
        head = linear_head(self.multiplier * centres, present)
        return Headed(meta, inner.stop(head) if self.stop_prototypes else head)

    def _way(self, meta: Meta) -> int | None:
        return way_of(meta, self.head) if self.way is None else self.way

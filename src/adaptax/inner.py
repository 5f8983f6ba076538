"""The differentiable inner loop: `U_k(θ; S)`, k steps of any optax rule on a task's support."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import PRNGKeyArray, PyTree

from . import modes, roles, roots, tree, watch
from .losses import Loss
from .task import Model, Source

Rate: TypeAlias = Any
"""A step size: a number, a tree of the model's structure, or a function of the step to either."""


def sgd(lr: Rate) -> optax.GradientTransformation:
    """Gradient descent whose rates may be learned: `θ ← θ − lr ∘ ∇L(θ)`.

    Args:
        lr: a number; a tree with a rate (scalar or elementwise) at every adapted leaf; or a
            schedule from the step, 0 first, to one of these. Differentiable in all of them.
    """

    def update(grads: PyTree, step: Any, params: PyTree = None) -> tuple[PyTree, Any]:
        rate = lr(step) if _is_leaf(lr) and callable(lr) else lr
        if _is_leaf(rate):
            return jax.tree.map(lambda g: -rate * g, grads), step + 1
        scale = lambda g, r: None if g is None else -r * g  # noqa: E731 - rates of fixed leaves
        return jax.tree.map(scale, grads, rate, is_leaf=lambda g: g is None), step + 1

    return optax.GradientTransformation(lambda params: jnp.zeros((), jnp.int32), update)


def adam(
    lr: float, b1: float = 0.0, b2: float = 0.999, eps: float = 1e-8, eps_root: float = 0.0
) -> optax.GradientTransformation:
    """Adam without momentum (`b1 = 0`): the inner rule of Reptile's experiments.

    The first step is `−lr g / (|g| + eps)`, whose derivative at g = 0 is `−lr / eps`. MAML
    multiplies it with the Hessian: where a gradient is zero and its Hessian is not, the
    meta-gradient is that large. A larger `eps` or an `eps_root` makes it smaller.
    """
    return optax.adam(lr, b1=b1, b2=b2, eps=eps, eps_root=eps_root)


class Descent(eqx.Module):
    """The outcome of an inner loop.

    Args:
        model: the adapted model.
        state: the state of the update rule after the last step.
        path: the models after `0..steps` steps, arrays leading with an axis of `steps + 1`;
            `None` unless asked for.
    """

    model: Model
    state: PyTree
    path: Any


def descend(
    loss: Loss, model: Model, support: Source, *, keep_path: bool = False, **how: Any
) -> Model:
    """Return the model after the steps of `run`; with `keep_path` those after 0, 1, … steps."""
    end = run(loss, model, support, keep_path=keep_path, **how)
    return end.path if keep_path else end.model


def iterates(loss: Loss, model: Model, support: Source, **how: Any) -> Model:
    """Return the models after `0..steps` steps of `run`, stacked along a leading axis."""
    return descend(loss, model, support, keep_path=True, **how)


def run(
    loss: Loss,
    model: Model,
    support: Source,
    *,
    key: PRNGKeyArray,
    steps: int,
    lr: Rate | None = None,
    optimizer: optax.GradientTransformation | None = None,
    state: PyTree = None,
    first_order: bool = False,
    meta_gradient: str = "auto",
    adapt_only: tree.Predicate | None = None,
    keep_path: bool = False,
    view: Callable[[PyTree, Any], Model] | None = None,
) -> Descent:
    """Adapt a model by `steps` gradient steps on `support`; differentiable in everything.

    Args:
        loss: `loss(model, batch) -> scalar`.
        model: any callable pytree; of what is trained and what is not, see `adaptax.roles`.
        support: where batches come from, one for each step.
        key: randomness of the draws, and of the model.
        steps: number of steps; 0 returns the model.
        lr: step size of gradient descent; see `sgd`.
        optimizer: any optax rule, instead of `lr`. Where a gradient is zero its derivative is
            finite; see `adaptax.roots.safe`.
        state: the rule's state to start from; fresh if `None`.
        first_order: treat the inner gradients as constants. No second-order graph is built.
        meta_gradient: how the steps are differentiated, such as `"forward"` or
            `"reverse, checkpoint=4, truncate=16"`; see `adaptax.modes.parse`.
        adapt_only: which leaves to adapt; see `adaptax.tree.adaptable`.
        keep_path: also keep the model after every step.
        view: the model as step `i` sees it, `view(model, i)`, differentiable; for what changes
            from step to step, such as per-step batch normalisation. Then `model` may be any
            pytree of which `view` makes a model. With `first_order`, whatever it closes over
            should carry no derivative: see `stop`.

    Raises:
        ValueError: unless exactly one of `lr` and `optimizer` is given and `steps >= 0`, and
            for a `meta_gradient` that there is not.
    """
    if (lr is None) == (optimizer is None):
        raise ValueError("give the inner loop either `lr` or `optimizer`, and not both")
    if steps < 0:
        raise ValueError(f"the inner loop takes 0 or more steps, not {steps}")
    mode = modes.parse(meta_gradient)
    rule = sgd(lr) if optimizer is None else optimizer
    roles.check_keys(model)
    once, loss = roles.deduplicate(model), roles.pure(loss)
    start, fixed = eqx.partition(once, tree.adaptable(once, adapt_only))
    watch.begin()
    update = roots.safe(rule.update)
    seen = view or (lambda model, step: model)

    def gradient(params: PyTree, step: Any, constant: bool) -> PyTree:
        source, rest = support, fixed
        if constant:
            # Cut at the inputs, not at the result: nothing that flows in carries a tangent, so
            # differentiating the loop never traces the derivative of a gradient.
            params, rest, source = stop((params, rest, source))
        now = source.at(step) if hasattr(source, "at") else source
        pass_key = jax.random.fold_in(key, step)
        rest = roles.fresh(rest, pass_key)
        batch = roles.pure(now.draw)(seen(eqx.combine(params, rest), step), pass_key)
        objective = lambda p: loss(seen(eqx.combine(p, rest), step), batch)  # noqa: E731
        order = "reverse" if constant else mode.order
        value, grads = modes.value_and_grad(objective, order)(params)
        watch.note(step, support_inputs=batch.x, support_targets=batch.y, support_loss=value,
                   inner_gradient=grads)  # fmt: skip
        return grads

    def step(carry: PyTree, i: Any, truncated: bool = False) -> tuple[PyTree, PyTree]:
        params, state = carry
        grads = gradient(params, i, first_order or truncated)
        # A view may close over what carries a derivative.
        updates, state = update(stop(grads) if truncated else grads, state, params)
        params = optax.apply_updates(params, updates)
        watch.note(i, adapted_weights=params)
        return (params, state), params if keep_path else None

    carry = (start, rule.init(start) if state is None else state)
    carry, path = _along(step, carry, steps, mode)
    params, state = carry
    if keep_path:
        path = jax.tree.map(lambda s, p: jnp.concatenate([s[None], p]), start, path)
        path = eqx.combine(path, jax.tree.map(lambda leaf: _repeat(leaf, steps + 1), fixed))
    end = eqx.combine(params, fixed)
    if once is not model:
        end, path = roles.reshare((end, path))
    return Descent(end, state, path)


def _along(
    step: Callable[..., Any], carry: PyTree, steps: int, mode: modes.Mode
) -> tuple[PyTree, PyTree]:
    """Take all steps, of which those before the last `mode.truncate` are told so."""
    if mode.truncate is None or mode.truncate >= steps:
        return modes.scan(step, carry, 0, steps, mode.checkpoint)
    cut = steps - mode.truncate
    early = functools.partial(step, truncated=True)
    carry, path = modes.scan(early, carry, 0, cut, None)
    carry, rest = modes.scan(step, carry, cut, steps, mode.checkpoint)
    return carry, jax.tree.map(lambda *parts: jnp.concatenate(parts), path, rest)


def stop(tree: PyTree) -> PyTree:
    """The tree without a derivative."""
    return jax.tree.map(lambda a: jax.lax.stop_gradient(a) if eqx.is_array(a) else a, tree)


def _is_leaf(tree: PyTree) -> bool:
    return jax.tree_util.treedef_is_leaf(jax.tree.structure(tree))


def _repeat(leaf: Any, times: int) -> Any:
    return jnp.broadcast_to(leaf, (times, *leaf.shape)) if eqx.is_array(leaf) else leaf

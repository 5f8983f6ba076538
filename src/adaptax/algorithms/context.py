"""Adaptation of a context: CAVIA (Zintgraf et al. 2019, arXiv:1810.03642) and its kin."""

from __future__ import annotations

from dataclasses import KW_ONLY
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from .. import inner, roles, tree
from ..checks import at_least, one_of
from ..learner import InnerLoop, Meta
from ..losses import Loss
from ..task import Model, Source, Task
from . import layers


class ContextAdaptation(InnerLoop):
    """CAVIA: a task has a few variables of its own, and the network is the same for all tasks.

        φ_0 = 0,   φ ← φ − α ∇_φ L_S(θ, φ),   meta-loss  L_Q(θ, φ_k),   minimised over θ alone

    The context φ starts at zero in every task and is never meta-trained, so that adaptation cannot
    overfit the network, and a task is told by `size` numbers. `where` says how φ enters:

    * `"input"`: every input is joined with φ along its last axis, images with planes of it. The
      model takes inputs that much wider: `MLP(1 + 5, 1)` for one input and `size=5`.
    * The path of a layer, or several, `"layers/0"` or with wildcards `"layers/*"`: outputs h of the
      layer become `(1 + γ) ∘ h + β` (FiLM), along their last axis, of `equinox.nn.Conv` the first.
      The model is the user's own, unchanged.
      With a `size`, (γ, β) = φ A, where the matrix A of every layer is meta-learned; with
      `size=None` they are the context themselves. `modulation="shift"` has β alone.

    A shift of the first layer by φ A is the same as an input that is joined with φ. Shifts of all
    layers from one φ are the latent modulations of functa (Dupont et al. 2022, arXiv:2201.12204),
    whose rates are learned for every variable, `learn_lr=True`. A shift is lost if batch
    normalisation follows: name the normalisation, `"blocks/2/1"`, and not the convolution.

    Released code. For sinusoids φ joins the input: 5 variables, α = 1, one step. For images 100
    variables modulate the third block after its normalisation, α = 1, two steps. There the linear
    map has a bias, and the factor is γ, not 1 + γ: a network with γ = 0 would give nothing, so the
    bias is needed; here the network without context is the model as it is given. The code clips
    the meta-gradient to ±10 elementwise, for sinusoids task by task; here that is up to the outer
    optimizer.

    Args:
        loss: of both loops.
        inner_lr: α: a number or a schedule over the inner steps; with `learn_lr` where rates start.
        inner_steps: k, in meta-training.
        size: length of φ; `None` if the modulations of the named layers are the context.
        where: how it enters, see above; several paths as a tuple.
        modulation: `"film"`, scale and shift, or `"shift"`.
        learn_lr: meta-learn a rate for every variable of the context.
        eval_steps: steps that `adapt` takes; as many as in training if `None`.
        first_order: take inner gradients for constants.
        meta_gradient: how it goes back through the inner loop; see `adaptax.modes.parse`.
        inner_optimizer: any optax rule instead of gradient descent by `inner_lr`.

    Raises:
        ValueError: if arguments exclude each other; in `init`, if the model has no such layer.
    """

    title = "CAVIA"
    loss: Loss = eqx.field(static=True)
    inner_lr: inner.Rate = 1.0
    inner_steps: int = eqx.field(static=True, default=1)
    _: KW_ONLY
    size: int | None = eqx.field(static=True, default=5)
    where: str | tuple[str, ...] = eqx.field(static=True, default="input")
    modulation: Literal["film", "shift"] = eqx.field(static=True, default="film")
    learn_lr: bool = eqx.field(static=True, default=False)
    eval_steps: int | None = eqx.field(static=True, default=None)
    first_order: bool = eqx.field(static=True, default=False)
    meta_gradient: str = eqx.field(static=True, default="auto")
    inner_optimizer: optax.GradientTransformation | None = eqx.field(static=True, default=None)

    def __check_init__(self) -> None:
        one_of(self, modulation=("film", "shift"))
        at_least(self, 1, "size")
        if self.size is None and self.where == "input":
            raise ValueError(
                'size=None makes the modulations of layers the context, and where="input" names no '
                "layer; give size= a number, or where= paths of layers"
            )
        if self.learn_lr and (self.inner_optimizer is not None or callable(self.inner_lr)):
            raise ValueError(
                "learn_lr=True learns rates that start at the number inner_lr; leave out "
                "inner_optimizer and schedules"
            )

    def init(self, model: Model, *, key: PRNGKeyArray) -> Meta:
        """Return `{"model": the model, "maps": A by layer, "lr": rates}`, as far as they are.

        Args:
            model: any; also the meta-parameters of this learner, to continue.
            key: of the matrices A, which are drawn as weights are (Glorot).
        """
        if isinstance(model, dict) and "model" in model:
            return model
        meta: dict[str, Any] = {"model": model}
        if self.where != "input":
            sizes = self._sizes(model)
            if self.size is not None:
                keys = jax.random.split(key, len(sizes))
                draw = jax.nn.initializers.glorot_uniform()
                meta["maps"] = {
                    path: draw(own, (self.size, size))
                    for own, (path, size) in zip(keys, sizes.items())
                }
        if self.learn_lr:
            start = lambda leaf: jnp.full_like(leaf, self.inner_lr)  # noqa: E731
            meta["lr"] = jax.tree.map(start, self._context(meta))
        return meta

    def course(self, meta: Meta, support: Source, **how: Any) -> Model:
        """Return the model with the context after `steps` steps, or all of them on the way."""
        start = roles.deduplicate(self._with_context(meta))
        lr = self.inner_lr
        if self.learn_lr:
            own = tree.under("context")
            lr = eqx.filter(start, tree.adaptable(start, own))
            lr = eqx.tree_at(lambda model: model.context, lr, meta["lr"])
        return inner.descend(
            self.loss,
            start,
            support,
            lr=None if self.inner_optimizer else lr,
            optimizer=self.inner_optimizer,
            first_order=self.first_order,
            meta_gradient=self.meta_gradient,
            adapt_only=tree.under("context"),
            **how,
        )

    def meta_loss(
        self, meta: Meta, task: Task, *, key: PRNGKeyArray, progress: float | Array = 1.0
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """Return `L_Q(θ, φ_k)`."""
        adapt_key, query_key = jax.random.split(key)
        model = self.course(meta, task.support, key=adapt_key, steps=self.inner_steps)
        return self.loss(model, task.query.draw(model, query_key)), {}

    def part_of(self, path: str, meta: Meta) -> str | None:
        """Return the path in the model; maps and rates belong to no leaf of it."""
        first, _, rest = path.partition("/")
        return rest if first == "model" and rest else None

    def _with_context(self, meta: Meta) -> Contextual:
        scaled = self.modulation == "film"
        return Contextual(meta["model"], meta.get("maps"), self._context(meta), scaled)

    def _context(self, meta: Meta) -> PyTree[Array]:
        """Return the context that every task starts from: zeros."""
        kind = jnp.result_type(*jax.tree.leaves(tree.parameters(meta["model"])), jnp.float32)
        if self.size is not None:
            return jnp.zeros(self.size, kind)
        return {path: jnp.zeros(size, kind) for path, size in self._sizes(meta["model"]).items()}

    def _sizes(self, model: Model) -> dict[str, int]:
        """Return the number of modulations of every named layer.

        Raises:
            ValueError: if one does not say how many outputs it has.
        """
        patterns = (self.where,) if isinstance(self.where, str) else tuple(self.where)
        sizes = {}
        for path, layer in layers.matching(model, patterns).items():
            width = layers.width(layer)
            if width is None:
                raise ValueError(
                    f"the layer {path}, {type(layer).__name__}, does not say how many features it "
                    "gives, by out_features, out_channels or a bias of that length; name another"
                )
            sizes[path] = 2 * width if self.modulation == "film" else width
        return sizes


class Contextual(eqx.Module):
    """A model and the context of a task; see `ContextAdaptation`.

    Args:
        model: the same for all tasks.
        maps: matrices from the context to the modulations of layers, by path; `None` without.
        context: a vector, or the modulations by path.
        scaled: modulations are scales and shifts; else shifts alone.
    """

    model: Model
    maps: dict[str, Float[Array, "size modulations"]] | None
    context: Float[Array, " size"] | dict[str, Float[Array, " modulations"]]
    scaled: bool = eqx.field(static=True)

    def __call__(self, x: PyTree) -> PyTree:
        """Return the model's predictions in this context.

        Raises:
            ValueError: if the context is to join inputs, and these are no array, or the model does
                not take them so wide.
        """
        if isinstance(self.context, dict):
            return self._modulated(self.context)(x)
        if self.maps is not None:
            return self._modulated({path: self.context @ a for path, a in self.maps.items()})(x)
        return self._joined(x, self.context)

    def _joined(self, x: PyTree, context: Float[Array, " size"]) -> PyTree:
        if not eqx.is_array(x) or x.ndim < 2:
            raise ValueError(
                'where="input" joins inputs (n, …, features) with the context, and these are not '
                "such an array; name layers by where= instead"
            )
        rows = jnp.broadcast_to(context, (*x.shape[:-1], len(context)))
        try:
            return self.model(jnp.concatenate([x, rows.astype(jnp.result_type(x, rows))], axis=-1))
        except TypeError as error:
            width = x.shape[-1] + len(context)
            raise ValueError(
                f"the model does not take inputs that are {x.shape[-1]} wide and joined with "
                f"{len(context)} variables of context ({error}); make it for a width of {width}, "
                "or name layers by where="
            ) from error

    def _modulated(self, modulations: dict[str, Array]) -> Model:
        model = self.model
        # Layers inside of others first, so that the outer ones hold them modulated.
        for path in sorted(modulations, key=lambda path: -path.count("/")):
            layer = Modulated(layers.find(model, path), modulations[path], self.scaled)
            model = layers.replaced(model, {path: layer})
        return model


class Modulated(eqx.Module):
    """A layer whose outputs h become `(1 + γ) ∘ h + β`.

    Args:
        layer: any.
        modulations: γ and β, one after another; β alone unless `scaled`.
        scaled: whether there is γ.
    """

    layer: Any
    modulations: Float[Array, " modulations"]
    scaled: bool = eqx.field(static=True)

    def __call__(self, *args: Any, **how: Any) -> Array:
        """Return the modulated outputs, channels last, of `equinox.nn.Conv` first."""
        h = self.layer(*args, **how)
        parts = jnp.split(self.modulations.astype(h.dtype), 2 if self.scaled else 1)
        if isinstance(self.layer, eqx.nn.Conv):
            parts = [part.reshape(-1, *(1,) * (h.ndim - 1)) for part in parts]
        return h + parts[0] if len(parts) == 1 else h * (1 + parts[0]) + parts[1]

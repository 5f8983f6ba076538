"""The networks of LEO: from a support set to codes, and from codes to the weights of a model."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.nn import initializers
from jaxtyping import Array, Bool, Float, PRNGKeyArray, PyTree

from .. import roles, tree
from ..task import Batch, Model
from ..weights import Weight

Activation = Callable[[Array], Array]

Widths = tuple[tuple[int, ...], ...]
"""Of the hidden layers of encoder, relation and decoder."""

Codes = tuple[Float[Array, "*codes"], Float[Array, "*codes"]]
"""Mean and standard deviation."""

FLOOR = 1e-10
"""The least standard deviation."""


def deviation(
    u: Float[Array, "*any"], offset: float | Float[Array, ...] = 0.0
) -> Float[Array, "*any"]:
    """`σ = max(exp(u) − (1 − s), 10⁻¹⁰)`: at u = 0 it is the offset s, and where it is cut it
    has no derivative.

    Args:
        u: what a network gives.
        offset: s; 0 for codes, the Glorot scale for weights.
    """
    return jnp.maximum(jnp.expm1(u) + offset, FLOOR)


class Layer(NamedTuple):
    """`x W + b`."""

    weight: Float[Array, "in_size out_size"]
    bias: Float[Array, " out_size"]

    def __call__(self, x: Float[Array, "n in_size"]) -> Float[Array, "n out_size"]:
        """Return a batch of outputs."""
        return x @ self.weight + self.bias


class Perceptron(NamedTuple):
    """Layers, an activation after each but the last."""

    layers: tuple[Layer, ...]
    head: Layer

    def __call__(
        self, x: Float[Array, "n in_size"], activation: Activation
    ) -> Float[Array, "n out_size"]:
        """Return a batch of outputs."""
        for layer in self.layers:
            x = activation(layer(x))
        return self.head(x)


def _layer(key: PRNGKeyArray, in_size: int, out_size: int) -> Layer:
    weight = initializers.glorot_uniform()(key, (in_size, out_size))
    return Layer(weight, jnp.zeros(out_size))


def _perceptron(key: PRNGKeyArray, *sizes: int) -> Perceptron:
    *layers, head = map(_layer, jax.random.split(key, len(sizes) - 1), sizes, sizes[1:])
    return Perceptron(tuple(layers), head)


class Template(eqx.Module):
    """A model without the parameters that are generated.

    Args:
        rest: all else.
        structure: of the parameters.
        shapes: of the parameters.
    """

    rest: PyTree
    structure: Any = eqx.field(static=True)
    shapes: tuple[tuple[int, ...], ...] = eqx.field(static=True)

    @classmethod
    def of(
        cls, model: Model, train_only: tree.Predicate | None = None
    ) -> tuple[Template, list[Array]]:
        """The template of a model, and the parameters that are to be generated."""
        mask = tree.only(roles.trained(model), train_only, "train_only")
        params, rest = eqx.partition(model, mask)
        leaves, structure = jax.tree.flatten(params)
        return cls(rest, structure, tuple(leaf.shape for leaf in leaves)), leaves

    def is_state(self, path: str) -> bool:
        """Nothing here is trained; see `adaptax.roles`."""
        return True

    def model(self, leaves: list[Array]) -> Model:
        """The model with these parameters."""
        return eqx.combine(jax.tree.unflatten(self.structure, leaves), self.rest)


class ClassCodes(eqx.Module):
    """A code for every class and shot, each the weights of a linear classifier on embeddings.

        e_i = x_i A                                        encoder      d → l
        r_i = mean_j relu(relu([e_i, e_j] R₀) R₁) R₂       relation     2l → 2l → 2l → 2l
        (m, u)_n = mean of r_i over the shots of class n   codes        l and l
        (m', u')_nk = z_nk D                               decoder      l → 2d
        W_n = mean_k [m'_nk + σ'_nk ∘ ε'_nk]               classifier   logits  x Wᵀ

    without biases, all Glorot uniform; N classes, K shots, embeddings of width d, codes of width
    l. Sums over pairs are taken before the last layer and the first is taken apart, which changes
    nothing. Neither N nor K is in the shape of a parameter.

    Args:
        model: a linear classifier `(n, d) → (n, way)`: one matrix `(d, way)` and, if it has it, a
            bias, which is zero in what is generated.
        latent: l.
        prior: `"random"` draws codes from N(0, 1) whatever the support.
        hidden: not used.
        key: of the initialisation.
        activation: of the relation network; ReLU in the paper.
        train_only: which parameters are generated; see `LEO`.

    Raises:
        ValueError: for another model.
    """

    encoder: Float[Array, "d l"]
    relation: tuple[Float[Array, "l2 l2"], ...]
    decoder: Float[Array, "l d2"]
    template: Template
    prior: str = eqx.field(static=True)
    way: int = eqx.field(static=True)
    scaled: ClassVar[bool] = False
    """Whether the rates are learned in units of where they start."""
    alike: ClassVar[str] = "the codes of different classes are {:.1e} apart"
    """Words for codes that coincide."""
    activation: Activation = eqx.field(static=True)

    def __init__(
        self,
        model: Model,
        latent: int,
        prior: str,
        *,
        hidden: Widths = (),
        key: PRNGKeyArray,
        activation: Activation = jax.nn.relu,
        train_only: tree.Predicate | None = None,
    ):
        self.template, _ = Template.of(model, train_only)
        matrices = [shape for shape in self.template.shapes if len(shape) == 2]
        others = [shape for shape in self.template.shapes if len(shape) != 2]
        if len(matrices) != 1 or others not in ([], [matrices[0][1:]]):
            raise ValueError(
                "with a code for each class, LEO makes linear classifiers on embeddings, and was "
                f"given a model with parameters of shapes {list(self.template.shapes)}; give it "
                'adaptax.models.Linear(width, way, key=key), or say codes="task"'
            )
        ((width, self.way),) = matrices
        self.prior, self.activation = prior, activation
        keys = jax.random.split(key, 5)
        glorot, pair = initializers.glorot_uniform(), (2 * latent, 2 * latent)
        self.encoder = glorot(keys[0], (width, latent))
        self.relation = tuple(glorot(k, pair) for k in keys[1:4])
        self.decoder = glorot(keys[4], (latent, 2 * width))

    @property
    def width(self) -> int:
        """Width of the embeddings, d."""
        return self.encoder.shape[0]

    @property
    def rows(self) -> Float[Array, "l d2"]:
        """Matrix whose rows are regularised."""
        return self.decoder

    @property
    def rates(self) -> tuple[int, ...]:
        """Shape of the rates of fine-tuning: shared by the classes."""
        return (self.width,)

    def features(self, support: Batch) -> Float[Array, "way shot d"]:
        """The support by class; all NaN if the classes have not equally many examples each.

        Values are checked where they are known: not while a program is traced.
        """
        check_embeddings(support, self.width, "support")
        if support.weight is not None:
            raise ValueError(
                "with a code for each class LEO wants equally many examples of every class, and "
                'was given a support with weights; use codes="task", or tasks of one size'
            )
        if support.size == 0 or support.size % self.way:
            raise ValueError(
                f"a support of {support.size} examples cannot hold equally many of {self.way} "
                f"classes; LEO wants each class {self.way}·shot / {self.way} times, so sample "
                f"tasks of {self.way} ways, or give LEO a model with as many outputs as ways"
            )
        order = jnp.argsort(support.y, stable=True)
        labels = support.y[order].reshape(self.way, -1)
        balanced = jnp.all(labels == jnp.arange(self.way)[:, None])
        if not isinstance(balanced, jax.core.Tracer) and not balanced:
            counts = {int(c): int((support.y == c).sum()) for c in jnp.unique(support.y)}
            raise ValueError(
                f"the support holds {counts} examples by class where each of the classes 0 to "
                f"{self.way - 1} should have {labels.shape[1]}; sample it class by class"
            )
        return jnp.where(balanced, support.x[order].reshape(self.way, -1, self.width), jnp.nan)

    def check_query(self, query: Batch) -> None:
        """Raise unless the queries are embeddings of that width, with labels."""
        check_embeddings(query, self.width, "query")

    def encode(self, x: Float[Array, "way shot d"], weight: None = None) -> Codes:
        """Return mean and σ of the codes, `(way, shot, l)`, equal for the shots of a class."""
        way, shot, _ = x.shape
        latent = self.decoder.shape[0]
        if self.prior == "random":
            zeros = jnp.zeros((way, shot, latent), x.dtype)
            return zeros, jnp.ones_like(zeros)
        first, second, third = self.relation
        e = (x @ self.encoder).reshape(-1, latent)
        pairs = self.activation((e @ first[:latent])[:, None] + e @ first[latent:])
        pairs = self.activation(pairs.reshape(-1, 2 * latent) @ second)
        related = jnp.mean(pairs.reshape(way, -1, 2 * latent), axis=1) @ third
        tiled = jnp.broadcast_to(related[:, None], (way, shot, 2 * latent))
        return tiled[..., :latent], deviation(tiled[..., latent:])

    def apart(self, mean: Float[Array, "way shot l"]) -> Float[Array, " l"]:
        """Return how far the classes are apart."""
        return jnp.std(mean[:, 0], axis=0)

    def noise(self, key: PRNGKeyArray, z: Float[Array, "way shot l"]) -> Float[Array, ...]:
        """What `decode` takes."""
        return jax.random.normal(key, (*z.shape[:2], self.width), z.dtype)

    def decode(
        self, z: Float[Array, "way shot l"], noise: Float[Array, "way shot d"] | None
    ) -> Float[Array, "way d"]:
        """The weights of the classifier; their mean without noise."""
        mean = jnp.mean(z, axis=1) @ self.decoder[:, : self.width]
        if noise is None:
            return mean
        offset = math.sqrt(2 / (self.width + self.way))
        std = deviation(z @ self.decoder[:, self.width :], offset)
        return mean + jnp.mean(std * noise, axis=1)

    def step(
        self, rates: Float[Array, " d"], features: Float[Array, "way shot d"]
    ) -> Float[Array, " d"]:
        """Return the rates at which `decode`'s weights are tuned.

        The code tunes the weights of each shot, whose mean classifies, and has a derivative of
        1/K of that of the mean: so does the mean move.
        """
        return rates / features.shape[1]

    def model(self, weights: Float[Array, "way d"]) -> Model:
        """The classifier of these weights."""
        return self.template.model(
            [weights.T if len(shape) == 2 else jnp.zeros(shape, weights.dtype)
             for shape in self.template.shapes]
        )  # fmt: skip


class TaskCode(eqx.Module):
    """One code for the task, all the weights of a network.

        e_i = f([x_i, y_i])                     encoder
        (m, u) = mean_ij g([e_i, e_j])          relation
        m' = h(z) A,   u' = h(z) B              decoder
        w = m' + σ' ∘ ε'                        all parameters of the model, in one vector

    f, g and h are perceptrons with biases, as A and B have them. That of A starts at the model,
    so that codes move what is generated away from it; the offsets of σ' are the Glorot scales
    `√(2 / (in + out))` of the model's matrices, and for other arrays, which start at 0, `1e-3`.

    Args:
        model: the network whose weights are generated. The first of its matrices has as many
            rows as inputs, the last as many columns as outputs.
        latent: width of the code.
        prior: `"random"` draws the code from N(0, 1) whatever the support.
        hidden: widths of the hidden layers of encoder, relation and decoder. The encoder gives as
            many features as its last hidden layer has.
        key: of the initialisation.
        activation: of the three; ReLU by default.
        train_only: which parameters are generated; see `LEO`.

    Raises:
        ValueError: for a model without matrices.
    """

    encoder: Perceptron
    relation: Perceptron
    decoder: Perceptron
    mean: Layer
    spread: Layer
    template: Template
    latent: int = eqx.field(static=True)
    prior: str = eqx.field(static=True)
    sizes: tuple[int, int] = eqx.field(static=True)
    activation: Activation = eqx.field(static=True)
    scaled: ClassVar[bool] = True
    alike: ClassVar[str] = "all codes are within {:.1e}"

    def __init__(
        self,
        model: Model,
        latent: int,
        prior: str,
        *,
        hidden: Widths,
        key: PRNGKeyArray,
        activation: Activation = jax.nn.relu,
        train_only: tree.Predicate | None = None,
    ):
        self.template, chosen = Template.of(model, train_only)
        shapes = [leaf.shape for leaf in jax.tree.leaves(tree.parameters(model))]
        matrices = [shape for shape in shapes if len(shape) == 2]
        if not matrices:
            raise ValueError(
                "LEO reads the widths of inputs and targets from the model's matrices, and its "
                f"parameters have shapes {shapes}; give it an MLP"
            )
        self.sizes = (matrices[0][0], matrices[-1][1])
        self.latent, self.prior, self.activation = latent, prior, activation
        keys = jax.random.split(key, 5)
        (*first, features), second, (*third, last) = hidden
        start = jnp.concatenate([leaf.ravel() for leaf in chosen])
        self.encoder = _perceptron(keys[0], sum(self.sizes), *first, features)
        self.relation = _perceptron(keys[1], 2 * features, *second, 2 * latent)
        self.decoder = _perceptron(keys[2], latent, *third, last)
        self.mean = _layer(keys[3], last, start.size)._replace(bias=start)
        self.spread = _layer(keys[4], last, start.size)

    @property
    def count(self) -> int:
        """Number of parameters that are generated."""
        return sum(math.prod(shape) for shape in self.template.shapes)

    @property
    def rows(self) -> Float[Array, "hidden count2"]:
        """Matrix whose rows are regularised: the decoder's last matrices, side by side."""
        return jnp.concatenate([self.mean.weight, self.spread.weight], axis=1)

    @property
    def rates(self) -> tuple[int, ...]:
        """Shape of the rates of fine-tuning: one for each parameter."""
        return (self.count,)

    def features(self, support: Batch) -> Float[Array, "n inputs"]:
        """Inputs beside targets, one-hot if they are labels."""
        x, y, (inputs, outputs) = support.x, support.targets, self.sizes
        if jnp.issubdtype(y.dtype, jnp.integer):
            y = jax.nn.one_hot(y, outputs, dtype=x.dtype)
        x, y = (a.reshape(len(a), -1) for a in (x, y))
        if support.size == 0 or (x.shape[1], y.shape[1]) != self.sizes:
            raise ValueError(
                f"the support has {len(x)} examples with inputs of width {x.shape[1]} and targets "
                f"of width {y.shape[1]}, and LEO was made for widths {inputs} and {outputs}, those "
                "of the model it was given"
            )
        found = jnp.concatenate([x, y], axis=1)
        check_finite(found, "support")
        return found

    def check_query(self, query: Batch) -> None:
        """Queries are what the network that is generated takes."""

    def encode(self, x: Float[Array, "n inputs"], weight: Weight = None) -> Codes:
        """Return mean and σ of the code, `(l,)`; pairs count what their examples do."""
        if self.prior == "random":
            return jnp.zeros(self.latent, x.dtype), jnp.ones(self.latent, x.dtype)
        e = self.encoder(x, self.activation)
        pairs = jnp.concatenate([jnp.repeat(e, len(e), axis=0), jnp.tile(e, (len(e), 1))], axis=1)
        related = self.relation(pairs, self.activation)
        if weight is None:
            mean, u = jnp.split(jnp.mean(related, axis=0), 2)
        else:
            both = jnp.outer(weight, weight).ravel()
            mean, u = jnp.split(both @ related / jnp.maximum(jnp.sum(both), 1e-12), 2)
        return mean, deviation(u)

    def apart(self, mean: Float[Array, " l"]) -> Float[Array, " l"]:
        """Return how far the code is from none."""
        return jnp.abs(mean)

    def noise(self, key: PRNGKeyArray, z: Float[Array, " l"]) -> Float[Array, " count"]:
        """What `decode` takes."""
        return jax.random.normal(key, (self.count,), z.dtype)

    def decode(
        self, z: Float[Array, " l"], noise: Float[Array, " count"] | None
    ) -> Float[Array, " count"]:
        """All weights of the model in one vector; their mean without noise."""
        features = self.activation(self.decoder(z[None], self.activation))
        (mean,) = self.mean(features)
        if noise is None:
            return mean
        (u,) = self.spread(features)
        scale = lambda s: math.sqrt(2 / sum(s)) if len(s) == 2 else 1e-3  # noqa: E731
        offsets = [jnp.full(math.prod(s), scale(s), z.dtype) for s in self.template.shapes]
        return mean + deviation(u, jnp.concatenate(offsets)) * noise

    def step(
        self, rates: Float[Array, " count"], features: Float[Array, "n inputs"]
    ) -> Float[Array, " count"]:
        """Return the rates at which the weights are tuned."""
        return rates

    def model(self, weights: Float[Array, " count"]) -> Model:
        """The model of these weights."""
        ends = [0]
        for shape in self.template.shapes:
            ends.append(ends[-1] + math.prod(shape))
        parts = zip(ends, ends[1:], self.template.shapes, strict=False)
        return self.template.model([weights[a:b].reshape(shape) for a, b, shape in parts])


GENERATORS: dict[str, Any] = {"class": ClassCodes, "task": TaskCode}
"""Generators by what there is a code for."""


def check_embeddings(batch: Batch, width: int, name: str) -> None:
    """That a batch holds embeddings of a width, and labels.

    Args:
        batch: of a task.
        width: of the embeddings.
        name: what the task calls it.

    Raises:
        ValueError: if not, or if there is a NaN among embeddings that are known.
    """
    if jnp.ndim(batch.x) != 2 or batch.x.shape[1] != width:
        raise ValueError(
            f"the {name} has embeddings of shape {jnp.shape(batch.x)}, and LEO was made for "
            f"(n, {width}); give it embeddings of one width, that of its model"
        )
    if not jnp.issubdtype(batch.y.dtype, jnp.integer) or batch.y.shape != batch.x.shape[:1]:
        raise ValueError(
            f"the {name} has {batch.y.dtype} targets of shape {batch.y.shape}; with a code for "
            f"each class LEO wants integer labels, {batch.x.shape[:1]}"
        )
    check_finite(batch.x, name)


def check_finite(x: Float[Array, ...], name: str) -> None:
    """That an array has no NaN or infinity, where its values are known.

    Args:
        x: the array.
        name: what the task calls it.

    Raises:
        ValueError: if it has.
    """
    finite = jnp.all(jnp.isfinite(x))
    if not isinstance(finite, jax.core.Tracer) and not finite:
        bad = int(jnp.sum(~jnp.all(jnp.isfinite(x), axis=-1)))
        raise ValueError(
            f"{bad} of the {len(x)} examples of the {name} hold NaN or infinity; remove them from "
            "the data"
        )


def all_finite(*arrays: Float[Array, ...]) -> Bool[Array, ""]:
    """Whether all arrays are finite."""
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(a)) for a in arrays]))

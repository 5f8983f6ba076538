"""What experiments name beside learners and tasks: losses, networks, optimizers; their settings.

`checked_*` say which settings are known, and `make_*` make the thing that they describe.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from .. import inner, losses, models, rl, tree
from ..algorithms.gaussian import gamma_prior, gaussian_nll
from ..algorithms.maml import MAML
from ..algorithms.shared_head import SharedHead
from ..engine.steps import Outer
from ..learner import MetaLearner
from ..losses import Loss
from ..task import Model
from . import schema, table
from .schema import Known
from .table import Family, Learner

LOSSES: dict[str, Loss] = {
    "mse": losses.mse,
    "relative_mse": losses.relative_mse,
    "normal": losses.normal,
    "predictive_nll": losses.predictive_nll,
    "cross_entropy": losses.cross_entropy,
    "gaussian": gaussian_nll,
    **rl.OBJECTIVES,
}
USUAL = {"regression": "mse", "classification": "cross_entropy", "environment": "log_prob"}
"""The loss of a kind of tasks where none is named."""

ACTIVATIONS = {"relu": jax.nn.relu, "tanh": jnp.tanh}


def Pretrained(loss: Loss, inner_lr: inner.Rate = 0.01, **how: Any) -> MAML:
    """The baseline without meta-learning: joint training on all tasks, then fine-tuning.

    MAML with no inner step while training; `eval_steps` are the steps of fine-tuning.
    """
    return MAML(loss, inner_lr, 0, **how)


# Learners


def known_of(row: Learner, family: Family) -> Known:
    """Return the settings of a learner but for its loss."""
    make = row.maker(family)
    known = dict(schema.taken(make, ("loss",)))
    arguments = inspect.signature(make).parameters
    forwarding = any(one.kind is one.VAR_KEYWORD for one in arguments.values())
    takes = lambda name: name in arguments or forwarding  # noqa: E731
    if takes("inner_optimizer"):
        known |= {"inner_adam": (float, None), "inner_optimizer": (Mapping[str, Any], None)}
    if takes("adapt_only"):
        known |= {"adapt_only": (str, None), "adapt_everything": (bool, None)}
    if takes("train_only"):
        known["train_only"] = (str, None)
    if family.kind == "environment" and "kernel" in arguments:
        known["kernel"] = (Literal[tuple(rl.KERNELS)], None)
    if "adapt_only" in known and "head" not in known:
        known |= {"head": (Literal["free", "tied", "zero"], "free"), "head_path": (str, "head")}
    return {name: one for name, one in known.items() if name not in row.sets}


def checked_learner(row: Learner, family: Family, values: Any) -> dict[str, Any]:
    """Return the settings of a learner as it takes them.

    Raises:
        ValueError: naming the setting that is wrong.
    """
    known = dict(known_of(row, family))
    known["loss"] = (Literal[tuple(LOSSES)], None)
    kind = values.get("loss") if isinstance(values, Mapping) else None
    loss = LOSSES.get(kind) if isinstance(kind, str) else LOSSES[USUAL[family.kind]]
    if loss is not None:
        of_loss = schema.taken(loss)
        known |= {name: of_loss[name] for name in ("reduction", "noise") if name in of_loss}
    found = schema.checked("learner", values, known)
    if "inner_optimizer" in found:
        found["inner_optimizer"] = _checked_rule(
            "learner.inner_optimizer", found["inner_optimizer"]
        )
    if len(rules := INNER & found.keys()) > 1:
        raise ValueError(f"learner names {' and '.join(sorted(rules))}; one of them is the rule")
    return found


INNER = frozenset({"inner_lr", "inner_adam", "inner_optimizer"})
"""Settings of a learner that exclude each other: the inner rule."""


def make_learner(
    row: Learner, family: Family, settings: Mapping[str, Any], way: int | None
) -> MetaLearner:
    """Make a learner."""
    make, arguments = row.maker(family), dict(settings)
    taken = inspect.signature(make).parameters
    kind = arguments.pop("loss", USUAL[family.kind])
    how = {name: arguments.pop(name) for name in ("reduction", "noise") if name in arguments}
    arguments["loss"] = functools.partial(LOSSES[kind], **how) if how else LOSSES[kind]
    if kind == "gaussian" and "prior" in taken and "chase" in taken:
        # The posterior of BMAML's paper; the chaser loss leaves the precisions out.
        arguments["prior"] = gamma_prior
        if arguments.get("objective", "chaser") == "chaser":
            arguments["chase"] = tree.under("model")
    if "inner_adam" in arguments:
        arguments["inner_optimizer"] = inner.adam(arguments.pop("inner_adam"))
    elif "inner_optimizer" in arguments:
        arguments["inner_optimizer"] = make_rule(arguments["inner_optimizer"])
    if arguments.pop("adapt_everything", False):
        arguments["adapt_only"] = tree.every
    for name in ("adapt_only", "train_only"):
        if isinstance(arguments.get(name), str):
            arguments[name] = tree.under(arguments[name])
    if family.kind == "environment" and "kernel" in taken:
        arguments["kernel"] = rl.KERNELS[arguments.get("kernel", "code")]
    if "way" in taken and taken["way"].default is not None:  # others ask the tasks
        arguments.setdefault("way", way)
    shared = {}
    if "head" not in taken:
        shared = {name: arguments.pop(name) for name in ("head", "head_path") if name in arguments}
    made = call(make, arguments, f"algorithm {row.title}")
    return made if shared.get("head", "free") == "free" else SharedHead(made, **shared)


# Networks


@dataclasses.dataclass(frozen=True)
class Network:
    """A kind of network.

    Args:
        setting: what the setting of its name is.
        makers: what takes the other settings.
        argument: where that goes which the setting of its name says.
        given: other arguments that the tasks determine.
    """

    setting: Any
    makers: tuple[Callable[..., Model], ...]
    argument: str
    given: tuple[str, ...] = ()


NETWORKS: dict[str, Network] = {
    "mlp": Network(Sequence[int], (models.MLP,), "hidden", ("out_size",)),
    "conv4": Network(Literal[tuple(models.CONV4)], (models.Conv4,), "", ("out",)),
    "linear": Network(int, (models.Linear,), "in_size", ("out_size",)),
    "policy": Network(
        Sequence[int],
        (rl.CategoricalMLP, rl.GaussianMLP),
        "hidden",
        ("observation_size", "action_size"),
    ),
    "model": Network(str, (), "", ("out", "in_size", "key")),
}
"""Kinds of networks; `model` is one of the user's own, `my_module:make`."""


def checked_network(family: Family, values: Any) -> dict[str, Any]:
    """Return the settings of a network as it takes them.

    Raises:
        ValueError: naming the setting that is wrong.
    """
    acting = family.kind == "environment"
    here = ["policy", "model"] if acting else [one for one in NETWORKS if one != "policy"]
    kinds = NETWORKS.keys() & (values if isinstance(values, Mapping) else ())
    if len(kinds) != 1 or not kinds <= set(here):
        raise ValueError(
            f"network should name one of {', '.join(here[:-1])} and {here[-1]}, and names "
            f"{', '.join(sorted(kinds)) or 'none'}"
        )
    (kind,) = kinds
    row, makers = NETWORKS[kind], NETWORKS[kind].makers
    if kind == "model":
        table.check_own(values[kind], "network of your own, my_module:make", ())
        makers = (table.load(values[kind]),)
    known: dict[str, Any] = {kind: (row.setting, None)}
    for make in makers:
        known |= schema.taken(make, (*row.given, row.argument))
    if kind in ("mlp", "policy"):
        known["activation"] = (Literal[tuple(ACTIVATIONS)], None)
    found = schema.checked("network", values, known)
    for name, value in found.items():
        sizes = value if isinstance(value, list | tuple) else [value]
        if name != "context" and any(type(one) is int and one < 1 for one in sizes):
            raise ValueError(f"network.{name} is {value}; expected 1 or more")
    return found


def make_network(
    settings: Mapping[str, Any],
    *,
    key: Any,
    out: int,
    in_size: int,
    image: tuple[int, int, int],
    env: Callable[[], rl.Environment],
) -> Model:
    """Make an untrained network.

    Args:
        settings: of the network.
        key: the randomness of its initialisation.
        out: outputs.
        in_size: width of the inputs, if they are no images.
        image: shape of the images.
        env: returns the environment.
    """
    (kind,) = NETWORKS.keys() & settings
    arguments = {"key": key, **settings}
    setting = arguments.pop(kind)
    if "activation" in arguments:
        arguments["activation"] = ACTIVATIONS[arguments["activation"]]
    if NETWORKS[kind].argument:
        arguments[NETWORKS[kind].argument] = setting
    match kind:
        case "policy":
            on = env()
            make: Callable[..., Model] = rl.CategoricalMLP if on.discrete else rl.GaussianMLP
            arguments |= {"observation_size": on.observation_size, "action_size": on.action_size}
        case "linear":
            make, arguments = models.Linear, {"out_size": out, **arguments}
        case "conv4":
            given = {**models.CONV4[setting], "image": image, **arguments}
            make, arguments = models.Conv4, {**given, "image": tuple(given["image"]), "out": out}
        case "mlp":
            make, arguments = models.MLP, {"in_size": in_size, **arguments, "out_size": out}
        case _:
            make = table.load(setting)
            given = {"out": out, "in_size": in_size, "key": key}
            taken = inspect.signature(make).parameters
            arguments |= given
            arguments = {n: v for n, v in arguments.items() if n not in given or n in taken}
    return call(make, arguments, "the network")


# Optimizers

OUTER = {"trpo": rl.TRPO, "ppo": rl.PPO}
"""Outer steps of their own kind, for environments."""


@functools.cache
def optimizers() -> dict[str, Callable[..., optax.GradientTransformation]]:
    """Return optax's optimizers by name: those that are given a step size and ask for gradients."""
    found = {}
    for name, make in vars(optax).items():
        rule = inspect.isfunction(make) or isinstance(make, functools.partial)
        old = hasattr(optax, f"{name}_v2")  # deprecated
        if rule and not old and not name.startswith(("_", "scale_by", "lbfgs")):
            taken = [*inspect.signature(make).parameters]
            if taken[:1] == ["learning_rate"] and "key" not in taken:
                found[name] = make
    return dict(sorted(found.items()))


def rules() -> set[str]:
    """Return the names of outer rules, which exclude each other."""
    return {*OUTER, *optimizers()}


def checked_outer(family: Family, values: Any) -> dict[str, Any]:
    """Return the settings of the outer loop as it takes them.

    Raises:
        ValueError: naming the setting that is wrong.
    """
    acting = family.kind == "environment"
    named = sorted(rules() & (values if isinstance(values, Mapping) else {}).keys())
    if len(named) > 1:
        raise ValueError(f"outer names {' and '.join(named)}; one of them is the rule")
    if not named:
        others = rules() if acting else optimizers()
        known: dict[str, Any] = {"clip": (float, None)} | dict.fromkeys(
            sorted(others), (float, None)
        )
        return schema.checked("outer", values, known)
    (rule,) = named
    if rule in OUTER and not acting:
        raise ValueError(f"outer.{rule} is for environments; expected an optimizer, such as adam")
    known = {rule: (float, None), **_arguments_of(rule)}
    if rule == "trpo":
        known["each"] = (bool, None)
    elif rule not in OUTER:
        known["clip"] = (float, None)
    return schema.checked("outer", values, known)


def _arguments_of(rule: str) -> Known:
    """Return the further settings of a rule; of optax's, those that are switches or numbers."""
    if rule in OUTER:
        return schema.taken(OUTER[rule], ("max_kl",))
    known: dict[str, Any] = {}
    for name, one in inspect.signature(optimizers()[rule]).parameters.items():
        kinds = (one.annotation, *typing.get_args(one.annotation))
        kind: Any = bool if bool in (one.annotation, type(one.default)) else None
        kind = kind or next((kind for kind in (float, int) if kind in kinds), None)
        if kind is not None and name != "learning_rate":
            known[name] = (kind if one.default is not None else kind | None, one.default)
    return known


def _checked_rule(where: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return an inner rule, `{"sgd": rate, "momentum": …}`, as it is made."""
    named = sorted(optimizers().keys() & values)
    if len(named) != 1:
        raise ValueError(
            f"{where} should name one optimizer with its step size, such as "
            f'{{"sgd": 0.1}}, and names {" and ".join(named) or "none"}; '
            + table.one_of(next(iter(values), ""), optimizers())
        )
    return schema.checked(where, values, {named[0]: (float, None), **_arguments_of(named[0])})


def make_rule(settings: Mapping[str, Any]) -> optax.GradientTransformation:
    """Make one of optax's optimizers: `{"sgd": rate, "momentum": …}`."""
    (name,) = optimizers().keys() & settings
    arguments = dict(settings)
    return call(optimizers()[name], {"learning_rate": arguments.pop(name), **arguments}, name)


def make_optimizer(outer: Mapping[str, Any]) -> optax.GradientTransformation | None:
    """Make the outer optimizer; `None` for the learner's own, and for steps of another kind."""
    if not outer or OUTER.keys() & outer:
        return None
    arguments = dict(outer)
    clip = [optax.clip(arguments.pop("clip"))] if "clip" in arguments else []
    return optax.chain(*clip, make_rule(arguments or {"adam": 1e-3}))


def make_outer_step(outer: Mapping[str, Any]) -> Outer | None:
    """Make the outer step of its own kind: `adaptax.rl.TRPO`, `ParticleTRPO` or `PPO`."""
    arguments = dict(outer)
    if "ppo" in arguments:
        rule = optax.adam(arguments.pop("ppo"))
        return call(rl.PPO, {"optimizer": rule, **arguments}, "PPO")
    if "trpo" not in arguments:
        return None
    arguments["max_kl"], each = arguments.pop("trpo"), arguments.pop("each", False)
    step = call(rl.TRPO, arguments, "TRPO")
    return rl.ParticleTRPO(step) if each else step


def call(function: Callable[..., Any], arguments: Mapping[str, Any], what: str) -> Any:
    """Return `function(**arguments)`, its complaint about their names in words."""
    try:
        return function(**arguments)
    except TypeError as error:
        if "argument" not in str(error):
            raise
        raise ValueError(f"{what}: {error}") from error

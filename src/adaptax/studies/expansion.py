"""The expansion of meta-gradients, measured for the family on two kinds of tasks."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array

from .. import losses, models, tasks
from ..algorithms.maml import FOMAML, MAML
from ..algorithms.reptile import Reptile
from ..learner import Functional, MetaLearner
from ..losses import Loss
from ..report import analysis
from ..task import Model, TaskDistribution
from .gradients import DRAWINGS, SHOT, WAY
from .study import Lab, Row, Study
from .taylor import RATES, Expansion, taylor_coefficients

LEARNERS: dict[str, tuple[str, Callable[[Loss, int], MetaLearner]]] = {
    "sgd": ("joint SGD", lambda loss, k: MAML(loss, inner_steps=0)),
    "maml": ("MAML", lambda loss, k: MAML(loss, inner_steps=k - 1)),
    "fomaml": ("FOMAML", lambda loss, k: FOMAML(loss, inner_steps=k - 1)),
    "reptile": ("Reptile", lambda loss, k: Reptile(loss, inner_steps=k)),
}
"""How a learner is written, and the one that sees k minibatches."""


def analyze_taylor(
    tasks: Literal["sinusoid", "omniglot"] = "sinusoid",
    *,
    learners: Sequence[str] = (),
    minibatches: Sequence[int] = (),
    rates: Sequence[float] = (),
    count: int | None = None,
    orderings: int | None = None,
    relu: bool = False,
    seed: int = 0,
    **where: Any,
) -> Study:
    """Measure the two leading terms of the meta-gradients of several learners, in float64.

    Args:
        tasks: sinusoids, with a tanh network, or Omniglot, with Reptile's.
        learners: names in `LEARNERS`; all if empty.
        minibatches: k, of a task; 2, 3 and 4 if empty, or 2 and 3 of Omniglot.
        rates: inner step sizes; `RATES` if empty.
        count: tasks to sample; 8 if `None`, or 4 of Omniglot.
        orderings: orders of the minibatches to draw for each task; all if `None`.
        relu: leave Reptile's network its ReLU, for which softplus stands otherwise.
        seed: names network, tasks and orders.
        where: `out`, `data_root` and `progress` of `Lab.at`.

    Raises:
        ValueError: for learners, numbers of minibatches or options that there are not.
    """
    lab = Lab.at(f"analyze-taylor-{tasks}", **where)
    sinusoid = tasks == "sinusoid"
    counts = minibatches or ((2, 3, 4) if sinusoid else (2, 3))
    rates, names = rates or RATES, learners or tuple(LEARNERS)
    _check(sinusoid, names, counts, relu or lab.data_root is not None)
    with jax.enable_x64(True):
        network, model, loss = _network(sinusoid, relu, seed)
        sampled = {k: _tasks(sinusoid, k, lab.data_root) for k in counts}
        measured: dict[str, list[Expansion]] = {LEARNERS[name][0]: [] for name in names}
        pairs = [(*LEARNERS[name], k) for k in counts for name in names]
        with lab.progress.scoring("expanding", len(pairs)) as watch:
            for done, (name, make, k) in enumerate(pairs, 1):
                expansion = taylor_coefficients(
                    make(loss, k), model, sampled[k], key=jax.random.key(seed), rates=rates,
                    count=count or (8 if sinusoid else 4), minibatches=k, orderings=orderings,
                )  # fmt: skip
                measured[name].append(expansion)
                watch(done)
    note = (
        f"{network}, not trained, float64; {expansion.tasks} tasks, ± is a standard error over "
        f"them; the order is that of the residual in α = {', '.join(f'{r:g}' for r in rates)}."
    )
    said = {name: [one.to_json() for one in each] for name, each in measured.items()}
    title = f"Expected meta-gradients of {tasks}, α = {min(rates):g}"
    return Study(
        "taylor",
        lab,
        [Row(name, each) for name, each in measured.items()],
        analysis.expansion_table(measured, title),
        lambda: {"taylor": analysis.expansions(measured)},
        {"tasks": sampled[counts[0]].describe(), "network": network, "expansions": said},
        [note],
    )


def _check(sinusoid: bool, names: Sequence[str], counts: Sequence[int], of_images: bool) -> None:
    for name in names:
        if name not in LEARNERS:
            raise ValueError(f"{name!r} has no expansion here; there are {', '.join(LEARNERS)}")
    most = 6 if sinusoid else DRAWINGS // SHOT
    if min(counts) < 2 or max(counts) > most:
        raise ValueError(
            f"--minibatches {' '.join(map(str, counts))} should be 2 to {most} of a task "
            f"of {'sinusoid' if sinusoid else 'omniglot'}"
        )
    if sinusoid and of_images:
        raise ValueError("sinusoids have no data and a tanh network; leave out --data-root, --relu")


def _network(sinusoid: bool, relu: bool, seed: int) -> tuple[str, Model, Loss]:
    """Return what it is called, the untrained network, and its loss."""
    key = jax.random.key(seed)
    if sinusoid:
        return "MLP 1-40-40-1, tanh", models.MLP(1, 1, key=key, activation=jnp.tanh), losses.mse
    net = models.Conv4(WAY, key=key, **models.CONV4["reptile omniglot"])
    if relu:
        return "Reptile's Omniglot network", net, losses.cross_entropy
    smooth = Functional(net, functools.partial(_smooth, jax.nn.softplus))
    return "Reptile's Omniglot network with softplus for ReLU", smooth, losses.cross_entropy


def _smooth(activation: Callable[[Array], Array], net: models.Conv4, x: Array) -> Array:
    """Predict with another activation: ReLU has kinks, where there is no expansion."""
    for conv, norm in net.blocks:
        x = activation(norm(conv(x)))
    return net.head(x.reshape(len(x), -1))


def _tasks(sinusoid: bool, k: int, data_root: str | None) -> TaskDistribution:
    """Return tasks whose support is k minibatches: of 10 points, or of 25 images."""
    if sinusoid:
        return tasks.sinusoid(shot=10 * k, query=0).train
    return tasks.omniglot(
        WAY, SHOT, 1, train_shot=SHOT * k, train_query=0, protocol="reptile", data_root=data_root
    ).train

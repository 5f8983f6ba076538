"""An experiment as data: everything that a run needs, in JSON, and the objects it describes."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax

from .. import inner, losses, models, tasks, tree
from ..algorithms.maml import ANIL, FOMAML, MAML, MetaSGD
from ..algorithms.reptile import Reptile
from ..evaluate import Evaluator, Report
from ..learner import Meta, MetaLearner
from ..run import Run
from ..task import Model, Splits
from ..train import Result, fit

ALGORITHMS: dict[str, Callable[..., MetaLearner]] = {
    "maml": MAML,
    "fomaml": FOMAML,
    "anil": ANIL,
    "meta-sgd": MetaSGD,
    "reptile": Reptile,
}
TASKS: dict[str, Callable[..., Splits]] = {
    "sinusoid": tasks.sinusoid,
    "omniglot": tasks.omniglot,
    "mini_imagenet": tasks.mini_imagenet,
    "glyphs": tasks.glyphs,
    "folder": tasks.folder,
}


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What to train on what, and how to judge it.

    Args:
        algorithm: a name in `ALGORITHMS`.
        tasks: a name in `TASKS`.
        task: arguments of the task family: way, shot, query, ….
        network: `{"mlp": [hidden…], …}` or `{"conv4": preset, …}`, with further arguments.
        learner: arguments of the learner; `inner_adam` stands for an inner rule, Adam without
            momentum at that rate, and `reduction` for that of the loss.
        outer: the outer optimizer: `{"adam": rate, "clip": bound}`, either may be missing; the
            learner's own if empty.
        steps: meta-steps.
        meta_batch: tasks a meta-step.
        evaluation: arguments of `evaluate`.
        test_task: arguments of the task family that differ in the test: `{"shot": 5}`.
        seed: names the random stream.
    """

    algorithm: str
    tasks: str
    task: Mapping[str, Any]
    network: Mapping[str, Any]
    learner: Mapping[str, Any]
    steps: int
    meta_batch: int
    outer: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    evaluation: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    test_task: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    seed: int = 0

    def __post_init__(self) -> None:
        for kind, name, known in (
            ("algorithm", self.algorithm, ALGORITHMS),
            ("task family", self.tasks, TASKS),
        ):
            if name not in known:
                raise ValueError(f"{name!r} is no {kind}; there are {', '.join(known)}")

    def to_json(self) -> dict[str, Any]:
        """The experiment as JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Experiment:
        """The experiment that `to_json` described.

        Raises:
            ValueError: if fields are missing or unknown.
        """
        try:
            return cls(**values)
        except TypeError as error:
            raise ValueError(f"this does not describe an experiment: {error}") from None

    def splits(self, data_root: str | None = None, *, test: bool = False) -> Splits:
        """The task distributions; with `test`, those of the test episodes."""
        arguments = {**self.task, **(self.test_task if test else {})}
        if data_root is not None and self.tasks in ("omniglot", "mini_imagenet"):
            arguments["data_root"] = data_root
        return TASKS[self.tasks](**arguments)

    def model(self) -> Model:
        """The untrained network, as the seed initialises it."""
        key = jax.random.key(self.seed)
        network = dict(self.network)
        if "conv4" in network:
            preset = models.CONV4[network.pop("conv4")]
            network = {**preset, **network}
            if "image" in network:
                network["image"] = tuple(network["image"])
            return models.Conv4(self.task["way"], key=key, **network)
        in_size, hidden = network.pop("in_size", 1), network.pop("mlp")
        return models.MLP(in_size, self.task.get("way", 1), hidden, key=key, **network)

    def build_learner(self) -> MetaLearner:
        """The learner."""
        arguments = dict(self.learner)
        base = losses.mse if self.tasks == "sinusoid" else losses.cross_entropy
        reduction = arguments.pop("reduction", "mean")
        loss = base if reduction == "mean" else functools.partial(base, reduction=reduction)
        if "inner_adam" in arguments:
            arguments["inner_optimizer"] = inner.adam(arguments.pop("inner_adam"))
        if arguments.pop("adapt_everything", False):
            arguments["adapt_only"] = tree.every
        return ALGORITHMS[self.algorithm](loss, **arguments)

    def optimizer(self) -> optax.GradientTransformation | None:
        """The outer optimizer; `None` for the learner's own."""
        if not self.outer:
            return None
        clip = [optax.clip(self.outer["clip"])] if "clip" in self.outer else []
        return optax.chain(*clip, optax.adam(self.outer.get("adam", 1e-3)))

    def train(self, splits: Splits, run: Run | None = None, **how: Any) -> Result:
        """Meta-train; `how` are further arguments of `adaptax.fit`."""
        return fit(
            self.build_learner(),
            self.model(),
            splits.train,
            steps=self.steps,
            meta_batch=self.meta_batch,
            key=jax.random.key(self.seed),
            optimizer=self.optimizer(),
            run=run,
            **how,
        )

    def test(self, meta: Meta, splits: Splits, **how: Any) -> Report:
        """Score on the test split; `how` overrides `evaluation`."""
        how = {**self.evaluation, **how}
        # A stream apart from training's, and the same for every experiment.
        return Evaluator(self.build_learner(), splits.test, **how)(meta, key=jax.random.key(2**31))

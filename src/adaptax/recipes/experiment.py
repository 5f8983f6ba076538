"""An experiment as data: everything that a run needs, in JSON, and the objects it describes."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

from .. import inner, io, losses, models, tasks, tree
from ..algorithms.checkpoint_ensemble import CheckpointEnsemble
from ..algorithms.maml import ANIL, FOMAML, MAML, MetaSGD
from ..algorithms.maml_plus_plus import MAMLPlusPlus
from ..algorithms.reptile import Reptile
from ..evaluate import Evaluator, Report
from ..learner import Meta, MetaLearner
from ..losses import Loss
from ..run import Run
from ..task import Model, Source, Splits
from ..train import Result, best_of, fit, initial_state


def Pretrained(loss: Loss, inner_lr: inner.Rate = 0.01, **how: Any) -> MAML:
    """The baseline without meta-learning: joint training on all tasks, then fine-tuning.

    MAML with no inner step while training; `eval_steps` are the steps of fine-tuning.
    """
    return MAML(loss, inner_lr, 0, **how)


class _AtRate(MetaLearner):
    """A learner whose step size is part of what it is given, so that one program tries many."""

    loss: Loss = eqx.field(static=True)
    learner: Any

    def iterates(self, meta: Meta, support: Source, **how: Any) -> Model:
        model, rate = meta
        return dataclasses.replace(self.learner, inner_lr=rate).iterates(model, support, **how)


ALGORITHMS: dict[str, Callable[..., MetaLearner]] = {
    "maml": MAML,
    "fomaml": FOMAML,
    "anil": ANIL,
    "meta-sgd": MetaSGD,
    "maml++": MAMLPlusPlus,
    "reptile": Reptile,
    "pretrained": Pretrained,
}
TITLES = {
    "maml": "MAML",
    "fomaml": "FOMAML",
    "anil": "ANIL",
    "meta-sgd": "Meta-SGD",
    "maml++": "MAML++",
    "reptile": "Reptile",
    "pretrained": "Pretrained",
}
"""How reports and plots write the algorithms."""
TASKS: dict[str, Callable[..., Splits]] = {
    "sinusoid": tasks.sinusoid,
    "omniglot": tasks.omniglot,
    "mini_imagenet": tasks.mini_imagenet,
    "glyphs": tasks.glyphs,
    "folder": tasks.folder,
}
ACTIVATIONS = {"relu": jax.nn.relu, "tanh": jnp.tanh}


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What to train on what, and how to judge it.

    Args:
        algorithm: a name in `ALGORITHMS`.
        tasks: a name in `TASKS`.
        task: arguments of the task family: way, shot, query, ….
        network: `{"mlp": [hidden…], …}` or `{"conv4": preset, …}`, with further arguments; an
            activation by its name in `ACTIVATIONS`.
        learner: arguments of the learner; `inner_adam` stands for an inner rule, Adam without
            momentum at that rate, and `reduction` for that of the loss.
        outer: the outer optimizer: `{"adam": rate, "clip": bound}`, either may be missing; the
            learner's own if empty.
        steps: meta-steps.
        meta_batch: tasks a meta-step.
        evaluation: arguments of `evaluate`.
        test_task: arguments of the task family that differ in the test: `{"shot": 5}`.
        tune: step sizes of fine-tuning to choose from, after training, on validation tasks.
        keep: best checkpoints by validation to keep; with two or more their ensemble is scored
            beside the single model.
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
    tune: Sequence[float] = dataclasses.field(default_factory=list)
    keep: int = 1
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
        """The task distributions; with `test`, those of the test episodes.

        Raises:
            ValueError: if the task family does not know an argument.
        """
        arguments = {**self.task, **(self.test_task if test else {})}
        if data_root is not None and self.tasks in ("omniglot", "mini_imagenet"):
            arguments["data_root"] = data_root
        return _call(TASKS[self.tasks], arguments, f"the task family {self.tasks}")

    def model(self) -> Model:
        """The untrained network, as the seed initialises it.

        Raises:
            ValueError: if the network does not know an argument.
        """
        network = {"key": jax.random.key(self.seed), **self.network}
        if "conv4" in network:
            preset = models.CONV4[network.pop("conv4")]
            if self.tasks == "folder":
                side = self.task.get("image_size", 84)
                preset = {**preset, "image": (side, side, self.task.get("channels", 3))}
            network = {**preset, **network, "out": self.task["way"]}
            network["image"] = tuple(network.get("image", (28, 28, 1)))
            return _call(models.Conv4, network, "the network")
        network = {"in_size": 1, **network, "out_size": self.task.get("way", 1)}
        network["hidden"] = network.pop("mlp")
        if "activation" in network:
            network["activation"] = ACTIVATIONS[network["activation"]]
        return _call(models.MLP, network, "the network")

    def build_learner(self) -> MetaLearner:
        """The learner.

        Raises:
            ValueError: if the algorithm does not know an argument.
        """
        arguments = dict(self.learner)
        base = losses.mse if self.tasks == "sinusoid" else losses.cross_entropy
        reduction = arguments.pop("reduction", "mean")
        loss = base if reduction == "mean" else functools.partial(base, reduction=reduction)
        if "inner_adam" in arguments:
            arguments["inner_optimizer"] = inner.adam(arguments.pop("inner_adam"))
        if arguments.pop("adapt_everything", False):
            arguments["adapt_only"] = tree.every
        return _call(
            ALGORITHMS[self.algorithm], {"loss": loss, **arguments}, f"algorithm {self.algorithm}"
        )

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
            keep=self.keep,
            run=run,
            **how,
        )

    def test(
        self, meta: Meta, splits: Splits, *, split: str = "test", ensemble: bool = False, **how: Any
    ) -> Report:
        """Score on a split; `how` overrides `evaluation`.

        With `ensemble`, `meta` are the checkpoints that were kept.
        """
        how = {**self.evaluation, **how}
        tasks = {"test": splits.test, "val": splits.val}[split]
        learner = self.build_learner()
        learner = CheckpointEnsemble(learner.loss, learner) if ensemble else learner
        # A stream apart from training's, and the same for every experiment.
        report = Evaluator(learner, tasks, **how)(meta, key=jax.random.key(2**31))
        protocol = {
            **report.protocol, "algorithm": TITLES[self.algorithm], "trained_on": "train"
        }  # fmt: skip
        return dataclasses.replace(report, protocol=protocol)

    def tuned(self, meta: Meta, splits: Splits) -> Experiment:
        """The experiment with the step size of `tune` that does best on validation tasks."""
        if not self.tune:
            return self
        learner = self.build_learner()
        how = {**self.evaluation, "episodes": 200, "at": [self.learner["eval_steps"]]}
        judge = Evaluator(_AtRate(learner.loss, learner), splits.val, **how)
        key = jax.random.key(2**31)
        scores = [judge((meta, jnp.array(rate)), key=key).score for rate in self.tune]
        rate = self.tune[scores.index(max(scores))]
        return dataclasses.replace(self, learner={**self.learner, "inner_lr": rate})

    def untrained(self) -> Meta:
        """The meta-parameters that `train` starts from."""
        init_key = jax.random.split(jax.random.key(self.seed), 4)[2]
        return self.build_learner().init(self.model(), key=init_key)

    def restore(self, run: Run) -> tuple[Meta, int, Meta]:
        """Of a run, the best meta-parameters by validation, else the last, their step, and all
        that are kept, stacked, best first.

        Raises:
            FileNotFoundError: if the run has no checkpoint.
            ValueError: if the checkpoint is broken or of another model.
        """
        learner = self.build_learner()
        init_key = jax.random.split(jax.random.key(self.seed), 4)[2]
        optimizer = self.optimizer() or learner.optimizer(self.steps)
        state, fixed = initial_state(learner, self.model(), optimizer, init_key, self.keep)
        state = io.load(run.checkpoint_file, state)
        best, step, score, kept = best_of(state, fixed)
        if not math.isfinite(score):
            best, step = eqx.combine(state.meta, fixed), int(state.step)
        return best, step, kept


def _call(function: Callable[..., Any], arguments: Mapping[str, Any], what: str) -> Any:
    """`function(**arguments)`, its complaint about their names in words."""
    try:
        return function(**arguments)
    except TypeError as error:
        if "argument" not in str(error):
            raise
        raise ValueError(f"{what}: {error}") from error

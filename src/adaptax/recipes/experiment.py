"""An experiment as data: everything that a run needs, in JSON, and the objects it describes."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

from .. import inner, io, models, rl, tree
from ..algorithms.checkpoint_ensemble import CheckpointEnsemble
from ..algorithms.gaussian import Gaussian, gamma_prior
from ..algorithms.leo import LEORegression
from ..evaluate import Evaluator
from ..learner import Meta, MetaLearner
from ..losses import Loss
from ..run import Run
from ..task import Model, Source, Splits, TaskDistribution
from ..train import Outer, Result, best_of, fit, initial_state
from .names import (
    ACTIVATIONS,
    ALGORITHMS,
    DOWNLOADED,
    ENVIRONMENTS,
    INPUTS,
    LOSSES,
    REGRESSIONS,
    TASKS,
    TITLES,
)


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What to train on what, and how to judge it.

    Args:
        algorithm: a name in `ALGORITHMS`.
        tasks: a name in `TASKS`.
        task: arguments of the task family: way, shot, query, ….
        network: `{"mlp": [hidden…], …}`, `{"conv4": preset, …}`, `{"linear": width}` or, of
            environments, `{"policy": [hidden…], …}`, with further arguments; an activation by
            its name in `ACTIVATIONS`.
        learner: arguments of the learner; `inner_adam` stands for an inner rule, Adam without
            momentum at that rate; `loss`, with `reduction` and `noise`, for a loss by its name in
            `LOSSES`; and `adapt_only` and `train_only` for what is under a name, such as
            `"head"`.
        outer: the outer optimizer: `{"adam": rate, "clip": bound}`, either may be missing; the
            learner's own if empty; or `{"trpo": bound of the KL, …}`, with further arguments, and
            `"each": True` for a trust region of each of several policies; or `{"ppo": rate of
            Adam, "epochs": …, "clip": …}`.
        steps: meta-steps.
        meta_batch: tasks a meta-step.
        evaluation: arguments of `evaluate`.
        test_task: arguments of the task family that differ in the test: `{"shot": 5}`.
        tune: step sizes of fine-tuning to choose from, after training, on validation tasks.
        tune_noise: standard deviations to choose `evaluation["noise"]` from, likewise, by the
            likelihood.
        init_from: the experiment whose meta-parameters this one starts from, in JSON; none if
            empty.
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
    tune_noise: Sequence[float] = dataclasses.field(default_factory=list)
    init_from: Mapping[str, Any] = dataclasses.field(default_factory=dict)
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
        return json.loads(json.dumps(dataclasses.asdict(self)))

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
        if data_root is not None and self.tasks in DOWNLOADED:
            arguments["data_root"] = data_root
        return _call(TASKS[self.tasks], arguments, f"the task family {self.tasks}")

    def model(self) -> Model:
        """The untrained network, as the seed initialises it.

        Raises:
            ValueError: if the network does not know an argument.
        """
        network = {"key": jax.random.key(self.seed), **self.network}
        gaussian = self.learner.get("loss") == "gaussian"
        if "policy" in network:
            environment: Any = self.splits().train
            return _policy(environment.env, network)
        if "linear" in network:
            network = {"out_size": self.way or 1, **network}
            network["in_size"] = network.pop("linear")
            return _call(models.Linear, network, "the network")
        if "conv4" in network:
            preset = models.CONV4[network.pop("conv4")]
            if self.tasks == "folder":
                side = self.task.get("image_size", 84)
                preset = {**preset, "image": (side, side, self.task.get("channels", 3))}
            network = {**preset, **network, "out": self.way or 1}
            network["image"] = tuple(network.get("image", (28, 28, 1)))
            return _call(models.Conv4, network, "the network")
        size = INPUTS.get(self.tasks, 1)
        network = {"in_size": size, **network, "out_size": self.way or 1}
        network["hidden"] = network.pop("mlp")
        if "activation" in network:
            network["activation"] = ACTIVATIONS[network["activation"]]
        net = _call(models.MLP, network, "the network")
        return Gaussian(net) if gaussian else net

    @property
    def eval_steps(self) -> int:
        """Steps that the learner adapts for in a test; 0 for those that take none."""
        if self.algorithm in ("ridge", "class-mean"):
            return 0
        if self.algorithm == "leo":
            return sum(self.learner.get(name, 5) for name in ("inner_steps", "finetune_steps"))
        return self.learner.get("eval_steps", self.learner.get("inner_steps", 1))

    @property
    def episodes(self) -> int:
        """Test episodes; of environments, goals."""
        return self.evaluation.get("goals" if self.tasks in ENVIRONMENTS else "episodes", 600)

    @property
    def way(self) -> int | None:
        """Classes of a task; `None` for regressions."""
        if self.tasks in REGRESSIONS:
            return None
        return self.task.get("way", 2)

    def build_learner(self) -> MetaLearner:
        """The learner.

        Raises:
            ValueError: if the algorithm does not know an argument.
        """
        arguments = dict(self.learner)
        usual = "mse" if self.way is None else "cross_entropy"
        kind = arguments.pop("loss", "log_prob" if self.tasks in ENVIRONMENTS else usual)
        if kind not in LOSSES:
            raise ValueError(f"{kind!r} is no loss; there are {', '.join(LOSSES)}")
        how = {name: arguments.pop(name) for name in ("reduction", "noise") if name in arguments}
        loss = functools.partial(LOSSES[kind], **how) if how else LOSSES[kind]
        if kind == "gaussian" and self.algorithm == "bmaml":
            # The posterior of the paper; the chaser loss leaves the precisions out.
            arguments["prior"] = gamma_prior
            if arguments.get("objective", "chaser") == "chaser":
                arguments["chase"] = tree.under("model")
        if "inner_adam" in arguments:
            arguments["inner_optimizer"] = inner.adam(arguments.pop("inner_adam"))
        if arguments.pop("adapt_everything", False):
            arguments["adapt_only"] = tree.every
        for name in ("adapt_only", "train_only"):
            if isinstance(arguments.get(name), str):
                arguments[name] = tree.under(arguments[name])
        make = ALGORITHMS[self.algorithm]
        if self.algorithm == "bmaml" and self.tasks in ENVIRONMENTS:
            make = rl.BayesianMAML
            kernel = arguments.get("kernel", "code")
            if kernel not in rl.KERNELS:
                raise ValueError(f"{kernel!r} is no kernel; there are {', '.join(rl.KERNELS)}")
            arguments["kernel"] = rl.KERNELS[kernel]
        if self.algorithm == "leo" and self.way is None:
            make = LEORegression
        if self.algorithm == "class-mean":
            arguments = {"way": self.way, **arguments}
        return _call(make, {"loss": loss, **arguments}, f"algorithm {self.algorithm}")

    def optimizer(self) -> optax.GradientTransformation | None:
        """The outer optimizer; `None` for the learner's own."""
        if not self.outer or "trpo" in self.outer or "ppo" in self.outer:
            return None
        clip = [optax.clip(self.outer["clip"])] if "clip" in self.outer else []
        return optax.chain(*clip, optax.adam(self.outer.get("adam", 1e-3)))

    def outer_step(self) -> Outer | None:
        """The outer step of its own kind, `adaptax.rl.TRPO`, `ParticleTRPO` or `PPO`; `None` for
        an optimizer's.

        Raises:
            ValueError: if it does not know an argument.
        """
        arguments = dict(self.outer)
        if "ppo" in arguments:
            rule = optax.adam(arguments.pop("ppo"))
            return _call(rl.PPO, {"optimizer": rule, **arguments}, "PPO")
        if "trpo" not in arguments:
            return None
        arguments["max_kl"], each = arguments.pop("trpo"), arguments.pop("each", False)
        step = _call(rl.TRPO, arguments, "TRPO")
        return rl.ParticleTRPO(step) if each else step

    def train(
        self, splits: Splits, run: Run | None = None, *, init_from: Meta = None, **how: Any
    ) -> Result:
        """Meta-train; `how` are further arguments of `adaptax.fit`.

        Args:
            splits: of the tasks.
            run: where to keep it.
            init_from: what the experiment `init_from` learned.

        Raises:
            ValueError: if there is such an experiment, and what it learned is not given.
        """
        if self.init_from and init_from is None:
            raise ValueError("the experiment starts from another; train that first, and give its "
                             "meta-parameters as init_from")  # fmt: skip
        return fit(
            self.build_learner(),
            self.model() if init_from is None else init_from,
            splits.train,
            steps=self.steps,
            meta_batch=self.meta_batch,
            key=jax.random.key(self.seed),
            optimizer=self.optimizer(),
            outer=self.outer_step(),
            keep=self.keep,
            run=run,
            **how,
        )

    def test(
        self, meta: Meta, splits: Splits, *, split: str = "test", ensemble: bool = False, **how: Any
    ) -> Any:
        """A `Report` on a split, or `Returns` of environments; `how` overrides `evaluation`.

        With `ensemble`, `meta` are the checkpoints that were kept.
        """
        how = {**self.evaluation, **how}
        tasks = {"test": splits.test, "val": splits.val}[split]
        if self.tasks in ENVIRONMENTS:
            if how.get("episodes") is not None:
                how["goals"] = how["episodes"]
            known = ("goals", "steps", "trajectories", "lr", "batch")
            how = {name: value for name, value in how.items() if name in known}
        learner = self.build_learner()
        learner = CheckpointEnsemble(learner.loss, learner) if ensemble else learner
        judge = tasks.evaluator if hasattr(tasks, "evaluator") else _evaluator(tasks)
        # A stream apart from training's, and the same for every experiment.
        report = judge(learner, **how)(meta, key=jax.random.key(2**31))
        trained_on = "train and val" if self.task.get("train_and_val") else "train"
        protocol = {
            **report.protocol, "algorithm": TITLES[self.algorithm], "trained_on": trained_on
        }  # fmt: skip
        return dataclasses.replace(report, protocol=protocol)

    def tuned(self, meta: Meta, splits: Splits) -> Experiment:
        """The experiment with the step size and the noise that do best on validation tasks."""
        experiment = self._tuned_rate(meta, splits) if self.tune else self
        return experiment._tuned_noise(meta, splits) if self.tune_noise else experiment

    def _tuned_noise(self, meta: Meta, splits: Splits) -> Experiment:
        how = {**self.evaluation, "episodes": 200, "at": None, "noise": self.tune_noise[0]}
        judge = Evaluator(self.build_learner(), splits.val, **how)
        key = jax.random.key(2**31)
        scores = [judge(meta, key=key, noise=noise).mean("nll") for noise in self.tune_noise]
        noise = self.tune_noise[scores.index(min(scores))]
        return dataclasses.replace(self, evaluation={**self.evaluation, "noise": noise})

    def _tuned_rate(self, meta: Meta, splits: Splits) -> Experiment:
        learner = self.build_learner()
        how = {**self.evaluation, "episodes": 200, "at": [self.eval_steps]}
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
        outer = self.outer_step() or self.optimizer() or learner.optimizer(self.steps)
        state, fixed = initial_state(learner, self.model(), outer, init_key, self.keep)
        state = io.load(run.checkpoint_file, state)
        best, step, score, kept = best_of(state, fixed)
        if not math.isfinite(score):
            best, step = eqx.combine(state.meta, fixed), int(state.step)
        return best, step, kept


RULES = frozenset({"adam", "trpo", "ppo"})
"""Names of the outer rules that exclude each other."""


def changed(experiment: Experiment, changes: Mapping[str, Any]) -> Experiment:
    """The experiment with other values; what is `None` stays, sections are merged.

    An outer rule in the place of another takes the place of its arguments, too.

    Args:
        experiment: to start from.
        changes: values by the names of its fields; a mapping replaces single settings.
    """
    new: dict[str, Any] = {}
    for name, value in changes.items():
        if isinstance(value, Mapping):
            given = {n: v for n, v in value.items() if v is not None}
            old = getattr(experiment, name)
            if name == "outer" and RULES & given.keys() and RULES & (old.keys() - given.keys()):
                old = {}
            value = {**old, **given}
        if value is not None:
            new[name] = value
    return dataclasses.replace(experiment, **new)


class _AtRate(MetaLearner):
    """A learner whose step size is part of what it is given, so that one program tries many."""

    loss: Loss = eqx.field(static=True)
    learner: Any

    def iterates(self, meta: Meta, support: Source, **how: Any) -> Model:
        model, rate = meta
        return dataclasses.replace(self.learner, inner_lr=rate).iterates(model, support, **how)


def _evaluator(tasks: TaskDistribution) -> Callable[..., Evaluator]:
    return lambda learner, **how: Evaluator(learner, tasks, **how)


def _policy(env: rl.Environment, network: dict[str, Any]) -> Model:
    """A policy for an environment."""
    kind = rl.CategoricalMLP if env.discrete else rl.GaussianMLP
    sizes = {"observation_size": env.observation_size, "action_size": env.action_size}
    network = {**sizes, **network, "hidden": network["policy"]}
    network.pop("policy")
    if "activation" in network:
        network["activation"] = ACTIVATIONS[network["activation"]]
    return _call(kind, network, "the policy")


def _call(function: Callable[..., Any], arguments: Mapping[str, Any], what: str) -> Any:
    """`function(**arguments)`, its complaint about their names in words."""
    try:
        return function(**arguments)
    except TypeError as error:
        if "argument" not in str(error):
            raise
        raise ValueError(f"{what}: {error}") from error

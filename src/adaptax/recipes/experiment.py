"""An experiment as data: everything that a run needs, in JSON, and the objects it describes."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
import math
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

from .. import inner, io, models, rl, tree
from ..algorithms.checkpoint_ensemble import CheckpointEnsemble
from ..algorithms.gaussian import Gaussian, gamma_prior
from ..algorithms.leo_regression import LEORegression
from ..algorithms.shared_head import SharedHead
from ..engine.evaluate import ACTING, PREDICTING, Evaluator
from ..engine.report import Report
from ..engine.run import Run
from ..engine.state import best_of, initial_state
from ..engine.steps import Outer
from ..engine.train import Result, fit
from ..learner import Adapter, Meta, MetaLearner
from ..losses import Loss
from ..task import Model, Source, Splits, TaskDistribution
from . import schema
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
    demand,
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
        for name, values in sections(self).items():
            object.__setattr__(self, name, values)
        at, steps = self.evaluation.get("at"), self.evaluation.get("steps")
        most = self.eval_steps if steps is None else steps
        if at is not None and not (at and max(at) <= most):
            raise ValueError(
                f"evaluation.at is {at}; expected steps from 0 to the last of adaptation, {most}"
            )

    def to_json(self) -> dict[str, Any]:
        """The experiment as JSON values."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def from_json(cls, values: Any) -> Experiment:
        """The experiment that `to_json` described.

        Raises:
            ValueError: if fields are missing or unknown.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        if not isinstance(values, Mapping):
            raise ValueError("this does not describe an experiment: it is no JSON object")
        for name in values:
            if name not in names:
                raise ValueError(
                    f"this does not describe an experiment: {name!r:.80} is nothing of one; "
                    f"{schema.one_of(str(name), names)}"
                )
        for field in dataclasses.fields(cls):
            if field.name in values:
                continue
            if field.default_factory is not dataclasses.MISSING:
                values = {**values, field.name: field.default_factory()}
            elif field.default is not dataclasses.MISSING:
                values = {**values, field.name: field.default}
            else:
                raise ValueError(f"this does not describe an experiment: it has no {field.name}")
        return cls(**sections(types.SimpleNamespace(**values)))

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
        usual = schema.taken(_factory(self)).get("inner_steps", (int, 1))[1]
        steps = self.learner.get("inner_steps", 0 if self.algorithm == "pretrained" else usual)
        chosen = self.learner.get("eval_steps")
        return steps if chosen is None else chosen

    @property
    def episodes(self) -> int:
        """Test episodes; of environments, goals."""
        usual = 40 if self.tasks in ENVIRONMENTS else 600
        return self.evaluation.get("goals") or self.evaluation.get("episodes", usual)

    @property
    def way(self) -> int | None:
        """Classes of a task; `None` for regressions."""
        if self.tasks in REGRESSIONS:
            return None
        return self.task.get("way", 2)

    @property
    def transductive(self) -> bool:
        """Whether the test predicts the queries of an episode together."""
        return self.evaluation.get("transductive", True)

    def build_learner(self) -> MetaLearner:
        """The learner.

        Raises:
            ValueError: if the algorithm does not know an argument.
        """
        arguments = dict(self.learner)
        kind = arguments.pop("loss", _usual_loss(self))
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
        make, shared = _factory(self), {}
        if self.algorithm != "anil":
            shared = {n: arguments.pop(n) for n in ("head", "head_path") if n in arguments}
        if make is rl.BayesianMAML:
            arguments["kernel"] = rl.KERNELS[arguments.get("kernel", "code")]
        if self.algorithm == "class-mean":
            arguments = {"way": self.way, **arguments}
        made = _call(make, {"loss": loss, **arguments}, f"algorithm {self.algorithm}")
        return made if shared.get("head", "free") == "free" else SharedHead(made, **shared)

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

    def check(self, splits: Splits) -> None:
        """Raise, before anything is trained, if the network or the test do not suit the tasks.

        Args:
            splits: of the test.

        Raises:
            ValueError: if the network does not take the inputs, or the test has other arguments.
        """
        self.judge(splits.test)
        if self.tasks in ENVIRONMENTS:
            return
        x = splits.test.sample(jax.random.key(0)).support.draw(None, jax.random.key(0)).x
        try:
            eqx.filter_eval_shape(lambda model: model(x), self.model())
        except (TypeError, ValueError) as error:
            reason = str(error).strip().split("\n")[0]
            raise ValueError(
                f"the network {json.dumps(dict(self.network))} does not take the inputs of "
                f"{self.tasks}, of shape {x.shape[1:]}: {reason}"
            ) from None

    def judge(self, tasks: TaskDistribution, *, ensemble: bool = False, **how: Any) -> Evaluator:
        """What scores meta-parameters on these tasks; see `test`."""
        twins = {"goals": "episodes", "episodes": "goals"}
        own = {n: v for n, v in self.evaluation.items() if how.get(twins.get(n, "")) is None}
        learner: Adapter = self.build_learner()
        learner = CheckpointEnsemble(learner.loss, learner) if ensemble else learner
        return Evaluator(learner, tasks, **{**own, **how})

    def test(
        self, meta: Meta, splits: Splits, *, split: str = "test", ensemble: bool = False, **how: Any
    ) -> Report:
        """The report on a split; `how` overrides `evaluation`.

        With `ensemble`, `meta` are the checkpoints that were kept.
        """
        tasks = {"test": splits.test, "val": splits.val}[split]
        # A stream apart from training's, and the same for every experiment.
        judge = self.judge(tasks, ensemble=ensemble, **how)
        report = judge(meta, key=jax.random.key(2**31))
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


def sections(experiment: Any) -> dict[str, Any]:
    """The fields of an experiment as what they are given to takes them.

    Args:
        experiment: has the fields of `Experiment`, of any kind.

    Raises:
        ValueError: naming the setting that nothing takes, or that is of another kind.
    """
    e = experiment
    for kind, value, names in (
        ("algorithm", e.algorithm, ALGORITHMS),
        ("task family", e.tasks, TASKS),
    ):
        if not isinstance(value, str) or value not in names:
            raise ValueError(f"{value!r:.80} is no {kind}; {schema.one_of(str(value), names)}")
    demand(e.algorithm, e.tasks)
    acting = e.tasks in ENVIRONMENTS
    family = schema.taken(TASKS[e.tasks])
    found: dict[str, Any] = {
        "algorithm": e.algorithm,
        "tasks": e.tasks,
        "init_from": e.init_from,
        "task": schema.checked("task", e.task, family, signed=family),
        "test_task": schema.checked("test_task", e.test_task, family, signed=family),
        "network": _network(e.network, acting),
        "learner": schema.checked("learner", e.learner, _learner(e)),
        "outer": _outer(e.outer, acting),
        "evaluation": schema.checked(
            "evaluation", e.evaluation,
            schema.taken(
                Evaluator, ("learner", "tasks", "watch", *(PREDICTING if acting else ACTING))
            ),
        ),
    }  # fmt: skip
    for name in ("steps", "meta_batch", "keep"):
        found[name] = schema.fitting(name, getattr(e, name), int, least=1)
    found["seed"] = schema.fitting("seed", e.seed, int, least=-(2**31), most=2**32 - 1)
    for name in ("tune", "tune_noise"):
        found[name] = schema.fitting(name, getattr(e, name), Sequence[float])
    for name in ("way", "shot"):
        if "way" in family and name not in found["task"]:
            raise ValueError(f"task.{name} is missing, a whole number")
    start: Any = e.init_from
    for _ in range(8):
        if start == {}:
            break
        if not isinstance(start, Mapping):
            raise ValueError("init_from is no JSON object; expected an experiment")
        start = start.get("init_from", {})
    else:
        raise ValueError("init_from is nested more than 8 deep")
    if e.init_from:
        Experiment.from_json(e.init_from)
    return found


NETWORKS: dict[str, tuple[Any, tuple[Callable[..., Model], ...], tuple[str, ...]]] = {
    "mlp": (Sequence[int], (models.MLP,), ("out_size", "hidden")),
    "conv4": (Literal[tuple(models.CONV4)], (models.Conv4,), ("out",)),
    "linear": (int, (models.Linear,), ("in_size", "out_size")),
    "policy": (
        Sequence[int],
        (rl.CategoricalMLP, rl.GaussianMLP),
        ("observation_size", "action_size", "hidden"),
    ),
}
"""Kinds of networks: what the setting of their name is, what takes the others, and what of its
arguments the tasks determine."""


def _network(values: Any, acting: bool) -> dict[str, Any]:
    kinds = NETWORKS.keys() & (values if isinstance(values, Mapping) else ())
    if len(kinds) != 1 or ("policy" in kinds) != acting:
        wanted = "policy" if acting else "one of mlp, conv4 and linear"
        raise ValueError(f"network should name {wanted}, and names {', '.join(kinds) or 'none'}")
    (kind,) = kinds
    own, makers, without = NETWORKS[kind]
    known: dict[str, Any] = {kind: (own, None)}
    for make in makers:
        known |= schema.taken(make, without)
    if kind in ("mlp", "policy"):
        known["activation"] = (Literal[tuple(ACTIVATIONS)], None)
    found = schema.checked("network", values, known)
    for name, value in found.items():
        sizes = value if isinstance(value, list | tuple) else [value]
        if name != "context" and any(type(one) is int and one < 1 for one in sizes):
            raise ValueError(f"network.{name} is {value}; expected 1 or more")
    return found


def _learner(experiment: Any) -> schema.Known:
    e = experiment
    make = _factory(e)
    known = dict(schema.taken(make, ("loss",)))
    arguments = inspect.signature(make).parameters
    forwarding = any(p.kind is p.VAR_KEYWORD for p in arguments.values())
    if "inner_optimizer" in arguments or forwarding:
        known["inner_adam"] = (float, None)
    if "adapt_only" in arguments or forwarding:
        known |= {"adapt_only": (str, None), "adapt_everything": (bool, None)}
    if "train_only" in arguments or forwarding:
        known["train_only"] = (str, None)
    if make is rl.BayesianMAML:
        known["kernel"] = (Literal[tuple(rl.KERNELS)], None)
    if "adapt_only" in known and "head" not in known:
        known |= {"head": (Literal["free", "tied", "zero"], "free"), "head_path": (str, "head")}
    # What these set themselves.
    known.pop({"pretrained": "inner_steps", "fomaml": "first_order"}.get(e.algorithm, ""), None)
    known["loss"] = (Literal[tuple(LOSSES)], None)
    kind = e.learner.get("loss") if isinstance(e.learner, Mapping) else None
    loss = LOSSES.get(kind) if isinstance(kind, str) else LOSSES[_usual_loss(e)]
    if loss is not None:
        of_loss = schema.taken(loss)
        known |= {name: of_loss[name] for name in ("reduction", "noise") if name in of_loss}
    return known


def _outer(values: Any, acting: bool) -> dict[str, Any]:
    known: dict[str, Any] = {"adam": (float, None), "clip": (float, None)}
    rules = RULES & (values if isinstance(values, Mapping) else {}).keys()
    if len(rules) > 1:
        raise ValueError(f"outer names {' and '.join(sorted(rules))}; one of them is the rule")
    if rules and "adam" not in rules and not acting:
        raise ValueError(f"outer.{min(rules)} is for environments; expected adam")
    if "trpo" in rules:
        known = {"trpo": (float, None), "each": (bool, None), **schema.taken(rl.TRPO, ("max_kl",))}
    if "ppo" in rules:
        known = {"ppo": (float, None), **schema.taken(rl.PPO)}
    if not rules and acting:
        known |= {"trpo": (float, None), "ppo": (float, None)}
    return schema.checked("outer", values, known)


RULES = frozenset({"adam", "trpo", "ppo"})
"""Names of the outer rules that exclude each other."""


def changed(experiment: Experiment, changes: Mapping[str, Any]) -> Experiment:
    """The experiment with other values; what is `None` stays, sections are merged.

    An outer rule, or a network, in the place of another takes the place of its arguments, too.

    Args:
        experiment: to start from.
        changes: values by the names of its fields; a mapping replaces single settings.
    """
    new: dict[str, Any] = {}
    for name, value in changes.items():
        if isinstance(value, Mapping):
            given = {n: v for n, v in value.items() if v is not None}
            old = getattr(experiment, name)
            kinds = {"outer": RULES, "network": NETWORKS.keys()}.get(name, set())
            if kinds & given.keys() and kinds & (old.keys() - given.keys()):
                old = {}
            value = {**old, **given}
        if value is not None:
            new[name] = value
    return dataclasses.replace(experiment, **new)


def _usual_loss(experiment: Any) -> str:
    """The name of the loss where none is given."""
    usual = "mse" if experiment.tasks in REGRESSIONS else "cross_entropy"
    return "log_prob" if experiment.tasks in ENVIRONMENTS else usual


def _factory(experiment: Any) -> Callable[..., MetaLearner]:
    """What makes the learner."""
    if experiment.algorithm == "bmaml" and experiment.tasks in ENVIRONMENTS:
        return rl.BayesianMAML
    if experiment.algorithm == "leo" and experiment.tasks in REGRESSIONS:
        return LEORegression
    return ALGORITHMS[experiment.algorithm]


class _AtRate(Adapter):
    """A learner whose step size is part of what it is given, so that one program tries many."""

    loss: Loss = eqx.field(static=True)
    learner: Any

    def iterates(self, meta: Meta, support: Source, **how: Any) -> Model:
        model, rate = meta
        return dataclasses.replace(self.learner, inner_lr=rate).iterates(model, support, **how)


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

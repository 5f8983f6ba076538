"""An experiment as data: everything that a run needs, in JSON, and the objects it describes."""

from __future__ import annotations

import dataclasses
import json
import math
import types
from collections.abc import Mapping, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

from .. import io
from ..algorithms.checkpoint_ensemble import CheckpointEnsemble
from ..algorithms.gaussian import Gaussian
from ..engine.evaluate import ACTING, PREDICTING, Evaluator
from ..engine.report import Report
from ..engine.run import Run
from ..engine.state import best_of, initial_state
from ..engine.steps import Outer
from ..engine.train import Result, fit
from ..learner import Adapter, Meta, MetaLearner
from ..losses import Loss
from ..task import Model, Source, Splits, TaskDistribution
from . import parts, schema, table


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What to train on what, and how to judge it.

    Args:
        algorithm: a name in `LEARNERS`, or one's own, `my_module:MyLearner`.
        tasks: a name in `FAMILIES`, or one's own, `my_module:my_tasks`.
        task: arguments of the task family: way, shot, query, ….
        network: `{"mlp": [hidden…], …}`, `{"conv4": preset, …}`, `{"linear": width}`, of
            environments `{"policy": [hidden…], …}`, or one's own, `{"model": "my_module:make",
            …}`, with further arguments; an activation by its name in `ACTIVATIONS`.
        learner: arguments of the learner; for the inner rule `inner_lr`, or `inner_optimizer`,
            one of optax's with its rate and arguments, `{"sgd": 0.1, "momentum": 0.9}`, or
            `inner_adam`, Adam without momentum at that rate; `loss`, with `reduction` and
            `noise`, for a loss by its name in `LOSSES`; and `adapt_only` and `train_only` for
            what is under a name, such as `"head"`.
        outer: the outer optimizer: one of optax's with its rate and arguments and a bound of the
            gradient, `{"adam": rate, "clip": bound}`, either may be missing; the learner's own if
            empty; or `{"trpo": bound of the KL, …}`, with further arguments, and `"each": True`
            for a trust region of each of several policies; or `{"ppo": rate of Adam,
            "epochs": …, "clip": …}`.
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
        for name, values in _checked(self).items():
            object.__setattr__(self, name, values)
        at, steps = self.evaluation.get("at"), self.evaluation.get("steps")
        most = self.eval_steps if steps is None else steps
        if at is not None and not (at and max(at) <= most):
            raise ValueError(
                f"evaluation.at is {at}; expected steps from 0 to the last of adaptation, {most}"
            )

    def to_json(self) -> dict[str, Any]:
        """Return the experiment as JSON values."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def from_json(cls, values: Any) -> Experiment:
        """Return the experiment that `to_json` described.

        Raises:
            ValueError: if fields are missing or unknown, or a module of the user's is named that
                is not trusted.
        """
        if not isinstance(values, Mapping):
            raise ValueError("this does not describe an experiment: it is no JSON object")
        fields = dataclasses.fields(cls)
        names = [field.name for field in fields]
        for name in values:
            if name not in names:
                raise ValueError(
                    f"this does not describe an experiment: {name!r:.80} is nothing of one; "
                    f"{table.one_of(str(name), names)}"
                )
        whole = {f.name: f.default for f in fields if f.default is not dataclasses.MISSING}
        for field in fields:
            if field.default_factory is not dataclasses.MISSING:
                whole[field.name] = field.default_factory()
        whole |= values
        if missing := [name for name in names if name not in whole]:
            raise ValueError(f"this does not describe an experiment: it has no {missing[0]}")
        return cls(**{**whole, **_checked(types.SimpleNamespace(**whole))})

    @property
    def family(self) -> table.Family:
        """The facts of the task family."""
        return table.family(self.tasks)

    @property
    def row(self) -> table.Learner:
        """The facts of the learner."""
        return table.learner(self.algorithm)

    @property
    def title(self) -> str:
        """How reports and plots write the learner."""
        return self.row.title

    @property
    def acts(self) -> bool:
        """Whether the tasks are environments."""
        return self.family.kind == "environment"

    def splits(
        self, data_root: str | None = None, *, test: bool = False, fitted: str | None = None
    ) -> Splits:
        """Return the task distributions; with `test`, those of the test episodes.

        Args:
            data_root: folder of the data sets.
            test: those of the test.
            fitted: the folder of the run whose preparation is applied to a table.

        Raises:
            ValueError: if the task family does not know an argument.
        """
        arguments = {**self.task, **(self.test_task if test else {})}
        if data_root is not None and self.family.downloaded:
            arguments["data_root"] = data_root
        if fitted is not None and self.family.has("rows"):
            arguments["fitted"] = fitted
        splits = parts.call(
            table.load(self.family.make), arguments, f"the task family {self.tasks}"
        )
        if not isinstance(splits, Splits):
            raise ValueError(
                f"the task family {self.tasks} made {type(splits).__name__}; expected "
                "adaptax.Splits(train, val, test)"
            )
        return splits

    def model(self) -> Model:
        """Return the untrained network, as the seed initialises it.

        Raises:
            ValueError: if the network does not know an argument.
        """
        defaults = schema.taken(table.load(self.family.make))
        size, channels = (
            self.task.get(name, defaults.get(name, (int, usual))[1])
            for name, usual in (("image_size", 28), ("channels", self.family.channels))
        )
        net = parts.make_network(
            self.network,
            key=jax.random.key(self.seed),
            out=self.way or self.outputs,
            in_size=self.family.inputs,
            image=(size, size, channels),
            env=lambda: self.splits().train.env,  # type: ignore[attr-defined]
        )
        gaussian = self.learner.get("loss") == "gaussian" and "mlp" in self.network
        return Gaussian(net) if gaussian else net

    @property
    def settings(self) -> schema.Known:
        """What the learner can be set to, with the defaults."""
        return parts.known_of(self.row, self.family)

    @property
    def eval_steps(self) -> int:
        """Steps that the learner adapts for in a test; 0 for those that take none."""
        chosen = self.learner.get("eval_steps")
        if chosen is not None:
            return chosen
        names = {"inner_steps", "finetune_steps"} & self.settings.keys()
        return sum(self.learner.get(name, self.settings[name][1]) for name in names)

    @property
    def episodes(self) -> int:
        """Test episodes; of environments, goals."""
        usual = 40 if self.acts else 600
        return self.evaluation.get("goals") or self.evaluation.get("episodes", usual)

    @property
    def way(self) -> int | None:
        """Classes of a task; `None` where there are none."""
        if self.family.kind != "classification":
            return None
        return self.task.get("way", self.task.get("classes", 2))

    @property
    def outputs(self) -> int:
        """Numbers that are predicted of an example: the targets of a table, else one."""
        target = self.task.get("target") if self.family.has("rows") else None
        return len(target) if isinstance(target, list | tuple) else 1

    @property
    def transductive(self) -> bool:
        """Whether the test predicts the queries of an episode together."""
        return self.evaluation.get("transductive", True)

    def build_learner(self) -> MetaLearner:
        """Return the learner.

        Raises:
            ValueError: if the algorithm does not know an argument.
        """
        return parts.make_learner(self.row, self.family, self.learner, self.way)

    def optimizer(self) -> optax.GradientTransformation | None:
        """Return the outer optimizer; `None` for the learner's own."""
        return parts.make_optimizer(self.outer)

    def outer_step(self) -> Outer | None:
        """Return the outer step of its own kind, such as `adaptax.rl.TRPO`; else `None`.

        Raises:
            ValueError: if it does not know an argument.
        """
        return parts.make_outer_step(self.outer)

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
        if self.acts:
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
        """Return what scores meta-parameters on these tasks; see `test`."""
        twins = {"goals": "episodes", "episodes": "goals"}
        own = {n: v for n, v in self.evaluation.items() if how.get(twins.get(n, "")) is None}
        learner: Adapter = self.build_learner()
        learner = CheckpointEnsemble(learner.loss, learner) if ensemble else learner
        return Evaluator(learner, tasks, **{**own, **how})

    def test(
        self, meta: Meta, splits: Splits, *, split: str = "test", ensemble: bool = False, **how: Any
    ) -> Report:
        """Return the report on a split; `how` overrides `evaluation`.

        With `ensemble`, `meta` are the checkpoints that were kept.
        """
        tasks = {"test": splits.test, "val": splits.val}[split]
        # A stream apart from training's, and the same for every experiment.
        judge = self.judge(tasks, ensemble=ensemble, **how)
        report = judge(meta, key=jax.random.key(2**31))
        trained_on = "train and val" if self.task.get("train_and_val") else "train"
        protocol = {
            **report.protocol, "algorithm": self.title, "trained_on": trained_on
        }  # fmt: skip
        return dataclasses.replace(report, protocol=protocol)

    def tuned(self, meta: Meta, splits: Splits) -> Experiment:
        """Return the experiment with the step size and noise that do best on validation tasks."""
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

    def untrained(self, init_from: Meta = None) -> Meta:
        """Return the meta-parameters that `train` starts from, as its argument says."""
        init_key = jax.random.split(jax.random.key(self.seed), 4)[2]
        model = self.model() if init_from is None else init_from
        return self.build_learner().init(model, key=init_key)

    def restore(self, run: Run) -> tuple[Meta, int, Meta]:
        """Return what a run learned: the best meta-parameters by validation, else the last.

        Returns:
            These, their step, and all that are kept, stacked, best first.

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


def _checked(experiment: Any) -> dict[str, Any]:
    """Return the fields of an experiment as what they are given to takes them.

    Args:
        experiment: has the fields of `Experiment`, of any kind.

    Raises:
        ValueError: naming the setting that nothing takes, or that is of another kind.
    """
    e = experiment
    learner, family = table.learner(e.algorithm), table.family(e.tasks)
    table.check_supported(e.algorithm, e.tasks)
    known = schema.taken(table.load(family.make))
    others = PREDICTING if family.kind == "environment" else ACTING
    judge = schema.taken(Evaluator, ("learner", "tasks", "watch", *others))
    found: dict[str, Any] = {
        "init_from": e.init_from,
        "task": schema.checked("task", e.task, known, signed=known),
        "test_task": schema.checked("test_task", e.test_task, known, signed=known),
        "network": parts.checked_network(family, e.network),
        "learner": parts.checked_learner(learner, family, e.learner),
        "outer": parts.checked_outer(family, e.outer),
        "evaluation": schema.checked("evaluation", e.evaluation, judge),
    }
    if parts.optimizers().keys() & found["outer"] and "outer_lr" in found["learner"]:
        raise ValueError(
            f"learner.outer_lr is the rate of {learner.title}'s own outer optimizer, and outer "
            "names another one; leave out one of them"
        )
    for name in ("steps", "meta_batch", "keep"):
        found[name] = schema.fitting(name, getattr(e, name), int, least=1)
    found["seed"] = schema.fitting("seed", e.seed, int, least=-(2**31), most=2**32 - 1)
    for name in ("tune", "tune_noise"):
        found[name] = schema.fitting(name, getattr(e, name), Sequence[float])
    for name in ("way", "shot"):
        if "way" in known and name in known and name not in found["task"]:
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


def changed(
    experiment: Experiment, changes: Mapping[str, Any], without: Sequence[str] = ()
) -> Experiment:
    """Return the experiment with other values; what is `None` stays, sections are merged.

    An outer rule, an inner rule or a network in the place of another takes the place of its
    arguments, too.

    Args:
        experiment: to start from.
        changes: values by the names of its fields; a mapping replaces single settings.
        without: settings to leave out first, `"section.name"`, or all of a `"section"`.
    """
    new: dict[str, Any] = {}
    for section, _, name in (place.partition(".") for place in without):
        old = new.get(section, getattr(experiment, section))
        new[section] = {n: v for n, v in old.items() if name and n != name}
    if parts.rules() & (changes.get("outer") or {}).keys():
        learner = new.get("learner", experiment.learner)
        new["learner"] = {n: v for n, v in learner.items() if n != "outer_lr"}
    for name, value in changes.items():
        if isinstance(value, Mapping) and name != "init_from":
            given = {n: v for n, v in value.items() if v is not None}
            old = new.get(name, getattr(experiment, name, {}))
            value = {**_kept(name, old, given), **given}
        if value is not None:
            new[name] = value
    names = [field.name for field in dataclasses.fields(experiment)]
    if wrong := [name for name in new if name not in names]:
        raise ValueError(f"{wrong[0]!r:.80} is not a setting; {table.one_of(wrong[0], names)}")
    return dataclasses.replace(experiment, **new)


def _kept(section: str, old: Mapping[str, Any], given: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return what stays of a section when settings are given."""
    kinds = {"outer": parts.rules(), "network": {*parts.NETWORKS}, "learner": {*parts.INNER}}
    rivals = kinds.get(section, set())
    if not (rivals & given.keys() and rivals & (old.keys() - given.keys())):
        return old
    if section == "learner":
        return {name: value for name, value in old.items() if name not in rivals}
    optimizers = parts.optimizers().keys()
    if section == "outer" and optimizers & old.keys() and optimizers & given.keys():
        return {name: value for name, value in old.items() if name == "clip"}
    return {}


class _AtRate(Adapter):
    """A learner whose step size is part of what it is given, so that one program tries many."""

    loss: Loss = eqx.field(static=True)
    learner: Any

    def iterates(self, meta: Meta, support: Source, **how: Any) -> Model:
        model, rate = meta
        return dataclasses.replace(self.learner, inner_lr=rate).iterates(model, support, **how)

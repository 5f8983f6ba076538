"""The recipes.

Hyper-parameters are those of the papers and their codes (MAML: arXiv:1703.03400; Reptile:
arXiv:1803.02999; MAML++: arXiv:1810.09502). MAML's step sizes and its clipping are for the mean
loss, so its published α of 0.4, 0.1 and 0.01 on losses summed over ways become 2.0, 2.0 and 0.05.
Recipes whose name ends in `-short` shorten meta-training for two CPU cores, and say what else they
change.

A recipe belongs to a cell: an algorithm, a data set, ways and shots. `closest` finds the settings
of a cell that is in no table, and `comparable` those of several algorithms on the same tasks.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from .bayesian import BAYESIAN, CELLS, adapted
from .embedded import embedded
from .experiment import Experiment, changed
from .names import ENVIRONMENTS, demand
from .reinforcement import named, reinforced


@dataclasses.dataclass(frozen=True)
class Recipe:
    """One cell of a table.

    Args:
        name: such as `"maml-omniglot-5w1s"`.
        about: the cell, and how a short version departs from the paper.
        paper: the published score as printed, with its protocol where it differs from ours.
        experiment: what to run.
    """

    name: str
    about: str
    paper: str
    experiment: Experiment


_GLOROT: dict[str, Any] = {"mlp": [40, 40]}
"""MAML's network for sinusoids as we initialise it where the task is not to repeat its code."""


def _sinusoid(algorithm: str, paper: str, about: str, **changes: Any) -> Recipe:
    base = Experiment(
        algorithm="maml",
        tasks="sinusoid",
        task={"shot": 10, "query": 10},
        test_task={"shot": 5, "query": 100},
        network={**_GLOROT, "init": "truncated"},
        learner={"inner_lr": 0.01, "inner_steps": 1, "eval_steps": 10},
        steps=70_000,
        meta_batch=25,
        evaluation={"episodes": 2000},
    )
    if algorithm == "pretrained":
        # Without an inner step there is no support set: train on as many points as the others.
        changes = {
            "task": {**base.task, "train_query": 20},
            "learner": {"inner_lr": 0.01, "eval_steps": 10},
            "tune": [0.001, 0.003, 0.01, 0.02, 0.05],
        }
    experiment = dataclasses.replace(base, algorithm=algorithm, **changes)
    return Recipe(f"{algorithm}-sinusoid", about, paper, experiment)


def _maml(data: str, way: int, shot: int, first_order: bool, paper: str) -> Recipe:
    """MAML's image cells: section 5.2 and the released code."""
    algorithm = "fomaml" if first_order else "maml"
    learner: dict[str, Any] = {"inner_lr": 2.0, "inner_steps": 1, "eval_steps": 3}
    outer: dict[str, Any] = {"adam": 1e-3}
    task: dict[str, Any] = {"way": way, "shot": shot, "query": shot}
    meta_batch = 32
    if data == "omniglot" and way == 20:
        learner, meta_batch = {"inner_lr": 2.0, "inner_steps": 5, "eval_steps": 5}, 16
    if data == "mini_imagenet":
        learner = {"inner_lr": 0.05, "inner_steps": 5, "eval_steps": 10}
        task["train_query"] = 15
        # The code bounds the gradient of a sum over all queries divided by the shots.
        outer["clip"] = 10.0 * shot / (way * task["train_query"])
        meta_batch = 4 if shot == 1 else 2
    experiment = Experiment(
        algorithm=algorithm,
        tasks=data,
        task=task,
        network={"conv4": f"maml {data}"},
        learner=learner,
        outer=outer,
        steps=60_000,
        meta_batch=meta_batch,
        evaluation={"episodes": 600},
    )
    about = f"{algorithm.upper()}, {data}, {way}-way {shot}-shot"
    return Recipe(f"{algorithm}-{data}-{way}w{shot}s", about, paper, experiment)


def _maml_mlp(shot: int, paper: str) -> Recipe:
    """MAML's Omniglot cells without convolutions."""
    cell = _maml("omniglot", 5, shot, False, paper)
    network = {"mlp": [256, 128, 64, 64], "in_size": 784, "batch_norm": True, "init": "truncated"}
    experiment = dataclasses.replace(cell.experiment, network=network)
    return Recipe(f"{cell.name}-mlp", f"{cell.about}, no convolutions", paper, experiment)


def _reptile(data: str, way: int, shot: int, paper: str) -> Recipe:
    """Reptile's image cells: the released commands."""
    mini, wide = data == "mini_imagenet", way == 20
    learner = {
        "inner_adam": 5e-4 if wide else 1e-3,
        "inner_steps": 8 if mini else 10 if wide else 5,
        "inner_batch": 20 if wide else 10,
        "eval_steps": 50,
        "eval_batch": 15 if mini and shot == 5 else 10 if wide else 5,
        "carry_state": True,
        # Adam's moments are carried, and the batch is another in the test: the scale matters.
        "reduction": "sum",
    }
    task: dict[str, Any] = {"way": way, "shot": shot, "query": 1, "train_query": 0}
    task["train_shot"] = 15 if mini else 10
    task["resample" if mini else "protocol"] = "nearest" if mini else "reptile"
    experiment = Experiment(
        algorithm="reptile",
        tasks=data,
        task=task,
        network={"conv4": f"reptile {data}"},
        learner=learner,
        steps=200_000 if wide else 100_000,
        meta_batch=5,
        evaluation={"episodes": 10_000, "at": [0, 50], "transductive": True},
    )
    return Recipe(
        f"reptile-{data}-{way}w{shot}s",
        f"Reptile, {data}, {way}-way {shot}-shot",
        paper,
        experiment,
    )


def _plus_plus(data: str, way: int, shot: int, paper: str) -> Recipe:
    """MAML++'s image cells: the configurations of its code that go with the paper.

    250 epochs of 500 meta-steps; the loss is annealed over 20 epochs on Omniglot and 50 on
    miniImageNet. The paper anneals the order of derivative over 50 epochs, which that
    configuration does not; a threshold of 50 would be 51 epochs in its code.
    """
    mini = data == "mini_imagenet"
    learner: dict[str, Any] = {
        "inner_steps": 5,
        "inner_lr": 0.01 if mini else 0.1,
        "multi_step_loss": 0.2 if mini else 0.08,
        "derivative_order_annealing": 0.2,
        "per_step_batch_norm_statistics": "code",
        "epochs": 250,
    }
    task: dict[str, Any] = {"way": way, "shot": shot, "query": 15 if mini else 1}
    if mini:
        learner["clip"] = 10.0
        task |= {"normalise": True, "resample": "nearest"}
    else:
        task["protocol"] = "maml++"
    experiment = Experiment(
        algorithm="maml++",
        tasks=data,
        task=task,
        network={"conv4": f"maml++ {data}"},
        learner=learner,
        steps=125_000,
        meta_batch=16 if not mini else 4 if shot == 1 else 2,
        evaluation={"episodes": 600},
        keep=5,
    )
    about = f"MAML++, {data}, {way}-way {shot}-shot"
    return Recipe(f"maml++-{data}-{way}w{shot}s", about, paper, experiment)


def _short(recipe: Recipe, about: str, **changes: Any) -> Recipe:
    experiment = recipe.experiment
    for name, value in changes.items():
        old = getattr(experiment, name)
        new = {**old, **value} if isinstance(value, dict) else value
        change: dict[str, Any] = {name: new}
        experiment = dataclasses.replace(experiment, **change)
    return Recipe(
        f"{recipe.name}-short",
        f"{recipe.about}, for two CPU cores: {about}",
        recipe.paper,
        experiment,
    )


_MAML_SINE = "MSE 0.67 / 0.38 / 0.35 after 1 / 5 / 10 steps (600 tasks)"
_PRETRAINED_SINE = "MSE 2.41 / 2.23 / 2.19 after 1 / 5 / 10 steps (600 tasks)"
_FULL = [
    _sinusoid("maml", _MAML_SINE, "MAML, 5-shot sinusoids, trained with 10 shots"),
    dataclasses.replace(
        _sinusoid(
            "maml", _MAML_SINE,
            "MAML, 5-shot sinusoids, trained with 10 shots, from Glorot's initialisation: fewer "
            "tasks diverge than from the code's", network=_GLOROT,
        ),
        name="maml-sinusoid-glorot",
    ),
    _sinusoid("fomaml", "no number", "FOMAML on MAML's sinusoids"),
    _sinusoid(
        "pretrained", _PRETRAINED_SINE,
        "Joint training on all sinusoids, then fine-tuning with a tuned step size",
    ),
    _sinusoid(
        "reptile", "a figure only",
        "Reptile on its own sinusoids: batches of 10 from a grid of 50 points, 32 steps at test",
        task={"shot": 10, "query": 40, "paper": "reptile", "grid": True,
              "train_shot": 50, "train_query": 0},
        test_task={"query": 100, "grid": False},
        network={"mlp": [64, 64], "activation": "tanh"},
        learner={"inner_lr": 0.02, "inner_steps": 5, "inner_batch": 10,
                 "eval_steps": 32, "eval_batch": 10, "outer_lr": 0.1},
        steps=30_000, meta_batch=1,
    ),
    _maml("omniglot", 5, 1, False, "98.7 ± 0.4 %"),
    _maml("omniglot", 5, 5, False, "99.9 ± 0.1 %"),
    _maml("omniglot", 20, 1, False, "95.8 ± 0.3 %"),
    _maml("omniglot", 20, 5, False, "98.9 ± 0.2 %"),
    _maml_mlp(1, "89.7 ± 1.1 %"),
    _maml_mlp(5, "97.5 ± 0.6 %"),
    _maml("omniglot", 5, 1, True, "98.3 ± 0.5 % (as Reptile's paper quotes it)"),
    _maml("omniglot", 5, 5, True, "99.2 ± 0.2 % (as Reptile's paper quotes it)"),
    _maml("omniglot", 20, 1, True, "89.4 ± 0.5 % (as Reptile's paper quotes it)"),
    _maml("omniglot", 20, 5, True, "97.9 ± 0.1 % (as Reptile's paper quotes it)"),
    _maml("mini_imagenet", 5, 1, False, "48.70 ± 1.84 % (reruns of the released code: 45-46.4)"),
    _maml("mini_imagenet", 5, 5, False, "63.11 ± 0.92 %"),
    _maml("mini_imagenet", 5, 1, True, "48.07 ± 1.75 %"),
    _maml("mini_imagenet", 5, 5, True, "63.15 ± 0.91 %"),
    _reptile("omniglot", 5, 1, "97.68 ± .04 % transductive, 95.39 ± .09 % not"),
    _reptile("omniglot", 5, 5, "99.48 ± .06 % transductive, 98.90 ± .10 % not"),
    _reptile("omniglot", 20, 1, "89.43 ± .14 % transductive, 88.14 ± .15 % not"),
    _reptile("omniglot", 20, 5, "97.12 ± .32 % transductive, 96.65 ± .33 % not"),
    _reptile("mini_imagenet", 5, 1, "49.97 ± 0.32 % transductive, 47.07 ± 0.26 % not"),
    _reptile("mini_imagenet", 5, 5, "65.99 ± 0.58 % transductive, 62.74 ± 0.37 % not"),
]  # fmt: skip
_FULL += [
    _plus_plus(data, way, shot, f"{score} %, ensemble of the best checkpoints{doubt}")
    for data, way, shot, score, doubt in (
        ("omniglot", 5, 1, "99.47", ""),
        ("omniglot", 5, 5, "99.85 or 99.93", " (sources conflict)"),
        ("omniglot", 20, 1, "97.65 ± .05", " (± over 3 seeds, unverified)"),
        ("omniglot", 20, 5, "99.33 ± .03", " (± over 3 seeds, unverified)"),
        ("mini_imagenet", 5, 1, "52.15 ± .26", " (± over 3 seeds)"),
        ("mini_imagenet", 5, 5, "68.32 ± .44", " (± over 3 seeds)"),
    )
]
_FULL += [
    Recipe(
        f"leo-{data}-{way}w{shot}s",
        f"LEO, {data}, {way}-way {shot}-shot, on embeddings of a wide residual network: a file of "
        "`adaptax embed`, named by --path",
        paper,
        embedded("leo", way, shot, data),
    )
    for data, way, shot, paper in (
        ("mini_imagenet", 5, 1, "61.76 ± 0.08 %, train and validation classes"),
        ("mini_imagenet", 5, 5, "77.59 ± 0.12 %, train and validation classes"),
        ("tiered_imagenet", 5, 1, "66.33 ± 0.05 %, train and validation classes"),
        ("tiered_imagenet", 5, 5, "81.44 ± 0.09 %, train and validation classes"),
    )
]
_FULL += [
    Recipe(
        f"{algorithm}-mini_imagenet-5w1s",
        f"{about}, mini_imagenet, 5-way 1-shot, MAML's network and length",
        paper,
        adapted(algorithm, _maml("mini_imagenet", 5, 1, False, "").experiment),
    )
    for algorithm, about, paper in (
        (
            "platipus", "PLATIPUS",
            "50.13 ± 1.86 % (as LEO's and others' tables quote it; of its settings only the "
            "network is known)",
        ),
        (
            "bmaml", "Bayesian MAML (BFA), ten heads on one extractor",
            "53.8 % (as others' tables quote it, ± 1.46 as remembered; no code; reruns by Snell & "
            "Zemel: 44.46 ± .30, chaser 43.74 ± .46)",
        ),
    )
]  # fmt: skip
_BY_NAME = {recipe.name: recipe for recipe in _FULL}
_STRIDED = {"down": "stride", "head": "mean"}
"""A cheaper network than with pooling: a quarter of the pixels in every block."""
_SMALL_IMAGES: dict[str, Any] = {
    "task": {"train_query": 5, "query": 15, "image_size": 42}, "network": {"image": [42, 42, 3]},
}  # fmt: skip
_LAST: dict[str, Any] = {"at": [10]}
"""Ten models a task, at every step, would take longer to score than to train."""
_SHORT = [
    _short(
        _BY_NAME["maml++-omniglot-20w1s"],
        "1,000 meta-steps of 4 tasks, the best 3 checkpoints, and strides instead of pooling",
        steps=1000, meta_batch=4, keep=3, network=_STRIDED,
    ),
    _short(
        _BY_NAME["maml-omniglot-20w1s"],
        "MAML++'s short run but for the algorithm: its tasks, network and length",
        steps=1000, meta_batch=4, keep=3,
        task=_BY_NAME["maml++-omniglot-20w1s"].experiment.task,
        network={**_BY_NAME["maml++-omniglot-20w1s"].experiment.network, **_STRIDED},
    ),
    _short(
        _BY_NAME["maml++-mini_imagenet-5w1s"],
        "500 meta-steps of 2 tasks with 5 queries a class, the best 3 checkpoints",
        steps=500, meta_batch=2, keep=3, task={"train_query": 5},
    ),
    _short(
        _BY_NAME["maml-omniglot-5w1s"],
        "12,000 meta-steps and a Xavier head instead of N(0, 1), which starts faster",
        steps=12_000, network={"head_init": "glorot"},
    ),
    _short(
        _BY_NAME["fomaml-omniglot-5w1s"],
        "6,000 meta-steps of 16 tasks, five inner steps of 0.4 instead of one of 2.0, on which "
        "first order starts slowly, and a Xavier head instead of N(0, 1)",
        steps=6000, meta_batch=16, network={"head_init": "glorot"},
        learner={"inner_lr": 0.4, "inner_steps": 5, "eval_steps": 5},
    ),
    _short(
        _BY_NAME["reptile-omniglot-5w1s"],
        "20,000 meta-steps and 2,000 test episodes", steps=20_000, evaluation={"episodes": 2000},
    ),
    _short(
        _BY_NAME["fomaml-mini_imagenet-5w1s"],
        "1,500 meta-steps, images of 42×42, 5 queries a class in training and 15 in the test",
        steps=1500, **_SMALL_IMAGES,
    ),
    _short(
        _BY_NAME["bmaml-mini_imagenet-5w1s"],
        "1,500 meta-steps, images of 42×42, 5 queries a class in training and 15 in the test, "
        "where the last step alone is scored",
        steps=1500, evaluation=_LAST, **_SMALL_IMAGES,
    ),
    _short(
        _BY_NAME["platipus-mini_imagenet-5w1s"],
        "600 meta-steps from a MAML of 600, images of 42×42, 5 queries a class in training and 15 "
        "in the test, 300 episodes, where the last step alone is scored",
        steps=600, evaluation={**_LAST, "episodes": 300}, **_SMALL_IMAGES,
        init_from=changed(
            _BY_NAME["maml-mini_imagenet-5w1s"].experiment, {"steps": 600, **_SMALL_IMAGES}
        ).to_json(),
    ),
    *(
        _short(
            _BY_NAME[f"{algorithm}-omniglot-5w5s"],
            f"{steps:,} meta-steps{head and ' and a Xavier head instead of N(0, 1)'}",
            steps=steps, network={"head_init": head} if head else {},
            evaluation={"episodes": 600},
        )
        for algorithm, steps, head in (
            ("maml", 3000, "glorot"), ("fomaml", 4000, "glorot"), ("reptile", 10_000, ""),
        )
    ),
]  # fmt: skip

_ACTING = [Recipe(*one) for one in named()]

RECIPES: dict[str, Recipe] = {recipe.name: recipe for recipe in (*_FULL, *_SHORT, *_ACTING)}
"""All recipes by name."""

PAPER_CURVES: dict[str, dict[int, float]] = {
    "maml": {1: 0.67, 5: 0.38, 10: 0.35},
    "pretrained": {1: 2.41, 5: 2.23, 10: 2.19},
}
"""Errors that MAML's paper prints for 5-shot sinusoids, by the number of steps."""

COMPARED = {
    "sinusoid": ("maml", "fomaml", "reptile", "pretrained"),
    "images": ("maml", "fomaml", "reptile"),
}
"""What `comparable` is for by default."""


def closest(algorithm: str, tasks: str, way: int = 5, shot: int = 1) -> Experiment:
    """The experiment that `adaptax train ALGORITHM TASKS` starts from.

    The recipe of that cell where there is one; else the paper's settings for a similar cell.
    MAML's sinusoids start from Glorot's initialisation, as `maml-sinusoid-glorot` does.

    Args:
        algorithm: a name in `ALGORITHMS`.
        tasks: a name in `TASKS`.
        way: classes an episode, where that is free.
        shot: support examples a class, likewise; families in `CELLS` come with their own.

    Raises:
        ValueError: for an algorithm that cannot do these tasks.
    """
    demand(algorithm, tasks)
    if tasks in ENVIRONMENTS:
        return reinforced(algorithm, tasks)
    if tasks in CELLS:
        return adapted(algorithm, CELLS[tasks])
    if tasks == "embeddings" and algorithm in ("leo", "class-mean", "maml"):
        return embedded(algorithm, way, shot)
    if algorithm in (*BAYESIAN, "ridge", "class-mean", "leo") or tasks == "embeddings":
        return adapted(algorithm, closest("maml", tasks, way, shot))
    family = {"anil": "maml", "meta-sgd": "maml"}.get(algorithm, algorithm)
    if tasks == "sinusoid":
        family = "maml" if family == "maml++" else family
        experiment = _BY_NAME[f"{family}-sinusoid"].experiment
        if family != "reptile":
            experiment = dataclasses.replace(experiment, network=_GLOROT)
    else:
        data = {"glyphs": "omniglot", "folder": "mini_imagenet"}.get(tasks, tasks)
        family = "maml" if family == "pretrained" else family
        cells = [f"{family}-{data}-{w}w{5 if shot > 2 else 1}s" for w in (20, 5)]
        # The tables of miniImageNet have 5 ways alone.
        (name, *_) = (cell for cell in cells[way <= 10 :] if cell in _BY_NAME)
        experiment = _BY_NAME[name].experiment
        task = {**experiment.task, "way": way, "shot": shot}
        if family in ("maml", "fomaml"):
            task["query"] = shot
        experiment = dataclasses.replace(experiment, task=task)
    learner = dict(experiment.learner)
    tune: Sequence[float] = experiment.tune
    if algorithm == "meta-sgd":
        learner.pop("eval_steps", None)
    if algorithm == "pretrained" and tasks != "sinusoid":
        learner = {"inner_lr": learner["inner_lr"], "eval_steps": 10}
        tune = [0.01, 0.03, 0.1, 0.3, 1.0]
    changes: dict[str, Any] = {"algorithm": algorithm, "learner": learner, "tune": tune}
    if tasks in ("glyphs", "folder"):
        changes |= {"tasks": tasks, **_without_paper(experiment, algorithm, learner)}
    return dataclasses.replace(experiment, **changes)


def origin(experiment: Experiment) -> str:
    """In a line: the recipe that is nearest to an experiment, and what is otherwise in this one."""
    own = _settings(experiment)

    def changes(recipe: Recipe) -> dict[str, Any]:
        theirs = _settings(recipe.experiment)
        return {
            name: own.get(name)
            for name in {**theirs, **own}
            if name != "seed" and own.get(name) != theirs.get(name)
        }

    nearest = min(RECIPES.values(), key=lambda recipe: len(changes(recipe)))
    new = [f"{name} {'left out' if value is None else json.dumps(value)}"
           for name, value in changes(nearest).items()]  # fmt: skip
    return f"recipe {nearest.name}" + (f" but for {', '.join(new)}" if new else "")


def _settings(experiment: Experiment) -> dict[str, Any]:
    """Every setting by `section.name`, but for where data lie and where it starts from."""
    values = {n: v for n, v in experiment.to_json().items() if n != "init_from"}
    single = {n: v for n, v in values.items() if not isinstance(v, dict)}
    return single | {
        f"{section}.{name}": value
        for section, of in values.items() if isinstance(of, dict)
        for name, value in of.items() if name != "path"
    }  # fmt: skip


def comparable(
    algorithm: str, tasks: str, way: int = 5, shot: int = 1, seed: int = 0
) -> Experiment:
    """The experiment of one of several algorithms that are compared on the same test episodes.

    Sinusoids are MAML's, trained with 10 shots and tested with 5, for one network. Images are as
    in MAML's protocol. Where no paper has a number (glyphs, folders), all share MAML's network;
    else each has its paper's.

    Args:
        algorithm: a name in `ALGORITHMS`.
        tasks: a name in `TASKS`.
        way: classes an episode.
        shot: support examples a class.
        seed: of training; the test episodes do not depend on it.
    """
    experiment = dataclasses.replace(closest(algorithm, tasks, way, shot), seed=seed)
    own = algorithm in ("reptile", "maml++") and tasks not in (*CELLS, *ENVIRONMENTS, "embeddings")
    if not own or (algorithm, tasks) == ("maml++", "sinusoid"):
        return experiment
    if tasks == "sinusoid":
        base = _BY_NAME["maml-sinusoid-glorot"].experiment
        learner: dict[str, Any] = {
            "inner_lr": 0.01, "inner_steps": 10, "inner_batch": 10,
            "eval_steps": 10, "eval_batch": 5, "include_query": True,
        }  # fmt: skip
        return dataclasses.replace(
            base, algorithm="reptile", learner=learner, meta_batch=5, seed=seed
        )
    base = closest("maml", tasks, way, shot)
    if tasks in ("glyphs", "folder"):
        return dataclasses.replace(
            experiment, task=base.task, network=base.network, evaluation=base.evaluation
        )
    more = {n: v for n, v in experiment.task.items() if n in ("train_shot", "train_query")}
    return dataclasses.replace(experiment, task={**base.task, **more}, evaluation=base.evaluation)


def _without_paper(
    experiment: Experiment, algorithm: str, learner: dict[str, Any]
) -> dict[str, Any]:
    """What an algorithm has otherwise on data of any kind, that no paper reports on."""
    task = {name: experiment.task[name] for name in ("way", "shot")}
    task["query"] = max(experiment.task["query"], 5)
    network = dict(experiment.network)
    if algorithm == "reptile":
        # Few examples a class: train on all that an episode has. On Omniglot the mean of the loss
        # did no worse than the sum of the released code, and better in short runs.
        learner = {**learner, "include_query": True, "eval_steps": 10, "reduction": "mean"}
    if algorithm == "pretrained":
        learner = {**learner, "adapt_everything": True}
    network["head_init"] = "glorot"  # starts faster than MAML's N(0, 1)
    return {
        "task": task,
        "learner": learner,
        "network": network,
        "steps": 2000,
        "meta_batch": min(experiment.meta_batch, 8),
        "evaluation": {"episodes": 600},
    }

"""The learners and task families that experiments name, a row of facts each.

Nothing here imports JAX. What makes a thing is named by a word, `"package.module:name"`, and
imported when it is asked for. Users name their own learners, task families and networks in the
same way, as `my_module:MyLearner`. Such a module is imported only where its user named it, see
`trust`, and never because the configuration of a run does.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib
import importlib.metadata
import inspect
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ..text import shown

KINDS = ("classification", "regression", "environment")
"""What tasks are: labels, numbers, or an environment to act in."""


@dataclasses.dataclass(frozen=True)
class Family:
    """A family of tasks.

    Args:
        make: the function that makes its `adaptax.Splits`.
        kind: one of `KINDS`.
        tags: what else is true of it, the most specific first: `images`, `curves` (functions of
            one variable), `rows` (of a table), `features` (of a fixed network), `bodies` (of brax),
            `labelled` (every class has support), `ambiguous` (likelihoods and calibration count as
            much as errors), `unpublished` (no paper reports on it).
        path: what lies at its `path`, if it wants one.
        downloaded: whether it is read from `data_root`.
        inputs: width of inputs that are not images.
        channels: of its images, unless it has a setting for that.
        like: the family whose recipes it starts from.
    """

    make: str
    kind: str
    tags: tuple[str, ...] = ()
    path: str = ""
    downloaded: bool = False
    inputs: int = 1
    channels: int = 1
    like: str = ""

    def has(self, tag: str) -> bool:
        """Whether it is of this kind, or has this tag."""
        return tag == self.kind or tag in self.tags

    def takes(self, argument: str) -> bool:
        """Whether its function has this argument."""
        return argument in inspect.signature(load(self.make)).parameters


@dataclasses.dataclass(frozen=True)
class Learner:
    """A meta-learner.

    Args:
        title: how reports and plots write it.
        make: the class, or a function that returns one.
        does: kinds and tags of the task families that it can do.
        otherwise: what is said where it cannot.
        elsewhere: kinds or tags of families, and what makes it for these instead.
        sets: arguments that it sets itself.
        first_order: what is said to those who ask for first order, if it has no such argument.
        own_protocol: its papers' tasks are not those of MAML's papers.
        alone: its papers also report queries that are predicted one by one.
        noised: comparisons show it with noise at its initialisation, too.
        baseline: comparisons of R² say what others gain over it.
        untrained: there is no network that meta-training trains.
        joint: meta-training takes no inner step, so that validation after adaptation does not
            judge what it trains.
    """

    title: str
    make: str
    does: tuple[str, ...] = ("classification", "regression")
    otherwise: str = ""
    elsewhere: tuple[tuple[str, str], ...] = ()
    sets: tuple[str, ...] = ()
    first_order: str = ""
    own_protocol: bool = False
    alone: bool = False
    noised: bool = False
    baseline: bool = False
    untrained: bool = False
    joint: bool = False

    def maker(self, family: Family) -> Callable[..., Any]:
        """What makes it for a family."""
        where = (make for tag, make in self.elsewhere if family.has(tag))
        return load(next(where, self.make))


_IMAGES = ("images", "labelled")
_OWN = (*_IMAGES, "unpublished")
_ALL = ("classification", "regression", "environment")

FAMILIES: dict[str, Family] = {
    "sinusoid": Family("adaptax.tasks:sinusoid", "regression", ("curves",)),
    "omniglot": Family("adaptax.tasks:omniglot", "classification", _IMAGES, downloaded=True),
    "mini_imagenet": Family(
        "adaptax.tasks:mini_imagenet", "classification", _IMAGES, downloaded=True, channels=3
    ),
    "glyphs": Family("adaptax.tasks:glyphs", "classification", _OWN, like="omniglot"),
    "folder": Family(
        "adaptax.tasks:folder",
        "classification",
        _OWN,
        path="a folder of images, a class a directory",
        like="mini_imagenet",
    ),
    "sinusoid_or_line": Family(
        "adaptax.tasks:sinusoid_or_line", "regression", ("curves", "ambiguous")
    ),
    "finite_sinusoids": Family(
        "adaptax.tasks:finite_sinusoids", "regression", ("curves", "ambiguous")
    ),
    "circles": Family("adaptax.tasks:circles", "classification", ("ambiguous",), inputs=2),
    "celeba": Family(
        "adaptax.tasks:celeba",
        "classification",
        (*_IMAGES, "ambiguous"),
        downloaded=True,
        channels=3,
    ),
    "fsmol": Family(
        "adaptax.tasks:fsmol", "regression", ("ambiguous",), downloaded=True, inputs=2048
    ),
    "table": Family(
        "adaptax.recipes.rows:numbers",
        "regression",
        ("rows",),
        path="a CSV, Parquet or Arrow file",
    ),
    "table_classes": Family(
        "adaptax.recipes.rows:classes",
        "classification",
        ("rows",),
        path="a CSV, Parquet or Arrow file",
    ),
    "embeddings": Family(
        "adaptax.tasks:embeddings",
        "classification",
        ("features", "labelled"),
        path="a file that `adaptax embed` wrote",
    ),
    "navigation": Family("adaptax.rl:navigation", "environment"),
    "bandit": Family("adaptax.rl:bandit", "environment"),
    "tabular_mdp": Family("adaptax.rl:tabular_mdp", "environment"),
    "half_cheetah": Family("adaptax.rl:half_cheetah", "environment", ("bodies",)),
    "ant": Family("adaptax.rl:ant", "environment", ("bodies",)),
}
"""All task families by name."""

LEARNERS: dict[str, Learner] = {
    "maml": Learner("MAML", "adaptax.algorithms.maml:MAML", _ALL, noised=True),
    "fomaml": Learner("FOMAML", "adaptax.algorithms.maml:FOMAML", _ALL, sets=("first_order",)),
    "anil": Learner("ANIL", "adaptax.algorithms.maml:ANIL"),
    "meta-sgd": Learner("Meta-SGD", "adaptax.algorithms.maml:MetaSGD", _ALL),
    "maml++": Learner(
        "MAML++",
        "adaptax.algorithms.maml_plus_plus:MAMLPlusPlus",
        first_order="MAML++ is of first order for a part of meta-training; instead of "
        "--first-order, use --set learner.derivative_order_annealing=1",
        own_protocol=True,
    ),
    "reptile": Learner(
        "Reptile",
        "adaptax.algorithms.reptile:Reptile",
        _ALL,
        first_order="Reptile takes no second derivatives anyway; leave out --first-order",
        own_protocol=True,
        alone=True,
    ),
    "platipus": Learner("PLATIPUS", "adaptax.algorithms.platipus:ProbabilisticMAML"),
    "bmaml": Learner(
        "BMAML",
        "adaptax.algorithms.bmaml:BayesianMAML",
        _ALL,
        elsewhere=(("environment", "adaptax.algorithms.svpg:BayesianMAML"),),
    ),
    "emaml": Learner("EMAML", "adaptax.algorithms.maml_ensemble:MAMLEnsemble"),
    "leo": Learner(
        "LEO",
        "adaptax.algorithms.leo:LEO",
        ("curves", "features"),
        "LEO generates linear classifiers of embeddings, or small regressors of {curves}, and "
        "nothing as large as a network for {tasks}; of images, `adaptax pretrain` and `adaptax "
        "embed` make embeddings first",
        elsewhere=(("regression", "adaptax.algorithms.leo_regression:LEORegression"),),
        first_order="LEO differentiates through its inner loop; leave out --first-order",
    ),
    "pretrained": Learner(
        "Pretrained",
        "adaptax.recipes.parts:Pretrained",
        _ALL,
        sets=("inner_steps",),
        joint=True,
    ),
    "cavia": Learner("CAVIA", "adaptax.algorithms.context:ContextAdaptation"),
    "prototypes": Learner(
        "Prototypical network",
        "adaptax.algorithms.prototypes:PrototypicalNetwork",
        ("labelled",),
        "prototypes are of classes that all have support, which {tasks} tasks have not; take "
        "another learner, such as maml",
        first_order="a prototypical network has no inner loop; leave out --first-order",
    ),
    "protomaml": Learner(
        "ProtoMAML",
        "adaptax.algorithms.proto_maml:ProtoMAML",
        ("labelled",),
        "prototypes are of classes that all have support, which {tasks} tasks have not; take "
        "another learner, such as maml",
    ),
    "gp": Learner(
        "Gaussian process",
        "adaptax.algorithms.gaussian_process:GaussianProcessHead",
        ("regression",),
        "a Gaussian process is for numbers ({regression}), not for classes, as {tasks} has them; "
        "compare with prototypes instead",
    ),
    "class-mean": Learner(
        "Nearest class mean",
        "adaptax.algorithms.baselines:NearestClassMean",
        ("labelled",),
        "the nearest class mean is for classes that all have support, which {tasks} tasks are "
        "not; compare with pretrained instead",
        untrained=True,
    ),
    "ridge": Learner(
        "Ridge",
        "adaptax.algorithms.baselines:RidgeRegression",
        ("regression",),
        "ridge regression is for numbers ({regression}), not for classes, as {tasks} has them; "
        "compare with class-mean or pretrained instead",
        baseline=True,
        untrained=True,
    ),
}
"""All learners by name; `plugins` are added to them, and users' own are named by their modules."""


def names_with(tag: str) -> tuple[str, ...]:
    """Return the families of a kind or with a tag."""
    return tuple(name for name, family in FAMILIES.items() if family.has(tag))


TITLES = {name: row.title for name, row in LEARNERS.items()}
"""How reports and plots write the learners."""

CURVES, REGRESSIONS, IMAGES = names_with("curves"), names_with("regression"), names_with("images")
ENVIRONMENTS, BODIES = names_with("environment"), names_with("bodies")
AMBIGUOUS = names_with("ambiguous")
"""Names of families: functions of one variable, numbers, images, environments, those of brax, and
those on which uncertainty counts."""


def learner(name: Any) -> Learner:
    """Return the row of a learner.

    Raises:
        ValueError: if there is none, or its module is not trusted.
    """
    if isinstance(name, str) and name in LEARNERS:
        return LEARNERS[name]
    if isinstance(name, str) and name in plugins():
        return Learner(name, plugins()[name], _ALL)
    check_own(name, "algorithm", [*LEARNERS, *plugins()])
    return Learner(name.partition(":")[2], name, _ALL)


def family(name: Any) -> Family:
    """Return the row of a task family.

    One's own is of classes if its function takes `way`, else of numbers, unless the function has
    an attribute `kind` that says otherwise.

    Raises:
        ValueError: if there is none, or its module is not trusted.
    """
    if isinstance(name, str) and name in FAMILIES:
        return FAMILIES[name]
    check_own(name, "task family", FAMILIES)
    make = load(name)
    classes = "way" in inspect.signature(make).parameters
    kind = getattr(make, "kind", "classification" if classes else "regression")
    if kind not in KINDS:
        raise ValueError(f"{name}.kind is {kind!r}; expected one of {', '.join(KINDS)}")
    return Family(name, kind, ("labelled", "own") if classes else ("own",))


def check_supported(algorithm: str, tasks: str) -> None:
    """Raise unless a learner can do these tasks at all.

    Args:
        algorithm: the name of a learner.
        tasks: the name of a task family.

    Raises:
        ValueError: if it cannot, and what can.
    """
    row, of = learner(algorithm), family(tasks)
    if any(of.has(tag) for tag in row.does):
        return
    if of.kind == "environment":
        able = ", ".join(name for name, one in LEARNERS.items() if of.kind in one.does)
        raise ValueError(
            f"{tasks} tasks are of reinforcement learning, for {able}, and not for {algorithm}"
        )
    known = {tag: ", ".join(names_with(tag)) for tag in ("curves", "regression")}
    raise ValueError(row.otherwise.format(tasks=tasks, **known))


@functools.cache
def plugins() -> dict[str, str]:
    """Return the learners of installed packages: entry points of the group `adaptax.learners`."""
    found = importlib.metadata.entry_points(group="adaptax.learners")
    return {point.name: point.value for point in found}


_trusted: set[str] = set()


def trust(*words: str) -> None:
    """Let modules be imported for what experiments name in them.

    Args:
        words: modules, or what is in them: `my_module` or `my_module:MyLearner`.
    """
    _trusted.update(word.partition(":")[0] for word in words)


def own(*words: str | None) -> list[str]:
    """Return those words that name something in a module of the user's."""
    return [word for word in words if isinstance(word, str) and ":" in word]


def own_modules(value: Any) -> set[str]:
    """Return the modules that the description of an experiment names as its own."""
    if not isinstance(value, Mapping):
        return set()
    network = value.get("network")
    model = network.get("model") if isinstance(network, Mapping) else None
    words = own(value.get("algorithm"), value.get("tasks"), model)
    return {word.partition(":")[0] for word in words} | own_modules(value.get("init_from"))


def check_own(word: Any, what: str, known: Iterable[str]) -> None:
    """Raise unless a word names something in a module that is trusted.

    Args:
        word: of an experiment.
        what: it should be.
        known: the names that there are beside.

    Raises:
        ValueError: saying what was expected.
    """
    module, colon, name = word.partition(":") if isinstance(word, str) else ("", "", "")
    if not (colon and name.isidentifier() and all(map(str.isidentifier, module.split(".")))):
        raise ValueError(f"{word!r:.80} is no {what}; {one_of(str(word), known)}")
    if module not in _trusted:
        raise ValueError(
            f"{shown(word)} is in a module of your own, and nothing is imported because a file "
            f"names it: name it on the command line too, or give --trust {shown(module)} (in "
            f'Python, adaptax.recipes.trust("{shown(module)}"))'
        )


@functools.cache
def load(word: str) -> Callable[..., Any]:
    """Import what a word of the table, or of its user, names.

    Raises:
        ValueError: if the module cannot be imported, or has no such thing.
    """
    module, _, name = word.partition(":")
    if module in _trusted and (here := os.getcwd()) not in sys.path:
        sys.path.append(here)
    try:
        found = getattr(importlib.import_module(module), name)
    except Exception as error:
        if module not in _trusted:
            raise
        why = f"{type(error).__name__}: {error}"
        raise ValueError(f"{word} cannot be imported: {shown(why)}") from error
    if not callable(found):
        raise ValueError(f"{word} is {type(found).__name__}; expected a class or a function")
    return found


def one_of(word: str, known: Iterable[Any]) -> str:
    """Say which names there are, and the nearest to one that is none of them."""
    names = [str(name) for name in known]
    near = difflib.get_close_matches(word[:100], names, 1, 0.5)
    hint = f"; did you mean {near[0]}?" if near else ""
    return (f"there are {', '.join(names)}" if names else "there are none") + hint

"""The tables of results in the pages, made from `benchmarks/results/*.json`.

`python benchmarks/results.py` rewrites what stands between `<!-- results: NAME -->` and
`<!-- end -->` in README.md and docs/; `--check` only compares, and fails where a page differs. A
number with ± that stands outside of these tables has to be in `BY_HAND`, with where it is from.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).with_suffix("")
TITLES = {
    "maml": "MAML",
    "fomaml": "FOMAML",
    "reptile": "Reptile",
    "pretrained": "pretrained, step tuned",
    "leo": "LEO",
    "meta-sgd": "Meta-SGD on the head",
    "class-mean": "nearest class mean",
    "BMAML": "Bayesian MAML",
}
BY_HAND = {
    "4.7 ± 3.8": "navigation: paired over the 40 goals, of returns by goal that were not kept",
    "-0.79 ± 0.42": "the expansion with ReLU: `adaptax analyze taylor omniglot --relu`, not kept",
    "35.3 ± 2.6": "a MAML++ run scored by running statistics, on 100 episodes; not kept",
    "69.6 ± 2.2": "the same run scored by the batch",
    **dict.fromkeys(
        ["0.135 ± 0.009", "0.155 ± 0.011", "0.493 ± 0.028", "0.686 ± 0.046", "0.751 ± 0.050",
         "1.007 ± 0.047", "3.05 ± 0.13", "3.09 ± 0.13", "1.31 ± 0.29", "1.66 ± 0.23", "2.14 ± 0.18",
         "2.26 ± 0.75", "60.8 ± 1.4", "64.6 ± 2.8"],
        "context adaptation and Gaussian process on sinusoids: the page's command; not kept",
    ),
    **dict.fromkeys(
        ["94.87 ± 0.84", "96.16 ± 0.77", "96.21 ± 0.77", "1.24 ± 0.59", "1.32 ± 0.59"],
        "prototypes on glyphs: the page's command; not kept",
    ),
}  # fmt: skip
"""Numbers in the pages that no file holds."""

Table = Callable[[], list[list[str]]]
TABLES: dict[str, tuple[Table, tuple[str, ...]]] = {}


@cache
def load(name: str) -> dict[str, Any]:
    """A file of results by its name."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def table(name: str, *files: str) -> Callable[[Table], Table]:
    """Register a table under a name, with the files it is made from."""

    def register(make: Table) -> Table:  # fmt: skip
        TABLES[name] = (make, files)
        return make

    return register


def number(value: float, digits: int = 3) -> str:
    """A number with so many decimals."""
    return f"{value:.{digits}f}"


def pm(scores: dict, metric: str, digits: int = 3, scale: float = 1.0, unit: str = "") -> str:
    """A mean with half of its 95 % interval."""
    mean = scores.get(metric, scores.get("mean"))
    half = scores.get(f"{metric}_ci95", scores.get("ci95"))
    if mean is None:
        return "not finite"
    if half is None:
        return f"{scale * mean:.{digits}f}{unit}" if mean < 1e4 else f"{mean:.0e}"
    return f"{scale * mean:.{digits}f} ± {scale * half:.{digits}f}{unit}"


def percent(scores: dict, metric: str = "accuracy", digits: int = 2) -> str:
    """A fraction with its interval, in percent."""
    return pm(scores, metric, digits, 100, " %")


def surviving(scores: dict) -> str:
    """Squared error of the tasks that did not diverge, and how many did."""
    counted = f" ({scores['diverged']} diverged)" if scores["diverged"] else ""
    if counted:
        return number(scores["mse_not_diverged"]) + counted
    return pm(scores, "mse")


def at(report: dict, step: int) -> dict:
    """The scores after so many steps."""
    return next(scores for scores in report["curve"] if scores["step"] == step)


def rows(*files: str) -> list[dict]:
    """The rows of several comparisons."""
    return [row for file in files for row in load(file)["rows"]]


def title(name: str) -> str:
    """An algorithm's name in a table."""
    return TITLES.get(name, name)


def minutes(seconds: float) -> str:
    """A duration in a few letters."""
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


@table("sinusoid", "compare-sinusoid")
def sinusoid() -> list[list[str]]:
    found = [["mean squared error after", "1 step", "5 steps", "10 steps", "paper"]]
    for row in load("compare-sinusoid")["algorithms"]:
        curve = []
        for step in (1, 5, 10):
            lost = at(row["reports"][0], step)["diverged"]
            score = pm(row["scores"][f"{step} step{'s' * (step > 1)}"], "mse")
            curve.append(score + (f" ({lost} diverged)" if lost else ""))
        found.append([title(row["algorithm"]), *curve, row["paper"]])
    return found


SEEDS = [f"maml-sinusoid{start}-seed{n}" for start in ("-glorot", "") for n in (10, 11, 12)]


@table("sinusoid-seeds", *SEEDS)
def sinusoid_seeds() -> list[list[str]]:
    head = ["weights at first", "seed", "1 step", "5 steps", "10 steps", "10 steps, all tasks"]
    found = [head]
    for start, ours in (("Glorot", SEEDS[:3]), ("the code's", SEEDS[3:])):
        for name in ours:
            report = load(name)
            last = at(report, 10)
            all_tasks = pm(last, "mse")
            curve = [surviving(at(report, step)) for step in (1, 5, 10)]
            found.append([start, name[-2:], *curve, all_tasks])
        means = [
            number(sum(at(load(name), step)["mse_not_diverged"] for name in ours) / 3)
            for step in (1, 5, 10)
        ]
        found.append([start, "mean", *means, ""])
    return found


OMNIGLOT = [
    "maml-omniglot-5w1s-short", "fomaml-omniglot-5w1s-short",
    "reptile-omniglot-5w1s-short", "reptile-omniglot-5w1s-short-mean",
]  # fmt: skip


@table("omniglot", *OMNIGLOT)
def omniglot() -> list[list[str]]:
    head = ["recipe", "meta-steps", "training", "transductive", "negative log-likelihood"]
    found = [[*head, "not transductive", "negative log-likelihood", "paper"]]
    for name in OMNIGLOT:
        report = load(name)
        other = report["non_transductive"]["result"]
        label = f"`{report['recipe']}`" + (", mean of the inner loss" if "mean" in name else "")
        found.append([
            label, f"{report['training']['steps']:,}", minutes(report["training"]["seconds"]),
            percent(report["result"]), number(report["result"]["nll"]),
            percent(other), number(other["nll"]), report["paper"],
        ])  # fmt: skip
    return found


MINI = [f"{name}-mini_imagenet-5w1s-short" for name in ("fomaml", "bmaml", "platipus")]
UNTRAINED = "fomaml-mini_imagenet-5w1s-untrained"


@table("mini-imagenet", UNTRAINED, *MINI)
def mini_imagenet() -> list[list[str]]:
    found = [["", "meta-steps", "test episodes", "accuracy", "paper"]]

    def row(name: str, steps: str, report: dict, paper: str = "") -> None:
        episodes = str(report["protocol"]["episodes"])
        found.append([name, steps, episodes, percent(report["result"]), paper])

    row("the untrained network", "0", load(UNTRAINED))
    for name in MINI[:2]:
        report = load(name)
        row(f"`{name}`", f"{report['training']['steps']:,}", report, report["paper"])
    platipus = load(MINI[2])
    row("the MAML that PLATIPUS starts from", "600", platipus["maml_it_starts_from"])
    row(f"`{MINI[2]}`", "600 + 600", platipus, platipus["paper"])
    return found


@table("maml-plus-plus", "ablate-omniglot-20w1s")
def maml_plus_plus() -> list[list[str]]:
    found = [["", "single model", "ensemble of the best 3 checkpoints", "trained in"]]
    for row in rows("ablate-omniglot-20w1s"):
        rate = row["single"]["protocol"]["inner_lr"]
        single, ensemble = (percent(row[which]["result"]) for which in ("single", "ensemble"))
        found.append(
            [f"{row['name']} (inner rate {rate})", single, ensemble, minutes(row["seconds"])]
        )
    return found


def models_of(row: dict) -> str:
    """How many models a learner predicts by."""
    model = row["scores"]["protocol"]["model"]
    return "one" if model == "single" else model.removeprefix("ensemble of ")


@table("ambiguous", "compare-ambiguous")
def ambiguous() -> list[list[str]]:
    head = ["", "models", "squared error", "negative log-likelihood", "in 50 % intervals"]
    found = [[*head, "in 90 % intervals", "trained in"]]
    for row in rows("compare-ambiguous"):
        scores = row["scores"]["result"]
        covered = [percent(scores, f"coverage_{level}", 1) for level in (50, 90)]
        found.append([
            title(row["name"]), models_of(row), pm(scores, "mse"), pm(scores, "nll"), *covered,
            minutes(row["seconds"]),
        ])  # fmt: skip
    return found


@table("leo-regression", "compare-leo-sinusoid_or_line")
def leo_regression() -> list[list[str]]:
    found = [["squared error", "all", "median", "waves", "lines", "trained in"]]
    for row in rows("compare-leo-sinusoid_or_line"):
        scores = row["scores"]["result"]
        families = [pm(row["families"][name], "mse") for name in ("waves", "lines")]
        found.append([
            title(row["name"]), pm(scores, "mse"), number(scores["median_mse"]), *families,
            minutes(row["seconds"]),
        ])  # fmt: skip
    return found


@table("celeba", "compare-celeba", "compare-celeba-bmaml")
def celeba() -> list[list[str]]:
    head = ["", "accuracy, mean of the readings", "readings covered, of 3"]
    found = [[*head, "negative log-likelihood"]]
    for row in rows("compare-celeba", "compare-celeba-bmaml"):
        scores = row["scores"]["result"]
        covered = pm(scores, "readings", 2)
        found.append([title(row["name"]), percent(scores, digits=1), covered, pm(scores, "nll")])
    return found


@table("circles", "compare-circles")
def circles() -> list[list[str]]:
    found = [["", "models", "accuracy", "negative log-likelihood", "ECE", "trained in"]]
    for row in rows("compare-circles"):
        scores = row["scores"]["result"]
        found.append([
            title(row["name"]), models_of(row), percent(scores), pm(scores, "nll"),
            number(scores["ece"]), minutes(row["seconds"]),
        ])  # fmt: skip
    return found


@table("active", "active-sinusoid_or_line")
def active() -> list[list[str]]:
    learners = load("active-sinusoid_or_line")["learners"]
    found = [["labels"]]
    for learner in learners:
        name = title(learner["learner"])
        found[0] += [f"{name}, at random", f"{name}, by variance"]
    for points in zip(*(learner["curve"] for learner in learners)):
        row = [str(points[0]["labels"])]
        for point in points:
            row += [pm(point[how], "mse", 2) for how in ("random", "entropy")]
        found.append(row)
    return found


@table("active-omniglot", "active-omniglot")
def active_omniglot() -> list[list[str]]:
    head = ["labels", "at random", "by entropy", "by disagreement", "entropy − random, paired"]
    found = [[*head, "disagreement − random, paired"]]
    for point in load("active-omniglot")["learners"][0]["curve"]:
        scores = [percent(point[how]) for how in ("random", "entropy", "disagreement")]
        paired = [point[name] for name in ("difference", "difference_disagreement")]
        differences = [pm(pair, "accuracy", 2, 100) for pair in paired]
        found.append([str(point["labels"]), *scores, *differences])
    return found


@table("finite-sinusoids", "finite_sinusoids", "finite_sinusoids-emaml-rate")
def finite_sinusoids() -> list[list[str]]:
    every = rows("finite_sinusoids", "finite_sinusoids-emaml-rate")
    cells = sorted({(row["tasks"], row["shot"]) for row in every})
    found = [["training tasks, shots", *(f"{tasks:,}, {shot}" for tasks, shot in cells)]]
    names = {
        "bmaml": "BMAML (chaser)", "emaml": "EMAML, the same inner rate of 0.001",
        "emaml@0.025": "EMAML, 25 times that",
    }  # fmt: skip
    for key, name in names.items():
        scores = {
            (r["tasks"], r["shot"]): r["scores"]["mse"] for r in every if r["algorithm"] == key
        }
        found.append([name, *(pm(scores[cell], "mse", 2) for cell in cells)])
    return found


@table("fsmol", "compare-fsmol")
def fsmol() -> list[list[str]]:
    head = ["", "R²", "R² less ridge's, assay by assay", "squared error"]
    found = [[*head, "negative log-likelihood", "in 90 % intervals"]]
    best_first = sorted(rows("compare-fsmol"), key=lambda row: -row["scores"]["result"]["r2"])
    for row in best_first:
        scores = row["scores"]["result"]
        ridge = "" if row["name"] == "Ridge" else pm(row["r2_minus_ridge"], "")
        found.append([
            row["name"], pm(scores, "r2"), ridge, pm(scores, "mse"), pm(scores, "nll"),
            percent(scores, "coverage_90", 1),
        ])  # fmt: skip
    return found


@table("intervals", "intervals")
def intervals() -> list[list[str]]:
    levels = ("50", "80", "90", "95")
    found = [
        ["tasks", "learner", "calibration tasks", *(f"of {n} %" for n in levels), "width, 90 %"]
    ]
    for cell in load("intervals")["cells"]:
        rows, halves = cell["rows"], cell.get("halves")
        head = [cell["family"].replace("_", " "), cell["title"]]
        shown = [
            f"{100 * r['coverage']:.1f} ± {100 * max(r['ci95'], r['calibration_ci95']):.1f} %"
            for r in rows
        ]
        # Not finite where adaptation diverged for a task.
        width = "not finite" if rows[2]["size"] is None else number(rows[2]["size"], 2)
        found.append([*head, f"{cell['calibration_tasks']:,}", *shown, width])
        if halves:
            mean = [f"{100 * halves[f'{float(n) / 100:g}']['coverage']:.1f} %" for n in levels]
            found.append([*head, "random halves, mean", *mean, ""])
    return found


@table("embeddings", "compare-embeddings-5w1s", "compare-embeddings-5w5s")
def embeddings() -> list[list[str]]:
    files = [load(f"compare-embeddings-5w{shot}s")["algorithms"] for shot in (1, 5)]
    found = [["", "1-shot", "5-shot"]]
    for pair in zip(*files):
        scores = [percent(row["scores"]["own protocol"]) for row in pair]
        found.append([title(pair[0]["algorithm"]), *scores])
    return found


def returns(name: str, digits: int) -> list[list[str]]:
    """Returns by gradient step, with the paper's beside."""
    steps = range(4)
    found = [["return after", *map(str, steps), "paper"]]
    for row in rows(name):
        by_step = {point["step"]: pm(point, "return", digits) for point in row["curve"]}
        paper = " / ".join(str(value) for value in row["paper"].values())
        found.append([title(row["name"]), *(by_step.get(step, "") for step in steps), paper])
    return found


@table("navigation", "compare-navigation")
def navigation() -> list[list[str]]:
    return returns("compare-navigation", 1)


@table("bandit", "compare-bandit")
def bandit() -> list[list[str]]:
    return returns("compare-bandit", 2)


@table("tabular-mdp", "compare-tabular_mdp")
def tabular_mdp() -> list[list[str]]:
    return returns("compare-tabular_mdp", 2)


@table("half-cheetah", "maml-half_cheetah-direction-short")
def half_cheetah() -> list[list[str]]:
    curve = load("maml-half_cheetah-direction-short")["curve"]
    head = ["gradient steps", *(str(point["step"]) for point in curve)]
    return [head, ["return", *(pm(point, "return", 1) for point in curve)]]


@table("curvature", "navigation-curvature")
def curvature() -> list[list[str]]:
    found = [["curvature from", *(f"return after {step}" for step in range(4))]]
    for fraction, mean in load("navigation-curvature")["mean_return_after_steps"].items():
        found.append([f"{fraction} of the trajectories", *(number(value, 1) for value in mean)])
    return found


@table("gradients", "gradient_combinations")
def gradients() -> list[list[str]]:
    found = [["minibatches", "sum", "mean", "last alone"]]
    cells = {
        (row["inner_steps"], row["kind"]): percent(row) for row in rows("gradient_combinations")
    }
    for k in (1, 2, 3, 4):
        found.append([str(k), *(cells.get((k, kind), "") for kind in ("sum", "mean", "last"))])
    return found


@table(
    "speed", "meta_step", "meta_step-84", "meta_step-84-first", "sinusoid", "leo_step", "rl_steps"
)
def speed() -> list[list[str]]:
    step, rl = load("meta_step")["results"], load("rl_steps")["results"]
    leo, waves = load("leo_step")["results"], load("sinusoid")["results"]
    large, first = (load(f"meta_step-84{order}")["results"] for order in ("", "-first"))

    def times(result: dict, digits: int = 2) -> str:
        return f"{result['times_faster_than_torch']:.{digits}f} times faster"

    one_by_one = rl["torch, one by one"]["times_faster"]
    batched = rl["torch, batched"]["times_faster"]
    alike = rl["torch, batched, ¼ curvature"]["times_faster"]
    ours = ["adaptax.fit", "adaptax.fit, ¼ curvature", "adaptax.fit, ⅒ curvature"]
    whole, quarter, tenth = (one_by_one[name] for name in ours)
    return [
        ["", "against PyTorch eager"],
        [
            "meta-step of MAML, conv4 on Omniglot, 5 steps, 16 tasks", times(step["adaptax Conv4"]),
        ],
        ["the same with a Flax NNX model, unchanged", times(step["adaptax Flax NNX"])],
        [
            "meta-step of MAML, conv4-32 on images of 84×84, 5 steps, 4 tasks",
            times(large["adaptax Conv4"]),
        ],
        ["the same with a Flax NNX model, unchanged", times(large["adaptax Flax NNX"])],
        ["the same, first order", times(first["adaptax Conv4"])],
        ["a meta-iteration of MAML's sinusoids in `fit`", times(waves["adaptax.fit"], 0)],
        ["LEO's meta-step, 12 tasks, embeddings of 640, 1-shot", times(leo["adaptax, 1-shot"], 1)],
        ["the same, 5-shot", times(leo["adaptax, 5-shot"], 1)],
        [
            "MAML-TRPO, 2-D navigation, beside a PyTorch loop that calls the policy at every step",
            f"{whole:.1f} times faster; {quarter:.0f} with the recipes' quarter of the curvature, "
            f"{tenth:.0f} with a tenth",
        ],
        [
            "the same, beside a loop that steps a task's trajectories as an array",
            f"{batched[ours[0]]:.1f} times faster; {alike[ours[1]]:.1f} where both take a quarter",
        ],
    ]  # fmt: skip


@table("rl-speed", "rl_steps")
def rl_speed() -> list[list[str]]:
    ours = {"adaptax.fit": "whole", "adaptax.fit, ¼ curvature": "a quarter",
            "adaptax.fit, ⅒ curvature": "a tenth"}  # fmt: skip
    found = [["", "steps a second", *(f"ours is faster, {part}" for part in ours.values())]]
    for name, result in load("rl_steps")["results"].items():
        faster = result.get("times_faster", {})
        ratios = [f"{faster[key]:.1f}" if key in faster else "" for key in ours]
        if name in ours:
            ratios = ["1" if key == name else "" for key in ours]
        found.append([name, f"{result['steps_per_second']:,.0f}", *ratios])
    return found


@table("particles", "particles")
def particles() -> list[list[str]]:
    results = load("particles")["results"]
    found = [["ten particles", "times the time of one"]]
    for name in ("BMAML heads", "EMAML", "BMAML"):
        ratio = results[f"{name}, 10 particles"]["seconds_by_one_particle"]
        found.append([{"BMAML heads": "Bayesian MAML, heads on a shared extractor",
                       "EMAML": "EMAML, whole nets", "BMAML": "Bayesian MAML, whole nets"}[name],
                      f"{ratio:.2f}"])  # fmt: skip
    return found


@table("memory", "memory")
def memory() -> list[list[str]]:
    found = [["mapping", "tasks", "inner steps", "`checkpoint=1`", "XLA's temporaries, MB"]]
    for row in load("memory")["results"]:
        remat = "yes" if row["remat"] else "no"
        counts = [str(row["tasks"]), str(row["steps"]), remat]
        found.append([f"`{row['mapping']}`", *counts, f"{row['temporary_mb']:.0f}"])
    return found


def short(value: float) -> str:
    """A number with three digits, or all before its point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


@table("modes", "meta_gradient")
def modes() -> list[list[str]]:
    """Milliseconds, and megabytes of temporaries, in every mode; in bold what `"auto"` takes."""
    found = load("meta_gradient")["results"]
    names = {
        "mlp": "MLP of the sinusoids", "conv4-28": "conv4, 28×28",
        "conv4-84": "conv4-32, 84×84", "lstm": "LSTM, 64 steps",
        "transformer": "transformer, 1.0 M, 256 tokens",
    }  # fmt: skip
    order = list(dict.fromkeys(row["mode"] for row in found))
    lines = [["", "inner steps", *(f"`{mode}`" for mode in order)]]
    for name, title in names.items():
        for steps in sorted({row["steps"] for row in found if row["model"] == name}):
            own = {r["mode"]: r for r in found if (r["model"], r["steps"]) == (name, steps)}
            cells = []
            for mode in order:
                row = own.get(mode)
                if row is None:
                    cells.append("")
                    continue
                seconds = row["seconds"]
                time = "not run" if seconds is None else f"{short(1e3 * seconds)} ms"
                text = f"{time}, {short(row['temporary_mb'])} MB"
                cells.append(f"**{text}**" if row["auto"] == mode else text)
            lines.append([title, str(steps), *cells])
    return lines


@table("headline")
def headline() -> list[list[str]]:
    """What the README shows: a line for each kind of task."""
    waves = {row["algorithm"]: row["reports"][0] for row in load("compare-sinusoid")["algorithms"]}
    maml = load(OMNIGLOT[0])
    ambiguous = {row["name"]: row["scores"]["result"] for row in rows("compare-ambiguous")}
    leo = load("compare-embeddings-5w1s")["algorithms"]
    leo_scores = {row["algorithm"]: percent(row["scores"]["own protocol"], "") for row in leo}
    moves = {row["name"]: at(row, 1) for row in rows("compare-navigation")[:6]}
    fsmol = {row["name"]: row["scores"]["result"] for row in rows("compare-fsmol")}
    step = load("meta_step")["results"]["adaptax Conv4"]["times_faster_than_torch"]
    loop = load("sinusoid")["results"]["adaptax.fit"]["times_faster_than_torch"]
    return [
        ["task", "measured", "here", "beside"],
        [
            "sinusoids, 5 shots, 1 step", "MAML, squared error", surviving(at(waves["maml"], 1)),
            f"paper 0.67; pretrained {surviving(at(waves['pretrained'], 1))}",
        ],
        [
            "Omniglot, 5-way 1-shot", "MAML, a fifth of the paper's length",
            percent(maml["result"]), f"paper {maml['paper']}",
        ],
        [
            "miniImageNet features, 5-way 1-shot", "LEO", leo_scores["leo"],
            f"class mean {leo_scores['class-mean']}",
        ],
        [
            "a wave or a line, 5 noisy points", "targets in PLATIPUS's 90 % intervals",
            percent(ambiguous["PLATIPUS"], "coverage_90", 1),
            f"MAML {percent(ambiguous['MAML'], 'coverage_90', 1)}",
        ],
        [
            "FS-Mol, 16 molecules", "EMAML, R²", pm(fsmol["EMAML"], "r2"),
            f"ridge regression {pm(fsmol['Ridge'], 'r2')}",
        ],
        [
            "2-D navigation, 1 gradient step", "MAML-TRPO, return", pm(moves["MAML"], "return", 1),
            f"paper -11.68; joint training {pm(moves['Pretrained'], 'return', 1)}",
        ],
        [
            "speed on two cores", "against PyTorch eager", f"{step:.1f} times faster",
            f"sinusoids, whole loop: {loop:.0f} times",
        ],
    ]  # fmt: skip


def source(name: str) -> str:
    """Where a table's numbers are from: command, hardware, versions, and what has changed since."""
    lines = []
    for file in TABLES[name][1]:
        found = load(file)
        command = (
            found.get("command") or found.get("about") or [run["command"] for run in found["runs"]]
        )
        commands = command if isinstance(command, list) else [command]
        hardware, versions = found.get("hardware"), found.get("versions")
        facts = []
        if hardware:
            cores = hardware["cores"]
            facts.append(f"{hardware['cpu']}, {cores} core{'s' * (cores > 1)}")
        if versions:
            facts.append(f"JAX {versions['jax']}")
        facts += [f"{key} {found[key]}" for key in ("date",) if key in found]
        validated = found.get("training", {}).get("validated")
        facts += [f"validated {validated}"] if validated else []
        text = ", ".join(
            f"`{c}`" if " " in c and c[0].islower() and ";" not in c else c for c in commands
        )
        line = f"- `{file}.json`: {text}" + (f" ({'; '.join(facts)})" if facts else "")
        if "run_before" in found:
            line += f". **Run before** {found['run_before'].rstrip('.')}"
        lines.append(line + ".")
    return "\n".join(lines)


def render(name: str) -> str:
    """A table in Markdown, and below it its sources."""
    head, *body = TABLES[name][0]()
    lines = [head, ["---"] * len(head), *body]
    text = "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
    return text + (f"\n\n{source(name)}" if TABLES[name][1] else "")


MARK = re.compile(r"(<!-- results: (\S+) -->\n).*?(<!-- end -->)", re.S)


def filled(text: str) -> str:
    """A page with its tables made anew."""
    return MARK.sub(lambda m: f"{m[1]}\n{render(m[2])}\n\n{m[3]}", text)


def strangers(text: str) -> list[str]:
    """Numbers with ± outside of the tables that `BY_HAND` does not list."""
    text = re.sub(r"^```.*?^```", "", MARK.sub("", text), flags=re.S | re.M)
    found = re.findall(r"[-−]?[\d.]+ ± [\d.]+", text)
    return [number for number in found if number.replace("−", "-") not in BY_HAND]


def pages() -> Iterable[Path]:
    """The README and the pages of the documentation."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pages", nargs="*", type=Path, default=pages(), help="all by default")
    parser.add_argument("--check", action="store_true", help="compare, and change nothing")
    options = parser.parse_args()
    faults = []
    used = set()
    for page in options.pages:
        text = page.read_text(encoding="utf-8")
        used |= {match[2] for match in MARK.finditer(text)}
        faults += [f"{page}: {number} is of no file of results" for number in strangers(text)]
        new = filled(text)
        if new != text and options.check:
            faults.append(f"{page}: differs from its data; run python benchmarks/results.py")
        elif new != text:
            page.write_text(new, encoding="utf-8")
    if options.pages == pages():
        faults += [f"the table {name} is on no page" for name in sorted(TABLES.keys() - used)]
    print(*faults, sep="\n", end="\n" * bool(faults))
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())

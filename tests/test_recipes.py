"""Recipes: every one can be built, and they are the papers' tables."""

import dataclasses
import json
from fnmatch import fnmatchcase
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import adaptax as ax
from adaptax.recipes import (
    BODIES,
    COMPARED,
    CURVES,
    ENVIRONMENTS,
    FAMILIES,
    LEARNERS,
    PAPER_CURVES,
    RECIPES,
    ROWS,
    TITLES,
    Experiment,
    ablated,
    authors,
    book,
    check_supported,
    closest,
    comparable,
    effective,
)

KEY = jax.random.key(0)


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_builds_and_is_json(name):
    recipe = RECIPES[name]
    experiment = recipe.experiment
    if experiment.tasks in BODIES:
        pytest.importorskip("brax")
    assert recipe.name == name
    assert recipe.about
    assert recipe.paper
    assert Experiment.from_json(json.loads(json.dumps(experiment.to_json()))) == experiment
    experiment.build_learner()
    experiment.optimizer()
    assert jax.tree.leaves(eqx.filter_eval_shape(experiment.model))
    if experiment.tasks == "sinusoid":
        for splits in (experiment.splits(), experiment.splits(test=True)):
            assert splits.train.sample(KEY).support.x.shape[1:] == (1,)


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_toml(name, tmp_path):
    file = tmp_path / "one.toml"
    file.write_text(book.to_toml(RECIPES[name]), encoding="utf-8")
    assert book.read_file(file) == RECIPES[name]


@pytest.mark.parametrize("algorithm", LEARNERS)
@pytest.mark.parametrize("tasks", FAMILIES)
def test_every_algorithm_has_settings_for_every_task(algorithm, tasks):
    assert algorithm in TITLES
    try:
        check_supported(algorithm, tasks)
    except ValueError:
        with pytest.raises(ValueError, match=r"for|not"):
            closest(algorithm, tasks, 3, 1)
        return
    if tasks in BODIES:
        pytest.importorskip("brax")
    for experiment in (closest(algorithm, tasks, 3, 1), comparable(algorithm, tasks, 3, 1)):
        assert (experiment.algorithm, experiment.tasks) == (algorithm, tasks)
        experiment.build_learner()
        eqx.filter_eval_shape(experiment.model)
        if tasks in (*CURVES, *ENVIRONMENTS, "circles", "glyphs"):
            experiment.splits(test=True)


@pytest.mark.parametrize(
    ("algorithm", "tasks", "said"),
    [
        ("ridge", "omniglot", "not for classes"),
        ("class-mean", "fsmol", "all have support"),
        ("gp", "omniglot", "not for classes"),
        ("protomaml", "sinusoid", "all have support"),
        ("leo", "mini_imagenet", "adaptax embed"),
        ("platipus", "navigation", "reinforcement"),
    ],
)
def test_what_cannot_be_done_is_said(algorithm, tasks, said):
    with pytest.raises(ValueError, match=said):
        closest(algorithm, tasks)


def cell(name):
    experiment = RECIPES[name].experiment
    return experiment, experiment.task, experiment.learner


@pytest.mark.parametrize(
    ("data", "way", "shot", "rate", "steps", "eval_steps", "meta_batch", "accuracy", "first"),
    [
        ("omniglot", 5, 1, 2.0, 1, 3, 32, "98.7 ± 0.4", "98.3 ± 0.5"),
        ("omniglot", 5, 5, 2.0, 1, 3, 32, "99.9 ± 0.1", "99.2 ± 0.2"),
        ("omniglot", 20, 1, 2.0, 5, 5, 16, "95.8 ± 0.3", "89.4 ± 0.5"),
        ("omniglot", 20, 5, 2.0, 5, 5, 16, "98.9 ± 0.2", "97.9 ± 0.1"),
        ("mini_imagenet", 5, 1, 0.05, 5, 10, 4, "48.70 ± 1.84", "48.07 ± 1.75"),
        ("mini_imagenet", 5, 5, 0.05, 5, 10, 2, "63.11 ± 0.92", "63.15 ± 0.91"),
    ],
)
def test_maml_tables(data, way, shot, rate, steps, eval_steps, meta_batch, accuracy, first):
    for algorithm, printed in (("maml", accuracy), ("fomaml", first)):
        name = f"{algorithm}-{data}-{way}w{shot}s"
        experiment, task, learner = cell(name)
        assert printed in RECIPES[name].paper
        assert (task["way"], task["shot"], task["query"]) == (way, shot, shot)
        assert learner == {"inner_lr": rate, "inner_steps": steps, "eval_steps": eval_steps}
        assert (experiment.steps, experiment.meta_batch) == (60_000, meta_batch)
        assert experiment.outer["adam"] == 1e-3
        assert experiment.evaluation == {"episodes": 600}
        mini = data == "mini_imagenet"
        # 10 on the sum over 75 queries divided by the shots.
        assert experiment.outer.get("clip") == (pytest.approx(10 * shot / 75) if mini else None)
        assert task.get("train_query") == (15 if mini else None)


@pytest.mark.parametrize(
    ("data", "way", "shot", "rate", "batch", "steps", "train_shot", "eval_batch", "total", "both"),
    [
        ("omniglot", 5, 1, 1e-3, 10, 5, 10, 5, 100_000, ("97.68 ± .04", "95.39 ± .09")),
        ("omniglot", 5, 5, 1e-3, 10, 5, 10, 5, 100_000, ("99.48 ± .06", "98.90 ± .10")),
        ("omniglot", 20, 1, 5e-4, 20, 10, 10, 10, 200_000, ("89.43 ± .14", "88.14 ± .15")),
        ("omniglot", 20, 5, 5e-4, 20, 10, 10, 10, 200_000, ("97.12 ± .32", "96.65 ± .33")),
        ("mini_imagenet", 5, 1, 1e-3, 10, 8, 15, 5, 100_000, ("49.97 ± 0.32", "47.07 ± 0.26")),
        ("mini_imagenet", 5, 5, 1e-3, 10, 8, 15, 15, 100_000, ("65.99 ± 0.58", "62.74 ± 0.37")),
    ],
)
def test_reptile_tables(data, way, shot, rate, batch, steps, train_shot, eval_batch, total, both):
    name = f"reptile-{data}-{way}w{shot}s"
    experiment, task, learner = cell(name)
    assert all(printed in RECIPES[name].paper for printed in both)
    assert (task["shot"], task["query"]) == (shot, 1)
    assert (task["train_shot"], task["train_query"]) == (train_shot, 0)
    assert (learner["inner_adam"], learner["reduction"]) == (rate, "sum")
    assert (learner["inner_batch"], learner["inner_steps"]) == (batch, steps)
    assert (learner["eval_batch"], learner["eval_steps"]) == (eval_batch, 50)
    assert (experiment.steps, experiment.meta_batch) == (total, 5)
    assert experiment.evaluation["episodes"] == 10_000
    assert experiment.build_learner().outer_lr == 1.0


@pytest.mark.parametrize(
    ("data", "way", "shot", "rate", "annealed", "meta_batch", "filters", "accuracy"),
    [
        ("omniglot", 5, 1, 0.1, 20, 16, 64, "99.47"),
        ("omniglot", 5, 5, 0.1, 20, 16, 64, "99.85 or 99.93"),
        ("omniglot", 20, 1, 0.1, 20, 16, 64, "97.65 ± .05"),
        ("omniglot", 20, 5, 0.1, 20, 16, 64, "99.33 ± .03"),
        ("mini_imagenet", 5, 1, 0.01, 50, 4, 32, "52.15 ± .26"),
        ("mini_imagenet", 5, 5, 0.01, 50, 2, 32, "68.32 ± .44"),
    ],
)
def test_maml_plus_plus_tables(data, way, shot, rate, annealed, meta_batch, filters, accuracy):
    name, mini = f"maml++-{data}-{way}w{shot}s", data == "mini_imagenet"
    experiment, task, _ = cell(name)
    learner = experiment.build_learner()
    assert accuracy in RECIPES[name].paper
    assert (task["way"], task["shot"], task["query"]) == (way, shot, 15 if mini else 1)
    assert (experiment.steps, experiment.meta_batch) == (250 * 500, meta_batch)
    assert (learner.inner_steps, learner.inner_lr, learner.epochs) == (5, rate, 250)
    assert learner.multi_step_loss * learner.epochs == annealed
    assert (learner.outer_lr, learner.outer_lr_min) == (1e-3, 1e-5)
    assert learner.clip == (10.0 if mini else None)
    assert (task.get("normalise"), task.get("protocol")) == (
        (True, None) if mini else (None, "maml++")
    )
    assert experiment.keep == 5
    model = eqx.filter_eval_shape(experiment.model)
    assert model.head.weight.shape == (800 if mini else 64, way)
    assert (model.blocks[0][0].weight.shape[-1], model.slope) == (filters, 0.01)
    assert model.blocks[0][1].scale is not None
    assert all(norm.eps == 1e-5 for _, norm in model.blocks)


def test_bayesian_tables():
    """MAML's cell, but for what the algorithms change."""
    maml = RECIPES["maml-mini_imagenet-5w1s"].experiment
    for algorithm, printed in (("platipus", "50.13 ± 1.86"), ("bmaml", "53.8 %")):
        name = f"{algorithm}-mini_imagenet-5w1s"
        experiment, _, learner = cell(name)
        assert printed in RECIPES[name].paper
        for of in ("task", "network", "outer", "steps", "meta_batch", "evaluation"):
            assert getattr(experiment, of) == getattr(maml, of)
        assert (learner["inner_steps"], learner["eval_steps"]) == (5, 10)
        assert experiment == closest(algorithm, "mini_imagenet")
    platipus, bmaml = (cell(f"{a}-mini_imagenet-5w1s")[2] for a in ("platipus", "bmaml"))
    assert (platipus["inner_lr"], platipus["samples"], platipus["kl_weight"]) == (0.05, 10, 0.1)
    assert (bmaml["particles"], bmaml["objective"], bmaml["adapt_only"]) == (10, "bfa", "head")
    short = RECIPES["platipus-mini_imagenet-5w1s-short"].experiment
    first = Experiment.from_json(short.init_from)
    assert (first.algorithm, first.task, first.network) == ("maml", short.task, short.network)


def test_the_rows_of_the_ablation():
    experiments = {row: ablated(row, "omniglot", 20, 1) for row in ROWS}
    learners = {row: experiment.build_learner() for row, experiment in experiments.items()}
    parts = {row: learner.describe()["parts"] for row, learner in learners.items()}
    assert parts["maml"] == parts["maml-own-rate"] == "none"
    assert parts["multi-step-loss"] == "multi-step loss"
    assert parts["learned-rates"] == "learned rates"
    assert parts["cosine"] == "cosine annealing"
    assert parts["derivative-order"] == "derivative-order annealing"
    assert parts["batch-norm"] == "per-step statistics (code), per-step batch-norm weights"
    assert set(parts["maml++"].split(", ")) == {
        part for row in ROWS if row != "maml++" for part in parts[row].split(", ")
    } - {"none"}
    assert learners["maml-own-rate"].inner_lr == 2.0
    whole = experiments["maml++"]
    for experiment in experiments.values():
        assert experiment.task == whole.task
        assert experiment.network == whole.network
    short = RECIPES["maml++-omniglot-20w1s-short"].experiment
    assert (whole.task, whole.network, whole.learner) == (short.task, short.network, short.learner)


def test_maml_without_convolutions():
    for shot, printed in ((1, "89.7 ± 1.1"), (5, "97.5 ± 0.6")):
        name = f"maml-omniglot-5w{shot}s-mlp"
        assert printed in RECIPES[name].paper
        model = RECIPES[name].experiment.model()
        sizes = [layer.weight.shape for layer in (*model.layers, model.head)]
        assert sizes == [(784, 256), (256, 128), (128, 64), (64, 64), (64, 5)]
        assert len(model.norms) == 4
        assert model(jnp.zeros((2, 28, 28, 1))).shape == (2, 5)


def test_sinusoids():
    experiment, task, learner = cell("maml-sinusoid")
    assert (task["shot"], task["query"], experiment.test_task["shot"]) == (10, 10, 5)
    assert learner == {"inner_lr": 0.01, "inner_steps": 1, "eval_steps": 10}
    assert (experiment.steps, experiment.meta_batch) == (70_000, 25)
    assert experiment.network == {"mlp": [40, 40], "init": "truncated"}
    assert 0 < float(jnp.abs(experiment.model().layers[1].weight).max()) <= 0.02
    ours = RECIPES["maml-sinusoid-glorot"].experiment
    assert ours == dataclasses.replace(experiment, network={"mlp": [40, 40]})
    assert closest("maml", "sinusoid") == comparable("maml", "sinusoid") == ours
    assert PAPER_CURVES["maml"] == {1: 0.67, 5: 0.38, 10: 0.35}
    assert PAPER_CURVES["pretrained"] == {1: 2.41, 5: 2.23, 10: 2.19}
    reptile = RECIPES["reptile-sinusoid"].experiment
    tasks = reptile.splits().train
    assert np.unique(tasks.sample(KEY).support.x).size == 50  # the whole grid
    assert reptile.model().activation is jnp.tanh
    assert reptile.splits(test=True).test.query == 100


def test_short_recipes_are_shorter_and_of_the_same_cell():
    for name, recipe in RECIPES.items():
        if name.endswith("-short"):
            full = RECIPES[name.removesuffix("-short")]
            assert recipe.paper == full.paper
            assert recipe.experiment.steps < full.experiment.steps
            assert recipe.experiment.algorithm == full.experiment.algorithm
            assert recipe.about.startswith(full.about)


def test_reptile_sums_where_its_code_has_numbers_alone():
    sums = {tasks: closest("reptile", tasks).learner["reduction"] == "sum"
            for tasks in ("omniglot", "mini_imagenet", "glyphs", "folder")}  # fmt: skip
    assert sums == {"omniglot": True, "mini_imagenet": True, "glyphs": False, "folder": False}


def test_compared_algorithms_share_tasks_and_network():
    for tasks, names in (("sinusoid", COMPARED["sinusoid"]), ("glyphs", COMPARED["glyphs"])):
        experiments = [comparable(name, tasks) for name in names]
        for experiment in experiments[1:]:
            assert experiment.splits(test=True).test.describe() == (
                experiments[0].splits(test=True).test.describe()
            )
            a, b = (jax.tree.leaves(e.model()) for e in (experiments[0], experiment))
            assert all(bool(jnp.array_equal(x, y)) for x, y in zip(a, b) if eqx.is_array(x))


def test_maml_plus_plus_is_compared_on_the_same_episodes():
    for tasks in ("omniglot", "glyphs"):
        mine, others = (comparable(name, tasks) for name in ("maml++", "maml"))
        assert mine.task == others.task
        assert mine.evaluation == others.evaluation
    assert mine.network == others.network  # where no paper has a number


def test_pretrained_is_joint_training():
    learner = comparable("pretrained", "sinusoid").build_learner()
    tasks = ax.tasks.sinusoid().train
    model = ax.models.MLP(1, 1, (8,), key=KEY)
    task = tasks.sample(KEY)
    loss, _ = learner.meta_loss(model, task, key=KEY, progress=0.0)
    np.testing.assert_allclose(loss, ax.losses.mse(model, task.query), rtol=1e-6)


def small(**changes):
    experiment = closest("pretrained", "sinusoid").to_json()
    experiment |= {"steps": 4, "network": {"mlp": [4]}, "evaluation": {"episodes": 4}}
    return Experiment.from_json(experiment | changes)


def test_the_step_size_is_tuned_on_validation_tasks():
    experiment = small(tune=[1e-3, 30.0])
    splits = experiment.splits(test=True)
    tuned = experiment.tuned(experiment.model(), splits)
    assert tuned.learner["inner_lr"] == 1e-3
    assert small(tune=[]).tuned(experiment.model(), splits) == small(tune=[])


def test_restore_gives_the_best_by_validation(tmp_path):
    experiment = small(steps=8)
    run, splits = ax.Run(tmp_path / "run"), experiment.splits()
    result = experiment.train(
        splits, run, validate=splits.val, validate_every=2, chunk=2, validation={"episodes": 4}
    )
    meta, step, _ = experiment.restore(run)
    assert step == result.best_step
    for a, b in zip(jax.tree.leaves(meta), jax.tree.leaves(result.meta)):
        if eqx.is_array(a):
            np.testing.assert_array_equal(a, b)


def test_restore_gives_what_was_kept(tmp_path):
    experiment = small(steps=8, keep=2)
    run, splits = ax.Run(tmp_path / "run"), experiment.splits()
    result = experiment.train(
        splits, run, validate=splits.val, validate_every=2, chunk=2, validation={"episodes": 4}
    )
    kept = experiment.restore(run)[2]
    np.testing.assert_array_equal(kept.head.weight, result.kept.head.weight)
    assert kept.head.weight.shape[0] == 2
    scores = experiment.test(kept, experiment.splits(test=True), ensemble=True, episodes=2)
    assert scores.protocol["model"] == "ensemble of 2"


def test_restore_without_validation_gives_the_last(tmp_path):
    experiment = small()
    run = ax.Run(tmp_path / "run")
    result = experiment.train(experiment.splits(), run)
    meta, step, _ = experiment.restore(run)
    assert step == 4
    np.testing.assert_array_equal(meta.head.weight, result.last.head.weight)


def test_reports_name_the_algorithm():
    experiment = small()
    scores = experiment.test(experiment.model(), experiment.splits(test=True), episodes=2)
    assert scores.protocol["algorithm"] == "Pretrained"
    assert scores.protocol["shot"] == 5


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"algorithm": "sgd"}, "no algorithm"),
        ({"tasks": "cats"}, "no task family"),
        ({"learner": {"rate": 1}}, "rate"),
        ({"learner": {"inner_steps": 1}}, "inner_steps"),
        ({"network": {"mlp": [4], "depth": 3}}, "depth"),
        ({"task": {"ways": 3}}, "ways"),
        ({"speed": 3}, "does not describe"),
    ],
)
def test_settings_that_do_not_exist(changes, said):
    def build():
        experiment = small(**changes)
        return experiment.build_learner(), experiment.splits(), experiment.model()

    with pytest.raises(ValueError, match=said):
        build()


def test_the_page_has_what_the_command_prints():
    """Every recipe's rows of `recipes show` are in docs/recipes.md, and it has no others."""
    page = (Path(__file__).parents[1] / "docs" / "recipes.md").read_text(encoding="utf-8")
    table = authors.table()
    assert table in page, "run: python -m adaptax.recipes.authors docs/recipes.md"
    for name in RECIPES:
        rows = authors.compare(name)
        assert rows, f"nothing is known of {name}"
        for row in rows:
            assert f"| {row.setting} |" in table
            assert f"| {row.here} |" in table


def test_every_fact_is_about_some_recipe_and_a_setting_that_it_has():
    for fact in (fact for section in authors.facts().values() for fact in section):
        names = [name for name in RECIPES if fact.concerns(name)]
        assert names, fact
        assert all(any(fnmatchcase(name, one) for name in RECIPES) for one in fact.recipes), fact
        if fact.at:
            section, _, key = fact.at.rpartition(".")
            found = [effective(RECIPES[name].experiment) for name in names]
            assert any(key in (one[section] if section else one) for one in found), fact


def test_recipes_at_full_length_have_the_authors_settings_but_for_those_that_are_said():
    """What a recipe changes is on this list, so that nothing is changed by accident."""
    known = {
        "queries of a test task", "test tasks", "initial weights", "first order",
        "trajectories that the curvature is estimated from",
    }  # fmt: skip
    for name in RECIPES:
        if not name.endswith("-short"):
            facts = [f for section in authors.facts().values() for f in section if f.concerns(name)]
            assert {f.setting for f in facts if f.at and not f.row(name).same} <= known, name
    rows = {row.setting: row for row in authors.compare("maml-sinusoid")}
    assert rows["initial weights"].same
    rows = {row.setting: row for row in authors.compare("maml-navigation-script")}
    assert rows["trajectories that the curvature is estimated from"].same


def test_a_short_recipe_says_all_that_it_changes():
    rows = {row.setting: row for row in authors.compare("maml++-omniglot-20w1s-short")}
    assert rows["meta-steps"] == ("meta-steps", "125,000", "1,000", False)
    assert not rows["how a block halves the image"].same
    rows = {row.setting: row for row in authors.compare("platipus-mini_imagenet-5w1s-short")}
    assert rows["init_from"].here == "maml of 600 meta-steps"
    assert rows["network.image"].here == "42 / 42 / 3"

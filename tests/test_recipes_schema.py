"""What enters as an experiment is checked once, and the setting that is wrong is named."""

import dataclasses
import math

import pytest

from adaptax.recipes import LEARNERS, RECIPES, Experiment, changed, closest, origin, schema, table

SINE = closest("maml", "sinusoid").to_json()
IMAGES = closest("maml", "omniglot").to_json()


@pytest.mark.parametrize(
    ("base", "path", "value", "said"),
    [
        (SINE, "test_task.shot", "x", "test_task.shot is 'x'; expected a whole number"),
        (SINE, "test_task.shot", 10**400, "test_task.shot is a number of more than 60 digits"),
        (SINE, "task.shot", -1, "task.shot is -1; expected a whole number from 0"),
        (SINE, "task.shot", 2**31, "task.shot is 2147483648; expected"),
        (SINE, "task.shot", True, "task.shot is True; expected a whole number"),
        (SINE, "task.way", 5, "task.way is not a setting here"),
        (SINE, "evaluation.at", [-1], r"evaluation.at\[0\] is -1"),
        (SINE, "evaluation.at", [], "evaluation.at is .*; expected steps from 0 to .* 10"),
        (SINE, "evaluation.at", [11], "evaluation.at is .*; expected steps from 0 to .* 10"),
        (SINE, "evaluation.mapping", "vmp", "expected one of auto, scan, vmap or a whole number"),
        (
            SINE,
            "network",
            None,
            "one of mlp, conv4, linear and model, and names none",
        ),
        (SINE, "network", {"policy": [3]}, "network should name one of"),
        (SINE, "network.conv4", "maml omniglot", "network should name one of"),
        (IMAGES, "network.conv4", "reptile", "did you mean reptile omniglot"),
        (SINE, "network.mlp", [0], "network.mlp is .*; expected 1 or more"),
        (SINE, "network.mlp", [[4]], r"network.mlp\[0\] is a list of 1; expected a whole number"),
        (SINE, "network.actvation", "tanh", "did you mean activation"),
        (SINE, "network.activation", "than", "did you mean tanh"),
        (SINE, "network.init", "glorrot", "did you mean glorot"),
        (SINE, "learner.inner_lr", math.nan, "learner.inner_lr is nan; expected a number, 0 or"),
        (SINE, "learner.inner_lr", math.inf, "learner.inner_lr is inf"),
        (SINE, "learner.inner_lr", -1, "learner.inner_lr is -1"),
        (SINE, "learner.iner_lr", 1, "did you mean inner_lr"),
        (SINE, "learner.loss", "msee", "did you mean mse"),
        (SINE, "learner.noise", 1.0, "learner.noise is not a setting here"),
        (SINE, "learner.inner_optimizer", "adam", "learner.inner_optimizer is 'adam'; expected"),
        (SINE, "learner.inner_optimizer", {"sdg": 0.1}, "one optimizer .* did you mean sgd"),
        (SINE, "learner.inner_optimizer", {"sgd": 0.1}, "inner_lr and inner_optimizer"),
        (SINE, "learner.inner_steps", "two", "learner.inner_steps is 'two'; expected a whole"),
        (SINE, "outer.sdg", 0.5, "outer.sdg is not a setting here; there are .* did you mean sgd"),
        (SINE, "outer.clipp", 0.5, "outer.clipp is not a setting here; .* did you mean clip"),
        (SINE, "outer", {"sgd": 0.1, "momentun": 0.9}, "outer.momentun .* did you mean momentum"),
        (SINE, "outer", {"sgd": 0.1, "adam": 0.1}, "outer names adam and sgd"),
        (SINE, "outer.trpo", 0.5, "outer.trpo is for environments"),
        (SINE, "evaluation.foo", 1, "evaluation.foo is not a setting here"),
        (SINE, "network.mlp", 16, "network.mlp is 16; expected a list"),
        (SINE, "algorithm", "my_module:MyLearner", "in a module of your own"),
        (SINE, "tasks", "os:system", "in a module of your own"),
        (SINE, "network", {"model": "os:system"}, "in a module of your own"),
        (SINE, "steps", 0, "steps is 0; expected a whole number from 1"),
        (SINE, "steps", None, "steps is null"),
        (SINE, "seed", 10**19, "seed is 10000000000000000000; expected"),
        (SINE, "tune", ["x"], r"tune\[0\] is 'x'"),
        (SINE, "tasks", ["x"], "no task family"),
        (SINE, "algorithm", "mamll", "did you mean maml"),
        (SINE, "algorithm", "class-mean", "nearest class mean is for classes"),
        (SINE, "init_from", {"steps": 3}, "it has no algorithm"),
        (SINE, "sedd", 3, "did you mean seed"),
        (IMAGES, "task", {"shot": 1}, "task.way is missing"),
        (IMAGES, "task.data_root", "\0", "task.data_root"),
    ],
)
def test_the_setting_that_is_wrong_is_named(base, path, value, said):
    section, _, name = path.partition(".")
    values = {**base, section: {**base[section], name: value} if name else value}
    with pytest.raises(ValueError, match=said):
        Experiment.from_json(values)


def test_what_is_missing_is_named():
    for name in ("algorithm", "tasks", "task", "network", "learner", "steps", "meta_batch"):
        with pytest.raises(ValueError, match=f"it has no {name}"):
            Experiment.from_json({n: v for n, v in SINE.items() if n != name})
    with pytest.raises(ValueError, match="no JSON object"):
        Experiment.from_json([1])


def test_experiments_in_experiments_end():
    values = SINE
    for _ in range(900):
        values = {**SINE, "init_from": values}
    with pytest.raises(ValueError, match="more than 8 deep"):
        Experiment.from_json(values)


def test_numbers_become_of_the_kind_that_is_wanted():
    experiment = Experiment.from_json({**SINE, "learner": {"inner_lr": 1}, "tune": [1]})
    assert [type(experiment.learner["inner_lr"]), type(experiment.tune[0])] == [float, float]
    assert closest("maml", "celeba").network == {"conv4": "maml mini_imagenet"}
    images = changed(closest("maml", "celeba"), {"network": {"image": [42, 42, 3]}})
    assert images.network["image"] == (42, 42, 3)
    assert Experiment.from_json(images.to_json()) == images


def test_a_network_in_the_place_of_another_takes_that_of_its_settings():
    experiment = closest("maml", "omniglot")
    assert changed(experiment, {"network": {"mlp": [4]}}).network == {"mlp": [4]}


@pytest.mark.parametrize("algorithm", ["fomaml", "anil", "pretrained"])
def test_what_is_passed_on_is_known(algorithm):
    known = schema.taken(table.load(LEARNERS[algorithm].make), ("loss",))
    assert {"inner_lr", "eval_steps", "meta_gradient"} <= known.keys()
    assert not {"inner_optimizer", "adapt_only", "how"} & known.keys()
    assert {"discount", "horizon"} <= schema.taken(
        table.load(table.FAMILIES["navigation"].make)
    ).keys()


@pytest.mark.parametrize("way", [2, 12, 20, 60])
@pytest.mark.parametrize("tasks", ["folder", "glyphs", "omniglot", "mini_imagenet"])
def test_any_number_of_ways(tasks, way):
    for algorithm in LEARNERS:
        if algorithm in ("ridge", "leo", "gp"):
            continue
        for shot in (1, 7):
            experiment = closest(algorithm, tasks, way, shot)
            assert (experiment.task["way"], experiment.task["shot"]) == (way, shot)


def test_the_origin_of_settings_is_said():
    assert origin(RECIPES["maml-sinusoid"].experiment) == "recipe maml-sinusoid"
    assert origin(dataclasses.replace(RECIPES["maml-sinusoid"].experiment, seed=3)) == (
        "recipe maml-sinusoid"
    )
    said = origin(closest("anil", "mini_imagenet", 20, 1))
    assert said == 'recipe maml-mini_imagenet-5w1s but for algorithm "anil", task.way 20'

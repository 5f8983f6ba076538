"""Learners, tasks and networks of one's own, by the modules that they are in."""

import ast
import json
import sys
from pathlib import Path

import jax
import optax
import pytest

import adaptax as ax
from adaptax.cli import main
from adaptax.recipes import LEARNERS, Experiment, changed, closest, comparable, parts, table

SOURCE = Path(__file__).parents[1] / "src" / "adaptax"
MODULE = """
from pathlib import Path

import jax
import jax.numpy as jnp

import adaptax as ax

Path("imported").touch()


class Mine(ax.MetaLearner):
    loss: ax.Loss
    inner_lr: float = 0.1

    def adapt(self, meta, support, *, key):
        return ax.inner.descend(self.loss, meta, support, lr=self.inner_lr, steps=1, key=key)

    def meta_loss(self, meta, task, *, key, progress):
        model = self.adapt(meta, task.support, key=key)
        return self.loss(model, task.query.draw(model, key)), {}


def waves(shot: int = 5, query: int = 5, amplitude: float = 1.0) -> ax.Splits:
    return ax.tasks.sinusoid(shot, query)


def make(*, out: int, in_size: int, key, width: int = 8):
    return ax.models.MLP(in_size, out, (width,), key=key)
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A module in the working directory, not yet imported or trusted."""
    monkeypatch.chdir(tmp_path)
    name = f"my_{tmp_path.name}".replace("-", "_")
    (tmp_path / f"{name}.py").write_text(MODULE)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(table, "_trusted", set())
    table.load.cache_clear()
    yield name
    sys.modules.pop(name, None)
    table.load.cache_clear()


def test_ones_own_learner_tasks_and_network_train_and_are_not_imported_unasked(
    module, tmp_path, capsys, monkeypatch
):
    words = ["train", f"{module}:Mine", f"{module}:waves", "--model", f"{module}:make", "--steps",
             "4", "--meta-batch", "2", "--episodes", "4", "--set", "network.width=5", "--set",
             "task.amplitude=2", "--run", "run"]  # fmt: skip
    assert main(words) == 0
    assert "Mine" in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "test.json").read_text())["training"]["steps"] == 4
    # As in another process, whose user has named nothing.
    monkeypatch.setattr(table, "_trusted", set())
    sys.modules.pop(module)
    (tmp_path / "imported").unlink()
    for command in (["evaluate", "run"], ["train", "--resume", "run"]):
        assert main(command) == 2
        said = capsys.readouterr().err
        assert f"--trust {module}" in said
        assert said.count("\n") == 1
    with pytest.raises(ValueError, match="in a module of your own"):
        ax.load_run("run")
    assert not (tmp_path / "imported").exists()
    table.load.cache_clear()
    assert main(["evaluate", "run", "--trust", module, "--episodes", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["protocol"]["episodes"] == 2
    run = ax.load_run("run", trust=[module])
    assert run.adapt(run.tasks.test.sample(jax.random.key(0)).support)


def test_ones_own_learner_is_compared_with_the_others(module):
    mine = comparable(f"{module}:Mine", "sinusoid")
    maml = comparable("maml", "sinusoid")
    assert mine.learner == {"inner_lr": maml.learner["inner_lr"]}
    assert (mine.task, mine.network, mine.steps) == (maml.task, maml.network, maml.steps)
    assert mine.title == "Mine"
    assert mine.eval_steps == 0


@pytest.mark.parametrize(
    ("word", "said"),
    [("{}:Nothing", "has no attribute"), ("{}:KEY", "no attribute"), ("no_such:X", "No module")],
)
def test_what_cannot_be_imported_is_said(module, word, said):
    with pytest.raises(ValueError, match=said):
        closest(word.format(module), "sinusoid")


@pytest.mark.parametrize("word", ["os:system.x", "os.:system", ":x", "x:", "a b:c"])
def test_names_that_are_no_names_are_refused(word, monkeypatch):
    monkeypatch.setattr(table, "_trusted", set())
    table.trust("os", "a b", "x", "")
    with pytest.raises(ValueError, match="is no algorithm"):
        table.learner(word)


@pytest.mark.parametrize("name", parts.optimizers())
def test_any_optimizer_of_optax_by_name(name):
    experiment = changed(closest("maml", "sinusoid"), {"outer": {name: 0.5}})
    rule, params = experiment.optimizer(), {"a": ax.tree.parameters(experiment.model())}
    state = rule.init(params)
    updates, _ = rule.update(params, state, params)
    assert optax.apply_updates(params, updates)
    assert Experiment.from_json(experiment.to_json()) == experiment


def test_optimizers_take_their_arguments_and_the_place_of_others():
    experiment = changed(closest("maml", "mini_imagenet"), {"outer": {"sgd": 1, "momentum": 0.9}})
    clip = closest("maml", "mini_imagenet").outer["clip"]
    assert experiment.outer == {"clip": clip, "sgd": 1.0, "momentum": 0.9}
    reptile = changed(closest("reptile", "sinusoid"), {"outer": {"sgd": 0.1}})
    assert "outer_lr" not in reptile.learner
    inner = {"learner": {"inner_optimizer": {"rmsprop": 0.01, "decay": 0.9}}}
    experiment = changed(closest("maml", "sinusoid"), inner)
    assert "inner_lr" not in experiment.learner
    assert experiment.build_learner().inner_optimizer is not None


def test_nothing_outside_the_table_asks_for_the_name_of_an_algorithm():
    found = []
    for path in sorted(SOURCE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            compared = [node.left, *node.comparators] if isinstance(node, ast.Compare) else []
            compared += [node.value] if isinstance(node, ast.MatchValue) else []
            words = {one.value for top in compared for one in ast.walk(top)
                     if isinstance(one, ast.Constant)}  # fmt: skip
            asked = {ast.unparse(one) for one in compared}
            if words & LEARNERS.keys() and not asked & OTHER:
                found.append((path.name, node.lineno))
    assert not found


OTHER = {"self.paper", "paper", "protocol", "self.objective", "arm"}
"""Settings with values of the same names: whose waves, whose split of Omniglot, which loss."""

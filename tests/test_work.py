"""The count of a program's work, and what is sized by it."""

import io

import jax
import jax.numpy as jnp
import pytest
from rich.console import Console

import adaptax as ax
from adaptax.cli import progress
from adaptax.engine.work import NONE, Work, episodes_at_once, steps_at_once, work
from adaptax.recipes import changed, closest
from adaptax.recipes.budget import FLOOR, LEAST, Budget, budget, sized

KEY = jax.random.key(0)


def test_products_convolutions_and_the_rest_are_counted():
    x, w = jnp.ones((5, 7)), jnp.ones((7, 3))
    assert work(lambda x: x @ w, x) == Work(4 * 15, 2.0 * 7 * 15)
    image, kernel = jnp.ones((2, 8, 8, 3)), jnp.ones((3, 3, 3, 4))
    convolve = lambda x: jax.lax.conv_general_dilated(
        x, kernel, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    assert work(convolve, image).operations == 2 * (3 * 3 * 3) * (2 * 4 * 4 * 4)
    assert work(jnp.sin, x) == Work(4 * 35, 35.0)


def test_loops_count_all_turns_and_move_what_one_does():
    x = jnp.ones((5, 5))
    once = work(lambda x: jnp.sin(x @ x), x)
    looped = work(lambda x: jax.lax.scan(lambda c, _: (jnp.sin(c @ c), None), x, None, 9)[0], x)
    assert looped == Work(once.moved, 9 * once.operations)


def test_of_branches_the_largest_counts():
    x = jnp.ones((5, 5))
    found = work(lambda x: jax.lax.cond(x[0, 0] > 0, lambda x: x @ x @ x, jnp.sin, x), x)
    product = work(lambda x: x @ x @ x, x).operations
    assert product <= found.operations < product + 10


@pytest.mark.parametrize(
    ("operations", "moved", "meta_batch", "steps"),
    [(1e5, 1, 25, 500), (1e8, 1, 25, 100), (1e5, 2**21, 25, 20), (1e11, 2**21, 2, 2),
     (1e14, 2**21, 2, 1)],
)  # fmt: skip
def test_chunks_are_some_ten_seconds(operations, moved, meta_batch, steps):
    assert steps_at_once(Work(moved, operations), meta_batch) == steps


def test_episodes_at_once():
    assert episodes_at_once(NONE, 32, 600) == 600
    assert episodes_at_once(Work(2**21, 1e9), 1, 600) == 20
    assert episodes_at_once(Work(2**21, 1e11), 1, 600) == 5
    assert episodes_at_once(Work(2**21, 1e13), 1, 600) == 2


def test_chunks_end_in_the_same_bits_whatever_their_length():
    tasks = ax.tasks.sinusoid(shot=5, query=5)
    model = ax.models.MLP(1, 1, (8,), key=KEY)
    learner = ax.MAML(ax.losses.mse, 0.01)
    found = [
        ax.fit(learner, model, tasks.train, steps=12, meta_batch=4, chunk=chunk, key=KEY).last
        for chunk in (2, 4, 12)
    ]
    for other in found[1:]:
        assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), found[0], other))


def test_a_test_suits_its_training():
    experiment = changed(closest("maml", "sinusoid"), {"evaluation": {"episodes": 600}})
    validation = {"episodes": 200}
    long, short = Work(1, FLOOR / 100), Work(1, 1e3)
    assert sized(experiment, validation, 1e4, short, 10) == ({"episodes": 20}, 600)
    assert sized(experiment, validation, 1e10, short, 10) == ({"episodes": 200}, 600)
    assert sized(experiment, validation, 1e4, long, 10) == ({"episodes": 20}, 100)
    assert sized(experiment, validation, 3 * FLOOR, long, 10) == ({"episodes": 20}, 300)
    assert sized(experiment, validation, 1e4, Work(1, FLOOR), 10)[1] == LEAST


def test_the_budget_of_a_run_is_that_of_its_parts():
    experiment = changed(closest("maml", "sinusoid"), {"steps": 40, "meta_batch": 5})
    splits = experiment.splits()
    validation, found = budget(
        experiment, experiment.untrained(), splits, splits, {"episodes": 10}, validate_every=8
    )
    assert validation == {"episodes": 10}
    assert found.episodes == experiment.episodes
    episode = found.test / found.episodes
    assert found.validation == pytest.approx(5 * 10 * episode)
    assert 0 < found.training / (40 * 5) < 10 * episode


@pytest.mark.parametrize("terminal", [False, True])
def test_a_long_run_says_how_long_and_a_line_a_minute(terminal, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    console = Console(file=io.StringIO(), width=200, force_terminal=terminal, highlight=False)
    long = Budget(training=1000.0, validation=200.0, test=100.0, episodes=9)
    with progress.watching("MAML", 100, console, budget=long) as watch:
        for step in range(1, 10):
            clock[0] += 20
            watch({"step": step, "seconds": 20.0, "loss": 1.0})
    with progress.scoring("test", 600, console) as watch:
        clock[0] += 40
        watch(20)
    said = console.file.getvalue()
    assert said.count("about 43 min in all: training 33 min, validation 7 min, test 3 min") == 1
    if not terminal:
        said = said.splitlines()
        steps = [line.split(" of ")[0] for line in said if line.startswith("step")]
        assert steps == ["step 2", "step 5", "step 8"]
        assert said[-1] == "test: 20 of 600"


def test_a_short_run_says_nothing():
    console = Console(file=io.StringIO(), width=200)
    short = Budget(training=1000.0, validation=200.0, test=100.0, episodes=9)
    with progress.watching("MAML", 10, console, budget=short) as watch:
        for step in range(1, 10):
            watch({"step": step, "seconds": 0.1, "loss": 1.0})
    assert console.file.getvalue() == ""

"""What meta-gradients are made of: Reptile's theory, its two studies, and the commands."""

import io
import json
import math
import os
import signal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

import adaptax as ax
from adaptax.cli import main
from adaptax.cli.progress import Watcher
from adaptax.recipes import Experiment
from adaptax.report import analysis as report
from adaptax.studies import (
    ARMS,
    COMBINATIONS,
    gradients,
    overlap,
    predicted_coefficients,
)
from adaptax.studies import expansion as measured
from adaptax.studies.gradients import BATCH, overlapping
from adaptax.studies.taylor import Expansion, _orders
from adaptax.task import Frozen
from references import check_meta_gradient

KEY = jax.random.key(0)
mse = ax.losses.mse


def net(hidden=(6,), **how):
    return ax.models.MLP(1, 1, hidden, key=KEY, activation=jnp.tanh, **how)


def flat(tree):
    return jax.flatten_util.ravel_pytree(ax.tree.parameters(tree))[0]


def waves(k, points=5):
    """k minibatches of one sine wave, `(k, points, 1)`."""
    batch = ax.tasks.sinusoid(shot=k * points, query=0).train.sample(KEY).support
    return jax.tree.map(lambda leaf: leaf.reshape(k, points, 1), batch)


def gradient(learner, meta, task):
    tasks = jax.tree.map(lambda leaf: leaf[None] if eqx.is_array(leaf) else leaf, task)
    return eqx.filter_jit(ax.meta_value_and_grad)(learner, meta, tasks, key=KEY)[1]


# Reptile of which some gradients do not count


def inner_gradients(model, batches, rate):
    """`g_1 … g_k` by hand."""
    slope, seen = eqx.filter_jit(eqx.filter_grad(mse)), []
    for i in range(len(batches.x)):
        g = slope(model, jax.tree.map(lambda leaf, i=i: leaf[i], batches))
        seen.append(flat(g))
        model = eqx.apply_updates(model, jax.tree.map(lambda leaf: -rate * leaf, g))
    return seen


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("k", "skip"), [(3, 0), (3, 1), (4, 3)])
def test_reptile_follows_the_gradients_that_count(k, skip):
    batches = waves(k)
    task = ax.Task(Frozen(batches), jax.tree.map(lambda leaf: leaf[-1], batches))
    found = flat(gradient(ax.Reptile(mse, 0.1, k, skip=skip), net(), task)) / 0.1
    expected = sum(inner_gradients(net(), batches, 0.1)[skip:])
    assert np.allclose(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("k", [2, 4])
def test_the_last_gradient_is_that_of_fomaml(k):
    batches = waves(k)
    last = jax.tree.map(lambda leaf: leaf[-1], batches)
    first = jax.tree.map(lambda leaf: leaf[0], batches)
    shared = ax.Task(Frozen(batches), last), ax.Reptile(mse, 0.1, k, skip=k - 1)
    separate = ax.Reptile(mse, 0.1, k, skip=k - 1, separate_tail=True)
    for task, reptile in (shared, (ax.Task(first, last), separate)):
        fomaml = flat(gradient(ax.FOMAML(mse, 0.1, k - 1), net(), task))
        found = flat(gradient(reptile, net(), task))
        assert np.linalg.norm(fomaml) > 0.1
        assert np.allclose(found, 0.1 * fomaml, rtol=1e-10, atol=1e-13)


@pytest.mark.usefixtures("x64")
def test_a_separate_tail_is_one_more_minibatch():
    first, last = (jax.tree.map(lambda leaf, i=i: leaf[i], waves(2)) for i in (0, 1))
    order = jax.tree.map(lambda a, b: jnp.stack([a, a, b]), first, last)
    how = {"inner_steps": 3, "inner_optimizer": ax.inner.adam(0.01), "carry_state": True}
    tail, plain = ax.Reptile(mse, separate_tail=True, **how), ax.Reptile(mse, **how)
    meta = plain.init(net(), key=KEY)
    assert np.allclose(
        flat(gradient(tail, meta, ax.Task(first, last))),
        flat(gradient(plain, meta, ax.Task(Frozen(order), last))),
        rtol=1e-12, atol=1e-15,
    )  # fmt: skip


VARIANTS = {
    "shared tail": {"skip": 2},
    "separate tail": {"skip": 2, "separate_tail": True},
    "all of it": {"skip": 1, "separate_tail": True, "inner_batch": 2, "carry_state": True,
                  "inner_optimizer": ax.inner.adam(0.01)},
}  # fmt: skip


@pytest.mark.parametrize("name", VARIANTS)
def test_meta_gradients_of_the_variants_of_reptile(name):
    learner = ax.Reptile(mse, 0.1, 3, **VARIANTS[name])
    check_meta_gradient(learner)
    said = learner.describe()
    assert (said["skip"], said["separate_tail"]) == (learner.skip, learner.separate_tail)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"skip": 3}, "skip=3 of inner_steps=3 should leave a step"),
        ({"skip": -1}, "should leave a step"),
        ({"separate_tail": True, "include_query": True}, "include_query=False"),
    ],
)
def test_reptile_wants_a_step_that_counts(how, message):
    with pytest.raises(ValueError, match=message):
        ax.Reptile(mse, 0.1, 3, **how)


# Quadratics: `½ c (θ − a)²`, a minibatch an example (x = c, y = a)


def well(model, batch):
    return jnp.mean(batch.x * (model.params - batch.y) ** 2) / 2


def point(theta):
    return ax.Functional(jnp.array(theta), lambda params, x: params)


class Fixed(ax.TaskDistribution):
    """One task, always."""

    support: ax.Batch
    split: str = eqx.field(static=True)

    def sample(self, key):
        return ax.Task(self.support, self.support)


def fixed(support):
    return Fixed(support=support, split="train")


@pytest.mark.usefixtures("x64")
def test_golden_expansion_of_two_quadratics():
    tasks = fixed(ax.Batch(jnp.array([1.0, 3.0]), jnp.ones(2)))
    how = {"key": KEY, "rates": (0.02, 0.01), "count": 1, "minibatches": 2}
    golden = {
        -1.9406: (ax.MAML(well, inner_steps=1), 0.0006),
        -1.97: (ax.FOMAML(well, inner_steps=1), 0.0),
        -3.97: (ax.Reptile(well, inner_steps=2), 0.0),
        -2.0: (ax.MAML(well, inner_steps=0), 0.0),
    }
    for expected, (learner, residual) in golden.items():
        found = ax.studies.taylor_coefficients(learner, point(0.0), tasks, **how)
        assert np.allclose([found.avg_grad, found.avg_grad_inner], [[-2], [-3]], rtol=1e-15)
        assert np.allclose(found.gradients[1], expected, rtol=1e-13)
        assert np.allclose(2 * found.residuals[1], residual, rtol=1e-9, atol=1e-13)
        assert math.isnan(found.order) == (residual == 0)
        assert np.isnan(found.coefficients).all()  # in one dimension all vectors are parallel
        assert residual == 0 or np.isclose(found.order, 2, rtol=1e-9)


@pytest.mark.usefixtures("x64")
def test_first_order_residuals_of_two_quadratics_vanish():
    rng = np.random.default_rng(0)

    def loss(model, batch):
        d = model.params - batch.y
        return jnp.mean(jnp.einsum("ni,nij,nj->n", d, batch.x, d)) / 2

    roots = rng.normal(size=(2, 4, 4))
    tasks = fixed(ax.Batch(jnp.asarray(roots @ roots.swapaxes(1, 2)), rng.normal(size=(2, 4))))
    for learner in (ax.FOMAML(loss), ax.Reptile(loss, inner_steps=2)):
        found = ax.studies.taylor_coefficients(
            learner, point(np.ones(4)), tasks, key=KEY, rates=(0.1, 0.05), count=1
        )
        assert found.residuals.max() < 1e-14
        assert math.isnan(found.order)
        assert np.allclose(found.coefficients, found.predicted, rtol=1e-11)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("k", "move"), [(1, -0.1), (3, -0.244)])
def test_way_of_reptile_on_a_scalar_quadratic(k, move):
    batch = ax.Batch(jnp.array([2.0]), jnp.array([1.0]))
    learner = ax.Reptile(well, 0.1, k, outer_lr=1.0)
    found = gradient(learner, point(0.5), ax.Task(batch, batch)).params
    assert np.allclose(found, move, rtol=1e-12)
    # One meta-step of `fit` at ε = 1 ends where the task leads; the schedule starts at ε.
    for outer_lr in (1.0, 0.25):
        one = ax.Reptile(well, 0.1, k, outer_lr=outer_lr)
        result = ax.fit(one, point(0.5), fixed(batch), steps=1, meta_batch=1, key=KEY)
        assert np.allclose(result.last.params, 0.5 - outer_lr * move, rtol=1e-12)


# The expansion


def sines(k):
    return ax.tasks.sinusoid(shot=4 * k, query=0).train


def expansion(learner, k, **how):
    how = {"key": KEY, "rates": (8e-4, 4e-4, 2e-4), "count": 3, "minibatches": k, **how}
    return ax.studies.taylor_coefficients(learner, net(), sines(k), **how)


def family(k):
    return {
        "SGD": (ax.MAML(mse, inner_steps=0), 1, 0),
        "MAML": (ax.MAML(mse, inner_steps=k - 1), 1, -2 * (k - 1)),
        "FOMAML": (ax.FOMAML(mse, inner_steps=k - 1), 1, -(k - 1)),
        "Reptile": (ax.Reptile(mse, inner_steps=k), k, -k * (k - 1) / 2),
    }


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("k", [2, 3, 4])
@pytest.mark.parametrize("name", ["SGD", "MAML", "FOMAML", "Reptile"])
def test_coefficients_are_those_of_the_paper(name, k):
    learner, first, inner = family(k)[name]
    found = expansion(learner, k)
    assert found.orderings == "all"
    unit = np.stack([np.ones(3), found.rates], axis=1)
    assert np.allclose(found.predicted / unit, [first, inner], rtol=1e-14)
    a, b = (found.coefficients / unit)[-1]
    assert abs(a - first) < 1e-4 * first
    assert abs(b - inner) < 0.02 * abs(inner) if inner else abs(b) < 1e-9
    if name == "SGD":
        assert found.residuals.max() < 1e-14
        assert math.isnan(found.order)
    else:
        assert 1.8 < found.order < 2.2
        assert 1e-7 < found.residuals[-1] < found.residuals[0] < 0.02
    assert (found.errors[-1] < [1e-4, 0.02 * max(abs(inner), 1) * found.rates[-1]]).all()


@pytest.mark.usefixtures("x64")
def test_the_inner_term_is_the_gradient_of_the_inner_product():
    found = expansion(ax.FOMAML(mse, inner_steps=1), 3, count=1, rates=(1e-3,))
    loaded = ax.task.episode_key("train", KEY, jnp.uint32(0))
    support = sines(3).sample(loaded).support
    cut = ax.Minibatches(support, 4, jax.random.split(jax.random.split(KEY, 1)[0], 3)[0])
    batches = [cut.at(i).draw(None, KEY) for i in range(3)]

    @eqx.filter_jit
    @eqx.filter_grad
    def slope(model):
        g = [flat(eqx.filter_grad(mse)(model, batch)) for batch in batches]
        return sum(g[i] @ g[j] for i in range(3) for j in range(3) if i != j) / 6 / 2

    assert np.allclose(found.avg_grad_inner, flat(slope(net())), rtol=1e-10, atol=1e-13)
    mean = eqx.filter_grad(lambda m: sum(mse(m, batch) for batch in batches) / 3)(net())
    assert np.allclose(found.avg_grad, flat(mean), rtol=1e-12, atol=1e-14)


@pytest.mark.usefixtures("x64")
def test_what_the_paper_does_not_print():
    k = 3
    for learner, first, inner in (
        (ax.Reptile(mse, inner_steps=k, skip=2), 1, -2),  # FOMAML
        (ax.Reptile(mse, inner_steps=k, skip=1), 2, -3),  # g2 + g3
        (ax.Reptile(mse, inner_steps=k, skip=2, separate_tail=True), 1, -2),
        (ax.MAML(mse, inner_steps=1), 1, -2),  # sees two of the three
    ):
        found = expansion(learner, k, count=2, rates=(2e-4, 1e-4))
        assert np.allclose(found.predicted[1], [first, inner * 1e-4], rtol=1e-14)
        assert np.allclose(found.coefficients[1], found.predicted[1], rtol=0.02)
        assert 1.8 < found.order < 2.2


@pytest.mark.usefixtures("x64")
def test_some_orders_at_random_do_nearly_as_well_as_all():
    learner = ax.Reptile(mse, inner_steps=4)
    some, every = (expansion(learner, 4, rates=(2e-4,), orderings=n) for n in (1, None))
    assert (some.orderings, every.orderings) == (1, "all")
    assert np.array_equal(some.avg_grad_inner, every.avg_grad_inner)
    assert not np.array_equal(some.gradients, every.gradients)
    assert np.allclose(some.coefficients, some.predicted, rtol=0.02)
    for orders in (_orders(4, 2, KEY), _orders(4, None, KEY)):
        assert len(orders) == (16 if len(orders) < 24 else 24)
        assert np.array_equal(np.sort(orders, axis=1), np.tile(np.arange(4), (len(orders), 1)))
        for place in range(4):
            assert (np.bincount(orders[:, place]) == len(orders) // 4).all()
        for i in range(4):
            for j in set(range(4)) - {i}:
                before = np.argmax(orders == i, axis=1) < np.argmax(orders == j, axis=1)
                assert before.sum() == len(orders) // 2


@pytest.mark.usefixtures("x64")
def test_learners_without_a_prediction_are_measured_all_the_same():
    found = expansion(ax.ANIL(mse, inner_steps=1), 2, count=2)
    assert found.predicted is None
    assert np.isfinite(found.coefficients).all()
    assert np.isfinite(found.residuals).all()
    one = expansion(ax.FOMAML(mse, inner_steps=1), 2, count=1)
    assert np.isnan(one.errors).all()
    kept = one.to_json()
    assert json.loads(json.dumps(kept, allow_nan=False)) == kept
    assert kept["errors"] == [[None, None]] * 3
    assert "gradients" not in kept


def test_predictions_are_for_whole_models():
    learner = ax.MAML(mse, inner_steps=2)
    assert predicted_coefficients(learner, 0.1) == (1, -0.4)
    assert predicted_coefficients(learner, 0.1, net()) == (1, -0.4)
    normed = net(batch_norm=True)  # its parameters are not adapted
    assert predicted_coefficients(learner, 0.1, normed) is None
    assert predicted_coefficients(ax.Reptile(mse, inner_steps=2), 0.1, normed) == (2, -0.1)
    assert predicted_coefficients(ax.ANIL(mse), 0.1) is None
    assert predicted_coefficients(ax.Reptile(mse, include_query=True), 0.1) is None


class Nameless(ax.MetaLearner):
    loss: ax.Loss = mse
    inner_lr: float = 0.1

    def adapt(self, meta, support, *, key):
        return meta

    def meta_loss(self, meta, task, *, key, progress):
        return self.loss(meta, task.query), {}


@pytest.mark.parametrize(
    ("learner", "how", "message"),
    [
        (ax.MAML(mse, inner_steps=3), {"minibatches": 2}, "minibatches=2, but the learner sees 4"),
        (ax.Reptile(mse, inner_optimizer=ax.inner.adam(0.1)), {}, "step size of gradient descent"),
        (Nameless(), {}, "how many minibatches Nameless sees"),
        (ax.FOMAML(mse), {"count": 0}, "at least one"),
        (ax.FOMAML(mse), {"orderings": 0}, "at least one"),
        (ax.FOMAML(mse), {"rates": ()}, "at least one"),
        (ax.FOMAML(mse), {"rates": (0.1, -0.1)}, "positive step sizes"),
        (ax.FOMAML(mse), {"minibatches": 9}, "Batch of 9 or more examples"),
    ],
)
def test_expansions_that_make_no_sense(learner, how, message):
    with pytest.raises(ValueError, match=message):
        ax.studies.taylor_coefficients(learner, net(), sines(2), key=KEY, **how)


# The studies


def test_the_combinations_are_those_of_the_paper():
    table = [(one.name, e.learner["inner_steps"], e.task["train_shot"], e.learner["outer_lr"],
              e.learner.get("skip", 0))
             for one in COMBINATIONS for e in [one.experiment(40_000, 400)]]  # fmt: skip
    assert table == [
        ("g1", 1, 5, 0.25, 0),
        ("g1+g2", 2, 10, 0.25, 0),
        ("(g1+g2)/2", 2, 10, 0.125, 0),
        ("g2", 2, 10, 0.25, 1),
        ("g1+g2+g3", 3, 15, 0.25, 0),
        ("(g1+g2+g3)/3", 3, 15, 0.08325, 0),
        ("g3", 3, 15, 0.25, 2),
        ("g1+…+g4", 4, 20, 0.25, 0),
        ("(g1+…+g4)/4", 4, 20, 0.0625, 0),
        ("g4", 4, 20, 0.25, 3),
    ]
    for one in COMBINATIONS:
        experiment = one.experiment(40_000, 400, seed=3)
        learner = experiment.build_learner()
        assert (learner.inner_lr, learner.inner_batch) == (0.075, 25)
        assert (learner.eval_steps, learner.eval_batch) == (5, 25)
        assert (experiment.meta_batch, experiment.seed) == (1, 3)
        task = experiment.task
        assert (task["way"], task["shot"], task["query"], task["protocol"]) == (5, 5, 1, "reptile")
        # No image is seen twice.
        assert learner.inner_batch * learner.inner_steps == task["way"] * task["train_shot"]
        assert experiment.evaluation == {"episodes": 400, "at": [5], "transductive": False}
        assert Experiment.from_json(json.loads(json.dumps(experiment.to_json()))) == experiment


def test_the_arms_of_the_overlap():
    for k in (2, 6):
        reptile, shared, separate = (overlap(arm, k, 100, 10) for arm in ARMS)
        assert reptile.build_learner().skip == 0
        assert [one.build_learner().skip for one in (shared, separate)] == [k - 1, k - 1]
        assert [one.build_learner().separate_tail for one in (shared, separate)] == [False, True]
        for one in (reptile, shared):
            assert (one.task["train_shot"], one.task["train_query"]) == (20, 0)
        assert (separate.task["train_shot"], separate.task["train_query"]) == (15, 5)
    assert overlapping(range(2, 8)) == [5, 6, 7]
    # It does begin there: the fifth minibatch of 25 holds images of the first four.
    images = ax.Batch(jnp.arange(100), jnp.arange(100))
    source = ax.Minibatches(images, BATCH, KEY)
    seen = [set(source.at(i).draw(None, KEY).x.tolist()) for i in range(5)]
    earlier = set().union(*seen[:3])
    assert len(earlier) == 75
    assert not earlier & seen[3]
    assert seen[4] <= earlier | seen[3]
    for arm, k, message in (("maml", 2, "no arm"), ("reptile", 1, "2 or more")):
        with pytest.raises(ValueError, match=message):
            overlap(arm, k, 100, 10)


# Figures and tables


def rows(**more):
    return [
        {"name": one.name, "kind": one.kind, "inner_steps": one.inner_steps, "outer_lr": 0.25,
         "accuracy": 0.5 + 0.01 * i, "accuracy_ci95": 0.02, "seconds": 1.0, **more,
         "curve": [{"step": s, "accuracy": 0.4, "accuracy_ci95": 0.1} for s in (20, 40)]}
        for i, one in enumerate(COMBINATIONS)
    ]  # fmt: skip


def test_study_figures_and_table():
    left, right = report.gradient_combinations(rows()).axes
    drawn = [line for line in left.get_lines() if len(line.get_xdata())]
    assert len(drawn) == 10
    assert [label.get_text() for label in right.get_yticklabels()][-1] == "g1"
    (ax_,) = report.overlap([*rows(arm="a"), *rows(arm="b")], [3, 4]).axes
    labels = [text.get_text() for text in ax_.get_legend().get_texts()]
    assert labels == ["a shared tail overlaps", "g1", "g1"]
    assert not report.overlap(rows(arm="a"), []).axes[0].patches
    text = printed(report.study_table(rows(), "here"))
    for part in ("here", "(g1+g2)/2", "52.00 ± 2.00 %", "0.25"):
        assert part in text


def printed(table):
    console = Console(width=140, record=True, file=io.StringIO())
    console.print(table)
    return console.export_text()


def expanded(k, predicted=True, order=2.0):
    rates = np.array([2e-3, 1e-3])
    due = np.stack([np.ones(2), -(k - 1) * rates], axis=1)
    return Expansion({"algorithm": "FOMAML"}, k, "all", 4, rates, np.ones((2, 3)), np.ones(3),
                     np.ones(3), 1.01 * due, 0.001 * abs(due), due if predicted else None,
                     rates**2, order)  # fmt: skip


def test_expansion_figures_and_table():
    measured = {"FOMAML": [expanded(3), expanded(2)], "mine": [expanded(2, predicted=False)]}
    left, right = report.expansions(measured).axes
    assert "predicted" in [text.get_text() for text in left.get_legend().get_texts()]
    assert "FOMAML, order 2.00" in [text.get_text() for text in right.get_legend().get_texts()]
    assert not report.expansions({"SGD": [expanded(2, order=math.nan)]}).axes[1].axison
    text = printed(report.expansion_table(measured, "there"))
    for part in ("there", "FOMAML", "-2.020 ± 0.002", "-2", "2.00", "–"):
        assert part in text


# Commands


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XLA_FLAGS", os.environ.get("XLA_FLAGS", ""))
    monkeypatch.delenv("ADAPTAX_DEBUG", raising=False)
    return tmp_path


def tiny(skip):
    return Experiment(
        algorithm="reptile",
        tasks="glyphs",
        task={"way": 3, "shot": 2, "query": 1},
        network={"mlp": [4], "in_size": 784},
        learner={"inner_lr": 0.01, "inner_steps": 2, "inner_batch": 3, "outer_lr": 0.25,
                 "skip": skip},
        steps=3,
        meta_batch=1,
        evaluation={"episodes": 4, "at": [2]},
    )  # fmt: skip


@pytest.fixture
def small(monkeypatch):
    """Studies of a training on glyphs, which takes a moment."""
    one = {"last-2": (tiny(1), {"name": "g2", "kind": "last", "arm": "shared"})}
    monkeypatch.setattr(gradients, "_arms", lambda *asked: one)
    monkeypatch.setattr(gradients, "CURVE_EPISODES", 4)


def sentence(capsys):
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.count("\n") == 1
    return shown.err


@pytest.mark.usefixtures("small")
def test_a_study_is_interrupted_goes_on_and_is_kept(here, capsys, monkeypatch):
    words = ["analyze", "gradients", "--out", "study"]
    plain, train, first = Watcher.__call__, Experiment.train, here / "study" / "last-2"
    by_step = lambda self, *args, **how: train(self, *args, chunk=1, **how)
    monkeypatch.setattr(Experiment, "train", by_step)

    def press(self, record):
        plain(self, record)
        os.kill(os.getpid(), signal.SIGINT)

    def refuse(*_, **__):
        raise KeyboardInterrupt

    def steps():
        return [record["step"] for record in ax.Run(first).metrics()]

    with monkeypatch.context() as patch:
        patch.setattr(Watcher, "__call__", press)
        assert main(words) == 130
    said = "saved in study/last-2; go on with: adaptax analyze gradients --out study"
    assert said in capsys.readouterr().err
    assert steps() == [1]
    with monkeypatch.context() as patch:
        patch.setattr(Experiment, "test", refuse)
        assert main(words) == 130
    assert "is kept, go on with: adaptax analyze" in capsys.readouterr().err
    assert steps() == [1, 2, 3]
    assert {path.name for path in (here / "study").iterdir()} == {"last-2"}
    assert not (first / "test.json").exists()
    before = (first / "metrics.jsonl").read_text()
    assert main([*words, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (first / "metrics.jsonl").read_text() == before  # not trained again
    assert [row["name"] for row in result["rows"]] == ["g2"]
    assert [point["step"] for point in result["rows"][0]["curve"]] == [1, 2, 3]
    assert result["rows"][0]["report"]["protocol"]["episodes"] == 4
    assert json.loads((here / "study" / "gradient_combinations.json").read_text()) == result
    assert (here / "study" / "gradient_combinations.png").stat().st_size > 1000
    # Nothing is trained or tested again.
    monkeypatch.setattr(Experiment, "train", refuse)
    monkeypatch.setattr(Experiment, "test", refuse)
    assert main(words) == 0
    assert "study (gradient_combinations.json, gradient_comb" in capsys.readouterr().out
    assert main([*words, "--study", "overlap"]) == 0
    assert "overlap.png" in capsys.readouterr().out
    monkeypatch.setattr(gradients, "_arms", lambda *asked: {"last-2": (tiny(0), {"name": "x"})})
    assert main(words) == 2
    assert "--out" in sentence(capsys)


def test_taylor(here, capsys):
    words = ["analyze", "taylor", "sinusoid", "--learners", "fomaml", "--minibatches", "2",
             "--count", "2", "--rates", "2e-4", "1e-4", "--out", "here"]  # fmt: skip
    assert main(words) == 0
    text = capsys.readouterr().out
    for part in ("FOMAML", "AvgGradInner", "2.00", "taylor.png"):
        assert part in text
    assert main([*words, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    (found,) = result["expansions"]["FOMAML"]
    assert found["rates"] == [2e-4, 1e-4]
    assert np.allclose(found["coefficients"], found["predicted"], rtol=0.02)
    assert result["command"].startswith("adaptax analyze taylor sinusoid --learners fomaml --min")
    assert "--rates 0.0002 0.0001" in result["command"]
    files = {"taylor.json", "taylor.png", "table.csv", "table.tex"}
    assert {path.name for path in (here / "here").iterdir()} == files


def test_reptiles_network_with_another_activation():
    (_, smooth, _), (_, plain, _) = (measured._network(False, relu, 0) for relu in (False, True))
    x = jax.random.normal(KEY, (2, 28, 28, 1))
    rectified = measured._smooth(jax.nn.relu, smooth.params, x)
    assert np.allclose(rectified, plain(x), rtol=1e-5, atol=1e-5)
    assert not np.allclose(smooth(x), plain(x), rtol=1e-2)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["gradients", "--steps", "0"], "--steps: '0' is not"),
        (["gradients", "--episodes", "0"], "--episodes: '0' is not"),
        (["gradients", "--inner-steps", "3"], "--study overlap"),
        (["gradients", "--study", "overlap", "--inner-steps", "1"], "2 or more"),
        (["gradients", "--data-root", "nowhere"], "nowhere"),
        (["taylor", "sinusoid", "--learners", "adam"], "'adam'"),
        (["taylor", "sinusoid", "--minibatches", "1"], "should be 2 to 6"),
        (["taylor", "omniglot", "--minibatches", "5"], "should be 2 to 4"),
        (["taylor", "sinusoid", "--relu"], "tanh"),
        (["taylor", "sinusoid", "--rates", "0"], "positive"),
        (["taylor", "sinusoid", "--count", "0"], "--count: '0' is not"),
        (["taylor", "omniglot", "--data-root", "nowhere"], "nowhere"),
    ],
)
def test_errors_are_a_sentence_and_leave_nothing(words, said, here, capsys):
    assert main(["analyze", *words]) == 2
    assert said in sentence(capsys)
    assert list(here.iterdir()) == []


@pytest.mark.parametrize("words", [["analyze"], ["analyze", "gradients"], ["analyze", "taylor"]])
def test_help_has_an_example(words, capsys, here):
    assert main([*words, "--help"]) == 0
    assert f"adaptax {' '.join(words)}" in capsys.readouterr().out.split("For example:")[1]
    assert main([*words, "--bogus"]) == 2

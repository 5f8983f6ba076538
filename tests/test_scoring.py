"""What `evaluate` scores, for targets of any kind."""

import functools
import json

import equinox as eqx
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import optax
import pytest

import adaptax as ax
from adaptax import losses, metrics
from adaptax.engine import scoring
from adaptax.report import report_table

KEY = jax.random.key(0)
REGRESSION = {"mse", "nll", "coverage_50", "coverage_90", "coverage_95"}
CLASSES = {"accuracy", "nll", "brier", "entropy"}


class Drawn(ax.TaskDistribution):
    """x `(n, 4)` and targets that a function makes of it."""

    split: str = eqx.field(static=True)
    target: object = eqx.field(static=True)

    def sample(self, key):
        x = jax.random.normal(key, (20, 4))
        both = ax.Batch(x, self.target(x))
        return ax.Task(
            *(jax.tree.map(lambda a, of=of: a[of], both) for of in (slice(10), slice(10, 20)))
        )


def model(out, apply=lambda p, x: x @ p["w"]):
    return ax.Functional({"w": jax.random.normal(jax.random.key(1), (4, out))}, apply)


def evaluated(loss, target, net, **how):
    tasks = Drawn("test", target)
    return ax.evaluate(ax.MAML(loss, 0.01, 1), net, tasks, episodes=3, key=KEY, **how)


def bce(m, b):
    return optax.sigmoid_binary_cross_entropy(m(b.x), b.y).mean()


def heteroscedastic(m, b):
    mean, log_var = jnp.split(m(b.x), 2, axis=-1)
    return jnp.mean((mean - b.y) ** 2 * jnp.exp(-log_var) + log_var)


def ordinal(m, b):
    """Cumulative logits: whether the label is above each of the thresholds."""
    above = b.y[:, None] > jnp.arange(3)
    return optax.sigmoid_binary_cross_entropy(m(b.x), above.astype(float)).mean()


def poisson(m, b):
    return jnp.mean(jnp.exp(m(b.x)) - b.y * m(b.x))


reals = lambda x: x[:, :1] + x[:, 1:2]
labels = lambda x: (x[:, :3] > 0).astype(float)
levels = lambda x: jnp.sum(x[:, :3] > 0, axis=1)
counts = lambda x: jnp.floor(jnp.exp(x[:, :1]))
flat = lambda p, x: (x @ p["w"])[:, 0]


@pytest.mark.parametrize(
    ("loss", "target", "net", "metric", "primary"),
    [
        # Losses that are least at the targets, whatever they are called.
        (lambda m, b: jnp.mean((m(b.x) - b.y) ** 2), reals, model(1), REGRESSION, "mse"),
        (lambda m, b: jnp.sum(jnp.abs(m(b.x) - b.y)), reals, model(1), REGRESSION, "mse"),
        (lambda m, b: jnp.sqrt(jnp.mean((m(b.x) - b.y) ** 2)), reals, model(1), REGRESSION, "mse"),
        (lambda m, b: optax.huber_loss(m(b.x), b.y).mean() + jnp.sum(m.params["w"] ** 2),
         reals, model(1), REGRESSION, "mse"),
        (lambda m, b: jnp.mean((m(b.x) - b.y) ** 2), levels, model(1, flat), REGRESSION, "mse"),
        (losses.MixedPrecision(lambda m, b: jnp.mean((m(b.x) - b.y) ** 2)), reals, model(1),
         REGRESSION, "mse"),
        (losses.MixedPrecision(losses.mse), reals, model(1), REGRESSION, "mse"),
        # Losses that are not.
        (bce, labels, model(3), set(), "loss"),
        (lambda m, b: jax.nn.relu(1 - m(b.x) * (2 * b.y - 1)).mean(), labels, model(3), set(),
         "loss"),
        (lambda m, b: jax.nn.relu(1 - m(b.x) * b.y).mean(), lambda x: jnp.sign(x[:, :1]), model(1),
         set(), "loss"),
        (poisson, counts, model(1), set(), "loss"),
        (poisson, lambda x: counts(x).astype(int), model(1), set(), "loss"),
        (lambda m, b: poisson(m, b), lambda x: counts(x)[:, 0].astype(int), model(1, flat), set(),
         "loss"),
        (heteroscedastic, reals, model(2), set(), "loss"),
        (ordinal, levels, model(3), set(), "loss"),
        # Integer labels with a logit for each.
        (lambda m, b: losses.cross_entropy(m, b), levels, model(4), CLASSES, "accuracy"),
        (losses.cross_entropy, levels, model(4), CLASSES, "accuracy"),
        # The library's losses say what they are.
        (losses.binary_cross_entropy, labels, model(3), {"label_accuracy", "nll", "brier"},
         "label_accuracy"),
        (functools.partial(losses.binary_cross_entropy, reduction="sum"),
         lambda x: x[:, :3] > 0, model(3), {"label_accuracy", "nll", "brier"}, "label_accuracy"),
        (losses.mse, levels, model(1, flat), REGRESSION, "mse"),
        (losses.predicts("regression")(lambda m, b: poisson(m, b)), counts, model(1), REGRESSION,
         "mse"),
    ],
)  # fmt: skip
def test_the_loss_says_what_is_scored(loss, target, net, metric, primary):
    found = evaluated(loss, target, net)
    own = set() if losses.kind_of(loss) else {"loss"}
    assert set(found.values) == metric | own
    assert found.primary == primary
    assert (found.bins is not None) == (primary == "accuracy")
    assert (found.quantiles is not None) == (primary == "mse")
    if own:
        tasks = Drawn("test", target)
        first = [tasks.sample(ax.task.episode_key("test", KEY, i)).query for i in range(3)]
        rtol = 0.02 if isinstance(loss, losses.MixedPrecision) else 1e-4
        assert np.allclose(found.values["loss"][:, 0], [loss(net, q) for q in first], rtol=rtol)
    assert primary in str(found)
    json.dumps(found.to_json(), allow_nan=False)
    report_table(found)


def test_a_loss_that_broadcasts_is_refused():
    squares = lambda m, b: jnp.mean((m(b.x) - b.y) ** 2)
    for target, net in ((reals, model(2)), (reals, model(1, flat)),
                        (lambda x: reals(x)[:, 0], model(1))):  # fmt: skip
        with pytest.raises(ValueError, match="another shape than the targets have"):
            evaluated(squares, target, net)
    # A loss that knows what it does, says so by its scores.
    best = lambda m, b: jnp.mean(jnp.min((m(b.x) - b.y) ** 2, axis=-1))
    found = evaluated(best, reals, model(2), scores=lambda p, y: {"spread_error": jnp.std(p)})
    assert set(found.values) == {"loss", "spread_error"}


@pytest.mark.parametrize("kind", ["pixels", "tokens"])
@pytest.mark.parametrize("particles", [1, 3])
def test_one_label_for_every_pixel_or_token(kind, particles):
    weights = jax.random.normal(KEY, (particles, 3))
    x = jax.random.normal(KEY, (5, 6, 7, 1) if kind == "pixels" else (5, 6, 1))
    y = jax.random.randint(KEY, x.shape[:-1], 0, 3)
    net = ax.Functional(weights[0], lambda p, x: x * p)
    if particles > 1:
        net = ax.Ensemble(ax.Functional(weights, net.apply))
    logits = net(x)
    found = scoring.scores(losses.cross_entropy, net, logits, ax.Batch(x, y), 1.0)
    flat = np.asarray(jax.nn.softmax(logits)).reshape(particles, -1, 3).mean(axis=0)
    of = flat[np.arange(y.size), np.ravel(y)]
    assert np.isclose(found["accuracy"], np.mean(flat.argmax(axis=1) == np.ravel(y)))
    assert np.isclose(found["nll"], -np.log(of).mean(), rtol=1e-5)
    assert found["bins"][:, 0].sum() == y.size


def test_an_ensemble_answers_labels_as_a_mixture_and_own_losses_by_their_mean():
    logits = np.array([[[2.0, -1.0]], [[-3.0, 0.5]]], np.float32)  # two particles, one example
    y = np.array([[0, 1]])
    p = (1 / (1 + np.exp(-logits))).mean(axis=0)
    found = metrics.binary(jnp.asarray(logits), jnp.asarray(y))
    assert np.isclose(found["nll"], -np.mean(np.log(np.where(y == 1, p, 1 - p))), rtol=1e-5)
    assert np.isclose(found["brier"], np.mean((p - y) ** 2), rtol=1e-5)
    assert found["label_accuracy"] == np.mean((p > 0.5) == (y == 1))
    huge = metrics.binary(jnp.array([[200.0, -200.0]]), jnp.array([[1, 0]]))
    assert huge["nll"] == 0
    x = jax.random.normal(KEY, (6, 4))
    net = ax.Ensemble(ax.Functional({"w": jax.random.normal(KEY, (2, 4, 3))}, model(3).apply))
    batch = ax.Batch(x, labels(x))
    found = scoring.scores(bce, net, net(x), batch, 1.0)
    assert np.isclose(found["loss"], np.mean([bce(net.member(i), batch) for i in (0, 1)]))


def test_several_targets_are_scored_by_the_loss():
    target = lambda x: {"class": levels(x), "size": reals(x)}
    apply = lambda p, x: {"class": x @ p["w"], "size": x @ p["w"][:, :1]}

    def loss(m, b):
        out = m(b.x)
        labels = optax.softmax_cross_entropy_with_integer_labels(out["class"], b.y["class"])
        return labels.mean() + jnp.mean((out["size"] - b.y["size"]) ** 2)

    right = lambda p, y: {"accuracy": jnp.mean(p["class"].argmax(-1) == y["class"])}
    found = evaluated(loss, target, model(4, apply), scores=right)
    assert set(found.values) == {"loss", "accuracy"}
    assert found.diverged() == 0
    alone = evaluated(loss, target, model(4, apply), transductive=False)
    assert np.allclose(alone.values["loss"], found.values["loss"], rtol=1e-4)


def test_the_loss_may_ask_the_model_for_more_than_predictions():
    class Net(eqx.Module):
        w: jax.Array

        def features(self, x):
            return x @ self.w

        def __call__(self, x):
            return self.features(x)

    def loss(m, b):
        return bce(ax.Functional(m.features(b.x), lambda p, x: p), b) + jnp.sum(m.w**2)

    net = Net(jax.random.normal(KEY, (4, 3)))
    found = evaluated(loss, labels, net, at=[0])
    task = Drawn("test", labels).sample(ax.task.episode_key("test", KEY, 0))
    assert np.isclose(found.values["loss"][0, 0], loss(net, task.query), rtol=1e-5)
    assert set(found.values) == {"loss"}


# Selection


@pytest.mark.parametrize(
    ("select", "sign"),
    [("accuracy", 1), ("label_accuracy", 1), ("r2", 1), ("macro_f1", 1), ("Mean_IoU", 1),
     ("nll", -1), ("joint_nll", -1), ("loss", -1), ("mse", -1), ("particle_mse", -1),
     (("anything", "max"), 1), (["anything", "min"], -1), (("accuracy", "min"), -1)],
)  # fmt: skip
def test_which_direction_is_better(select, sign):
    assert scoring.sign_of(select) == sign
    name = scoring.name_of(select)
    report = ax.Report({}, [None], {name: np.full((2, 1), 3.0)}, None, select=select)
    assert report.score == 3.0 * sign


@pytest.mark.parametrize("select", ["score", "coverage_90", "accuracy_error", "entropy"])
def test_a_direction_that_is_not_known_is_to_be_said(select):
    with pytest.raises(ValueError, match="does not tell whether more of it is better; say select="):
        evaluated(bce, labels, model(3), select=select)


@pytest.mark.parametrize("select", [("a", "up"), ("a",), ()])
def test_what_is_no_selection(select):
    with pytest.raises(ValueError, match="expected a metric, or a metric and"):
        scoring.sign_of(select)


def label_accuracy(p, y):
    return {"share": jnp.mean((p > 0) == (y > 0))}


def fit(net, **how):
    net = jax.tree.map(jnp.zeros_like, net)
    return ax.fit(
        ax.MAML(bce, 0.05, 1), net, Drawn("train", labels), meta_batch=4, key=KEY,
        optimizer=optax.sgd(0.5), validate=Drawn("val", labels), **how,
    )  # fmt: skip


def test_fit_selects_by_a_metric_of_ones_own():
    how = {"episodes": 20, "scores": label_accuracy}
    runs = {}
    for way in ("max", "min"):
        validation = {**how, "select": ("share", way)}
        result = fit(model(3), steps=12, chunk=2, validate_every=2, validation=validation)
        seen = [r["validation"]["share"] for r in result.history if "validation" in r]
        assert len(set(seen)) > 1
        assert np.isclose(abs(result.best_score), {"max": max, "min": min}[way](seen))
        runs[way] = result.best_step
    assert runs["max"] > runs["min"]


@pytest.mark.parametrize(
    ("select", "said"),
    [("accurracy", "does not tell"), ("top_accuracy", "select is one of .*loss.*, not 'top_acc")],
)
def test_fit_refuses_a_selection_before_it_trains(select, said):
    records = []
    with pytest.raises(ValueError, match=said):
        fit(model(3), steps=2, validation={"select": select}, watch=records.append)
    assert records == []


@pytest.mark.parametrize(
    ("scores", "said"),
    [
        (lambda p, y: jnp.mean(p), "expected a dict of scores by name"),
        (lambda p, y: {"each": p}, r"gave each of shape \(10, 3\); expected one number"),
        (lambda p, y: {"bins": jnp.mean(p)}, "under a name other than bins"),
        (lambda p, y: {1: jnp.mean(p)}, "expected a dict of scores by name"),
    ],
)
def test_scores_are_numbers_by_name(scores, said):
    with pytest.raises(ValueError, match=said):
        evaluated(bce, labels, model(3), scores=scores)


def test_scores_are_a_function(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match="scores is a function of predictions and targets, not 'a"):
        evaluated(bce, labels, model(3), scores="accuracy")


def test_binary_cross_entropy_by_hand():
    logits, y = np.array([[1.0, -2.0], [0.0, 30.0]]), np.array([[1, 0], [1, 1]])
    p = 1 / (1 + np.exp(-logits))
    each = -np.log(np.where(y == 1, p, 1 - p)).mean(axis=1)
    net = ax.Functional(jnp.asarray(logits), lambda p, x: p)
    for kind in (int, float, bool):
        batch = ax.Batch(jnp.zeros((2, 1)), jnp.asarray(y.astype(kind)))
        assert np.isclose(losses.binary_cross_entropy(net, batch), each.mean(), rtol=1e-5)
        total = losses.binary_cross_entropy(net, batch, reduction="sum")
        assert np.isclose(total, each.sum(), rtol=1e-5)
    with pytest.raises(ValueError, match="wants one logit for each label"):
        losses.binary_cross_entropy(net, ax.Batch(jnp.zeros((2, 1)), jnp.zeros(2)))

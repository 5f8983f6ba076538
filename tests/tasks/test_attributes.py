import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import chi2

from adaptax import metrics
from adaptax.tasks import DataError, score_readings
from adaptax.tasks.attributes import pools
from adaptax.tasks.episodes import Design

KEY = jax.random.key(4)
NAMES = ["Bald", "Male", "Smiling", "Young", "Chubby"]


def people(n=300, seed=0):
    return np.random.default_rng(seed).random((n, len(NAMES))) < 0.5


def plans(has, size, shot, query, n, names=NAMES):
    made, conjunctions = pools(has, names, size, Design(2, shot, query), "test")
    keys = jax.random.split(KEY, n)
    rows = jax.jit(jax.vmap(lambda key: made.plan(key, shot, query)))(keys)
    which = jax.jit(jax.vmap(made.which))(keys)
    return np.asarray(rows), [conjunctions[i] for i in np.asarray(which)], conjunctions


@pytest.mark.parametrize(("size", "readings"), [(2, 1), (3, 3)])
def test_positives_have_all_attributes_and_negatives_none(size, readings):
    has, shot, query = people(), 3, 4
    rows, drawn, conjunctions = plans(has, size, shot, query, 200)
    assert len(conjunctions) == 10
    assert rows.shape == (200, 2 * shot + readings * 2 * query)
    for row, conjunction in zip(rows, drawn):
        columns = [NAMES.index(name) for name in conjunction]
        support, queries = row[: 2 * shot], row[2 * shot :].reshape(readings, 2, query)
        assert not has[support[:shot]][:, columns].any()
        assert has[support[shot:]][:, columns].all()
        pairs = [(0, 1), (0, 2), (1, 2)][:readings]
        for (a, b), (negatives, positives) in zip(pairs, queries):
            asked = [columns[a], columns[b]]
            assert not has[negatives][:, asked].any()
            assert has[positives][:, asked].all()
            assert len({*support, *negatives, *positives}) == 2 * shot + 2 * query


def test_queries_of_a_reading_are_all_images_that_fit_it_equally_often():
    # One ambiguous conjunction; 60 images, so that every image of a pool is drawn many times.
    has = people(60, seed=1)[:, :3]
    rows, _, conjunctions = plans(has, 3, 2, 3, 4000, NAMES[:3])
    assert len(conjunctions) == 1
    core = np.flatnonzero(has.all(1))
    seen = np.bincount(rows[:, 2:4].ravel(), minlength=60)
    assert set(np.flatnonzero(seen)) == set(core)
    expected = 8000 / len(core)
    assert ((seen[core] - expected) ** 2 / expected).sum() < chi2.isf(1e-4, len(core) - 1)
    # Positives of the third reading: those with both; a core image is free of the support with
    # probability 1 − 2/c, an extra one always, and the rest is drawn evenly.
    fits = np.flatnonzero(has[:, 1] & has[:, 2])
    seen = np.bincount(rows[:, 4:].reshape(-1, 3, 2, 3)[:, 2, 1].ravel(), minlength=60)
    assert set(np.flatnonzero(seen)) == set(fits)
    free = np.where(np.isin(fits, core), 1 - 2 / len(core), 1.0)
    expected = 12_000 * free / (len(fits) - 2)
    assert ((seen[fits] - expected) ** 2 / expected).sum() < chi2.isf(1e-4, len(fits) - 1)


def test_every_conjunction_is_equally_likely():
    _, drawn, conjunctions = plans(people(), 3, 1, 1, 3000)
    seen = np.array([drawn.count(conjunction) for conjunction in conjunctions])
    assert ((seen - 300) ** 2 / 300).sum() < chi2.isf(1e-4, 9)


def test_conjunctions_with_too_few_images_are_left_out():
    has = people()
    has[5:, 0] = False  # five are bald
    _, conjunctions = pools(has, NAMES, 2, Design(2, 3, 3), "train")
    assert len(conjunctions) == 6
    assert not any("Bald" in conjunction for conjunction in conjunctions)
    with pytest.raises(
        DataError, match=r"no conjunction of 3 of the 5 train .*3 \+ 400 of each label; \w+ and"
    ) as caught:
        pools(has, NAMES, 3, Design(2, 3, 400), "train")
    assert "\n" not in str(caught.value)
    core = people(40, seed=2)[:, :2]
    both, none = core.all(1).sum(), (~core).all(1).sum()
    with pytest.raises(
        DataError, match=f"Bald and Male comes closest, with {both} images .* and {none} that have"
    ):
        pools(core, NAMES[:2], 2, Design(2, 30, 1), "train")


LABELS = jnp.tile(jnp.repeat(jnp.arange(2, dtype=jnp.int32), 3), 3)


def sure(*right, strength=20.0):
    """Logits of models that are sure of everything: right on some readings, wrong on the rest."""
    truth = np.asarray(jax.nn.one_hot(LABELS, 2)).reshape(3, 6, 2)
    models = [[t if r in of else 1 - t for r, t in enumerate(truth)] for of in right]
    return strength * jnp.asarray(np.array(models).reshape(len(right), 18, 2))


@pytest.mark.parametrize(
    ("right", "covered", "accuracy"),
    [
        (({0},), 1, 1),
        (({0}, {0}, {0}), 1, 1),
        (({0}, {2}, {0}), 2, 1),
        (({0}, {1}, {2}), 3, 1),
        (({2}, {1}, {1}, {0}, {0, 1}), 3, 1),
        ((set(),), 1, 0),
    ],
)
def test_coverage_counts_readings_that_have_a_model(right, covered, accuracy):
    scores = score_readings(sure(*right), LABELS)
    assert scores["coverage"] == covered
    assert scores["accuracy"] == accuracy


def test_coverage_agrees_with_a_plain_computation():
    logits = np.asarray(2 * jax.random.normal(KEY, (7, 18, 2)), float)
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    right_p = np.array([[m[i, LABELS[i]] for i in range(18)] for m in p])
    hits, accuracy = set(), []
    for model, probabilities in zip(logits, right_p):
        likelihood = [np.log(probabilities[6 * r : 6 * r + 6]).sum() for r in range(3)]
        r = int(np.argmax(likelihood))
        hits.add(r)
        part = slice(6 * r, 6 * r + 6)
        accuracy.append((model[part].argmax(-1) == np.asarray(LABELS[part])).mean())
    joint = [right_p[:, 6 * r : 6 * r + 6].prod(1).mean() for r in range(3)]
    scores = jax.jit(score_readings)(jnp.asarray(logits, jnp.float32), LABELS)
    assert scores["coverage"] == len(hits)
    assert np.isclose(scores["accuracy"], np.mean(accuracy), atol=1e-6)
    assert np.isclose(scores["nll"], -np.log(right_p.mean(0)).mean(), rtol=1e-5)
    assert np.isclose(scores["joint_nll"], -np.log(joint).mean() / 6, rtol=1e-5)
    usual = metrics.classification(jnp.asarray(logits, jnp.float32), LABELS)
    assert np.isclose(scores["nll"], usual["nll"], rtol=1e-5)
    shuffled = score_readings(jnp.asarray(logits[::-1], jnp.float32), LABELS)
    assert all(np.isclose(scores[name], shuffled[name], rtol=1e-5) for name in scores)


def test_one_model_alone():
    logits = jax.random.normal(KEY, (18, 2))
    scores, stacked = score_readings(logits, LABELS), score_readings(logits[None], LABELS)
    assert all(scores[name] == stacked[name] for name in scores)
    assert scores["coverage"] == 1
    assert np.isclose(scores["nll"], scores["joint_nll"], rtol=1e-5)


def test_a_model_for_every_reading_makes_the_readings_likely():
    apart, alike = (
        score_readings(sure({0}, {1}, {2}), LABELS),
        score_readings(sure({0}, {0}, {0}), LABELS),
    )
    # A third of the models is right about each reading: log(3) / 6 a query.
    assert np.isclose(apart["joint_nll"], np.log(3) / 6, atol=1e-4)
    assert alike["joint_nll"] > 10


def test_no_underflow():
    scores = score_readings(sure({0}, {1}, strength=1e4), LABELS)
    assert all(np.isfinite(value) for value in scores.values())


@pytest.mark.parametrize("n", [0, 17])
def test_readings_must_be_of_one_length(n):
    with pytest.raises(ValueError, match=f"{n} queries are not 3 readings of the same length"):
        score_readings(jnp.zeros((2, n, 2)), jnp.zeros(n, jnp.int32))

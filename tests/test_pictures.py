"""Pictures of uncertainty: what they show, and what they refuse."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.figure import Figure
from scipy import stats

import adaptax as ax
from adaptax.report import uncertainty as pictures
from adaptax.studies import ActiveCurves
from adaptax.tasks.attributes import AttributeTasks, pools
from adaptax.tasks.episodes import Design

KEY = jax.random.key(0)


class Fixed(ax.Adapter):
    """Learns nothing: answers with its meta-parameters."""

    loss: ax.Loss = eqx.field(static=True, default=ax.losses.mse)

    def adapt(self, meta, support, *, key):
        return meta


def legend(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def lines(axes, count):
    """The drawn lines with so many points."""
    return [line for line in axes.get_lines() if len(line.get_xdata()) == count]


# Functions


def scaled(w, x):
    return w * x


def band(axes):
    """Lower and upper ends of the band, by x."""
    (shade,) = axes.collections
    points = shade.get_paths()[0].vertices
    xs = np.unique(points[:, 0])
    ends = np.array([[f(points[points[:, 0] == x, 1]) for f in (np.min, np.max)] for x in xs])
    return xs, ends


def test_sampled_functions_and_the_interval_of_their_mixture():
    tasks = ax.tasks.sinusoid_or_line().test
    slopes = jnp.array([-3.0, 3.0])
    learners = {
        "one": (Fixed(), ax.Functional(jnp.array(2.0), scaled)),
        "two": (Fixed(), ax.Ensemble(ax.Functional(slopes, scaled))),
    }
    figure = pictures.sampled_functions(learners, tasks, key=KEY, rows=2, noise=0.5)
    assert isinstance(figure, Figure)
    assert legend(figure) == ["truth", "support", "samples", "90 % interval"]
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["one", "two", "", ""]
    one, two = figure.axes[:2]
    x, ends = band(one)
    assert np.allclose(ends - 2 * x[:, None], 0.5 * stats.norm.ppf([0.05, 0.95]), atol=1e-4)
    x, ends = band(two)
    for level, end in zip((0.05, 0.95), ends.T):
        mixture = stats.norm.cdf(end, np.outer([-3, 3], x), 0.5).mean(axis=0)
        assert np.allclose(mixture, level, atol=1e-4)
    *samples, truth = lines(two, pictures.GRID)
    assert len(samples) == 2
    assert np.allclose(samples[0].get_ydata(), -3 * samples[0].get_xdata(), rtol=1e-5)
    key = jax.random.split(KEY, 2)[0]
    assert np.allclose(
        truth.get_ydata(), tasks.function(key)(jnp.asarray(truth.get_xdata())), atol=1e-5
    )
    (support,) = lines(two, 5)
    assert np.array_equal(support.get_ydata(), tasks.sample(key).support.y[:, 0])


def test_the_noise_that_samples_learned():
    models = [ax.Gaussian(ax.Functional(jnp.zeros(()), scaled), v) for v in (0.01, 4.0)]
    meta = ax.Ensemble(ax.tree.stack(models))
    tasks = ax.tasks.sinusoid().test
    figure = pictures.sampled_functions(
        {"": (Fixed(), meta)}, tasks, key=KEY, rows=1, noise="learned", level=0.5
    )
    _, ends = band(figure.axes[0])
    assert np.allclose(stats.norm.cdf(ends[0, 1], 0, [0.1, 2.0]).mean(), 0.75, atol=1e-4)
    with pytest.raises(ValueError, match="asks the model for its `noise`"):
        pictures.sampled_functions(
            {"": (Fixed(), models[0].model)}, tasks, key=KEY, rows=1, noise="learned"
        )


def test_functions_that_cannot_be_drawn():
    tasks, model = ax.tasks.sinusoid().test, ax.Functional(jnp.ones(()), scaled)
    draw = lambda tasks=tasks, **how: pictures.sampled_functions(
        {"": (Fixed(), model)}, tasks, key=KEY, **how
    )
    with pytest.raises(ValueError, match="there are no learners"):
        pictures.sampled_functions({}, tasks, key=KEY)
    with pytest.raises(ValueError, match="rows is 1 or more, not 0"):
        draw(rows=0)
    with pytest.raises(ValueError, match='noise is a positive standard deviation or "learned"'):
        draw(noise=-1.0)
    with pytest.raises(ValueError, match="level is between 0 and 1, not 1"):
        draw(level=1.0)
    with pytest.raises(ValueError, match=r"of shape \(n, 1\), not \(10, 2\)"):
        draw(ax.tasks.circles().test)


# Boundaries


def beyond(w, x):
    """Two logits, equal where the first input is w."""
    return jnp.stack([jnp.zeros(len(x)), x[:, 0] - w], axis=-1)


def test_decision_boundaries_are_where_samples_are_undecided():
    tasks = ax.tasks.circles(diameter=(1.5, 2.0)).test
    at = jnp.array([1.0, 2.5, 99.0])
    learners = {"three": (Fixed(), ax.Ensemble(ax.Functional(at, beyond)))}
    figure = pictures.decision_boundaries(learners, tasks, key=KEY, rows=1)
    assert legend(figure) == ["truth", "support, label 1", "samples"]
    axes, bar = figure.axes
    assert bar.get_ylabel() == "probability of label 1"
    shade, *drawn, truth = axes.collections
    for w, contour in zip(at, drawn, strict=False):
        assert np.allclose(contour.get_paths()[0].vertices[:, 0], w, atol=1e-3)
    assert len(drawn) == 2
    assert [text.get_text() for text in axes.texts] == ["1 of 3 without boundary"]
    centre, radius = tasks.parameters(jax.random.split(KEY, 1)[0])
    distance = np.linalg.norm(truth.get_paths()[0].vertices - np.asarray(centre), axis=1)
    assert np.allclose(distance, radius, atol=0.02)
    x = np.linspace(*axes.dataLim.intervalx, pictures.SIDE)
    expected = (1 / (1 + np.exp(np.asarray(at)[:, None] - x))).mean(axis=0)
    assert np.allclose(shade.get_array().reshape(pictures.SIDE, -1)[7], expected, atol=0.02)


def test_boundaries_that_cannot_be_drawn():
    model = ax.Functional(jnp.zeros(()), beyond)
    with pytest.raises(ValueError, match=r"inputs of shape \(n, 2\) with integer labels"):
        pictures.decision_boundaries({"": (Fixed(), model)}, ax.tasks.sinusoid().test, key=KEY)
    three = ax.Functional(jnp.zeros((2, 3)), lambda w, x: x @ w)
    with pytest.raises(ValueError, match="of two classes, not 3"):
        pictures.decision_boundaries({"": (Fixed(), three)}, ax.tasks.circles().test, key=KEY)


# Attributes


def faces(shot=2, query=2):
    """Images of 3 pixels by 3 that show in their first row which of three attributes they have."""
    has = np.array([[i >> j & 1 for j in range(3)] for i in range(8)] * 8, bool)
    images = np.zeros((len(has), 3, 3, 3), np.uint8)
    images[:, 0] = 255 * has[:, :, None]
    design = Design(2, shot, query)
    made, kept = pools(has, ["Young", "Smiling", "Big_Nose"], 3, design, "test")
    return AttributeTasks(
        bank=jnp.asarray(images),
        pools=made,
        design=design,
        split="test",
        name="faces",
        conjunctions=kept,
    )


def reads(w, x):
    """Whether both attributes of a reading are there: sure of it just for one of them."""
    score = 8 * (x[:, 0, :, 0] @ w - jnp.sum(w) / 2)
    return jnp.stack([jnp.zeros(len(x)), score], axis=-1)


def test_a_sheet_tells_which_reading_every_sample_chose():
    tasks = faces()
    # Of the readings in order: the first, the third, the third.
    weights = jnp.array([[1.0, 1.0, 0.0], [0.0, 1.0, 1.0], [0.0, 1.0, 1.0]])
    meta = ax.Ensemble(ax.Functional(weights, reads))
    task = tasks.sample(KEY)
    score = ax.tasks.score_readings(meta(task.query.x), task.query.y)
    figure = pictures.attribute_sheet(Fixed(), meta, tasks, key=KEY)
    said = [text.get_text() for text in figure.texts]
    accuracy = 100 * float(score["accuracy"])
    assert said[0] == f"3 samples: 2 of 3 readings chosen, accuracy on them {accuracy:.0f} %"
    assert [text for text in said if text.endswith(" of 3")] == ["1 of 3", "0 of 3", "2 of 3"]
    assert "Young\nand Smiling" in said
    assert "Smiling\nand Big Nose" in said
    *images, matrix = figure.axes
    assert len(images) == 4 + 3 * 4
    assert list(matrix.get_lines()[0].get_ydata()) == [0, 2, 2]
    assert matrix.images[0].get_array().shape == (3, 3)
    p = np.asarray(jax.nn.softmax(meta(task.query.x))).mean(axis=0)
    shown = [axes.texts[0].get_text() for axes in images if axes.texts]
    assert shown[0] == f"{p[2, 1]:.0%}"  # negatives lead, positives are drawn first


def test_a_single_model_chooses_one_reading():
    model = ax.Functional(jnp.array([1.0, 1.0, 0.0]), reads)
    figure = pictures.attribute_sheet(Fixed(), model, faces(), key=KEY, per_label=1)
    assert figure.texts[0].get_text().startswith("1 sample: 1 of 3 readings chosen")
    assert len(figure.axes) == 2 + 3 * 2 + 1


def test_sheets_that_cannot_be_drawn():
    model = ax.Functional(jnp.array([1.0, 1.0, 0.0]), reads)
    with pytest.raises(ValueError, match="wants tasks with readings, not Sinusoid"):
        pictures.attribute_sheet(Fixed(), model, ax.tasks.sinusoid().test, key=KEY)
    with pytest.raises(ValueError, match="per_label is 1 or more, not 0"):
        pictures.attribute_sheet(Fixed(), model, faces(), key=KEY, per_label=0)
    with pytest.raises(ValueError, match="wants images"):
        pictures.attribute_sheet(Fixed(), model, faces(query=0), key=KEY)


# Active learning


def curves(metric="accuracy", strategies=("random", "entropy")):
    rng = np.random.default_rng(0)
    values = {strategy: {metric: rng.random((30, 4))} for strategy in strategies}
    return ActiveCurves({}, [5, 6, 7, 8], values, {})


def test_active_curves_and_the_paired_difference():
    given = curves()
    left, right = pictures.active_curves(given).axes
    assert [text.get_text() for text in left.get_legend().get_texts()] == ["random", "entropy"]
    assert left.get_ylabel() == "accuracy (%)"
    assert left.get_xlabel() == right.get_xlabel() == "labels"
    for line, strategy in zip(left.get_lines(), ("random", "entropy")):
        assert np.allclose(line.get_ydata(), 100 * given.mean(strategy))
    mean, half = given.difference()
    assert np.allclose(right.get_lines()[0].get_ydata(), 100 * mean)
    (shade,) = right.collections
    assert np.isclose(shade.get_paths()[0].vertices[:, 1].max(), 100 * (mean + half).max())
    assert "(points)" in right.get_ylabel()


def test_active_curves_of_several_learners():
    figure = pictures.active_curves({"A": curves("mse"), "B": curves("mse")}, title="here")
    left, right = figure.axes
    names = ["A, random", "A, entropy", "B, random", "B, entropy"]
    assert [text.get_text() for text in left.get_legend().get_texts()] == names
    assert [text.get_text() for text in right.get_legend().get_texts()] == ["A", "B"]
    assert left.get_title(loc="left") == "here"
    ways = ("random", "entropy", "disagreement")
    right = pictures.active_curves(curves(strategies=ways)).axes[1]
    assert [text.get_text() for text in right.get_legend().get_texts()] == list(ways[1:])
    assert right.get_title(loc="left") == "chosen − random, paired"
    assert len(pictures.active_curves(curves(strategies=["random"])).axes) == 1
    with pytest.raises(ValueError, match="there are no curves"):
        pictures.active_curves({})
    with pytest.raises(ValueError, match="metric is one of mse, not 'nll'"):
        pictures.active_curves(curves("mse"), metric="nll")

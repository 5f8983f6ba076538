"""Figures and tables: what they show, and what they refuse."""

import csv
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.figure import Figure
from rich.console import Console
from scipy import stats

import adaptax as ax
from adaptax import report, tree
from adaptax.engine.report import Report

KEY = jax.random.key(0)


def scores(metric="mse", at=(0, 1, 10), value=1.0):
    values = value + 0.1 * np.random.default_rng(0).random((20, len(at)))
    return Report({"algorithm": "MAML", "episodes": 20}, list(at), {metric: values}, None)


def legend(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_learning_curve_shows_loss_and_validation():
    history = [{"step": 10 * i, "loss": 1 / i} for i in range(1, 60)]
    assert len(report.learning_curve(history).axes) == 1
    history[9]["validation"] = {"mse": 0.5, "mse_ci95": 0.1}
    history[19]["validation"] = {"mse": 0.4, "mse_ci95": 0.1}
    left, right = report.learning_curve(history).axes
    assert left.get_xlabel() == right.get_xlabel() == "meta-steps"
    assert "mean squared error" in right.get_ylabel()
    assert any("best: 0.4 at step 200" in t.get_text() for t in right.get_legend().get_texts())


@pytest.mark.parametrize(
    ("metric", "best"), [("label_accuracy", "0.5"), ("loss", "0.4"), ("return", "0.5"), ("x", "")]
)
def test_learning_curve_marks_the_best_of_metrics_whose_names_tell(metric, best):
    history = [{"step": i, "loss": 1.0, "validation": {metric: v}} for i, v in ((1, 0.5), (2, 0.4))]
    right = report.learning_curve(history).axes[1]
    found = [t.get_text() for t in right.get_legend().get_texts() if "best" in t.get_text()]
    assert [text.split()[1] for text in found] == ([best] if best else [])


def test_learning_curve_wants_records():
    with pytest.raises(ValueError, match="no records"):
        report.learning_curve([])


def test_comparison_has_a_line_and_a_band_for_each_and_the_published_scores():
    figure = report.comparison(
        {"MAML": scores(), "Reptile": scores(at=(0, 1, 50))}, paper={"MAML": {1: 0.67}}
    )
    assert legend(figure) == ["MAML", "Reptile", "published"]
    assert len(figure.axes[0].collections) == 2


def test_accuracies_are_in_per_cent():
    figure = report.comparison({"MAML": scores("accuracy", value=0.5)})
    assert figure.axes[0].get_lines()[0].get_ydata().max() > 50
    assert "%" in figure.axes[0].get_ylabel()


def test_adaptation_draws_truth_support_and_steps():
    learner = ax.MAML(ax.losses.mse, 0.01)
    tasks = ax.tasks.sinusoid(5, 5).test
    model = ax.models.MLP(1, 1, (8,), key=KEY)
    figure = report.adaptation(learner, model, tasks, key=KEY)
    assert isinstance(figure, Figure)
    assert legend(figure) == ["truth", "0 steps", "1 step", "10 steps", "support"]
    truth = figure.axes[0].get_lines()[0]
    x = jnp.asarray(truth.get_xdata())[:, None]
    np.testing.assert_allclose(truth.get_ydata(), tasks.function(KEY)(x)[:, 0], rtol=1e-6)


class Plain(ax.TaskDistribution):
    """Tasks without a known function."""

    split: str = eqx.field(static=True, default="test")
    out: int = eqx.field(static=True, default=1)

    def sample(self, key):
        x = jax.random.normal(key, (4, 1))
        return ax.Task(ax.Batch(x, jnp.tile(x, self.out)), ax.Batch(x, jnp.tile(x, self.out)))


class Twins(ax.Adapter):
    """Two copies of the model, as an ensemble without steps."""

    loss: ax.Loss = eqx.field(static=True)

    def adapt(self, meta, support, *, key):
        return ax.Ensemble(tree.stack([meta, tree.axpy(2.0, meta, meta)]))


def test_adaptation_of_an_ensemble_and_of_an_unknown_function():
    model = ax.Functional(jnp.ones(()), lambda w, x: w * x)
    figure = report.adaptation(Twins(ax.losses.mse), model, Plain(), key=KEY)
    assert legend(figure) == ["truth", "adapted", "support"]
    assert len(figure.axes[0].collections) == 1  # the band of its spread


def test_adaptation_wants_one_input_and_one_output():
    model = ax.models.MLP(1, 2, (8,), key=KEY)
    with pytest.raises(ValueError, match=r"\(n, 1\)"):
        report.adaptation(ax.MAML(ax.losses.mse), model, Plain(out=2), key=KEY)


def test_episode_sheet_tells_right_from_wrong():
    task = ax.tasks.glyphs(3, 1, 2).test.sample(KEY)
    logits = 9.0 * jax.nn.one_hot(task.query.y.at[0].set(2), 3)
    figure = report.episode_sheet(task, logits, names=["a", "b", "c"])
    titles = [axes.get_title() for axes in figure.axes if axes.get_title()]
    assert titles[0].startswith("c?")
    assert sum("?" in title for title in titles) == 1
    assert len(titles) == 6
    assert report.episode_sheet(task, jnp.stack([logits, logits])).axes
    assert not any(axes.get_title() for axes in report.episode_sheet(task).axes)


def test_episode_sheet_wants_images():
    with pytest.raises(ValueError, match="wants images"):
        report.episode_sheet(ax.tasks.sinusoid().test.sample(KEY))


def test_numbers():
    assert report.number("accuracy", 0.98721, 0.0031) == "98.72 ± 0.31 %"
    assert report.number("mse", 0.3512) == "0.351"
    assert report.number("mse", float("nan"), 1.0) == "nan"


def test_tables():
    console = Console(width=120, record=True, quiet=True)
    model = ax.models.Conv4(3, filters=2, key=KEY)
    tasks = ax.tasks.glyphs(3, 1, 2).test
    learner = ax.MAML(ax.losses.cross_entropy, 0.1)
    scored = ax.evaluate(learner, model, tasks, key=KEY, episodes=2, at=[0, 1])
    console = Console(width=120, record=True)
    console.print(report.report_table(scored, "here"))
    row = {"name": "MAML", "metric": "mse", "scores": {"1 step": (0.7, 0.1)}, "paper": "0.67",
           "seconds": 3.2}  # fmt: skip
    console.print(report.comparison_table([row], "there"))
    text = console.export_text()
    for part in ("here", "ece", "nll", "there", "0.700 ± 0.100", "0.67", "3 s"):
        assert part in text
    assert "way 3" in report.summary(scored)
    assert "transductive yes" in report.summary(scored)


def test_the_figure_of_several_seeds_has_the_means_and_intervals_of_the_table():
    reports = [scores(value=value) for value in (1.0, 1.2, 1.7)]
    mean = report.Mean(reports)
    line, band = (lambda ax: (ax.get_lines()[0], ax.collections[0]))(
        report.comparison({"MAML": mean}).axes[0]
    )
    for i, y in enumerate(line.get_ydata()):
        each = [one.mean("mse", i, diverged=False) for one in reports]
        half = stats.t.ppf(0.975, 2) * stats.sem(each)
        assert np.isclose(y, np.mean(each))
        assert np.isclose(mean.score(step=i).ci95, half)
        assert np.isclose(mean.score(step=i).mean, y)
        points = band.get_paths()[0].vertices
        at = points[points[:, 0] == line.get_xdata()[i], 1]
        assert np.allclose([at.min(), at.max()], [y - half, y + half])
    one = report.Mean(reports[:1])
    assert one.ci95("mse") == reports[0].ci95("mse", diverged=False)


def test_no_two_lines_have_a_colour():
    figure = report.comparison({f"learner {i}": scores() for i in range(20)})
    lines = figure.axes[0].get_lines()
    assert len({line.get_color() for line in lines}) == len(lines) == 20


def test_axes_have_ticks_enough_to_be_read():
    for value in (0.3, 1.0, 50.0):
        ax = report.comparison({"MAML": scores(value=value)}).axes[0]
        low, high = ax.get_ylim()
        assert sum(low <= tick <= high for tick in ax.get_yticks()) > 3


def test_a_curve_of_one_record_is_marked_and_said():
    ax = report.learning_curve([{"step": 7, "loss": 0.5}]).axes[0]
    assert ax.get_lines()[0].get_marker() == "o"
    assert [text.get_text() for text in ax.texts] == ["one record, of step 7"]
    ax = report.learning_curve([{"step": 7, "loss": float("nan")}]).axes[0]
    assert [text.get_text() for text in ax.texts] == ["no finite loss"]


def test_tables_as_csv_and_latex(tmp_path):
    row = {"name": "A & B_1", "metric": "accuracy", "scores": {"1 step": (0.25, 0.125)},
           "paper": "95 ± .3 %", "seconds": 3.2}  # fmt: skip
    table = report.comparison_table([row, {**row, "scores": {}}], "there")
    assert list(csv.reader(table.csv().splitlines())) == [
        ["algorithm", "1 step", "1 step ci95", "paper", "trained in"],
        ["A & B_1", "0.25", "0.125", "95 ± .3 %", "3 s"],
        ["A & B_1", "", "", "95 ± .3 %", "3 s"],
    ]
    lines = table.latex().splitlines()
    assert lines[:2] == ["% there", r"\begin{tabular}{lrlr}"]
    assert r"A \& B\_1 & 25.00 $\pm$ 12.50 \% & 95 $\pm$ .3 \% & 3 s \\" in lines


def test_figures_are_saved_beside_png(tmp_path):
    figure = report.learning_curve([{"step": 1, "loss": 0.5}])
    paths = report.save({"a": figure}, tmp_path / "new", "svg")
    assert paths == [str(tmp_path / "new" / name) for name in ("a.png", "a.svg")]
    assert all(Path(path).stat().st_size > 500 for path in paths)
    assert report.save({"a": figure}, tmp_path) == [str(tmp_path / "a.png")]

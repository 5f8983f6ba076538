"""Tables on the command line: train, evaluate, predict many tasks, compare with baselines."""

import csv
import json

import numpy as np
import pytest

from adaptax.cli import main
from adaptax.engine.conformal import Scores

pytest.importorskip("narwhals")
pytest.importorskip("pyarrow")

SHORT = ["--steps", "4", "--episodes", "6", "--meta-batch", "2", "--set", "network.mlp=[4]"]
COLUMNS = ["--task", "machine", "--target", "y"]


def write(path, tasks=12, each=14, seed=0, target=True, label=False):
    rng = np.random.default_rng(seed)
    lines = []
    for task in range(tasks):
        slope, height = rng.normal(), 5 * rng.normal()
        for _ in range(each):
            x, kind = rng.normal(), rng.choice(["u", "v"])
            y = slope * x + height + 0.1 * rng.normal()
            y = ("high" if y > height else "low") if label else f"{y:.5f}"
            lines.append([f"m{task}", f"{x:.5f}", kind, *([y] if target else [])])
    with open(path, "w", newline="") as file:
        writer = csv.writer(file, delimiter=";")
        writer.writerow(["machine", "x", "kind", "y"][: 3 + target])
        writer.writerows(lines)
    return str(path)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ADAPTAX_DEBUG", raising=False)
    return tmp_path


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("table")
    table = write(folder / "table.csv", tasks=64)
    words = ["train", "maml", "table", "--path", table, *COLUMNS, *SHORT, "--run"]
    assert main([*words, str(folder / "run")]) == 0
    return folder / "run"


@pytest.mark.filterwarnings("always:intervals of 0.95 are Gaussian")
def test_a_run_keeps_its_preparation_and_predicts_many_tasks(run, here, capsys):
    assert (run / "preparation.safetensors").is_file()
    result = json.loads((run / "test.json").read_text())
    assert {"mse", "r2", "coverage_90"} <= result["result"].keys()
    assert main(["evaluate", str(run), "--episodes", "3", "--json"]) == 0
    capsys.readouterr()
    support = write(here / "new.csv", tasks=5, each=4, seed=1)
    query = write(here / "ask.csv", tasks=5, each=3, seed=1, target=False)
    words = ["predict", str(run), "--support", support, "--query", query]
    assert main([*words, "--out", "out.csv"]) == 0
    with open("out.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["machine"] for row in rows] == [f"m{i // 3}" for i in range(15)]
    half = []
    for row in rows:
        value, std, low, high = (float(row[f"y{end}"]) for end in ("", "_std", "_low", "_high"))
        assert low < value < high
        half.append((high - low) / (2 * std))
    # As many deviations as the ten validation tasks need, not those of a Gaussian.
    np.testing.assert_allclose(half, half[0], rtol=1e-3)
    found = Scores.load(run / "calibration.safetensors")
    assert len(found.score) == 10
    np.testing.assert_allclose(half[0], found.threshold(0.9)[0], rtol=1e-3)
    capsys.readouterr()
    assert main([*words, "--coverage", "0.5", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["tasks"], len(found["predictions"])) == (5, 15)
    assert main([*words, "--coverage", "0.95", "--json"]) == 0
    said = capsys.readouterr()
    assert "intervals of 0.95 are Gaussian: ones that hold for new tasks want 19 tasks" in said.err
    row = json.loads(said.out)["predictions"][0]
    np.testing.assert_allclose(row["y_high"] - row["y_low"], 2 * 1.96 * row["y_std"], rtol=1e-3)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda text: text.replace("x;", "z;"), "lacks columns of the features: x"),
        (lambda text: text.replace("machine", "engine"), "lacks columns of the tasks: machine"),
        (lambda text: text.replace("m0;", "new;"), "1 of 5 tasks of the queries have no support"),
        (lambda text: "", "is empty"),
    ],
)
def test_bad_queries_are_one_sentence(run, here, capsys, change, said):
    support = write(here / "new.csv", tasks=5, each=4, seed=1)
    query = write(here / "ask.csv", tasks=5, each=3, seed=1, target=False)
    text = change((here / "ask.csv").read_text())
    (here / "ask.csv").write_text(text)
    assert main(["predict", str(run), "--support", support, "--query", query]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "wants --path"),
        (["--path", "none.csv", *COLUMNS], "does not exist"),
        (["--path", "t.csv"], "a table wants --task, the column of its tasks"),
        (["--path", "t.csv", "--task", "machine"], "a table wants --target"),
        (["--path", "t.csv", "--task", "machine", "--target", "q"], "there is no such column"),
    ],
)
def test_what_a_table_wants_is_said(here, capsys, words, said):
    write(here / "t.csv")
    assert main(["train", "maml", "table", *words]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert main(["train", "maml", "sinusoid", "--target", "y"]) == 2
    assert "have no target" in capsys.readouterr().err


def test_learners_are_compared_with_models_of_every_task(here, capsys):
    table = write(here / "t.csv")
    words = ["compare", "table", "--path", table, *COLUMNS, "--algorithms", "ridge", "--steps", "2"]
    assert main([*words, "--episodes", "5", "--out", "c"]) == 0
    found = json.loads((here / "c" / "comparison.json").read_text())
    names = [row["name"] for row in found["rows"]]
    assert names == [
        "Ridge",
        "mean",
        "ridge per task",
        "Gaussian process per task",
        "boosting per task",
        "pooled boosting",
    ]
    scores = {row["name"]: row["scores"]["result"] for row in found["rows"]}
    # A line with little noise: a model of the task does far better than its mean.
    assert scores["ridge per task"]["mse"] < 0.5 * scores["mean"]["mse"]
    # In units of a support, R² is that of the mean of the support: none.
    assert abs(scores["mean"]["r2"]) < 1e-4
    pictures = {path.name for path in (here / "c").glob("*.png")}
    assert pictures == {"calibration.png", "parity.png", "support.png"}


def test_classes_are_found_by_the_type_of_the_target(here, capsys):
    table = write(here / "t.csv", label=True)
    words = ["train", "maml", "table", "--path", table, *COLUMNS, *SHORT, "--run", "r"]
    assert main(words) == 0
    support = write(here / "new.csv", tasks=2, each=4, seed=1, label=True)
    query = write(here / "ask.csv", tasks=2, each=3, seed=1, target=False)
    assert main(["predict", "r", "--support", support, "--query", query, "--out", "o.json"]) == 0
    for row in json.loads((here / "o.json").read_text()):
        assert row["y"] in ("high", "low")
        np.testing.assert_allclose(row["p_high"] + row["p_low"], 1, rtol=1e-5)

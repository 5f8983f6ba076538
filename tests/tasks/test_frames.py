"""Tables of any library and file, and one sentence for each that is bad."""

import datetime as dt

import numpy as np
import pytest

from adaptax.tasks import DataError, frames, preparation

pandas = pytest.importorskip("pandas")
polars = pytest.importorskip("polars")
arrow = pytest.importorskip("pyarrow")
for module in ("csv", "feather", "parquet"):
    pytest.importorskip(f"pyarrow.{module}")

DATA = {
    "assay": ["a", "a", "b", "b"],
    "x1": [1.0, None, 3.0, 5.0],
    "x2": [1, 2, 3, 4],
    "kind": ["u", None, "v", "u"],
    "on": [True, False, None, True],
    "when": [dt.datetime(2020, 1, 1), dt.datetime(2020, 1, 2, 6), None, dt.datetime(2021, 7, 1)],
    "y": [0.5, 1.5, None, 2.0],
}
FEATURES = ["x1", "x2", "kind", "on", "when"]


def fitted(source, **how):
    frame = frames.frame_of(source)
    how = {"task": "assay", "target": ["y"], **how}
    return preparation.fit(frame, how.pop("features", FEATURES), np.arange(len(frame)), **how)


def write(kind, folder):
    table = arrow.table(DATA)
    path = folder / f"table.{kind}"
    match kind:
        case "csv":
            arrow.csv.write_csv(table, path)
        case "parquet":
            arrow.parquet.write_table(table, path)
        case "arrow":
            with arrow.ipc.new_file(path, table.schema) as file:
                file.write_table(table)
        case _:
            arrow.feather.write_feather(table, path)
    return path


def test_every_library_and_file_gives_the_same_inputs(tmp_path):
    sources = [DATA, pandas.DataFrame(DATA), polars.DataFrame(DATA), polars.LazyFrame(DATA)]
    sources += [write(kind, tmp_path) for kind in ("csv", "parquet", "arrow", "feather")]
    expected = fitted(arrow.table(DATA)).inputs(arrow.table(DATA))
    # Three numbers, seven parts of the date, gaps in x1, on and when, u, v and missing.
    assert expected.shape == (4, 3 + 7 + 3 + 3)
    for source in sources:
        np.testing.assert_array_equal(fitted(source).inputs(source), expected)


def test_numbers_are_standardised_by_the_rows_that_are_fitted_alone():
    table = {"assay": list("aabb"), "x": [1.0, 3.0, 100.0, None], "y": [0.0, 1.0, 2.0, 3.0]}
    frame = frames.frame_of(table)
    fit = preparation.fit(frame, ["x"], np.array([0, 1]), task="assay", target=["y"])
    with (
        pytest.warns(UserWarning, match=r"'x': 1 of 3 values are far out .* 1 to 3.*100"),
        pytest.warns(UserWarning, match="'x' has 1 gaps"),
    ):
        x = fit.inputs(table)
    np.testing.assert_allclose(x, [[-1], [1], [98], [0]])


def test_dates_are_days_and_angles():
    day = [dt.date(1970, 1, 5), dt.date(1970, 1, 12)]  # Mondays
    parts = frames.date_parts(frames.frame_of({"d": day})["d"])
    np.testing.assert_allclose(parts[:, 0], [4, 11])
    np.testing.assert_allclose(parts[0, 3:5], parts[1, 3:5], atol=1e-12)
    np.testing.assert_allclose(parts[:, 3:5], [[0, 1], [0, 1]], atol=1e-12)
    np.testing.assert_allclose(parts[:, 1] ** 2 + parts[:, 2] ** 2, 1)


def test_ten_thousand_categories_are_a_few_inputs_or_an_index():
    names = [f"c{i % 10_000}" for i in range(20_000)] + ["common"] * 50
    table = {"assay": ["a"] * len(names), "c": names, "y": np.arange(len(names), dtype=float)}
    one = fitted(table, features=["c"])
    x = one.inputs(table)
    assert x.shape[1] == one.width == preparation.MOST_LEVELS
    np.testing.assert_array_equal(x.sum(axis=1), 1)
    assert x[-1].argmax() == 0
    new = {**table, "c": ["never seen"] * len(names)}
    np.testing.assert_array_equal(one.inputs(new).argmax(axis=1), x.shape[1] - 1)
    index = fitted(table, features=["c"], encoding="embedding")
    assert index.sizes == (10_002,)
    known, unknown = (index.inputs(t)["categories"][:, 0] for t in (table, new))
    assert set(known) == set(range(1, 10_002))
    assert set(unknown) == {0}


def test_unseen_values_of_few_categories_are_zero():
    fit = fitted(DATA, features=["kind"])
    other = {**DATA, "kind": ["w", "u", "v", None]}
    x = fit.inputs(other)
    np.testing.assert_array_equal(x.sum(axis=1), [0, 1, 1, 1])


def test_saved_and_loaded_it_is_the_same(tmp_path):
    for encoding in ("onehot", "embedding"):
        units = {"centre": np.full(1, 4 / 3), "spread": np.full(1, 0.5)}
        fit = fitted(DATA, encoding=encoding, **units, least=0.2)
        assert fit.least == 0.2
        fit.save(tmp_path / preparation.FILE)
        again = preparation.Preparation.load(tmp_path / preparation.FILE)
        one, two = fit.inputs(DATA), again.inputs(DATA)
        for a, b in zip(*(v.values() if isinstance(v, dict) else [v] for v in (one, two))):
            np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(fit.targets(DATA), again.targets(DATA))
        np.testing.assert_allclose(
            fit.targets(DATA)[:, 0], np.array([-5, 1, np.nan, 4]) / 3, rtol=1e-6
        )
    from adaptax import io

    io.save(tmp_path / "other.safetensors", {"a": np.zeros(2)})
    with pytest.raises(ValueError, match="no preparation of a table"):
        preparation.Preparation.load(tmp_path / "other.safetensors")


def test_labels_are_the_classes_of_training():
    table = {"assay": list("aab"), "x": [1.0, 2.0, 3.0], "y": ["no", "yes", None]}
    fit = fitted(table, features=["x"], classes=["no", "yes"])
    np.testing.assert_array_equal(fit.targets(table), [0, 1, -1])
    with pytest.raises(DataError, match="classes that training did not have, maybe"):
        fit.targets({**table, "y": ["no", "maybe", "yes"]})


def bad(message, source=None, **how):
    source = {**DATA, **how.pop("but", {})} if source is None else source
    with pytest.raises((DataError, FileNotFoundError), match=message) as caught:
        fitted(source, **how)
    assert "\n" not in str(caught.value)


def test_bad_columns_are_one_sentence_each():
    bad(r"'x1' has 1 infinite values of 4, in rows 1", but={"x1": [1.0, np.inf, 2.0, 3.0]})
    mixed = pandas.DataFrame({**DATA, "x1": [1, "a", 2.5, None]})
    bad("values of several types, 2 numbers and 1 texts", mixed)
    text = [str(i) for i in range(30)] + ["n.a."]
    table = {"assay": ["a"] * 31, "x": text, "y": [0.0] * 31}
    bad("all but 1 of its 31 values are numbers, such as 'n.a.'", table, features=["x"])
    assert fitted(table, features=["x"], categories=["x"]).kinds == {"x": "category"}
    bad(
        "decimal comma, such as '1,5'",
        {**table, "x": ["1,5", "2,5", "3,5"] + ["4,1"] * 28},
        features=["x"],
    )
    bad("values of type list", pandas.DataFrame({**DATA, "x1": [[1], [2], [3], [4]]}))
    double = pandas.DataFrame(np.ones((2, 2)), columns=["a", "a"])
    bad("several columns of one name", double)
    bad("0 rows", pandas.DataFrame({"a": []}))
    bad("a dict of 2 columns is no table", {"a": [1], "b": [1, 2]})
    bad("is a int", 3)


def test_targets_that_cannot_be_are_one_sentence_each():
    with pytest.raises(DataError, match="'y' is missing in all 4 rows"):
        preparation.targets_of(frames.frame_of({"y": [None, float("nan"), None, None]}), ["y"])
    with pytest.raises(DataError, match="'y' is a category; expected a number"):
        preparation.targets_of(frames.frame_of({"y": ["a", "b"]}), ["y"])
    with pytest.raises(DataError, match="'t', which names the tasks, is empty in 1 of 2"):
        preparation.rows_of(frames.frame_of({"t": ["a", None]}), "t")
    with pytest.raises(DataError, match="lacks columns of the tasks: t; there are y"):
        preparation.rows_of(frames.frame_of({"y": [1.0]}), "t")


def test_bad_files_are_one_sentence_each(tmp_path):
    def at(name, data):
        (tmp_path / name).write_bytes(data)
        return tmp_path / name

    bad("does not exist", tmp_path / "none.csv")
    bad("is a folder", tmp_path)
    bad("is empty", at("empty.csv", b""))
    bad("0 rows", at("head.csv", b"a,b\n"))
    bad(r"ends in \.xls; expected one of \.csv", at("a.xls", b"a"))
    bad("several columns of one name, a", at("double.csv", b"a,b,a\n1,2,3\n"))
    bad("cannot be read as csv", at("ragged.csv", b"a,b\n1,2\n1,2,3\n4,5\n"))
    bad("cannot be read as parquet", at("a.parquet", b"no parquet at all"))
    bad("cannot be read as arrow", at("a.arrow", b"no arrow at all"))


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
def test_the_separator_of_a_csv_is_found(tmp_path, separator):
    rows = [["task", "text, with; all", "y"], ["a", "p|q", "1.5"], ["b", "", "-2"]]
    quoted = "\n".join(separator.join(f'"{cell}"' for cell in row) for row in rows)
    (tmp_path / "a.csv").write_text("\ufeff" + quoted + "\n", encoding="utf-8")
    frame = frames.frame_of(tmp_path / "a.csv")
    assert frame.columns == rows[0]
    assert frames.words(frame["text, with; all"]) == ["p|q", None]


def test_other_columns_at_prediction_are_refused_or_warned_of():
    fit = fitted(DATA)
    lacking = {name: values for name, values in DATA.items() if name != "x2"}
    with pytest.raises(DataError, match="lacks columns of the features: x2; there are assay"):
        fit.inputs(lacking)
    with pytest.raises(DataError, match="'x1' is a category, and a number in training"):
        fit.inputs({**DATA, "x1": ["low", "high", "low", "mid"]})
    with pytest.warns(UserWarning, match="columns that training had not.*: colour"):
        fit.inputs({**DATA, "colour": [1, 2, 3, 4]})
    gone = {**DATA, "when": [None] * 4}
    assert np.isfinite(fit.inputs(gone)).all()


def test_patterns_choose_columns():
    names = ["id", "fp_0", "fp_1", "weight"]
    assert frames.choose(names, "fp_*", "features") == ["fp_0", "fp_1"]
    assert frames.choose(names, ["weight", "fp_1"], "features") == ["fp_1", "weight"]
    with pytest.raises(DataError, match=r"features='bits_.': there is no such column"):
        frames.choose(names, "bits_*", "features")

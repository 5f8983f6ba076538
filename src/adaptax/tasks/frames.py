"""Tables from anywhere: data frames of any library, and CSV, Parquet and Arrow files."""

from __future__ import annotations

import csv
import fnmatch
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from adaptax.tasks.files import DataError
from adaptax.text import shown

Columns = str | Sequence[str]
"""Names of columns, or patterns of them such as `"fp_*"`."""

SEPARATORS = (",", ";", "\t", "|")

DATE_PARTS = ("days", "sin year", "cos year", "sin week", "cos week", "sin day", "cos day")
"""What a date becomes: days since 1970, and its place in year, week and day as an angle."""

SHOWN = 5


def frame_of(source: Any) -> Any:
    """Return a table as a narwhals data frame.

    Args:
        source: a pandas, Polars, PyArrow or any other frame that narwhals knows, a mapping of names
            to values, or the path of a .csv, .tsv, .txt, .parquet, .arrow, .feather or .ipc file.

    Raises:
        FileNotFoundError: if there is no such file.
        DataError: if it is no table, empty, or has two columns of one name.
    """
    nw = _library("narwhals.stable.v2")
    where = "the table"
    if isinstance(source, str | os.PathLike):
        where = shown(os.fspath(source))
        source = _read(Path(source).expanduser(), where)
    elif isinstance(source, dict):
        source = _from_dict(source)
    if hasattr(source, "collect") and not hasattr(source, "shape"):  # a lazy frame
        source = source.collect()
    if type(source).__module__.split(".")[0] == "pandas" and hasattr(source, "columns"):
        source = source.set_axis([str(name) for name in source.columns], axis=1)
    try:
        frame = nw.from_native(source, eager_only=True)
        names = list(frame.columns)
    except TypeError:
        raise DataError(
            f"{where} is a {type(source).__name__}; expected a pandas, Polars or PyArrow data "
            "frame, a dict of columns, or the path of a CSV, Parquet or Arrow file"
        ) from None
    except Exception as error:  # of narwhals, for columns of one name
        if "unique" not in str(error):
            raise
        raise DataError(
            f"{where} has several columns of one name ({_line(error)}); rename them"
        ) from None
    if not names or not len(frame):
        raise DataError(
            f"{where} has {len(frame)} rows and {len(names)} columns; expected one or more of each"
        )
    return frame


def choose(names: Sequence[str], patterns: Columns, what: str) -> list[str]:
    """Return the columns that names and patterns choose, in the order of the table.

    Args:
        names: of all columns.
        patterns: names, or patterns with `*`, `?` and `[…]`.
        what: they are for, for errors.

    Raises:
        DataError: if one chooses none.
    """
    asked = [patterns] if isinstance(patterns, str) else list(patterns)
    found: set[str] = set()
    for pattern in asked:
        some = [pattern] if pattern in names else fnmatch.filter(names, pattern)
        if not some:
            raise DataError(
                f"{what}={shown(pattern)!r}: there is no such column; {there_are(names)}"
            )
        found.update(some)
    return [name for name in names if name in found]


def there_are(names: Iterable[str]) -> str:
    """Say which columns there are."""
    names = list(names)
    more = f" and {len(names) - 20} more" if len(names) > 20 else ""
    return f"there are {', '.join(map(shown, names[:20]))}{more}"


def kind_of(column: Any, name: str) -> str:
    """Return `"number"`, `"date"` or `"category"`: what the values of a column are.

    Args:
        column: a narwhals series.
        name: of the column.

    Raises:
        DataError: if they are of several kinds, or lists or the like.
    """
    nw = _library("narwhals.stable.v2")
    dtype = column.dtype
    if dtype.is_numeric() or dtype in (nw.Boolean, nw.Duration):
        return "number"
    if dtype.is_temporal():
        return "date"
    if dtype in (nw.Categorical, nw.Enum):
        return "category"
    if dtype == nw.String:
        _check_text(column, name)
        return "category"
    return _kind_of_objects(column, name)


def numbers(column: Any, name: str) -> Float[np.ndarray, " n"]:
    """Return a column of numbers, NaN where values are missing.

    Args:
        column: a narwhals series of numbers, truth values or durations, which become seconds.
        name: of the column.

    Raises:
        DataError: if some are infinite.
    """
    nw = _library("narwhals.stable.v2")
    if column.dtype == nw.Duration:
        found = np.array([np.nan if _missing(v) else v.total_seconds() for v in column.to_list()])
    elif column.dtype.is_numeric():
        found = np.asarray(column.cast(nw.Float64).to_numpy(), float)
    else:
        found = np.array([np.nan if _missing(v) else float(v) for v in column.to_list()], float)
    if len(bad := np.flatnonzero(np.isinf(found))):
        raise DataError(
            f"column {shown(name)!r} has {len(bad)} infinite values of {len(found)}, in rows "
            f"{_some(bad)}; leave them empty, or replace them"
        )
    return found


def words(column: Any) -> list[str | None]:
    """Return the values of a column as text, `None` where they are missing; 3.0 is "3"."""

    def said(value: Any) -> str | None:
        if _missing(value):
            return None
        if isinstance(value, float | np.floating) and float(value).is_integer():
            value = int(value)
        return str(value)

    return [said(value) for value in column.to_list()]


def date_parts(column: Any) -> Float[np.ndarray, "n parts"]:
    """Return `DATE_PARTS` of every date, NaN where it is missing."""

    def seconds(value: Any) -> float:
        if _missing(value):
            return np.nan
        whole = np.datetime64(value.replace(tzinfo=None) if hasattr(value, "tzinfo") else value)
        return float(whole.astype("datetime64[s]").astype(np.int64))

    days = np.array([seconds(value) for value in column.to_list()], float) / 86400
    # 1970 began on a Thursday; the year is the mean one, so that parts are functions of the days.
    turns = 2 * np.pi * np.stack([days / 365.2425, (days + 3) / 7, days], axis=1)
    angles = np.stack([np.sin(turns), np.cos(turns)], axis=2).reshape(len(days), -1)
    return np.concatenate([days[:, None], angles], axis=1)


def is_number(text: str) -> bool:
    """Return whether a text is one of a number."""
    try:
        float(text)
    except ValueError:
        return False
    return True


def _read(path: Path, where: str) -> Any:
    """Return the content of a file as a PyArrow table."""
    if not path.is_file():
        said = "is a folder" if path.is_dir() else "does not exist"
        raise FileNotFoundError(f"{where} {said}; expected a CSV, Parquet or Arrow file")
    readers: dict[str, Callable[[Path], Any]] = {
        ".csv": _read_csv,
        ".tsv": _read_csv,
        ".txt": _read_csv,
        ".parquet": _read_parquet,
        ".pq": _read_parquet,
        ".arrow": _read_arrow,
        ".feather": _read_arrow,
        ".ipc": _read_arrow,
    }
    read = readers.get(path.suffix.lower())
    if read is None:
        raise DataError(
            f"{where} ends in {shown(path.suffix) or 'nothing'}; expected one of "
            f"{', '.join(readers)}"
        )
    if path.stat().st_size == 0:
        raise DataError(f"{where} is empty; expected a line of names and rows below it")
    _library("pyarrow")
    try:
        return read(path)
    except DataError:
        raise
    except Exception as error:  # of any kind, for files that may hold anything
        raise DataError(
            f"{where} cannot be read as {path.suffix.lower()[1:]} ({_line(error)}); write it again"
        ) from error


def _read_csv(path: Path) -> Any:
    from pyarrow import csv as arrow

    separator, names = _separator(path)
    if double := [name for name, count in Counter(names).items() if count > 1]:
        raise DataError(
            f"{shown(path)} has several columns of one name, {', '.join(map(shown, double))}; "
            "rename them"
        )
    return arrow.read_csv(
        path,
        # Types are inferred from the first block alone, which is to be all.
        read_options=arrow.ReadOptions(block_size=min(path.stat().st_size + 2**20, 2**31 - 1)),
        parse_options=arrow.ParseOptions(delimiter=separator, newlines_in_values=True),
        convert_options=arrow.ConvertOptions(strings_can_be_null=True),
    )


def _separator(path: Path) -> tuple[str, list[str]]:
    """Return what separates the values of a CSV file, and the names in its first line.

    It is what splits the first lines into the same number of columns, the larger the better.
    """
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
        lines = [line for _, line in zip(range(20), file) if line.strip()]
    found = {}
    for separator in SEPARATORS:
        rows = list(csv.reader(lines, delimiter=separator))
        widths = {len(row) for row in rows[: max(len(rows) - 1, 1)]}
        found[separator] = len(rows[0]) if len(widths) == 1 and max(widths) > 1 else 0
    best = max(SEPARATORS, key=found.__getitem__)  # the comma where nothing does
    return best, next(csv.reader(lines[:1], delimiter=best), [])


def _read_parquet(path: Path) -> Any:
    from pyarrow import parquet

    return parquet.read_table(path)


def _read_arrow(path: Path) -> Any:
    from pyarrow import ipc

    with path.open("rb") as file:
        stream = file.read(6) != b"ARROW1"
    with path.open("rb") as file:
        return (ipc.open_stream if stream else ipc.open_file)(file).read_all()


def _from_dict(values: dict[Any, Any]) -> Any:
    arrow = _library("pyarrow")
    try:
        return arrow.table({str(name): value for name, value in values.items()})
    except Exception as error:  # columns of several lengths, or of values of several kinds
        raise DataError(
            f"a dict of {len(values)} columns is no table ({_line(error)}); expected as many "
            "values of one kind in each"
        ) from None


def _check_text(column: Any, name: str) -> None:
    """Raise DataError for a column of text that holds numbers but for a few values."""
    values = list(dict.fromkeys(value for value in column.to_list() if not _missing(value)))
    others = [value for value in values if not is_number(value)]
    if len(values) >= 3 and len(others) <= len(values) / 10:
        why = f"such as {shown(others[0], 40)!r}" if others else "written as text"
        raise DataError(
            f"column {shown(name)!r} is text and all but {len(others)} of its {len(values)} values "
            f"are numbers, {why}; leave what is missing empty and write numbers as numbers, or "
            "name the column in categories="
        )
    commas = [value for value in values if is_number(value.replace(",", ".", 1))]
    if len(values) >= 3 and len(commas) > len(values) / 2 and len(others) == len(values):
        raise DataError(
            f"column {shown(name)!r} has numbers with a decimal comma, such as "
            f"{shown(commas[0], 40)!r}; write them with a point, or name it in categories="
        )


def _kind_of_objects(column: Any, name: str) -> str:
    """Return the kind of Python objects, as pandas has them where values are missing."""
    values = [value for value in column.to_list() if not _missing(value)]
    kinds = Counter(map(_kind_of_object, values))
    if len(kinds) > 1:
        said = " and ".join(f"{count} {_PLURAL[kind]}" for kind, count in kinds.most_common())
        raise DataError(
            f"column {shown(name)!r} has values of several types, {said}; give it one, or name it "
            "in categories="
        )
    kind = next(iter(kinds), "number")  # nothing but gaps
    if kind == "other":
        raise DataError(
            f"column {shown(name)!r} has values of type {type(values[0]).__name__}; expected "
            "numbers, text or dates; leave it out by ignore="
        )
    return kind


_PLURAL = {"number": "numbers", "date": "dates", "category": "texts", "other": "other things"}


def _kind_of_object(value: Any) -> str:
    if isinstance(value, str):
        return "category"
    if hasattr(value, "year") and hasattr(value, "day"):
        return "date"
    return (
        "number"
        if isinstance(value, bool | int | float) or hasattr(value, "__float__")
        else ("other")
    )


def _missing(value: Any) -> bool:
    """Return whether a value is `None`, NaN or one of pandas' own."""
    return value is None or value != value or type(value).__name__ in ("NAType", "NaTType")


def _some(rows: np.ndarray) -> str:
    return ", ".join(map(str, rows[:SHOWN])) + (", …" if len(rows) > SHOWN else "")


def _line(error: BaseException) -> str:
    return shown(" ".join(str(error).split()) or type(error).__name__)


def _library(name: str) -> Any:
    """Return a module of the extra `table`.

    Raises:
        ModuleNotFoundError: saying how to install it.
    """
    import importlib

    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"tables want {name.split('.')[0]}, which is not installed; install the extra by "
            "pip install 'adaptax[table]'"
        ) from error

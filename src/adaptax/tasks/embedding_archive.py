"""The embeddings that LEO's authors released: zip archives of Python 2 pickles, read as data.

A pickle is a program for a stack machine: it may call any function of any module, and a few bytes
may ask for endless time and memory. Here Python's own machine runs it, the one that is written in
Python: it has only the instructions that numbers, strings, lists, dicts, tuples and arrays are
written with, and what they build is bounded. The names that arrays are pickled with stand for
functions of this file. No module is looked up, and NumPy's unpickling is reached only by a state
that was checked.
"""

from __future__ import annotations

import io
import math
import os
import pickle
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from adaptax.tasks.bank import NAMES
from adaptax.tasks.files import DataError, open_files

MAX_BYTES = 4 * 2**30
"""Largest pickle that is read; the largest of the released ones has 1.2 GB."""

MAX_INSTRUCTIONS, MAX_DEPTH, MAX_KEYS = 2 * 10**7, 16, 1000
"""Most instructions, tuples within tuples, and entries of dicts of a pickle."""

VIEWS = ("miniImageNet/center", "miniImageNet/multiview", "tieredImageNet/center")
"""Folders of the released archive."""

CONTENT = ("embeddings", "labels", "keys")


def read_archive(
    path: str | os.PathLike[str], view: str = "miniImageNet/center"
) -> dict[str, tuple[np.ndarray, np.ndarray, list[str]]]:
    """Return for each split the embeddings, `(n, width)`, their class numbers, and class names.

    Expects `…/VIEW/train_embeddings.pkl`, `val_…` and `test_…`, each a dict of `"embeddings"`,
    `"labels"` and `"keys"`. A key is `number-class-file`, which names the class; else the label
    does. The embeddings are as the file has them: LEO's code divides them by their length later.

    Args:
        path: the zip archive, or the folder that it was unpacked to.
        view: which of `VIEWS`.

    Raises:
        FileNotFoundError: if there is no such path.
        DataError: if a file is missing, broken, of another content, or holds anything but data.
    """
    found = {}
    with open_files(Path(path).expanduser(), MAX_BYTES) as files:
        for split in NAMES:
            tail = f"{view}/{split}_embeddings.pkl"
            names = [name for name in files.names if f"/{name}".endswith(f"/{tail}")]
            if len(names) != 1:
                raise DataError(
                    f"{path} holds {len(names)} files {tail}; expected one, in LEO's released "
                    f"archive or its folder, for a view among {', '.join(VIEWS)}"
                )
            where = f"{path}: {names[0]}"
            found[split] = _indexed(where, read_pickle(files.read(names[0]), where))
    return found


def read_pickle(data: bytes, where: str) -> Any:
    """Return what a pickle of plain data and arrays holds; nothing in it is run.

    Text of Python 2 is bytes, but for the keys of the outermost dict.

    Args:
        data: the pickle, of protocol 0 to 4.
        where: what errors call it.

    Raises:
        DataError: if it is truncated or broken, asks for anything but data and arrays, or for more
            than a file of embeddings needs.
    """
    try:
        value = _Reader(data).load()
    except _Refused as error:
        raise DataError(
            f"{where} is refused: it asks for {error}, and a file of embeddings needs arrays and "
            "strings alone; get a clean copy"
        ) from None
    except Exception as error:  # broken instructions raise whatever their reading does
        raise DataError(
            f"{where} is truncated or no pickle of arrays ({type(error).__name__}: "
            f"{_short(error)}); fetch it again"
        ) from None
    if not isinstance(value, dict):
        return value
    return {k.decode("latin1") if isinstance(k, bytes) else k: each for k, each in value.items()}


def _indexed(where: str, content: Any) -> tuple[np.ndarray, np.ndarray, list[str]]:
    if not isinstance(content, dict) or not set(CONTENT) <= content.keys():
        held = type(content).__name__
        if isinstance(content, dict):
            held = f"[{', '.join(_short(repr(k)) for k in content if isinstance(k, str))}]"
        raise DataError(f"{where} holds {held}; expected a dict of embeddings, labels and keys")
    if not all(isinstance(content[name], list | tuple | np.ndarray) for name in CONTENT):
        raise DataError(f"{where}: embeddings, labels and keys are not all lists or arrays")
    rows = [_row(where, row) for row in content["embeddings"]]
    kinds = sorted({(row.shape, row.dtype.kind) for row in rows})
    if len(kinds) != 1 or len(kinds[0][0]) != 1 or kinds[0][1] != "f":
        said = ", ".join(f"{kind}{list(shape)}" for shape, kind in kinds[:4]) or "nothing"
        raise DataError(f"{where}: embeddings are rows of {said}; expected floats of one width")
    x = np.stack(rows).astype(np.float32)
    keys, labels = ([_text(where, n, each) for each in content[n]] for n in ("keys", "labels"))
    if not len(keys) == len(labels) == len(x):
        raise DataError(
            f"{where} holds {len(x)} embeddings, {len(labels)} labels and {len(keys)} keys; "
            "expected as many of each"
        )
    parts = [key.split("-", 2) for key in keys]
    named = [part[1] for part in parts] if all(len(p) == 3 for p in parts) else labels
    names = sorted(set(named))
    number = {name: i for i, name in enumerate(names)}
    return x, np.array([number[name] for name in named], np.int32), names


# Containers may hold themselves many times over: only values of known kinds are gone through.


def _row(where: str, row: Any) -> np.ndarray:
    plain = isinstance(row, list | tuple) and all(isinstance(each, float | int) for each in row)
    if not (plain or isinstance(row, np.ndarray | np.generic)):
        raise DataError(
            f"{where}: embeddings are rows of {type(row).__name__}; expected floats of one width"
        )
    return np.asarray(row)


def _text(where: str, name: str, value: Any) -> str:
    if not isinstance(value, bytes | str | int | np.generic):
        raise DataError(
            f"{where}: {name} are of type {type(value).__name__}; expected text or integers"
        )
    value = value.decode("latin1") if isinstance(value, bytes) else value
    return str(value).rstrip("\0")


def _short(text: Any) -> str:
    text = str(text)
    return text if len(text) <= 100 else f"{text[:100]}…"


class _Refused(Exception):
    """A pickle asks for what it may not."""


class _Tuple(tuple[Any, ...]):
    """A tuple that knows how many tuples are within each other, and how many values in all."""

    def __init__(self, items: Iterable[Any]):
        inner = [item for item in self if isinstance(item, _Tuple)]
        self.depth: int = 1 + max((item.depth for item in inner), default=0)
        self.size: int = len(self) + sum(item.size for item in inner)


class _Steps(dict[int, Callable[[Any], None]]):
    """What the instructions of a pickle do, by their bytes; so many are done."""

    done = 0

    def __getitem__(self, code: int) -> Callable[[Any], None]:
        self.done += 1
        if self.done > MAX_INSTRUCTIONS:
            raise ValueError(f"more than {MAX_INSTRUCTIONS} instructions")
        if code not in self:
            raise _Refused(f"the instruction {chr(code)!r}")
        return super().__getitem__(code)


class _File(io.BytesIO):
    """Lines that end."""

    def readline(self, size: int | None = -1, /) -> bytes:
        line = super().readline(size)
        if not line.endswith(b"\n"):
            raise EOFError("the file ends too early")
        return line


class _Reader(pickle._Unpickler):
    """Python's unpickler, without its way to any module, and with bounds."""

    read: Callable[[int], bytes]
    stack: list[Any]  # since the mark
    metastack: list[list[Any]]  # before it
    memo: dict[int, Any]

    def __init__(self, data: bytes):
        super().__init__(_File(data), encoding="bytes")
        self.size, self.entries = len(data), 0
        self.dispatch = _Steps(_STEPS)  # type: ignore[misc]

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _KNOWN:
            raise _Refused(_short(f"{module}.{name}"))
        return _KNOWN[module, name]

    def skip_frame(self) -> None:
        """Pass over a frame, which tells how much to read at once."""
        if int.from_bytes(self.read(8), "little") > self.size:
            raise EOFError("a frame that is longer than the file")

    def check_entries(self, into: Any, keys: list[Any]) -> None:
        """Raise unless a dict may get these keys: hashes that agree take quadratic time."""
        self.entries += len(keys)
        if self.entries > MAX_KEYS or not {type(key) for key in keys} <= {str, bytes, int}:
            raise ValueError(f"more than {MAX_KEYS} entries of dicts, or keys that are no text")
        if not isinstance(into, dict):
            raise TypeError(f"entries of a {type(into).__name__}")

    def check_state(self) -> None:
        if not isinstance(self.stack[-2], _Dtype | _Pending):
            raise _Refused("a state of what has none")

    def check_end(self) -> None:
        if len(self.stack) != 1 or self.metastack:
            raise ValueError("more than one value")
        # Readers that are written in C make an array as long as the largest place.
        if max(self.memo, default=0) > len(self.memo):
            raise ValueError(f"place {max(self.memo)} of a memory of {len(self.memo)}")

    def bound_tuple(self) -> None:
        """Raise if a tuple is too deep or large: to print or compare it goes through all of it."""
        self.stack[-1] = made = _Tuple(self.stack[-1])
        if made.depth > MAX_DEPTH or made.size > self.size:
            raise ValueError("tuples that are nested too deep or multiply")


_SAFE = """
NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 FLOAT BINFLOAT
STRING BINSTRING SHORT_BINSTRING UNICODE BINUNICODE SHORT_BINUNICODE BINBYTES SHORT_BINBYTES
BINBYTES8 EMPTY_LIST EMPTY_TUPLE EMPTY_DICT LIST DICT TUPLE TUPLE1 TUPLE2 TUPLE3 MARK
APPEND APPENDS SETITEM SETITEMS GLOBAL STACK_GLOBAL REDUCE BUILD PROTO STOP
GET BINGET LONG_BINGET PUT BINPUT LONG_BINPUT MEMOIZE
"""
_BEFORE: dict[str, Callable[[_Reader], None]] = {
    "DICT": lambda reader: reader.check_entries({}, reader.stack[::2]),
    "SETITEM": lambda reader: reader.check_entries(reader.stack[-3], reader.stack[-2:-1]),
    "SETITEMS": lambda reader: reader.check_entries(reader.metastack[-1][-1], reader.stack[::2]),
    "BUILD": _Reader.check_state,
    "STOP": _Reader.check_end,
}


def _steps() -> dict[int, Callable[[Any], None]]:
    def made_of(*parts: Callable[[Any], None]) -> Callable[[Any], None]:
        def step(reader: Any) -> None:
            for part in parts:
                part(reader)

        return step

    steps: dict[int, Callable[[Any], None]] = {pickle.FRAME[0]: _Reader.skip_frame}
    for name in _SAFE.split():
        code = getattr(pickle, name)[0]
        step = pickle._Unpickler.dispatch[code]
        if name in _BEFORE:
            step = made_of(_BEFORE[name], step)
        elif re.fullmatch("TUPLE[123]?", name):
            step = made_of(step, _Reader.bound_tuple)
        steps[code] = step
    return steps


_STEPS = _steps()


# The names that a pickle may use.


class _Dtype:
    """What a pickle says of a NumPy type; its state tells the order of bytes."""

    def __init__(self, code: Any, *_: Any):
        self.code = _ascii(code)
        if not re.match(r"[<>=|]?([fiu][1248]|b1|[SU]\d{1,4}|O8?)\Z", self.code):
            raise ValueError(f"an array of type {_short(self.code)!r}")
        self.order = ""

    def __setstate__(self, state: Any) -> None:
        self.order = _ascii(state[1])
        if self.order not in ("<", ">", "|", "="):
            raise ValueError("no order of bytes")

    def numpy(self) -> np.dtype:
        code = self.code.lstrip("<>=|")
        order = self.order or self.code[: -len(code)]
        return np.dtype(object) if code[0] == "O" else np.dtype(order.strip("|") + code)


class _Pending(np.ndarray):
    """An array whose content comes as its state, which is checked before NumPy takes it."""

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, content = state
        super().__setstate__(_checked(shape, dtype, bool(fortran), content))


def _checked(shape: Any, dtype: Any, fortran: bool, content: Any) -> tuple[Any, ...]:
    """Return the state of an array, of which the content fills the shape."""
    if not isinstance(shape, tuple) or not isinstance(dtype, _Dtype):
        raise ValueError("an array without a shape or a type")
    shape = tuple(int(n) for n in shape)
    kind = dtype.numpy()
    content = content.encode("latin1") if isinstance(content, str) else content
    if not isinstance(content, list if kind.hasobject else bytes):
        raise ValueError("an array without its content")
    size = 1 if kind.hasobject else kind.itemsize
    if min(shape, default=0) < 0 or len(content) != math.prod(shape) * size:
        raise ValueError(f"an array whose content is {len(content)} long")
    return 1, shape, kind, fortran, content


def _ascii(value: Any) -> str:
    if not isinstance(value, bytes | str):
        raise ValueError(f"{type(value).__name__} for text")
    return value.decode("ascii") if isinstance(value, bytes) else value


def _ndarray(*_: Any) -> None:
    raise _Refused("a call of numpy.ndarray")


def _reconstruct(kind: Any, *_: Any) -> np.ndarray:
    if kind is not _ndarray:
        raise ValueError("an array of another kind")
    return np.ndarray.__new__(_Pending, (0,), np.uint8)


def _scalar(dtype: Any, content: Any) -> Any:
    _, _, kind, _, content = _checked((), dtype, False, content)
    return np.frombuffer(content, kind)[0]


def _encode(text: Any, encoding: Any) -> bytes:
    if not isinstance(text, str) or encoding not in ("latin1", b"latin1"):
        raise ValueError("text that is not latin1")
    return text.encode("latin1")


_KNOWN: dict[tuple[str, str], Callable[..., Any]] = {
    ("numpy", "ndarray"): _ndarray,
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): _encode,
    **{(module, "bytes"): lambda: b"" for module in ("__builtin__", "builtins")},
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _reconstruct for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "scalar"): _scalar for core in ("core", "_core")},
}

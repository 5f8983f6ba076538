"""The embeddings that LEO's authors released: zip archives of Python 2 pickles, read as data.

A pickle is a program for a stack machine, which may call any function of any module. Here that
machine is written anew without that power: it builds numbers, strings, lists, tuples, dicts and
arrays, and knows by name the four things that arrays are pickled with. No module is looked up, no
function of the file's choosing called, and NumPy's own unpickling is not used either.
"""

from __future__ import annotations

import codecs
import math
import os
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from adaptax.tasks import sources
from adaptax.tasks.bank import NAMES
from adaptax.tasks.sources import DataError

MAX_BYTES = 4 * 2**30
"""Largest pickle that is read; the largest of the released ones has 1.2 GB."""

VIEWS = ("miniImageNet/center", "miniImageNet/multiview", "tieredImageNet/center")
"""Folders of the released archive."""

CONTENT = ("embeddings", "labels", "keys")

_DTYPE = re.compile(r"[<>=|]?([fiu][1248]|b1|[SU]\d{1,4}|O8?)\Z")


def read_archive(
    path: str | os.PathLike, view: str = "miniImageNet/center"
) -> dict[str, tuple[np.ndarray, np.ndarray, list[str]]]:
    """For each split the embeddings, `(n, width)`, their class numbers, and the classes' names.

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
    with sources.open_files(Path(path).expanduser(), MAX_BYTES) as files:
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
    """What a pickle of plain data and arrays holds, by reading it: nothing in it can be run.

    Args:
        data: the pickle, of protocol 0 to 4.
        where: what errors call it.

    Raises:
        DataError: if it is truncated or broken, or asks for anything but data and arrays.
    """
    try:
        return _Machine(data, where).run()
    except DataError:
        raise
    except (IndexError, KeyError, TypeError, ValueError, AttributeError, struct.error,
            OverflowError, MemoryError, RecursionError) as error:  # fmt: skip
        raise DataError(
            f"{where} is truncated or no pickle of arrays ({type(error).__name__}: {error}); fetch "
            "it again"
        ) from None


def _indexed(where: str, content: Any) -> tuple[np.ndarray, np.ndarray, list[str]]:
    if not isinstance(content, dict) or not set(CONTENT) <= content.keys():
        held = sorted(map(str, content)) if isinstance(content, dict) else type(content).__name__
        raise DataError(f"{where} holds {held}; expected a dict of embeddings, labels and keys")
    if not all(isinstance(content[name], list | tuple | np.ndarray) for name in CONTENT):
        raise DataError(f"{where}: embeddings, labels and keys are not all lists or arrays")
    rows = [np.asarray(row) for row in content["embeddings"]]
    kinds = sorted({(row.shape, row.dtype.kind) for row in rows})
    if len(kinds) != 1 or len(kinds[0][0]) != 1 or kinds[0][1] != "f":
        said = ", ".join(f"{kind}{list(shape)}" for shape, kind in kinds[:4]) or "nothing"
        raise DataError(f"{where}: embeddings are rows of {said}; expected floats of one width")
    x = np.stack(rows).astype(np.float32)
    keys, labels = ([_text(each) for each in content[name]] for name in ("keys", "labels"))
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


def _text(value: Any) -> str:
    value = value.decode("latin1") if isinstance(value, bytes) else value
    return str(value).rstrip("\0")


@dataclass(frozen=True)
class _Name:
    """A global that a pickle asks for, by name; never looked up."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass
class _Dtype:
    code: str
    order: str = ""

    def build(self, state: tuple[Any, ...]) -> None:
        self.order = _ascii(state[1])
        if self.order not in ("<", ">", "|", "="):
            raise ValueError(f"bytes in the order {self.order!r}")

    def numpy(self) -> np.dtype:
        code = self.code.lstrip("<>=|")
        order = self.order or self.code[: -len(code)]
        return np.dtype(object) if code[0] == "O" else np.dtype(order.strip("|") + code)


@dataclass
class _Pending:
    """An array of which the content comes later."""

    value: np.ndarray | None = field(default=None)

    def build(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, fortran, content = state
        self.value = _array(shape, dtype, bool(fortran), content)


def _array(shape: Any, dtype: _Dtype, fortran: bool, content: Any) -> np.ndarray:
    shape = tuple(int(n) for n in shape)
    if min(shape, default=0) < 0 or not isinstance(dtype, _Dtype):
        raise ValueError(f"an array of shape {shape}")
    kind = dtype.numpy()
    if kind.hasobject:
        if not isinstance(content, list) or len(content) != math.prod(shape):
            raise ValueError("an array of objects without a list of as many")
        flat = np.empty(len(content), object)
        for i, each in enumerate(content):
            flat[i] = each
    else:
        content = _bytes(content)
        if len(content) != math.prod(shape) * kind.itemsize:
            raise ValueError(f"an array of shape {shape} in {len(content)} bytes")
        flat = np.frombuffer(content, kind)
    return flat.reshape(shape, order="F" if fortran else "C")


def _bytes(value: Any) -> bytes:
    return value.encode("latin1") if isinstance(value, str) else bytes(memoryview(value))


def _ascii(value: Any) -> str:
    return value.decode("ascii") if isinstance(value, bytes) else str(value)


def _make_dtype(code: Any, *_: Any) -> _Dtype:
    code = _ascii(code)
    if not _DTYPE.match(code):
        raise ValueError(f"an array of type {code!r}")
    return _Dtype(code)


def _make_pending(kind: Any, *_: Any) -> _Pending:
    if kind != _Name("numpy", "ndarray"):
        raise ValueError(f"an array of kind {kind}")
    return _Pending()


def _make_scalar(dtype: _Dtype, content: Any) -> Any:
    return _array((), dtype, False, content)[()]


def _encode(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise ValueError(f"text in {encoding}")
    return text.encode("latin1")


def _make_bytes() -> bytes:
    return b""


_KNOWN: dict[_Name, Callable[..., Any]] = {
    _Name("numpy", "dtype"): _make_dtype,
    _Name("_codecs", "encode"): _encode,
    _Name("__builtin__", "bytes"): _make_bytes,
    _Name("builtins", "bytes"): _make_bytes,
}
for _module in ("numpy.core.multiarray", "numpy._core.multiarray"):
    _KNOWN[_Name(_module, "_reconstruct")] = _make_pending
    _KNOWN[_Name(_module, "scalar")] = _make_scalar


class _Mark:
    """Where on the stack a list, tuple or dict begins."""


class _Machine:
    """The stack machine of pickles, restricted to data. Opcodes by their letters."""

    def __init__(self, data: bytes, where: str):
        self.raw, self.data, self.at, self.where = data, memoryview(data), 0, where
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        while (code := chr(self.take(1)[0])) != ".":
            if code not in _CODES:
                raise self.refused(f"the instruction {code!r}")
            _CODES[code](self)
        (value,) = self.stack
        return _finished(value, {})

    def refused(self, what: str) -> DataError:
        return DataError(
            f"{self.where} is refused: it asks for {what}, and a file of embeddings needs arrays "
            "and strings alone; get a clean copy"
        )

    def take(self, count: int) -> memoryview:
        if not 0 <= count <= len(self.data) - self.at:
            raise ValueError("the file ends too early")
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, form: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def line(self) -> bytes:
        end = self.raw.index(b"\n", self.at)
        line = bytes(self.take(end - self.at))
        self.at += 1
        return line

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def since_mark(self) -> list[Any]:
        start = len(self.stack) - 1
        while not isinstance(self.stack[start], _Mark):
            start -= 1
            if start < 0:
                raise ValueError("no mark on the stack")
        items = self.stack[start + 1 :]
        del self.stack[start:]
        return items

    def named(self, module: str, name: str) -> None:
        found = _Name(module, name)
        if found not in _KNOWN and found != _Name("numpy", "ndarray"):
            raise self.refused(str(found))
        self.push(found)

    def global_(self) -> None:
        self.named(self.line().decode(), self.line().decode())

    def stack_global(self) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        self.named(_ascii(module), _ascii(name))

    def reduce(self) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        if not isinstance(function, _Name) or function not in _KNOWN:
            raise self.refused(f"a call of {function}")
        self.push(_KNOWN[function](*arguments))

    def build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if not isinstance(target, _Dtype | _Pending):
            raise self.refused(f"setting the state of a {type(target).__name__}")
        target.build(state)

    def append(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, list):
            raise ValueError("items for what is no list")
        target.extend(items)

    def set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict):
            raise ValueError("items for what is no dict")
        target.update(zip(map(_key, items[::2]), items[1::2], strict=True))

    def new_dict(self, items: list[Any]) -> None:
        self.push({})
        self.set_items(items)

    def string(self) -> None:
        line = self.line()
        if len(line) < 2 or line[:1] not in b"'\"" or line[:1] != line[-1:]:
            raise ValueError("a string without quotes")
        self.push(codecs.escape_decode(line[1:-1])[0])

    def top(self, count: int) -> None:
        items = tuple(self.stack[len(self.stack) - count :]) if count else ()
        del self.stack[len(self.stack) - count :]
        self.push(items)


def _key(value: Any) -> str | int:
    # Of other keys the hash may take for ever: that of a tuple of tuples of tuples, say.
    value = value.decode("latin1") if isinstance(value, bytes) else value
    if not isinstance(value, str | int):
        raise ValueError(f"a dict with a key of type {type(value).__name__}")
    return value


def _finished(value: Any, seen: dict[int, tuple[Any, Any]]) -> Any:
    """The value with arrays in place of those pending, each container gone through once."""
    if id(value) in seen:
        return seen[id(value)][1]
    if isinstance(value, _Name | _Dtype | _Mark):
        raise ValueError(f"{type(value).__name__} where data were expected")
    done = value
    seen[id(value)] = (value, done)
    if isinstance(value, _Pending):
        if value.value is None:
            raise ValueError("an array without content")
        done = value.value
        for i, item in enumerate(done.ravel() if done.dtype == object else ()):
            done.flat[i] = _finished(item, seen)
    elif isinstance(value, list):
        value[:] = [_finished(item, seen) for item in value]
    elif isinstance(value, dict):
        value.update({key: _finished(item, seen) for key, item in value.items()})
    elif isinstance(value, tuple):
        done = tuple(_finished(item, seen) for item in value)
    seen[id(value)] = (value, done)
    return done


def _integer(line: bytes) -> int:
    return line == b"01" if line in (b"00", b"01") else int(line)


_Step = Callable[[_Machine], Any]
_CODES: dict[str, _Step] = {
    "\x80": lambda m: m.take(1),
    "\x95": lambda m: m.take(8),
    "(": lambda m: m.push(_Mark()),
    "0": lambda m: m.stack.pop(),
    "1": lambda m: m.since_mark(),
    "2": lambda m: m.push(m.stack[-1]),
    "N": lambda m: m.push(None),
    "\x88": lambda m: m.push(True),
    "\x89": lambda m: m.push(False),
    "I": lambda m: m.push(_integer(m.line())),
    "J": lambda m: m.push(m.number("<i")),
    "K": lambda m: m.push(m.number("<B")),
    "M": lambda m: m.push(m.number("<H")),
    "L": lambda m: m.push(int(m.line().rstrip(b"L"))),
    "\x8a": lambda m: m.push(int.from_bytes(m.take(m.number("<B")), "little", signed=True)),
    "F": lambda m: m.push(float(m.line())),
    "G": lambda m: m.push(m.number(">d")),
    "S": _Machine.string,
    "T": lambda m: m.push(bytes(m.take(m.number("<i")))),
    "U": lambda m: m.push(bytes(m.take(m.number("<B")))),
    "B": lambda m: m.push(bytes(m.take(m.number("<I")))),
    "C": lambda m: m.push(bytes(m.take(m.number("<B")))),
    "\x8e": lambda m: m.push(bytes(m.take(m.number("<Q")))),
    "V": lambda m: m.push(m.line().decode("raw-unicode-escape")),
    "X": lambda m: m.push(str(m.take(m.number("<I")), "utf-8", "surrogatepass")),
    "\x8c": lambda m: m.push(str(m.take(m.number("<B")), "utf-8", "surrogatepass")),
    "]": lambda m: m.push([]),
    "l": lambda m: m.push(m.since_mark()),
    "a": lambda m: m.append([m.stack.pop()]),
    "e": lambda m: m.append(m.since_mark()),
    ")": lambda m: m.push(()),
    "t": lambda m: m.push(tuple(m.since_mark())),
    "\x85": lambda m: m.top(1),
    "\x86": lambda m: m.top(2),
    "\x87": lambda m: m.top(3),
    "}": lambda m: m.push({}),
    "d": lambda m: m.new_dict(m.since_mark()),
    "s": lambda m: m.set_items([m.stack.pop(-2), m.stack.pop()]),
    "u": lambda m: m.set_items(m.since_mark()),
    "p": lambda m: m.memo.__setitem__(int(m.line()), m.stack[-1]),
    "q": lambda m: m.memo.__setitem__(m.number("<B"), m.stack[-1]),
    "r": lambda m: m.memo.__setitem__(m.number("<I"), m.stack[-1]),
    "\x94": lambda m: m.memo.__setitem__(len(m.memo), m.stack[-1]),
    "g": lambda m: m.push(m.memo[int(m.line())]),
    "h": lambda m: m.push(m.memo[m.number("<B")]),
    "j": lambda m: m.push(m.memo[m.number("<I")]),
    "c": _Machine.global_,
    "\x93": _Machine.stack_global,
    "R": _Machine.reduce,
    "b": _Machine.build,
}

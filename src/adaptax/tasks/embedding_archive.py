"""The embeddings that LEO's authors released: zip archives of Python 2 pickles, read as data.

A pickle is a program for a stack machine. It may call any function of any module, and a few bytes
may ask for endless time and memory. So it is read through before anything of it runs: it may use
only the instructions that numbers, strings, lists, dicts, tuples and arrays are written with, and
`_check` bounds what they build. Then Python's own `Unpickler` runs it, and the names that arrays
are pickled with stand for functions of this file. No module is looked up, and NumPy's unpickling is
reached only by a state that was checked.
"""

from __future__ import annotations

import io
import math
import os
import pickle
import pickletools
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from adaptax.tasks import sources
from adaptax.tasks.bank import NAMES
from adaptax.tasks.sources import DataError

MAX_BYTES = 4 * 2**30
"""Largest pickle that is read; the largest of the released ones has 1.2 GB."""

MAX_INSTRUCTIONS = 2 * 10**7
MAX_DEPTH = 16
MAX_KEYS = 1000
"""Most instructions, tuples within tuples, and entries of dicts of a pickle."""

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
    """What a pickle of plain data and arrays holds: nothing else in it is run.

    Text of Python 2 is bytes, but for the keys of the outermost dict.

    Args:
        data: the pickle, of protocol 0 to 4.
        where: what errors call it.

    Raises:
        DataError: if it is truncated or broken, asks for anything but data and arrays, or for more
            than a file of embeddings needs.
    """
    try:
        _check(data)
        value = _Reader(io.BytesIO(data), encoding="bytes").load()
    except _Refused as error:
        raise DataError(
            f"{where} is refused: it asks for {error}, and a file of embeddings needs arrays and "
            "strings alone; get a clean copy"
        ) from None
    except (pickle.UnpicklingError, LookupError, TypeError, ValueError, AttributeError, EOFError,
            OverflowError, MemoryError, RecursionError) as error:  # fmt: skip
        raise DataError(
            f"{where} is truncated or no pickle of arrays ({type(error).__name__}: "
            f"{_short(error)}); fetch it again"
        ) from None
    if isinstance(value, dict):
        value = {key.decode("latin1") if isinstance(key, bytes) else key: each
                 for key, each in value.items()}  # fmt: skip
    return value


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
    keys, labels = ([_text(where, name, each) for each in content[name]]
                    for name in ("keys", "labels"))  # fmt: skip
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


# Before it runs: which instructions there are, and what they build.


class _Refused(Exception):
    """A pickle asks for what it may not."""


class _Item(NamedTuple):
    """What is known of a value on the stack."""

    depth: int = 0  # tuples within it
    size: int = 1  # values within it, shared ones as often as they occur
    called: bool = False  # whether it came of a call, and may be given a state


_LEAF, _CALLED, _MARK = _Item(), _Item(called=True), _Item(size=0)

_LEAVES = re.compile(
    r"NONE|NEW(TRUE|FALSE)|INT|BININT[12]?|LONG1?|(BIN)?FLOAT|STRING|UNICODE|BINBYTES8|"
    r"(SHORT_)?BIN(STRING|BYTES|UNICODE)|EMPTY_(LIST|TUPLE|DICT)|GLOBAL"
)
_EFFECTS = {  # how many items are taken, −1 for those since the mark; and what is pushed
    **{op.name: (0, "leaf") for op in pickletools.opcodes if _LEAVES.fullmatch(op.name)},
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), (0, "memo")),
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE", "PROTO", "FRAME"), (0, "")),
    **dict.fromkeys(("APPEND", "BUILD", "STOP"), (1, "")),
    **dict.fromkeys(("APPENDS", "SETITEMS"), (-1, "")),
    **dict.fromkeys(("LIST", "DICT"), (-1, "leaf")),
    **{f"TUPLE{count or ''}": (count or -1, "tuple") for count in range(4)},
    "SETITEM": (2, ""),
    "STACK_GLOBAL": (2, "leaf"),
    "REDUCE": (2, "call"),
    "MARK": (0, "mark"),
}
_INSTRUCTIONS = {
    ord(op.code): (op.name, 0 if op.arg is None else op.arg.n, *_EFFECTS[op.name])
    for op in pickletools.opcodes
    if op.name in _EFFECTS
}
_LENGTHS = {
    pickletools.TAKEN_FROM_ARGUMENT1: 1,
    pickletools.TAKEN_FROM_ARGUMENT4: 4,
    pickletools.TAKEN_FROM_ARGUMENT4U: 4,
    pickletools.TAKEN_FROM_ARGUMENT8U: 8,
}


def _check(data: bytes) -> None:
    """Read a pickle through without running it.

    Raises:
        _Refused: if it uses an instruction that data do not need.
        ValueError, LookupError: if it is broken, or would build more than its bytes can mean.
    """
    at, count, keys, name = 0, 0, 0, ""
    stack: list[_Item] = []
    marks: list[int] = []
    memo: dict[int, _Item] = {}
    while name != "STOP":
        if data[at] not in _INSTRUCTIONS:
            raise _Refused(f"the instruction {chr(data[at])!r}")
        name, length, taken, pushed = _INSTRUCTIONS[data[at]]
        start, at = at + 1, _argument(data, at + 1, name, length)
        count += 1
        if count > MAX_INSTRUCTIONS:
            raise ValueError(f"more than {MAX_INSTRUCTIONS} instructions")
        first = marks.pop() if taken < 0 else len(stack) - taken
        items = stack[first:]
        del stack[first:]
        if first < (marks[-1] if marks else 0):
            raise ValueError("nothing on the stack")
        if name in ("SETITEM", "SETITEMS", "DICT"):
            keys += (len(items) + 1) // 2
            if keys > MAX_KEYS:
                raise ValueError(f"more than {MAX_KEYS} entries of dicts")
        elif name == "BUILD" and not stack[-1].called:
            raise _Refused("a state of what has none")
        elif "PUT" in name or name == "MEMOIZE":
            place = len(memo) if name == "MEMOIZE" else _place(data[start:at], name)
            # An array as long as the largest place is made.
            if place > len(memo) + 1:
                raise ValueError(f"place {place} of a memory of {len(memo)}")
            memo[place] = stack[-1]
        if pushed == "mark":
            marks.append(len(stack))
        elif pushed == "tuple":
            item = _Item(
                1 + max((i.depth for i in items), default=0), 1 + sum(i.size for i in items)
            )
            # Hashing goes through all of a tuple, and calls itself for each within it.
            if item.depth > MAX_DEPTH or item.size > len(data):
                raise ValueError("tuples that are nested too deep or multiply")
            stack.append(item)
        elif pushed == "memo":
            stack.append(memo[_place(data[start:at], name)])
        elif pushed:
            stack.append(_CALLED if pushed == "call" else _LEAF)
    if stack or marks:
        raise ValueError("more than one value")


def _argument(data: bytes, at: int, name: str, length: int) -> int:
    """Where the argument of an instruction ends."""
    if length == pickletools.UP_TO_NEWLINE:
        end = data.index(b"\n", at) + 1
        end = data.index(b"\n", end) + 1 if name == "GLOBAL" else end
        if name not in ("STRING", "UNICODE") and end - at > 256:
            raise ValueError(f"a line of {end - at} bytes for a number or a name")
        return end
    if length < 0:
        size = _LENGTHS[length]
        at, length = at + size, int.from_bytes(data[at : at + size], "little")
    if length > len(data) - at:
        raise ValueError("the file ends too early")
    return at + length


def _place(argument: bytes, name: str) -> int:
    return int(argument) if name in ("PUT", "GET") else int.from_bytes(argument, "little")


# While it runs: the names that it may use.


@dataclass(frozen=True, slots=True)
class _Name:
    """A global that a pickle may name, and what stands for it."""

    name: str
    function: Callable[..., Any] | None

    def __call__(self, *arguments: Any) -> Any:
        if self.function is None:
            raise _Refused(f"a call of {self.name}")
        return self.function(*arguments)


class _Reader(pickle.Unpickler):
    """Python's unpickler, without its way to any module."""

    def find_class(self, module: str, name: str) -> Any:
        found = _KNOWN.get((module, name))
        if found is None:
            raise _Refused(_short(f"{module}.{name}"))
        return found


@dataclass
class _Dtype:
    """What a pickle says of a NumPy type; its state tells the order of bytes."""

    code: str
    order: str = ""

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
    """The state of an array, of which the content fills the shape."""
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


def _make_dtype(code: Any, *_: Any) -> _Dtype:
    if not _DTYPE.match(_ascii(code)):
        raise ValueError(f"an array of type {_short(code)!r}")
    return _Dtype(_ascii(code))


def _make_pending(kind: Any, *_: Any) -> np.ndarray:
    if kind is not _NDARRAY:
        raise ValueError("an array of another kind")
    return np.ndarray.__new__(_Pending, (0,), np.uint8)


def _make_scalar(dtype: Any, content: Any) -> Any:
    _, _, kind, _, content = _checked((), dtype, False, content)
    return np.frombuffer(content, kind)[0]


def _encode(text: Any, encoding: Any) -> bytes:
    if not isinstance(text, str) or encoding not in ("latin1", b"latin1"):
        raise ValueError("text that is not latin1")
    return text.encode("latin1")


_NDARRAY = _Name("numpy.ndarray", None)
_KNOWN = {
    ("numpy", "ndarray"): _NDARRAY,
    ("numpy", "dtype"): _Name("numpy.dtype", _make_dtype),
    ("_codecs", "encode"): _Name("_codecs.encode", _encode),
    ("__builtin__", "bytes"): _Name("bytes", lambda: b""),
    ("builtins", "bytes"): _Name("bytes", lambda: b""),
    **{
        (module, name): _Name(name, function)
        for module in ("numpy.core.multiarray", "numpy._core.multiarray")
        for name, function in (("_reconstruct", _make_pending), ("scalar", _make_scalar))
    },
}

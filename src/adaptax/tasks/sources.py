"""Where images come from: data roots, folders and zip archives, all read in memory."""

from __future__ import annotations

import hashlib
import os
import posixpath
import stat
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pooch

MAX_MEMBER = 64 * 2**20
"""Largest file that is read from an archive, in bytes; no image of these data sets comes near."""


class DataError(ValueError):
    """Data that are missing, broken, or not of the shape that was asked for."""


@dataclass(frozen=True)
class Files:
    """The files below a folder or inside a zip archive.

    Args:
        where: the folder or archive.
        names: sorted names relative to it, parts joined by `/`.
        fingerprint: changes when the files change.
        read: the content of a file, by name; may be called from several threads.
    """

    where: Path
    names: tuple[str, ...]
    fingerprint: str
    read: Callable[[str], bytes]


def data_root(given: str | os.PathLike | None = None) -> Path:
    """The folder that holds the data: the argument, else `ADAPTAX_DATA`, else the user's cache.

    Raises:
        FileNotFoundError: if a folder was named that does not exist.
    """
    asked = given if given is not None else os.environ.get("ADAPTAX_DATA")
    if not asked:
        return Path(pooch.os_cache("adaptax")) / "data"
    root = Path(asked).expanduser()
    if not root.is_dir():
        by = "data_root" if given is not None else "the environment variable ADAPTAX_DATA"
        raise FileNotFoundError(f"{by} names {root}, which is not a folder; create or correct it")
    return root


def first_existing(candidates: Sequence[Path]) -> Path | None:
    """The first of these paths that exists."""
    return next((path for path in candidates if path.exists()), None)


@contextmanager
def open_files(where: Path, max_member: int | None = None) -> Iterator[Files]:
    """The files of a folder or zip archive, readable while the context is open.

    Nothing is extracted to disk, so a hostile archive has no path to escape by; one that tries
    is refused all the same.

    Args:
        where: the folder or archive.
        max_member: largest file that is read from an archive, in bytes; 64 MiB if `None`.

    Raises:
        FileNotFoundError: if `where` does not exist.
        DataError: if it is neither a folder nor a sound zip archive.
    """
    if where.is_dir():
        yield _folder(where)
        return
    if not where.exists():
        raise FileNotFoundError(f"{where} does not exist; expected a folder or a zip archive")
    try:
        archive = zipfile.ZipFile(where)
    except (zipfile.BadZipFile, OSError) as error:
        raise DataError(
            f"{where} is not a readable zip archive ({error}); delete it and fetch it again"
        ) from error
    with archive:
        yield _archive(where, archive, max_member or MAX_MEMBER)


def _folder(where: Path) -> Files:
    # Links are followed only to files: a cycle of folders cannot hang the walk.
    found = {}
    for parent, folders, files in os.walk(where):
        folders.sort()
        for file in files:
            path = Path(parent, file)
            info = path.stat() if path.exists() else None
            if info is not None and stat.S_ISREG(info.st_mode):
                found[path.relative_to(where).as_posix()] = (info.st_size, info.st_mtime_ns)
    names = tuple(sorted(found))
    fingerprint = _digest(f"{name}\0{found[name]}" for name in names)
    return Files(where, names, fingerprint, lambda name: (where / name).read_bytes())


def _archive(where: Path, archive: zipfile.ZipFile, max_member: int) -> Files:
    members = {}
    for info in archive.infolist():
        name = info.filename.replace("\\", "/")
        if posixpath.isabs(name) or ".." in name.split("/") or ":" in name.split("/")[0]:
            raise DataError(
                f"{where} holds the unsafe member name {info.filename!r}; fetch a clean copy"
            )
        if not info.is_dir() and not name.startswith("__MACOSX/"):
            members[name] = info
    names = tuple(sorted(members))
    fingerprint = _digest(f"{n}\0{members[n].CRC}\0{members[n].file_size}" for n in names)

    def read(name: str) -> bytes:
        info = members[name]
        if info.file_size > max_member:
            raise DataError(
                f"{where}: {name} unpacks to {info.file_size} bytes, more than the {max_member} "
                "that a member may have; remove it from the archive"
            )
        try:
            return archive.read(info)
        except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError, OSError) as error:
            raise DataError(
                f"{where}: {name} cannot be unpacked ({error}); fetch the archive again"
            ) from error
        except Exception as error:  # zlib.error and its like have no common base
            if type(error).__module__ in ("zlib", "lzma", "_lzma"):
                raise DataError(
                    f"{where}: {name} cannot be unpacked ({error}); fetch the archive again"
                ) from error
            raise

    return Files(where, names, fingerprint, read)


def _digest(lines: Iterator[str]) -> str:
    digest = hashlib.sha256()
    for line in lines:
        digest.update(line.encode("utf-8", "surrogateescape") + b"\n")
    return digest.hexdigest()

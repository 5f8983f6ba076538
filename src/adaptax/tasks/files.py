"""Folders and zip archives, all read in memory, and the folder of the data sets."""

from __future__ import annotations

import bisect
import hashlib
import os
import posixpath
import stat
import zipfile
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from adaptax.text import shown

MAX_MEMBER = 64 * 2**20
"""Largest file that is read from an archive, in bytes; no image of these data sets comes near."""


MAX_FILE = 2**30
"""Largest file that is read from a folder, in bytes."""

HIDDEN = {"__macosx", "@eadir", "#recycle", "$recycle.bin", "system volume information",
          "thumbs.db", "ehthumbs.db", "desktop.ini"}  # fmt: skip
"""What systems put beside the user's files and their file managers do not show."""


class DataError(ValueError):
    """Data that are missing, broken, or not of the shape that was asked for."""


def is_hidden(name: str) -> bool:
    """Return whether a file or directory of this name is hidden from its owner."""
    return name.startswith(".") or name.lower() in HIDDEN


@dataclass(frozen=True)
class Files:
    """The files below a folder or inside a zip archive, as a file manager shows them.

    Hidden files and directories are none of it. Links are followed, but for those that lead to a
    directory that they lie in; links that lead nowhere, or to a directory that is there already,
    are refused.

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

    def named(self, name: str) -> str:
        """Return the name of a file in a sentence."""
        return f"{shown(self.where)}: {shown(name)}"


def data_folder(given: str | os.PathLike[str] | None = None) -> Path:
    """Return the folder of the data: the argument, else `ADAPTAX_DATA`, else the user's cache.

    Raises:
        FileNotFoundError: if a folder was named that does not exist.
    """
    asked = given if given is not None else os.environ.get("ADAPTAX_DATA")
    if not asked:
        import pooch

        return Path(pooch.os_cache("adaptax")) / "data"
    root = Path(asked).expanduser()
    if not root.is_dir():
        by = "data_root" if given is not None else "the environment variable ADAPTAX_DATA"
        raise FileNotFoundError(f"{by} names {root}, which is not a folder; create or correct it")
    return root


def first_existing(candidates: Sequence[Path]) -> Path | None:
    """Return the first of these paths that exists."""
    return next((path for path in candidates if path.exists()), None)


@contextmanager
def open_files(where: Path, max_member: int | None = None) -> Iterator[Files]:
    """Return the files of a folder or zip archive, readable while the context is open.

    Nothing is extracted to disk, so a hostile archive has no path to escape by; one that tries
    is refused all the same.

    Args:
        where: the folder or archive.
        max_member: largest file that is read from an archive, in bytes; 64 MiB if `None`.

    Raises:
        FileNotFoundError: if `where` does not exist.
        DataError: if it is neither a folder nor a sound zip archive, or a folder with links that
            lead nowhere or twice to the same files.
    """
    if where.is_dir():
        yield _folder(where)
        return
    if not where.exists():
        raise FileNotFoundError(
            f"{shown(where)} does not exist; expected a folder or a zip archive"
        )
    if not where.is_file():
        raise DataError(f"{shown(where)} is neither a folder nor a file; expected one of them")
    try:
        archive = zipfile.ZipFile(where)
    except Exception as error:  # its directory may hold anything: versions, encodings, lengths
        raise DataError(
            f"{shown(where)} is not a readable zip archive ({_said(error)}); fetch it again, or "
            "name a folder"
        ) from error
    with archive:
        yield _archive(where, archive, max_member or MAX_MEMBER)


def find(files: Files, wanted: Sequence[str], table: Path) -> list[str]:
    """Return the files that a table lists by their names without paths.

    Raises:
        DataError: if some are not there, or are there in two folders, or are listed twice.
    """
    at: dict[str, list[str]] = {}
    for name in files.names:
        at.setdefault(posixpath.basename(name), []).append(name)
    missing = [name for name in wanted if name not in at]
    if missing:
        raise DataError(
            f"{shown(files.where)} lacks {len(missing)} of the {len(wanted)} images listed in "
            f"{shown(table)}, first {shown(missing[0])}; complete it or shorten the list"
        )
    double = next((name for name in wanted if len(at[name]) > 1), None)
    if double is not None:
        raise DataError(
            f"{shown(table)} lists {shown(double)}, which is there twice: "
            f"{' and '.join(map(files.named, at[double][:2]))}; remove or rename one"
        )
    again = next((name for name, count in Counter(wanted).items() if count > 1), None)
    if again is not None:
        raise DataError(
            f"{shown(table)} lists {shown(again)} more than once; list every image once, in one "
            "split"
        )
    return [at[name][0] for name in wanted]


def _folder(where: Path) -> Files:
    """Return what a file manager shows below a folder, links followed, every directory once."""
    found: dict[str, tuple[int, int]] = {}
    seen: dict[str, str] = {}
    again: list[tuple[str, str]] = []
    broken: list[str] = []
    # Directories to list: name, real path, and the real paths of those above. Links wait for all
    # that is in the tree itself, so that a directory goes by its own name.
    links: deque[tuple[str, str, tuple[str, ...]]] = deque([("", os.path.realpath(where), ())])
    while links:
        inside = [links.popleft()]
        while inside:
            name, real, above = inside.pop()
            if any(_holds(real, other) for other in above):
                continue  # a link to where it lies in
            if real in seen:
                again.append((name, seen[real]))
                continue
            seen[real] = name
            for entry in _entries(where, name):
                path, below = posixpath.join(name, entry.name), (*above, real)
                try:
                    if entry.is_dir():
                        if entry.is_symlink():
                            links.append((path, os.path.realpath(entry.path), below))
                        else:
                            inside.append((path, os.path.join(real, entry.name), below))
                    elif entry.is_file():
                        info = entry.stat()
                        found[path] = (info.st_size, info.st_mtime_ns)
                    elif entry.is_symlink():
                        broken.append(path)
                except OSError as error:
                    if not entry.is_symlink():
                        raise _unlisted(where, path, error) from error
                    broken.append(path)
    names = tuple(sorted(found))
    _check_links(where, names, again, broken)
    fingerprint = _digest(f"{name}\0{found[name]}" for name in names)

    def read(name: str) -> bytes:
        if found[name][0] > MAX_FILE:
            raise DataError(
                f"{shown(where)}: {shown(name)} has {found[name][0]} bytes, more than {MAX_FILE}; "
                "shrink or remove it"
            )
        return (where / name).read_bytes()

    return Files(where, names, fingerprint, read)


def _entries(where: Path, name: str) -> list[os.DirEntry[str]]:
    """Return what is in a directory, in order, without what is hidden."""
    try:
        with os.scandir(where / name) as entries:
            return sorted((e for e in entries if not is_hidden(e.name)), key=lambda e: e.name)
    except OSError as error:
        raise _unlisted(where, name, error) from error


def _unlisted(where: Path, name: str, error: OSError) -> DataError:
    return DataError(
        f"{shown(where)}: {shown(name or '.')} cannot be listed ({error.strerror}); mend its "
        "permissions or remove it"
    )


def _check_links(
    where: Path, names: Sequence[str], again: list[tuple[str, str]], broken: list[str]
) -> None:
    """Raise DataError for links that lead nowhere, or two ways to the same files."""
    if broken:
        raise DataError(
            f"{shown(where)}: {len(broken)} links lead nowhere, first {shown(min(broken))}; mend "
            "or remove them"
        )
    for name, first in again:
        place = bisect.bisect_left(names, first + "/")
        if place < len(names) and names[place].startswith(first + "/"):
            raise DataError(
                f"{shown(where)}: {shown(name)} and {shown(first)} are the same folder by a link, "
                "and its files would count twice; remove one of them"
            )


def _holds(folder: str, path: str) -> bool:
    """Return whether a real path is that of a folder or of something below it."""
    return path == folder or path.startswith(folder.rstrip(os.sep) + os.sep)


def _archive(where: Path, archive: zipfile.ZipFile, max_member: int) -> Files:
    members: dict[str, zipfile.ZipInfo] = {}
    for info in archive.infolist():
        given = info.filename.replace("\\", "/")
        parts = [part for part in given.split("/") if part not in ("", ".")]
        if posixpath.isabs(given) or ".." in parts or ":" in given.split("/")[0]:
            raise DataError(
                f"{shown(where)} holds the unsafe member name {shown(info.filename)!r}; fetch a "
                "clean copy"
            )
        if given.endswith("/") or any(map(is_hidden, parts)):
            continue
        name = "/".join(parts)
        wrong = (
            "a member without a name"
            if not name
            else f"{shown(name)} twice"
            if name in members
            else f"{shown(name)} encrypted"
            if info.flag_bits & 1
            else f"the link {shown(name)}, which leads nowhere inside an archive"
            if stat.S_ISLNK(info.external_attr >> 16)
            else None
        )
        if wrong is not None:
            raise DataError(f"{shown(where)} holds {wrong}; pack it again")
        members[name] = info
    names = tuple(sorted(members))
    fingerprint = _digest(f"{n}\0{members[n].CRC}\0{members[n].file_size}" for n in names)

    def read(name: str) -> bytes:
        info = members[name]
        if info.file_size > max_member:
            raise DataError(
                f"{shown(where)}: {shown(name)} unpacks to {info.file_size} bytes, more than the "
                f"{max_member} that a member may have; remove it from the archive"
            )
        try:
            return archive.read(info)
        except Exception as error:  # zipfile, zlib, lzma and struct have errors of their own
            raise DataError(
                f"{shown(where)}: {shown(name)} cannot be unpacked ({_said(error)}); fetch the "
                "archive again"
            ) from error

    return Files(where, names, fingerprint, read)


def _said(error: Exception) -> str:
    return shown(str(error)) or type(error).__name__


def _digest(lines: Iterator[str]) -> str:
    digest = hashlib.sha256()
    for line in lines:
        digest.update(line.encode("utf-8", "surrogateescape") + b"\n")
    return digest.hexdigest()

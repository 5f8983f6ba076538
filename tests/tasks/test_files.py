import os
import stat
import struct
import warnings
import zipfile
from pathlib import Path

import pytest

from adaptax.tasks import files as module
from adaptax.tasks.files import DataError, data_folder, open_files
from adaptax.text import shown


def archive(path, members):
    with zipfile.ZipFile(path, "w") as out:
        for name, data in members.items():
            out.writestr(name, data)
    return path


def test_the_root_is_the_argument_else_the_environment_else_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ADAPTAX_DATA", str(tmp_path))
    (tmp_path / "other").mkdir()
    assert data_folder() == tmp_path
    assert data_folder(tmp_path / "other") == tmp_path / "other"
    monkeypatch.delenv("ADAPTAX_DATA")
    assert data_folder().name == "data"


def test_a_root_that_does_not_exist(tmp_path, monkeypatch):
    with pytest.raises(
        FileNotFoundError, match=r"data_root names .*nowhere, which is not a folder"
    ):
        data_folder(tmp_path / "nowhere")
    monkeypatch.setenv("ADAPTAX_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match="variable ADAPTAX_DATA names"):
        data_folder()


def test_folder_and_archive_read_alike(tmp_path):
    (tmp_path / "in" / "b").mkdir(parents=True)
    (tmp_path / "in" / "b" / "x").write_bytes(b"one")
    (tmp_path / "in" / "a").write_bytes(b"two")
    packed = archive(tmp_path / "in.zip", {"b/x": b"one", "a": b"two", "__MACOSX/a": b"junk"})
    with open_files(tmp_path / "in") as folder, open_files(packed) as zipped:
        assert folder.names == zipped.names == ("a", "b/x")
        assert folder.read("b/x") == zipped.read("b/x") == b"one"


def test_fingerprints_follow_content(tmp_path):
    def print_of(path):
        with open_files(path) as files:
            return files.fingerprint

    one = archive(tmp_path / "1.zip", {"a": b"one"})
    again = archive(tmp_path / "2.zip", {"a": b"one"})
    other = archive(tmp_path / "3.zip", {"a": b"two"})
    assert print_of(one) == print_of(again) != print_of(other)
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "a").write_bytes(b"one")
    before = print_of(tmp_path / "d")
    os.utime(tmp_path / "d" / "a", ns=(1, 1))
    assert print_of(tmp_path / "d") != before


@pytest.mark.parametrize("name", ["../a", "/etc/a", "a/../../b", "..\\a", "C:/a"])
def test_members_that_would_escape_are_refused(tmp_path, name):
    with (
        pytest.raises(DataError, match="unsafe member name"),
        open_files(archive(tmp_path / "evil.zip", {name: b""})),
    ):
        pass


def test_members_that_unpack_too_far_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MAX_MEMBER", 10)
    bomb = archive(tmp_path / "bomb.zip", {"a": bytes(11)})
    message = "a unpacks to 11 bytes, more than the 10"
    with open_files(bomb) as files, pytest.raises(DataError, match=message):
        files.read("a")


def test_broken_archives(tmp_path):
    (tmp_path / "junk.zip").write_bytes(b"not a zip")
    with (
        pytest.raises(DataError, match="not a readable zip archive"),
        open_files(tmp_path / "junk.zip"),
    ):
        pass
    with (
        pytest.raises(FileNotFoundError, match="does not exist"),
        open_files(tmp_path / "none.zip"),
    ):
        pass


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_broken_member(tmp_path, method):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w", method) as out:
        out.writestr("a", b"hello hello hello hello hello")
    raw = bytearray(path.read_bytes())
    raw[31:36] = b"\xff\xff\xff\xff\xff"
    path.write_bytes(bytes(raw))
    with open_files(path) as files, pytest.raises(DataError, match="a cannot be unpacked"):
        files.read("a")


def refusal(path):
    """The sentence that a folder or archive is refused with, at its opening or at the reading."""
    with pytest.raises(DataError) as refused, open_files(path) as files:
        list(map(files.read, files.names))
    sentence = str(refused.value)
    assert sentence.startswith(str(path))
    assert "\n" not in sentence
    return sentence


def patched(path, offset, value, of="directory"):
    """The archive with bytes changed in its first entry in the directory, or before its data."""
    raw = bytearray(path.read_bytes())
    start = raw.index(b"PK\1\2") if of == "directory" else 0
    raw[start + offset : start + offset + len(value)] = value
    path.write_bytes(bytes(raw))
    return path


def test_directories_of_archives_that_hold_nonsense(tmp_path):
    """Fields of the directory at these offsets: version needed, flags, method, lengths."""
    make = lambda: archive(tmp_path / "a.zip", {"c/a.png": b"x" * 40})
    assert "not a readable zip archive" in refusal(patched(make(), 6, b"\xff"))
    assert "holds c/a.png encrypted" in refusal(patched(make(), 8, b"\1"))
    assert "c/a.png cannot be unpacked" in refusal(patched(make(), 10, struct.pack("<H", 97)))
    unnamed = patched(make(), 28, struct.pack("<3H", 0, 0, 7))  # the name is a comment
    assert "holds a member without a name" in refusal(unnamed)
    patched(patched(make(), 8, struct.pack("<H", 0x800)), 46, b"\xff\xfe")  # no UTF-8, they say
    assert "not a readable zip archive" in refusal(tmp_path / "a.zip")


def test_names_of_members(tmp_path):
    path = tmp_path / "a.zip"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zipfile's, of the duplicate
        with zipfile.ZipFile(path, "w") as out:
            out.writestr("c/a.png", b"one")
            out.writestr("c/./a.png", b"two")
    assert "holds c/a.png twice" in refusal(path)
    long = "x" * 60000
    with open_files(archive(path, {f"{long}/a.png": b"x"})) as files:
        assert files.read(f"{long}/a.png") == b"x"
        assert len(files.named(files.names[0])) < 500
    with zipfile.ZipFile(path, "w") as out:
        link = zipfile.ZipInfo("c/b.png")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        out.writestr(link, "a.png")
    assert "holds the link c/b.png" in refusal(path)


def test_hidden_files_are_none_of_a_folder_or_an_archive(tmp_path):
    kept = {"a/1.png": b"1", "b c/[2].png": b"2"}
    hidden = [".DS_Store", "a/._1.png", "a/.ipynb_checkpoints/1.png", "__MACOSX/a/1.png",
              "a/Thumbs.db", "b c/@eaDir/1/x.jpg", ".git/a.png"]  # fmt: skip
    packed = archive(tmp_path / "a.zip", kept | dict.fromkeys(hidden, b"junk"))
    for name, data in (kept | dict.fromkeys(hidden, b"junk")).items():
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(data)
    for where in (packed, tmp_path / "in"):
        with open_files(where) as files:
            assert files.names == tuple(sorted(kept))


def test_links_are_followed_without_circles(tmp_path):
    root, store = tmp_path / "root", tmp_path / "store"
    for path in (root / "a" / "x", store / "b" / "y"):
        path.parent.mkdir(parents=True)
        path.write_bytes(b"1")
    (root / "b").symlink_to(store / "b")
    (root / "again").symlink_to(root)
    (root / "a" / "up").symlink_to("..")
    (root / "out").symlink_to(tmp_path)
    (store / "b" / "home").symlink_to(root)
    (store / "b" / "z").symlink_to(root / "a" / "x")
    with open_files(root) as files:
        assert files.names == ("a/x", "b/y", "b/z")
        assert files.read("b/z") == b"1"
    (root / "alias").symlink_to("a")
    assert "alias and a are the same folder by a link" in refusal(root)
    (root / "alias").unlink()
    (root / "loop").symlink_to("loop")
    assert "1 links lead nowhere, first loop" in refusal(root)


def test_folders_that_cannot_be_listed_and_files_too_large(tmp_path, monkeypatch):
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "a.png").write_bytes(b"12345")
    monkeypatch.setattr(module, "MAX_FILE", 4)
    assert "c/a.png has 5 bytes, more than 4" in refusal(tmp_path)
    scandir = os.scandir

    def denied(path):
        if Path(path).name == "c":
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", denied)
    assert "c cannot be listed (Permission denied)" in refusal(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    assert "neither a folder nor a file" in refusal(tmp_path / "pipe")


def test_names_in_sentences():
    assert shown("é [x].png") == "é [x].png"
    assert shown("a\nb\x1b[31m") == r"a\nb\x1b[31m"
    assert shown("\udce9") == r"\udce9"
    assert len(shown("x" * 5000)) == 201

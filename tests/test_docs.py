"""The pages do what they say: code runs, commands parse, links lead somewhere, tables are the data.

Blocks that begin with ```python run, all of a page in order and in one namespace, each page by
itself. Python of other libraries and what needs hours or files of the reader's stands in ```py.
"""

import importlib
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest

from adaptax.cli.app import COMMANDS
from adaptax.cli.parsing import parse

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)


def name(page):
    return str(page.relative_to(ROOT))


def blocks(page, *languages):
    """Line and text of the blocks in these languages."""
    text = page.read_text(encoding="utf-8")
    return [
        (text.count("\n", 0, block.start()) + 1, block[2])
        for block in FENCE.finditer(text) if block[1] in languages
    ]  # fmt: skip


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=name)
def test_code_runs_as_it_stands(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"}
    for line, code in blocks(page, "python"):
        exec(compile("\n" * line + code, page, "exec"), namespace)
    printed = capsys.readouterr().out
    for _, text in blocks(page, "text"):
        assert without_numbers(text) in without_numbers(printed), printed


def without_numbers(text):
    """Numbers differ from machine to machine."""
    return re.sub(r"-?\d+(\.\d+)?(e[-+]?\d+)?", "#", text)


def commands(page):
    """The commands of a page's blocks, continued lines joined and comments left out."""
    for _, text in blocks(page, "", "bash", "console"):
        for line in text.replace("\\\n", " ").splitlines():
            if line.strip():
                yield shlex.split(line, comments=True)


@pytest.mark.parametrize("page", [p for p in PAGES if [*commands(p)]], ids=name)
def test_commands_are_commands(page):
    """Every line in a block of the shell is one that can be typed; none is run."""
    known = {name: kind for name, (kind, _) in COMMANDS.items()}
    for words in commands(page):
        if words[:1] == ["adaptax"]:
            parse(words[1:], known)
        elif words[:1] == ["python"] and words[1] != "-m":
            assert (ROOT / words[1]).is_file(), words
        elif words[:1] == ["make"]:
            assert f"\n{words[1]}:" in (ROOT / "Makefile").read_text(), words


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page):
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def test_the_tables_are_the_data(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["results.py", "--check"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "benchmarks" / "results.py"), run_name="__main__")
    assert not stop.value.code, capsys.readouterr().out


def test_the_readme_fits_two_screens():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


REFERENCE = re.compile(r"^::: (\S+)\n(?: +options:\s*\{?members: \[(.*?)\])?", re.M)


def test_the_reference_names_what_is_there():
    for page in (ROOT / "docs" / "reference").glob("*.md"):
        for module, members in REFERENCE.findall(page.read_text()):
            found = importlib.import_module(module)
            assert [m for m in members.split(", ") if m and not hasattr(found, m)] == [], module

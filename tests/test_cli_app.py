"""The entry point: whatever is raised ends in a sentence, and text of any kind can be shown."""

import importlib
import inspect
import io
import subprocess
import sys
import warnings
from pathlib import Path

import jax.numpy as jnp
import pytest
from rich.table import Table

import adaptax
from adaptax.cli import cookbook, main
from adaptax.cli.app import COMMANDS
from adaptax.cli.console import Plain
from adaptax.cli.progress import scoring, watching
from adaptax.text import shown

LIST = ["recipes", "list"]


@pytest.fixture(autouse=True)
def plain(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.delenv("ADAPTAX_DEBUG", raising=False)


def raising(monkeypatch, do):
    monkeypatch.setattr(cookbook, "show_all", lambda options: do())


def said(capsys):
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.count("\n") == 1
    return shown.err


@pytest.mark.parametrize(
    "do",
    [
        lambda: {}["maml-mini_imagenet-20w1s"],
        lambda: int("x"),  # not of this package, which should have looked at it
        lambda: jnp.zeros(2) + jnp.zeros(3),
        lambda: None + 1,
        lambda: do_again(),
    ],
)
def test_a_fault_is_a_sentence_with_the_file_of_its_traceback(do, monkeypatch, capsys):
    raising(monkeypatch, do)
    assert main(LIST) == 2
    text = said(capsys)
    assert text.startswith("adaptax: error: this is a fault of adaptax: ")
    log = Path(text.rsplit("the traceback in ")[1].strip())
    assert "Traceback" in log.read_text()
    monkeypatch.setenv("ADAPTAX_DEBUG", "1")
    with pytest.raises(Exception, match=r".+"):
        main(LIST)


def do_again():
    return do_again()


def test_a_fault_is_a_sentence_where_no_log_can_be_written(monkeypatch, capsys):
    raising(monkeypatch, lambda: {}["x"])

    def deny(**how):
        raise PermissionError

    monkeypatch.setattr("tempfile.mkstemp", deny)
    assert main(LIST) == 2
    assert "ADAPTAX_DEBUG=1" in said(capsys)


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("RESOURCE_EXHAUSTED: 3 TB")])
def test_too_little_memory_is_no_fault(error, monkeypatch, capsys):
    def fail():
        raise error

    raising(monkeypatch, fail)
    assert main(LIST) == 2
    assert "not enough memory" in said(capsys)


def test_warnings_are_a_line(monkeypatch, capsys):
    raising(monkeypatch, lambda: warnings.warn("two\nlines \x1b[31m", stacklevel=1))
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert main(LIST) == 0
    assert said(capsys) == "adaptax: warning: two lines \\x1b[31m\n"


def test_text_is_shown_as_it_is():
    file = io.StringIO()
    console = Plain(file=file, width=80, force_terminal=True)
    console.print("[red]a[/b] :smile: \x1b[2J\udcff\u202e")
    table = Table(title="[/x]")
    table.add_column("[bold]head")
    table.add_row("y].png [/z]\x07")
    console.print(table)
    with watching("[/a]", 3, console) as watch:
        watch({"step": 1, "loss": 1.0, "seconds": 1.0})
    with scoring("[/a]", 3, console) as watch:
        watch(1)
    text = file.getvalue()
    for part in ("[red]a[/b] :smile: \\x1b[2J\\udcff\\u202e", "[/x]", "[bold]head",
                 "y].png [/z]\\x07", "[/a]"):  # fmt: skip
        assert part in text
    assert "\x07" not in text
    assert shown("a\nb\t" + 300 * "c").startswith("a\\nb\\tccc")
    assert len(shown(300 * "c")) == 201


@pytest.mark.parametrize(
    "words", [["--help"], ["--version"], *([*name.split(), "--help"] for name in COMMANDS)]
)
def test_help_is_quick_since_it_loads_little(words):
    """In a process of its own: the tests have loaded everything."""
    heavy = "{'jax', 'optax', 'equinox', 'matplotlib', 'numpy', 'scipy'}"
    code = (
        "import sys; from adaptax.cli import main; code = main(sys.argv[1:]); "
        f"print('loaded', sorted({heavy} & set(sys.modules))); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "adaptax" in done.stdout
    assert done.stdout.endswith("loaded []\n")


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"adaptax {adaptax.__version__}\n"


def test_every_command_has_a_function():
    for kind, place in COMMANDS.values():
        module, name = place.split(":")
        function = getattr(importlib.import_module(f"adaptax.cli.{module}"), name)
        (options,) = inspect.signature(function).parameters.values()
        assert options.annotation in (kind.__name__, kind)


PROCESS = [sys.executable, "-m", "adaptax"]


@pytest.mark.parametrize(
    ("shell", "code", "out"),
    [
        ('"$@" recipes show maml-sinusoid', 0, "maml-sinusoid"),
        ('"$@" recipes list | head -n 1', 0, ""),
        ('"$@" recipes list >&- 2>&- <&-', 0, ""),
        ('"$@" recipes list > /dev/full', 2, ""),
        ('env -u HOME PYTHONIOENCODING=ascii "$@" recipes show maml-omniglot-5w1s', 0, "\\xb1"),
    ],
)
def test_a_process_says_nothing_but_sentences(shell, code, out):
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", shell, "sh", *PROCESS],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == code, done.stderr
    assert out in done.stdout
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    assert done.stderr.count("\n") == (code == 2)

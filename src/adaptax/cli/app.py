"""The entry point: parses, dispatches, and turns errors into one sentence and an exit code."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Sequence

import tyro
from rich.console import Console

from . import commands, pretraining

TOP = {
    "train": commands.Train,
    "evaluate": commands.Evaluate,
    "compare": commands.Compare,
    "ablate": commands.Ablate,
    "predict": commands.Predict,
    "pretrain": pretraining.Pretrain,
    "embed": pretraining.Embed,
}
RECIPES = {
    "list": commands.RecipesList,
    "show": commands.RecipesShow,
    "run": commands.RecipesRun,
}
ANALYZE = {
    "gradients": commands.AnalyzeGradients,
    "taylor": commands.AnalyzeTaylor,
    "active": commands.AnalyzeActive,
}
ABOUT = """Meta-learning of the MAML family.

For example:
  adaptax compare sinusoid
  adaptax train maml glyphs
  adaptax COMMAND --help"""
ABOUT_RECIPES = """The experiments of the papers' tables, by name.

For example:
  adaptax recipes run maml-sinusoid"""
ABOUT_ANALYZE = """What meta-gradients are made of, and what uncertainty is good for.

For example:
  adaptax analyze taylor sinusoid"""
HOST_DEVICES = "--xla_force_host_platform_device_count"


class Interrupted(Exception):
    """Ctrl-C, with what it says on the way out: how to go on."""


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line; what `adaptax` on the shell calls.

    Args:
        args: words of the command; those of the process if `None`.

    Returns:
        0; 2 for bad input; 130 for Ctrl-C. With ADAPTAX_DEBUG=1 errors are raised instead.
    """
    words = list(sys.argv[1:] if args is None else args)
    _share_cores()
    try:
        _parse(words)()
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except Interrupted as stop:
        _say(str(stop))
        return 130
    except KeyboardInterrupt:
        _say("interrupted")
        return 130
    except BrokenPipeError:  # such as `adaptax recipes list | head`
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - so that closing it does not complain
        return 0
    except (ValueError, OSError, FloatingPointError, ModuleNotFoundError) as error:
        if os.environ.get("ADAPTAX_DEBUG"):
            raise
        _say(f"error: {_sentence(error)}")
        return 2
    return 0


def _parse(words: Sequence[str]):  # type: ignore[no-untyped-def]
    """The command that the words ask for."""
    app, recipes, analyze = (tyro.extras.SubcommandApp() for _ in range(3))
    # In the list of commands a line each will do; their own help is told whole.
    whole = any(word in words for word in (*TOP, *RECIPES, *ANALYZE))
    for group, known in ((app, TOP), (recipes, RECIPES), (analyze, ANALYZE)):
        for name, command in known.items():
            text = inspect.cleandoc(command.__doc__ or "")
            group.command(name=name, help=text if whole else text.split("\n")[0])(command)
    for name, group, about in (
        ("recipes", recipes, ABOUT_RECIPES),
        ("analyze", analyze, ABOUT_ANALYZE),
    ):
        app.command(group, name=name, help=about if name in words else about.split("\n")[0])
    return app.cli(prog="adaptax", description=ABOUT, args=words)


def _share_cores() -> None:
    """Let JAX see a device for every core, over which heavy meta-batches are shared."""
    flags = os.environ.get("XLA_FLAGS", "")
    if HOST_DEVICES not in flags:
        cores = min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity")
                    else os.cpu_count() or 1, 8)  # fmt: skip
        os.environ["XLA_FLAGS"] = f"{flags} {HOST_DEVICES}={cores}".strip()


def _sentence(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


def _say(text: str) -> None:
    Console(stderr=True, soft_wrap=True, highlight=False, markup=False).print(f"adaptax: {text}")

"""From the words of a command line to the command that they ask for, or a sentence."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import tyro

from ..text import shown
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
GROUPS: dict[str, tuple[str, dict[str, type]]] = {
    "recipes": (
        """The experiments of the papers' tables, by name.

For example:
  adaptax recipes run maml-sinusoid""",
        RECIPES,
    ),
    "analyze": (
        """What meta-gradients are made of, and what uncertainty is good for.

For example:
  adaptax analyze taylor sinusoid""",
        ANALYZE,
    ),
}
ABOUT = """Meta-learning of the MAML family.

For example:
  adaptax compare sinusoid
  adaptax train maml glyphs
  adaptax COMMAND --help"""


def parse(words: Sequence[str]) -> Callable[[], None]:
    """The command that the words ask for.

    Raises:
        SystemExit: once help is shown.
        ValueError: if they ask for none: what was given, and what was expected.
    """
    app = tyro.extras.SubcommandApp()
    # In the list of commands a line each will do; their own help is told whole.
    whole = any(word in words for word in (*TOP, *RECIPES, *ANALYZE))
    _add(app, TOP, whole)
    for name, (about, known) in GROUPS.items():
        group = tyro.extras.SubcommandApp()
        _add(group, known, whole)
        app.command(group, name=name, help=about if name in words else about.split("\n")[0])
    try:
        with _refusing(words):
            return app.cli(prog="adaptax", description=ABOUT, args=words)
    except AssertionError as error:  # of tyro, about its own options
        raise ValueError(str(error)) from error


def _add(app: tyro.extras.SubcommandApp, known: dict[str, type], whole: bool) -> None:
    for name, command in known.items():
        text = inspect.cleandoc(command.__doc__ or "")
        app.command(name=name, help=text if whole else text.split("\n")[0])(command)


def _refusing(words: Sequence[str]) -> AbstractContextManager[None]:
    """Turn what the parser complains about into a `ValueError` of one sentence.

    Its hook for that is not public: a version without it draws its boxes, and exits with 2 too.
    """
    errors: Any = getattr(tyro, "_errors", None)
    if not hasattr(errors, "on_parse_error"):
        return nullcontext()

    def refuse(event: Any) -> None:
        sentence = _sentence(event, words)
        if sentence is not None:
            raise ValueError(sentence)

    return errors.on_parse_error(refuse)


def _sentence(event: Any, words: Sequence[str]) -> str | None:
    """What is wrong, and what was expected; `None` for an event that is not known here."""
    name = _name(event.argument) if getattr(event, "argument", None) is not None else None
    match type(event).__name__:
        case "UnrecognizedArgs":
            return _unrecognized(event.tokens[0], words)
        case "MissingSubcommand":
            group = words[0] if words and words[0] in GROUPS else None
            known = GROUPS[group][1] if group else (*TOP, *GROUPS)
            return f"name a command of `{_line(group)}`: {', '.join(known)}"
        case "MissingArgs":
            missing = [one.arg for one in event.missing_arguments]
            wanted = " and ".join(f"{_name(one)} ({_help(one)})" for one in missing)
            return f"`{_command(words)}` wants {wanted}"
        case "InvalidChoice":
            return (
                f"{name} {shown(event.value)!r} is not one of {', '.join(event.choices)}"
                f"{_near(event.value, event.choices)}"
            )
        case "BadValue":
            return f"{name} wants {event.argument.lowered.metavar} after it"
        case "InstantiationFailure":
            message = shown(" ".join(str(event.message).split()), 600)
            return message if name is None else f"{name}: {message}"
    return None


def _name(argument: Any) -> str:
    """An argument as the user writes it."""
    if argument.is_positional():
        return str(argument.field.intern_name).split(".")[-1].upper()
    return str(argument.lowered.name_or_flags[0])


def _help(argument: Any) -> str:
    text = argument.field.helptext
    return text() if callable(text) else str(text)


def _unrecognized(word: str, words: Sequence[str]) -> str:
    """What a word that has no place should have been."""
    group = words[0] if words[0] in GROUPS else None
    rest = words[1:] if group else words
    known: dict[str, Any] = GROUPS[group][1] if group else {**TOP, **GROUPS}
    if not rest or rest[0] not in known:
        return (
            f"{shown(word)!r} is no command of `{_line(group)}`; there are {', '.join(known)}"
            f"{_near(word, known)}"
        )
    command, line = known[rest[0]], _line(group, rest[0])
    if not word.startswith("-"):
        return f"{shown(word)!r} is a word too many for `{line}`; see {line} --help"
    options = [f"--{field.replace('_', '-')}" for field in inspect.signature(command).parameters]
    return (
        f"{shown(word)} is no option of `{line}`{_near(word.split('=')[0], options)}; "
        f"see {line} --help"
    )


def _line(*words: str | None) -> str:
    return " ".join(["adaptax", *(word for word in words if word)])


def _command(words: Sequence[str]) -> str:
    return _line(*words[: 2 if words[0] in GROUPS else 1])


def _near(word: str, known: Iterable[str]) -> str:
    """The nearest of the words that are known, as a question; nothing if none is near."""
    near = difflib.get_close_matches(word, list(known), 1, 0.6)
    return f"; did you mean {near[0]}?" if near else ""

"""From the words of a command line to the command that they ask for, or a sentence."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import tyro

from ..text import shown

GROUPS = {
    "recipes": """The experiments of the papers' tables, by name.

For example:
  adaptax recipes run maml-sinusoid""",
    "analyze": """What meta-gradients are made of, and what uncertainty is good for.

For example:
  adaptax analyze taylor sinusoid""",
}
"""What is said of the commands that have others below them."""

ABOUT = """Meta-learning of the MAML family.

For example:
  adaptax compare sinusoid
  adaptax train maml glyphs
  adaptax COMMAND --help
  adaptax --version"""

Commands = Mapping[str, type]
"""Dataclasses by the words that ask for them, `"train"` or `"recipes list"`."""


def parse(words: Sequence[str], commands: Commands) -> Any:
    """Return the command that the words ask for, with its options.

    Args:
        words: of the command line.
        commands: those that there are.

    Raises:
        SystemExit: once help is shown.
        ValueError: if they ask for none: what was given, and what was expected.
    """
    app = tyro.extras.SubcommandApp()
    groups = {name: tyro.extras.SubcommandApp() for name in GROUPS}
    # In the list of commands a line each will do; their own help is told whole.
    whole = any(name.split()[-1] in words for name in commands)
    for name, command in commands.items():
        group, _, own = name.rpartition(" ")
        text = inspect.cleandoc(command.__doc__ or "")
        below = groups[group] if group else app
        below.command(name=own, help=text if whole else text.split("\n")[0])(command)
    for name, about in GROUPS.items():
        app.command(groups[name], name=name, help=about if name in words else about.split("\n")[0])
    try:
        with _refusing(words, commands):
            return app.cli(prog="adaptax", description=ABOUT, args=words)
    except AssertionError as error:  # of tyro, about its own options
        raise ValueError(str(error)) from error


def _refusing(words: Sequence[str], commands: Commands) -> AbstractContextManager[None]:
    """Turn what the parser complains about into a `ValueError` of one sentence.

    Its hook for that is not public: a version without it draws its boxes, and exits with 2 too.
    """
    errors: Any = getattr(tyro, "_errors", None)
    if not hasattr(errors, "on_parse_error"):
        return nullcontext()

    def refuse(event: Any) -> None:
        sentence = _sentence(event, words, commands)
        if sentence is not None:
            raise ValueError(sentence)

    return errors.on_parse_error(refuse)


def _sentence(event: Any, words: Sequence[str], commands: Commands) -> str | None:
    """Say what is wrong, and what was expected; `None` for an event that is not known here."""
    name = _name(event.argument) if getattr(event, "argument", None) is not None else None
    group = words[0] if words and words[0] in GROUPS else ""
    match type(event).__name__:
        case "UnrecognizedArgs":
            return _unrecognized(event.tokens[0], group, words[bool(group) :], commands)
        case "MissingSubcommand":
            return f"name a command of `{_line(group)}`: {', '.join(_below(group, commands))}"
        case "MissingArgs":
            missing = [one.arg for one in event.missing_arguments]
            wanted = " and ".join(f"{_name(one)} ({_help(one)})" for one in missing)
            return f"`{_line(*words[: 1 + bool(group)])}` wants {wanted}"
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


def _below(group: str, commands: Commands) -> list[str]:
    """Names after `adaptax`, or after `adaptax GROUP`."""
    split = [name.rpartition(" ") for name in commands]
    return [own for above, _, own in split if above == group] + ([] if group else [*GROUPS])


def _name(argument: Any) -> str:
    """Return an argument as the user writes it."""
    if argument.is_positional():
        return str(argument.field.intern_name).split(".")[-1].upper()
    return str(argument.lowered.name_or_flags[0])


def _help(argument: Any) -> str:
    text = argument.field.helptext
    return text() if callable(text) else str(text)


def _unrecognized(word: str, group: str, rest: Sequence[str], commands: Commands) -> str:
    """Say what a word that has no place should have been."""
    known = _below(group, commands)
    if not rest or rest[0] not in known:
        return (
            f"{shown(word)!r} is no command of `{_line(group)}`; there are {', '.join(known)}"
            f"{_near(word, known)}"
        )
    line = _line(group, rest[0])
    if not word.startswith("-"):
        return f"{shown(word)!r} is a word too many for `{line}`; see {line} --help"
    command = commands[f"{group} {rest[0]}".strip()]
    options = [f"--{field.replace('_', '-')}" for field in inspect.signature(command).parameters]
    return (
        f"{shown(word)} is no option of `{line}`{_near(word.split('=')[0], options)}; "
        f"see {line} --help"
    )


def _line(*words: str) -> str:
    return " ".join(["adaptax", *filter(None, words)])


def _near(word: str, known: Iterable[str]) -> str:
    """Return the nearest of the words that are known, as a question; nothing if none is near."""
    near = difflib.get_close_matches(word, list(known), 1, 0.6)
    return f"; did you mean {near[0]}?" if near else ""

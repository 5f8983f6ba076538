"""Checks of arguments, each a sentence: what there is, and what was given instead."""

from __future__ import annotations

from typing import Any


def at_least(owner: Any, least: int, *names: str) -> None:
    """Raise unless these attributes are `least` or more; schedules and `None` are passed over.

    Args:
        owner: what has them.
        least: the smallest.
        names: of the attributes.

    Raises:
        ValueError: naming the attribute.
    """
    for name in names:
        value = getattr(owner, name)
        if value is not None and not callable(value) and not value >= least:
            raise ValueError(f"{name} is {least} or more, not {value}")


def one_of(owner: Any, **choices: tuple[str | None, ...]) -> None:
    """Raise unless these attributes are among their choices.

    Args:
        owner: what has them.
        choices: by the names of the attributes.

    Raises:
        ValueError: naming the attribute.
    """
    for name, known in choices.items():
        if getattr(owner, name) not in known:
            *most, last = (str(one) if one is None else f'"{one}"' for one in known)
            value = getattr(owner, name)
            raise ValueError(f"{name} is {', '.join(most)} or {last}, not {value!r}")

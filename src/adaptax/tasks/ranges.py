"""Arguments of generated tasks: points, noise, and ranges that parameters are drawn from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
from jaxtyping import Array, Float, PRNGKeyArray

from adaptax.tasks import bank
from adaptax.tasks.files import DataError

Range = tuple[float, float]
"""Lower and upper end of a uniform law."""


def points(
    shot: int, query: int, train_shot: int | None, train_query: int | None
) -> dict[str, dict[str, Any]]:
    """Return each split's name and its numbers of support and query points, as fields.

    Raises:
        DataError: if there are fewer than 1 and 0 of them.
    """
    designs = bank.designs(1, shot, query, train_shot, train_query)
    return {
        split: {"shot": design.shot, "query": design.query, "split": split}
        for split, design in designs.items()
    }


def checked(name: str, given: Sequence[float], least: float = -math.inf) -> Range:
    """Return a range as two floats.

    Args:
        name: of the argument, for the error.
        given: lower and upper end.
        least: that the lower end may be.

    Raises:
        DataError: if it is not two finite numbers in order, or begins below `least`.
    """
    ends = tuple(float(end) for end in given)
    if len(ends) != 2 or not (least <= ends[0] <= ends[1]) or not all(map(math.isfinite, ends)):
        bound = f", at least {least:g}" if math.isfinite(least) else ""
        raise DataError(f"{name}={tuple(given)}; expected two finite numbers, low and high{bound}")
    return ends[0], ends[1]


def check_noise(name: str, given: float) -> None:
    """Raise DataError if a standard deviation is negative or not finite."""
    if not 0 <= given < math.inf:
        raise DataError(f"{name}={given}; expected a standard deviation, 0 or more")


def uniform(key: PRNGKeyArray, ends: Range, shape: tuple[int, ...] = ()) -> Float[Array, "*shape"]:
    """Draw from the uniform law between these ends."""
    return jax.random.uniform(key, shape, minval=ends[0], maxval=ends[1])

"""How much work a program is, counted before it is compiled, so that chunks and tests can be sized.

The count is of shapes alone and the same on every machine, as is what is decided by it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax

SMALL = 2**20
"""Bytes of intermediates a task below which a CPU does several tasks at once."""

AT_ONCE = (500, 250, 100, 50, 20, 10, 5, 2, 1)
"""Meta-steps that a chunk may have."""


@dataclasses.dataclass(frozen=True)
class Work:
    """Work of one call of a function.

    Args:
        moved: bytes of all intermediate results, of a loop those of one turn.
        operations: on numbers, of a loop those of all its turns; a loop whose end depends on
            values counts as one turn.
    """

    moved: int
    operations: float

    @property
    def small(self) -> bool:
        """Whether a CPU does better with several such calls at once."""
        return self.moved < SMALL


NONE = Work(0, 0.0)


def heavy(task: Work) -> bool:
    """Whether one task is enough work to be worth a loop's turn or a device of its own."""
    return jax.default_backend() != "cpu" or not task.small


def work(function: Callable[..., Any], *args: Any) -> Work:
    """Count the work of `function(*args)`.

    Args:
        function: traceable.
        args: arrays, or their shapes.
    """
    return _count(jax.make_jaxpr(function)(*args).jaxpr)


def steps_at_once(task: Work, meta_batch: int) -> int:
    """Return how many meta-steps to do in one program.

    At most 20 of heavy tasks or 500 of light ones, and no more than some ten seconds of an ordinary
    machine, so that there is something to see, and an interrupt is heard.

    Args:
        task: work of the meta-gradient of one task.
        meta_batch: tasks a step.
    """
    most = 20 if heavy(task) else 500
    return next((steps for steps in AT_ONCE if steps <= min(most, _fit(task) / meta_batch)), 1)


def episodes_at_once(episode: Work, size: int, count: int) -> int:
    """Return how many of `count` episodes to score in one program: a multiple of `size`, or all."""
    return min(count, size * min(20, max(int(_fit(episode) / size), 2)))


def _fit(task: Work) -> float:
    """Return how many such tasks are some ten seconds' work."""
    return (5e11 if jax.default_backend() == "cpu" else 2e13) / max(task.operations, 1.0)


def _count(jaxpr: Any) -> Work:
    moved, operations = 0, 0.0
    for equation in jaxpr.eqns:
        bodies = [getattr(p, "jaxpr", p) for p in equation.params.values()]
        inner = [_count(body) for body in bodies if hasattr(body, "eqns")]
        results = [v.aval for v in equation.outvars if hasattr(v.aval, "shape")]
        if inner:
            moved += sum(body.moved for body in inner)
            turns = equation.params.get("length", 1)
            operations += turns * sum(body.operations for body in inner)
            continue
        moved += sum(math.prod(a.shape) * getattr(a.dtype, "itemsize", 4) for a in results)
        if branches := equation.params.get("branches"):
            operations += max(_count(branch.jaxpr).operations for branch in branches)
        else:
            operations += sum(map(_size, results)) * _each(equation)
    return Work(moved, operations)


def _size(aval: Any) -> int:
    return math.prod(aval.shape)


def _each(equation: Any) -> float:
    """Return the operations for one number of the result."""
    name, params = equation.primitive.name, equation.params
    if name.startswith("conv_") and "geometry" in params:  # n·p·q·c·o, of x, w and y
        (a, b), geometry = (math.prod(v.aval.shape) for v in equation.invars), params["geometry"]
        places = math.prod(geometry.window) * math.prod(geometry.outsize) / math.prod(geometry.size)
        return 2.0 * math.sqrt(a * b * places / _size(equation.outvars[0].aval))
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        return 2.0 * math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
    if name == "conv_general_dilated":
        kernel = equation.invars[1].aval.shape
        return 2.0 * math.prod(kernel) / max(kernel[params["dimension_numbers"].rhs_spec[0]], 1)
    return 1.0

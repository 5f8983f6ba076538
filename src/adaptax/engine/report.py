"""Scores of one learner on the episodes of one split, with the protocol they belong to."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from .. import io, metrics
from .scoring import Select, name_of, sign_of

DIVERGED = 10.0
"""A regression task counts as diverged when its error after adaptation is not finite, or is so
many times its error before."""

SAME = ("tasks", "split", "way", "shot")
"""What of two protocols has to agree for their episodes to be the same."""


@dataclasses.dataclass(frozen=True)
class Report:
    """Scores by episode and adaptation step, of predictions or of what policies earn.

    Args:
        protocol: what the numbers depend on: algorithm, tasks, ways, shots, queries, split,
            episodes, steps, transductive or not, single model or ensemble.
        at: the adaptation steps that were scored; `[None]` for a learner without steps.
        values: for each metric, an array `(episodes, len(at))`. Of roll-outs that is `"return"`,
            the mean over a task's trajectories, NaN where adaptation made the policy so.
        bins: calibration tables, `(len(at), bins, 3)`, for classification.
        quantiles: how many targets fell in each quantile of their prediction, `(len(at), bins)`,
            for regression.
        select: the metric that `score` is of, and which of its directions is better if its name
            does not tell; the primary one if `None`.
    """

    protocol: dict[str, Any]
    at: list[int | None]
    values: dict[str, np.ndarray]
    bins: np.ndarray | None = None
    quantiles: np.ndarray | None = None
    select: Select | None = None

    @property
    def primary(self) -> str:
        """`"accuracy"` for classification, `"mse"` for regression, `"label_accuracy"` for labels
        that are each true or false, `"return"` for roll-outs; otherwise what was selected by, or
        the `"loss"`."""
        usual = ("accuracy", "mse", "label_accuracy", "return")
        found = (name for name in usual if name in self.values)
        return next(found, name_of(self.select or "loss"))

    @property
    def score(self) -> float:
        """What `fit` selects by, after the last step, signed so that more is better.

        Of returns it is the mean over all steps but 0: late in training the first step may still
        get better and the next ones worse, or the other way round.
        """
        select = self.select or self.primary
        name = name_of(select)
        if name == "return" and len(self.at) > 1:
            mean = float(np.mean(self.values[name][:, 1:]))
        else:
            mean = self.mean(name)
        return sign_of(select) * mean if math.isfinite(mean) else -math.inf

    def mean(self, metric: str | None = None, step: int = -1, *, diverged: bool = True) -> float:
        """Mean over episodes of a metric at one of the steps in `at` (by position).

        Args:
            metric: one of `values`; the primary one if `None`.
            step: position in `at`.
            diverged: count the episodes that diverged; without them the mean of none is NaN.

        Raises:
            ValueError: for a metric that was not scored.
        """
        return float(metrics.interval(self._scores(metric, step, diverged))[0])

    def ci95(self, metric: str | None = None, step: int = -1, *, diverged: bool = True) -> float:
        """Half the 95 % confidence interval of that mean: 1.96 standard errors over episodes."""
        return float(metrics.ci95(self._scores(metric, step, diverged)))

    def difference(
        self, other: Report, metric: str | None = None, step: int = -1
    ) -> tuple[float, float]:
        """Mean over episodes of this learner's score less another's, and half its 95 % interval.

        The episodes are the same, so the interval is of pairs: narrower than either's own where
        some episodes are hard for all.

        Args:
            other: of the same episodes: the same tasks and key.
            metric: of both; the primary one if `None`.
            step: position in `at` of both.

        Raises:
            ValueError: if the episodes are others, or the metric was not scored.
        """
        metric = self.primary if metric is None else metric
        one, two = self._scores(metric, step), other._scores(metric, step)
        shared = self.protocol.keys() & other.protocol.keys()
        unlike = [n for n in SAME if n in shared and self.protocol[n] != other.protocol[n]]
        if len(one) != len(two) or unlike:
            raise ValueError(
                f"the difference is of pairs of episodes, and the reports are of {len(one)} and "
                f"{len(two)}, of other {', '.join(unlike) or 'number'}; evaluate both on the same"
            )
        mean, half = metrics.interval(one - two)
        return float(mean), float(half)

    def gain(self, step: int = -1) -> tuple[float, float]:
        """What adaptation brings: mean over episodes of the difference of the primary metric to
        that before, and half its 95 % confidence interval.

        Args:
            step: position in `at`.

        Raises:
            ValueError: if step 0 was not scored.
        """
        if self.at[0] != 0:
            raise ValueError(f"the gain is over step 0, and the steps scored are {self.at}")
        mean, half = metrics.interval(self._scores(None, step) - self._scores(None, 0))
        return float(mean), float(half)

    def ece(self, step: int = -1) -> float:
        """Expected calibration error over the queries of all episodes, in bins of confidence."""
        if self.bins is None:
            raise ValueError("the calibration error is a metric of classification")
        return metrics.calibration_error(jnp.asarray(self.bins[step]))

    def coverage(self, level: float, step: int = -1) -> float:
        """Fraction of all targets in the central intervals that should hold `level` of them.

        Args:
            level: a multiple of 0.05 up to 1.
            step: position in `at`.

        Raises:
            ValueError: for another level, or a report of classification.
        """
        if self.quantiles is None:
            raise ValueError("the coverage of intervals is a metric of regression")
        counts = self.quantiles[step]
        half = round(level * len(counts) / 2)
        if not 1 <= half <= len(counts) // 2 or abs(half - level * len(counts) / 2) > 1e-6:
            raise ValueError(f"level is a multiple of {2 / len(counts):g} up to 1, not {level}")
        middle = len(counts) // 2
        return float(counts[middle - half : middle + half].sum() / counts.sum())

    def diverged(self, step: int = -1) -> int:
        """Episodes whose adaptation diverged by then; see `DIVERGED`. Means include them."""
        return int(np.sum(self._diverged(step)))

    def to_json(self) -> dict[str, Any]:
        """Everything but the single episodes, as JSON values: `None` for what is not finite.

        Means include the episodes that diverged; `..._not_diverged` are the means without them.
        """
        curve = [self._row(i) for i in range(len(self.at))]
        return io.strict({"protocol": self.protocol, "result": curve[-1], "curve": curve})

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write `to_json` to a file."""
        text = json.dumps(self.to_json(), indent=2, allow_nan=False)
        io.write_atomic(path, f"{text}\n".encode())

    def __str__(self) -> str:
        """The score, the curve over steps, and the protocol."""
        name, last = self.primary, self._row(len(self.at) - 1)
        scale, unit = (100, " %") if name == "accuracy" else (1, "")

        def shown(step: int) -> str:
            return f"{scale * self.mean(name, step):.4g} ± {scale * self.ci95(name, step):.2g}"

        lines = [f"{name} {shown(-1)}{unit} (mean, 95 % CI over episodes)"]
        if rest := [n for n in (*self.values, "ece") if n in last and n != name]:
            lines.append(", ".join(f"{n} {last[n]:.4g}" for n in rest))
        if len(self.at) > 1:
            points = (f"{step}: {shown(i)}" for i, step in enumerate(self.at))
            lines.append(f"{name} by step: " + ", ".join(points))
        if last["diverged"]:
            lines.append(
                f"{last['diverged']} of {len(self.values[name])} tasks diverged, which the means "
                f"include; {name} of the others {scale * last[f'{name}_not_diverged']:.4g}{unit}"
            )
        lines.append(", ".join(f"{name} {value}" for name, value in self.protocol.items()))
        return "\n".join(lines)

    def _scores(
        self, metric: str | None, step: int, diverged: bool = True
    ) -> Float[np.ndarray, " episodes"]:
        metric = self.primary if metric is None else metric
        if metric not in self.values:
            raise ValueError(f"metric is one of {', '.join(self.values)}, not {metric!r}")
        values = self.values[metric][:, step]
        return values if diverged else values[~self._diverged(step)]

    def _diverged(self, step: int) -> np.ndarray:
        if self.primary != "mse":
            name = "nll" if "nll" in self.values else self.primary
            return ~np.isfinite(self.values[name][:, step])
        mse = self.values["mse"]
        bad = ~np.isfinite(mse[:, step])
        if self.at[0] == 0:
            with np.errstate(all="ignore"):
                bad |= mse[:, step] > DIVERGED * mse[:, 0]
        return bad

    def _row(self, i: int) -> dict[str, Any]:
        """What JSON says of the step at a position."""
        row: dict[str, Any] = {"step": self.at[i]}
        for name in self.values:
            row[name], row[f"{name}_ci95"] = self.mean(name, i), self.ci95(name, i)
            row[f"{name}_not_diverged"] = self.mean(name, i, diverged=False)
        with np.errstate(all="ignore"):
            row[f"median_{self.primary}"] = float(np.median(self.values[self.primary][:, i]))
        if self.bins is not None:
            row["ece"] = self.ece(i)
        row["diverged"] = self.diverged(i)
        if i and self.at[0] == 0:
            row["gain"], row["gain_ci95"] = self.gain(i)
        return row

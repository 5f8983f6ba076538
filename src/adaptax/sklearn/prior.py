"""What meta-training leaves: all that adapting to a new task and predicting it wants."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int
from scipy.stats import norm

from ..algorithms.baselines import NearestClassMean, RidgeRegression
from ..engine import together
from ..engine.conformal import fewest, quantile
from ..learner import Adapter, Meta
from ..recipes import Experiment
from ..tasks.preparation import Preparation


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Inputs of the learner: the columns of an array, standardised, or a table's, prepared.

    Args:
        mean: subtracted from every column.
        scale: by which it is divided then.
        preparation: of a table, in the place of both.
    """

    mean: Float[np.ndarray, " features"]
    scale: Float[np.ndarray, " features"]
    preparation: Preparation | None = None

    @classmethod
    def of(cls, x: np.ndarray) -> Inputs:
        """Return the standardisation of these rows; constant columns are divided by 1."""
        scale = x.std(axis=0)
        mean = x.mean(axis=0)
        flat = scale <= 1e-9 * np.maximum(np.abs(mean), 1e-300)
        return cls(mean, np.where(flat | ~(scale > 0), 1.0, scale))

    def __call__(self, x: Any) -> Any:
        """Return inputs, float32, of an array that is checked, or of a table."""
        if self.preparation is not None:
            return self.preparation.inputs(x)
        return ((x - self.mean) / self.scale).astype(np.float32)


@dataclasses.dataclass(frozen=True, eq=False)
class Prior:
    """What meta-training leaves. Estimators share it: cloning one leaves it as it is.

    Args:
        learner: of a task.
        meta: its meta-parameters.
        inputs: of the learner.
        classes: of a classification; `None` of a regression.
        centre: mean of the targets, over tasks: what is predicted of a task without support.
        spread: of the targets within a task: what supports too small to tell are taken to have.
        sizes: of supports that held-out tasks were adapted to, ascending.
        noise: standard deviation of their targets given the prediction, in units of a support's
            spread, for each of the sizes.
        residuals: |y − f| over the standard deviation, or, of a classification, 1 − p of the true
            class, of every held-out task; for each of the sizes, NaN where there are fewer.
        experiment: what the learner was made of, to make it again; `None` of one's own.
        features: columns of an array.
    """

    learner: Adapter
    meta: Meta
    inputs: Inputs
    classes: np.ndarray | None
    centre: float
    spread: float
    sizes: Int[np.ndarray, " sizes"]
    noise: Float[np.ndarray, " sizes"]
    residuals: Float[np.ndarray, "sizes tasks queries"]
    experiment: Experiment | None
    features: int

    def __sklearn_clone__(self) -> Prior:
        return self

    def __deepcopy__(self, memo: Any) -> Prior:
        return self

    def __reduce__(self) -> Any:
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        arrays = [leaf for leaf in jax.tree.leaves(self.meta) if eqx.is_array(leaf)]
        if self.experiment is not None:  # functions of learner and network are made again
            fields |= {"learner": None, "meta": [np.asarray(leaf) for leaf in arrays]}
        return _again, (fields,)

    def standard(self, y: Float[np.ndarray, " n"]) -> tuple[float, float]:
        """Return what a support's targets are centred and divided by."""
        return standard(y, self.centre, self.spread)

    def adapt(self, supports: Sequence[tuple[Any, np.ndarray]]) -> Adapted:
        """Return the models of tasks, all adapted at once.

        Args:
            supports: inputs and targets of every task, numbers or indices of classes.
        """
        if self.classes is None:
            standards = [self.standard(y) for _, y in supports]
            scaled = [
                (x, ((y - a) / b).astype(np.float32)[:, None])
                for (x, y), (a, b) in zip(supports, standards)
            ]
        else:
            standards = [(0.0, 1.0)] * len(supports)
            scaled = [(x, y.astype(np.int32)) for x, y in supports]
        models = together.adapt(self.learner, self.meta, scaled)
        return Adapted(self, models, standards, [len(y) for _, y in supports])

    def unadapted(self, nothing: Any) -> Adapted:
        """Return the model of a task of which nothing is known.

        Args:
            nothing: a row of inputs, which counts nothing.
        """
        y = np.zeros((1, 1), np.float32) if self.classes is None else np.zeros(1, np.int32)
        models = together.adapt(self.learner, self.meta, [(nothing, y)], count=[0])
        return Adapted(self, models, [(self.centre, self.spread)], [0])

    def place(self, count: int) -> int:
        """Return the place of the size that tells of a support of so many rows."""
        return max(int(np.searchsorted(self.sizes, count, side="right")) - 1, 0)

    def quantile(self, coverage: float, count: int) -> float:
        """Return what a share of a new task's residuals does not exceed; the normal one's if none.

        See `adaptax.engine.conformal`: every held-out task counts alike.

        Args:
            coverage: the share.
            count: rows of the support.

        Raises:
            ValueError: if the coverage is no share.

        Warns:
            UserWarning: if too few tasks were held out for it.
        """
        if not 0 < coverage < 1:
            raise ValueError(f"coverage is between 0 and 1, not {coverage}")
        if not self.residuals.size:
            return float(norm.ppf((1 + coverage) / 2))
        known = self.residuals[self.place(count)]
        known = known[~np.isnan(known).all(axis=1)]
        there = ~np.isnan(known)
        least = fewest(coverage)
        if len(known) < least:
            warnings.warn(
                f"a coverage of {coverage:g} for new tasks wants {least} held-out tasks, and there "
                f"are {len(known)}: these intervals are of the rows of those, and may hold less; "
                "fit on more tasks, or raise held_out",
                stacklevel=3,
            )
            return float(np.quantile(known[there], coverage))
        return quantile(np.where(there, known, 0), there.astype(float), coverage)


@dataclasses.dataclass(frozen=True)
class Adapted:
    """The models of tasks, and the units of their targets.

    Args:
        prior: that they come from.
        models: adapted.
        standards: what targets of every task were centred and divided by.
        counts: rows of the supports.
    """

    prior: Prior
    models: together.Adapted
    standards: Sequence[tuple[float, float]]
    counts: Sequence[int]

    def numbers(self, queries: Sequence[Any]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return mean and standard deviation for the queries of every task."""
        found = []
        units = zip(self.models.predict(queries), self.standards, self.counts)
        for f, (centre, spread), count in units:
            f = f[..., 0].astype(float)
            f = f if f.ndim == 2 else f[None]
            noise = self.prior.noise[self.prior.place(count)]
            deviation = np.sqrt(f.var(axis=0) + noise**2)
            found.append((centre + spread * f.mean(axis=0), spread * deviation))
        return found

    def probabilities(self, queries: Sequence[Any]) -> list[np.ndarray]:
        """Return the probability of every class for the queries of every task."""
        found = []
        for logits in self.models.predict(queries):
            logits = (logits if logits.ndim == 3 else logits[None]).astype(float)
            odds = np.exp(logits - logits.max(axis=-1, keepdims=True))
            found.append((odds / odds.sum(axis=-1, keepdims=True)).mean(axis=0))
        return found


LEAST = 0.2
"""Smallest spread of a support, as a share of the usual spread within a task."""


def standard(y: Float[np.ndarray, " n"], centre: float, spread: float) -> tuple[float, float]:
    """Return mean and spread of the targets of a support; of none, those of training.

    A support of one, or of equal targets, is taken to have a spread of `LEAST` of the usual one.
    """
    if not len(y):
        return centre, spread
    return float(np.mean(y)), max(float(np.std(y)), LEAST * spread)


def alone(x: np.ndarray, y: np.ndarray, classes: np.ndarray | None) -> Prior:
    """Return what there is without meta-training: ridge regression, or nearest class means.

    Args:
        x: rows of one task.
        y: their targets.
        classes: of a classification.
    """
    learner: Any
    if classes is None:
        learner, meta = RidgeRegression(), {"log_penalty": jnp.zeros(())}
    else:
        learner, meta = NearestClassMean(way=max(len(classes), 2)), {"log_scale": jnp.zeros(())}
    centre, spread = (0.0, 1.0) if classes is not None else (float(y.mean()), float(y.std()) or 1.0)
    return Prior(
        learner=learner,
        meta=meta,
        inputs=Inputs.of(x),
        classes=classes,
        centre=centre,
        spread=spread,
        sizes=np.ones(1, int),
        noise=np.ones(1),
        residuals=np.zeros((1, 0, 0)),
        experiment=None,
        features=x.shape[1],
    )


def _again(fields: dict[str, Any]) -> Prior:
    experiment = fields["experiment"]
    if experiment is not None:
        learner = experiment.build_learner()
        like = learner.init(experiment.model(), key=jax.random.key(0))
        arrays = iter(fields["meta"])
        meta = jax.tree.map(lambda a: jnp.asarray(next(arrays)) if eqx.is_array(a) else a, like)
        fields |= {"learner": learner, "meta": meta}
    return Prior(**fields)

"""Estimators of one task, adapted to its support; fitting one adapts it."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Float, Shaped
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, column_or_1d, validate_data

from . import prior as priors
from .prior import Prior


class _AdaptedEstimator(BaseEstimator):  # type: ignore[misc]
    """What both kinds of estimators of a task share."""

    prior: Prior | None

    def _table(self) -> bool:
        return self.prior is not None and self.prior.inputs.preparation is not None

    def _support(self, X: Any, y: Any) -> tuple[Any, np.ndarray]:
        """Return rows and targets, checked."""
        if self._table():
            y = column_or_1d(y, warn=True)
            if len(X) != len(y):
                raise ValueError(f"X has {len(X)} rows and y has {len(y)}; give one target a row")
            self.n_features_in_ = X.shape[1]
            return X, y
        X, y = validate_data(self, X, y, dtype=np.float64)
        if self.prior is not None and X.shape[1] != self.prior.features:
            raise ValueError(
                f"X has {X.shape[1]} features, and the tasks of meta-training had "
                f"{self.prior.features}"
            )
        return X, y

    def _queries(self, X: Any) -> Any:
        check_is_fitted(self)
        if not self._table():
            X = validate_data(self, X, dtype=np.float64, reset=False)
        return self.prior_.inputs(X)

    def __getstate__(self) -> dict[str, Any]:
        # Models hold functions, which no pickle keeps; they follow from the support.
        state = dict(super().__getstate__())
        state.pop("adapted_", None)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "support_" in state:
            self.adapted_ = self.prior_.adapt([self.support_])


class AdaptedRegressor(RegressorMixin, _AdaptedEstimator):  # type: ignore[misc]
    """A regressor of one task, which `fit` adapts to the task's support.

    `MetaRegressor.adapt` makes one that is fitted already.

    Args:
        prior: what meta-training left, `MetaRegressor(...).fit(...).prior_`; ridge regression of
            the task alone if `None`.
    """

    def __init__(self, prior: Any = None):
        self.prior = prior

    def fit(self, X: Any, y: Any) -> AdaptedRegressor:
        """Adapt to a support.

        Args:
            X: rows, `(n, features)`.
            y: their targets, `(n,)`.

        Raises:
            ValueError: if they are of other columns than in meta-training, or not finite.
        """
        X, y = self._support(X, y)
        y = np.asarray(y, float)
        if not np.isfinite(y).all():
            raise ValueError("y has targets that are not finite; leave these rows out")
        prior = self.prior or priors.alone(X, y, None)
        self.support_ = (prior.inputs(X), y)
        self.prior_, self.adapted_ = prior, prior.adapt([self.support_])
        if self.prior is None:
            self._own_noise(prior)
        return self

    def _own_noise(self, prior: Prior) -> None:
        """Take the residuals of the support for the noise, where no tasks tell of it."""
        x, y = self.support_
        mean, _ = self.adapted_.numbers([x])[0]
        _, spread = prior.standard(y)
        noise = float(np.sqrt(np.mean((y - mean) ** 2))) / spread
        self.prior_ = dataclasses.replace(prior, noise=np.full(1, max(noise, 1e-6)))
        self.adapted_ = dataclasses.replace(self.adapted_, prior=self.prior_)

    def predict(self, X: Any, return_std: bool = False) -> Any:
        """Return the mean of the target of every row, and its standard deviation if asked for."""
        x = self._queries(X)
        mean, deviation = self.adapted_.numbers([x])[0]
        return (mean, deviation) if return_std else mean

    def predict_interval(
        self, X: Any, coverage: float = 0.9
    ) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]]:
        """Return the ends of the interval that holds the target of a row with this probability.

        Conformal: as wide, in standard deviations, as held-out tasks of meta-training needed.
        """
        mean, deviation = self.predict(X, return_std=True)
        half = self.prior_.quantile(coverage, len(self.support_[1])) * deviation
        return mean - half, mean + half

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.regressor_tags.poor_score = self.prior is not None
        return tags


class AdaptedClassifier(ClassifierMixin, _AdaptedEstimator):  # type: ignore[misc]
    """A classifier of one task, which `fit` adapts to the task's support.

    `MetaClassifier.adapt` makes one that is fitted already. Its classes are all those of
    meta-training; one that the support lacks may still be predicted.

    Args:
        prior: what meta-training left, `MetaClassifier(...).fit(...).prior_`; nearest class means
            of the task alone if `None`.
    """

    def __init__(self, prior: Any = None):
        self.prior = prior

    def fit(self, X: Any, y: Any) -> AdaptedClassifier:
        """Adapt to a support.

        Args:
            X: rows, `(n, features)`.
            y: their classes, `(n,)`.

        Raises:
            ValueError: if they are of other columns or classes than in meta-training.
        """
        X, y = self._support(X, y)
        check_classification_targets(y)
        found = np.unique(y)
        prior = self.prior or priors.alone(X, y, found)
        assert prior.classes is not None
        self.classes_ = prior.classes
        self.prior_ = prior
        self.support_ = (prior.inputs(X), indices(y, prior.classes))
        self.adapted_ = prior.adapt([self.support_])
        return self

    def predict_proba(self, X: Any) -> Float[np.ndarray, "n classes"]:
        """Return the probability of every one of `classes_`."""
        x = self._queries(X)
        return self.adapted_.probabilities([x])[0][:, : len(self.classes_)]

    def predict(self, X: Any) -> Shaped[np.ndarray, " n"]:
        """Return the most probable class of every row."""
        best = self.predict_proba(X).argmax(axis=1)
        return self.classes_[best]

    def predict_set(self, X: Any, coverage: float = 0.9) -> Shaped[np.ndarray, "n classes"]:
        """Return which of `classes_` are in the set that holds a row's class with this probability.

        Conformal: as large as held-out tasks of meta-training needed; the most probable one is
        always in it.
        """
        p = self.predict_proba(X)
        if not self.prior_.residuals.size:
            raise ValueError("sets want a prior that held-out tasks calibrated; none was given")
        return (1 - p <= self.prior_.quantile(coverage, len(self.support_[1]))) | (
            p == p.max(axis=1, keepdims=True)
        )

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.classifier_tags.poor_score = self.prior is not None
        return tags


def indices(y: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """Return the places of labels among the classes.

    Raises:
        ValueError: if one is not among them.
    """
    place = np.searchsorted(classes, y)
    wrong = classes[np.minimum(place, len(classes) - 1)] != y
    if wrong.any():
        raise ValueError(
            f"y has classes that meta-training did not have, such as {y[wrong][0]!r}; expected "
            f"{', '.join(map(repr, classes[:10].tolist()))}"
        )
    return place.astype(np.int32)

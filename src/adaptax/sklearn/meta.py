"""Estimators that learn, from the groups of a table, how to learn a new group from a few rows."""

from __future__ import annotations

import abc
import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int, Shaped
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import _num_samples, check_is_fitted, column_or_1d, validate_data

from ..engine.train import fit as ax_fit
from ..learner import MetaLearner
from ..recipes import Experiment, changed, closest
from ..tasks import frames, preparation
from . import files
from .adapted import AdaptedClassifier, AdaptedRegressor, indices
from .prior import Inputs, Prior
from .training import Rows, calibrated, splits_of

STEPS, META_BATCH = 1500, 16
"""Meta-steps at most, and tasks in each of them."""


class _MetaEstimator(BaseEstimator, abc.ABC):  # type: ignore[misc]
    """What both kinds of meta-estimators share."""

    def __init__(
        self,
        learner: str | MetaLearner = "maml",
        *,
        hidden: Sequence[int] = (64, 64),
        steps: int = STEPS,
        meta_batch: int = META_BATCH,
        shot: int | tuple[int, int] = (4, 64),
        task: str | None = None,
        held_out: float = 0.15,
        patience: int | None = 3,
        random_state: int | None = 0,
    ):
        self.learner = learner
        self.hidden = hidden
        self.steps = steps
        self.meta_batch = meta_batch
        self.shot = shot
        self.task = task
        self.held_out = held_out
        self.patience = patience
        self.random_state = random_state

    def fit(self, X: Any, y: Any, groups: Any = None) -> Any:
        """Meta-learn from rows of many tasks.

        Args:
            X: rows of all tasks, `(n, features)`: an array, or a data frame, which may have
                categories, dates and gaps.
            y: their targets, `(n,)`.
            groups: the task of every row; if `None`, the column `task` of the frame, and if there
                is none, all rows are one task.

        Raises:
            ValueError: if lengths differ, or what is not a number cannot be made one.
        """
        groups = self._groups(X, groups)
        X, y = self._checked(X, y)
        if len(groups) != len(y):
            raise ValueError(f"groups has {len(groups)} entries for {len(y)} rows; give one a row")
        y = self._targets(y)
        train, held = self._split(groups)
        inputs = self._inputs(X, train)
        rows = Rows.of(inputs(X), y, groups)
        seed = 0 if self.random_state is None else int(self.random_state)
        splits, spread, centre = splits_of(rows, train, held, self.shot, seed, self._classes())
        experiment, learner, model = self._made(inputs, X.shape[1])
        how: dict[str, Any] = {}
        if experiment is not None:
            how = {"optimizer": experiment.optimizer()}
        result = ax_fit(
            learner,
            model,
            splits.train,
            steps=self.steps,
            meta_batch=self.meta_batch,
            key=jax.random.key(seed),
            validate=splits.val,
            validate_every=max(self.steps // 10, 1),
            validation={"episodes": 128},
            patience=self.patience,
            **how,
        )
        found = Prior(
            learner=learner,
            meta=result.meta,
            inputs=inputs,
            classes=self._classes(),
            centre=centre,
            spread=spread,
            sizes=np.ones(1, int),
            noise=np.ones(1),
            residuals=np.zeros((1, 0, 0)),
            experiment=experiment,
            features=X.shape[1],
        )
        self.prior_ = calibrated(found, rows, held, seed)
        self.n_steps_, self.history_ = result.step, result.history
        return self

    def adapt(self, X: Any, y: Any) -> Any:
        """Return an estimator of a new task, fitted to its support.

        Args:
            X: rows of the support, `(n, features)`.
            y: their targets.
        """
        check_is_fitted(self, "prior_")
        return self._adapted(self.prior_).fit(X, y)

    def predict(self, X: Any) -> Any:
        """Return what is predicted of rows of a task of which nothing is known."""
        check_is_fitted(self, "prior_")
        if self.prior_.inputs.preparation is None:
            X = validate_data(self, X, dtype=np.float64, reset=False)
        x = self.prior_.inputs(X)
        nothing = jax.tree.map(lambda a: np.zeros_like(a[:1]), x)
        return self._predicted(self.prior_.unadapted(nothing), x)

    def _judged(self, X: Any, y: Any, groups: Any) -> float:
        """Return how well new tasks are learned: half of each one's rows are its support."""
        check_is_fitted(self, "prior_")
        groups = self._groups(X, groups)
        y = np.asarray(column_or_1d(y))
        y = y if self._classes() is not None else y.astype(float)
        rng = np.random.default_rng(0)
        known: list[np.ndarray] = []
        asked: list[np.ndarray] = []
        for group in np.unique(groups):
            rows = rng.permutation(np.flatnonzero(groups == group))
            half = (len(rows) + 1) // 2
            if half < len(rows):
                known.append(rows[:half])
                asked.append(rows[half:])
        if not known:
            raise ValueError("no task has two rows, one to learn from and one to be judged on")
        return self._score(self.prior_.inputs(self._array(X)), y, known, asked)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a fitted estimator to a folder, without pickle; `adaptax.sklearn.load` reads it."""
        check_is_fitted(self, "prior_")
        files.save(self, path)

    def _array(self, X: Any) -> Any:
        if self.prior_.inputs.preparation is not None:
            return X
        return validate_data(self, X, dtype=np.float64, reset=False)

    def _groups(self, X: Any, groups: Any) -> Shaped[np.ndarray, " n"]:
        if groups is not None:
            return np.unique(column_or_1d(groups), return_inverse=True)[1]
        if self.task is None:
            return np.zeros(_num_samples(X), int)
        if not hasattr(X, "columns") or self.task not in X.columns:
            raise ValueError(
                f"task={self.task!r} is a column of a data frame, and X is "
                f"{'without it' if hasattr(X, 'columns') else type(X).__name__}; give groups="
            )
        words = frames.words(frames.frame_of(X)[self.task])
        return np.unique(np.array(words, dtype=np.str_), return_inverse=True)[1]

    def _checked(self, X: Any, y: Any) -> tuple[Any, np.ndarray]:
        """Return rows and targets; a frame with columns of other things than numbers as it is."""
        if y is None:
            name = type(self).__name__
            raise ValueError(f"{name} requires y to be passed, but the target y is None")
        if self.task is not None or _is_table(X):
            y = np.asarray(column_or_1d(y, warn=True))
            if len(X) != len(y):
                raise ValueError(f"X has {len(X)} rows and y has {len(y)}; give one target a row")
            self.n_features_in_ = X.shape[1]
            self.feature_names_in_ = np.array([str(name) for name in X.columns], object)
            return X, y
        X, y = validate_data(self, X, y, dtype=np.float64)
        return X, np.asarray(y)

    def _split(self, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the groups to train on and those that are held out; all for both if few."""
        names = np.unique(groups)
        if len(names) < 4:
            return names, names
        rng = np.random.default_rng(self.random_state)
        order = rng.permutation(names)
        count = min(max(round(self.held_out * len(names)), 1), len(names) - 1)
        return np.sort(order[count:]), np.sort(order[:count])

    def _inputs(self, X: Any, train: np.ndarray) -> Inputs:
        if isinstance(X, np.ndarray):
            return Inputs.of(X)
        frame = frames.frame_of(X)
        names = [name for name in frame.columns if name != self.task]
        rows = np.arange(len(frame))
        task = self.task or names[0]
        own = preparation.fit(frame, names, rows, task=task, target=[])
        return Inputs(np.zeros(0), np.ones(0), own)

    def _made(self, inputs: Inputs, features: int) -> tuple[Experiment | None, Any, Any]:
        """Return learner and untrained model, and the experiment that they are of, if named."""
        width = features if inputs.preparation is None else inputs.preparation.width
        seed = 0 if self.random_state is None else int(self.random_state)
        classes = self._classes()
        family = "table" if classes is None else "table_classes"
        name = self.learner if isinstance(self.learner, str) else "maml"
        network = {"mlp": [int(size) for size in self.hidden], "in_size": int(width)}
        experiment = changed(closest(name, family), {"network": network, "seed": seed})
        if classes is not None:
            experiment = changed(experiment, {"task": {"classes": max(len(classes), 2)}})
        model = experiment.model()
        if isinstance(self.learner, str):
            return experiment, experiment.build_learner(), model
        return None, self.learner, model

    def _classes(self) -> Any:
        return getattr(self, "classes_", None)

    @abc.abstractmethod
    def _targets(self, y: np.ndarray) -> np.ndarray: ...

    @abc.abstractmethod
    def _adapted(self, prior: Prior) -> Any: ...

    @abc.abstractmethod
    def _predicted(self, adapted: Any, x: Any) -> Any: ...

    @abc.abstractmethod
    def _score(self, x: Any, y: np.ndarray, known: Any, asked: Any) -> float: ...


class MetaRegressor(RegressorMixin, _MetaEstimator):  # type: ignore[misc]
    """Learn from many tasks how to learn another regression from a few rows.

        meta = MetaRegressor().fit(X, y, groups=task_ids)
        model = meta.adapt(X_support, y_support)
        mean, deviation = model.predict(X_query, return_std=True)

    Every task may have any number of rows. A share of the tasks is held out: meta-training stops
    when it no longer gets better on these, and they calibrate the intervals.

    In `cross_val_score` the tasks come with the rows, as the column `task=` of a data frame, or by
    metadata routing (`set_fit_request(groups=True).set_score_request(groups=True)`).

    Args:
        learner: a name in `adaptax.recipes.LEARNERS`, or a `MetaLearner`.
        hidden: widths of the network.
        steps: meta-steps at most.
        meta_batch: tasks a meta-step.
        shot: rows of the supports in meta-training: a number, or the ends of a range.
        task: the column of a data frame that names the task of a row.
        held_out: share of the tasks.
        patience: stop after so many tenths of the steps without improvement; never if `None`.
        random_state: names all randomness.
    """

    def adapt_all(self, X: Any, y: Any, groups: Any = None) -> dict[Any, AdaptedRegressor]:
        """Return the estimators of many tasks, adapted in one call, by their names in `groups`."""
        return _adapt_all(self, X, y, groups, AdaptedRegressor)

    def score(self, X: Any, y: Any, groups: Any = None) -> float:
        """Return `1 − Σ(y − f)² / Σ(y − ȳ)²` of new tasks, ȳ the mean of a task's support.

        Half of the rows of each, at random, are its support, and it is judged on the others.

        Args:
            X: rows of tasks.
            y: their targets.
            groups: the task of every row, as in `fit`.
        """
        return self._judged(X, y, groups)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.regressor_tags.poor_score = True  # of rows of a task of which nothing is known
        return tags

    def _targets(self, y: np.ndarray) -> np.ndarray:
        y = np.asarray(y, float)
        if not np.isfinite(y).all():
            raise ValueError("y has targets that are not finite; leave these rows out")
        return y

    def _adapted(self, prior: Prior) -> AdaptedRegressor:
        return AdaptedRegressor(prior)

    def _predicted(self, adapted: Any, x: Any) -> Float[np.ndarray, " n"]:
        return adapted.numbers([x])[0][0]

    def _score(self, x: Any, y: np.ndarray, known: Any, asked: Any) -> float:
        """Return `1 − Σ(y − f)² / Σ(y − ȳ)²`, ȳ the mean of the task's support."""
        adapted = self.prior_.adapt([(_rows(x, of), y[of]) for of in known])
        found = adapted.numbers([_rows(x, of) for of in asked])
        missed = sum(float(np.sum((y[of] - f) ** 2)) for of, (f, _) in zip(asked, found))
        scattered = sum(
            float(np.sum((y[of] - y[own].mean()) ** 2)) for of, own in zip(asked, known)
        )
        return 1 - missed / scattered if scattered else float(missed == 0)


class MetaClassifier(ClassifierMixin, _MetaEstimator):  # type: ignore[misc]
    """Learn from many tasks how to learn another classification from a few rows.

    The classes are the same in all tasks; what tells them apart may differ. See `MetaRegressor`.

    Args:
        learner: a name in `adaptax.recipes.LEARNERS`, or a `MetaLearner`.
        hidden: widths of the network.
        steps: meta-steps at most.
        meta_batch: tasks a meta-step.
        shot: rows of the supports in meta-training: a number, or the ends of a range.
        task: the column of a data frame that names the task of a row.
        held_out: share of the tasks.
        patience: stop after so many tenths of the steps without improvement; never if `None`.
        random_state: names all randomness.
    """

    def adapt_all(self, X: Any, y: Any, groups: Any = None) -> dict[Any, AdaptedClassifier]:
        """Return the estimators of many tasks, adapted in one call, by their names in `groups`."""
        return _adapt_all(self, X, y, groups, AdaptedClassifier)

    def score(self, X: Any, y: Any, groups: Any = None) -> float:
        """Return the accuracy on new tasks.

        Half of the rows of each, at random, are its support, and it is judged on the others.

        Args:
            X: rows of tasks.
            y: their targets.
            groups: the task of every row, as in `fit`.
        """
        return self._judged(X, y, groups)

    def predict_proba(self, X: Any) -> Float[np.ndarray, "n classes"]:
        """Return what is predicted of rows of a task of which nothing is known."""
        return self._proba(super().predict(X))

    def predict(self, X: Any) -> Shaped[np.ndarray, " n"]:
        """Return the most probable class of rows of a task of which nothing is known."""
        best = self.predict_proba(X).argmax(axis=1)
        return self.classes_[best]

    def _proba(self, p: np.ndarray) -> np.ndarray:
        p = p[:, : len(self.classes_)]
        return p / p.sum(axis=1, keepdims=True)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.classifier_tags.poor_score = True
        return tags

    def _targets(self, y: np.ndarray) -> Int[np.ndarray, " n"]:
        check_classification_targets(y)
        self.classes_, found = np.unique(y, return_inverse=True)
        return found.astype(np.int32)

    def _adapted(self, prior: Prior) -> AdaptedClassifier:
        return AdaptedClassifier(prior)

    def _predicted(self, adapted: Any, x: Any) -> np.ndarray:
        return adapted.probabilities([x])[0]

    def _score(self, x: Any, y: np.ndarray, known: Any, asked: Any) -> float:
        """Return the accuracy."""
        index = indices(y, self.classes_)
        adapted = self.prior_.adapt([(_rows(x, of), index[of]) for of in known])
        found = adapted.probabilities([_rows(x, of) for of in asked])
        right = [p.argmax(axis=1) == index[of] for p, of in zip(found, asked)]
        return float(np.mean(np.concatenate(right)))


def _adapt_all(meta: Any, X: Any, y: Any, groups: Any, kind: Any) -> dict[Any, Any]:
    """Return the estimators of the tasks that are named."""
    check_is_fitted(meta, "prior_")
    y = np.asarray(column_or_1d(y))
    named = column_or_1d(groups) if groups is not None else meta._groups(X, None)
    x, prior = meta.prior_.inputs(meta._array(X)), meta.prior_
    own = y.astype(float) if prior.classes is None else indices(y, prior.classes)
    names = np.unique(named)
    supports = [(_rows(x, at), own[at]) for at in (np.flatnonzero(named == n) for n in names)]
    adapted = prior.adapt(supports)
    found = {}
    for i, (name, support) in enumerate(zip(names.tolist(), supports)):
        one = kind(prior)
        one.n_features_in_, one.support_, one.prior_ = meta.n_features_in_, support, prior
        one.adapted_ = dataclasses.replace(
            adapted,
            models=adapted.models.only(i),
            standards=[adapted.standards[i]],
            counts=[adapted.counts[i]],
        )
        if prior.classes is not None:
            one.classes_ = prior.classes
        found[name] = one
    return found


def _rows(x: Any, at: np.ndarray) -> Any:
    return jax.tree.map(lambda a: a[at], x)


def _is_table(X: Any) -> bool:
    """Return whether this is a frame with other columns than numbers, or with gaps."""
    if not hasattr(X, "columns") or not hasattr(X, "dtypes"):
        return False
    frame = frames.frame_of(X)
    return any(
        not frame[name].dtype.is_numeric() or bool(frame[name].is_null().any())
        for name in frame.columns
    )

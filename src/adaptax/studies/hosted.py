"""Models of scikit-learn on the episodes of a test: what there is without meta-learning.

Each is fitted to the support of an episode alone, or, as `pooled`, once to all training tasks.
They run on the host, one episode after another, on the same episodes as the learners.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, PRNGKeyArray
from scipy.stats import norm

from .. import metrics, tree
from ..engine import feed
from ..engine.report import Report
from ..protocols import Scoring
from ..task import Splits, Task, TaskDistribution

Predict = Callable[[np.ndarray, np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]
"""Mean and standard deviation of queries, or probabilities and nothing, by support and queries."""

FLOOR = 0.05
"""Smallest standard deviation that a prediction is given, in units of the targets."""

POOL = 500
"""Training episodes that the pooled model is fitted to."""


def episodes(tasks: TaskDistribution, count: int, key: PRNGKeyArray) -> Iterator[Task]:
    """Return the episodes that `adaptax.evaluate` scores, without padding, on the host.

    Args:
        tasks: the split.
        count: how many.
        key: names them.
    """
    draw = jax.jit(lambda loaded: feed.task(tasks, loaded))
    for i in range(count):
        loaded = tree.at(feed.load(tasks, key, jnp.array([i], jnp.uint32)), 0)
        yield jax.tree.map(np.asarray, draw(loaded).unpadded())


def regressors(splits: Splits, key: PRNGKeyArray) -> dict[str, Predict]:
    """Return the baselines of regressions, by name; the pooled one is fitted here.

    Args:
        splits: of the tasks.
        key: names the training episodes.
    """
    return {
        "mean": _mean,
        "ridge per task": _ridge,
        "Gaussian process per task": _gaussian_process,
        "boosting per task": _boosting,
        "pooled boosting": _pooled(splits, key),
    }


def classifiers(splits: Splits, key: PRNGKeyArray) -> dict[str, Predict]:
    """Return the baselines of classifications, by name; see `regressors`."""
    classes = len(splits.preparation.classes)
    linear = lambda: _learn("linear_model", "LogisticRegression")(max_iter=500)  # noqa: E731
    process = lambda: _learn("gaussian_process", "GaussianProcessClassifier")()  # noqa: E731
    boosted = lambda: _learn("ensemble", "GradientBoostingClassifier")(n_estimators=50)  # noqa: E731
    made = {
        "frequencies": None,
        "logistic per task": linear,
        "Gaussian process per task": process,
        "boosting per task": boosted,
    }
    found = {name: _classifier(make, classes) for name, make in made.items()}
    return {**found, "pooled boosting": _pooled_classifier(splits, key, classes)}


def score(
    name: str,
    predict: Predict,
    tasks: TaskDistribution,
    count: int,
    key: PRNGKeyArray,
    watch: Callable[[int], None] | None = None,
) -> Report:
    """Return the report on a baseline, of the same episodes as a learner's.

    Args:
        name: of the baseline.
        predict: what it predicts.
        tasks: the split.
        count: of episodes.
        key: names them.
        watch: called with the number of episodes done.
    """
    each, tables = [], []
    for i, task in enumerate(episodes(tasks, count, key)):
        support, query = task.support, task.query
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # of fits that do not converge, which are scored as such
            mean, deviation = predict(_flat(support.x), support.y, _flat(query.x))
        if query.y.ndim == 1:
            found = jax.tree.map(
                np.asarray,
                metrics.classification(jnp.log(jnp.maximum(mean, 1e-12)), jnp.asarray(query.y)),
            )
            tables.append(found.pop("bins"))
        else:
            found, quantiles = _scores(mean, deviation, query.y)
            if isinstance(tasks, Scoring) and np.isfinite(query.y).all():
                found |= tasks.scores(jnp.asarray(mean, jnp.float32), jnp.asarray(query.y))
            tables.append(quantiles)
        each.append({name: float(value) for name, value in found.items()})
        if watch is not None:
            watch(i + 1)
    values = {n: np.array([[one[n]] for one in each]) for n in each[0]}
    protocol = {
        "algorithm": name,
        **tasks.describe(),
        "episodes": count,
        "model": "scikit-learn",
        "ci": "1.96 standard errors over episodes",
    }
    kind = "bins" if "accuracy" in values else "quantiles"
    table: dict[str, Any] = {kind: np.sum(tables, axis=0)[None]}
    return Report(protocol, [None], values, **table)


def _scores(
    mean: np.ndarray, deviation: np.ndarray, y: np.ndarray
) -> tuple[dict[str, Any], np.ndarray]:
    """Return the metrics of a regression, of targets that are there."""
    there = np.isfinite(y)
    mean, deviation, y = (np.broadcast_to(a, there.shape)[there] for a in (mean, deviation, y))
    u = norm.cdf((y - mean) / deviation)
    found = {
        "mse": np.mean((y - mean) ** 2),
        "nll": -np.mean(norm.logpdf(y, mean, deviation)),
        **{f"coverage_{c}": np.mean(np.abs(u - 0.5) <= c / 200) for c in metrics.LEVELS},
    }
    place = np.clip((u * metrics.QUANTILES).astype(int), 0, metrics.QUANTILES - 1)
    return found, np.bincount(place, minlength=metrics.QUANTILES).astype(float)


def _flat(x: Any) -> Float[np.ndarray, "n width"]:
    """Return inputs as one matrix."""
    leaves = [np.asarray(leaf, float) for leaf in jax.tree.leaves(x)]
    return np.concatenate([leaf.reshape(len(leaf), -1) for leaf in leaves], axis=1)


def _learn(module: str, name: str) -> Any:
    """Return a class of scikit-learn.

    Raises:
        ModuleNotFoundError: saying how to install it.
    """
    try:
        return getattr(importlib.import_module(f"sklearn.{module}"), name)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "comparisons of tables want scikit-learn, which is not installed; install the extra by "
            "pip install 'adaptax[table]'"
        ) from error


def _by_target(predict: Predict) -> Predict:
    """Return the baseline that predicts every target by itself, from the rows that have it."""

    def all_targets(x: np.ndarray, y: np.ndarray, new: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        found = []
        for column in y.T:
            there = np.isfinite(column)
            known = column[there]
            if len(known) < 2:
                centre = known.mean() if len(known) else 0.0
                found.append((np.full(len(new), centre), np.ones(len(new))))
            else:
                found.append(predict(x[there], known, new))
        mean, deviation = (np.stack(parts, axis=1) for parts in zip(*found))
        return mean, np.maximum(deviation, FLOOR)

    return all_targets


@_by_target
def _mean(x: np.ndarray, y: np.ndarray, new: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    wider = y.std(ddof=1) * np.sqrt(1 + 1 / len(y))
    return np.full(len(new), y.mean()), np.full(len(new), wider)


@_by_target
def _ridge(x: np.ndarray, y: np.ndarray, new: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return ridge regression, its penalty and noise by leaving one out."""
    fitted = _learn("linear_model", "RidgeCV")(np.logspace(-2, 4, 13) * x.shape[1] / 30).fit(x, y)
    return fitted.predict(new), np.full(len(new), np.sqrt(max(-fitted.best_score_, 0)))


@_by_target
def _gaussian_process(
    x: np.ndarray, y: np.ndarray, new: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return a Gaussian process with one length scale and noise, by marginal likelihood."""
    process = _learn("gaussian_process", "GaussianProcessRegressor")
    rbf, white = (_learn("gaussian_process.kernels", name) for name in ("RBF", "WhiteKernel"))
    length = np.sqrt(x.shape[1])
    kernel = 1.0 * rbf(length, (0.05 * length, 50 * length)) + white(0.5, (1e-3, 10.0))
    return process(kernel, normalize_y=True, random_state=0).fit(x, y).predict(new, return_std=True)


@_by_target
def _boosting(x: np.ndarray, y: np.ndarray, new: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return boosted trees, their noise by three-fold cross-validation."""
    make = lambda: _learn("ensemble", "GradientBoostingRegressor")(  # noqa: E731
        n_estimators=50, max_depth=3, subsample=0.8, random_state=0
    )
    noise = y.std()
    if len(y) >= 6:
        folds = np.arange(len(y)) % 3
        gaps = [
            y[folds == k] - make().fit(x[folds != k], y[folds != k]).predict(x[folds == k])
            for k in range(3)
        ]
        noise = np.sqrt(np.mean(np.concatenate(gaps) ** 2))
    return make().fit(x, y).predict(new), np.full(len(new), noise)


def _training(splits: Splits, key: PRNGKeyArray) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows of training episodes, numbers less the mean of their episode."""
    x, y = [], []
    for task in episodes(splits.train, POOL, key):
        own = np.concatenate([task.support.y, task.query.y])
        x += [_flat(task.support.x), _flat(task.query.x)]
        y.append(own - np.nanmean(own, axis=0) if own.ndim > 1 else own)
    return np.concatenate(x), np.concatenate(y)


def _pooled(splits: Splits, key: PRNGKeyArray) -> Predict:
    """Return one model of all training tasks, moved to the mean of each support."""
    x, y = _training(splits, key)
    boost = _learn("ensemble", "HistGradientBoostingRegressor")
    fitted, noise = [], []
    for column in y.T:
        # Of an episode whose support has no spread the targets are large; a few are left out.
        there = np.isfinite(column) & (np.abs(column) < 10)
        fitted.append(boost(random_state=0).fit(x[there], column[there]))
        noise.append(np.std(column[there] - fitted[-1].predict(x[there])))

    def predict(x: np.ndarray, y: np.ndarray, new: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        found, deviation = [], []
        for model, column, width in zip(fitted, y.T, noise):
            there = np.isfinite(column)
            left = column[there] - model.predict(x[there]) if there.any() else np.zeros(1)
            found.append(model.predict(new) + left.mean())
            # As good as a few examples more with the noise of training.
            spread = np.sqrt((4 * width**2 + np.sum((left - left.mean()) ** 2)) / (4 + len(left)))
            deviation.append(np.full(len(new), spread * np.sqrt(1 + 1 / len(left))))
        return np.stack(found, axis=1), np.maximum(np.stack(deviation, axis=1), FLOOR)

    return predict


def _classifier(make: Callable[[], Any] | None, classes: int) -> Predict:
    def predict(x: np.ndarray, y: np.ndarray, new: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        seen = np.unique(y)
        if make is None or len(seen) < 2:
            share = (np.bincount(y, minlength=classes) + 1) / (len(y) + classes)
            return np.tile(share, (len(new), 1)), np.zeros(0)
        return _spread(make().fit(x, y), new, classes), np.zeros(0)

    return predict


def _pooled_classifier(splits: Splits, key: PRNGKeyArray, classes: int) -> Predict:
    x, y = _training(splits, key)
    model = _learn("ensemble", "HistGradientBoostingClassifier")(random_state=0).fit(x, y)
    return lambda x, y, new: (_spread(model, new, classes), np.zeros(0))


def _spread(model: Any, x: np.ndarray, classes: int) -> Float[np.ndarray, "n classes"]:
    """Return probabilities of all classes, a little for those that the model does not know."""
    found = np.full((len(x), classes), 1e-3)
    found[:, model.classes_] += model.predict_proba(x)
    return found / found.sum(axis=1, keepdims=True)


def baselines(splits: Splits, key: PRNGKeyArray) -> Mapping[str, Predict]:
    """Return the baselines of these tasks, by name."""
    classification = splits.preparation is not None and splits.preparation.classes is not None
    return (classifiers if classification else regressors)(splits, key)

"""scikit-learn's face: estimators that meta-learn from groups of rows, and adapt to a new one.

meta = MetaRegressor().fit(X, y, groups=task_ids)
model = meta.adapt(X_support, y_support)          # a fitted estimator
model.predict(X, return_std=True), model.predict_interval(X, coverage=0.9)
"""

import importlib.util

if importlib.util.find_spec("sklearn") is None:
    raise ModuleNotFoundError(
        "adaptax.sklearn wants scikit-learn, which is not installed; install the extra by "
        "pip install 'adaptax[sklearn]'"
    )

from .adapted import AdaptedClassifier, AdaptedRegressor
from .loading import load
from .meta import MetaClassifier, MetaRegressor
from .prior import Prior

__all__ = [
    "AdaptedClassifier",
    "AdaptedRegressor",
    "MetaClassifier",
    "MetaRegressor",
    "Prior",
    "load",
]

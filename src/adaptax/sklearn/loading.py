"""Meta-estimators from the folders that `files.save` wrote."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np

from .. import io
from ..learner import MetaLearner
from ..recipes import Experiment
from ..tasks import preparation
from ..tasks.preparation import Preparation
from . import meta
from .files import CALIBRATION, META, NUMBERS, OWN, SETTINGS
from .prior import Inputs, Prior


def load(path: str | os.PathLike[str], learner: MetaLearner | None = None) -> Any:
    """Return the meta-estimator that `save` wrote to a folder.

    Args:
        path: the folder.
        learner: that it was fitted with, if that was one of one's own and no name.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if its files are broken, or its learner is not given.
    """
    folder = Path(path)
    file = folder / SETTINGS
    if not file.is_file():
        raise FileNotFoundError(f"{folder} holds no estimator; expected {SETTINGS} in it")
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
        kind = {k.__name__: k for k in (meta.MetaRegressor, meta.MetaClassifier)}[
            settings["estimator"]
        ]
        parameters, numbers = dict(settings["parameters"]), settings["numbers"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{file} is not what save wrote ({type(error).__name__})") from None
    own = parameters["learner"] == OWN
    if own and learner is None:
        raise ValueError(f"the estimator in {folder} has a learner of its own; give learner=")
    parameters["learner"] = learner if own else parameters["learner"]
    for name in ("hidden", "shot"):
        if isinstance(parameters[name], list):
            parameters[name] = tuple(parameters[name])
    found = kind(**parameters)
    classes = None if settings["classes"] is None else np.array(settings["classes"])
    if classes is not None:
        found.classes_ = classes
    arrays, _ = io.read(folder / NUMBERS)
    own_table = (folder / preparation.FILE).is_file()
    prepared = Preparation.load(folder / preparation.FILE) if own_table else None
    inputs = Inputs(arrays["mean"], arrays["scale"], prepared)
    found.n_features_in_ = int(numbers["features"])
    if settings["columns"]:
        found.feature_names_in_ = np.array(settings["columns"], object)
    experiment, made, model = found._made(inputs, found.n_features_in_)
    if settings["experiment"] is not None:
        experiment = Experiment.from_json(settings["experiment"])
        made, model = experiment.build_learner(), experiment.model()
    like = made.init(model, key=jax.random.key(0))
    fields: dict[str, Any] = {name: arrays[name] for name in CALIBRATION} | numbers
    found.prior_ = Prior(
        learner=made,
        meta=io.load(folder / META, like),
        inputs=inputs,
        classes=classes,
        experiment=experiment,
        **fields,
    )
    return found

"""Meta-estimators in folders: numbers as safetensors, settings as JSON, no pickle."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from .. import io
from ..tasks import preparation

SETTINGS, META, NUMBERS = "estimator.json", "meta.safetensors", "numbers.safetensors"
CALIBRATION = ("sizes", "noise", "residuals")
OWN = "given"
"""What stands for a learner of one's own."""


def save(estimator: Any, path: str | os.PathLike[str]) -> None:
    """Write a fitted meta-estimator to a folder.

    Args:
        estimator: a `MetaRegressor` or a `MetaClassifier`.
        path: the folder, which is made.

    Raises:
        ValueError: if its classes are neither numbers nor text.
    """
    folder, prior = Path(path), estimator.prior_
    parameters = dict(estimator.get_params(deep=False))
    if not isinstance(parameters["learner"], str):
        parameters["learner"] = OWN
    classes = None if prior.classes is None else prior.classes.tolist()
    settings = {
        "estimator": type(estimator).__name__,
        "version": 1,
        "parameters": parameters,
        "classes": classes,
        "numbers": {n: getattr(prior, n) for n in ("centre", "spread", "features")},
        "experiment": None if prior.experiment is None else prior.experiment.to_json(),
        "columns": list(getattr(estimator, "feature_names_in_", [])),
    }
    try:
        text = json.dumps(settings, indent=1)
    except TypeError as error:
        raise ValueError(
            f"{type(estimator).__name__} has parameters or classes that JSON cannot hold "
            f"({error}); expected numbers and text"
        ) from None
    inputs = prior.inputs
    arrays = {"mean": inputs.mean, "scale": inputs.scale}
    arrays |= {name: getattr(prior, name) for name in CALIBRATION}
    io.save(folder / NUMBERS, {n: np.asarray(a) for n, a in arrays.items()})
    io.save(folder / META, prior.meta)
    if inputs.preparation is not None:
        inputs.preparation.save(folder / preparation.FILE)
    io.write_atomic(folder / SETTINGS, f"{text}\n".encode())

"""FS-Mol: assays of molecules (Stanley et al. 2021), as tasks of regression or classification."""

from __future__ import annotations

import os

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from adaptax.task import Splits
from adaptax.tasks import bank
from adaptax.tasks.assays import FOLDS, load
from adaptax.tasks.episodes import Details
from adaptax.tasks.files import DataError, data_folder
from adaptax.tasks.ragged import Draw, RaggedTasks

TARGETS = ("activity", "active")
SCALES = ("support", "assay", "none")

LEAST_SPREAD = 0.1
"""Activities are divided by their spread or by this, in decades: many assays cut off what they
cannot measure, and a support of such values has no spread."""


FSMol = RaggedTasks
"""Assays had a class of their own."""


def fsmol(
    shot: int = 16,
    query: int = 64,
    *,
    train_shot: int | None = None,
    train_query: int | None = 16,
    target: str = "activity",
    standardise: str = "support",
    orient: bool = True,
    in_order: bool = True,
    data_root: str | os.PathLike[str] | None = None,
) -> Splits:
    """Return FS-Mol assays with their given split, x `(n, 2048)` fingerprint bits.

    A task is an assay: `shot` of its molecules to learn from and `query` others to be judged on,
    drawn uniformly. Assays differ in size, tasks do not: in meta-training assays too small for
    `shot + query` are left out and counted in `describe()["left_out"]`; in validation and test
    they are an error, so that no score passes over some in silence.

    Activities are decades, mostly −log₁₀ of a concentration in mol/l, so that more is more active.
    In other assays, by their values those that measured percent as `9 − log₁₀(percent)`, active
    molecules have the *lower* values: 77 of the 157 in the test split (see `orient`). Molecules
    without a number are left out of the regression. Different molecules may share a fingerprint.

    The benchmark of FS-Mol scores the classification by ΔAUPRC, with all other molecules of the
    assay as queries and a support that holds as many actives as the assay does in proportion; here
    both are uniform draws, so compare numbers among learners, not with its tables.

    Args:
        shot: support molecules.
        query: query molecules.
        train_shot: support molecules in meta-training, if not `shot`.
        train_query: query molecules in meta-training, if not `query`.
        target: `"activity"`, y `(n, 1)` float, or `"active"`, y `(n,)` int32 in {0, 1}.
        standardise: activities minus mean over spread of the task's `"support"`, which lets
            nothing out that the learner may not see; of the whole `"assay"`, by which an error is
            the share of variance left unexplained, but the scale tells of the queries; or
            `"none"`. Spreads below 0.1 count as 0.1.
        orient: turn the sign of assays whose active molecules have the lower values. One bit an
            assay that all its labels decide, in place of the unit, which the data do not hold.
        in_order: episode i of validation and test is assay i; else one at random.
        data_root: folder with `fsmol/*.npz`, or with FS-Mol's own `fsmol/train/*.jsonl.gz`,
            `valid` and `test` (read once, which takes minutes, then kept in the cache), or that
            folder itself; default `ADAPTAX_DATA`.

    Raises:
        FileNotFoundError: if the data are nowhere.
        DataError: if files are broken, the counts do not fit, or an argument is not known.
    """
    for what, given, known in (("target", target, TARGETS), ("standardise", standardise, SCALES)):
        if given not in known:
            raise DataError(f"{what}={given!r}; expected one of {', '.join(known)}")
    designs = bank.designs(1, shot, query, train_shot, train_query)
    data = load(data_folder(data_root))

    def assays(split: str) -> FSMol:
        design, rows, left_out = designs[split], {}, 0
        counted = f"shot + query = {design.shot} + {design.query}"
        y = data.log_activity.copy() if target == "activity" else data.active.astype(np.int32)
        for i in np.flatnonzero(data.split == FOLDS[split]):
            of = np.arange(data.offsets[i], data.offsets[i + 1])
            if target == "activity":
                of = of[np.isfinite(y[of])]
            if len(of) >= design.shot + design.query:
                rows[str(data.task[i])] = of
                if target == "activity":
                    y[of] = _scaled(y[of], data.active[of], orient, standardise == "assay")
            elif split == "train":
                left_out += 1
            else:
                raise DataError(
                    f"assay {data.task[i]} of the {split} split has {len(of)} molecules, but "
                    f"{counted} were asked; lower them"
                )
        if not rows:
            raise DataError(f"no assay of the {split} split has {counted} molecules; lower them")
        index = np.concatenate(list(rows.values()))
        count = np.array([len(of) for of in rows.values()], np.int32)
        details: Details = (("left_out", left_out), ("target", target))
        if target == "activity":
            details += (("standardise", standardise), ("orient", orient))
        return RaggedTasks(
            bank=(
                jnp.asarray(data.fingerprint_bits[index]),
                jnp.asarray(y[index][:, None] if target == "activity" else y[index]),
                None,
            ),
            start=jnp.asarray(np.cumsum(count, dtype=np.int32) - count),
            count=jnp.asarray(count),
            label=None,
            draw=Draw(design.shot, design.query, int(count.max()), full=True),
            split=split,
            name="fsmol",
            names=tuple(rows),
            standardise="support" if standardise == "support" else "none",
            least_spread=LEAST_SPREAD,
            in_order=in_order and split != "train",
            unit="assays",
            packed=True,
            details=details,
        )

    return Splits.of(assays)


def _scaled(
    y: Float[np.ndarray, " n"], active: Bool[np.ndarray, " n"], orient: bool, standardise: bool
) -> Float[np.ndarray, " n"]:
    """Return the activities of one assay, turned and standardised as asked."""
    both = active.any() and not active.all()
    if orient and both and y[active].mean() < y[~active].mean():
        y = -y
    return (y - y.mean()) / max(float(y.std()), LEAST_SPREAD) if standardise else y

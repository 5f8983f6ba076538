"""FS-Mol: assays of molecules (Stanley et al. 2021), as tasks of regression or classification."""

from __future__ import annotations

import os
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32, Integer, PRNGKeyArray, Shaped, UInt8

from adaptax.task import Splits, Task, TaskDistribution
from adaptax.tasks import bank
from adaptax.tasks.assays import FOLDS, load
from adaptax.tasks.episodes import Details, distinct
from adaptax.tasks.files import DataError, data_folder

TARGETS = ("activity", "active")
SCALES = ("support", "assay", "none")

LEAST_SPREAD = 0.1
"""Activities are divided by their spread or by this, in decades: many assays cut off what they
cannot measure, and a support of such values has no spread."""


class FSMol(TaskDistribution):
    """Assays of one split: x are fingerprints of molecules, y what the assay measured of them.

    The fingerprints stay packed on the device, eight bits a byte; x is 0 or 1, `(n, 2048)`.

    Args:
        bank: packed fingerprints, assay by assay.
        y: activities, float, or labels, int32; assay by assay.
        start: first row of every assay.
        count: rows of every assay.
        shot: support molecules.
        query: query molecules.
        split: `"train"`, `"val"` or `"test"`.
        standardise: `"support"`, `"assay"` or `"none"`; see `fsmol`.
        in_order: whether episode i is assay i, or one at random.
        assays: names of the assays.
        details: what else a report says of the data, as pairs.
    """

    bank: UInt8[Array, "rows bytes"]
    y: Shaped[Array, " rows"]
    start: Int32[Array, " assays"]
    count: Int32[Array, " assays"]
    shot: int = eqx.field(static=True)
    query: int = eqx.field(static=True)
    split: str = eqx.field(static=True)
    standardise: str = eqx.field(static=True)
    in_order: bool = eqx.field(static=True)
    assays: tuple[str, ...] = eqx.field(static=True)
    details: Details = eqx.field(static=True, default=())

    def assay(self, i: int | Integer[Array, ""], key: PRNGKeyArray) -> Task:
        """Return a task of assay `i`: the key names which of its molecules, none of them twice.

        x is `(shot, bits)` and `(query, bits)`; y is `(n, 1)` for activities, `(n,)` for labels.
        """
        rows = self.start[i] + distinct(key, self.shot + self.query, self.count[i])
        x = jnp.unpackbits(self.bank[rows], axis=-1).astype(float)
        y = self.y[rows]
        if jnp.issubdtype(y.dtype, jnp.floating):
            y = y.astype(float)[:, None]
            if self.standardise == "support":
                seen = y[: self.shot]
                y = (y - jnp.mean(seen)) / jnp.maximum(jnp.std(seen), LEAST_SPREAD)
        return Task.cut(x, y, self.shot)

    def sample(self, key: PRNGKeyArray) -> Task:
        """Return the task that this key names, of any assay, each as likely."""
        for_assay, for_rows = jax.random.split(key)
        which = jax.random.randint(for_assay, (), 0, len(self.assays), jnp.int32)
        return self.assay(which, for_rows)

    def episode(self, key: PRNGKeyArray, i: int | Integer[Array, ""]) -> Task:
        """Return episode `i` of a stream, whose own key is `key`: assay `i`, if they come in order.

        As many episodes as assays are each assay once; with more of them it starts again, with
        other molecules.
        """
        return self.assay(i % len(self.assays), key) if self.in_order else self.sample(key)

    def scores(
        self, predictions: Float[Array, "*particles n ways"], targets: Shaped[Array, "n ..."]
    ) -> dict[str, Float[Array, ""]]:
        """Return what `evaluate` adds: `r2 = 1 − Σ(y − f)² / Σ(y − ȳ)²`, f the mean prediction.

        ȳ is the mean of the *support*, 0 in its units: what one would predict without looking at
        molecules (R² out of sample). Only for targets that are standardised by the support.
        """
        if self.standardise != "support" or not jnp.issubdtype(targets.dtype, jnp.floating):
            return {}
        mean = predictions if predictions.ndim == targets.ndim else jnp.mean(predictions, axis=0)
        return {"r2": 1 - jnp.sum((targets - mean) ** 2) / jnp.sum(targets**2)}

    def describe(self) -> dict[str, Any]:
        """Return name, split, shots, queries, number of assays and details of the data."""
        return {
            "tasks": "fsmol",
            "split": self.split,
            "shot": self.shot,
            "query": self.query,
            "assays": len(self.assays),
            "order": "each assay in turn" if self.in_order else "at random",
            **dict(self.details),
        }


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
        return FSMol(
            bank=jnp.asarray(data.fingerprint_bits[index]),
            y=jnp.asarray(y[index]),
            start=jnp.asarray(np.cumsum(count, dtype=np.int32) - count),
            count=jnp.asarray(count),
            shot=design.shot,
            query=design.query,
            split=split,
            standardise=standardise,
            in_order=in_order and split != "train",
            assays=tuple(rows),
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

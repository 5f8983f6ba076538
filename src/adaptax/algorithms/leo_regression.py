"""LEO in regression: one code, from which a whole network is decoded."""

from __future__ import annotations

from typing import Any

from ..losses import Loss
from .leo import LEO


def LEORegression(
    loss: Loss, inner_lr: float = 0.001, inner_steps: int = 5, *, latent: int = 32, **how: Any
) -> LEO:
    """LEO that decodes all weights of a small network from one code; see `TaskCode`.

        learner = adaptax.LEORegression(adaptax.losses.mse)
        result  = adaptax.fit(learner, adaptax.models.MLP(1, 1, (40, 40), key=key), tasks.train, …)

    The paper fits noisy sine waves and lines so, from five points. Its sizes (three layers of 16 in
    the encoder, of 32 in relation and decoder) are from memory, and the other settings our own. On
    a task in thousands the steps of the code diverge where nothing bounds them.

    Args:
        loss: of all the loops.
        inner_lr: where the rates of the code start, for the mean of the loss over the support.
        inner_steps: steps in the latent space.
        latent: width of the code.
        how: further arguments of `LEO`.
    """
    settings: dict[str, Any] = {
        "dropout": 0.0, "reduction": "mean", "outer_lr": 5e-4, "finetune_lr": 1e-4,
        "inner_clip": 100.0, "latent": latent, "codes": "task", **how,
    }  # fmt: skip
    return LEO(loss, inner_lr, inner_steps, **settings)

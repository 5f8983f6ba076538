"""What objects may say of themselves beside being called; each such member is named here once.

Nothing derives from these: an object is of a protocol if it has the members.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Array, Float, PyTree


@runtime_checkable
class Stepwise(Protocol):
    """A source whose answer depends on the inner step, such as `adaptax.Minibatches`."""

    def at(self, step: Any) -> Any:
        """The same source at another step of the inner loop, which then draws from it."""
        ...


@runtime_checkable
class Particles(Protocol):
    """Several models in one, such as `adaptax.Ensemble`."""

    @property
    def particles(self) -> int:
        """Number of models."""
        ...

    def map(self, function: Callable[..., PyTree], *more: PyTree) -> PyTree:
        """The function of every model, results leading with an axis of models."""
        ...


@runtime_checkable
class Several(Protocol):
    """A model made of several, whatever it predicts: `adaptax.Ensemble`, a mean of checkpoints."""

    @property
    def particles(self) -> int:
        """Number of models."""
        ...

    @property
    def models(self) -> Any:
        """The models, stacked."""
        ...

    @property
    def size(self) -> int:
        """Number of parameters of a model."""
        ...


@runtime_checkable
class Noisy(Protocol):
    """A regressor that knows how noisy its targets are, such as `adaptax.Gaussian`."""

    @property
    def noise(self) -> Float[Array, ""]:
        """Standard deviation of the targets."""
        ...


@runtime_checkable
class Predictive(Protocol):
    """A regressor that says how sure it is of every prediction: `adaptax.GaussianProcessHead`'s."""

    def predictive(self, x: PyTree) -> tuple[Float[Array, "n ..."], Float[Array, "n ..."]]:
        """Mean and standard deviation of the targets of inputs, noise included."""
        ...


@runtime_checkable
class Extractor(Protocol):
    """A model with a penultimate layer, as those in `adaptax.models` are."""

    def features(self, x: PyTree, **how: Any) -> Float[Array, "n features"]:
        """What the head is given."""
        ...


@runtime_checkable
class Casting(Protocol):
    """A layer that may compute in another precision, as the residual networks' convolutions do."""

    def computing_in(self, dtype: Any) -> Any:
        """The layer, computing in this type what it takes and gives in its own."""
        ...


@runtime_checkable
class Images(Protocol):
    """Tasks of a bank of classified examples, such as the episodes of `adaptax.tasks`."""

    bank: Any
    classes: Any
    count: Any
    design: Any
    on_host: bool
    split: str

    def examples(self, rows: Any) -> PyTree:
        """Examples by their rows of the bank, of which `design.inputs` makes inputs.

        The bank has `count` rows of each of the `classes`, one class after another.
        """
        ...


@runtime_checkable
class Named(Protocol):
    """Tasks whose classes have names, such as the episodes of `adaptax.tasks`."""

    def named(self, key: Any) -> list[str]:
        """The names of the classes of the task of this key, by label."""
        ...


@runtime_checkable
class Scoring(Protocol):
    """Tasks with metrics of their own, such as the readings of ambiguous ones."""

    def scores(self, predictions: PyTree, targets: PyTree) -> Mapping[str, Array]:
        """Metrics by name of the queries of one task; traceable."""
        ...


@runtime_checkable
class Acting(Protocol):
    """Tasks in which models act, and are judged by what they earn: `adaptax.rl.Tasks`."""

    @property
    def trajectories(self) -> int:
        """Roll-outs of a batch; a field of a dataclass, so that `evaluate` may replace it."""
        ...

    def judged(
        self, learner: Any, meta: PyTree, loaded: PyTree, steps: int
    ) -> dict[str, Float[Array, " steps"]]:
        """Scores of one episode after 0, 1, … steps of adaptation; pure and traceable.

        Args:
            learner: any.
            meta: its meta-parameters.
            loaded: what `adaptax.engine.feed.load` made of the episode.
            steps: of adaptation.
        """
        ...

    def settled(self, found: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The scores of all episodes as they are reported."""
        ...


@runtime_checkable
class Timed(Protocol):
    """An environment that wants to know when the roll-out will be over."""

    def until(self, horizon: int) -> Any:
        """The same environment, of which no more than `horizon` steps will be asked."""
        ...


@runtime_checkable
class Listed(Protocol):
    """An environment that may have but a few tasks, which meta-batches then have in turn."""

    @property
    def all_tasks(self) -> PyTree | None:
        """All of them, stacked; `None` where they are without number."""
        ...


@runtime_checkable
class Stepping(Protocol):
    """A learner that adapts by steps, as many in meta-training as it says."""

    @property
    def inner_steps(self) -> int:
        """Steps of the inner loop."""
        ...


@runtime_checkable
class Rated(Protocol):
    """A learner that adapts by gradient descent, whose rate may be replaced.

    `inner_optimizer` is another rule than gradient descent, `None` if there is none.
    """

    inner_lr: Any
    inner_optimizer: Any


@runtime_checkable
class Members(Protocol):
    """A learner of several policies that can be trained one at a time."""

    def member(self, meta: Any, m: Array, rolled_out: Any) -> tuple[Any, PyTree, Any]:
        """A learner of policy `m` alone, its meta-parameters, and what it learns from.

        Args:
            meta: all policies.
            m: which of them.
            rolled_out: the supports of tasks as they were rolled out, `(tasks, steps, m, …)`.
        """
        ...

"""Interface of a stage that trains: what the training loop, a sweep and a plan read of it."""

from collections.abc import Mapping
from typing import Any, Literal, Protocol, runtime_checkable

import msgspec

from minitune.algorithms.loss_scale import LossScale
from minitune.lora import Lora
from minitune.losses.registry import Loss
from minitune.optim.registry import Optimizer
from minitune.optim.schedules import Schedule
from minitune.types import NonNegativeFloat, OpenUnitInterval, PositiveInt

FREE_KEYS = ("save_every", "keep", "save_in_background", "micro_batch_size", "remat", "compiled")
Sweep = dict[str, tuple[Any, ...]] | tuple[dict[str, Any], ...]  # a grid, or its points one by one


class Evaluation(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Training loss on held-out data every `every` steps, and after the last one."""

    data: str  # name of the [data] table that is held out
    every: PositiveInt | OpenUnitInterval  # steps, or a share of all steps such as 0.1
    # evaluations in a row without a new best that end training; never if absent
    patience: PositiveInt | None = None
    # nats that a new best has to be below the last one to count for patience; 0: any. The best is
    # kept either way, as with early_stopping_threshold of transformers.
    min_delta: NonNegativeFloat = 0.0
    at_start: bool = False  # evaluate before the first step too; its row is that of step 0
    keep: Literal["best", "last"] = "best"  # what goes on to the next stage
    batch_size: PositiveInt | None = None  # rows per forward; a step's tokens if absent

    def is_due(self, step: int, n_steps: int) -> bool:
        """True if the loss is measured after that step of a stage of n_steps."""
        is_share = isinstance(self.every, float)
        n_between = max(1, round(self.every * n_steps)) if is_share else int(self.every)
        return step == n_steps or step % n_between == 0


@runtime_checkable
class TrainingStage(Protocol):
    """Training stage; each property is a key of its table in a program, but for the label."""

    @property
    def label(self) -> str:
        """Name in overrides, records and messages."""
        ...

    @property
    def data(self) -> str:
        """Table [data] to train on."""
        ...

    @property
    def steps(self) -> int:
        """Optimizer steps in all."""
        ...

    @property
    def batch_size(self) -> int:
        """Rows (or pairs) of an optimizer step."""
        ...

    @property
    def micro_batch_size(self) -> int | None:
        """Rows (or pairs) of a forward; None: the whole batch."""
        ...

    @property
    def loss(self) -> Loss:
        """Loss to minimize."""
        ...

    @property
    def optimizer(self) -> Optimizer:
        """Optimizer, before its clip and its schedule."""
        ...

    @property
    def schedule(self) -> Schedule:
        """Factor of the learning rate at each step."""
        ...

    @property
    def clip_norm(self) -> float:
        """Largest norm of the whole gradient; 0: any."""
        ...

    @property
    def lr_factors(self) -> Mapping[str, float]:
        """Factors of the learning rate by globs over trained leaves."""
        ...

    @property
    def decay_factors(self) -> Mapping[str, float]:
        """Factors of the weight decay by globs over trained leaves."""
        ...

    @property
    def loss_scale(self) -> LossScale | None:
        """Scale of the loss in float16 compute; None: the default."""
        ...

    @property
    def evaluate(self) -> Evaluation | None:
        """Steps and data at which the held-out loss is measured."""
        ...

    @property
    def save_every(self) -> int:
        """Steps from one saved state to the next."""
        ...

    @property
    def keep(self) -> int:
        """Number of saved states that stay on the disk."""
        ...

    @property
    def save_in_background(self) -> bool | None:
        """True: states are written while steps are taken; None: on an accelerator."""
        ...

    @property
    def load_balance(self) -> float:
        """Coefficient of the load-balancing loss."""
        ...

    @property
    def privacy(self) -> Any:
        """PrivateTraining, or None."""
        ...

    def draws(self, *rules: Lora | None) -> bool:
        """True if a step under one of these rules drops or adds noise."""
        ...

    @property
    def sweep(self) -> Sweep | None:
        """Points to train an adapter for, all at once."""
        ...

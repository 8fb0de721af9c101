"""Supervised fine-tuning."""

from typing import Protocol, runtime_checkable

from jaxtyping import Int
from torch import Tensor

from minitune.algorithms.objective import Objective, apply_trainable, require_loss, with_draws
from minitune.lora import Lora
from minitune.losses.base import Logits, Nats
from minitune.losses.token import CrossEntropy
from minitune.models.model import Model
from minitune.types import Batch, Mean, Params, SeededBatch, Trainable


@runtime_checkable
class SupervisedLoss(Protocol):
    """Loss of single tokens: losses.CrossEntropy, or a function of yours."""

    def __call__(self, logits: Logits, targets: Int[Tensor, "*rows"], /) -> Nats:
        """One value a row, which depends on that row's logits and target alone, in nats."""
        ...


def sft(
    model: Model,
    lora: Lora | None,
    loss: SupervisedLoss = CrossEntropy(),  # noqa: B008 - a frozen struct
) -> Objective:
    """Objective of supervised fine-tuning on a Batch: the sum of the loss of every target token
    given those before it, in nats, and how many there are. TypeError for a loss that can't be
    called.
    """
    require_loss(loss, (), "a function (logits [n V], targets [n]) -> one value a row")

    def objective(
        trainable: Trainable, params: Params, batch: Batch | SeededBatch
    ) -> tuple[Mean, dict[str, Mean]]:
        drawing, rows = with_draws(model, lora, batch, Batch)
        nats = drawing.token_losses(
            apply_trainable(params, trainable, lora), rows, loss, summed=True
        )
        return Mean.of(nats, rows.target_mask()), {}

    return objective

"""Supervised fine-tuning."""

from minitune.algorithms.objective import Objective, apply_trainable
from minitune.lora import Lora
from minitune.losses.registry import TokenLoss
from minitune.losses.token import CrossEntropy
from minitune.models.model import Model
from minitune.types import Batch, Mean, Params, Trainable


def sft(model: Model, lora: Lora | None, loss: TokenLoss = CrossEntropy()) -> Objective:  # noqa: B008 - a frozen struct
    """Supervised fine-tuning: the loss of every labelled token given those before it."""

    def objective(trainable: Trainable, params: Params, batch: Batch) -> tuple[Mean, dict[str, Mean]]:
        nats = model.token_losses(apply_trainable(params, trainable, lora), batch, loss, summed=True)
        return Mean.of(nats, batch.target_mask()), {}

    return objective

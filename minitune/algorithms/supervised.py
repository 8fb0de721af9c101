"""Supervised fine-tuning."""

from minitune.algorithms.objective import Objective, apply_trainable, with_draws
from minitune.lora import Lora
from minitune.losses.registry import TokenLoss
from minitune.losses.token import CrossEntropy
from minitune.models.model import Model
from minitune.types import Batch, Mean, Params, SeededBatch, Trainable


def sft(model: Model, lora: Lora | None, loss: TokenLoss = CrossEntropy()) -> Objective:  # noqa: B008 - a frozen struct
    """Supervised fine-tuning: the loss of every labelled token given those before it."""

    def objective(
        trainable: Trainable, params: Params, batch: Batch | SeededBatch
    ) -> tuple[Mean, dict[str, Mean]]:
        drawing, rows = with_draws(model, lora, batch)
        nats = drawing.token_losses(
            apply_trainable(params, trainable, lora), rows, loss, summed=True
        )
        return Mean.of(nats, rows.target_mask()), {}

    return objective

"""Division of a step's sums, for all its micro-batches and processes."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from minitune import tree
from minitune.types import Mean, Metrics


class Divided(NamedTuple):
    """Loss of a step without its scale, and how its gradients are divided.

    is_finite: the loss and the norm are, and there was something to train.
    """

    loss: Mean
    divisor: Float[Tensor, "*adapters"]
    norm: Float[Tensor, "*adapters"]  # of the gradients / divisor
    is_finite: Bool[Tensor, "*adapters"]

    def of_gradients(self) -> dict[str, Tensor]:
        """Arguments of apply_gradients and apply_gradients_each."""
        return {"divisor": self.divisor, "norm": self.norm, "is_finite": self.is_finite}

    def metrics(self, counts: str, leaf_norms: Float[Tensor, "leaves *adapters"]) -> Metrics:
        """Metrics that every step has; counts: the name of what the loss's weight counts."""
        return {
            "loss_nats": self.loss.value(),
            "grad_norm": self.norm,
            counts: self.loss.weight,
            "skipped": (~self.is_finite).float(),
            "not_finite": tree.first_not_finite(leaf_norms),
        }


def divided(
    loss: Mean,
    norm: Float[Tensor, "*adapters"],
    factor: Float[Tensor, "*adapters"] | None,
) -> Divided:
    """Division of sums over a batch: its loss, the norm of its gradients, and the factor of a loss
    scale, which is in both.
    """
    if factor is not None:
        loss = Mean(loss.total / factor, loss.weight)
    divisor = torch.where(loss.weight > 0, loss.weight, 1.0)
    if factor is not None:
        divisor = divisor * factor
    norm = norm / divisor
    is_finite = torch.isfinite(loss.total) & torch.isfinite(norm) & (loss.weight > 0)
    return Divided(loss, divisor, norm, is_finite)

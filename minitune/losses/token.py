"""Losses of single tokens, from logits."""

from typing import ClassVar

import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor

from minitune.losses.base import BaseLoss, Logits, Nats, ObjectiveName
from minitune.types import widen


def cross_entropy(logits: Logits, targets: Int[Tensor, "*rows"]) -> Nats:
    """log sum_v exp(logits_v) - logits_target, in nats, computed in float32 or wider, one value a row; nothing is averaged."""
    wide = widen(logits)
    nats = F.cross_entropy(wide.reshape(-1, wide.shape[-1]), targets.reshape(-1), reduction="none")
    return nats.reshape(targets.shape)


class CrossEntropy(BaseLoss, frozen=True, tag="cross_entropy"):
    """Next-token cross-entropy."""

    objective: ClassVar[ObjectiveName] = "supervised"
    formats: ClassVar[tuple[str, ...]] = ("instruct", "chat", "text")

    def __call__(self, logits: Logits, targets: Int[Tensor, "*rows"]) -> Nats:
        """The loss in nats, one value a row."""
        return cross_entropy(logits, targets)

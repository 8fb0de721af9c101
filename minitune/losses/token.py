"""Losses of single tokens, from logits."""

from typing import ClassVar

import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor

from minitune.losses.base import BaseLoss, Logits, Nats, ObjectiveName
from minitune.types import Fraction, NonNegativeFloat, widen


def cross_entropy(logits: Logits, targets: Int[Tensor, "*rows"]) -> Nats:
    """log sum_v exp(logits_v) - logits_target, in nats, computed in float32 or wider, one value a
    row; nothing is averaged.
    """
    wide = widen(logits)
    nats = F.cross_entropy(wide.reshape(-1, wide.shape[-1]), targets.reshape(-1), reduction="none")
    return nats.reshape(targets.shape)


class CrossEntropy(BaseLoss, frozen=True, tag="cross_entropy"):
    """Next-token cross-entropy, plus what label smoothing and a z-loss add to it.

    label_smoothing s gives (1 - s) of the weight to the target and s / V to every token (Szegedy
    et al. 2016, arXiv 1512.00567, section 7). z_loss adds z_loss * (log sum_v exp(logits_v))^2: it
    keeps logits from drifting (Chowdhery et al. 2022, arXiv 2204.02311, section 5: 1e-4).
    """

    objective: ClassVar[ObjectiveName] = "supervised"
    formats: ClassVar[tuple[str, ...]] = ("instruct", "chat", "text")

    # share of the target's weight that goes to all tokens alike: more makes a model less sure
    label_smoothing: Fraction = 0.0
    # weight of the squared log of softmax's denominator, in nats: more holds it nearer to 0
    z_loss: NonNegativeFloat = 0.0

    def __call__(self, logits: Logits, targets: Int[Tensor, "*rows"]) -> Nats:
        """Loss in nats, one value a row."""
        if self.label_smoothing == 0.0 and self.z_loss == 0.0:
            return cross_entropy(logits, targets)
        wide = widen(logits)
        log_z = wide.logsumexp(-1)
        on_target = wide.gather(-1, targets[..., None].long()).squeeze(-1)
        s = self.label_smoothing
        return log_z - (1 - s) * on_target - s * wide.mean(-1) + self.z_loss * log_z.square()

"""Losses: each a pure function of logits and, under it, the struct that a program writes; the union below is the registry."""

import msgspec
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor


def cross_entropy(logits: Float[Tensor, "*rows V"], targets: Int[Tensor, "*rows"]) -> Float[Tensor, "*rows"]:
    """log sum_v exp(logits_v) - logits_target, in nats, computed in float32 or wider, one value a row; nothing is averaged."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    nats = F.cross_entropy(wide.reshape(-1, wide.shape[-1]), targets.reshape(-1), reduction="none")
    return nats.reshape(targets.shape)


class CrossEntropy(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="cross_entropy", tag_field="kind"):
    """Next-token cross-entropy."""

    def __call__(self, logits: Float[Tensor, "*rows V"], targets: Int[Tensor, "*rows"]) -> Float[Tensor, "*rows"]:
        """The loss in nats, one value a row."""
        return cross_entropy(logits, targets)


Loss = CrossEntropy

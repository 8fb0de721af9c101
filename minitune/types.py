"""The nouns that every floor shares, and the one glossary of shape letters.

    B  batch (rows)        T  tokens in a row       V  vocabulary
    D  d_model             F  d_ff                  R  LoRA rank
    N  attention heads     K  key/value heads       E  d_head
    S  keys that can be attended to (cached + new)  n  labelled rows

Params are flat and keep Hugging Face names and [out, in] layout: "model.layers.0.self_attn.q_proj.weight".
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple, Union

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float, Int
from torch import Tensor


class InputError(ValueError):
    """What a user wrote or pointed at is wrong; the command line prints the message alone, without a traceback."""


class Delta(NamedTuple):
    """A low-rank change of one weight W [out, in]: W + b @ a (the rule that owns it holds the scale)."""

    a: Float[Tensor, "R in"]
    b: Float[Tensor, "out R"]


Params = Mapping[str, Tensor]
Deltas = Mapping[str, Delta]
Trainable = Mapping[str, Union[Tensor, Delta]]  # a tensor replaces the weight of its name, a Delta adapts it
Metrics = dict[str, Tensor]
NO_DELTAS: Deltas = MappingProxyType({})


class Batch(NamedTuple):
    """Rows of tokens: segment_ids 0 is padding, else a document's number in its row; loss_mask: tokens[b, t] is a target."""

    tokens: Int[Tensor, "B T"]
    segment_ids: Int[Tensor, "B T"]
    loss_mask: Bool[Tensor, "B T"]

    def labelled(self) -> Bool[Tensor, "B T"]:
        """The targets that can be predicted: loss_mask, less every document's first token and padding."""
        follows = (self.segment_ids[:, 1:] == self.segment_ids[:, :-1]) & (self.segment_ids[:, 1:] > 0)
        return torch.cat([torch.zeros_like(self.loss_mask[:, :1]), self.loss_mask[:, 1:] & follows], dim=1)


class Mean(NamedTuple):
    """A mean that is not divided yet: so that ranks and micro-batches can be summed and divided once."""

    total: Float[Tensor, ""]
    weight: Float[Tensor, ""]

    @staticmethod
    def of(x: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"]) -> "Mean":
        """Sum of x where mask, and how many; x may hold anything, NaN included, where mask is False."""
        return Mean(torch.where(mask, x, 0.0).sum(), mask.sum().to(x.dtype))

    def over_ranks(self) -> "Mean":
        """The mean over every rank's elements: totals and weights summed."""
        return Mean(*over_ranks(torch.stack([self.total, self.weight])).unbind())

    def value(self) -> Float[Tensor, ""]:
        """total / weight, and 0 for an empty mean (whose total is 0)."""
        return self.total / torch.where(self.weight > 0, self.weight, 1.0)


def over_ranks(x: Tensor) -> Tensor:
    """The sum of x over all ranks of the default process group; x itself in a single process. Not differentiable."""
    if not (dist.is_available() and dist.is_initialized()):
        return x
    summed = x.detach().clone()
    dist.all_reduce(summed)
    return summed

"""One attention: causal or by a mask, with fewer key heads than query heads."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from minitune.grad import under_transform


def attention(
    q: Float[Tensor, "B N T E"],
    k: Float[Tensor, "B K S E"],
    v: Float[Tensor, "B K S E"],
    mask: Bool[Tensor, "#B 1 T S"] | None,
) -> Float[Tensor, "B N T E"]:
    """softmax(q k^T / sqrt(E)) v over the keys where mask is True, or over keys s <= t when it is None.

    Query head n reads key head n // (N / K) (Ainslie et al. 2023, arXiv 2305.13245, section 2.2).
    Every query needs one visible key.
    """
    groups = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(groups, dim=1) if groups > 1 else x for x in (k, v))
    if not under_transform():
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
    # torch's fused kernels have no batching rule: under vmap they become a slow loop over examples
    if mask is None:
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()[None, None]
    scores = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).masked_fill(~mask, -torch.inf)
    return torch.softmax(scores, dim=-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype) @ v


def document_mask(segment_ids: Int[Tensor, "B T"]) -> Bool[Tensor, "B 1 T T"]:
    """True where key s <= query t and both lie in the same document; padding (0) sees padding only."""
    same = segment_ids[:, :, None] == segment_ids[:, None, :]
    return same.tril()[:, None]


def document_positions(segment_ids: Int[Tensor, "B T"]) -> Int[Tensor, "B T"]:
    """Each token's position within its own document, from 0."""
    index = torch.arange(segment_ids.shape[1], device=segment_ids.device)
    changed = torch.cat([torch.ones_like(segment_ids[:, :1]), segment_ids[:, 1:] - segment_ids[:, :-1]], dim=1) != 0
    starts = torch.where(changed, index, 0).cummax(dim=1).values
    return index - starts

"""Attention of each query over a run of keys that ends at itself, with fewer key heads than query heads."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from minitune.autodiff.value_and_grad import under_transform
from minitune.nn.attention import blockwise, flex
from minitune.nn.attention.key_range import KeyRange
from minitune.types import wide_dtype


def attention(
    q: Float[Tensor, "B N T E"],
    k: Float[Tensor, "B K S E"],
    v: Float[Tensor, "B K S E"],
    key_range: KeyRange,
    *,
    scale: float | None = None,
    soft_cap: float | None = None,
    sinks: Float[Tensor, "N"] | None = None,
) -> Float[Tensor, "B N T E"]:
    """softmax(scale q k^T) v over the keys that each query sees; scale None is 1 / sqrt(E).

    Query head n reads key head n // (N / K) (Ainslie et al. 2023, arXiv 2305.13245, section 2.2). soft_cap c turns each scaled
    score x into c tanh(x / c) (Gemma 2, arXiv 2408.00118, section 2). sinks: one more score a head, whose weight goes nowhere
    (gpt-oss, arXiv 2508.10925, section 2.2).
    """
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    first = key_range.first.expand(len(q), -1) if isinstance(key_range.first, Tensor) else None
    if flex.serves(q, k):
        return flex.attend(q, k, v, first, sinks, scale=factor, soft_cap=soft_cap)
    if q.device.type == "cpu" and q.shape[2] == k.shape[2] and not under_transform():  # no cache: a query's place is its own
        return blockwise.attend(q, k, v, first, sinks, scale=factor, soft_cap=soft_cap)
    if soft_cap is None and sinks is None and not under_transform():
        whole = not isinstance(key_range.first, Tensor) and q.shape[2] == k.shape[2]
        mask = None if whole else key_range.mask(k.shape[2])
        grouped = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=whole, scale=factor, enable_gqa=grouped)
    # torch's fused kernels know neither caps nor sinks, and have no batching rule: under vmap they loop over examples
    groups = q.shape[1] // k.shape[1]
    scores = (q.unflatten(1, (-1, groups)) @ k.unsqueeze(2).transpose(-1, -2)).flatten(1, 2) * factor
    if soft_cap is not None:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    scores = scores.masked_fill(~key_range.mask(k.shape[2]), -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(scores.dtype)[None, :, None, None].expand(*scores.shape[:3], 1)], dim=-1)
    weights = torch.softmax(scores, dim=-1, dtype=wide_dtype(q.dtype)).to(q.dtype)
    return (weights[..., : k.shape[2]].unflatten(1, (-1, groups)) @ v.unsqueeze(2)).flatten(1, 2)

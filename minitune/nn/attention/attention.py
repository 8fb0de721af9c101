"""Attention of each query over a run of keys that ends at itself, with fewer key heads than query
heads.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from minitune.autodiff.value_and_grad import under_transform
from minitune.hardware import profiled
from minitune.nn.attention import blockwise, flex
from minitune.nn.attention.key_range import KeyRange
from minitune.types import wide_dtype

# devices of blockwise attention: on meta a step for an accelerator is planned, and blocks keep what
# flex keeps
BLOCKWISE = ("cpu", "meta")


@profiled("attention")
def attention(
    q: Float[Tensor, "B N T E"],
    k: Float[Tensor, "B K S E"],
    v: Float[Tensor, "B K S Ev"],
    key_range: KeyRange,
    *,
    scale: float | None = None,
    soft_cap: float | None = None,
    sinks: Float[Tensor, "N"] | None = None,
) -> Float[Tensor, "B N T Ev"]:
    """softmax(scale q k^T) v over the keys that each query sees (Vaswani et al. 2017, arXiv
    1706.03762, eq. 1).

    scale None is 1 / sqrt(E). Query head n reads key head n // (N / K) (Ainslie et al. 2023, arXiv
    2305.13245, section 2.2). Values may have another width than queries and keys. soft_cap c turns
    each scaled score x into c tanh(x / c) (Gemma 2, arXiv 2408.00118, section 2). sinks: one more
    score a head, whose weight goes nowhere (gpt-oss, arXiv 2508.10925, section 2.2).
    """
    factor: float = q.shape[-1] ** -0.5 if scale is None else scale
    if torch.compiler.is_exporting():  # for programs that know none of the operators below
        return _with_whole_scores(q, k, v, key_range, factor, soft_cap, sinks)
    n_queries, n_keys = q.shape[2], k.shape[2]

    # without a cache a query's place is its own, which these two count on
    first = key_range.first.expand(len(q), -1) if isinstance(key_range.first, Tensor) else None
    if flex.serves(q, k, v):
        return flex.attend(q, k, v, first, sinks, scale=factor, soft_cap=soft_cap)
    if q.device.type in BLOCKWISE and n_queries == n_keys and not under_transform():
        return blockwise.attend(q, k, v, first, sinks, scale=factor, soft_cap=soft_cap)

    # torch's fused kernels know neither caps nor sinks, and have no batching rule: under vmap they
    # loop over examples
    if soft_cap is None and sinks is None and not under_transform():
        is_causal = first is None and n_queries == n_keys
        mask = None if is_causal else key_range.mask(n_keys)
        has_groups = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=is_causal, scale=factor, enable_gqa=has_groups
        )
    return _with_whole_scores(q, k, v, key_range, factor, soft_cap, sinks)


def _with_whole_scores(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_range: KeyRange,
    scale: float,
    soft_cap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attention by its definition, which holds the scores of all queries and keys."""
    groups, n_keys = q.shape[1] // k.shape[1], k.shape[2]
    scores = (q.unflatten(1, (-1, groups)) @ k.unsqueeze(2).transpose(-1, -2)).flatten(1, 2) * scale
    if soft_cap is not None:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    scores = scores.masked_fill(~key_range.mask(n_keys), -torch.inf)
    if sinks is not None:
        sink_scores = sinks.to(scores.dtype)[None, :, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sink_scores], dim=-1)
    weights = torch.softmax(scores, dim=-1, dtype=wide_dtype(q.dtype)).to(q.dtype)
    return (weights[..., :n_keys].unflatten(1, (-1, groups)) @ v.unsqueeze(2)).flatten(1, 2)

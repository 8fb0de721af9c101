"""One attention: causal or by a mask, with fewer key heads than query heads; and the masks of packed and windowed rows."""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from minitune import blockwise
from minitune.grad import under_transform


def attention(
    q: Float[Tensor, "B N T E"],
    k: Float[Tensor, "B K S E"],
    v: Float[Tensor, "B K S E"],
    mask: Bool[Tensor, "#B 1 T S"] | None,
    *,
    scale: float | None = None,
    soft_cap: float | None = None,
    sinks: Float[Tensor, "N"] | None = None,
) -> Float[Tensor, "B N T E"]:
    """softmax(scale q k^T) v over the keys where mask is True, or over keys s <= t when it is None; scale None is 1 / sqrt(E).

    Query head n reads key head n // (N / K) (Ainslie et al. 2023, arXiv 2305.13245, section 2.2). soft_cap c turns each scaled
    score x into c tanh(x / c) (Gemma 2, arXiv 2408.00118, section 2). sinks: one more score a head, whose weight goes nowhere
    (gpt-oss, arXiv 2508.10925, section 2.2). Every query needs one visible key.
    """
    plain = soft_cap is None and sinks is None and not under_transform()
    if plain and mask is not None and q.device.type == "cpu" and q.shape[2] == k.shape[2]:
        blocks = blockwise.runs(mask, len(q))
        if blocks is not None:
            return blockwise.attend(q, k, v, *blocks, q.shape[-1] ** -0.5 if scale is None else scale)
    groups = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(groups, dim=1) if groups > 1 else x for x in (k, v))
    if plain:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale)
    # torch's fused kernels know neither caps nor sinks, and have no batching rule: under vmap they loop over examples
    if mask is None:
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()[None, None]
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if soft_cap is not None:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    scores = scores.masked_fill(~mask, -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(scores.dtype)[None, :, None, None].expand(*scores.shape[:3], 1)], dim=-1)
    weights = torch.softmax(scores, dim=-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype)
    return weights[..., : k.shape[2]] @ v


def document_mask(segment_ids: Int[Tensor, "B T"]) -> Bool[Tensor, "B 1 T T"]:
    """True where key s <= query t and both lie in the same document; padding (0) sees padding only."""
    same = segment_ids[:, :, None] == segment_ids[:, None, :]
    return same.tril()[:, None]


def document_positions(segment_ids: Int[Tensor, "B T"]) -> Int[Tensor, "B T"]:
    """Each token's position within its own document, from 0."""
    index = torch.arange(segment_ids.shape[1], device=segment_ids.device)
    return index - _starts(segment_ids, index)


def document_lengths(segment_ids: Int[Tensor, "B T"]) -> Int[Tensor, "B T"]:
    """How many tokens the document of each token has."""
    index = torch.arange(segment_ids.shape[1], device=segment_ids.device)
    back = _starts(segment_ids.flip(1), index).flip(1)  # of the row read backwards: each document's last token
    return segment_ids.shape[1] - back - _starts(segment_ids, index)


def window_mask(
    mask: Bool[Tensor, "B 1 T S"] | None, filled: int, length: int, window: int, device: torch.device
) -> Bool[Tensor, "#B 1 T S"] | None:
    """The mask (None: causal) less the keys that lie `window` tokens or more before a query; the first query is slot `filled`.

    A query sees `window` keys, itself included (Beltagy et al. 2020, arXiv 2004.05150, figure 2b, causal).
    """
    ages = _ages(mask, filled, length, device)
    return _narrowed(mask, ages, (ages < window)[None, None]) if ages.shape[1] > window else mask


def chunk_mask(
    mask: Bool[Tensor, "B 1 T S"] | None, filled: int, positions: Int[Tensor, "b T"], chunk: int
) -> Bool[Tensor, "#B 1 T S"] | None:
    """The mask (None: causal) less the keys of other chunks than the query's: positions p with another p // chunk."""
    ages = _ages(mask, filled, positions.shape[1], positions.device)
    at = positions[:, None, :, None]
    return _narrowed(mask, ages, (at - ages) // chunk == at // chunk) if ages.shape[1] > chunk else mask


def _starts(segment_ids: Tensor, index: Tensor) -> Tensor:
    changed = torch.cat([torch.ones_like(segment_ids[:, :1]), segment_ids[:, 1:] - segment_ids[:, :-1]], dim=1) != 0
    return torch.where(changed, index, 0).cummax(dim=1).values


def _ages(mask: Tensor | None, filled: int, length: int, device: torch.device) -> Tensor:
    """[T S] how many tokens each key lies before each query."""
    n_keys = length if mask is None else mask.shape[-1]
    return torch.arange(filled, filled + length, device=device)[:, None] - torch.arange(n_keys, device=device)


def _narrowed(mask: Tensor | None, ages: Tensor, seen: Tensor) -> Tensor:
    return seen & (ages >= 0 if mask is None else mask)

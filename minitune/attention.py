"""One attention: each query over a run of keys that ends at itself, with fewer key heads than query heads; and such runs."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from minitune import blockwise, flex
from minitune.grad import under_transform


class KeyRange(NamedTuple):
    """Keys that each query attends to: positions first .. last without a gap, neither of which falls along a row.

    Causal rows, packed documents, windows, chunks and padding are all of this kind.
    """

    first: Int[Tensor, "b T"] | tuple[()]  # (): the first key of all
    last: Int[Tensor, "b T"]  # the query's own place

    def starts(self) -> Int[Tensor, "b T"]:
        """The first key of every query."""
        return self.first if isinstance(self.first, Tensor) else torch.zeros_like(self.last)

    def mask(self, n_keys: int) -> Bool[Tensor, "b 1 T {n_keys}"]:
        """True where a query sees a key."""
        keys = torch.arange(n_keys, device=self.last.device)
        return ((keys >= self.starts()[..., None]) & (keys <= self.last[..., None]))[:, None]


def causal(n_tokens: int, device: torch.device) -> KeyRange:
    """Every token sees itself and all before it."""
    return KeyRange((), torch.arange(n_tokens, device=device)[None])


def documents(segment_ids: Int[Tensor, "B T"]) -> KeyRange:
    """Every token sees itself and what comes before it in its own document; padding (0) sees padding only."""
    index = torch.arange(segment_ids.shape[1], device=segment_ids.device)
    return KeyRange(_starts(segment_ids, index), index[None])


def windowed(key_range: KeyRange, window: int) -> KeyRange:
    """Of what each query sees the last `window` keys, itself included (Beltagy et al. 2020, arXiv 2004.05150, figure 2b)."""
    return key_range._replace(first=torch.maximum(key_range.starts(), key_range.last - (window - 1)))


def chunked(key_range: KeyRange, positions: Int[Tensor, "b T"], chunk: int) -> KeyRange:
    """Of what each query sees the keys of its own chunk: those whose position p has the same p // chunk."""
    return key_range._replace(first=torch.maximum(key_range.starts(), key_range.last - positions % chunk))


def document_positions(segment_ids: Int[Tensor, "B T"]) -> Int[Tensor, "B T"]:
    """Each token's position within its own document, from 0."""
    index = torch.arange(segment_ids.shape[1], device=segment_ids.device)
    return index - _starts(segment_ids, index)


def document_lengths(segment_ids: Int[Tensor, "B T"]) -> Int[Tensor, "B T"]:
    """How many tokens the document of each token has."""
    index = torch.arange(segment_ids.shape[1], device=segment_ids.device)
    back = _starts(segment_ids.flip(1), index).flip(1)  # of the row read backwards: each document's last token
    return segment_ids.shape[1] - back - _starts(segment_ids, index)


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
    weights = torch.softmax(scores, dim=-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype)
    return (weights[..., : k.shape[2]].unflatten(1, (-1, groups)) @ v.unsqueeze(2)).flatten(1, 2)


def _starts(segment_ids: Tensor, index: Tensor) -> Tensor:
    changed = torch.cat([torch.ones_like(segment_ids[:, :1]), segment_ids[:, 1:] - segment_ids[:, :-1]], dim=1) != 0
    return torch.where(changed, index, 0).cummax(dim=1).values

"""Attention by plain sums, and what queries may see in packed rows."""

import torch

from minitune.nn.attention.key_range import KeyRange, causal, chunked, document_keys, windowed


def plain(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keys: KeyRange, scale: float, cap: float | None, sinks: torch.Tensor | None
) -> torch.Tensor:
    groups = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
    scores = scale * q @ k.mT
    scores = scores if cap is None else cap * torch.tanh(scores / cap)
    scores = scores.masked_fill(~keys.mask(k.shape[2]), -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks[None, :, None, None].expand(*scores.shape[:3], 1)], -1)
    return scores.softmax(-1)[..., : k.shape[2]] @ v


def runs(kind: str, rows: int, length: int, reach: int, share: float, generator: torch.Generator) -> KeyRange:
    """What queries see: documents that end at a token with probability `share`, a window or chunk of `reach` keys in them."""
    segments = 1 + (torch.rand(rows, length, generator=generator) < share).cumsum(1)
    if kind == "padding":
        real = torch.randint(0, length + 1, (rows, 1), generator=generator)
        segments = torch.where(torch.arange(length) < real, segments, 0)
    keys = causal(length, torch.device("cpu")) if kind == "causal" else document_keys(segments)
    if kind == "windows":
        return windowed(keys, reach)
    return chunked(keys, reach) if kind == "chunks" else keys

"""Attention in blocks of queries for processors without a fused kernel that is worth its name.

Every query sees a contiguous run of keys that ends at itself: from the start of its document, or of its window. So a block of
queries needs the keys between the earliest start and its own end, and no more; what lies outside is never computed.
"""

from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK = 64  # queries; their scores against the keys that they need then stay in a core's cache
DENSE = 0.4  # share of all scores from which the fused kernel is as fast: it computes every one, and fast

Run = tuple[int, int, int]  # (first key, first query, end) of a block of queries


def runs(mask: Bool[Tensor, "#B 1 T T"], n_rows: int) -> tuple[Int[Tensor, "B T"], list[list[Run]]] | None:
    """(first key that each query sees, the blocks of every row), or None where blocks would not pay: a mask with gaps, or one
    that leaves most scores standing."""
    seen, length = mask[:, 0], mask.shape[-1]
    first = seen.to(torch.uint8).argmax(-1)
    at = torch.arange(length, device=mask.device)
    starts = range(0, length, BLOCK)
    rows = [[(int(row[i : i + BLOCK].min()), i, min(i + BLOCK, length)) for i in starts] for row in first]
    n_scores = sum((end - start) * (end - lo) for row in rows for lo, start, end in row)
    if n_scores > DENSE * seen.numel() or not bool((seen.sum(-1) == at - first + 1).all() & seen.diagonal(dim1=1, dim2=2).all()):
        return None
    return first.expand(n_rows, -1), rows * (n_rows // len(rows))


def attend(
    q: Float[Tensor, "B N T E"],
    k: Float[Tensor, "B K T E"],
    v: Float[Tensor, "B K T E"],
    first: Int[Tensor, "B T"],
    rows: list[list[Run]],
    scale: float,
) -> Float[Tensor, "B N T E"]:
    """softmax(scale q k^T) v, query t over the keys first[t] .. t; query head n reads key head n // (N / K), never repeated.

    The backward computes the probabilities again from the log of their sum (Dao et al. 2022, arXiv 2205.14135, algorithm 4).
    """
    return _Attend.apply(q, k, v, first, rows, scale)[0]


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, first: Tensor, blocks: Any, scale: float) -> tuple[Tensor, Tensor]:
        rows, sums = [], []
        for b, one in enumerate(_grouped(q, k)):
            parts = []
            for lo, start, end in blocks[b]:
                scores = _scores(one, k[b], first[b], lo, start, end, scale)
                top = scores.amax(-1, keepdim=True)
                weights = torch.exp(scores - top)
                total = weights.sum(-1, keepdim=True)
                out = (weights / total).to(q.dtype).flatten(1, 2) @ v[b, :, lo:end]
                parts.append((out.unflatten(1, weights.shape[1:3]), (top + total.log()).squeeze(-1)))
            rows.append(torch.cat([out for out, _ in parts], dim=2).flatten(0, 1))
            sums.append(torch.cat([total for _, total in parts], dim=2).flatten(0, 1))
        return torch.stack(rows), torch.stack(sums)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        *tensors, ctx.blocks, ctx.scale = inputs
        ctx.save_for_backward(*tensors, *output)
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        q, k, v, first, out, sums = ctx.saved_tensors
        d_out = grad_outputs[0]
        assert d_out is not None, "only the first output takes part in a loss"
        wide = torch.promote_types(q.dtype, torch.float32)
        inner = (out.to(wide) * d_out.to(wide)).sum(-1)  # [B N T]
        grads = []
        n_groups = q.shape[1] // k.shape[1]
        for b, (one, up) in enumerate(zip(_grouped(q, k), _grouped(d_out, k), strict=True)):
            parts, d_keys, d_values = [], [], []
            total, mean = (x[b].unflatten(0, (-1, n_groups)) for x in (sums, inner))
            for lo, start, end in ctx.blocks[b]:
                here = slice(start, end)
                weights = torch.exp(_scores(one, k[b], first[b], lo, start, end, ctx.scale) - total[:, :, here, None])
                d_block = up[:, :, here].flatten(1, 2)
                d_weights = (d_block @ v[b, :, lo:end].mT).unflatten(1, weights.shape[1:3])
                d_scores = (weights * (d_weights - mean[:, :, here, None]) * ctx.scale).to(q.dtype).flatten(1, 2)
                parts.append((d_scores @ k[b, :, lo:end]).unflatten(1, weights.shape[1:3]))
                pad = (0, 0, lo, q.shape[2] - end)
                d_keys.append(F.pad((d_scores.mT @ one[:, :, here].flatten(1, 2)).to(wide), pad))
                d_values.append(F.pad((weights.to(q.dtype).flatten(1, 2).mT @ d_block).to(wide), pad))
            summed = (reduce(torch.add, d_keys), reduce(torch.add, d_values))
            grads.append((torch.cat(parts, dim=2).flatten(0, 1), *(x.to(q.dtype) for x in summed)))
        d_q, d_k, d_v = (torch.stack(x) for x in zip(*grads, strict=True))
        return d_q, d_k, d_v, None, None, None


def _grouped(q: Tensor, k: Tensor) -> Tensor:
    """[B N T E] as [B K G T E]: the queries beside the key head that they read."""
    return q.unflatten(1, (k.shape[1], -1))


def _scores(q: Tensor, k: Tensor, first: Tensor, lo: int, start: int, end: int, scale: float) -> Float[Tensor, "K G block keys"]:
    """scale q k^T in float32 or wider, -inf where a query does not see a key."""
    block = q[:, :, start:end]
    scores = (block.flatten(1, 2) @ k[:, lo:end].mT).unflatten(1, block.shape[1:3])
    at = torch.arange(lo, end, device=q.device)
    seen = (at >= first[start:end, None]) & (at <= torch.arange(start, end, device=q.device)[:, None])
    return torch.where(seen, scores.to(torch.promote_types(q.dtype, torch.float32)) * scale, -torch.inf)

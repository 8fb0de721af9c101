"""Attention inside a compiled block on CUDA: torch's flex_attention, told which blocks of keys each block of queries needs.

Every query sees a run of keys that ends at itself. So a block of queries needs the blocks of keys from the earliest start of its
queries to its own place; those behind the latest start, its own left out, are seen whole. Two numbers a block are all that is
made of the mask, and the kernel asks for single places only in blocks that are seen in part (Dong et al. 2024, arXiv 2412.05496,
section 3).
"""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from minitune.autodiff.value_and_grad import under_transform

BLOCK = 128  # queries or keys; flex_attention's own default, a multiple of every tile that its kernels take
D_HEAD = range(16, 257)  # sizes of a head that its kernels take
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def serves(q: Float[Tensor, "B N T E"], k: Float[Tensor, "B K S E"]) -> bool:
    """Whether `attend` is the way for these: traced by torch.compile (run as it is, flex_attention makes all scores), on CUDA, as
    many keys as queries, of sizes and a dtype that its kernels take, under no transform, for which it has no rule."""
    fits = q.shape[-1] in D_HEAD and q.dtype in DTYPES and q.shape[2] == k.shape[2]
    return torch.compiler.is_compiling() and q.device.type == "cuda" and fits and not under_transform()


def attend(
    q: Float[Tensor, "B N T E"],
    k: Float[Tensor, "B K T E"],
    v: Float[Tensor, "B K T E"],
    first: Int[Tensor, "B T"] | None,
    sinks: Float[Tensor, "N"] | None,
    *,
    scale: float,
    soft_cap: float | None,
) -> Float[Tensor, "B N T E"]:
    """softmax(scale q k^T) v, query t over the keys first[t] .. t (None: 0 .. t); query head n reads key head n // (N / K), which
    is never repeated. A soft cap c turns a scaled product x into c tanh(x / c); a sink is one more score of its head, whose
    weight goes nowhere."""

    def capped(score: Tensor, *place: Tensor) -> Tensor:
        return score if soft_cap is None else soft_cap * torch.tanh(score / soft_cap)

    score_mod, seen = None if soft_cap is None else capped, block_mask(first, q.shape[2], q.device)
    grouped, asked = q.shape[1] != k.shape[1], AuxRequest(lse=sinks is not None)
    out, aux = flex_attention(q, k, v, score_mod, seen, scale, grouped, return_aux=asked)
    return out if sinks is None or aux.lse is None else with_sinks(out, aux.lse, sinks)


def with_sinks(out: Float[Tensor, "B N T E"], lse: Float[Tensor, "B N T"], sinks: Float[Tensor, "N"]) -> Float[Tensor, "B N T E"]:
    """What attention gives when each head has one more score s, whose weight goes nowhere: out sigmoid(lse - s), where lse is the
    log of the sum of the exponentials of all other scores (gpt-oss, arXiv 2508.10925, section 2.2): e^lse / (e^lse + e^s)."""
    kept = torch.sigmoid(lse - sinks.to(lse.dtype)[:, None])[..., None]
    return (out * kept).to(out.dtype)


def block_mask(first: Int[Tensor, "B T"] | None, n_tokens: int, device: torch.device) -> BlockMask:
    """The blocks of keys that each block of queries needs, those seen whole told apart, and the same turned round. Query t sees
    the keys first[t] .. t, or 0 .. t where first is None; first never falls along a row. Shapes depend on B and T alone."""
    starts = torch.zeros(1, n_tokens, dtype=torch.long, device=device) if first is None else first
    lowest, whole = blocks(starts)
    places = torch.arange(lowest.shape[1], device=device)
    own = places.expand_as(lowest)
    # of a block of keys the first block of queries behind it that no longer needs it, and that no longer sees it whole
    end, whole_end = ((x[:, :, None] <= places).sum(1) for x in (lowest, whole))
    lists = (  # (how many, which): they are runs, and the block itself
        (whole - lowest + 1, torch.where(places < (whole - lowest)[..., None], lowest[..., None] + places, own[..., None])),
        (own - whole, whole[..., None] + places),
        (end - whole_end + 1, torch.where(places < 1, own[..., None], whole_end[..., None] + places - 1)),
        (whole_end - own - 1, own[..., None] + 1 + places),
    )
    part, rest, seeing, seeing_whole = (
        (n.to(torch.int32)[:, None].contiguous(), which.clamp(max=lowest.shape[1] - 1).to(torch.int32)[:, None].contiguous())
        for n, which in lists
    )
    size, sees = (n_tokens, n_tokens), _sees(first)
    return BlockMask(size, *part, *rest, *seeing, *seeing_whole, (BLOCK, BLOCK), sees)


def blocks(first: Int[Tensor, "B T"]) -> tuple[Int[Tensor, "B blocks"], Int[Tensor, "B blocks"]]:
    """(the first block of keys that each block of queries needs, the first that all of its queries see whole); its own if none.

    Like torch's own, a last block of fewer queries sees none whole.
    """
    n_tokens = first.shape[1]
    own = torch.arange((n_tokens + BLOCK - 1) // BLOCK, device=first.device)
    last = own * BLOCK + BLOCK - 1
    whole = torch.minimum((first[:, last.clamp(max=n_tokens - 1)] + BLOCK - 1) // BLOCK, own)
    return first[:, own * BLOCK] // BLOCK, torch.where(last < n_tokens, whole, own)


def _sees(first: Tensor | None) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    def causal(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return key <= query

    if first is None:
        return causal

    def run(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (key >= first[row, query])

    return run

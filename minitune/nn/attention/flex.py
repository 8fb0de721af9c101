"""Attention inside a compiled block on CUDA: torch's flex_attention, given the blocks of keys that
each block of queries needs.

Every query sees a run of keys that ends at itself. So a block of queries needs the blocks of keys
from the earliest start of its queries to its own place; those behind the latest start, the
diagonal block left out, are seen whole. Two numbers a block are all that is made of the mask, and
the kernel asks for single places only in blocks that are seen in part (Dong et al. 2024, arXiv
2412.05496, section 3).
"""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from minitune.autodiff.value_and_grad import under_transform

# queries or keys; the default of flex_attention, a multiple of every tile that its kernels take
BLOCK = 128
D_HEAD = range(16, 257)  # sizes of a head that its kernels take
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def serves(
    q: Float[Tensor, "B N T E"], k: Float[Tensor, "B K S E"], v: Float[Tensor, "B K S Ev"]
) -> bool:
    """True if flex_attention can run here.

    Under torch.compile (in eager mode it makes all scores), CUDA, as many queries as keys,
    supported head sizes and dtype, and no functorch transform, for which it has no rule.
    """
    fits = (
        q.shape[-1] in D_HEAD
        and v.shape[-1] in D_HEAD
        and q.dtype in DTYPES
        and q.shape[2] == k.shape[2]
    )
    return (
        torch.compiler.is_compiling() and q.device.type == "cuda" and fits and not under_transform()
    )


def attend(
    q: Float[Tensor, "B N T E"],
    k: Float[Tensor, "B K T E"],
    v: Float[Tensor, "B K T Ev"],
    first: Int[Tensor, "B T"] | None,
    sinks: Float[Tensor, "N"] | None,
    *,
    scale: float,
    soft_cap: float | None,
) -> Float[Tensor, "B N T Ev"]:
    """Attention as `attention.attention` defines it, query t over the keys first[t] .. t (None: 0
    .. t).
    """

    def capped(score: Tensor, *place: Tensor) -> Tensor:
        return score if soft_cap is None else soft_cap * torch.tanh(score / soft_cap)

    score_mod = None if soft_cap is None else capped
    mask = block_mask(first, q.shape[2], q.device)
    has_groups = q.shape[1] != k.shape[1]
    aux_request = AuxRequest(lse=sinks is not None)
    out, aux = flex_attention(q, k, v, score_mod, mask, scale, has_groups, return_aux=aux_request)
    return out if sinks is None or aux.lse is None else with_sinks(out, aux.lse, sinks)


def with_sinks(
    out: Float[Tensor, "B N T Ev"], lse: Float[Tensor, "B N T"], sinks: Float[Tensor, "N"]
) -> Float[Tensor, "B N T Ev"]:
    """Attention when each head has one more score s, whose weight goes nowhere: out sigmoid(lse -
    s).

    lse is the log of the sum of the exponentials of all other scores (gpt-oss, arXiv 2508.10925,
    section 2.2): e^lse / (e^lse + e^s) is the weight that is left for them.
    """
    kept = torch.sigmoid(lse - sinks.to(lse.dtype)[:, None])[..., None]
    return (out * kept).to(out.dtype)


def block_mask(first: Int[Tensor, "B T"] | None, n_tokens: int, device: torch.device) -> BlockMask:
    """Blocks of keys that each block of queries sees, in part or whole, and the blocks of queries
    that see each block of keys.

    Query t sees the keys first[t] .. t, or 0 .. t where first is None; first never falls along a
    row. Shapes depend on B and T alone.
    """
    starts = torch.zeros(1, n_tokens, dtype=torch.long, device=device) if first is None else first
    lowest, whole = first_blocks(starts)
    n_blocks = lowest.shape[1]
    index = torch.arange(n_blocks, device=device)
    diagonal = index.expand_as(lowest)

    # of a block of queries: lowest .. whole - 1 and the diagonal are seen in part, whole ..
    # diagonal - 1 are seen whole
    n_before = whole - lowest
    keys_in_part = torch.where(
        index < n_before[..., None], lowest[..., None] + index, diagonal[..., None]
    )
    keys_whole = whole[..., None] + index

    # of a block of keys: the first block of queries behind it that does not see it whole, and the
    # first that does not need it
    whole_end = (whole[:, :, None] <= index).sum(1)
    end = (lowest[:, :, None] <= index).sum(1)
    queries_in_part = torch.where(index < 1, diagonal[..., None], whole_end[..., None] + index - 1)
    queries_whole = diagonal[..., None] + 1 + index

    return BlockMask(
        (n_tokens, n_tokens),
        *_listed(n_before + 1, keys_in_part),
        *_listed(diagonal - whole, keys_whole),
        *_listed(end - whole_end + 1, queries_in_part),
        *_listed(whole_end - diagonal - 1, queries_whole),
        (BLOCK, BLOCK),
        _mask_mod(first),
    )


def _listed(
    count: Int[Tensor, "B blocks"], which: Int[Tensor, "B blocks blocks"]
) -> tuple[Tensor, Tensor]:
    """(how many, which) blocks, as BlockMask takes them: one list for all heads."""
    # the kernels load what lies behind a list's end too, which therefore has to exist
    which = which.clamp(max=count.shape[1] - 1)
    count, which = (x.to(torch.int32)[:, None].contiguous() for x in (count, which))
    return count, which


def first_blocks(
    first: Int[Tensor, "B T"],
) -> tuple[Int[Tensor, "B blocks"], Int[Tensor, "B blocks"]]:
    """(first block of keys that each block of queries needs, first that all of its queries see
    whole).

    The latter is the diagonal block if there is none. Like torch's own, a last block of fewer
    queries sees none whole.
    """
    n_tokens = first.shape[1]
    diagonal = torch.arange((n_tokens + BLOCK - 1) // BLOCK, device=first.device)
    last = diagonal * BLOCK + BLOCK - 1
    latest_start = first[:, last.clamp(max=n_tokens - 1)]
    whole = torch.minimum((latest_start + BLOCK - 1) // BLOCK, diagonal)
    return first[:, diagonal * BLOCK] // BLOCK, torch.where(last < n_tokens, whole, diagonal)


def _mask_mod(first: Tensor | None) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Function that says if a query sees a key, for the places of blocks that are seen in part."""

    def causal(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return key <= query

    if first is None:
        return causal

    def run(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (key >= first[row, query])

    return run

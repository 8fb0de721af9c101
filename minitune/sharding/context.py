"""Context parallelism: each rank has some of the tokens of the rows that several work on.

Everything but attention looks at a token by itself. Before attention the ranks exchange tokens for
heads, so that each has all tokens of some heads, and after it heads for tokens: the all-to-all of
DeepSpeed Ulysses (Jacobs et al. 2023, arXiv 2309.14509, section 3.1). So every kernel of attention
serves as it is, with windows, caps and sinks, and each rank has as much to do.

The gradient of each exchange is its transpose, so that the sum over all ranks of what each has
found is the gradient.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from minitune.sharding.mesh import check_dealt_out
from minitune.sharding.tokens import Sharers, exchanged


def check_heads(n_heads: int, n_ranks: int) -> None:
    """InputError if heads can't be dealt out evenly to ranks that exchange tokens for them."""
    check_dealt_out("context", n_ranks, f"{n_heads} heads of queries", n_heads)


def own_heads(
    qkv: Sequence[Float[Tensor, "B _ t E"]], sharers: Sharers
) -> list[Float[Tensor, "B _ T E"]]:
    """Queries, keys and values of all tokens for the heads of this rank, from those of its tokens
    for all heads. A key head that several ranks need goes to each.
    """
    c, n_heads = len(sharers.ranks), qkv[0].shape[1]
    each = [x.repeat_interleave(_repeats(n_heads, x.shape[1], c), 1) for x in qkv]
    grouped = [x.unflatten(1, (c, -1)) for x in each]  # [B c h t E]
    sent = torch.cat(grouped, dim=2).movedim(1, 0)  # [c B h t E], by the rank that gets it
    got = exchanged(sent, sharers)  # by the rank that sent it
    whole = got.movedim(0, 2).flatten(2, 3)  # [B h T E]
    return list(whole.split([x.shape[2] for x in grouped], dim=1))


def own_tokens(y: Float[Tensor, "B h T E"], sharers: Sharers) -> Float[Tensor, "B N t E"]:
    """Attention of the tokens of this rank for all heads, from that of all tokens for its heads."""
    sent = y.unflatten(2, (len(sharers.ranks), -1)).movedim(2, 0)  # [c B h t E]
    got = exchanged(sent, sharers)
    return got.movedim(0, 1).flatten(1, 2)


def part_of_heads(x: Float[Tensor, "N"], sharers: Sharers) -> Float[Tensor, "h"]:
    """Numbers of this rank's heads among those of all."""
    # all ranks send the same, so that the part of any of them serves
    return exchanged(x.view(len(sharers.ranks), -1), sharers)[0]


def _repeats(n_heads: int, n_kv_heads: int, c: int) -> int:
    """Least number of times that each key head is repeated, so that each of c ranks has as many and
    its query heads read them in order.
    """
    repeats = range(1, n_heads // n_kv_heads + 1)
    fits = (r for r in repeats if n_kv_heads * r % c == 0 and n_heads % (n_kv_heads * r) == 0)
    return next(fits)

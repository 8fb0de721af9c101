"""Context parallelism: each rank has some of the tokens of the rows that several work on.

Everything but attention looks at a token by itself. Before attention the ranks exchange tokens for
heads, so that each has all tokens of some heads, and after it heads for tokens: the all-to-all of
DeepSpeed Ulysses (Jacobs et al. 2023, arXiv 2309.14509, section 3.1). So every kernel of attention
serves as it is, with windows, caps and sinks, and each rank has as much to do.

The gradient of each exchange is its transpose, so that the sum over all ranks of what each has
found is the gradient.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from torch.autograd.function import once_differentiable

from minitune.autodiff.operator import operator
from minitune.errors import InputError
from minitune.sharding.collectives import begin_gather, end_gather, lost_in_words, reduce_scatter
from minitune.sharding.parts import Cut


class Sharers(NamedTuple):
    """Ranks that have a part of the same tokens each, as tensors on the host: an operator and a
    recomputed function take nothing else.
    """

    ranks: Int[Tensor, "c"]
    group_name: UInt8[Tensor, "n"]  # bytes of the name of their process group

    def group(self) -> Any:
        """Process group of these ranks."""
        # the one that torch's own functional collectives use; a torch without ranks has none
        from torch._C._distributed_c10d import _resolve_process_group

        name: Any = bytes(self.group_name.tolist()).decode()
        return _resolve_process_group(name)


class ContextParallel(NamedTuple):
    """Place of one rank among those that share the tokens of their rows."""

    place: int
    sharers: Sharers

    @property
    def size(self) -> int:
        """Number of ranks."""
        return len(self.sharers.ranks)

    def n_own(self, n_tokens: int) -> int:
        """Tokens of a row that this rank has, the padding of the last rank's among them."""
        return -(-n_tokens // self.size)

    def first(self, n_tokens: int) -> int:
        """Place in its row of the first token of this rank."""
        return self.place * self.n_own(n_tokens)

    def own(self, x: Tensor, dim: int = 1) -> Tensor:
        """Part of this rank of a tensor of all tokens; zeros where the rows end before it does."""
        n = self.n_own(x.shape[dim])
        start = min(self.first(x.shape[dim]), x.shape[dim])
        part = x.narrow(dim, start, min(n, x.shape[dim] - start))
        return F.pad(part, (0, 0) * (x.ndim - 1 - dim) + (0, n - part.shape[dim]))

    def whole(self, x: Tensor, n_tokens: int) -> Tensor:
        """Tensor [B n_tokens ...] of all ranks' parts [B n_own ...]."""
        return _Whole.apply(x, self.sharers.group(), n_tokens)


def context_of(mesh: Any) -> ContextParallel | None:
    """Context of this rank on torch's mesh; None without an axis "context"."""
    names = mesh.mesh_dim_names or ()
    if "context" not in names or mesh.size(names.index("context")) == 1:
        return None
    group = mesh.get_group("context")
    ranks = torch.tensor(dist.get_process_group_ranks(group))
    name = torch.tensor([*group.group_name.encode()], dtype=torch.uint8)
    return ContextParallel(dist.get_rank(group), Sharers(ranks, name))


def check_heads(n_heads: int, n_ranks: int) -> None:
    """InputError if heads can't be dealt out evenly to ranks that exchange tokens for them."""
    fits = [n for n in range(1, n_heads + 1) if n_heads % n == 0]
    if n_ranks not in fits:
        raise InputError(
            f"sharding: the axis context has {n_ranks} ranks, among which {n_heads} heads of "
            f"queries are dealt out, expected one of {', '.join(map(str, fits))}; put the other "
            "ranks on the axis data"
        )


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
    got = _exchanged(sent.contiguous(), *sharers)  # by the rank that sent it
    whole = got.movedim(0, 2).flatten(2, 3)  # [B h T E]
    return list(whole.split([x.shape[2] for x in grouped], dim=1))


def own_tokens(y: Float[Tensor, "B h T E"], sharers: Sharers) -> Float[Tensor, "B N t E"]:
    """Attention of the tokens of this rank for all heads, from that of all tokens for its heads."""
    sent = y.unflatten(2, (len(sharers.ranks), -1)).movedim(2, 0)  # [c B h t E]
    got = _exchanged(sent.contiguous(), *sharers)
    return got.movedim(0, 1).flatten(1, 2)


def part_of_heads(x: Float[Tensor, "N"], sharers: Sharers) -> Float[Tensor, "h"]:
    """Numbers of this rank's heads among those of all."""
    # all ranks send the same, so that the part of any of them serves
    return _exchanged(x.view(len(sharers.ranks), -1), *sharers)[0]


def _repeats(n_heads: int, n_kv_heads: int, c: int) -> int:
    """Least number of times that each key head is repeated, so that each of c ranks has as many and
    its query heads read them in order.
    """
    repeats = range(1, n_heads // n_kv_heads + 1)
    fits = (r for r in repeats if n_kv_heads * r % c == 0 and n_heads % (n_kv_heads * r) == 0)
    return next(fits)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.sharers = inputs[1:]


def _gradient(ctx: Any, d_out: Tensor) -> tuple[Tensor, None, None]:
    return _exchanged(d_out.contiguous(), *ctx.sharers), None, None


@operator("minitune::exchange", _gradient, _keep)
def _exchanged(x: Tensor, ranks: Tensor, group_name: Tensor) -> Tensor:
    """Tensor [c ...] whose part i is what rank i of the group had as the part of this rank."""
    own = x.contiguous()
    got = torch.empty_like(own)
    # as bytes, because not every backend knows every dtype
    received, sent = (t.view(-1).view(torch.uint8) for t in (got, own))
    with lost_in_words():
        dist.all_to_all_single(received, sent, group=Sharers(ranks, group_name).group())
    return got


@torch.library.register_fake("minitune::exchange")
def _(x: Tensor, ranks: Tensor, group_name: Tensor) -> Tensor:
    return x.new_empty(x.shape)


class _Whole(torch.autograd.Function):
    """Tokens of all ranks; the backward sums gradients, and leaves to each rank its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any, n_tokens: int) -> Tensor:
        ctx.group, ctx.n_own, ctx.n_tokens = group, x.shape[1], n_tokens
        n = dist.get_world_size(group) * x.shape[1]
        (whole,) = end_gather(begin_gather([x], [Cut(1, n)], group))
        return whole[:, :n_tokens]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        n = dist.get_world_size(ctx.group) * ctx.n_own
        d_whole = grad_outputs[0]
        missing = d_whole.new_zeros(len(d_whole), n - ctx.n_tokens, *d_whole.shape[2:])
        padded = torch.cat([d_whole, missing], dim=1)
        (d_own,) = reduce_scatter([padded], [Cut(1, n)], ctx.group)
        return d_own.to(d_whole.dtype), None, None

"""Ranks that work on the same rows: each has some of the tokens, and they exchange activations.

Along the axis "context" of a mesh the ranks exchange tokens for heads around attention
(sharding/context.py). Along "tensor" they bring their tokens together before each linear map that
they share, and part again after it (sharding/tensor_parallel.py). Letters beside those of types: t
tokens of a row on one rank, n ranks.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from torch.autograd.function import once_differentiable

from minitune.autodiff.operator import operator
from minitune.sharding.collectives import begin_gather, end_gather, lost_in_words, reduce_scatter
from minitune.sharding.parts import Cut


class Sharers(NamedTuple):
    """Ranks that have a part of the same tokens each, as tensors on the host: an operator and a
    recomputed function take nothing else.
    """

    ranks: Int[Tensor, "n"]
    group_name: UInt8[Tensor, "c"]  # bytes of the name of their process group

    def group(self) -> Any:
        """Process group of these ranks."""
        # the one that torch's own functional collectives use; a torch without ranks has none
        from torch._C._distributed_c10d import _resolve_process_group

        name: Any = bytes(self.group_name.tolist()).decode()
        return _resolve_process_group(name)


class AxisMember(NamedTuple):
    """One rank among those that share tokens."""

    place: int
    sharers: Sharers

    @property
    def size(self) -> int:
        """Number of ranks."""
        return len(self.sharers.ranks)


class TokenShares(NamedTuple):
    """Tokens of a row that one rank works on: rows are cut along the axis context into parts of
    equal length, and each part along the axis tensor. The last parts may end in padding.
    """

    context: AxisMember | None = None
    tensor: AxisMember | None = None

    @property
    def size(self) -> int:
        """Number of ranks that share a row."""
        return _size(self.context) * _size(self.tensor)

    def n_own(self, n_tokens: int) -> int:
        """Tokens of a row that this rank has, padding among them."""
        return -(-n_tokens // self.size)

    def first(self, n_tokens: int) -> int:
        """Place in its row of the first token of this rank."""
        place = 0 if self.tensor is None else self.tensor.place
        return self.first_of_mixer(n_tokens) + place * self.n_own(n_tokens)

    def first_of_mixer(self, n_tokens: int) -> int:
        """Place in its row of the first token that this rank's mixers see: those of all ranks along
        tensor come together there.
        """
        place = 0 if self.context is None else self.context.place
        return place * _size(self.tensor) * self.n_own(n_tokens)

    def own(self, x: Tensor, dim: int = 1) -> Tensor:
        """Part of this rank of a tensor of all tokens; zeros where the rows end before it does."""
        n_tokens = x.shape[dim]
        return _part(x, dim, self.first(n_tokens), self.n_own(n_tokens))

    def of_mixer(self, x: Tensor) -> Tensor:
        """Part [B t ...] that this rank's mixers see of a tensor [B n_tokens ...] of all tokens."""
        n_tokens = x.shape[1]
        n_seen = _size(self.tensor) * self.n_own(n_tokens)
        return _part(x, 1, self.first_of_mixer(n_tokens), n_seen)

    def whole(self, x: Tensor, n_tokens: int) -> Tensor:
        """Tensor [B n_tokens ...] of all ranks' parts [B n_own ...]."""
        for member in (self.tensor, self.context):
            x = x if member is None else _Whole.apply(x, member.sharers.group())
        return x[:, :n_tokens]


def shares_of(mesh: Any) -> TokenShares | None:
    """Shares of this rank on torch's mesh; None where every rank has rows of its own."""
    shares = TokenShares(member_of(mesh, "context"), member_of(mesh, "tensor"))
    return None if shares.size == 1 else shares


def member_of(mesh: Any, axis: str) -> AxisMember | None:
    """This rank among those along an axis of torch's mesh; None if it is alone there."""
    names = mesh.mesh_dim_names or ()
    if axis not in names or mesh.size(names.index(axis)) == 1:
        return None
    group = mesh.get_group(axis)
    ranks = torch.tensor(dist.get_process_group_ranks(group))
    name = torch.tensor([*group.group_name.encode()], dtype=torch.uint8)
    return AxisMember(dist.get_rank(group), Sharers(ranks, name))


def exchanged(x: Float[Tensor, "n *rest"], sharers: Sharers) -> Float[Tensor, "n *rest"]:
    """Tensor whose part i is what rank i had as the part of this rank, of the same shape on all of
    them. Its gradient is exchanged back.
    """
    return _exchanged(x.contiguous(), *sharers)


def _size(member: AxisMember | None) -> int:
    return 1 if member is None else member.size


def _part(x: Tensor, dim: int, start: int, n: int) -> Tensor:
    start = min(start, x.shape[dim])
    part = x.narrow(dim, start, min(n, x.shape[dim] - start))
    return F.pad(part, (0, 0) * (x.ndim - 1 - dim) + (0, n - part.shape[dim]))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.sharers = inputs[1:]


def _gradient(ctx: Any, d_out: Tensor) -> tuple[Tensor, None, None]:
    return _exchanged(d_out.contiguous(), *ctx.sharers), None, None


@operator("minitune::exchange", _gradient, _keep)
def _exchanged(x: Tensor, ranks: Tensor, group_name: Tensor) -> Tensor:
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
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group, ctx.cut = group, Cut(1, dist.get_world_size(group) * x.shape[1])
        (whole,) = end_gather(begin_gather([x], [ctx.cut], group))
        return whole

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (d_own,) = reduce_scatter(grad_outputs, [ctx.cut], ctx.group)
        return d_own.to(grad_outputs[0].dtype), None

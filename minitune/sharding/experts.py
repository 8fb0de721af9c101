"""Expert parallelism: along the axis "expert" of a mesh each rank computes with some of the experts
of every mixture, on the rows that all ranks send to them.

Each rank routes its own tokens, sends a row to the rank that has its expert, and gets back what the
expert has made of it: the two all-to-alls of Lepikhin et al. 2020, arXiv 2006.16668, section 3.
The gradient of each is its transpose, so that an expert's gradient is complete on its rank.

A tensor of all experts is cut along them, and a block computes with its rank's part. Where each
expert has weights of its own, these are cut at rest as any matrix is, and before a block each rank
gets those of its experts alone: expert e of X belongs to rank e n // X of n.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from jaxtyping import Shaped
from torch import Tensor
from torch.autograd.function import once_differentiable

from minitune.autodiff.operator import operator
from minitune.errors import InputError
from minitune.sharding.collectives import lost_in_words
from minitune.sharding.mesh import check_dealt_out
from minitune.sharding.tokens import Sharers, member_of
from minitune.tree import Tree
from minitune.types import Adapted, Params

AXIS = "expert"
# in place of an owner: a tensor of all experts, of which each rank has its part
EACH_ITS_PART = -1
# name of a weight within a layer -> rank that computes with it, EACH_ITS_PART, or None for a weight
# that all ranks need
OwnerOf = Callable[[str], int | None]


class ExpertRanks(NamedTuple):
    """This rank among those that share the experts."""

    place: int
    sharers: Sharers

    @property
    def size(self) -> int:
        """Number of ranks."""
        return len(self.sharers.ranks)

    def own(self, n_experts: int) -> range:
        """Numbers of the experts of this rank."""
        each = n_experts // self.size
        return range(self.place * each, (self.place + 1) * each)


class OwnExperts(NamedTuple):
    """Leaf of experts in a block: a tensor of those of this rank, or the weight of one expert,
    which is empty on the ranks that do not compute with it.
    """

    w: Any  # Tensor, a QTensor or Adapted
    ranks: ExpertRanks


def expert_ranks_of(mesh: Any) -> ExpertRanks | None:
    """This rank among those along the axis expert of torch's mesh; None if it is alone there."""
    member = member_of(mesh, AXIS)
    return None if member is None else ExpertRanks(*member)


def check_experts(n_experts: int, n_ranks: int) -> None:
    """InputError if experts can't be dealt out evenly to the ranks of the axis expert."""
    check_dealt_out(AXIS, n_ranks, f"{n_experts} experts", n_experts)


def check_axis(plan: Mapping[str, str], mesh: Mapping[str, int]) -> None:
    """InputError for ranks along the axis expert under a plan that cuts no experts along it."""
    if mesh.get(AXIS, 1) > 1 and plan.get("experts") != AXIS:
        raise InputError(
            f"sharding: the mesh has the axis {AXIS!r}, along which the plan cuts no experts, "
            "expected a plan such as ep; take that, or put these ranks on the axis data"
        )


def own_experts(layer: Params, owner_of: OwnerOf, ranks: ExpertRanks) -> Params:
    """Leaves of a layer as its block computes with them: those of experts say whose they are."""
    if not isinstance(layer, Mapping):
        return layer

    def leaf_of(name: str, leaf: Tree) -> Tree:
        owner = owner_of(name)
        if owner is None:
            return leaf
        if owner == EACH_ITS_PART and isinstance(leaf, Adapted):
            own = ranks.own(len(leaf.a))
            a, b = (x.narrow(0, own.start, len(own)) for x in (leaf.a, leaf.b))
            leaf = leaf._replace(a=a, b=b)
        return OwnExperts(leaf, ranks)

    return {name: leaf_of(name, leaf) for name, leaf in layer.items()}


def exchanged_rows(
    x: Shaped[Tensor, "sent D"], sent: Sequence[int], received: Sequence[int], ranks: ExpertRanks
) -> Shaped[Tensor, "received D"]:
    """Rows that all ranks have sent to this one, in the order of the ranks: sent and received say
    how many go to each and come from it. Its gradient is exchanged back.
    """
    return _exchanged_rows(x, [*sent], [*received], *ranks.sharers)


def tied(y: Tensor, leaves: Sequence[Tensor]) -> Tensor:
    """Tensor y, in whose graph all these leaves are. So a rank to which no row has come takes part
    in all that the backward of the others exchanges.
    """
    needed = [leaf for leaf in leaves if leaf.requires_grad]
    return _Tied.apply(y, *needed) if needed else y


class _Tied(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, *leaves: Tensor) -> Tensor:
        ctx.n_leaves = len(leaves)
        return y.view_as(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad_outputs[0], *([None] * ctx.n_leaves)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.arguments = inputs[1:]


def _gradient(ctx: Any, d_out: Tensor) -> tuple[Any, ...]:
    sent, received, *group = ctx.arguments
    return _exchanged_rows(d_out, received, sent, *group), None, None, None, None


@operator("minitune::exchange_rows", _gradient, _keep)
def _exchanged_rows(
    x: Tensor,
    sent: Sequence[int],
    received: Sequence[int],
    ranks: Tensor,
    group_name: Tensor,
) -> Tensor:
    own = x.contiguous()
    got = own.new_empty(sum(received), *own.shape[1:])
    row_bytes = own.shape[1:].numel() * own.element_size()
    # as bytes, because not every backend knows every dtype
    to_get, to_send = (t.view(-1).view(torch.uint8) for t in (got, own))
    lengths = ([n * row_bytes for n in some] for some in (received, sent))
    with lost_in_words():
        dist.all_to_all_single(to_get, to_send, *lengths, group=Sharers(ranks, group_name).group())
    return got


@torch.library.register_fake("minitune::exchange_rows")
def _(
    x: Tensor,
    sent: Sequence[int],
    received: Sequence[int],
    ranks: Tensor,
    group_name: Tensor,
) -> Tensor:
    return x.new_empty(sum(received), *x.shape[1:])

"""Sums over all processes of a run, which in a single process are what they were; and tensors that
are put together from parts, or summed and cut into them.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import prod
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from minitune import tree
from minitune.errors import RankLostError
from minitune.sharding.parts import Cut, cuts_of, is_sharded, local_parts, placed_of, placed_part
from minitune.sharding.passing import copied, joined, passing
from minitune.tree import Tree
from minitune.types import widen


@contextmanager
def lost_in_words() -> Iterator[None]:
    """Turn the error of a collective whose other end has gone into a RankLostError."""
    try:
        yield
    except RuntimeError as error:
        raise RankLostError(str(error)) from error


def sum_over_ranks(values: Tree, group: Any = None) -> Tree:
    """Sum of every leaf over all ranks of a process group, the default one if None, by one
    all-reduce for each dtype and device.

    Floating-point leaves are summed in float32 or wider, and stay so. Leaves of which each rank
    holds a part are gradients, which `gather` has summed over the axes that cut them: here they are
    summed over the other axes of their mesh, along which ranks hold copies.

    The tree itself in a single process. Not differentiable.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return values
    leaves = tree.leaves(values)
    group_of = {i: group for i, leaf in enumerate(leaves) if not is_sharded(leaf)}
    sums = _sums(leaves, group_of)
    placed = {i: placed_of(leaf) for i, leaf in enumerate(leaves) if is_sharded(leaf)}
    parts = local_parts(sums)
    for axis in range(max((one.mesh.ndim for one in placed.values()), default=0)):
        copies = [i for i, one in placed.items() if not one.placements[axis].is_shard()]
        if copies and placed[copies[0]].mesh.size(axis) > 1:
            parts = _sums(parts, dict.fromkeys(copies, placed[copies[0]].mesh.get_group(axis)))
    summed = [placed_part(x, placed[i]) if i in placed else x for i, x in enumerate(parts)]
    return tree.rebuild(values, summed)


def max_over_ranks(n: int) -> int:
    """Largest of the ranks' own n. Without a wait for an accelerator, where the default process
    group serves the host too ("cpu:gloo,cuda:nccl").
    """
    on_host = "cpu:" in str(dist.get_backend_config())
    total = torch.tensor(n, device="cpu" if on_host else torch.accelerator.current_accelerator())
    with lost_in_words():
        dist.all_reduce(total, dist.ReduceOp.MAX)
    return int(total)


def norms_over_ranks(values: Tree) -> Float[Tensor, "leaves"]:
    """Euclidean norm of each leaf, and of the whole of a leaf of which each rank holds a part; by
    one all-reduce for each axis that cuts any.
    """
    leaves = tree.leaves(values)
    places = [i for i, leaf in enumerate(leaves) if is_sharded(leaf)]
    norms = tree.norms(local_parts(leaves))
    if not places:
        return norms
    squares = norms.double().square()
    for group, cuts in cuts_of([placed_of(leaves[i]) for i in places]):
        index = torch.tensor([places[i] for i in cuts], device=squares.device)
        total = squares[index]
        with lost_in_words():
            dist.all_reduce(total, group=group)
        squares = squares.index_copy(0, index, total)
    return squares.sqrt().to(norms.dtype)


def _sums(leaves: Sequence[Tensor], group_of: dict[int, Any]) -> list[Tensor]:
    """Leaves, those with a group summed over it: all have the same."""
    summed = {i: leaves[i] for i in group_of}
    wide = {i: widen(x) if x.is_floating_point() else x for i, x in summed.items()}
    sums = list(leaves)
    for kind in dict.fromkeys((leaf.dtype, leaf.device) for leaf in wide.values()):
        places = [i for i, leaf in wide.items() if (leaf.dtype, leaf.device) == kind]
        group = group_of[places[0]]
        for i, total in zip(places, _summed([wide[i] for i in places], group), strict=True):
            sums[i] = total
    return sums


def _summed(leaves: list[Tensor], group: Any) -> list[Tensor]:
    """Sums of leaves that share a dtype and a device: views of the one buffer that was reduced."""
    buffer = torch.cat([leaf.detach().flatten() for leaf in leaves])
    with lost_in_words():
        dist.all_reduce(buffer, group=group)
    parts = buffer.split([leaf.numel() for leaf in leaves])
    return [part.view(leaf.shape) for part, leaf in zip(parts, leaves, strict=True)]


# bytes that the parts of a rank are filled up to, so that each begins where its dtype may
ALIGNMENT = 16


class Gathering(NamedTuple):
    """Parts on their way to every rank."""

    parts: Sequence[Tensor]
    cuts: Sequence[Cut]
    buffer: Tensor  # bytes of all ranks [ranks, bytes]
    work: Any  # what to wait for


def begin_gather(parts: Sequence[Tensor], cuts: Sequence[Cut], group: Any) -> Gathering:
    """All-gather of the parts of many tensors, of any dtypes, as the bytes of one buffer."""
    n = dist.get_world_size(group)
    padded = [_padded(part, cut, n) for part, cut in zip(parts, cuts, strict=True)]
    rows = [_filled_up(part.flatten().view(torch.uint8)) for part in padded]
    own = joined(rows)
    buffer = passing([n * own.numel()], own.dtype, own.device)
    with lost_in_words():
        work = _all_gather(buffer, own, group=group, async_op=True)
    return Gathering(padded, cuts, buffer.view(n, -1), work)


def begin_sending(
    parts: Sequence[Tensor], cuts: Sequence[Cut], owners: Sequence[int], group: Any
) -> Gathering:
    """Parts of many tensors on their way to one rank each, their owner in the group: `end_gather`
    gives this rank those that are its own, whole and in their order.
    """
    n, rank = dist.get_world_size(group), dist.get_rank(group)
    padded = [_padded(part, cut, n) for part, cut in zip(parts, cuts, strict=True)]
    rows = [_filled_up(part.flatten().view(torch.uint8)) for part in padded]
    of_owner = [[i for i, owner in enumerate(owners) if owner == k] for k in range(n)]
    lengths = [sum(rows[i].numel() for i in some) for some in of_owner]
    sent = torch.cat([rows[i] for some in of_owner for i in some])
    got = sent.new_empty(n * lengths[rank])
    with lost_in_words():
        work = dist.all_to_all_single(got, sent, [lengths[rank]] * n, lengths, group, async_op=True)
    own = of_owner[rank]
    buffer = got.view(n, lengths[rank])
    return Gathering([padded[i] for i in own], [cuts[i] for i in own], buffer, work)


def parts_from_owners(
    wholes: Sequence[Tensor],
    shapes: Sequence[torch.Size],
    cuts: Sequence[Cut],
    owners: Sequence[int],
    group: Any,
) -> list[Tensor]:
    """Part of this rank, of these shapes, of many tensors that one rank each has whole, in float32
    or wider: the transpose of `begin_sending`. Wholes of other ranks may be anything.
    """
    n, rank = dist.get_world_size(group), dist.get_rank(group)
    longest = [
        [-(-cut.size // n) if i == cut.dim else size for i, size in enumerate(shape)]
        for shape, cut in zip(shapes, cuts, strict=True)
    ]
    of_owner = [[i for i, owner in enumerate(owners) if owner == k] for k in range(n)]
    rows = [_rows_of_parts(wholes[i], cuts[i], n) for i in of_owner[rank]]
    sent = torch.cat(rows, dim=1).flatten() if rows else widen(wholes[0]).new_empty(0)
    lengths = [sum(prod(longest[i]) for i in some) for some in of_owner]
    got = sent.new_empty(sum(lengths))
    with lost_in_words():
        dist.all_to_all_single(got, sent, lengths, [lengths[rank]] * n, group)
    order = [i for some in of_owner for i in some]
    parts = dict(zip(order, got.split([prod(longest[i]) for i in order]), strict=True))
    return [
        parts[i].view(longest[i]).narrow(cut.dim, 0, shapes[i][cut.dim])
        for i, cut in enumerate(cuts)
    ]


def end_gather(gathering: Gathering) -> list[Tensor]:
    """Whole tensors, once all parts are there."""
    with lost_in_words():
        gathering.work.wait()
    start, wholes = 0, []
    for part, cut in zip(gathering.parts, gathering.cuts, strict=True):
        n_bytes = part.numel() * part.element_size()
        columns = gathering.buffer[:, start : start + n_bytes].view(part.dtype)
        pieces = columns.unflatten(1, part.shape).movedim(0, cut.dim)
        # contiguous, they are all that the buffer holds, and may stay there; of a single rank they
        # would all be views of the buffer, and live as long as any of them
        is_buffer = pieces.is_contiguous() and len(columns) > 1
        whole = (pieces if is_buffer else copied(pieces)).flatten(cut.dim, cut.dim + 1)
        wholes.append(whole.narrow(cut.dim, 0, cut.size).contiguous())
        start += _aligned(n_bytes)
    return wholes


class Scattering(NamedTuple):
    """Sums on their way, each part to its rank."""

    shapes: Sequence[torch.Size]  # of the wholes
    cuts: Sequence[Cut]
    group: Any
    sent: Tensor  # [ranks * longest]
    own: Tensor  # [longest]
    work: Any  # what to wait for


def begin_scatter(wholes: Sequence[Tensor], cuts: Sequence[Cut], group: Any) -> Scattering:
    """Sums of many tensors over the group, in float32 or wider, on their way to the ranks."""
    n = dist.get_world_size(group)
    rows = [_rows_of_parts(whole, cut, n) for whole, cut in zip(wholes, cuts, strict=True)]
    sent = joined(rows, dim=1).flatten()
    own = sent.new_empty(sent.numel() // n)
    with lost_in_words():
        work = _reduce_scatter(own, sent, group=group, async_op=True)
    return Scattering([whole.shape for whole in wholes], cuts, group, sent, own, work)


def end_scatter(scattering: Scattering) -> list[Tensor]:
    """Part of this rank of each sum, once it is there."""
    with lost_in_words():
        scattering.work.wait()
    n, rank = dist.get_world_size(scattering.group), dist.get_rank(scattering.group)
    start, parts = 0, []
    for whole, cut in zip(scattering.shapes, scattering.cuts, strict=True):
        longest = -(-cut.size // n)
        shape = [longest if i == cut.dim else size for i, size in enumerate(whole)]
        length = max(0, min(longest, cut.size - rank * longest))
        total = scattering.own.narrow(0, start, prod(shape)).view(shape)
        parts.append(total.narrow(cut.dim, 0, length))
        start += prod(shape)
    return parts


def reduce_scatter(wholes: Sequence[Tensor], cuts: Sequence[Cut], group: Any) -> list[Tensor]:
    """Part of this rank of the sums of many tensors over the group, in float32 or wider."""
    return end_scatter(begin_scatter(wholes, cuts, group))


def _rows_of_parts(whole: Tensor, cut: Cut, n: int) -> Tensor:
    """Parts of a tensor for n ranks, one a row, in float32 or wider; as long as the longest."""
    longest = -(-cut.size // n)
    padded = _lengthened(widen(whole), cut.dim, n * longest)
    return padded.unflatten(cut.dim, (n, longest)).movedim(cut.dim, 0).reshape(n, -1)


def _padded(part: Tensor, cut: Cut, n: int) -> Tensor:
    """Part as long as the longest."""
    return _lengthened(part, cut.dim, -(-cut.size // n)).contiguous()


def _lengthened(x: Tensor, dim: int, size: int) -> Tensor:
    missing = size - x.shape[dim]
    if not missing:
        return x
    shape = [missing if i == dim else n for i, n in enumerate(x.shape)]
    return torch.cat([x, x.new_zeros(shape)], dim)


def _aligned(n_bytes: int) -> int:
    return -(-n_bytes // ALIGNMENT) * ALIGNMENT


def _filled_up(row: Tensor) -> Tensor:
    missing = _aligned(row.numel()) - row.numel()
    return F.pad(row, (0, missing)) if missing else row


# torch 2.13 has new names for these two
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

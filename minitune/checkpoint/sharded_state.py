"""Parts of a training state: which rank writes which, and the region of a saved tensor that a rank
reads.

Every part is written once, by one of the ranks that hold a copy of it, so that all write about as
many bytes. All ranks find out who writes what without a message.
"""

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from minitune import tree
from minitune.checkpoint.tensors import dtype_of
from minitune.io.state_files import Region, StoredPart
from minitune.sharding.parts import is_sharded, local_parts, part_range, placed_of, placed_part
from minitune.sharding.ranks import Ranks
from minitune.tree import Tree

CHUNK_BYTES = 2**24  # of a file that are mapped at a time


class OwnPart(NamedTuple):
    """Part of a tensor that this rank writes."""

    tensor: Tensor
    whole: tuple[int, ...]  # shape of the tensor
    offset: tuple[int, ...]


class OwnParts(NamedTuple):
    """Parts of a state that this rank writes."""

    parts: Mapping[str, OwnPart]  # by the path of their leaf
    n_bytes: int  # of the state, all ranks together


class _Copies(NamedTuple):
    """Ranks that hold the parts of a tensor."""

    holders: Tensor  # [copies, parts]
    n_bytes: Tensor  # of each part [parts]


def parts_to_write(state: Tree, ranks: Ranks) -> OwnParts:
    """Parts of a state that this rank writes.

    Each goes to the rank that has the fewest bytes to write among those that hold it, the largest
    leaves first.
    """
    leaves = dict(tree.items(state))
    order = sorted(leaves, key=lambda name: (-tree.n_bytes(leaves[name]), name))
    loads = torch.zeros(ranks.size, dtype=torch.int64)
    own = {}
    for name in order:
        leaf = leaves[name]
        copies = _copies(leaf, ranks.size)
        # a number of its own for each rank: which of two equal ones argmin takes is not said
        keys = loads[copies.holders] * ranks.size + copies.holders
        writers = copies.holders.gather(0, keys.argmin(0, keepdim=True))[0]
        loads = loads.index_add(0, writers, copies.n_bytes)
        if leaf.numel() == 0:
            if ranks.is_first:
                empty = torch.empty(leaf.shape, dtype=leaf.dtype)
                own[name] = OwnPart(empty, tuple(leaf.shape), (0,) * leaf.ndim)
        elif ranks.rank in writers[copies.n_bytes > 0]:
            part = local_parts(leaf)
            own[name] = OwnPart(part.detach(), tuple(leaf.shape), region_of(leaf).offset)
    parts = {name: own[name] for name in leaves if name in own}
    return OwnParts(parts, tree.n_bytes(state))


def region_of(leaf: Any) -> Region:
    """Region that this rank holds of a leaf: all of a plain tensor, the part of a DTensor."""
    offset, shape = [0] * leaf.ndim, [*leaf.shape]
    if is_sharded(leaf):
        mesh = leaf.device_mesh
        for axis, dim in _cut_dims(leaf).items():
            n, i = mesh.size(axis), mesh.get_local_rank(axis)
            offset[dim], shape[dim] = part_range(leaf.shape[dim], n, i)
    return Region(tuple(offset), tuple(shape))


def loaded(parts: Sequence[StoredPart], like: Any) -> Tensor:
    """Tensor of which a leaf says region, device and placements; only that region is read."""
    x = read_region(parts, region_of(like)).to(like.device)
    return placed_part(x, placed_of(like)) if is_sharded(like) else x


def read_region(parts: Sequence[StoredPart], region: Region) -> Tensor:
    """Region of a saved tensor in fresh memory, read from the parts that overlap it: what a mapped
    file holds is aligned otherwise, and kernels then round otherwise.
    """
    out = torch.empty(region.shape, dtype=dtype_of(parts[0].entry.dtype))
    for part in parts:
        starts = [*map(max, part.offset, region.offset)]
        sizes = [
            max(0, min(at + n, own_at + own_n) - start)
            for start, at, n, own_at, own_n in zip(
                starts, part.offset, part.entry.shape, *region, strict=True
            )
        ]
        if prod(sizes):
            target = _narrowed(out, _differences(starts, region.offset), sizes)
            _copy(part, _differences(starts, part.offset), target)
    return out


def _copy(part: StoredPart, offset: Sequence[int], target: Tensor) -> None:
    """Copy what lies at an offset in a stored part to a target, some rows at a time: pages that are
    mapped count as memory of this process.
    """
    stored, rows = part.entry.shape, target
    if not stored:
        stored, offset, rows = (1,), (0,), target[None]
    row_bytes = (part.entry.end - part.entry.start) // stored[0]
    n_rows = max(1, CHUNK_BYTES // row_bytes)
    for i, some in enumerate(rows.split(n_rows)):
        first = part.entry.start + (offset[0] + i * n_rows) * row_bytes
        mapped = np.memmap(part.file, np.uint8, "c", first, (len(some) * row_bytes,))
        piece = torch.from_numpy(mapped).view(target.dtype).view(len(some), *stored[1:])
        tree.donate(some, _narrowed(piece, (0, *offset[1:]), some.shape))


def _copies(leaf: Any, n_ranks: int) -> _Copies:
    n_bytes = leaf.element_size()
    if not is_sharded(leaf):
        holders = torch.arange(n_ranks)[:, None]
        return _Copies(holders, torch.tensor([leaf.numel() * n_bytes]))
    mesh, cut = leaf.device_mesh.mesh.cpu(), _cut_dims(leaf)
    copied = [axis for axis in range(mesh.ndim) if axis not in cut]
    holders = mesh.permute(*copied, *cut).reshape(prod(mesh.shape[axis] for axis in copied), -1)
    sizes = torch.tensor(
        [n_bytes * prod(n for i, n in enumerate(leaf.shape) if i not in cut.values())]
    )
    for axis, dim in cut.items():
        n = mesh.shape[axis]
        lengths = torch.tensor([part_range(leaf.shape[dim], n, i)[1] for i in range(n)])
        sizes = (sizes[:, None] * lengths).flatten()
    return _Copies(holders.long(), sizes)


def _cut_dims(leaf: Any) -> dict[int, int]:
    """Dim that each axis of the mesh cuts; TypeError for a DTensor that is still to be summed, and
    for one with two axes that cut one dim, as no plan makes it.
    """
    placements = leaf.placements
    cut = {axis: one.dim for axis, one in enumerate(placements) if one.is_shard()}
    if len({*cut.values()}) < len(cut) or any(one.is_partial() for one in placements):
        raise TypeError(
            f"checkpoint: a leaf has placements {placements}, expected copies and cuts, of one dim "
            "each"
        )
    return cut


def _narrowed(x: Tensor, offset: Sequence[int], sizes: Sequence[int]) -> Tensor:
    for dim, (start, size) in enumerate(zip(offset, sizes, strict=True)):
        x = x.narrow(dim, start, size)
    return x


def _differences(xs: Sequence[int], ys: Sequence[int]) -> list[int]:
    return [x - y for x, y in zip(xs, ys, strict=True)]

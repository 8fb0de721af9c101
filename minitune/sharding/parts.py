"""Parts of tensors that ranks hold, and what is known of their wholes: what a DTensor is made of.

Nothing here imports torch's DTensor before there is one: that takes half a second.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from minitune import tree
from minitune.tree import Tree


class Cut(NamedTuple):
    """Cut of a tensor along one dim into a part for each rank, as torch's Shard makes it: all are
    ceil(size / ranks) long but the last ones, which have what is left, or nothing.
    """

    dim: int
    size: int  # of the dim, before the cut


class Placed(NamedTuple):
    """Description of a DTensor without its part: the shape and strides are those of the whole."""

    mesh: Any
    placements: tuple[Any, ...]
    shape: torch.Size
    stride: tuple[int, ...]


def is_sharded(x: Any) -> bool:
    """True for a DTensor, without the import of its class, which takes long."""
    return hasattr(x, "placements")


def is_shared(values: Tree) -> bool:
    """True for a tree of which ranks hold parts."""
    if not (dist.is_available() and dist.is_initialized()):
        return False
    return any(map(is_sharded, tree.leaves(values)))


def placed_of(x: Any) -> Placed:
    """Mesh, placements, shape and strides of a DTensor."""
    return Placed(x.device_mesh, x.placements, x.shape, x.stride())


def placed_part(part: Tensor, placed: Placed) -> Tensor:
    """DTensor of a part."""
    from torch.distributed.tensor import DTensor

    how: dict[str, Any] = {"run_check": False, "shape": placed.shape, "stride": placed.stride}
    return DTensor.from_local(part, placed.mesh, placed.placements, **how)


def cut_part(whole: Tensor, placed: Placed) -> Tensor:
    """DTensor of the part of this rank of a whole tensor, in memory of its own."""
    part = whole
    for axis, placement in enumerate(placed.placements):
        if placement.is_shard():
            n, i = placed.mesh.size(axis), placed.mesh.get_local_rank(axis)
            part = part.narrow(placement.dim, *part_range(whole.shape[placement.dim], n, i))
    return placed_part(part.clone(memory_format=torch.contiguous_format), placed)


def part_range(size: int, n: int, i: int) -> tuple[int, int]:
    """(start, length) of part i of n of a dim."""
    longest = -(-size // n)
    start = min(i * longest, size)
    return start, min(longest, size - start)


def local_parts(values: Tree) -> Tree:
    """Tree with the part of this rank in place of each DTensor; not differentiable."""
    if not is_shared(values):
        return values
    with torch.no_grad():
        return tree.map(lambda x: x.to_local() if is_sharded(x) else x, values)


def placed_like(parts: Tree, like: Tree) -> Tree:
    """Tree of parts as DTensors, wherever the leaf of `like` is one."""
    if not is_shared(like):
        return parts
    return tree.map(lambda x, y: placed_part(x, placed_of(y)) if is_sharded(y) else x, parts, like)


def cuts_of(
    placed: Sequence[Placed],
    stays: Callable[[int, str], bool] = lambda leaf, axis: False,
) -> Iterator[tuple[Any, dict[int, Cut]]]:
    """(group, the cut of each leaf that it cuts, by the leaf's number) of every axis.

    stays(number, axis): True for a leaf that is left as it is along an axis.
    """
    for axis, name in enumerate(placed[0].mesh.mesh_dim_names):
        cuts = {
            i: Cut(one.placements[axis].dim, one.shape[one.placements[axis].dim])
            for i, one in enumerate(placed)
            if one.placements[axis].is_shard() and not stays(i, name)
        }
        if cuts:
            yield placed[0].mesh.get_group(axis), cuts

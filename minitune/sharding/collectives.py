"""Sums over all processes of a run; in a single process they are what they were."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from minitune import tree
from minitune.errors import RankLostError
from minitune.tree import Tree
from minitune.types import widen


def sum_over_ranks(values: Tree) -> Tree:
    """Sum of every leaf over all ranks of the default process group, by one all-reduce for each
    dtype and device.

    Floating-point leaves are summed in float32 or wider, and stay so.

    The tree itself in a single process. Not differentiable.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return values
    leaves = [widen(x) if x.is_floating_point() else x for x in tree.leaves(values)]
    sums = list(leaves)
    for dtype, device in dict.fromkeys((leaf.dtype, leaf.device) for leaf in leaves):
        places = [
            i for i, leaf in enumerate(leaves) if (leaf.dtype, leaf.device) == (dtype, device)
        ]
        for i, total in zip(places, _summed([leaves[i] for i in places]), strict=True):
            sums[i] = total
    return tree.rebuild(values, sums)


def _summed(leaves: list[Tensor]) -> list[Tensor]:
    """Sums of leaves that share a dtype and a device: views of the one buffer that was reduced."""
    buffer = torch.cat([leaf.detach().flatten() for leaf in leaves])
    with lost_in_words():
        dist.all_reduce(buffer)
    parts = buffer.split([leaf.numel() for leaf in leaves])
    return [part.view(leaf.shape) for part, leaf in zip(parts, leaves, strict=True)]


@contextmanager
def lost_in_words() -> Iterator[None]:
    """Turn the error of a collective whose other end has gone into a RankLostError."""
    try:
        yield
    except RuntimeError as error:
        raise RankLostError(str(error)) from error

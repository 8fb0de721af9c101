"""Memory of what lives for a moment."""

import mmap
import sys
from collections.abc import Sequence
from contextlib import suppress
from math import prod

import torch
from torch import Tensor

SMALLEST = 2**20  # bytes for which pages of their own are worth a call to the system


def passing(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uninitialized tensor for numbers that are needed for a moment, such as a gathered weight.

    On a CPU under Linux a large one has pages of its own, which the system takes back with it. The
    C library would keep a hole in its place, something small that stays for the backward would be
    put there, and the weights of the next block, which are as large, would need room elsewhere: a
    forward left behind as many holes as it has blocks. Elsewhere it is torch's own.
    """
    n_bytes = prod(shape) * dtype.itemsize
    if device.type != "cpu" or sys.platform != "linux" or n_bytes < SMALLEST:
        return torch.empty(shape, dtype=dtype, device=device)
    try:
        pages = mmap.mmap(-1, n_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError:  # no more mappings, or no memory, of which torch has its own error
        return torch.empty(shape, dtype=dtype, device=device)
    with suppress(OSError):  # of a system without huge pages, where it takes a little longer
        pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=dtype).view(*shape)


def joined(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    """torch.cat of tensors of one dtype and device, in the memory of `passing`."""
    first = tensors[0]
    shape = list(first.shape)
    shape[dim] = sum(x.shape[dim] for x in tensors)
    return torch.cat(list(tensors), dim, out=passing(shape, first.dtype, first.device))


def copied(x: Tensor) -> Tensor:
    """Contiguous copy of a tensor, in the memory of `passing`."""
    return passing(x.shape, x.dtype, x.device).copy_(x)

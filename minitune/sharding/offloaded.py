"""Frozen weights that lie on the host or in a file, and come to the device when their block needs
them.

Such a weight is an OffloadedTensor: it has the shape, dtype and device that a block computes with,
and no memory there. `gather` puts whole tensors in its place, as it does for weights in parts.
"""

import mmap
import os
import weakref
from collections.abc import Callable, Iterator, Sequence
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from minitune import hardware


class OpenFile:
    """File that stays open for as long as something is to be read of it, also when another file has
    taken its name.
    """

    def __init__(self, path: Path) -> None:
        # O_BINARY is there on Windows alone, where files are texts without it
        self.number = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        weakref.finalize(self, os.close, self.number)


class FileSlice(NamedTuple):
    """Tensor as it lies in a file."""

    file: OpenFile
    start: int  # byte of the file
    shape: tuple[int, ...]
    dtype: torch.dtype

    def mapped(self) -> Tensor:
        """Tensor in a mapping of its own, which ends with it; the system begins to read it."""
        n_bytes = prod(self.shape) * self.dtype.itemsize
        if not n_bytes:
            return torch.empty(self.shape, dtype=self.dtype)
        page = mmap.ALLOCATIONGRANULARITY
        before = self.start % page
        # a private copy is writable, as torch wants memory to be, and nothing writes there
        pages = mmap.mmap(
            self.file.number, before + n_bytes, access=mmap.ACCESS_COPY, offset=self.start - before
        )
        if hasattr(mmap, "MADV_WILLNEED"):
            pages.madvise(mmap.MADV_WILLNEED)
        return torch.frombuffer(
            pages, dtype=self.dtype, count=prod(self.shape), offset=before
        ).view(self.shape)


class Carrier(NamedTuple):
    """Way in which a tensor of the host comes to a device. No call makes the host wait for the
    device.
    """

    begin: Callable[[Tensor], Any]  # what it returns is given to `end`
    end: Callable[[Any], Tensor]


def carrier(device: torch.device) -> Carrier:
    """Carrier to a device; all weights of a model share one, whose copies then share a stream.

    To an accelerator with streams a tensor goes through pinned memory on a side stream, while the
    device computes. Elsewhere it is copied when it is needed.
    """
    if not hardware.capabilities(device).streams:
        return Carrier(lambda x: x, lambda x: x.to(device))
    side = hardware.side_stream(device)
    return Carrier(lambda x: side.copied(hardware.pinned(x), device), side.wait)


class OffloadedTensor(Tensor):
    """Tensor without memory on its device: a block's `gather` fetches what it stands for.

    An operation on it outside of a block is right as well: it fetches what it needs, once for each
    operation. It can't be written.
    """

    source: Tensor | FileSlice
    carrier: Carrier

    @staticmethod
    def __new__(
        cls,
        source: Tensor | FileSlice,
        device: torch.device,
        dtype: torch.dtype,
        carrier: Carrier,
    ) -> "OffloadedTensor":
        """Offloaded tensor of a contiguous source, which a fetch casts to a dtype."""
        how: dict[str, Any] = {"dtype": dtype, "device": device}
        made = Tensor._make_wrapper_subclass(cls, torch.Size(source.shape), **how)  # pyright: ignore[reportAttributeAccessIssue]
        made.source, made.carrier = source, carrier
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Result of an operation on what was fetched; TypeError for one that writes."""
        if func is torch.ops.aten.detach.default:
            return args[0].copy()
        if func._schema.is_mutable:
            raise TypeError(f"offload: {func} writes an offloaded weight, expected none to do so")
        args, kwargs = tree_map(_fetched, (args, kwargs or {}))
        return func(*args, **kwargs)

    def copy(self) -> "OffloadedTensor":
        """Another tensor that stands for the same."""
        return OffloadedTensor(self.source, self.device, self.dtype, self.carrier)


def is_offloaded(x: Any) -> bool:
    """True for a tensor that has to be fetched."""
    return isinstance(x, OffloadedTensor)


def begin_fetch(leaves: Sequence[OffloadedTensor]) -> list[Any]:
    """Begin to bring offloaded tensors to their device; end_fetch takes what is returned."""
    # all of them first: so the system reads the later ones while the first are copied
    on_host = [_on_host(leaf.source) for leaf in leaves]
    return [leaf.carrier.begin(x) for leaf, x in zip(leaves, on_host, strict=True)]


def end_fetch(leaves: Sequence[OffloadedTensor], begun: Sequence[Any]) -> Iterator[Tensor]:
    """Yield these tensors on their device, in their dtype."""
    for leaf, one in zip(leaves, begun, strict=True):
        yield leaf.carrier.end(one).to(leaf.dtype)


def _on_host(source: Tensor | FileSlice) -> Tensor:
    return source if isinstance(source, Tensor) else source.mapped()


def _fetched(x: Any) -> Any:
    if not is_offloaded(x):
        return x
    (whole,) = end_fetch([x], begin_fetch([x]))
    return whole

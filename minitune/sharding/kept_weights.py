"""Weights of a block that its graph does without until the backward."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class _Kept(NamedTuple):
    """View of a whole weight that a graph would have kept."""

    number: int  # of the weight
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


class KeptWeights:
    """Weights of one call of a block, for its graph: lives as long as that graph does."""

    def __init__(self, wholes: Sequence[Tensor]) -> None:
        # nothing is at the address of an empty one
        storages = [whole.untyped_storage().data_ptr() for whole in wholes]
        self.number_of = {pointer: i for i, pointer in enumerate(storages) if pointer}
        self.wholes: Sequence[Tensor] = []  # in the backward

    def pack(self, x: Tensor) -> Any:
        """Place of a weight's view, in place of the view; another tensor as it is."""
        number = self.number_of.get(x.untyped_storage().data_ptr())
        if number is None:
            return x
        return _Kept(number, x.dtype, x.size(), x.stride(), int(x.storage_offset()))

    def unpack(self, x: Any) -> Tensor:
        """Tensor that was packed, from the weights of the backward."""
        if not isinstance(x, _Kept):
            return x
        return self.wholes[x.number].view(x.dtype).as_strided(x.size, x.stride, x.offset)

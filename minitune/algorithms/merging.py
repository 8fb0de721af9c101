"""Dense weights with all that was trained folded in, one at a time."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minitune.lora import Lora, MergedWeight, Onto
from minitune.quant.schemes import dequantize
from minitune.sharding.gather import gather
from minitune.types import Delta, Params, Trainable

NOTHING_LOST: Mapping[Onto, float] = MappingProxyType({"trained": 0.0, "stored": 0.0})


class Merged(NamedTuple):
    """Dense weights with all that was trained in them, and the largest share of a weight's change
    that each base loses.
    """

    params: Params
    errors: Mapping[Onto, float]


class MergedLeaf(NamedTuple):
    """Dense weight with what was trained in it, and the share of its change that a base loses."""

    weight: Tensor
    errors: Mapping[Onto, float]


def merge_trainable(
    params: Params,
    trainable: Trainable,
    lora: Lora | None,
    *,
    stored: Mapping[str, Tensor],
    onto: Onto = "trained",
    dtype: torch.dtype | None = None,
    on_delta: Callable[[], object] | None = None,
) -> Merged:
    """All weights dense, with deltas merged in and whole trained weights in place of theirs; one
    weight is computed at a time.

    stored: the dense weights that params were made from, in whose dtypes the result is without one.
    Deltas over quantized weights were trained on the dequantized ones: merging onto these is exact
    but for rounding, onto the stored ones it is not. TypeError for deltas without their rule.
    """
    merged: dict[str, Tensor] = {}
    errors = NOTHING_LOST
    for name, w in stored.items():
        leaf = trainable.get(name)
        one = merge_leaf(name, params[name], leaf, lora, stored=w, onto=onto, dtype=dtype)
        merged[name], errors = one.weight, largest_errors(errors, one.errors)
        if on_delta is not None and isinstance(leaf, Delta):
            on_delta()
    return Merged(merged, errors)


def merge_leaf(
    name: str,
    w: Any,
    leaf: Delta | Tensor | None,
    lora: Lora | None,
    *,
    stored: Tensor,
    onto: Onto = "trained",
    dtype: torch.dtype | None = None,
) -> MergedLeaf:
    """One weight of `merge_trainable`: w as the forward has it, the leaf that trains in its place
    or on it, if any, and the dense one that it was made from.

    A weight of which each rank holds a part comes out whole where it had a delta or was quantized.
    """
    dtype = dtype or stored.dtype
    if isinstance(leaf, Delta):
        if lora is None:
            raise TypeError(f"lora: {name} is a Delta, expected the Lora rule that it was made by")
        both = _merge_one(lora, w, leaf, gather(stored), dtype)
        return MergedLeaf(both[onto].weight, {base: float(both[base].error) for base in both})
    # Quantized weights without a delta become what they stand for, as deltas trained beside that.
    if leaf is None and onto == "trained" and not isinstance(w, Tensor):
        return MergedLeaf(dequantize(gather(w), dtype), NOTHING_LOST)
    return MergedLeaf((stored if leaf is None else leaf).to(dtype), NOTHING_LOST)


def largest_errors(one: Mapping[Onto, float], other: Mapping[Onto, float]) -> dict[Onto, float]:
    """Larger error of two weights, onto each base."""
    return {base: max(error, other[base]) for base, error in one.items()}


def _merge_one(
    lora: Lora, w: Any, delta: Delta, stored: Tensor, dtype: torch.dtype
) -> dict[Onto, MergedWeight]:
    """Delta merged onto the weight that it was trained on, and onto the stored one."""
    dense = stored.to(delta.a.device, torch.float32)
    is_same = isinstance(w, Tensor)
    trained_on = dense if is_same else dequantize(gather(w), torch.float32)
    one = lora.merge_weight(trained_on, delta, dtype)
    other = one if is_same else lora.merge_weight(trained_on, delta, dtype, onto=dense)
    return {"trained": one, "stored": other}

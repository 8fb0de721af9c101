"""Training of weights that are rounded to their quantized values in the forward."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from minitune.algorithms.objective import Objective
from minitune.quant import schemes
from minitune.quant.rules import Quantization
from minitune.quant.schemes import Scheme
from minitune.sharding.gather import gather
from minitune.sharding.parts import cut_part, is_sharded, placed_of
from minitune.types import Trainable


def quantization_aware(objective: Objective, fake: Callable[[Trainable], Trainable]) -> Objective:
    """Objective at the weights as they will be once quantized; `fake` rounds them and passes
    gradients straight through.
    """
    return lambda trainable, params, batch: objective(fake(trainable), params, batch)


def fake_quantized(rule: Quantization, trainable: Trainable) -> Trainable:
    """Trainable tree with its planned weights rounded as they will be stored, as rule.fake gives
    it; also of weights of which each rank holds a part.

    A scale may belong to numbers of several ranks. So each such weight is put together, one at a
    time, and every rank keeps its part of the rounded one. Every rank calls it.
    """
    parts = {name: leaf for name, leaf in trainable.items() if is_sharded(leaf)}
    whole = {name: leaf for name, leaf in trainable.items() if name not in parts}
    rounded = rule.fake(whole)
    for name, leaf in parts.items():
        scheme = rule.scheme_of(name)
        rounded = {**rounded, name: leaf if scheme is None else _FakePart.apply(leaf, scheme)}
    return {name: rounded[name] for name in trainable}


class _FakePart(torch.autograd.Function):
    """Part of a weight that was rounded as a whole, with the gradient of the identity."""

    @staticmethod
    def forward(ctx: Any, w: Any, scheme: Scheme) -> Tensor:
        whole = gather(w.detach())
        return cut_part(schemes.fake(whole, scheme), placed_of(w))

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad_outputs[0], None

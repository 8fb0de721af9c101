"""Quantized weights: schemes, quantize, dequantize, and a linear map whose weight is never whole in memory for longer than its use."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from minitune.types import QInt4, QInt8, QNF4, QTensor


def dequantize(q: QTensor, dtype: torch.dtype) -> Float[Tensor, "out in"]:
    """The weight that the codes stand for, computed in float32 and rounded once to dtype."""
    if isinstance(q, QInt8):
        return (q.codes.float() * q.scale.float()).to(dtype)
    raise NotImplementedError


def linear(x: Float[Tensor, "*rows in"], q: QTensor) -> Float[Tensor, "*rows out"]:
    """x W^T in the dtype of x; differentiable in x, and nothing but the codes is kept for the backward."""
    return _Linear.apply(x, type(q), *q)


class _Linear(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, kind: Any, *leaves: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, dequantize(kind(*leaves), x.dtype))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.kind = inputs[1]
        ctx.save_for_backward(*inputs[2:])

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Any, ...]:
        q = ctx.kind(*ctx.saved_tensors)
        return grad_outputs[0] @ dequantize(q, grad_outputs[0].dtype), *(None for _ in range(1 + len(q)))

"""Products of rows with a quantized weight."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import BFloat16, Float
from torch import Tensor

from minitune.autodiff.value_and_grad import under_transform
from minitune.quant import float8
from minitune.quant.schemes import dequantize
from minitune.quant.tensors import PackedInt4, PackedInt8, QFloat8, QTensor

# rows up to which the packed kernels beat decoding the weight first: see bench/quant.py
DECODE_ROWS = 32


def quantized_linear(x: Float[Tensor, "*rows in"], q: QTensor) -> Float[Tensor, "*rows out"]:
    """x W^T in the dtype of x; differentiable in x any number of times, and nothing but the codes
    is kept for that.

    A few rows of a packed weight that need no gradient are rounded to bfloat16 and go through
    torch's packed kernels, which never build the weight.
    """
    if isinstance(q, PackedInt4 | PackedInt8):
        few = x.numel() <= DECODE_ROWS * x.shape[-1] and not (
            torch.is_grad_enabled() and x.requires_grad
        )
        if few and x.dtype in (torch.bfloat16, torch.float32) and not under_transform():
            return (
                _packed_product(x.reshape(-1, x.shape[-1]).to(torch.bfloat16), q)
                .to(x.dtype)
                .view(*x.shape[:-1], -1)
            )
        q = q.q
    if isinstance(q, QFloat8) and float8.takes(x, q.codes):
        return float8.product(x, *q, False)
    if not torch.compiler.is_compiling():
        return _Linear.apply(x, type(q), False, *q)
    if torch.is_grad_enabled() and x.requires_grad:
        return _TracedLinear.apply(x, type(q), *q)
    # where tracing _TracedLinear fails on the number of leaves
    return F.linear(x, dequantize_after(x, type(q), q))


def _packed_product(
    rows: BFloat16[Tensor, "n in"], q: PackedInt4 | PackedInt8
) -> BFloat16[Tensor, "n out"]:
    if isinstance(q, PackedInt8):
        return torch.ops.aten._weight_int8pack_mm(
            rows, q.q.codes, q.q.scale.flatten().to(rows.dtype)
        )
    return torch.ops.aten._weight_int4pack_mm_for_cpu(
        rows, q.codes, q.shape[1] // q.q.scale.shape[1], q.scales
    )


class _Linear(torch.autograd.Function):
    """x W^T, or x W: each is the other's derivative, so that no order of differentiation keeps the
    weight.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, kind: Any, transposed: bool, *leaves: Tensor) -> Tensor:
        w = dequantize(kind(*leaves), x.dtype)
        return x @ w if transposed else F.linear(x, w)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.kind, ctx.transposed = inputs[1:3]
        ctx.save_for_backward(*inputs[3:])
        ctx.save_for_forward(*inputs[3:])

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Any, ...]:
        leaves = ctx.saved_tensors
        return _Linear.apply(grad_outputs[0], ctx.kind, not ctx.transposed, *leaves), *(
            None for _ in range(2 + len(leaves))
        )

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        return _Linear.apply(tangents[0], ctx.kind, ctx.transposed, *ctx.saved_tensors)


class _TracedLinear(torch.autograd.Function):
    """x W^T as a compiler can trace it: no derivative in forward mode, differentiable once."""

    @staticmethod
    def forward(x: Tensor, kind: Any, *leaves: Tensor) -> Tensor:
        return F.linear(x, dequantize_after(x, kind, leaves))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.kind = inputs[1]
        ctx.save_for_backward(*inputs[2:])

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Any, ...]:
        leaves, grad = ctx.saved_tensors, grad_outputs[0]
        return grad @ dequantize_after(grad, ctx.kind, leaves), *(
            None for _ in range(1 + len(leaves))
        )


def dequantize_after(x: Tensor, kind: Any, leaves: Sequence[Tensor]) -> Tensor:
    """Weight in the dtype of x, its codes plus a zero that is made of x, so that it waits for x: a
    compiler would else decode all weights of a block at once, and keep those of the forward for the
    backward.
    """
    codes, *rest = leaves
    zero = (x.flatten()[0] * 0).nan_to_num()
    # floats that short can't be added
    whole = codes.view(torch.uint8) if codes.is_floating_point() else codes
    return dequantize(kind((whole + zero.to(whole.dtype)).view(codes.dtype), *rest), x.dtype)

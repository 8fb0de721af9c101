"""Products of 8-bit floats (e4m3), which GPUs multiply twice as fast as bfloat16; each row has its
scale.

Micikevicius et al. 2022, arXiv 2209.05433: 4 bits of exponent, 3 of mantissa, the largest number is
448, the smallest 2^-9.
"""

from typing import Any

import torch
from jaxtyping import Float, Float8e4m3fn
from torch import Tensor

from minitune import hardware
from minitune.autodiff.operator import operator
from minitune.autodiff.value_and_grad import under_transform

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0
STEP = 16  # of both sizes of a weight, which the kernels take in such pieces
CAPABILITY = (8, 9)  # the first cards that multiply such numbers


def takes(x: Float[Tensor, "*rows in"], codes: Float8e4m3fn[Tensor, "out in"]) -> bool:
    """True if x, or a cotangent of its product, can be multiplied by these codes as 8-bit floats.

    That is bfloat16 on a card that has them, outside of vmap and torch.func.grad. Everywhere else
    the weight is decoded.
    """
    fits = (
        x.dtype == torch.bfloat16
        and x.numel() > 0
        and all(size % STEP == 0 for size in codes.shape)
    )
    return fits and hardware.cuda_capability(x.device) >= CAPABILITY and not under_transform()


def rounded(
    rows: Float[Tensor, "*n in"],
) -> tuple[Float8e4m3fn[Tensor, "*n in"], Float[Tensor, "*n 1"]]:
    """(the nearest 8-bit floats, the scale that they are to be multiplied by): max|x| of each row
    becomes 448.
    """
    wide = rows.float()
    scale = (wide.abs().amax(-1, keepdim=True) / LARGEST).clamp(min=torch.finfo(torch.float32).tiny)
    return (wide / scale).clamp(-LARGEST, LARGEST).to(E4M3), scale


def product(
    x: Float[Tensor, "*rows from"],
    codes: Float8e4m3fn[Tensor, "out in"],
    scale: Float[Tensor, "out 1"],
    transposed: bool,
) -> Float[Tensor, "*rows to"]:
    """x W^T, or x W if transposed, for W = codes * scale, with x rounded by rows; each is the
    other's derivative, so backward is rounded as forward is.

    W's scales belong to the rows of W: for x W they go into x before it is rounded, so that codes
    alone are multiplied.
    """
    return _Product.apply(x, codes, scale, transposed)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, codes: Tensor, scale: Tensor, transposed: bool) -> Tensor:
        rows, scales = rounded((x * scale.view(-1) if transposed else x).reshape(-1, x.shape[-1]))
        if transposed:
            y = _times(rows, scales, codes, x.dtype)
        else:
            y = torch.ops.aten._scaled_mm(
                rows, codes.t(), scales, scale.view(1, -1), out_dtype=x.dtype
            )
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.transposed = inputs[3]
        ctx.save_for_backward(*inputs[1:3])

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Any, ...]:
        codes, scale = ctx.saved_tensors
        return _Product.apply(grad_outputs[0], codes, scale, not ctx.transposed), None, None, None


@operator("minitune::float8_times")
def _times(rows: Tensor, scales: Tensor, codes: Tensor, dtype: torch.dtype) -> Tensor:
    """(rows * scales) codes. The kernel reads its second matrix by columns, so codes are laid out
    anew: in a separate operator, because a compiler that sees this makes it in the forward and
    keeps it for the backward.
    """
    columns = codes.t().contiguous().t()
    return torch.ops.aten._scaled_mm(
        rows, columns, scales, scales.new_ones(1, codes.shape[1]), out_dtype=dtype
    )


@torch.library.register_fake("minitune::float8_times")
def _(rows: Tensor, scales: Tensor, codes: Tensor, dtype: torch.dtype) -> Tensor:
    return rows.new_empty(rows.shape[0], codes.shape[1], dtype=dtype)

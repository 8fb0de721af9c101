"""Products of float32 activations with weights that are kept in 16 bits, for devices that multiply
no bfloat16 themselves.

A weight is widened a block of columns at a time, so that the block is multiplied while it lies in a
core's cache: no more than that block exists in 32 bits, and the backward widens the weight once
more in place of keeping a wide copy of it.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd import forward_ad

from minitune.autodiff.operator import operator
from minitune.autodiff.value_and_grad import under_transform

BLOCK = 2**18  # weights widened at a time: 1 MiB in float32, see bench/narrow.py
COLUMNS = 128  # but at least so many columns of them, or a matmul of many rows has too little to do


def linear(x: Float[Tensor, "*rows in"], w: Float[Tensor, "out in"]) -> Float[Tensor, "*rows out"]:
    """x W^T in the dtype of x, which is wider than that of w; the gradient of w has the dtype of w.

    Products and sums are those of float32 weights that were rounded to 16 bits: activations are
    never rounded, so results are at least as precise as bfloat16 in hardware gives them. One
    float32 row on a CPU that needs no gradient, which is a step of decoding, is rounded to bfloat16
    as there: torch's kernel for a bfloat16 matrix and a vector adds up in float32 on any CPU.
    """
    vector = (
        x.numel() == x.shape[-1]
        and x.device.type == "cpu"
        and x.dtype == torch.float32
        and w.is_contiguous()
    )
    if (
        vector
        and w.dtype == torch.bfloat16
        and not torch.is_grad_enabled()
        and not under_transform()
    ):
        return torch.mv(w, x.flatten().to(w.dtype)).to(x.dtype).view(*x.shape[:-1], w.shape[0])
    rows = x.reshape(-1, x.shape[-1])
    y = _product(rows, w.mT) if torch.compiler.is_compiling() else _Product.apply(rows, w.mT)
    return y.view(*x.shape[:-1], w.shape[0])


class _Product(torch.autograd.Function):
    """x m with m in 16 bits; keeps m as it is, and x where m trains."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, m: Tensor) -> Tensor:
        return _times(x, m)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, m = inputs
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, m)
        if forward_ad._current_level >= 0:  # pyright: ignore[reportPrivateUsage] - else x would be kept for nothing
            ctx.save_for_forward(x, m)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Any, ...]:
        (x, m), grad = ctx.saved_tensors, grad_outputs[0]
        d_x = _Product.apply(grad, m.mT) if ctx.needs_input_grad[0] else None
        return d_x, _gradient(x, grad, m.dtype) if ctx.needs_input_grad[1] else None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        (x, m), (t_x, t_m) = ctx.saved_tensors, tangents
        if t_m is None:
            return _Product.apply(t_x, m)
        by_m: Tensor = _Product.apply(x, t_m)
        return by_m if t_x is None else _Product.apply(t_x, m) + by_m


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, m = inputs
    ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, m)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, m = ctx.saved_tensors
    d_x = _product(grad, m.mT) if ctx.needs_input_grad[0] else None
    return d_x, _product_gradient(x, grad, m.dtype) if ctx.needs_input_grad[1] else None


@operator("minitune::widened_product", _gradients, _keep)
def _product(x: Tensor, m: Tensor) -> Tensor:
    """x m as an operator that torch.compile calls as it is: a compiler would widen every weight of
    a block whole.
    """
    return _times(x, m)


@operator("minitune::widened_product_gradient")
def _product_gradient(x: Tensor, grad: Tensor, dtype: torch.dtype) -> Tensor:
    """x^T grad as an operator, for the same reason."""
    return _gradient(x, grad, dtype).mT.clone().mT  # an operator may return no view


@torch.library.register_fake("minitune::widened_product")
def _(x: Tensor, m: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], m.shape[1])


@torch.library.register_fake("minitune::widened_product_gradient")
def _(x: Tensor, grad: Tensor, dtype: torch.dtype) -> Tensor:
    return x.new_empty(grad.shape[1], x.shape[1], dtype=dtype).mT


def _times(x: Float[Tensor, "n k"], m: Float[Tensor, "k c"]) -> Float[Tensor, "n c"]:
    """x m, columns of m widened a block at a time; at once where the wide m is no larger than the
    result, or on a GPU.
    """
    if x.device.type != "cpu" or len(x) >= m.shape[0]:
        return x @ m.to(x.dtype)
    blocks = [x @ some.to(x.dtype) for some in m.split(_n_columns(m.shape[0]), 1)]
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks, -1)


def _gradient(
    x: Float[Tensor, "n k"], grad: Float[Tensor, "n c"], dtype: torch.dtype
) -> Float[Tensor, "k c"]:
    """x^T grad, summed in the dtype of x and rounded once, a block of columns at a time; its
    columns are contiguous, as are those of the transposed weight that it is the gradient of.
    """
    blocks = [(some.mT @ x).to(dtype) for some in grad.split(_n_columns(x.shape[1]), 1)]
    return torch.cat(blocks).mT


def _n_columns(n_rows: int) -> int:
    """Number of columns of a weight with so many rows that are wide at a time."""
    return max(COLUMNS, BLOCK // max(1, n_rows))

"""Linear layers: a dense or quantized weight, and the low-rank change of one."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from minitune import hardware
from minitune.nn.dropout import dropped
from minitune.quant import widened
from minitune.quant.linear import quantized_linear
from minitune.quant.schemes import dequantize
from minitune.quant.tensors import QTensor
from minitune.sharding.tensor_parallel import (
    ColumnParallel,
    RowParallel,
    all_tokens,
    summed,
    summed_own_tokens,
)
from minitune.sharding.tokens import Sharers
from minitune.types import Adapted, Delta, Dropout, wide_dtype


def linear(
    x: Float[Tensor, "*rows in"],
    w: Float[Tensor, "out in"] | QTensor | Adapted | ColumnParallel | RowParallel,
    bias: Float[Tensor, "out"] | None = None,
) -> Float[Tensor, "*rows_out out"]:
    """Product x W^T + bias in the dtype of x, however the leaf W multiplies: dense, quantized,
    adapted, or shared by ranks, which have some of the tokens x [B t in] each.

    Of a ColumnParallel weight some outputs for the tokens of all ranks; from those a RowParallel
    one makes all outputs for the tokens of this rank. TypeError for a Delta, whose scale only the
    rule that trains it knows.
    """
    if isinstance(w, ColumnParallel | RowParallel):
        (y,) = linears(x, [w], [bias])
        return y
    if isinstance(w, Adapted):
        return _adapted_linear(x, w, bias)
    bias = None if bias is None else bias.to(x.dtype)
    if isinstance(w, Delta):
        raise TypeError(
            "linear: a leaf of the params is a Delta, expected a weight; make the params of a "
            "forward by Lora.apply"
        )
    if not isinstance(w, Tensor):
        y = quantized_linear(x, w)
    elif w.itemsize < x.itemsize:
        y = widened.linear(x, w)
    else:
        return F.linear(x, w.to(x.dtype), bias)
    return y if bias is None else y + bias


def linears(
    x: Float[Tensor, "*rows in"], weights: Sequence[Any], biases: Sequence[Tensor | None]
) -> list[Tensor]:
    """Products of one x with several weights, as `linear` gives each: tokens of several ranks come
    together once for all of them.
    """
    if isinstance(weights[0], ColumnParallel):
        x = all_tokens(x, weights[0].sharers)
    return [_of_rank(x, w, bias) for w, bias in zip(weights, biases, strict=True)]


def _of_rank(x: Tensor, w: Any, bias: Tensor | None) -> Tensor:
    """Product of the x that a rank's part of a weight multiplies."""
    if isinstance(w, ColumnParallel):
        return linear(x, w.w, w.own(bias))
    if not isinstance(w, RowParallel):
        return linear(x, w, bias)
    is_adapted = isinstance(w.w, Adapted)
    summand = _adapted_linear(x, w.w, None, w.sharers) if is_adapted else linear(x, w.w)
    y = summed_own_tokens(summand, w.sharers)
    return y if bias is None else y + bias.to(y.dtype)


def _adapted_linear(
    x: Tensor, w: Adapted, bias: Tensor | None, sharers: Sharers | None = None
) -> Tensor:
    """x (W + b a)^T + bias (Hu et al. 2021, arXiv 2106.09685, eq. 3, with the scale inside b).

    Where the leaf has a magnitude the rows have that length (Liu et al. 2024, arXiv 2402.09353, eq.
    5). Where it has dropout, a gets x with it, and W does not. sharers: ranks that have the other
    columns of W and a.
    """
    magnitude = w.m if isinstance(w.m, Tensor) else None
    # a product that takes the bias along adds it first
    bias_comes_first = isinstance(w.w, Tensor) and magnitude is None
    y = linear(x, w.w, bias if bias_comes_first else None)

    if isinstance(w.dropout, Dropout):
        x = dropped(x, w.dropout)
    a, b = w.a.to(x.dtype), w.b.to(x.dtype)
    n = 1 if a.ndim == 2 else len(a)
    rows, z = (t.reshape(n, -1, t.shape[-1]) for t in (x, y))
    # b^T contiguous: on a CPU the gradient of a view of b takes ten times as long
    z = torch.baddbmm(z, rows @ a.mT, b.reshape(n, *b.shape[-2:]).mT.contiguous())
    if magnitude is not None:
        z = z * (magnitude / row_norms(w, sharers)).to(x.dtype).unsqueeze(-2)
    y = z.view(y.shape)
    return y if bias is None or bias_comes_first else y + bias.to(x.dtype)


def row_norms(adapted: Adapted, sharers: Sharers | None = None) -> Float[Tensor, "*n out"]:
    """|W + b a| of every row in float32 or wider, held constant in the gradient (Liu et al. 2024,
    section 4.3). sharers: ranks that have the other columns.

    From |W|^2 + 2 W a^T b + b a a^T b, so that the sum W + b a is never built.
    """
    wide = wide_dtype(adapted.a.dtype)
    w = adapted.w if isinstance(adapted.w, Tensor) else dequantize(adapted.w, wide)
    w, a, b = (x.detach().to(wide) for x in (w, adapted.a, adapted.b))
    square = w.square().sum(-1) + 2 * ((w @ a.mT) * b).sum(-1) + ((b @ (a @ a.mT)) * b).sum(-1)
    square = square if sharers is None else summed(square, sharers)
    return square.clamp(min=torch.finfo(wide).tiny).sqrt()


def embed(tokens: Int[Tensor, "B T"], w: Float[Tensor, "V D"]) -> Float[Tensor, "B T D"]:
    """Row tokens[b, t] of the embedding, in its dtype; in float32 where the device multiplies no
    bfloat16.

    All that follows takes its dtype from here: such a device multiplies float32 activations by
    weights that stay in 16 bits.
    """
    return F.embedding(tokens, w).to(hardware.product_dtype(w.dtype, w.device))

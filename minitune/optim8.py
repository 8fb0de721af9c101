"""Optimizer states and parameters in fewer bits: block-wise 8-bit moments, and rounding that keeps what bfloat16 would drop."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import BFloat16, Float, UInt8
from torch import Tensor

BLOCK = 256  # moments that share one scale
SMALLEST = 4096  # elements; smaller leaves keep their moments in float32


class Moment8(NamedTuple):
    """A moment as table[codes] * absmax, one absmax for every BLOCK elements counted over the flattened leaf."""

    codes: UInt8[Tensor, "blocks block"]
    absmax: Float[Tensor, "blocks 1"]


def stochastic_bfloat16(x: Float[Tensor, "*shape"], generator: torch.Generator) -> BFloat16[Tensor, "*shape"]:
    """float32 x as one of its two neighbours in bfloat16, the nearer the likelier, so that its mean is x.

    A uniform integer below 2^16 is added to the bits that bfloat16 has no room for, and these are cut off: a carry rounds up.
    """
    drawn = torch.randint(0, 2**16, x.shape, generator=generator, dtype=torch.int32).to(x.device)
    cut = ((x.contiguous().view(torch.int32) + drawn) & -(2**16)).view(torch.float32)
    return torch.where(torch.isfinite(x), cut, x).to(torch.bfloat16)


def quantize(x: Float[Tensor, "*shape"], signed: bool) -> Moment8:
    """The nearest codes of x over the largest absolute value of its block.

    An unsigned x is never rounded to 0 (nor does bitsandbytes): it is what Adam divides by, and a step would grow by 1 / eps.
    """
    flat = x.flatten()
    blocks = F.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)
    absmax = blocks.abs().amax(1, keepdim=True)
    table = dynamic_table(signed).to(x.device)
    unit = blocks / torch.where(absmax > 0, absmax, 1.0)
    codes = torch.bucketize(unit, (table[1:] + table[:-1]) / 2).clamp(min=0 if signed else 1)
    return Moment8(codes.to(torch.uint8), absmax)


def dequantize(q: Moment8, signed: bool, like: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """table[codes] * absmax in float32, in the shape of `like`."""
    table = dynamic_table(signed).to(q.absmax.device)
    values = table.index_select(0, q.codes.flatten().int()).view(q.codes.shape)
    return (values * q.absmax).flatten()[: like.numel()].view(like.shape)


def dynamic_table(signed: bool) -> Float[Tensor, "codes"]:
    """The 256 values of the dynamic map in [-1, 1] or [0, 1]: seven decades, each with twice the fractions of the one below
    (Dettmers et al. 2021, section 1.3), with 0 and 1."""
    values = [0.0, 1.0]
    for i in range(7):
        n = 2 ** (i + (0 if signed else 1))
        edges = torch.linspace(0.1, 1.0, n + 1, dtype=torch.float64)
        means = (10.0 ** (i - 6) * (edges[1:] + edges[:-1]) / 2).tolist()
        values += means + ([-x for x in means] if signed else [])
    return torch.tensor(sorted(values), dtype=torch.float32)

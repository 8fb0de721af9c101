"""Codes of quantized weights and the numbers that they stand for, before scaling."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

from minitune.quant import float4, nf4
from minitune.quant.tensors import QMXFP4, QNF4, QNVFP4, QFloat8, QInt4, QInt8

Codes = QInt8 | QFloat8 | QInt4 | QNF4 | QMXFP4 | QNVFP4


def codes_and_scales(q: Codes) -> tuple[Tensor, Float[Tensor, "rows groups"]]:
    """Codes by rows, and the scales of a row's groups in float32."""
    if isinstance(q, QNF4):
        return nf4.blocks(q)
    if isinstance(q, QMXFP4):
        return q.codes, float4.exponents_to_scales(q.scale)
    if isinstance(q, QNVFP4):
        return q.codes, q.scale.float() / q.divisor
    return q.codes, q.scale.float()


def levels_of(q: Codes, codes: Tensor) -> Tensor:
    """Numbers that rows of codes stand for, before scaling."""
    if isinstance(q, QInt8 | QFloat8):
        return codes.to(torch.float32) if isinstance(q, QFloat8) else codes
    if not isinstance(q, QInt4) and not torch.compiler.is_compiling():
        table = _table(q).to(codes.device, non_blocking=True)
        halves = (table.repeat(16), table.repeat_interleave(16))  # of a byte, the low one first
        pairs = torch.stack(halves[::-1] if isinstance(q, QNF4) else halves, dim=1)
        return F.embedding(codes.int(), pairs).flatten(1)
    if codes.device.type != "cpu":
        return _levels_at_once(q, codes)
    # the two halves of each byte spread over two bytes, which are neighbours in memory
    if isinstance(q, QInt4):
        wide = codes.to(torch.int16)
        return (wide & 15 | (wide & 240) << 4).view(torch.int8) - 8
    wide, table = codes.int(), _table(q)
    halves = (table[wide & 15], table[wide >> 4])
    return torch.stack(halves[::-1] if isinstance(q, QNF4) else halves, -1).flatten(1)


def _levels_at_once(q: QInt4 | QNF4 | QMXFP4 | QNVFP4, codes: UInt8[Tensor, "rows half"]) -> Tensor:
    """Levels, each number made from its byte alone: the compiler makes one kernel of this and the
    scaling.
    """
    first = torch.arange(2, dtype=torch.uint8, device=codes.device) == (
        1 if isinstance(q, QNF4) else 0
    )
    halves = torch.where(first, codes[..., None] & 15, codes[..., None] >> 4).flatten(1)
    if isinstance(q, QInt4):
        return halves.to(torch.int8) - 8
    return _table(q).to(codes.device, non_blocking=True)[halves.int()]


def _table(q: QNF4 | QMXFP4 | QNVFP4) -> Float[Tensor, "16"]:
    """Numbers that the 16 codes stand for, before scaling."""
    return nf4.LEVELS if isinstance(q, QNF4) else float4.LEVELS

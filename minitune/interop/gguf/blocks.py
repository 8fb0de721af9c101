"""Block formats of GGUF files: rows of float32 to the bytes that llama.cpp reads, all blocks of a
tensor at once.

A block is a stretch of one row with its own scale d in float16; those of 256 are in k_quants.py.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from minitune.interop.gguf import k_quants
from minitune.quant.tensors import QInt4, QInt8

# weights that are encoded at a time: intermediate results stay in a core's cache, and the bytes
# are the same whatever the number of threads
PIECE = 2**17


def f16(x: Float[Tensor, "blocks size"]) -> UInt8[Tensor, "blocks bytes"]:
    """IEEE half precision."""
    return x.half().view(torch.uint8)


def bf16(x: Float[Tensor, "blocks size"]) -> UInt8[Tensor, "blocks bytes"]:
    """bfloat16."""
    return x.bfloat16().view(torch.uint8)


def f32(x: Float[Tensor, "blocks size"]) -> UInt8[Tensor, "blocks bytes"]:
    """As it is."""
    return x.contiguous().view(torch.uint8)


def q8_0(x: Float[Tensor, "blocks size"]) -> UInt8[Tensor, "blocks bytes"]:
    """x = d q, q in [-127, 127], d = max|x| / 127; halves are rounded away from zero."""
    d = x.abs().amax(1, keepdim=True) / 127
    scaled = x * _inverse(d)
    q = torch.copysign((scaled.abs() + 0.5).floor(), scaled)
    return torch.cat([f16(d), q.to(torch.int8).view(torch.uint8)], dim=1)


def q4_0(x: Float[Tensor, "blocks size"]) -> UInt8[Tensor, "blocks bytes"]:
    """x = d (q - 8), q in [0, 15], -8 d the value of the largest magnitude; byte j holds q_j and,
    above it, q_(j + 16).
    """
    d = x.gather(1, x.abs().argmax(1, keepdim=True)) / -8
    q = (x * _inverse(d) + 8.5).trunc().clamp(0, 15).to(torch.uint8)
    return torch.cat([f16(d), q[:, :16] | q[:, 16:] << 4], dim=1)


def q8_0_of(w: QInt8) -> UInt8[Tensor, "out row_bytes"]:
    """Rows of Q8_0 with the codes of w, and its scales in float16."""
    codes = w.codes.view(torch.uint8).unflatten(1, (-1, 32))
    return torch.cat([_scales(w.scale, codes.shape[1]), codes], dim=2).flatten(1)


def q4_0_of(w: QInt4) -> UInt8[Tensor, "out row_bytes"]:
    """Rows of Q4_0 with the codes of w, whose groups must be a multiple of 32, and its scales in
    float16.
    """
    q = torch.stack([w.codes & 15, w.codes >> 4], dim=2).flatten(1).unflatten(1, (-1, 32))
    return torch.cat(
        [_scales(w.scale, q.shape[1]), q[:, :, :16] | q[:, :, 16:] << 4], dim=2
    ).flatten(1)


def q5_0(x: Float[Tensor, "blocks size"]) -> UInt8[Tensor, "blocks bytes"]:
    """x = d (q - 16), q in [0, 31], -16 d the value of the largest magnitude; the fifth bits of the
    codes as a little-endian number of 32 bits, then the others as in Q4_0.
    """
    d = x.gather(1, x.abs().argmax(1, keepdim=True)) / -16
    q = (x * _inverse(d) + 16.5).trunc().clamp(0, 31).to(torch.uint8)
    return torch.cat([f16(d), _fifth_bits(q), q[:, :16] & 15 | (q[:, 16:] & 15) << 4], dim=1)


def q5_1(x: Float[Tensor, "blocks size"]) -> UInt8[Tensor, "blocks bytes"]:
    """x = d q + m, q in [0, 31], m the smallest value; d, m, then as Q5_0."""
    low = x.amin(1, keepdim=True)
    d = (x.amax(1, keepdim=True) - low) / 31
    q = ((x - low) * _inverse(d) + 0.5).trunc().clamp(0, 31).to(torch.uint8)
    low_bits = q[:, :16] & 15 | (q[:, 16:] & 15) << 4
    return torch.cat([f16(d), f16(low), _fifth_bits(q), low_bits], dim=1)


class BlockType(NamedTuple):
    """Storage of a tensor: its number in the file, elements and bytes of a block, the file type of
    files mostly made of it, the encoder, and the type that stands in where a row is no multiple of
    the block, as llama.cpp chooses it.
    """

    id: int
    size: int
    n_bytes: int
    file_type: int
    encode: Callable[..., UInt8[Tensor, "blocks bytes"]]
    otherwise: str


TYPES = {
    "F32": BlockType(0, 1, 4, 0, f32, "F32"),
    "F16": BlockType(1, 1, 2, 1, f16, "F16"),
    "BF16": BlockType(30, 1, 2, 32, bf16, "BF16"),
    "Q8_0": BlockType(8, 32, 34, 7, q8_0, "F16"),
    "Q4_0": BlockType(2, 32, 18, 2, q4_0, "F16"),
    "Q5_0": BlockType(6, 32, 22, 8, q5_0, "F16"),
    "Q5_1": BlockType(7, 32, 24, 9, q5_1, "F16"),
    "Q4_K": BlockType(12, 256, 144, 14, k_quants.q4_k, "Q5_0"),
    "Q5_K": BlockType(13, 256, 176, 16, k_quants.q5_k, "Q5_1"),
    "Q6_K": BlockType(14, 256, 210, 18, k_quants.q6_k, "Q8_0"),
}


def encode(
    w: Float[Tensor, "out in"], kind: str, importance: Float[Tensor, "in"] | None = None
) -> UInt8[Tensor, "out row_bytes"]:
    """Bytes of every row; the length of a row must be a multiple of the type's block.

    importance: of the columns, which K types weigh errors by.
    """
    block = TYPES[kind]
    rows = max(1, PIECE // w.shape[1])
    return torch.cat([_encoded_rows(some, block, importance) for some in w.split(rows)])


def _encoded_rows(
    w: Float[Tensor, "out in"], block: BlockType, importance: Float[Tensor, "in"] | None
) -> UInt8[Tensor, "out row_bytes"]:
    blocks = w.float().reshape(-1, block.size)
    if block.size != k_quants.BLOCK or importance is None:
        return block.encode(blocks).reshape(w.shape[0], -1)
    weights = importance.float().expand(w.shape).reshape(-1, block.size)
    return block.encode(blocks, weights).reshape(w.shape[0], -1)


def _fifth_bits(q: UInt8[Tensor, "blocks 32"]) -> UInt8[Tensor, "blocks 4"]:
    """Fifth bit of each code: that of code i is bit i % 8 of byte i // 8."""
    shifts = torch.arange(8, dtype=torch.uint8, device=q.device)
    return (q.unflatten(1, (4, 8)) >> 4 << shifts).sum(2).to(torch.uint8)


def _scales(scale: Float[Tensor, "out groups"], n_blocks: int) -> UInt8[Tensor, "out n_blocks 2"]:
    """Scale of every block as the two bytes of a float16."""
    return (
        scale.repeat_interleave(n_blocks // scale.shape[1], 1)
        .half()
        .view(torch.uint8)
        .unflatten(1, (-1, 2))
    )


def _inverse(d: Tensor) -> Tensor:
    """1 / d, and 0 for 0."""
    return torch.where(d == 0, 0.0, 1 / d)

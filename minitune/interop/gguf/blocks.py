"""Block formats of GGUF files: rows of float32 to the bytes that llama.cpp reads, all blocks of a
tensor at once.

A block is a stretch of one row with its own scale d in float16; a K block of 256 also has 6-bit
scales (Q4_K: and minima) of its sub-blocks, and its codes are rounded against those scales as they
are stored.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from minitune.quant.tensors import QInt4, QInt8


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


def q4_k(x: Float[Tensor, "blocks size"]) -> UInt8[Tensor, "blocks bytes"]:
    """x = d S q - d_min M, q in [0, 15], with S and M in [0, 63] of each of 8 sub-blocks of 32,
    found by least squares.

    Bytes: d, d_min; S and M of the sub-blocks 0..3 in 6 bits, above them the high 2 bits of those
    of 4..7; the low 4 bits of S, and above them of M, of 4..7; then the codes, 64 neighbours in 32
    bytes, the first 32 in the low bits.
    """
    x = x.unflatten(1, (8, 32))
    scale, low = _line(x, 15)
    d, d_min = ((part.amax(1, keepdim=True) / 63).half() for part in (scale, low))
    s, m, q = _nearby(x, scale, low, d.float(), d_min.float())
    head = torch.cat(
        [part[:, :4] | part[:, 4:] >> 4 << 6 for part in (s, m)]
        + [s[:, 4:] & 15 | (m[:, 4:] & 15) << 4],
        dim=1,
    )
    pairs = q.unflatten(1, (4, 2))
    codes = pairs[:, :, 0] | pairs[:, :, 1] << 4
    return torch.cat([d.view(torch.uint8), d_min.view(torch.uint8), head, codes.flatten(1)], dim=1)


def q6_k(x: Float[Tensor, "blocks size"]) -> UInt8[Tensor, "blocks bytes"]:
    """x = d s (q - 32), q in [0, 63], with s in [-128, 127] of each of 16 sub-blocks of 16, found
    by least squares.

    Bytes: of each half of 128, as four quarters q1..q4 of 32, the low 4 bits as q1 | q3 << 4 and q2
    | q4 << 4; of each half the high 2 bits as q1 | q2 << 2 | q3 << 4 | q4 << 6; the s as int8; d.
    """
    x = x.unflatten(1, (16, 16))
    scale = _slope(x, 32)
    d = (scale.gather(1, scale.abs().argmax(1, keepdim=True)) / -128).half()
    s = (scale * _inverse(d.float())).round().clamp(-128, 127)
    q = (x * _inverse(d.float() * s)[:, :, None]).round().clamp(-32, 31) + 32
    quarters = q.to(torch.uint8).reshape(-1, 2, 4, 32)
    q1, q2, q3, q4 = (quarters[:, :, i] for i in range(4))
    low = torch.cat([q1 & 15 | (q3 & 15) << 4, q2 & 15 | (q4 & 15) << 4], dim=2)
    high = q1 >> 4 | q2 >> 4 << 2 | q3 >> 4 << 4 | q4 >> 4 << 6
    return torch.cat(
        [low.flatten(1), high.flatten(1), s.to(torch.int8).view(torch.uint8), d.view(torch.uint8)],
        dim=1,
    )


class BlockType(NamedTuple):
    """Storage of a tensor: its number in the file, elements and bytes of a block, the file type of
    files mostly made of it, the encoder, and the type that stands in where a row is no multiple of
    the block.
    """

    id: int
    block: int
    n_bytes: int
    file_type: int
    encode: Callable[[Float[Tensor, "blocks size"]], UInt8[Tensor, "blocks bytes"]]
    otherwise: str


TYPES = {
    "F32": BlockType(0, 1, 4, 0, f32, "F32"),
    "F16": BlockType(1, 1, 2, 1, f16, "F16"),
    "BF16": BlockType(30, 1, 2, 32, bf16, "BF16"),
    "Q8_0": BlockType(8, 32, 34, 7, q8_0, "F16"),
    "Q4_0": BlockType(2, 32, 18, 2, q4_0, "F16"),
    "Q4_K": BlockType(12, 256, 144, 14, q4_k, "Q4_0"),
    "Q6_K": BlockType(14, 256, 210, 18, q6_k, "Q8_0"),
}


def encode(w: Float[Tensor, "out in"], kind: str) -> UInt8[Tensor, "out row_bytes"]:
    """Bytes of every row; the length of a row must be a multiple of the type's block."""
    blocks = w.float().reshape(-1, TYPES[kind].block)
    return TYPES[kind].encode(blocks).reshape(w.shape[0], -1)


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


def _line(
    x: Float[Tensor, "blocks subs size"], top: int
) -> tuple[Float[Tensor, "blocks subs"], Float[Tensor, "blocks subs"]]:
    """(scale, low) >= 0 of each sub-block such that x ~ scale q - low with q in [0, top].

    A line through (q, x) by least squares for each of several ways to round x to q, of which the
    best is taken.
    """
    bottom = x.amin(2).clamp(max=0)
    width = x.amax(2) - bottom
    best = (torch.full_like(width, torch.inf), torch.zeros_like(width), torch.zeros_like(width))
    for i in range(11):
        steps = (top - 1 + 0.2 * i) * _inverse(width)
        q = ((x - bottom[:, :, None]) * steps[:, :, None]).round().clamp(0, top)
        n, sq, sx, sqq, sqx = x.shape[2], q.sum(2), x.sum(2), q.square().sum(2), (q * x).sum(2)
        slope = (n * sqx - sq * sx) * _inverse(n * sqq - sq.square())
        low = (slope * sq - sx) / n
        slope = torch.where(low < 0, sqx * _inverse(sqq), slope).clamp(min=0)
        low = low.clamp(min=0)
        error = (slope[:, :, None] * q - low[:, :, None] - x).square().sum(2)
        best = tuple(
            torch.where(error < best[0], new, old)
            for new, old in zip((error, slope, low), best, strict=True)
        )
    return best[1], best[2]


def _nearby(
    x: Float[Tensor, "blocks subs size"],
    scale: Float[Tensor, "blocks subs"],
    low: Float[Tensor, "blocks subs"],
    d: Float[Tensor, "blocks 1"],
    d_min: Float[Tensor, "blocks 1"],
) -> tuple[
    UInt8[Tensor, "blocks subs"], UInt8[Tensor, "blocks subs"], UInt8[Tensor, "blocks subs size"]
]:
    """(S, M, codes) with the least error of d S q - d_min M among the neighbours of scale / d and
    low / d_min in [0, 63].
    """
    near = [(part * _inverse(unit)).round() for part, unit in ((scale, d), (low, d_min))]
    best = (torch.full_like(scale, torch.inf), scale, scale, x)
    for i in (0, -1, 1):
        for j in (0, -1, 1):
            s, m = (near[0] + i).clamp(0, 63), (near[1] + j).clamp(0, 63)
            step, offset = (d * s)[:, :, None], (d_min * m)[:, :, None]
            q = ((x + offset) * _inverse(step)).round().clamp(0, 15)
            error = (step * q - offset - x).square().sum(2)
            better = error < best[0]
            best = (
                *(
                    torch.where(better, new, old)
                    for new, old in zip((error, s, m), best[:3], strict=True)
                ),
                torch.where(better[:, :, None], q, best[3]),
            )
    return best[1].to(torch.uint8), best[2].to(torch.uint8), best[3].to(torch.uint8)


def _slope(x: Float[Tensor, "blocks subs size"], top: int) -> Float[Tensor, "blocks subs"]:
    """Signed scale of each sub-block such that x ~ scale q with q in [-top, top - 1], by least
    squares over several ways to round x to q: the best of them has the largest (q x)^2 / q^2.
    """
    largest = x.gather(2, x.abs().argmax(2, keepdim=True))
    best = (torch.zeros_like(largest[:, :, 0]), torch.zeros_like(largest[:, :, 0]))
    for i in range(-9, 10):
        q = (x * (-(top + 0.1 * i) * _inverse(largest))).round().clamp(-top, top - 1)
        sqx, inverse = (q * x).sum(2), _inverse(q.square().sum(2))
        gain = sqx.square() * inverse
        best = tuple(
            torch.where(gain > best[0], new, old)
            for new, old in zip((gain, sqx * inverse), best, strict=True)
        )
    return best[1]

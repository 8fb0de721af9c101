"""K block formats of GGUF files: 256 neighbours of a row in sub-blocks, whose scales are small
integers times a scale of the block.

The scales of a sub-block are found by weighted least squares over several ways to round its
numbers; which ones are worth most is what the importance of a column says, or else the size of the
numbers, as llama.cpp has it. The codes are rounded against the scales as they are stored.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

BLOCK = 256  # neighbours
LARGEST_SCALE = 63  # of a sub-block in Q4_K and Q5_K
CODE_BITS = {"Q4_K": 4, "Q5_K": 5}


class LineCodes(NamedTuple):
    """Blocks of Q4_K and Q5_K before they are packed: x = d S q - d_min M."""

    d: Float[Tensor, "blocks 1"]  # in float16, as d_min
    d_min: Float[Tensor, "blocks 1"]
    s: UInt8[Tensor, "blocks 8"]  # in [0, 63], as m
    m: UInt8[Tensor, "blocks 8"]
    q: UInt8[Tensor, "blocks 8 32"]  # in [0, 15], or [0, 31] in Q5_K

    def values(self) -> Float[Tensor, "blocks 256"]:
        """Numbers that the codes stand for, in float32."""
        step = (self.d.float() * self.s)[:, :, None]
        return (step * self.q - (self.d_min.float() * self.m)[:, :, None]).flatten(1)


class SlopeCodes(NamedTuple):
    """Blocks of Q6_K before they are packed: x = d s (q - 32)."""

    d: Float[Tensor, "blocks 1"]  # in float16
    s: Float[Tensor, "blocks 16"]  # whole numbers in [-128, 127]
    q: Float[Tensor, "blocks 16 16"]  # whole numbers in [-32, 31], less the 32

    def values(self) -> Float[Tensor, "blocks 256"]:
        """Numbers that the codes stand for, in float32."""
        return ((self.d.float() * self.s)[:, :, None] * self.q).flatten(1)


def q4_k(
    x: Float[Tensor, "blocks size"], importance: Float[Tensor, "blocks size"] | None = None
) -> UInt8[Tensor, "blocks bytes"]:
    """Bytes of a block: d, d_min; S and M of the sub-blocks 0..3 in 6 bits, above them the high 2
    bits of those of 4..7; the low 4 bits of S, and above them of M, of 4..7; then the codes, 64
    neighbours in 32 bytes, the first 32 in the low bits.
    """
    codes = line_codes(x, importance, CODE_BITS["Q4_K"])
    return torch.cat([_line_head(codes), _nibbles(codes.q)], dim=1)


def q5_k(
    x: Float[Tensor, "blocks size"], importance: Float[Tensor, "blocks size"] | None = None
) -> UInt8[Tensor, "blocks bytes"]:
    """Bytes of a block: as in Q4_K, but between the scales and the low 4 bits of the codes stand
    their fifth bits, those of sub-block i as bit i of 32 bytes.
    """
    codes = line_codes(x, importance, CODE_BITS["Q5_K"])
    shifts = torch.arange(8, dtype=torch.uint8, device=x.device)[None, :, None]
    high = (codes.q >> 4 << shifts).sum(1).to(torch.uint8)
    return torch.cat([_line_head(codes), high, _nibbles(codes.q & 15)], dim=1)


def q6_k(
    x: Float[Tensor, "blocks size"], importance: Float[Tensor, "blocks size"] | None = None
) -> UInt8[Tensor, "blocks bytes"]:
    """Bytes of a block: of each half of 128, as four quarters q1..q4 of 32, the low 4 bits as q1 |
    q3 << 4 and q2 | q4 << 4; of each half the high 2 bits as q1 | q2 << 2 | q3 << 4 | q4 << 6; the
    s as int8; d.
    """
    codes = slope_codes(x, importance)
    quarters = (codes.q + 32).to(torch.uint8).reshape(-1, 2, 4, 32)
    q1, q2, q3, q4 = (quarters[:, :, i] for i in range(4))
    low = torch.cat([q1 & 15 | (q3 & 15) << 4, q2 & 15 | (q4 & 15) << 4], dim=2)
    high = q1 >> 4 | q2 >> 4 << 2 | q3 >> 4 << 4 | q4 >> 4 << 6
    scales = codes.s.to(torch.int8).view(torch.uint8)
    return torch.cat([low.flatten(1), high.flatten(1), scales, codes.d.view(torch.uint8)], dim=1)


def line_codes(
    x: Float[Tensor, "blocks size"], importance: Float[Tensor, "blocks size"] | None, bits: int
) -> LineCodes:
    """Codes of 8 sub-blocks of 32 with a scale and a minimum each."""
    weights, x = (_elements_first(part, 8) for part in (line_weights(x, importance), x))
    top = 2**bits - 1
    scale, low = _line(x, weights, top)
    units = [(part.amax(1, keepdim=True) / LARGEST_SCALE).half() for part in (scale, low)]
    s, m = _nearby_lines(x, weights, (scale, low), units, top)
    q = _line_levels(x, units[0].float() * s, units[1].float() * m, top).permute(1, 2, 0)
    return LineCodes(*units, *(whole.to(torch.uint8) for whole in (s, m, q)))


def slope_codes(
    x: Float[Tensor, "blocks size"], importance: Float[Tensor, "blocks size"] | None
) -> SlopeCodes:
    """Codes of 16 sub-blocks of 16 with a signed scale each."""
    weights, x = (_elements_first(part, 16) for part in (slope_weights(x, importance), x))
    scale = _slope(x, weights)
    d = (scale.gather(1, scale.abs().argmax(1, keepdim=True)) / -128).half()
    s = _nearby_slopes(x, weights, scale, d.float())
    return SlopeCodes(d, s, _slope_levels(x, d.float() * s).permute(1, 2, 0))


def _elements_first(
    x: Float[Tensor, "blocks size"], subs: int
) -> Float[Tensor, "per_sub blocks subs"]:
    """Blocks with the elements of a sub-block in the first dimension: sums over it are several
    times as fast as over the last one, and a number of each sub-block multiplies all of it.
    """
    return x.unflatten(1, (subs, -1)).permute(2, 0, 1).contiguous()


def line_weights(
    x: Float[Tensor, "blocks size"], importance: Float[Tensor, "blocks size"] | None
) -> Float[Tensor, "blocks size"]:
    """Weights of the squared errors in Q4_K and Q5_K, as llama.cpp has them.

    h_j sqrt(2 mean(x^2) + x_j^2) with the mean over the block, where h is the importance of the
    columns; without one |x_j| + sqrt(mean(x^2)) with the mean over the sub-block.
    """
    if importance is not None:
        spread = 2 * x.square().mean(1, keepdim=True)
        return importance * (spread + x.square()).sqrt()
    subs = x.unflatten(1, (8, 32))
    return (subs.abs() + subs.square().mean(2, keepdim=True).sqrt()).flatten(1)


def slope_weights(
    x: Float[Tensor, "blocks size"], importance: Float[Tensor, "blocks size"] | None
) -> Float[Tensor, "blocks size"]:
    """Weights of the squared errors in Q6_K, as llama.cpp has them: the importance of the columns,
    or else x^2.
    """
    return x.square() if importance is None else importance


def _line_head(codes: LineCodes) -> UInt8[Tensor, "blocks 16"]:
    """Scales of a block as they are packed in front of its codes."""
    s, m = codes.s, codes.m
    first = [part[:, :4] | part[:, 4:] >> 4 << 6 for part in (s, m)]
    last = s[:, 4:] & 15 | (m[:, 4:] & 15) << 4
    units = [part.view(torch.uint8) for part in (codes.d, codes.d_min)]
    return torch.cat([*units, *first, last], dim=1)


def _nibbles(q: UInt8[Tensor, "blocks 8 32"]) -> UInt8[Tensor, "blocks 128"]:
    """Codes of 4 bits, those of every second sub-block above those of the one before it."""
    pairs = q.unflatten(1, (4, 2))
    return (pairs[:, :, 0] | pairs[:, :, 1] << 4).flatten(1)


def _inverse(d: Tensor) -> Tensor:
    """1 / d, and 0 for 0."""
    return torch.where(d == 0, 0.0, 1 / d)


def _line(
    x: Float[Tensor, "per_sub blocks subs"], weights: Float[Tensor, "per_sub blocks subs"], top: int
) -> tuple[Float[Tensor, "blocks subs"], Float[Tensor, "blocks subs"]]:
    """(scale, low) >= 0 of each sub-block such that x ~ scale q - low with q in [0, top].

    A line through (q, x) by weighted least squares for each of several ways to round x to q, of
    which the best is taken. Its error follows from the sums that the line is found by.
    """
    bottom = x.amin(0).clamp(max=0)
    y = x - bottom  # y ~ slope q + start
    width, wy = y.amax(0), weights * y
    per_width, n, sy = _inverse(width), weights.sum(0), wy.sum(0)
    best = (torch.full_like(width, torch.inf), torch.zeros_like(width), torch.zeros_like(width))
    for i in range(-4, 7):
        q = (y * ((top + 0.2 * i) * per_width)).round().clamp(max=top)
        wq = weights * q
        sq, sqq, sqy = wq.sum(0), (wq * q).sum(0), (wy * q).sum(0)
        spread = n * sqq - sq.square()
        # nothing but rounding is left of it where all codes are equal
        slope = (n * sqy - sq * sy) * torch.where(spread > 1e-6 * n * sqq, _inverse(spread), 0.0)
        start = (sy - slope * sq) * _inverse(n)
        # no minimum is stored below 0
        below = start > -bottom
        slope = torch.where(below, (sqy + bottom * sq) * _inverse(sqq), slope).clamp(min=0)
        start = torch.where(below, -bottom, start)
        error = slope * (slope * sqq - 2 * sqy) + start * (start * n - 2 * sy + 2 * slope * sq)
        candidate = (error, slope, -start - bottom)
        best = _better(candidate, best)
    return best[1], best[2].clamp(min=0)


def _better(one: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Elementwise whichever has the smaller first part, the second where they are equal."""
    smaller = one[0] < other[0]
    return tuple(torch.where(smaller, a, b) for a, b in zip(one, other, strict=True))


def _line_levels(x: Tensor, step: Tensor, offset: Tensor, top: int) -> Tensor:
    """Codes nearest to x on the line step q - offset."""
    return ((x + offset) * _inverse(step)).round().clamp(0, top)


def _nearby_lines(
    x: Float[Tensor, "per_sub blocks subs"],
    weights: Float[Tensor, "per_sub blocks subs"],
    line: tuple[Float[Tensor, "blocks subs"], Float[Tensor, "blocks subs"]],
    units: list[Float[Tensor, "blocks 1"]],
    top: int,
) -> tuple[Float[Tensor, "blocks subs"], Float[Tensor, "blocks subs"]]:
    """(S, M) with the least error of d S q - d_min M among the neighbours of scale / d and low /
    d_min in [0, 63].
    """
    d, d_min = (unit.float() for unit in units)
    s_near, m_near = (
        (part * _inverse(unit)).round() for part, unit in zip(line, (d, d_min), strict=True)
    )
    best = (torch.full_like(s_near, torch.inf), s_near, m_near)
    for i in (0, -1, 1):
        for j in (0, -1, 1):
            s, m = (s_near + i).clamp(0, LARGEST_SCALE), (m_near + j).clamp(0, LARGEST_SCALE)
            step, offset = d * s, d_min * m
            q = _line_levels(x, step, offset, top)
            error = (weights * (step * q - offset - x).square()).sum(0)
            best = _better((error, s, m), best)
    return best[1], best[2]


def _slope(
    x: Float[Tensor, "per_sub blocks subs"], weights: Float[Tensor, "per_sub blocks subs"]
) -> Float[Tensor, "blocks subs"]:
    """Signed scale of each sub-block such that x ~ scale q with q in [-32, 31], by weighted least
    squares over several ways to round x to q: the best of them has the largest (q x)^2 / q^2.
    """
    per_largest = _inverse(x.gather(0, x.abs().argmax(0, keepdim=True)).squeeze(0))
    wx = weights * x
    best = (torch.zeros_like(x[0]), torch.zeros_like(x[0]))
    for i in range(-4, 5):
        q = (x * (-(32 + 0.2 * i) * per_largest)).round().clamp(-32, 31)
        sqx, inverse = (wx * q).sum(0), _inverse((weights * q * q).sum(0))
        best = _better((-sqx.square() * inverse, sqx * inverse), best)
    return best[1]


def _slope_levels(x: Tensor, step: Tensor) -> Tensor:
    """Codes nearest to x as multiples of the step."""
    return (x * _inverse(step)).round().clamp(-32, 31)


def _nearby_slopes(
    x: Float[Tensor, "per_sub blocks subs"],
    weights: Float[Tensor, "per_sub blocks subs"],
    scale: Float[Tensor, "blocks subs"],
    d: Float[Tensor, "blocks 1"],
) -> Float[Tensor, "blocks subs"]:
    """Whole numbers s in [-128, 127] with the least error of d s q among the neighbours of scale /
    d.
    """
    near = (scale * _inverse(d)).round()
    best = (torch.full_like(near, torch.inf), near)
    for i in (0, -1, 1):
        s = (near + i).clamp(-128, 127)
        step = d * s
        error = (weights * (step * _slope_levels(x, step) - x).square()).sum(0)
        best = _better((error, s), best)
    return best[1]

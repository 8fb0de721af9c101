"""4-bit NormalFloat as bitsandbytes stores it: a table of 16 levels, blocks of 64, whose maxima are
kept in 8 bits.

Dettmers et al. 2023, arXiv 2305.14314, section 3.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

from minitune.quant.tensors import QNF4

# quantiles of the normal distribution (Dettmers et al. 2023, arXiv 2305.14314, appendix E)
TABLE = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
LEVELS = torch.tensor(TABLE)
BLOCK, NESTED_BLOCK = 64, 256


def _dynamic_map() -> Tensor:
    """Signed 8-bit floats with 0 to 6 exponent bits, sorted (Dettmers 2015, arXiv 1511.04561,
    section 2): 1, 0, and for each exponent e the midpoints of 2^e equal steps from 0.1 to 1, times
    10^(e-6), with both signs.
    """
    bounds = [torch.linspace(0.1, 1.0, 2**e + 1) for e in range(7)]
    positive = torch.cat([10.0 ** (e - 6) * ((b[:-1] + b[1:]) / 2) for e, b in enumerate(bounds)])
    return torch.cat([positive, -positive, torch.tensor([0.0, 1.0])]).sort().values


DYNAMIC_MAP = _dynamic_map()


def quantized(w: Float[Tensor, "out in"]) -> QNF4:
    """Codes of bitsandbytes 0.50, byte for byte.

    Its CPU library finds the 8-bit code of a block maximum in a table of 65536 equal steps, so here
    too a number is first rounded to such a step: of two codes equally near to within 1.5e-5, it may
    take the farther one.
    """
    n, n_full = w.numel(), w.numel() // BLOCK
    rows = F.pad(w.flatten(), (0, -n % BLOCK)).view(-1, BLOCK)
    peak = rows.abs().amax(1, keepdim=True)
    divisor = peak.clamp(min=1e-38)
    scaled = torch.cat(
        [rows[:n_full] * (1.0 / divisor[:n_full]), rows[n_full:] / divisor[n_full:]]
    ).clamp(-1, 1)
    codes = torch.bucketize(scaled.flatten()[:n], _midpoints(LEVELS.to(w.device))).to(torch.uint8)
    # a partial last block is stored without a zero
    absmax = torch.cat([peak[:n_full], divisor[n_full:]]).flatten()

    offset = absmax.mean()
    nested = F.pad(absmax - offset, (0, -len(absmax) % NESTED_BLOCK)).view(-1, NESTED_BLOCK)
    nested_absmax = nested.abs().amax(1)
    steps = (
        (nested * (1.0 / nested_absmax)[:, None] + 1.0) * 32767.5 + 0.5
    ).floor() / 32767.5 - 1.0
    absmax_codes = torch.bucketize(steps, _midpoints(DYNAMIC_MAP.to(w.device))).to(torch.uint8)
    absmax_codes = torch.where(nested_absmax[:, None] > 0, absmax_codes, 0).flatten()[: len(absmax)]
    packed = (codes[::2] << 4 | codes[1::2]).view(w.shape[0], -1)
    return with_scales(packed, absmax_codes, nested_absmax, offset)


def with_scales(
    codes: UInt8[Tensor, "out half"],
    absmax: UInt8[Tensor, "blocks"] | Float[Tensor, "blocks"],
    nested_absmax: Float[Tensor, "nested"],
    offset: Float[Tensor, ""],
) -> QNF4:
    """Weight of these codes, with the list of its blocks' maxima by rows where blocks end with
    them.
    """
    n_rows, n_bytes = codes.shape
    if n_bytes % (BLOCK // 2) == 0:
        absmax = absmax.view(n_rows, n_bytes // (BLOCK // 2))
    return QNF4(codes, absmax, nested_absmax, offset)


def blocks(q: QNF4) -> tuple[UInt8[Tensor, "blocks 32"], Float[Tensor, "blocks 1"]]:
    """Codes by block, the last one filled up, and the maximum of each block."""
    codes = F.pad(q.codes.flatten(), (0, -q.codes.numel() % (BLOCK // 2))).view(-1, BLOCK // 2)
    absmax = q.absmax.flatten()
    if not absmax.is_floating_point():
        nested = q.nested_absmax.repeat_interleave(NESTED_BLOCK)[: len(absmax)]
        absmax = _decoded(absmax, nested, q.offset)
    return codes, absmax[:, None]


def part(q: QNF4, dim: int, start: int, size: int) -> QNF4:
    """Part of a weight that stands for itself, with the maxima of its blocks as they are: codes of
    maxima are read with the scale of 256 neighbours in the whole, which need not be in the part.

    q: the rows (dim 0) or columns (dim 1) from `start` on, of a weight that has `size` of them;
    nested_absmax is that of the whole.
    """
    absmax = q.absmax
    if not absmax.is_floating_point():
        n_rows, n_groups = absmax.shape
        row, group, row_length = (start, 0, n_groups)
        if dim == 1:
            row, group, row_length = (0, start // BLOCK, size // BLOCK)
        rows = torch.arange(row, row + n_rows, device=absmax.device)
        groups = torch.arange(group, group + n_groups, device=absmax.device)
        numbers = rows[:, None] * row_length + groups  # of the blocks in the whole
        absmax = _decoded(absmax, q.nested_absmax[numbers // NESTED_BLOCK], q.offset)
    nothing = q.nested_absmax[:0]
    return QNF4(q.codes, absmax, nothing, torch.zeros_like(q.offset))


def _decoded(absmax: Tensor, nested_absmax: Tensor, offset: Tensor) -> Tensor:
    """Maxima of blocks, each from its code and its scale."""
    levels = DYNAMIC_MAP.to(absmax.device, non_blocking=True)[absmax.int()]
    return levels * nested_absmax + offset


def _midpoints(sorted_values: Tensor) -> Tensor:
    return (sorted_values[1:] + sorted_values[:-1]) / 2

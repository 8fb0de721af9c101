"""4-bit floats (e2m1) with a scale for a few neighbours of a row: MXFP4, whose scales are powers of
two, and NVFP4, whose scales are 8-bit floats.

OCP Microscaling Formats 1.0, section 5.3 (Rouhani et al. 2023, arXiv 2310.10537); NVIDIA 2025,
arXiv 2509.25149, section 3.
"""

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from minitune.quant.tensors import QMXFP4, QNVFP4

# of the codes 0-7; codes 8-15 are their negatives
VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
LEVELS = torch.tensor([*VALUES, *(-value for value in VALUES)])
BIAS = 127  # of the exponents of MXFP4
MX_GROUP, NV_GROUP = 32, 16  # neighbours that share a scale
E4M3, LARGEST_SCALE = torch.float8_e4m3fn, 448.0  # of NVFP4's scales
TOPS = (6.0, 4.0)  # codes that the largest number of a group may get
SMALLEST_EXPONENT = -120.0  # of the largest number of a weight, so that its divisor is in range


def mxfp4(w: Float[Tensor, "out in"]) -> QMXFP4:
    """Codes of the nearest numbers, with the power of two of each group that loses least: the one
    by which no number is clipped, or half of it.
    """
    groups = w.unflatten(1, (-1, MX_GROUP))
    peak = groups.abs().amax(-1, keepdim=True)
    exponent = (peak.log2().floor() - 2).clamp(-BIAS, BIAS - 1)
    choices = [exponent, exponent + 1]
    best = _best(groups, [torch.exp2(choice) for choice in choices])
    chosen = torch.stack(choices).gather(0, best)[0]
    scale = (chosen + BIAS).to(torch.uint8).squeeze(-1)
    return QMXFP4(_packed(groups, torch.exp2(chosen)), scale)


def nvfp4(w: Float[Tensor, "out in"]) -> QNVFP4:
    """Codes of the nearest numbers, with the scale of each group that loses least of those by which
    its largest number becomes 6 or 4.

    The divisor of all scales is a power of two: weights that a server joins can get the same
    one, and their scales stay what they are.
    """
    groups = w.unflatten(1, (-1, NV_GROUP))
    peak = groups.abs().amax(-1, keepdim=True)
    largest = (peak.amax() / (TOPS[0] * LARGEST_SCALE)).log2().clamp(min=SMALLEST_EXPONENT)
    divisor = torch.exp2(-largest.ceil())
    choices = [(peak * divisor / top).clamp(max=LARGEST_SCALE).to(E4M3) for top in TOPS]
    best = _best(groups, [choice.float() / divisor for choice in choices])
    chosen = torch.stack([choice.float() for choice in choices]).gather(0, best)[0]
    codes = _packed(groups, chosen / divisor)
    return QNVFP4(codes, chosen.to(E4M3).squeeze(-1), divisor)


def exponents_to_scales(exponents: UInt8[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Powers of two that MXFP4 stores as 8-bit exponents."""
    return torch.exp2(exponents.float() - BIAS)


def _best(
    groups: Float[Tensor, "out groups size"], scales: list[Float[Tensor, "out groups 1"]]
) -> Tensor:
    """Index of the scale with the least squared error, of each group."""
    # errors are relative to the largest scale, because squares would leave the range of float32
    unit = torch.stack(scales).amax(0)
    per_unit = torch.where(unit > 0, 1 / unit, 0.0)
    errors = [
        ((LEVELS.to(groups.device)[_codes(groups, s).int()] * s - groups) * per_unit)
        .square()
        .sum(-1, keepdim=True)
        for s in scales
    ]
    return torch.stack(errors).argmin(0, keepdim=True)


def _codes(
    groups: Float[Tensor, "out groups size"], scale: Float[Tensor, "out groups 1"]
) -> UInt8[Tensor, "out groups size"]:
    """Codes of the levels nearest to groups / scale, ties to the even code; 0 where the scale is
    0.
    """
    scaled = torch.where(scale > 0, groups / scale, 0.0)
    size = torch.bucketize(scaled.abs(), _borders(groups.device)).to(torch.uint8)
    # a zero has no sign
    return size | ((scaled < 0) & (size > 0)).to(torch.uint8) << 3


def _borders(device: torch.device) -> Float[Tensor, "7"]:
    """Largest number that becomes each code: halfway, or just below where a tie goes up."""
    values = LEVELS[:8]
    middle = (values[1:] + values[:-1]) / 2
    goes_up = torch.arange(7) % 2 == 1
    return torch.where(goes_up, middle.nextafter(torch.zeros(())), middle).to(device)


def _packed(
    groups: Float[Tensor, "out groups size"], scale: Float[Tensor, "out groups 1"]
) -> UInt8[Tensor, "out half"]:
    """Codes of each row, two to a byte, the first in its low four bits."""
    codes = _codes(groups, scale).flatten(1)
    return codes[:, ::2] | codes[:, 1::2] << 4

"""MXFP4, the format of gpt-oss's experts on disk (Rouhani et al. 2023, arXiv 2310.10537, section 3;
OCP MX 1.0, section 5.3).
"""

from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

from minitune.errors import InputError
from minitune.quant.float4 import LEVELS, exponents_to_scales

PARTS = ("_blocks", "_scales")  # what follows a weight's name on disk


def dequantize(
    blocks: UInt8[Tensor, "X out groups 16"],
    scales: UInt8[Tensor, "X out groups"],
    dtype: torch.dtype,
) -> Float[Tensor, "X in out"]:
    """Weights as x @ W takes them: value[code] * 2^(scale - 127), 32 neighbours of an output's
    inputs to a scale.

    Each byte holds two codes, the first in its low four bits. Every product is exact in bfloat16.
    One expert is unpacked at a time, so that little more than the result is ever in memory.
    """
    values = LEVELS.to(blocks.device)
    # of every byte: low half first
    pairs = torch.stack([values.repeat(16), values.repeat_interleave(16)], dim=1)

    def one(codes: Tensor, scale: Tensor) -> Tensor:
        levels = F.embedding(codes.int(), pairs).flatten(2)
        weight = levels * exponents_to_scales(scale)[..., None]
        return weight.flatten(1).T.to(dtype)

    return torch.stack([one(codes, scale) for codes, scale in zip(blocks, scales, strict=True)])


def whole_name(name: str) -> str:
    """Weight that a tensor on disk is a part of, or else the name itself."""
    return next((name.removesuffix(part) for part in PARTS if name.endswith(part)), name)


def unpacked(
    packed: Mapping[str, Tensor],
    shapes: Mapping[str, tuple[int, ...]],
    folder: Path,
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """Weights whose parts are `packed`; InputError for a part that is missing or does not fit the
    weight's shape.
    """

    def one(name: str) -> Tensor:
        n, in_, out = shapes[name]
        wanted = [(n, out, in_ // 32, 16), (n, out, in_ // 32)]
        blocks, scales = (packed.get(f"{name}{part}") for part in PARTS)
        actual = [None if x is None else tuple(x.shape) for x in (blocks, scales)]
        if blocks is None or scales is None or actual != wanted or in_ % 32:
            raise InputError(
                f"checkpoint: {folder} holds {name} {list(shapes[name])} as MXFP4 blocks "
                f"{actual[0]} and scales {actual[1]}, expected {wanted[0]} and {wanted[1]}; "
                "download it again"
            )
        return dequantize(blocks, scales, dtype)

    return {name: one(name) for name in dict.fromkeys(map(whole_name, packed))}

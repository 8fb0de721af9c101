"""Weights that a compressed-tensors folder holds as codes, dequantized: int4 and int8, packed into
words or as they are, MXFP4 and NVFP4. Its 8-bit floats are read with those of other folders.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from minitune.quant.schemes import dequantize
from minitune.quant.tensors import QMXFP4, QNVFP4, QInt4, QInt8

Leaf = QInt8 | QInt4 | QMXFP4 | QNVFP4
WEIGHT, PACKED, SCALE = ".weight", ".weight_packed", ".weight_scale"
DIVISOR = ".weight_global_scale"  # of NVFP4's scales
UNUSED = (".weight_shape", ".input_global_scale")  # the second is of activations, which stay
UNREAD = (".weight_zero_point", ".weight_g_idx")  # of codes that are not symmetric, or reordered
PARTS = (PACKED, DIVISOR, *UNUSED, *UNREAD)  # what no other format has


def is_compressed(parts: Mapping[str, Tensor]) -> bool:
    """True for the parts of a weight by what their names end with, if the format is this one."""
    return PACKED in parts or (WEIGHT in parts and parts[WEIGHT].dtype == torch.int8)


def dequantized(
    parts: Mapping[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype
) -> Tensor | None:
    """Weight from its parts by what their names end with; None where they do not fit it."""
    scale = parts.get(SCALE)
    if scale is None or len(shape) != 2 or any(part in parts for part in UNREAD):
        return None
    leaf = _leaf(parts, scale, shape)
    if leaf is None or leaf.shape != shape or not _fits(leaf, shape):
        return None
    return dequantize(leaf, dtype)


def _leaf(parts: Mapping[str, Tensor], scale: Tensor, shape: tuple[int, ...]) -> Leaf | None:
    """Codes and scales of a weight; None for another kind of codes."""
    packed, divisor = parts.get(PACKED), parts.get(DIVISOR)
    if packed is None:
        return QInt8(parts[WEIGHT], _by_row(scale))
    if packed.dtype == torch.uint8:
        if divisor is not None and scale.dtype == torch.float8_e4m3fn and divisor.numel() == 1:
            return QNVFP4(packed, scale, divisor.float().reshape(()))
        return QMXFP4(packed, scale) if scale.dtype == torch.uint8 else None
    if packed.dtype != torch.int32 or packed.shape[0] != shape[0]:
        return None
    # bytes of little-endian words, of which the last of a row is filled up
    rows, d_in = packed.contiguous().view(torch.uint8), shape[1]
    if packed.shape[1] == -(-d_in // 8) and d_in % 2 == 0:
        return QInt4(rows[:, : d_in // 2], _by_row(scale))
    if packed.shape[1] == -(-d_in // 4):
        return QInt8((rows[:, :d_in] ^ 0x80).contiguous().view(torch.int8), _by_row(scale))
    return None


def _by_row(scale: Tensor) -> Tensor:
    """Scales of integers in float32, one or more a row."""
    return scale.float() if scale.ndim == 2 else scale.float().reshape(-1, 1)


def _fits(leaf: Leaf, shape: tuple[int, ...]) -> bool:
    """True if every row has scales, and they divide it."""
    scale = leaf.scale
    if scale.ndim != 2 or scale.shape[0] != shape[0] or scale.shape[1] == 0:
        return False
    group = {QMXFP4: 32, QNVFP4: 16}.get(type(leaf), shape[1] // scale.shape[1])
    return scale.shape[1] * group == shape[1]

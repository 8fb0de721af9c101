"""Weights that a folder of torchao holds as codes, dequantized: integers in 8 bits each, with
scales and zero points of groups or of rows.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

CODES, SCALE, ZERO_POINT = "._weight_qdata", "._weight_scale", "._weight_zero_point"
PARTS = (CODES, SCALE, ZERO_POINT)  # what no other format has


def is_torchao(parts: Mapping[str, Tensor]) -> bool:
    """True for the parts of a weight by what their names end with, if the format is this one."""
    return CODES in parts


def dequantized(
    parts: Mapping[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype
) -> Tensor | None:
    """(code - zero point) * scale of the code's group; None where the parts do not fit the shape or
    are of another layout, such as one that is packed for a processor.
    """
    codes, scale = parts[CODES], parts.get(SCALE)
    zero_point = parts.get(ZERO_POINT)
    if codes.dtype != torch.int8 or tuple(codes.shape) != shape or len(shape) != 2:
        return None
    if scale is None or scale.ndim != 2 or scale.shape[0] != shape[0]:
        return None
    n_groups = scale.shape[1]
    if n_groups == 0 or shape[1] % n_groups:
        return None
    if zero_point is not None and zero_point.shape != scale.shape:
        return None
    groups = codes.float().unflatten(1, (n_groups, -1))
    if zero_point is not None:
        groups = groups - zero_point.float()[..., None]
    return (groups * scale.float()[..., None]).flatten(1).to(dtype)

"""Rotary position embeddings: the table of angles and the rotation."""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def rope_table(
    positions: Int[Tensor, "B T"],
    frequencies: Float[Tensor, "*rows half"],
    dtype: torch.dtype,
    magnitude: float = 1.0,
) -> tuple[Float[Tensor, "b T E"], Float[Tensor, "b T E"]]:
    """Factors that `rotate` multiplies by: [cos, cos] and [-sin, sin] of position * frequency
    [rad], times magnitude.

    They are computed in float32, then cast (Su et al. 2021, arXiv 2104.09864, eq. 34). frequencies
    may differ from token to token. The sign stands in the table because every layer shares the
    table.
    """
    angles = positions[..., None].to(frequencies.dtype) * frequencies
    cos, sin = magnitude * angles.cos(), magnitude * angles.sin()
    return torch.cat([cos, cos], dim=-1).to(dtype), torch.cat([-sin, sin], dim=-1).to(dtype)


def rotate(
    x: Float[Tensor, "B H T E"], rope: tuple[Float[Tensor, "b T e"], Float[Tensor, "b T e"]]
) -> Float[Tensor, "B H T E"]:
    """Rotate dimension i with i + e/2 (the half-split layout of Hugging Face weights) by the angles
    of each token, in the dtype of the angles if that is wider; dimensions from e on stay as they
    are.
    """
    cos, sin = (table[:, None] for table in rope)
    if cos.shape[-1] < x.shape[-1]:
        return torch.cat([rotate(x[..., : cos.shape[-1]], rope), x[..., cos.shape[-1] :]], dim=-1)
    # with the heads of a token side by side, as the linear map before left them
    x, cos, sin = (t.transpose(1, 2) for t in (x, cos, sin))
    first, second = x.chunk(2, dim=-1)
    turned = x * cos + torch.cat([second, first], dim=-1) * sin
    return turned.to(x.dtype).transpose(1, 2)

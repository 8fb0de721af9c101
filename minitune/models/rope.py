"""Rotary frequencies and the ways in which checkpoints stretch them to longer contexts."""

import math
from collections.abc import Mapping
from typing import Any

import msgspec
import torch
from jaxtyping import Float

from minitune.types import InputError


class Linear(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="linear", tag_field="rope_type"):
    """Every frequency divided by factor (Chen et al. 2023, arXiv 2306.15595, eq. 4)."""

    factor: float


class Dynamic(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="dynamic", tag_field="rope_type"):
    """A base that grows once the length exceeds the trained one (Peng et al. 2023, arXiv 2309.00071, section 3.3)."""

    factor: float


class Llama3(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="llama3", tag_field="rope_type"):
    """Low frequencies divided by factor, high ones kept, a ramp between (Llama 3.1; as published with its weights)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


Scaling = Linear | Dynamic | Llama3


def frequencies(
    d_head: int, theta: float, scaling: Scaling | None, length: int, max_positions: int
) -> Float[torch.Tensor, "half"]:
    """theta^(-2i / d_head) for i < d_head / 2, in radians a token, then scaled; `length` (tokens) matters to Dynamic only."""
    if isinstance(scaling, Dynamic) and length > max_positions:
        stretch = scaling.factor * length / max_positions - (scaling.factor - 1)
        theta = theta * stretch ** (d_head / (d_head - 2))
    f = 1.0 / theta ** (torch.arange(0, d_head, 2, dtype=torch.float32) / d_head)
    if isinstance(scaling, Linear):
        return f / scaling.factor
    if isinstance(scaling, Llama3):
        turns = scaling.original_max_position_embeddings * f / (2 * math.pi)  # full turns within the original context
        ramp = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
        ramp = ramp.clamp(0.0, 1.0)
        return (1 - ramp) * f / scaling.factor + ramp * f
    return f


def from_hf(hf: Mapping[str, Any], where: str) -> tuple[float, Scaling | None]:
    """(theta, scaling) from a config.json in the 4.x spelling (rope_theta, rope_scaling) or the 5.x one (rope_parameters)."""
    rope = dict(hf.get("rope_parameters") or {})
    if not rope:
        rope = {"rope_theta": hf.get("rope_theta", 10000.0), **(hf.get("rope_scaling") or {})}
    theta = float(rope.pop("rope_theta", hf.get("rope_theta", 10000.0)))
    old_name = rope.pop("type", None)
    kind = rope.setdefault("rope_type", old_name or "default")
    if kind == "default":
        return theta, None
    try:
        return theta, msgspec.convert(rope, Scaling)
    except msgspec.ValidationError as error:
        raise InputError(
            f"models: {where} rope scaling {kind!r}: {error}; known are default, linear, dynamic and llama3"
        ) from None


def to_hf(theta: float, scaling: Scaling | None) -> dict[str, Any]:
    """Both spellings at once: what 4.x and 5.x of transformers read alike."""
    scaled = msgspec.to_builtins(scaling) if scaling is not None else None
    return {
        "rope_theta": theta,
        "rope_scaling": scaled,
        "rope_parameters": {"rope_theta": theta, **(scaled or {"rope_type": "default"})},
    }

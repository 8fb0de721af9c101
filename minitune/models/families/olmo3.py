"""OLMo 3: an OLMo 2 with windows on three of four layers; yarn on the others.

OLMo Team 2025, arXiv 2512.13961, section 3.
"""

from collections.abc import Mapping
from typing import Any

from minitune.models.config import AttentionType
from minitune.models.families import olmo2
from minitune.models.family import Family
from minitune.models.hf_config import (
    HFConfig,
    layer_pattern,
    layer_types_to_hf,
    layered_rope,
    layered_rope_to_hf,
)
from minitune.types import PositiveInt


class Config(olmo2.Config, frozen=True):
    """Numbers that an OLMo 3 is made of."""

    layer_types: tuple[AttentionType, ...] = ("sliding", "sliding", "sliding", "full")
    window: PositiveInt | None = 4096
    rope_theta: float = 5e5
    window_rope_theta: float | None = 5e5


def read(hf: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Config fields that a config.json says in this family's own way."""
    layer_types = layer_pattern(hf, ("sliding", "sliding", "sliding", "full"), where)
    return {"layer_types": layer_types, **layered_rope(hf, where, 5e5, hf.get("rope_theta", 5e5))}


def write(config: Config) -> dict[str, Any]:
    """config.json fields that only this family has."""
    return {"layer_types": layer_types_to_hf(config), **layered_rope_to_hf(config)}


FAMILY = Family(
    Config,
    HFConfig(
        "olmo3",
        "Olmo3ForCausalLM",
        fields={"attention_bias": "attention_bias", "window": "sliding_window"},
        required={"hidden_act": ("silu",)},
        defaults={"rms_norm_eps": 1e-5},
        ignored=("layer_types",),
    ),
    read,
    write,
)

"""Gemma 2: a Gemma with norms on both sides, capped scores and logits, and a window on every other
layer.

Gemma Team 2024, arXiv 2408.00118, section 2.
"""

from collections.abc import Mapping
from typing import Any

from minitune.models.config import AttentionType, DecoderConfig, NormPlacement
from minitune.models.families import gemma
from minitune.models.family import Family
from minitune.models.hf_config import HFConfig, layer_pattern, layer_types_to_hf
from minitune.types import PositiveInt


class Config(gemma.Config, frozen=True):
    """Numbers that a Gemma 2 is made of."""

    norms: NormPlacement = "both"
    attention_cap: float | None = 50.0
    final_cap: float | None = 30.0
    layer_types: tuple[AttentionType, ...] = ("sliding", "full")
    window: PositiveInt | None = 4096


def read(hf: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Config fields that a config.json says in this family's own way."""
    layer_types = layer_pattern(hf, ("sliding", "full"), where)
    return {"attention_scale": attention_scale(hf), "layer_types": layer_types}


def write(config: Config) -> dict[str, Any]:
    """config.json fields that only this family has."""
    return {
        "query_pre_attn_scalar": query_pre_attn_scalar(config),
        "layer_types": layer_types_to_hf(config),
    }


def attention_scale(hf: Mapping[str, Any]) -> float | None:
    """query_pre_attn_scalar^-0.5, and None where that is d_head^-0.5."""
    scalar = hf.get("query_pre_attn_scalar", 256)
    return None if scalar == hf.get("head_dim", 256) else scalar**-0.5


def query_pre_attn_scalar(config: DecoderConfig) -> int:
    """Field that `attention_scale` reads."""
    return config.d_head if config.attention_scale is None else round(config.attention_scale**-2)


FAMILY = Family(
    Config,
    HFConfig(
        "gemma2",
        "Gemma2ForCausalLM",
        fields={
            "attention_bias": "attention_bias",
            "attention_cap": "attn_logit_softcapping",
            "final_cap": "final_logit_softcapping",
            "window": "sliding_window",
        },
        required={"hidden_activation": ("gelu_pytorch_tanh",)},
        accepted={"hidden_act": ("gelu_pytorch_tanh",), "use_bidirectional_attention": (False,)},
        defaults={"max_position_embeddings": 8192, "head_dim": 256, "tie_word_embeddings": True},
        ignored=("query_pre_attn_scalar", "layer_types"),
    ),
    read,
    write,
)

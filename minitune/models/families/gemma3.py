"""Gemma 3, its text model: normed heads, windows on five of six layers, with a RoPE of their own.

Gemma Team 2025, arXiv 2503.19786, section 2.
"""

from collections.abc import Mapping
from typing import Any

from minitune.models.config import AttentionType, NormPlacement, QKNorm
from minitune.models.families import gemma
from minitune.models.families.gemma2 import attention_scale, query_pre_attn_scalar
from minitune.models.family import Family
from minitune.models.hf_config import (
    HFConfig,
    layer_pattern,
    layer_types_to_hf,
    layered_rope,
    layered_rope_to_hf,
)
from minitune.types import PositiveInt


class Config(gemma.Config, frozen=True):
    """Numbers that a Gemma 3 is made of."""

    norms: NormPlacement = "both"
    qk_norm: QKNorm = "head"
    layer_types: tuple[AttentionType, ...] = (
        "sliding",
        "sliding",
        "sliding",
        "sliding",
        "sliding",
        "full",
    )
    window: PositiveInt | None = 4096
    rope_theta: float = 1e6
    window_rope_theta: float | None = 1e4


def read(hf: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Config fields that a config.json says in this family's own way."""
    n = hf.get("sliding_window_pattern") or hf.get("_sliding_window_pattern") or 6
    layer_types = layer_pattern(hf, ("sliding",) * (n - 1) + ("full",), where)
    return {
        "attention_scale": attention_scale(hf),
        "layer_types": layer_types,
        **layered_rope(hf, where, 1e6, 1e4),
    }


def write(config: Config) -> dict[str, Any]:
    """config.json fields that only this family has."""
    return {
        "query_pre_attn_scalar": query_pre_attn_scalar(config),
        "layer_types": layer_types_to_hf(config),
        "rope_local_base_freq": config.window_rope_theta,
        **layered_rope_to_hf(config),
    }


FAMILY = Family(
    Config,
    HFConfig(
        "gemma3_text",
        "Gemma3ForCausalLM",
        fields={
            "attention_bias": "attention_bias",
            "final_cap": "final_logit_softcapping",
            "window": "sliding_window",
        },
        required={"hidden_activation": ("gelu_pytorch_tanh",)},
        accepted={
            "hidden_act": ("gelu_pytorch_tanh",),
            "use_bidirectional_attention": (False,),
            "attn_logit_softcapping": (),  # read by transformers, and not used
        },
        defaults={  # folders with images spell out only what differs from these
            "hidden_size": 2304,
            "intermediate_size": 9216,
            "num_hidden_layers": 26,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "vocab_size": 262208,
            "sliding_window": 4096,
            "max_position_embeddings": 131072,
            "tie_word_embeddings": True,
        },
        ignored=(
            "query_pre_attn_scalar",
            "layer_types",
            "sliding_window_pattern",
            "_sliding_window_pattern",
            "rope_local_base_freq",
        ),
    ),
    read,
    write,
)

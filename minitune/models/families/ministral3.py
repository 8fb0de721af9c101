"""Ministral 3: a Mistral with yarn, whose queries grow with the position.

Mistral AI 2025, as published with its weights.
"""

import msgspec

from minitune.models import rope_scaling
from minitune.models.config import AttentionType, DecoderConfig
from minitune.models.family import Family
from minitune.models.hf_config import HFConfig


class Config(DecoderConfig, frozen=True):
    """Numbers that a Ministral 3 is made of."""

    layer_types: tuple[AttentionType, ...] = ("sliding",)


PUBLISHED = rope_scaling.Yarn(
    16.0,
    16384,
    beta_fast=32.0,
    beta_slow=1.0,
    mscale=1.0,
    mscale_all_dim=1.0,
    llama_4_scaling_beta=0.1,
)


FAMILY = Family(
    Config,
    HFConfig(
        "ministral3",
        "Ministral3ForCausalLM",
        fields={"window": "sliding_window"},
        required={"hidden_act": ("silu",)},
        defaults={
            "max_position_embeddings": 262144,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1e6,
            "rope_scaling": msgspec.to_builtins(PUBLISHED),
        },
    ),
)

"""Seed-OSS: a Llama of wide heads, with biases on q, k and v.

ByteDance Seed Team 2025, as published with its weights.
"""

from minitune.models.config import DecoderConfig
from minitune.models.family import Family
from minitune.models.hf_config import HFConfig


class Config(DecoderConfig, frozen=True):
    """Numbers that a Seed-OSS is made of."""

    qkv_bias: bool = True


FAMILY = Family(
    Config,
    HFConfig(
        "seed_oss",
        "SeedOssForCausalLM",
        fields={"qkv_bias": "attention_bias", "mlp_bias": "mlp_bias"},
        required={"hidden_act": ("silu",), "attention_out_bias": (False,)},
        defaults={"max_position_embeddings": 524288},
        # what transformers drops while it trains; here the stages say what is dropped
        accepted={"attention_dropout": (0.0, 0.1), "residual_dropout": (0.0, 0.1)},
    ),
)

"""Granite 3: a Llama whose embeddings, residual branches, scores and logits are scaled by given
numbers.

IBM 2024, as published with its weights; Yang et al. 2022, arXiv 2203.03466 (muP), is where the
multipliers come from.
"""

from minitune.models.config import DecoderConfig
from minitune.models.family import Family
from minitune.models.hf_config import HFConfig


class Config(DecoderConfig, frozen=True):
    """Numbers that a Granite is made of."""

    attention_scale: float | None = 1.0


FAMILY = Family(
    Config,
    HFConfig(
        "granite",
        "GraniteForCausalLM",
        fields={
            "attention_bias": "attention_bias",
            "mlp_bias": "mlp_bias",
            "embedding_multiplier": "embedding_multiplier",
            "residual_multiplier": "residual_multiplier",
            "attention_scale": "attention_multiplier",
            "logit_divisor": "logits_scaling",
        },
        required={"hidden_act": ("silu",)},
    ),
)

"""Mistral 7B v0.1 to v0.3, Nemo, Small: a Llama that may see a window of tokens alone.

Jiang et al. 2023, arXiv 2310.06825.
"""

from minitune.models.config import AttentionType, DecoderConfig
from minitune.models.family import Family
from minitune.models.hf_config import HFConfig


class Config(DecoderConfig, frozen=True):
    """Numbers that a Mistral is made of."""

    layer_types: tuple[AttentionType, ...] = ("sliding",)


FAMILY = Family(
    Config,
    HFConfig(
        "mistral",
        "MistralForCausalLM",
        fields={"window": "sliding_window"},
        required={"hidden_act": ("silu",)},
        defaults={
            "max_position_embeddings": 131072,
            "num_key_value_heads": 8,
            "sliding_window": 4096,
        },
    ),
)

"""Qwen3, dense: a Llama with normed heads.

Yang et al. 2025, arXiv 2505.09388, section 2.
"""

from collections.abc import Mapping
from typing import Any

from minitune.models.config import DecoderConfig, QKNorm
from minitune.models.family import Family
from minitune.models.hf_config import HFConfig, sliding_after, sliding_after_to_hf


class Config(DecoderConfig, frozen=True):
    """Numbers that a Qwen3 is made of."""

    qk_norm: QKNorm = "head"


def read(hf: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Config fields that a config.json says in this family's own way."""
    return sliding_after(hf, where)


def write(config: Config) -> dict[str, Any]:
    """config.json fields that only this family has."""
    return sliding_after_to_hf(config)


FAMILY = Family(
    Config,
    HFConfig(
        "qwen3",
        "Qwen3ForCausalLM",
        fields={"attention_bias": "attention_bias"},
        required={"hidden_act": ("silu",)},
        defaults={"max_position_embeddings": 32768, "head_dim": 128},
        ignored=("use_sliding_window", "sliding_window", "max_window_layers", "layer_types"),
    ),
    read,
    write,
)

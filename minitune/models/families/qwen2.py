"""Qwen2 and Qwen2.5: a Llama with biases on q, k and v; the last layers may see a window.

Yang et al. 2024, arXiv 2407.10671, section 2.2.
"""

from collections.abc import Mapping
from typing import Any

from minitune.models.config import DecoderConfig
from minitune.models.family import Family
from minitune.models.hf_config import HFConfig, sliding_after, sliding_after_to_hf


class Config(DecoderConfig, frozen=True):
    """Numbers that a Qwen2 is made of."""

    qkv_bias: bool = True


def read(hf: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Config fields that a config.json says in this family's own way."""
    return sliding_after(hf, where)


def write(config: Config) -> dict[str, Any]:
    """config.json fields that only this family has."""
    return sliding_after_to_hf(config)


FAMILY = Family(
    Config,
    HFConfig(
        "qwen2",
        "Qwen2ForCausalLM",
        required={"hidden_act": ("silu",)},
        accepted={"use_mrope": (False,)},
        defaults={"max_position_embeddings": 32768},
        ignored=("use_sliding_window", "sliding_window", "max_window_layers", "layer_types"),
    ),
    read,
    write,
)

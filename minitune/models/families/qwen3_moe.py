"""Qwen3-30B-A3B, Qwen3-235B-A22B and Qwen3-Coder: a Qwen3 with 128 experts, eight a token, and none
that all share.

Yang et al. 2025, arXiv 2505.09388, section 2.
"""

from collections.abc import Mapping
from typing import Any

from minitune.models.config import AttentionType, DecoderConfig, QKNorm
from minitune.models.experts import Experts
from minitune.models.families.qwen2_moe import MIXTURE, mixture_from_hf, mixture_to_hf
from minitune.models.family import Family
from minitune.models.hf_config import HFConfig


class Config(DecoderConfig, frozen=True, kw_only=True):
    """Numbers that a Qwen3 with experts is made of."""

    experts: Experts  # pyright: ignore[reportGeneralTypeIssues] - not optional here
    qk_norm: QKNorm = "head"
    layer_types: tuple[AttentionType, ...] = ("sliding",)


def read(hf: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Config fields that a config.json says in this family's own way."""
    window = hf.get("sliding_window", 4096) if hf.get("use_sliding_window") else None
    return {"experts": mixture_from_hf(hf, n_experts=128, n_active=8, d_ff=768), "window": window}


def write(config: Config) -> dict[str, Any]:
    """config.json fields that only this family has."""
    return {
        "use_sliding_window": config.window is not None,
        "sliding_window": config.window,
        **mixture_to_hf(config.n_layers, config.experts),
    }


FAMILY = Family(
    Config,
    HFConfig(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        fields={"attention_bias": "attention_bias"},
        required={"hidden_act": ("silu",)},
        defaults={"num_key_value_heads": 4},
        ignored=("use_sliding_window", "sliding_window", "max_window_layers", *MIXTURE),
    ),
    read,
    write,
)

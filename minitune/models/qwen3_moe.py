"""Qwen3-30B-A3B, Qwen3-235B-A22B and Qwen3-Coder: a Qwen3 with 128 experts, eight a token, and none that all share.

Yang et al. 2025, arXiv 2505.09388, section 2.
"""

from collections.abc import Mapping
from typing import Any, Literal

from minitune.models import decoder
from minitune.models.decoder import Cache, block, decode, forward, head_name, hidden, scaled_logits, shapes  # noqa: F401 - what runs it
from minitune.models.experts import Experts
from minitune.models.qwen2_moe import MIXTURE, mixture, mixture_to_hf
from minitune.models.spelling import Spelling


class Config(decoder.Config, frozen=True, kw_only=True):
    """The numbers that a Qwen3 with experts is made of."""

    experts: Experts  # pyright: ignore[reportGeneralTypeIssues] - not optional here
    qk_norm: Literal["none", "head", "projection"] = "head"
    layers: tuple[decoder.Reach, ...] = ("window",)


SPELLING = Spelling(
    "qwen3_moe",
    "Qwen3MoeForCausalLM",
    names={"attention_bias": "attention_bias"},
    fixed={"hidden_act": ("silu",)},
    absent={"num_key_value_heads": 4},
    also=("use_sliding_window", "sliding_window", "max_window_layers", *MIXTURE),
)


def from_hf(hf: Mapping[str, Any], where: str = "config.json") -> Config:
    """The Config of a Hugging Face config.json; InputError names a field that is neither handled nor known to be harmless."""
    window = hf.get("sliding_window", 4096) if hf.get("use_sliding_window") else None
    return SPELLING.read(Config, hf, where, experts=mixture(hf, n_experts=128, n_active=8, d_ff=768), window=window)


def to_hf(config: Config) -> dict[str, Any]:
    """A config.json that transformers 4.x and 5.x read alike."""
    return SPELLING.write(
        config,
        use_sliding_window=config.window is not None,
        sliding_window=config.window,
        **mixture_to_hf(config.n_layers, config.experts),
    )

"""Qwen3, dense: a Llama with normed heads.

Yang et al. 2025, arXiv 2505.09388, section 2.
"""

from collections.abc import Mapping
from typing import Any, Literal

from minitune.models import decoder
from minitune.models.decoder import Cache, block, decode, forward, head_name, hidden, scaled_logits, shapes  # noqa: F401 - what runs it
from minitune.models.spelling import Spelling, late_windows, late_windows_to_hf


class Config(decoder.Config, frozen=True):
    """The numbers that a Qwen3 is made of."""

    qk_norm: Literal["none", "head", "projection"] = "head"


SPELLING = Spelling(
    "qwen3",
    "Qwen3ForCausalLM",
    names={"attention_bias": "attention_bias"},
    fixed={"hidden_act": ("silu",)},
    absent={"max_position_embeddings": 32768, "head_dim": 128},
    also=("use_sliding_window", "sliding_window", "max_window_layers", "layer_types"),
)


def from_hf(hf: Mapping[str, Any], where: str = "config.json") -> Config:
    """The Config of a Hugging Face config.json; InputError names a field that is neither handled nor known to be harmless."""
    return SPELLING.read(Config, hf, where, **late_windows(hf, where))


def to_hf(config: Config) -> dict[str, Any]:
    """A config.json that transformers 4.x and 5.x read alike."""
    return SPELLING.write(config, **late_windows_to_hf(config))

"""Gemma 2: a Gemma with norms on both sides, capped scores and logits, and a window on every other layer.

Gemma Team 2024, arXiv 2408.00118, section 2.
"""

from collections.abc import Mapping
from typing import Any, Literal

from minitune.models import decoder, gemma
from minitune.models.decoder import Cache, block, decode, forward, head_name, hidden, scaled_logits, shapes  # noqa: F401 - what runs it
from minitune.models.spelling import Spelling, layer_pattern, layer_types


class Config(gemma.Config, frozen=True):
    """The numbers that a Gemma 2 is made of."""

    norms: Literal["before", "after", "both"] = "both"
    attention_cap: float | None = 50.0
    final_cap: float | None = 30.0
    layers: tuple[decoder.Reach, ...] = ("window", "full")
    window: decoder.Size | None = 4096


SPELLING = Spelling(
    "gemma2",
    "Gemma2ForCausalLM",
    names={
        "attention_bias": "attention_bias",
        "attention_cap": "attn_logit_softcapping",
        "final_cap": "final_logit_softcapping",
        "window": "sliding_window",
    },
    fixed={"hidden_activation": ("gelu_pytorch_tanh",)},
    allowed={"hidden_act": ("gelu_pytorch_tanh",), "use_bidirectional_attention": (False,)},
    absent={"max_position_embeddings": 8192, "head_dim": 256, "tie_word_embeddings": True},
    also=("query_pre_attn_scalar", "layer_types"),
)


def from_hf(hf: Mapping[str, Any], where: str = "config.json") -> Config:
    """The Config of a Hugging Face config.json; InputError names a field that is neither handled nor known to be harmless."""
    layers = layer_pattern(hf, ("window", "full"), where)
    return SPELLING.read(Config, hf, where, attention_scale=attention_scale(hf), layers=layers)


def to_hf(config: Config) -> dict[str, Any]:
    """A config.json that transformers 4.x and 5.x read alike."""
    return SPELLING.write(config, query_pre_attn_scalar=query_pre_attn_scalar(config), layer_types=layer_types(config))


def attention_scale(hf: Mapping[str, Any]) -> float | None:
    """query_pre_attn_scalar^-0.5, and None where that is d_head^-0.5."""
    scalar = hf.get("query_pre_attn_scalar", 256)
    return None if scalar == hf.get("head_dim", 256) else scalar**-0.5


def query_pre_attn_scalar(config: decoder.Config) -> int:
    """What `attention_scale` reads."""
    return config.d_head if config.attention_scale is None else round(config.attention_scale**-2)

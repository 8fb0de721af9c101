"""Gemma 3, its text model: normed heads, windows on five of six layers, with a RoPE of their own.

Gemma Team 2025, arXiv 2503.19786, section 2.
"""

from collections.abc import Mapping
from typing import Any, Literal

from minitune.models import decoder, gemma
from minitune.models.decoder import Cache, block, decode, forward, head_name, hidden, scaled_logits, shapes  # noqa: F401 - what runs it
from minitune.models.gemma2 import attention_scale, query_pre_attn_scalar
from minitune.models.spelling import Spelling, layer_pattern, layer_types, layered_rope, layered_rope_to_hf


class Config(gemma.Config, frozen=True):
    """The numbers that a Gemma 3 is made of."""

    norms: Literal["before", "after", "both"] = "both"
    qk_norm: Literal["none", "head", "projection"] = "head"
    layers: tuple[decoder.Reach, ...] = ("window", "window", "window", "window", "window", "full")
    window: decoder.Size | None = 4096
    rope_theta: float = 1e6
    window_rope_theta: float | None = 1e4


SPELLING = Spelling(
    "gemma3_text",
    "Gemma3ForCausalLM",
    names={"attention_bias": "attention_bias", "final_cap": "final_logit_softcapping", "window": "sliding_window"},
    fixed={"hidden_activation": ("gelu_pytorch_tanh",)},
    allowed={
        "hidden_act": ("gelu_pytorch_tanh",),
        "use_bidirectional_attention": (False,),
        "attn_logit_softcapping": (),  # read by transformers, and not used
    },
    absent={  # folders with images spell out only what differs from these
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "vocab_size": 262208,
        "sliding_window": 4096,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": True,
    },
    also=("query_pre_attn_scalar", "layer_types", "sliding_window_pattern", "_sliding_window_pattern", "rope_local_base_freq"),
)


def from_hf(hf: Mapping[str, Any], where: str = "config.json") -> Config:
    """The Config of a Hugging Face config.json; InputError names a field that is neither handled nor known to be harmless."""
    hf = {**SPELLING.absent, **hf}
    n = hf.get("sliding_window_pattern") or hf.get("_sliding_window_pattern") or 6
    layers = layer_pattern(hf, ("window",) * (n - 1) + ("full",), where)
    return SPELLING.read(
        Config, hf, where, attention_scale=attention_scale(hf), layers=layers, **layered_rope(hf, where, 1e6, 1e4)
    )


def to_hf(config: Config) -> dict[str, Any]:
    """A config.json that transformers 4.x and 5.x read alike."""
    return SPELLING.write(
        config,
        query_pre_attn_scalar=query_pre_attn_scalar(config),
        layer_types=layer_types(config),
        rope_local_base_freq=config.window_rope_theta,
        **layered_rope_to_hf(config),
    )

"""Gemma: norms of weight 1 + w, a gated gelu, embeddings times sqrt(d_model).

Gemma Team 2024, arXiv 2403.08295, section 2.
"""

from collections.abc import Mapping
from typing import Any, Literal

from minitune.models import decoder
from minitune.models.decoder import Cache, block, decode, forward, head_name, hidden, scaled_logits, shapes  # noqa: F401 - what runs it
from minitune.models.spelling import Spelling
from minitune.ops import Norm


class Config(decoder.Config, frozen=True):
    """The numbers that a Gemma is made of."""

    norm: Norm = "one_plus_w"
    activation: Literal["silu", "gelu_tanh"] = "gelu_tanh"
    embedding_multiplier: float | Literal["sqrt_d_model"] = "sqrt_d_model"
    tie_embeddings: bool = True


SPELLING = Spelling(
    "gemma",
    "GemmaForCausalLM",
    names={"attention_bias": "attention_bias"},
    fixed={"hidden_act": ("gelu_pytorch_tanh", "gelu")},  # the first configs said gelu and meant its tanh form
    allowed={"hidden_activation": ("gelu_pytorch_tanh",), "use_bidirectional_attention": (False,)},
    absent={"max_position_embeddings": 8192, "head_dim": 256, "tie_word_embeddings": True},
)


def from_hf(hf: Mapping[str, Any], where: str = "config.json") -> Config:
    """The Config of a Hugging Face config.json; InputError names a field that is neither handled nor known to be harmless."""
    return SPELLING.read(Config, hf, where)


def to_hf(config: Config) -> dict[str, Any]:
    """A config.json that transformers 4.x and 5.x read alike."""
    return SPELLING.write(config)

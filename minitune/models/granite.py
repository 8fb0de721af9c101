"""Granite 3: a Llama whose embeddings, residual branches, scores and logits are scaled by given numbers.

IBM 2024, as published with its weights; Yang et al. 2022, arXiv 2203.03466 (muP), is where the multipliers come from.
"""

from collections.abc import Mapping
from typing import Any

from minitune.models import decoder
from minitune.models.decoder import Cache, block, decode, forward, head_name, hidden, scaled_logits, shapes  # noqa: F401 - what runs it
from minitune.models.spelling import Spelling


class Config(decoder.Config, frozen=True):
    """The numbers that a Granite is made of."""

    attention_scale: float | None = 1.0


SPELLING = Spelling(
    "granite",
    "GraniteForCausalLM",
    names={
        "attention_bias": "attention_bias",
        "mlp_bias": "mlp_bias",
        "embedding_multiplier": "embedding_multiplier",
        "residual_multiplier": "residual_multiplier",
        "attention_scale": "attention_multiplier",
        "logit_divisor": "logits_scaling",
    },
    fixed={"hidden_act": ("silu",)},
)


def from_hf(hf: Mapping[str, Any], where: str = "config.json") -> Config:
    """The Config of a Hugging Face config.json; InputError names a field that is neither handled nor known to be harmless."""
    return SPELLING.read(Config, hf, where)


def to_hf(config: Config) -> dict[str, Any]:
    """A config.json that transformers 4.x and 5.x read alike."""
    return SPELLING.write(config)

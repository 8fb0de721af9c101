"""Ministral 3: a Mistral with yarn, whose queries grow with the position.

Mistral AI 2025, as published with its weights.
"""

from collections.abc import Mapping
from typing import Any

import msgspec

from minitune.models import decoder, rope
from minitune.models.decoder import Cache, block, decode, forward, head_name, hidden, scaled_logits, shapes  # noqa: F401 - what runs it
from minitune.models.spelling import Spelling


class Config(decoder.Config, frozen=True):
    """The numbers that a Ministral 3 is made of."""

    layers: tuple[decoder.Reach, ...] = ("window",)


PUBLISHED = rope.Yarn(16.0, 16384, beta_fast=32.0, beta_slow=1.0, mscale=1.0, mscale_all_dim=1.0, llama_4_scaling_beta=0.1)
SPELLING = Spelling(
    "ministral3",
    "Ministral3ForCausalLM",
    names={"window": "sliding_window"},
    fixed={"hidden_act": ("silu",)},
    absent={
        "max_position_embeddings": 262144,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "rope_scaling": msgspec.to_builtins(PUBLISHED),
    },
)


def from_hf(hf: Mapping[str, Any], where: str = "config.json") -> Config:
    """The Config of a Hugging Face config.json; InputError names a field that is neither handled nor known to be harmless."""
    return SPELLING.read(Config, hf, where)


def to_hf(config: Config) -> dict[str, Any]:
    """A config.json that transformers 4.x and 5.x read alike."""
    return SPELLING.write(config)

"""Mistral 7B v0.1 to v0.3, Nemo, Small: a Llama that may see a window of tokens alone.

Jiang et al. 2023, arXiv 2310.06825.
"""

from collections.abc import Mapping
from typing import Any

from minitune.models import decoder
from minitune.models.decoder import Cache, block, decode, forward, head_name, hidden, scaled_logits, shapes  # noqa: F401 - what runs it
from minitune.models.spelling import Spelling


class Config(decoder.Config, frozen=True):
    """The numbers that a Mistral is made of."""

    layers: tuple[decoder.Reach, ...] = ("window",)


SPELLING = Spelling(
    "mistral",
    "MistralForCausalLM",
    names={"window": "sliding_window"},
    fixed={"hidden_act": ("silu",)},
    absent={"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
)


def from_hf(hf: Mapping[str, Any], where: str = "config.json") -> Config:
    """The Config of a Hugging Face config.json; InputError names a field that is neither handled nor known to be harmless."""
    return SPELLING.read(Config, hf, where)


def to_hf(config: Config) -> dict[str, Any]:
    """A config.json that transformers 4.x and 5.x read alike."""
    return SPELLING.write(config)

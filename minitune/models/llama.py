"""Llama 2, 3, 3.1, 3.2, 3.3 and what shares their shape, such as SmolLM2: the decoder as it is.

Touvron et al. 2023, arXiv 2307.09288; Grattafiori et al. 2024, arXiv 2407.21783.
"""

from collections.abc import Mapping
from typing import Any

from minitune.models import decoder
from minitune.models.decoder import Cache, block, decode, forward, head_name, hidden, scaled_logits, shapes  # noqa: F401 - what runs it
from minitune.models.spelling import Spelling


class Config(decoder.Config, frozen=True):
    """The numbers that a Llama is made of."""


SPELLING = Spelling(
    "llama",
    "LlamaForCausalLM",
    names={"attention_bias": "attention_bias", "mlp_bias": "mlp_bias"},
    fixed={"hidden_act": ("silu",)},
    allowed={"rope_interleaved": (False,)},
    also=("is_llama_config",),
)


def from_hf(hf: Mapping[str, Any], where: str = "config.json") -> Config:
    """The Config of a Hugging Face config.json; InputError names a field that is neither handled nor known to be harmless."""
    return SPELLING.read(Config, hf, where)


def to_hf(config: Config) -> dict[str, Any]:
    """A config.json that transformers 4.x and 5.x read alike."""
    return SPELLING.write(config)

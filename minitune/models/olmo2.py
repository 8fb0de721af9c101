"""OLMo 2: norms behind attention and mlp, and over all of q and of k.

OLMo Team 2025, arXiv 2501.00656, section 2.
"""

from collections.abc import Mapping
from typing import Any, Literal

from minitune.models import decoder
from minitune.models.decoder import Cache, block, decode, forward, head_name, hidden, scaled_logits, shapes  # noqa: F401 - what runs it
from minitune.models.spelling import Spelling
from minitune.ops import Norm


class Config(decoder.Config, frozen=True):
    """The numbers that an OLMo 2 is made of."""

    norm: Norm = "w_before_cast"
    norms: Literal["before", "after", "both"] = "after"
    qk_norm: Literal["none", "head", "projection"] = "projection"
    rope_in_float32: bool = True


SPELLING = Spelling(
    "olmo2",
    "Olmo2ForCausalLM",
    names={"attention_bias": "attention_bias"},
    fixed={"hidden_act": ("silu",)},
    absent={"rms_norm_eps": 1e-5},
)


def from_hf(hf: Mapping[str, Any], where: str = "config.json") -> Config:
    """The Config of a Hugging Face config.json; InputError names a field that is neither handled nor known to be harmless."""
    return SPELLING.read(Config, hf, where)


def to_hf(config: Config) -> dict[str, Any]:
    """A config.json that transformers 4.x and 5.x read alike."""
    return SPELLING.write(config)

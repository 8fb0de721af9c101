"""OLMo 3: an OLMo 2 with windows on three of four layers; yarn on the others.

OLMo Team 2025, arXiv 2512.13961, section 3.
"""

from collections.abc import Mapping
from typing import Any

from minitune.models import decoder, olmo2
from minitune.models.decoder import Cache, block, decode, forward, head_name, hidden, scaled_logits, shapes  # noqa: F401 - what runs it
from minitune.models.spelling import Spelling, layer_pattern, layer_types, layered_rope, layered_rope_to_hf


class Config(olmo2.Config, frozen=True):
    """The numbers that an OLMo 3 is made of."""

    layers: tuple[decoder.Reach, ...] = ("window", "window", "window", "full")
    window: decoder.Size | None = 4096
    rope_theta: float = 5e5
    window_rope_theta: float | None = 5e5


SPELLING = Spelling(
    "olmo3",
    "Olmo3ForCausalLM",
    names={"attention_bias": "attention_bias", "window": "sliding_window"},
    fixed={"hidden_act": ("silu",)},
    absent={"rms_norm_eps": 1e-5},
    also=("layer_types",),
)


def from_hf(hf: Mapping[str, Any], where: str = "config.json") -> Config:
    """The Config of a Hugging Face config.json; InputError names a field that is neither handled nor known to be harmless."""
    layers = layer_pattern(hf, ("window", "window", "window", "full"), where)
    return SPELLING.read(Config, hf, where, layers=layers, **layered_rope(hf, where, 5e5, hf.get("rope_theta", 5e5)))


def to_hf(config: Config) -> dict[str, Any]:
    """A config.json that transformers 4.x and 5.x read alike."""
    return SPELLING.write(config, layer_types=layer_types(config), **layered_rope_to_hf(config))

"""Qwen2 and Qwen2.5: a Llama with biases on q, k and v; the last layers may see a window.

Yang et al. 2024, arXiv 2407.10671, section 2.2.
"""

from collections.abc import Mapping
from typing import Any

from minitune.models import decoder
from minitune.models.decoder import Cache, block, decode, forward, head_name, hidden, scaled_logits, shapes  # noqa: F401 - what runs it
from minitune.models.spelling import Spelling, late_windows, late_windows_to_hf


class Config(decoder.Config, frozen=True):
    """The numbers that a Qwen2 is made of."""

    qkv_bias: bool = True


SPELLING = Spelling(
    "qwen2",
    "Qwen2ForCausalLM",
    fixed={"hidden_act": ("silu",)},
    allowed={"use_mrope": (False,)},
    absent={"max_position_embeddings": 32768},
    also=("use_sliding_window", "sliding_window", "max_window_layers", "layer_types"),
)


def from_hf(hf: Mapping[str, Any], where: str = "config.json") -> Config:
    """The Config of a Hugging Face config.json; InputError names a field that is neither handled nor known to be harmless."""
    return SPELLING.read(Config, hf, where, **late_windows(hf, where))


def to_hf(config: Config) -> dict[str, Any]:
    """A config.json that transformers 4.x and 5.x read alike."""
    return SPELLING.write(config, **late_windows_to_hf(config))

"""Phi-3, Phi-3.5, Phi-4 and Phi-4-mini: a Llama with fused weights; longrope, and RoPE on part of each head.

Abdin et al. 2024, arXiv 2404.14219; Abouelenin et al. 2025, arXiv 2503.01743, section 2.
"""

from collections.abc import Mapping
from typing import Any

from minitune.models import decoder, rope
from minitune.models.decoder import Cache, block, decode, forward, head_name, hidden, scaled_logits, shapes  # noqa: F401 - what runs it
from minitune.models.spelling import Spelling, rotary_factor


class Config(decoder.Config, frozen=True):
    """The numbers that a Phi-3 is made of."""

    fused: bool = True
    layers: tuple[decoder.Reach, ...] = ("window",)


NO_BIAS = ("attention_bias", "mlp_bias", "lm_head_bias")
SPELLING = Spelling(
    "phi3",
    "Phi3ForCausalLM",
    names={"window": "sliding_window", "rotary_factor": "partial_rotary_factor"},
    fixed={"hidden_act": ("silu",), "resid_pdrop": (0.0,), "embd_pdrop": (0.0,)},
    allowed={**dict.fromkeys(NO_BIAS, (False,)), "full_attn_mod": (1,), "interpolate_factor": (1,)},
    absent={"rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "original_max_position_embeddings": 4096},
)


def from_hf(hf: Mapping[str, Any], where: str = "config.json") -> Config:
    """The Config of a Hugging Face config.json; InputError names a field that is neither handled nor known to be harmless."""
    hf = {**SPELLING.absent, **hf}
    theta, scaling = rope.from_hf(hf, where)
    return SPELLING.read(Config, hf, where, rope_theta=theta, rope_scaling=scaling, rotary_factor=rotary_factor(hf))


def to_hf(config: Config) -> dict[str, Any]:
    """A config.json that transformers 4.x and 5.x read alike."""
    written = rope.to_hf(config.rope_theta, config.rope_scaling)
    written["rope_parameters"]["partial_rotary_factor"] = config.rotary_factor
    if isinstance(config.rope_scaling, rope.LongRope):
        original = written["rope_scaling"].pop("original_max_position_embeddings")  # transformers 4.x wants it outside
        kind = written["rope_scaling"].pop("rope_type")
        written = {
            **written,
            "rope_scaling": {"type": kind, **written["rope_scaling"]},
            "original_max_position_embeddings": original,
        }
    return SPELLING.write(config, **written)

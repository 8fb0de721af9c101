"""Phi-3, Phi-3.5, Phi-4 and Phi-4-mini: a Llama with fused weights; longrope, and RoPE on part of
each head.

Abdin et al. 2024, arXiv 2404.14219; Abouelenin et al. 2025, arXiv 2503.01743, section 2.
"""

from collections.abc import Mapping
from typing import Any

from minitune.models import rope_scaling
from minitune.models.config import AttentionType, DecoderConfig
from minitune.models.family import Family
from minitune.models.hf_config import HFConfig, rotary_factor


class Config(DecoderConfig, frozen=True):
    """Numbers that a Phi-3 is made of."""

    fused: bool = True
    layer_types: tuple[AttentionType, ...] = ("sliding",)


NO_BIAS = ("attention_bias", "mlp_bias", "lm_head_bias")


def read(hf: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Config fields that a config.json says in this family's own way."""
    theta, scaling = rope_scaling.from_hf(hf, where)
    return {"rope_theta": theta, "rope_scaling": scaling, "rotary_factor": rotary_factor(hf)}


def write(config: Config) -> dict[str, Any]:
    """config.json fields that only this family has."""
    written = rope_scaling.to_hf(config.rope_theta, config.rope_scaling)
    written["rope_parameters"]["partial_rotary_factor"] = config.rotary_factor
    if isinstance(config.rope_scaling, rope_scaling.LongRope):
        # transformers 4.x wants it outside
        original = written["rope_scaling"].pop("original_max_position_embeddings")
        kind = written["rope_scaling"].pop("rope_type")
        written = {
            **written,
            "rope_scaling": {"type": kind, **written["rope_scaling"]},
            "original_max_position_embeddings": original,
        }
    return written


FAMILY = Family(
    Config,
    HFConfig(
        "phi3",
        "Phi3ForCausalLM",
        fields={"window": "sliding_window", "rotary_factor": "partial_rotary_factor"},
        required={"hidden_act": ("silu",), "resid_pdrop": (0.0,), "embd_pdrop": (0.0,)},
        accepted={
            **dict.fromkeys(NO_BIAS, (False,)),
            "full_attn_mod": (1,),
            "interpolate_factor": (1,),
        },
        defaults={
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 4096,
            "original_max_position_embeddings": 4096,
        },
    ),
    read,
    write,
)

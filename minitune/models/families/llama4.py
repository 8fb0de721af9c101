"""Llama 4 Scout and Maverick, the text model: experts beside a shared one, chunks of attention,
every fourth layer without RoPE.

Meta 2025, as published with the weights; the growth of queries on layers without RoPE: Nakanishi
2025, arXiv 2501.19399.
"""

from collections.abc import Mapping
from typing import Any

from minitune.models import hf_config, rope_scaling
from minitune.models.config import AttentionType, DecoderConfig, QKNorm, RopeLayout, layer_kind
from minitune.models.experts import Experts
from minitune.models.family import Family
from minitune.models.hf_config import HFConfig, layer_pattern, layer_types_to_hf, pattern
from minitune.types import PositiveInt

LAYERS: tuple[AttentionType, ...] = ("chunked", "chunked", "chunked", "full")


class Config(DecoderConfig, frozen=True, kw_only=True):
    """Numbers that a Llama 4 is made of."""

    experts: Experts  # pyright: ignore[reportGeneralTypeIssues] - not optional here
    qk_norm: QKNorm = "rotated"
    layer_types: tuple[AttentionType, ...] = LAYERS
    chunk: PositiveInt | None = 8192
    rope_layers: tuple[bool, ...] = (True, True, True, False)
    rope_layout: RopeLayout = "interleaved"
    rope_theta: float = 500000.0
    rope_in_float32: bool = True
    nope_growth: float | None = 0.1


def read(hf: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Config fields that a config.json says in this family's own way."""
    n, every = hf.get("num_hidden_layers", 0), hf.get("no_rope_layer_interval", 4)
    step = hf.get("interleave_moe_layer_step", 1)
    turned = hf_config.rope_layers(hf, where) or [(i + 1) % every != 0 for i in range(n)]
    rope_layers = pattern(turned, (True, True, True, False))
    types = ["chunked" if rope_layers[i % len(rope_layers)] else "full" for i in range(n)]
    layer_types = (
        pattern(types, LAYERS)
        if hf.get("layer_types") is None
        else layer_pattern(hf, LAYERS, where)
    )
    routed = frozenset(hf.get("moe_layers", range(step - 1, n, step)))
    experts = {
        "n_experts": hf.get("num_local_experts", 16),
        "n_active": hf.get("num_experts_per_tok", 1),
        "d_ff": hf.get("intermediate_size"),
        "names": "llama4",
        "router": "top_then_sigmoid",
        "d_shared": hf.get("intermediate_size"),
        "layers": pattern([i in routed for i in range(n)], (True,)),
    }
    theta, scaling = rope_scaling.from_hf(hf, where, 500000.0)
    return {
        "rope_theta": theta,
        "rope_scaling": scaling,
        "rope_layers": rope_layers,
        "layer_types": layer_types,
        "qk_norm": "rotated" if hf.get("use_qk_norm", True) else "none",
        "nope_growth": hf.get("attn_scale", 0.1)
        if hf.get("attn_temperature_tuning", True)
        else None,
        "nope_span": hf.get("floor_scale", 8192),
        "experts": experts,
    }


def write(config: Config) -> dict[str, Any]:
    """config.json fields that only this family has."""
    growth, experts = config.nope_growth, config.experts
    return {
        "intermediate_size": experts.d_ff,
        "num_local_experts": experts.n_experts,
        "num_experts_per_tok": experts.n_active,
        "moe_layers": [i for i in range(config.n_layers) if experts.at(i)],
        "no_rope_layers": [int(layer_kind(config, i).rope) for i in range(config.n_layers)],
        "layer_types": layer_types_to_hf(config),
        "use_qk_norm": config.qk_norm != "none",
        "attn_temperature_tuning": growth is not None,
        "attn_scale": 0.1 if growth is None else growth,
        "floor_scale": config.nope_span,
    }


FAMILY = Family(
    Config,
    HFConfig(
        "llama4_text",
        "Llama4ForCausalLM",
        fields={
            "d_ff": "intermediate_size_mlp",
            "attention_bias": "attention_bias",
            "chunk": "attention_chunk_size",
        },
        required={"hidden_act": ("silu",)},
        accepted={"router_jitter_noise": (0.0,)},
        defaults={"rms_norm_eps": 1e-5, "head_dim": 128, "attention_chunk_size": 8192},
        ignored=(
            "intermediate_size",
            "num_local_experts",
            "num_experts_per_tok",
            "moe_layers",
            "interleave_moe_layer_step",
            "no_rope_layers",
            "no_rope_layer_interval",
            "layer_types",
            "use_qk_norm",
            "attn_temperature_tuning",
            "attn_scale",
            "floor_scale",
            "output_router_logits",
            "router_aux_loss_coef",
            "for_llm_compressor",
        ),
    ),
    read,
    write,
)

"""Qwen1.5-MoE and Qwen2-57B-A14B: a Qwen2 with many small experts and a large shared one behind a
gate of its own.

Yang et al. 2024, arXiv 2407.10671, section 2.2.2.
"""

from collections.abc import Mapping
from typing import Any

from minitune.models.config import DecoderConfig
from minitune.models.experts import Experts
from minitune.models.family import Family
from minitune.models.hf_config import HFConfig, layer_pattern, layer_types_to_hf, pattern

MIXTURE = (  # fields of config.json that `mixture_from_hf` reads, or that say nothing
    "num_experts",
    "num_local_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "norm_topk_prob",
    "decoder_sparse_step",
    "mlp_only_layers",
    "output_router_logits",
    "router_aux_loss_coef",
)
WINDOW = ("use_sliding_window", "sliding_window", "max_window_layers", "layer_types")


class Config(DecoderConfig, frozen=True, kw_only=True):
    """Numbers that a Qwen2 with experts is made of."""

    experts: Experts  # pyright: ignore[reportGeneralTypeIssues] - not optional here
    qkv_bias: bool = True


def read(hf: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Config fields that a config.json says in this family's own way."""
    experts = {
        **mixture_from_hf(hf, n_experts=60, n_active=4, d_ff=1408),
        "d_shared": hf.get("shared_expert_intermediate_size", 5632),
        "shared_gate": True,
    }
    window = hf.get("sliding_window", 4096) if hf.get("use_sliding_window") else None
    # of which every second one has one
    n_windows = min(hf.get("num_hidden_layers", 0), hf.get("max_window_layers", 28))
    default = pattern(
        [
            "sliding" if i < n_windows and i % 2 == 0 else "full"
            for i in range(hf.get("num_hidden_layers", 0))
        ],
        ("full",),
    )
    layer_types = layer_pattern(hf, default, where) if window else ("full",)
    return {"experts": experts, "window": window, "layer_types": layer_types}


def write(config: Config) -> dict[str, Any]:
    """config.json fields that only this family has."""
    return {
        "shared_expert_intermediate_size": config.experts.d_shared,
        "use_sliding_window": config.window is not None,
        "sliding_window": config.window,
        "layer_types": layer_types_to_hf(config),
        **mixture_to_hf(config.n_layers, config.experts),
    }


def mixture_from_hf(
    hf: Mapping[str, Any], n_experts: int, n_active: int, d_ff: int
) -> dict[str, Any]:
    """Fields of Experts in a config.json of Qwen's; n_experts, n_active and d_ff are what
    missing fields mean.
    """
    n_layers, step, plain = (
        hf.get("num_hidden_layers", 0),
        hf.get("decoder_sparse_step", 1),
        frozenset(hf.get("mlp_only_layers", ())),
    )
    routed = [(i + 1) % step == 0 and i not in plain for i in range(n_layers)]
    return {
        "n_experts": hf.get("num_local_experts", hf.get("num_experts", n_experts)),
        "n_active": hf.get("num_experts_per_tok", n_active),
        "d_ff": hf.get("moe_intermediate_size", d_ff),
        "names": "qwen",
        "renormalised": hf.get("norm_topk_prob", False),
        "layers": pattern(routed, (True,)),
    }


def mixture_to_hf(n_layers: int, experts: Experts) -> dict[str, Any]:
    """Fields that `mixture_from_hf` reads, the number of experts under both of its names."""
    return {
        "num_experts": experts.n_experts,
        "num_local_experts": experts.n_experts,
        "num_experts_per_tok": experts.n_active,
        "moe_intermediate_size": experts.d_ff,
        "norm_topk_prob": experts.renormalised,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [i for i in range(n_layers) if not experts.at(i)],
    }


FAMILY = Family(
    Config,
    HFConfig(
        "qwen2_moe",
        "Qwen2MoeForCausalLM",
        fields={"qkv_bias": "qkv_bias"},
        required={"hidden_act": ("silu",)},
        accepted={"use_mrope": (False,)},
        ignored=("shared_expert_intermediate_size", *WINDOW, *MIXTURE),
    ),
    read,
    write,
)

"""gpt-oss 20B and 120B: windows on every second layer, a sink in every head, clamped experts with
biases.

OpenAI 2025, arXiv 2508.10925, section 2.
"""

from collections.abc import Mapping
from typing import Any

from minitune.models import rope_scaling
from minitune.models.config import AttentionType, DecoderConfig
from minitune.models.experts import Experts
from minitune.models.family import Family
from minitune.models.hf_config import HFConfig, layer_pattern, layer_types_to_hf
from minitune.nn.elementwise import Norm
from minitune.types import PositiveInt


class Config(DecoderConfig, frozen=True, kw_only=True):
    """Numbers that a gpt-oss is made of."""

    experts: Experts  # pyright: ignore[reportGeneralTypeIssues] - not optional here
    norm: Norm = "w_before_cast"
    attention_bias: bool = True
    sinks: bool = True
    layer_types: tuple[AttentionType, ...] = ("sliding", "full")
    window: PositiveInt | None = 128
    rope_theta: float = 150000.0


YARN = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


def read(hf: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Config fields that a config.json says in this family's own way."""
    named = "rope_parameters" in hf or "rope_scaling" in hf
    theta, scaling = rope_scaling.from_hf(
        hf if named else {**hf, "rope_scaling": YARN}, where, 150000.0
    )
    experts = {
        "n_experts": hf.get("num_local_experts", 128),
        "n_active": hf.get("num_experts_per_tok", 4),
        "d_ff": hf.get("intermediate_size"),
        "names": "gpt_oss",
        "router": "top_then_softmax",
        "bias": True,
        "limit": hf.get("swiglu_limit", 7.0),
        "slope": hf.get("swiglu_alpha", 1.702),
    }
    layer_types = layer_pattern(hf, ("sliding", "full"), where)
    return {
        "rope_theta": theta,
        "rope_scaling": scaling,
        "layer_types": layer_types,
        "experts": experts,
    }


def write(config: Config) -> dict[str, Any]:
    """config.json fields that only this family has."""
    experts = config.experts
    return {
        "num_local_experts": experts.n_experts,
        "num_experts_per_tok": experts.n_active,
        "swiglu_limit": experts.limit,
        "swiglu_alpha": experts.slope,
        "layer_types": layer_types_to_hf(config),
    }


FAMILY = Family(
    Config,
    HFConfig(
        "gpt_oss",
        "GptOssForCausalLM",
        fields={"attention_bias": "attention_bias", "window": "sliding_window"},
        required={"hidden_act": ("silu",)},
        defaults={"rms_norm_eps": 1e-5, "head_dim": 64, "sliding_window": 128},
        ignored=(
            "num_local_experts",
            "num_experts_per_tok",
            "experts_per_token",
            "swiglu_limit",
            "swiglu_alpha",
            "layer_types",
            "initial_context_length",
            "output_router_logits",
            "router_aux_loss_coef",
        ),
    ),
    read,
    write,
)

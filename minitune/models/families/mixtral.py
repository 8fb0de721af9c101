"""Mixtral: a Mistral whose mlps are mixtures of eight experts, two a token.

Jiang et al. 2024, arXiv 2401.04088.
"""

from collections.abc import Mapping
from typing import Any

from minitune.models import rope_scaling
from minitune.models.config import AttentionType, DecoderConfig
from minitune.models.experts import Experts
from minitune.models.family import Family
from minitune.models.hf_config import HFConfig


class Config(DecoderConfig, frozen=True, kw_only=True):
    """Numbers that a Mixtral is made of."""

    experts: Experts  # pyright: ignore[reportGeneralTypeIssues] - not optional here
    layer_types: tuple[AttentionType, ...] = ("sliding",)


def read(hf: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Config fields that a config.json says in this family's own way."""
    theta, scaling = rope_scaling.from_hf(hf, where, 1e6)
    experts = {
        "n_experts": hf.get("num_local_experts", 8),
        "n_active": hf.get("num_experts_per_tok", 2),
        "d_ff": hf.get("intermediate_size"),
        "names": "mixtral",
    }
    return {"rope_theta": theta, "rope_scaling": scaling, "experts": experts}


def write(config: Config) -> dict[str, Any]:
    """config.json fields that only this family has."""
    experts = config.experts
    return {"num_local_experts": experts.n_experts, "num_experts_per_tok": experts.n_active}


FAMILY = Family(
    Config,
    HFConfig(
        "mixtral",
        "MixtralForCausalLM",
        fields={"window": "sliding_window"},
        required={"hidden_act": ("silu",)},
        accepted={"router_jitter_noise": (0.0,)},
        defaults={"num_key_value_heads": 8, "rms_norm_eps": 1e-5},
        ignored=(
            "num_local_experts",
            "num_experts_per_tok",
            "output_router_logits",
            "router_aux_loss_coef",
        ),
    ),
    read,
    write,
)

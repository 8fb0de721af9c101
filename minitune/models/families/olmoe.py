"""OLMoE: 64 small experts, eight a token, and norms over all of q and of k.

Muennighoff et al. 2024, arXiv 2409.02060.
"""

from collections.abc import Mapping
from typing import Any

from minitune.models.config import DecoderConfig, QKNorm
from minitune.models.experts import Experts
from minitune.models.family import Family
from minitune.models.hf_config import HFConfig


class Config(DecoderConfig, frozen=True, kw_only=True):
    """Numbers that an OLMoE is made of."""

    experts: Experts  # pyright: ignore[reportGeneralTypeIssues] - not optional here
    qk_norm: QKNorm = "projection"


def read(hf: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Config fields that a config.json says in this family's own way."""
    experts = {
        "n_experts": hf.get("num_experts", 64),
        "n_active": hf.get("num_experts_per_tok", 8),
        "d_ff": hf.get("intermediate_size"),
        "renormalised": hf.get("norm_topk_prob", False),
        "names": "qwen",
    }
    return {"experts": experts}


def write(config: Config) -> dict[str, Any]:
    """config.json fields that only this family has."""
    experts = config.experts
    return {
        "num_experts": experts.n_experts,
        "num_experts_per_tok": experts.n_active,
        "norm_topk_prob": experts.renormalised,
    }


FAMILY = Family(
    Config,
    HFConfig(
        "olmoe",
        "OlmoeForCausalLM",
        fields={"attention_bias": "attention_bias"},
        required={"hidden_act": ("silu",)},
        accepted={"clip_qkv": (None,)},
        defaults={"rms_norm_eps": 1e-5},
        ignored=(
            "num_experts",
            "num_experts_per_tok",
            "norm_topk_prob",
            "output_router_logits",
            "router_aux_loss_coef",
        ),
    ),
    read,
    write,
)

"""OLMoE: 64 small experts, eight a token, and norms over all of q and of k.

Muennighoff et al. 2024, arXiv 2409.02060.
"""

from collections.abc import Mapping
from typing import Any, Literal

from minitune.models import decoder
from minitune.models.decoder import Cache, block, decode, forward, head_name, hidden, scaled_logits, shapes  # noqa: F401 - what runs it
from minitune.models.experts import Experts
from minitune.models.spelling import Spelling


class Config(decoder.Config, frozen=True, kw_only=True):
    """The numbers that an OLMoE is made of."""

    experts: Experts  # pyright: ignore[reportGeneralTypeIssues] - not optional here
    qk_norm: Literal["none", "head", "projection"] = "projection"


SPELLING = Spelling(
    "olmoe",
    "OlmoeForCausalLM",
    names={"attention_bias": "attention_bias"},
    fixed={"hidden_act": ("silu",)},
    allowed={"clip_qkv": (None,)},
    absent={"rms_norm_eps": 1e-5},
    also=("num_experts", "num_experts_per_tok", "norm_topk_prob", "output_router_logits", "router_aux_loss_coef"),
)


def from_hf(hf: Mapping[str, Any], where: str = "config.json") -> Config:
    """The Config of a Hugging Face config.json; InputError names a field that is neither handled nor known to be harmless."""
    experts = {
        "n_experts": hf.get("num_experts", 64),
        "n_active": hf.get("num_experts_per_tok", 8),
        "d_ff": hf.get("intermediate_size"),
        "renormalised": hf.get("norm_topk_prob", False),
        "names": "qwen",
    }
    return SPELLING.read(Config, hf, where, experts=experts)


def to_hf(config: Config) -> dict[str, Any]:
    """A config.json that transformers 4.x and 5.x read alike."""
    experts = config.experts
    return SPELLING.write(
        config,
        num_experts=experts.n_experts,
        num_experts_per_tok=experts.n_active,
        norm_topk_prob=experts.renormalised,
    )

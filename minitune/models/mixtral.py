"""Mixtral: a Mistral whose mlps are mixtures of eight experts, two a token.

Jiang et al. 2024, arXiv 2401.04088.
"""

from collections.abc import Mapping
from typing import Any

from minitune.models import decoder, rope
from minitune.models.decoder import Cache, block, decode, forward, head_name, hidden, scaled_logits, shapes  # noqa: F401 - what runs it
from minitune.models.experts import Experts
from minitune.models.spelling import Spelling


class Config(decoder.Config, frozen=True, kw_only=True):
    """The numbers that a Mixtral is made of."""

    experts: Experts  # pyright: ignore[reportGeneralTypeIssues] - not optional here
    layers: tuple[decoder.Reach, ...] = ("window",)


SPELLING = Spelling(
    "mixtral",
    "MixtralForCausalLM",
    names={"window": "sliding_window"},
    fixed={"hidden_act": ("silu",)},
    allowed={"router_jitter_noise": (0.0,)},
    absent={"num_key_value_heads": 8, "rms_norm_eps": 1e-5},
    also=("num_local_experts", "num_experts_per_tok", "output_router_logits", "router_aux_loss_coef"),
)


def from_hf(hf: Mapping[str, Any], where: str = "config.json") -> Config:
    """The Config of a Hugging Face config.json; InputError names a field that is neither handled nor known to be harmless."""
    theta, scaling = rope.from_hf(hf, where, 1e6)
    experts = {
        "n_experts": hf.get("num_local_experts", 8),
        "n_active": hf.get("num_experts_per_tok", 2),
        "d_ff": hf.get("intermediate_size"),
        "names": "mixtral",
    }
    return SPELLING.read(Config, hf, where, rope_theta=theta, rope_scaling=scaling, experts=experts)


def to_hf(config: Config) -> dict[str, Any]:
    """A config.json that transformers 4.x and 5.x read alike."""
    experts = config.experts
    return SPELLING.write(config, num_local_experts=experts.n_experts, num_experts_per_tok=experts.n_active)

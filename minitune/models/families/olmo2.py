"""OLMo 2: norms behind attention and mlp, and over all of q and of k.

OLMo Team 2025, arXiv 2501.00656, section 2.
"""

from minitune.models.config import DecoderConfig, NormPlacement, QKNorm
from minitune.models.family import Family
from minitune.models.hf_config import HFConfig
from minitune.nn.elementwise import Norm


class Config(DecoderConfig, frozen=True):
    """Numbers that an OLMo 2 is made of."""

    norm: Norm = "w_before_cast"
    norms: NormPlacement = "after"
    qk_norm: QKNorm = "projection"
    rope_in_float32: bool = True


FAMILY = Family(
    Config,
    HFConfig(
        "olmo2",
        "Olmo2ForCausalLM",
        fields={"attention_bias": "attention_bias"},
        required={"hidden_act": ("silu",)},
        defaults={"rms_norm_eps": 1e-5},
    ),
)

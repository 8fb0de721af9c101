"""Llama 2, 3, 3.1, 3.2, 3.3 and what shares their shape, such as SmolLM2: the decoder as it is.

Touvron et al. 2023, arXiv 2307.09288; Grattafiori et al. 2024, arXiv 2407.21783.
"""

from minitune.models.config import DecoderConfig
from minitune.models.family import Family
from minitune.models.hf_config import HFConfig


class Config(DecoderConfig, frozen=True):
    """Numbers that a Llama is made of."""


FAMILY = Family(
    Config,
    HFConfig(
        "llama",
        "LlamaForCausalLM",
        fields={"attention_bias": "attention_bias", "mlp_bias": "mlp_bias"},
        required={"hidden_act": ("silu",)},
        accepted={"rope_interleaved": (False,)},
        ignored=("is_llama_config",),
    ),
)

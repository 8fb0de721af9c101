"""Gemma: norms of weight 1 + w, a gated gelu, embeddings times sqrt(d_model).

Gemma Team 2024, arXiv 2403.08295, section 2.
"""

from minitune.models.config import Activation, DecoderConfig, EmbeddingMultiplier
from minitune.models.family import Family
from minitune.models.hf_config import HFConfig
from minitune.nn.elementwise import Norm


class Config(DecoderConfig, frozen=True):
    """Numbers that a Gemma is made of."""

    norm: Norm = "one_plus_w"
    activation: Activation = "gelu_tanh"
    embedding_multiplier: EmbeddingMultiplier = "sqrt_d_model"
    tie_embeddings: bool = True


FAMILY = Family(
    Config,
    HFConfig(
        "gemma",
        "GemmaForCausalLM",
        fields={"attention_bias": "attention_bias"},
        # the first configs said gelu and meant its tanh form
        required={"hidden_act": ("gelu_pytorch_tanh", "gelu")},
        accepted={
            "hidden_activation": ("gelu_pytorch_tanh",),
            "use_bidirectional_attention": (False,),
        },
        defaults={"max_position_embeddings": 8192, "head_dim": 256, "tie_word_embeddings": True},
    ),
)

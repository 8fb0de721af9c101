"""Numbers of a model under their names in GGUF files, and the divisors of its RoPE."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from minitune.interop.gguf.architectures import Architecture, attention_scale, layer_attention
from minitune.models import rope_scaling
from minitune.models.config import DecoderConfig


def numbers(arch: Architecture, config: DecoderConfig) -> dict[str, Any]:
    """Keys of the file that describe the model, by the names in metadata.TYPES."""
    keys: dict[str, Any] = {
        "general.architecture": arch.name,
        "general.quantization_version": 2,
        "context_length": config.max_positions,
        "embedding_length": config.d_model,
        "block_count": config.n_layers,
        "feed_forward_length": config.d_ff,
        "vocab_size": config.vocab_size,
        "attention.head_count": config.n_heads,
        "attention.head_count_kv": config.n_kv_heads,
        "attention.layer_norm_rms_epsilon": config.norm_eps,
        "attention.key_length": config.d_head,
        "attention.value_length": config.d_head,
        "rope.freq_base": config.rope_theta,
        "rope.dimension_count": config.d_rotary,
        **_rope_keys(config),
    }
    if arch.windows and "sliding" in layer_attention(config):
        keys["attention.sliding_window"] = config.window or config.max_positions
        is_sliding = [kind == "sliding" for kind in layer_attention(config)]
        keys["attention.sliding_window_pattern"] = is_sliding
        keys["rope.freq_base_swa"] = config.window_rope_theta or config.rope_theta
    if "attention_cap" in arch.reads:
        keys["attn_logit_softcapping"] = config.attention_cap
    if "final_cap" in arch.reads and config.final_cap is not None:
        keys["final_logit_softcapping"] = config.final_cap
    if arch.name == "granite":
        keys |= {
            "embedding_scale": config.embedding_multiplier,
            "residual_scale": config.residual_multiplier,
            "attention.scale": attention_scale(config),
            "logit_scale": config.logit_divisor,
        }
    return keys


def divisors(config: DecoderConfig) -> dict[str, Float[Tensor, "half"]]:
    """Tensors of the file by which llama.cpp divides the unscaled frequencies."""
    scaling, sizes = config.rope_scaling, (config.d_rotary, config.rope_theta)
    if isinstance(scaling, rope_scaling.Llama3):
        plain = rope_scaling.frequencies(*sizes, None, 1, config.max_positions)
        scaled = rope_scaling.frequencies(*sizes, scaling, 1, config.max_positions)
        return {"rope_freqs.weight": plain / scaled}
    if isinstance(scaling, rope_scaling.LongRope):
        factors = {"long": scaling.long_factor, "short": scaling.short_factor}
        lists = {f"rope_factors_{key}.weight": torch.tensor(x) for key, x in factors.items()}
        return {name: factor.float() for name, factor in lists.items()}
    return {}


def _rope_keys(config: DecoderConfig) -> dict[str, Any]:
    scaling = config.rope_scaling
    magnitude = rope_scaling.magnitude(scaling, config.max_positions)
    if isinstance(scaling, rope_scaling.LinearScaling):
        return {"rope.scaling.type": "linear", "rope.scaling.factor": scaling.factor}
    if isinstance(scaling, rope_scaling.LongRope):
        return {
            "rope.scaling.type": "longrope",
            "rope.scaling.original_context_length": scaling.original_max_position_embeddings,
            "rope.scaling.attn_factor": magnitude,
        }
    if not isinstance(scaling, rope_scaling.Yarn):
        return {}
    # llama.cpp multiplies attn_factor by the magnitude that YaRN's paper gives the factor
    by_paper = rope_scaling.magnitude(rope_scaling.Yarn(scaling.factor, 1), 1)
    keys = {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": scaling.factor,
        "rope.scaling.original_context_length": scaling.original_max_position_embeddings,
        "rope.scaling.attn_factor": magnitude / by_paper,
        "rope.scaling.yarn_beta_fast": scaling.beta_fast or 32.0,
        "rope.scaling.yarn_beta_slow": scaling.beta_slow or 1.0,
    }
    if scaling.llama_4_scaling_beta is not None:
        keys["attention.temperature_scale"] = scaling.llama_4_scaling_beta
    return keys

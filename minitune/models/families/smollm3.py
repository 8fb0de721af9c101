"""SmolLM3: a Llama without RoPE on every fourth layer.

Bakouch et al. 2025, as published with its weights; NoPE: Kazemnejad et al. 2023, arXiv 2305.19466.
"""

from collections.abc import Mapping
from typing import Any

from minitune.models import hf_config, rope_scaling
from minitune.models.config import DecoderConfig, layer_kind
from minitune.models.family import Family
from minitune.models.hf_config import HFConfig, layer_pattern, layer_types_to_hf, pattern


class Config(DecoderConfig, frozen=True):
    """Numbers that a SmolLM3 is made of."""

    rope_layers: tuple[bool, ...] = (True, True, True, False)
    rope_theta: float = 2e6
    tie_embeddings: bool = True


def read(hf: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Config fields that a config.json says in this family's own way."""
    n, every = hf.get("num_hidden_layers", 0), hf.get("no_rope_layer_interval", 4)
    default = (True,) * (every - 1) + (False,)
    turned = hf_config.rope_layers(hf, where)
    rope_layers = default if turned is None else pattern(turned, default)
    window = hf.get("sliding_window") if hf.get("use_sliding_window") else None
    layer_types: tuple[str, ...] = ("full",)
    if window:
        late = ["full" if rope_layers[i % len(rope_layers)] else "sliding" for i in range(n)]
        layer_types = layer_pattern(hf, pattern(late, ("full",)), where)
    theta, scaling = rope_scaling.from_hf(hf, where, 2e6)
    return {
        "rope_layers": rope_layers,
        "window": window,
        "layer_types": layer_types,
        "rope_theta": theta,
        "rope_scaling": scaling,
    }


def write(config: Config) -> dict[str, Any]:
    """config.json fields that only this family has."""
    return {
        "no_rope_layers": [int(layer_kind(config, i).rope) for i in range(config.n_layers)],
        "use_sliding_window": config.window is not None,
        "sliding_window": config.window,
        "layer_types": layer_types_to_hf(config),
    }


FAMILY = Family(
    Config,
    HFConfig(
        "smollm3",
        "SmolLM3ForCausalLM",
        fields={"attention_bias": "attention_bias", "mlp_bias": "mlp_bias"},
        required={"hidden_act": ("silu",)},
        defaults={
            "max_position_embeddings": 32768,
            "tie_word_embeddings": True,
            "num_key_value_heads": 4,
        },
        ignored=(
            "no_rope_layers",
            "no_rope_layer_interval",
            "use_sliding_window",
            "sliding_window",
            "layer_types",
            "max_window_layers",
        ),
    ),
    read,
    write,
)

"""Names and shapes of a decoder's weights: Hugging Face names, [out, in], in the order of the
forward.
"""

from collections.abc import Mapping
from typing import Any

from minitune.models.config import DecoderConfig, layer_kind
from minitune.models.experts import expert_dims, expert_shapes
from minitune.models.mixers.registry import MIXERS
from minitune.models.shapes import Dims, Shapes, linear_dims, linear_shapes, named_dims

NORMS = {  # names of the norms: before and after attention, before and after the mlp
    "before": ("input_layernorm", None, "post_attention_layernorm", None),
    "after": (None, "post_attention_layernorm", None, "post_feedforward_layernorm"),
    "both": (
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    ),
}

# of the weights that are no layer's; heads means rows of queries, keys or values
DIMS: Dims = {
    "model.embed_tokens.weight": ("vocab", "d_model"),
    "model.norm.weight": ("d_model",),
    "lm_head.weight": ("vocab", "d_model"),
}
# of a layer's norms and plain feed-forward; gate and up in one weight are rows of d_ff as well
LAYER_DIMS: Dims = {
    "*_layernorm.weight": ("d_model",),
    **linear_dims("*.gate_up_proj", "d_ff", "d_model"),
    **linear_dims("*.gate_proj", "d_ff", "d_model"),
    **linear_dims("*.up_proj", "d_ff", "d_model"),
    **linear_dims("*.down_proj", "d_model", "d_ff"),
}


def shapes(config: DecoderConfig) -> Shapes:
    """Every weight's name and shape; a tied head is not listed: it is the embedding."""
    weights: Shapes = {"model.embed_tokens.weight": (config.vocab_size, config.d_model)}
    for i in range(config.n_layers):
        weights |= {
            f"model.layers.{i}.{name}": shape for name, shape in layer_shapes(config, i).items()
        }
    weights["model.norm.weight"] = (config.d_model,)
    if not config.tie_embeddings:
        weights["lm_head.weight"] = (config.vocab_size, config.d_model)
    return weights


def dims(config: DecoderConfig) -> dict[str, tuple[str, ...]]:
    """Meaning of each dim of every weight, in the order of its shape: "vocab", "d_model", "heads",
    "d_head", "d_ff", "experts", or "one" for a dim of size 1.
    """
    shapes_by_name = shapes(config)
    named = named_dims([name for name in shapes_by_name if ".layers." not in name], DIMS)
    for i in range(config.n_layers):
        layer = named_dims(layer_shapes(config, i), layer_dims(config, i))
        named |= {f"model.layers.{i}.{name}": found for name, found in layer.items()}
    return {name: named[name] for name in shapes_by_name}


def head_name(config: DecoderConfig) -> str:
    """Weight that turns hidden states into logits: the embedding itself when tied."""
    return "model.embed_tokens.weight" if config.tie_embeddings else "lm_head.weight"


def layer_shapes(config: DecoderConfig, i: int) -> Shapes:
    """Weights of layer i by their names within it."""
    attention_in, attention_out, mlp_in, mlp_out = NORMS[config.norms]
    mixer = MIXERS[layer_kind(config, i).mixer]
    return {
        **_norm_shape(attention_in, config.d_model),
        **mixer.shapes(config),
        **_norm_shape(attention_out, config.d_model),
        **_norm_shape(mlp_in, config.d_model),
        **_feed_forward_shapes(config, i),
        **_norm_shape(mlp_out, config.d_model),
    }


def layer_dims(config: DecoderConfig, i: int) -> Dims:
    """Dims of the weights of layer i by globs of their names within it."""
    experts = {} if config.experts is None else expert_dims(config.experts)
    return {**MIXERS[layer_kind(config, i).mixer].dims(config), **experts, **LAYER_DIMS}


def block_matrices(config: DecoderConfig) -> frozenset[str]:
    """Names of the weights of all layers that have more than one dim."""
    return frozenset(
        f"model.layers.{i}.{name}"
        for i in range(config.n_layers)
        for name, shape in layer_shapes(config, i).items()
        if len(shape) > 1
    )


def layer_of(leaves: Mapping[str, Any], i: int) -> dict[str, Any]:
    """Leaves of layer i by their names within it."""
    prefix = f"model.layers.{i}."
    return {
        name.removeprefix(prefix): leaf for name, leaf in leaves.items() if name.startswith(prefix)
    }


def _feed_forward_shapes(config: DecoderConfig, i: int) -> Shapes:
    if config.experts is not None and config.experts.at(i):
        return expert_shapes(config.experts, config.d_model)
    d, d_ff, bias = config.d_model, config.d_ff, config.mlp_bias
    if config.fused:
        first = linear_shapes(f"{config.mlp}.gate_up_proj", 2 * d_ff, d, bias)
    else:
        first = linear_shapes(f"{config.mlp}.gate_proj", d_ff, d, bias)
        first |= linear_shapes(f"{config.mlp}.up_proj", d_ff, d, bias)
    return first | linear_shapes(f"{config.mlp}.down_proj", d, d_ff, bias)


def _norm_shape(name: str | None, d: int) -> Shapes:
    return {} if name is None else {f"{name}.weight": (d,)}

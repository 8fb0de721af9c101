"""Mixtures of K types, as llama.cpp chooses them: a matrix that much depends on gets more bits."""

from typing import Literal, NamedTuple

from minitune.interop.gguf.architectures import Architecture
from minitune.models.config import DecoderConfig
from minitune.models.weights import head_name

GGUFType = Literal["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K"]
Mixture = Literal["Q4_K_S", "Q4_K_M", "Q5_K_S", "Q5_K_M"]


class Recipe(NamedTuple):
    """Mixture: the number of the file's type, the type of most matrices, and that of the head."""

    file_type: int
    default: GGUFType
    head: GGUFType = "Q6_K"


RECIPES: dict[str, Recipe] = {
    "Q4_K_S": Recipe(14, "Q4_K"),
    "Q4_K_M": Recipe(15, "Q4_K"),
    "Q5_K_S": Recipe(16, "Q5_K"),
    "Q5_K_M": Recipe(17, "Q5_K"),
}
VALUES = ("v_proj", "qkv_proj")
LAYERS_OF_70B = 80


def mixture_kind(mixture: str, name: str, config: DecoderConfig, arch: Architecture) -> GGUFType:
    """Type of a matrix in a mixture of RECIPES, given its Hugging Face name."""
    recipe = RECIPES[mixture]
    if name == head_name(config):
        return recipe.head
    parts = name.split(".")
    if parts[1] != "layers" or parts[-2] not in (*VALUES, "down_proj"):
        return recipe.default
    kind = _sensitive_kind(mixture, parts[-2] in VALUES, int(parts[2]), config.n_layers)
    # where many heads share the values of one, more bits for those hardly show in the size
    if kind == "Q4_K" and parts[-2] in VALUES and _is_70b(config, arch):
        return "Q5_K"
    return kind


def _sensitive_kind(mixture: str, is_values: bool, layer: int, n_layers: int) -> GGUFType:
    """Type of the values of attention, or of the matrix that ends the feed-forward."""
    recipe = RECIPES[mixture]
    if mixture.endswith("_M"):
        return "Q6_K" if _has_more_bits(layer, n_layers) else recipe.default
    first = 4 if is_values else n_layers // 8
    return "Q5_K" if mixture == "Q4_K_S" and layer < first else recipe.default


def _has_more_bits(layer: int, n_layers: int) -> bool:
    """True for the first and the last eighth of the layers, and for every third between them."""
    first = n_layers // 8
    return layer < first or layer >= 7 * n_layers // 8 or (layer - first) % 3 == 2


def _is_70b(config: DecoderConfig, arch: Architecture) -> bool:
    """True for what llama.cpp takes for the Llama of 70 billion parameters, and its kin."""
    shares = config.n_heads != config.n_kv_heads or arch.name == "qwen2"
    return arch.name in ("llama", "qwen2") and config.n_layers == LAYERS_OF_70B and shares

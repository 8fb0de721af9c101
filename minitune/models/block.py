"""One decoder block, the file to read first: norms, a mixer in which tokens see one another, and a
feed-forward.

Vaswani et al. 2017, arXiv 1706.03762, in the form of Touvron et al. 2023, arXiv 2302.13971.
"""

from collections.abc import Callable, Sequence
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor
from typing_extensions import TypeAliasType

from minitune.models.config import DecoderConfig, MixerName
from minitune.models.experts import is_routed, routed_feed_forward
from minitune.models.mixers.mixer import LayerMaps
from minitune.models.mixers.registry import MIXERS
from minitune.models.weights import NORMS
from minitune.nn.elementwise import geglu, rms_norm, swiglu
from minitune.nn.linear import linears
from minitune.tree import Tree
from minitune.types import Params

ACTIVATIONS = {"silu": swiglu, "gelu_tanh": geglu}
# (name of a weight, its input, its output)
Tap = TypeAliasType("Tap", Callable[[str, Tensor, Tensor], None])
# called as `block` below is
BlockFunction = TypeAliasType("BlockFunction", Callable[..., Tensor])


def block(
    config: DecoderConfig,
    mixer: MixerName,
    w: Params,
    x: Float[Tensor, "B T D"],
    inputs: Any,
    cache: tuple[Tree, Int[Tensor, "T"]] | None = None,
    tap: Tap | None = None,
) -> Float[Tensor, "B T D"]:
    """x + mixer(norm(x)), then x + mlp(norm(x)), with the norms where the config has them.

    w: leaves of this layer by their Hugging Face names within it.
    inputs: what the mixer shares between layers of one kind, such as angles and ranges of keys.
    cache: (state, slots); the state of x is written to these slots, and x sees the whole cache.
    tap: called as tap(name, x, y) after each linear map, with the name of its weight within the
    layer, its input and its output; the experts of a mixture call it with the rows that are routed
    to them.
    """

    maps = layer_maps(config, w, tap)
    attention_in, attention_out, mlp_in, mlp_out = NORMS[config.norms]

    # every token sees those before it
    h = maps.norm(attention_in, x)  # [B T D]
    y = MIXERS[mixer].apply(config, maps, h, inputs, cache)  # [B T D]
    x = _residual(config, x, maps.norm(attention_out, y))  # [B T D]

    # every token by itself
    h = maps.norm(mlp_in, x)  # [B T D]
    if config.experts is not None and is_routed(config.experts, w):
        y = routed_feed_forward(config.experts, w, maps.linear, h, tap)  # [B T D]
    else:
        y = _feed_forward(config, maps, h)  # [B T D]
    return _residual(config, x, maps.norm(mlp_out, y))  # [B T D]


def layer_maps(config: DecoderConfig, w: Params, tap: Tap | None) -> LayerMaps:
    """Linear maps and norms of a layer, by the names of their weights."""

    def projs(names: Sequence[str], x: Tensor) -> list[Tensor]:
        weights = [w[f"{name}.weight"] for name in names]
        ys = linears(x, weights, [w.get(f"{name}.bias") for name in names])
        if tap is not None:
            for name, y in zip(names, ys, strict=True):
                tap(f"{name}.weight", x, y)
        return ys

    def proj(name: str, x: Tensor) -> Tensor:
        (y,) = projs([name], x)
        return y

    def norm(name: str | None, x: Tensor) -> Tensor:
        return x if name is None else rms_norm(x, w[f"{name}.weight"], config.norm_eps, config.norm)

    return LayerMaps(w, proj, projs, norm)


def _residual(config: DecoderConfig, x: Tensor, change: Tensor) -> Tensor:
    """x + change, scaled as the family does."""
    if config.residual_multiplier != 1:
        change = change * config.residual_multiplier
    return x + change


def _feed_forward(
    config: DecoderConfig, maps: LayerMaps, x: Float[Tensor, "B T D"]
) -> Float[Tensor, "B T D"]:
    """down(activation(gate(x)) * up(x))."""
    mlp = config.mlp
    if config.fused:
        joined = maps.linear(f"{mlp}.gate_up_proj", x)  # [B T 2F]
        gate, up = joined.chunk(2, dim=-1)  # [B T F] twice
    else:
        gate, up = maps.linears([f"{mlp}.gate_proj", f"{mlp}.up_proj"], x)  # [B T F] twice
    hidden = ACTIVATIONS[config.activation](gate, up)  # [B T F]
    return maps.linear(f"{mlp}.down_proj", hidden)  # [B T D]

"""Grouped-query attention: several query heads share a key and a value head (Ainslie et al. 2023,
arXiv 2305.13245).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from minitune import tree
from minitune.hardware import to_device
from minitune.models import rope_scaling
from minitune.models.config import AttentionType, DecoderConfig, LayerKind
from minitune.models.mixers.mixer import LayerMaps, Mixer, TokenPositions
from minitune.models.shapes import Dims, Shapes, linear_dims, linear_shapes
from minitune.nn.attention.attention import attention
from minitune.nn.attention.key_range import KeyRange, chunked, windowed
from minitune.nn.elementwise import rms_norm
from minitune.nn.rope import rope_table, rotate
from minitune.sharding.context import own_heads, own_tokens, part_of_heads
from minitune.sharding.tensor_parallel import ColumnParallel
from minitune.sharding.tokens import Sharers
from minitune.types import Params, wide_dtype


class AttentionInputs(NamedTuple):
    """Inputs that the attention layers of one kind share."""

    # cos and sin; None: this layer has no RoPE
    rope: tuple[Float[Tensor, "b T E"], Float[Tensor, "b T E"]] | None
    keys: KeyRange
    query_scale: Float[Tensor, "b T"] | None
    sharers: Sharers | tuple[()]  # ranks that have a part of the tokens each


class KVCache(NamedTuple):
    """Keys and values of one layer: a slot for every token of the whole decode, filled from the
    left.
    """

    k: Float[Tensor, "B K slots E"]
    v: Float[Tensor, "B K slots E_v"]


def shapes(config: DecoderConfig) -> Shapes:
    """Names and shapes of the weights within a layer."""
    d, bias = config.d_model, config.attention_bias or config.qkv_bias
    n_q, n_kv = config.n_heads * config.d_head, config.n_kv_heads * config.d_head
    weights: dict[str, tuple[int, ...]] = {}
    if config.fused:
        weights |= linear_shapes("self_attn.qkv_proj", n_q + 2 * n_kv, d, bias)
    else:
        weights |= linear_shapes("self_attn.q_proj", n_q, d, bias)
        weights |= linear_shapes("self_attn.k_proj", n_kv, d, bias)
        weights |= linear_shapes("self_attn.v_proj", n_kv, d, bias)
    if config.qk_norm == "head":
        weights |= {
            "self_attn.q_norm.weight": (config.d_head,),
            "self_attn.k_norm.weight": (config.d_head,),
        }
    elif config.qk_norm == "projection":
        weights |= {"self_attn.q_norm.weight": (n_q,), "self_attn.k_norm.weight": (n_kv,)}
    weights |= linear_shapes("self_attn.o_proj", d, n_q, config.attention_bias)
    if config.sinks:
        weights["self_attn.sinks"] = (config.n_heads,)
    return weights


def dims(config: DecoderConfig) -> Dims:
    """Meanings of the dims of these weights."""
    norm = ("d_head",) if config.qk_norm == "head" else ("heads",)
    return {
        **linear_dims("self_attn.[qkv]_proj", "heads", "d_model"),
        # queries, keys and values in one weight are rows of heads as well
        **linear_dims("self_attn.qkv_proj", "heads", "d_model"),
        "self_attn.[qk]_norm.weight": norm,
        **linear_dims("self_attn.o_proj", "d_model", "heads"),
        "self_attn.sinks": ("heads",),
    }


def inputs(
    config: DecoderConfig, kinds: Sequence[LayerKind], where: TokenPositions, dtype: torch.dtype
) -> dict[LayerKind, AttentionInputs]:
    """Attention inputs of every kind of layer, each range of keys and each table of angles made
    once.
    """
    keys: dict[AttentionType, KeyRange] = dict.fromkeys(("full", "sliding", "chunked"), where.keys)
    if config.window is not None and any(kind.attention == "sliding" for kind in kinds):
        keys["sliding"] = windowed(where.keys, config.window)
    if config.chunk is not None and any(kind.attention == "chunked" for kind in kinds):
        keys["chunked"] = chunked(where.keys, config.chunk)

    # layers that rotate by the same rule share their angles
    rules = {kind: _rope_rule(config, kind) for kind in kinds}
    tables = {rule: _angles(config, *rule, where, dtype) for rule in dict.fromkeys(rules.values())}

    query_scale = rope_scaling.query_scale(config.rope_scaling, where.positions)
    nope_scale = query_scale
    if config.nope_growth is not None:
        steps = torch.floor((where.positions + 1) / config.nope_span)
        nope_scale = 1 + config.nope_growth * torch.log1p(steps)

    def of_kind(kind: LayerKind) -> AttentionInputs:
        seen = keys[kind.attention]
        if kind.rope:
            return AttentionInputs(tables[rules[kind]], seen, query_scale, where.sharers)
        return AttentionInputs(None, seen, nope_scale, where.sharers)

    return {kind: of_kind(kind) for kind in kinds}


def apply(
    config: DecoderConfig,
    layer: LayerMaps,
    x: Float[Tensor, "B T D"],
    inputs: AttentionInputs,
    cache: tuple[KVCache, Tensor] | None,
) -> Float[Tensor, "B T D"]:
    """Attention of x over itself, or over the whole cache after the keys and values of x were
    written to its slots.
    """
    q, k, v = _queries_keys_values(config, layer, x)

    # positions
    if inputs.rope is not None:
        # the same order for queries and keys leaves their products as they are
        if config.rope_layout == "interleaved":
            q, k = (t.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2) for t in (q, k))
        q, k = rotate(q, inputs.rope), rotate(k, inputs.rope)
        if config.qk_norm == "rotated":
            q, k = (rms_norm(t, t.new_ones(config.d_head), config.norm_eps) for t in (q, k))
    if inputs.query_scale is not None:
        q = q * inputs.query_scale[:, None, :, None].to(q.dtype)

    if cache is not None:
        new = KVCache(*(t.to(old.dtype) for t, old in zip((k, v), cache[0], strict=True)))
        k, v = (t.to(q.dtype) for t in tree.donate_at(cache[0], cache[1], new, dim=2))
    y = _attended(config, inputs, (q, k, v), _own_sinks(config, layer.weights))
    return layer.linear("self_attn.o_proj", y.transpose(1, 2).flatten(2))


def _own_sinks(config: DecoderConfig, weights: Params) -> Float[Tensor, "N"] | None:
    """Sinks of the heads whose queries this rank has."""
    sinks, queries = weights.get("self_attn.sinks"), weights.get("self_attn.q_proj.weight")
    if isinstance(queries, ColumnParallel):
        return queries.own(sinks, config.d_head)
    return sinks


def _attended(
    config: DecoderConfig,
    inputs: AttentionInputs,
    qkv: tuple[Tensor, Tensor, Tensor],
    sinks: Float[Tensor, "N"] | None,
) -> Float[Tensor, "B N T E"]:
    """Attention of the tokens; where ranks share them, of all tokens for the heads of each rank."""
    how: dict[str, Any] = {"scale": config.attention_scale, "soft_cap": config.attention_cap}
    if not isinstance(inputs.sharers, Sharers):
        return attention(*qkv, inputs.keys, sinks=sinks, **how)
    if sinks is not None:
        sinks = part_of_heads(sinks, inputs.sharers)
    q, k, v = own_heads(qkv, inputs.sharers)
    y = attention(q, k, v, inputs.keys, sinks=sinks, **how)
    return own_tokens(y, inputs.sharers)


def empty_cache(config: DecoderConfig, n_rows: int, n_slots: int, like: Tensor) -> KVCache:
    """Cache of one layer for n_rows rows of n_slots tokens, in the dtype and on the device of
    `like`.
    """
    shape = (n_rows, config.n_kv_heads, n_slots, config.d_head)
    return KVCache(like.new_zeros(shape), like.new_zeros(shape))


def filled(cache: KVCache, n: int) -> KVCache:
    """First n slots of the cache, as views of it."""
    return KVCache(cache.k[:, :, :n], cache.v[:, :, :n])


def flops(config: DecoderConfig, kind: LayerKind, companions: float | int) -> float:
    """Floating-point operations of a token's scores and of its sum of values, in a document with
    `companions` tokens.
    """
    limits = {"full": None, "sliding": config.window, "chunked": config.chunk}
    limit = limits[kind.attention] or companions
    return 4.0 * config.n_heads * config.d_head * min(companions / 2, limit)


def _queries_keys_values(
    config: DecoderConfig, layer: LayerMaps, x: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Heads [B heads T E] of queries, keys and values, normed before RoPE where the family does."""

    def heads(x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, config.d_head)).transpose(1, 2)

    if config.fused:
        n_rows = [n * config.d_head for n in (config.n_heads, config.n_kv_heads, config.n_kv_heads)]
        q, k, v = layer.linear("self_attn.qkv_proj", x).split(n_rows, dim=-1)
    else:
        q, k, v = layer.linears([f"self_attn.{name}_proj" for name in "qkv"], x)
    if config.qk_norm == "projection":
        q, k = layer.norm("self_attn.q_norm", q), layer.norm("self_attn.k_norm", k)
    q, k, v = heads(q), heads(k), heads(v)
    if config.qk_norm == "head":
        q, k = layer.norm("self_attn.q_norm", q), layer.norm("self_attn.k_norm", k)
    return q, k, v


def _rope_rule(config: DecoderConfig, kind: LayerKind) -> tuple[float, rope_scaling.Scaling | None]:
    """Base and scaling of a layer's angles."""
    if kind.attention == "sliding" and config.window_rope_theta is not None:
        return config.window_rope_theta, None
    return config.rope_theta, config.rope_scaling


def _angles(
    config: DecoderConfig,
    theta: float,
    scaling: rope_scaling.Scaling | None,
    where: TokenPositions,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    wide = wide_dtype(dtype) if config.rope_in_float32 else dtype
    frequencies = rope_scaling.frequencies(
        config.d_rotary, theta, scaling, where.lengths, config.max_positions
    )
    magnitude = rope_scaling.magnitude(scaling, config.max_positions)
    return rope_table(
        where.positions, to_device(frequencies, where.positions.device), wide, magnitude
    )


GROUPED_QUERY = Mixer(shapes, dims, inputs, apply, empty_cache, filled, flops)

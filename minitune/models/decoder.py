"""The one decoder behind every family: a Config says what each block does, and a family is a Config with other defaults.

Vaswani et al. 2017, arXiv 1706.03762, in the form of Touvron et al. 2023, arXiv 2302.13971. Weights keep Hugging Face names.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Annotated, Any, Literal, NamedTuple

import msgspec
import torch
from jaxtyping import Float, Int
from msgspec import Meta
from torch import Tensor

from minitune import tree
from minitune.attention import Seen, attention, causal, chunked, document_lengths, document_positions, documents, windowed
from minitune.grad import remat
from minitune.models import rope
from minitune.models.experts import Experts, expert_shapes, is_routed, routed_feed_forward, router_logits
from minitune.ops import Norm, embed, geglu, linear, rms_norm, rope_table, rotate, swiglu
from minitune.types import NO_DELTAS, Deltas, Params

Size = Annotated[int, Meta(gt=0)]
QKNorm = Literal["none", "head", "projection", "rotated"]  # of each head, of all heads together; of each behind RoPE, no weight
Pairs = Literal["halves", "neighbours"]  # the dimensions that RoPE turns together: i and i + half; 2i and 2i + 1
Reach = Literal["full", "window", "chunk"]  # which earlier tokens a layer attends to: all, the last few, those of its chunk


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The numbers that a decoder is made of and what its blocks do; the patterns `layers` and `rope_layers` repeat over depth."""

    n_layers: Annotated[int, Meta(gt=0, le=10_000)]
    n_heads: Size
    n_kv_heads: Size
    d_model: Size
    d_head: Size
    d_ff: Size
    vocab_size: Size
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: rope.Scaling | None = None
    tie_embeddings: bool = False
    max_positions: Size = 2048
    attention_bias: bool = False  # on q, k, v and o
    mlp_bias: bool = False

    qkv_bias: bool = False  # on q, k and v alone
    fused: bool = False  # q, k, v in one weight, and gate, up in another
    norm: Norm = "w_after_cast"
    norms: Literal["before", "after", "both"] = "before"  # of attention and of the mlp
    qk_norm: QKNorm = "none"
    activation: Literal["silu", "gelu_tanh"] = "silu"
    embedding_multiplier: float | Literal["sqrt_d_model"] = 1.0
    residual_multiplier: float = 1.0
    attention_scale: float | None = None  # of the scores; None: d_head^-0.5
    attention_cap: float | None = None
    logit_divisor: float = 1.0
    final_cap: float | None = None
    layers: tuple[Reach, ...] = ("full",)
    window: Size | None = None  # tokens; None: window layers are full
    chunk: Size | None = None  # tokens
    rope_layers: tuple[bool, ...] = (True,)
    rotary_factor: float = 1.0  # the part of each head's dimensions, from the first, that RoPE turns
    window_rope_theta: float | None = None  # of window layers, which are then unscaled; None: RoPE as on the others
    rope_in_float32: bool = False
    rope_pairs: Pairs = "halves"
    nope_growth: float | None = None  # queries of layers without RoPE grow by 1 + nope_growth ln(1 + floor((p + 1) / nope_span))
    nope_span: Size = 8192  # tokens
    experts: Experts | None = None  # in place of the mlp, on the layers that it says
    sinks: bool = False  # one more score a head, learned, whose weight goes nowhere

    def __post_init__(self) -> None:
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_heads {self.n_heads} is no multiple of n_kv_heads {self.n_kv_heads}")
        if self.d_rotary % 2:
            what = f"d_head {self.d_head}" if self.rotary_factor == 1 else f"int({self.rotary_factor} * d_head {self.d_head})"
            raise ValueError(f"{what} is odd, expected an even number: RoPE rotates pairs")
        if not self.layers or not self.rope_layers:
            raise ValueError("layers or rope_layers is empty, expected a pattern such as ['full']")
        if isinstance(self.rope_scaling, rope.LongRope):
            found = {len(self.rope_scaling.short_factor), len(self.rope_scaling.long_factor)}
            if found != {self.d_rotary // 2}:
                raise ValueError(f"longrope has lists of {sorted(found)} factors, expected {self.d_rotary // 2} in each")

    @property
    def d_rotary(self) -> int:
        """How many dimensions of a head RoPE turns."""
        return int(self.d_head * self.rotary_factor)

    @property
    def mlp(self) -> str:
        """What the weights of a plain mlp are called."""
        return "mlp" if self.experts is None else self.experts.mlp


class Kind(NamedTuple):
    """What sets a layer's attention apart from another's; layers of one kind share their angles and what they see."""

    reach: Reach
    rope: bool


class Places(NamedTuple):
    """Where the tokens of a call stand, as layers of one kind see it."""

    rope: tuple[Float[Tensor, "b T E"], Float[Tensor, "b T E"]] | None  # cos and sin; None: this layer has no RoPE
    seen: Seen
    query_scale: Float[Tensor, "b T"] | None


class Cache(NamedTuple):
    """Keys and values of one layer: a slot for every token of the whole decode, filled from the left."""

    k: Float[Tensor, "B K slots E"]
    v: Float[Tensor, "B K slots E"]


NORMS = {  # names of the norms: before and after attention, before and after the mlp
    "before": ("input_layernorm", None, "post_attention_layernorm", None),
    "after": (None, "post_attention_layernorm", None, "post_feedforward_layernorm"),
    "both": ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"),
}
ACTIVATIONS = {"silu": swiglu, "gelu_tanh": geglu}


def layer_kind(config: Config, i: int) -> Kind:
    """The kind of layer i."""
    return Kind(config.layers[i % len(config.layers)], config.rope_layers[i % len(config.rope_layers)])


def shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Every weight's name and shape, [out, in], in the order of the forward; a tied head is not listed: it is the embedding."""
    weights: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, config.d_model)}
    for i in range(config.n_layers):
        weights |= {f"model.layers.{i}.{name}": shape for name, shape in _layer_shapes(config, i).items()}
    weights["model.norm.weight"] = (config.d_model,)
    if not config.tie_embeddings:
        weights["lm_head.weight"] = (config.vocab_size, config.d_model)
    return weights


def head_name(config: Config) -> str:
    """The weight that turns hidden states into logits: the embedding itself when tied."""
    return "model.embed_tokens.weight" if config.tie_embeddings else "lm_head.weight"


def block(
    config: Config,
    w: Params,
    deltas: Deltas,
    x: Float[Tensor, "B T D"],
    places: Places,
    cache: tuple[Cache, Int[Tensor, "T"]] | None = None,
) -> Float[Tensor, "B T D"]:
    """One decoder block: x + attention(norm(x)), then x + mlp(norm(x)), with the norms where the config has them.

    w and deltas hold this layer's leaves by Hugging Face name. With (cache, slots) the keys and values of x are written to these
    slots, and x attends to the whole cache.
    """
    return _block(config, w, deltas, x, places, cache)[0]


def routed_block(
    config: Config, w: Params, deltas: Deltas, x: Float[Tensor, "B T D"], places: Places
) -> Float[Tensor, "B T D_and_X"]:
    """A block with experts, its result followed by what the router gave each of them: one tensor, as remat wants it."""
    assert config.experts is not None, "only a block with experts has a router"
    x, h = _block(config, w, deltas, x, places, None)
    return torch.cat([x, router_logits(config.experts, w, deltas, h)], dim=-1)


def _block(
    config: Config, w: Params, deltas: Deltas, x: Tensor, places: Places, cache: tuple[Cache, Tensor] | None
) -> tuple[Tensor, Tensor]:
    """(the block's result, what its mlp was given)."""

    def proj(name: str, x: Tensor) -> Tensor:
        return linear(x, w[f"{name}.weight"], deltas.get(f"{name}.weight"), w.get(f"{name}.bias"))

    def norm(name: str | None, x: Tensor) -> Tensor:
        return x if name is None else rms_norm(x, w[f"{name}.weight"], config.norm_eps, config.norm)

    def weighed(x: Tensor) -> Tensor:
        return x if config.residual_multiplier == 1 else x * config.residual_multiplier

    attention_in, attention_out, mlp_in, mlp_out = NORMS[config.norms]
    x = x + weighed(norm(attention_out, _attend(config, w, proj, norm, norm(attention_in, x), places, cache)))
    h = norm(mlp_in, x)
    return x + weighed(norm(mlp_out, _feed_forward(config, w, deltas, proj, h))), h


def hidden(
    config: Config,
    params: Params,
    tokens: Int[Tensor, "B T"],
    deltas: Deltas = NO_DELTAS,
    *,
    segment_ids: Int[Tensor, "B T"] | None = None,
    wrap: Callable[[Callable[..., Tensor]], Callable[..., Tensor]] = lambda f: f,
    n_remat: int = 0,
    again: Callable[[Callable[..., Tensor]], Callable[..., Tensor]] = remat,
) -> Float[Tensor, "B T D"]:
    """Final normed hidden states; `wrap` transforms the block (compile), `again` makes the first n_remat blocks ones that the
    backward computes again, segment_ids keep packed documents apart."""
    lengths: int | Tensor = tokens.shape[1]
    if segment_ids is None:
        seen = causal(lengths, tokens.device)
        positions = seen.last
    else:
        positions, seen = document_positions(segment_ids), documents(segment_ids)
        if isinstance(config.rope_scaling, rope.BY_LENGTH):
            lengths = document_lengths(segment_ids)
    x = _embedded(config, params, tokens)
    places = places_of(config, positions, lengths, seen, x.dtype)
    run = wrap(partial(block, config))
    lean = again(run)
    for i in range(config.n_layers):
        one = lean if i < n_remat else run
        x = one(layer_of(params, i), layer_of(deltas, i), x, places[layer_kind(config, i)])
    return rms_norm(x, params["model.norm.weight"], config.norm_eps, config.norm)


def decode(
    config: Config,
    params: Params,
    tokens: Int[Tensor, "B T"],
    deltas: Deltas,
    caches: Sequence[Cache],
    positions: Int[Tensor, "B T"],
    seen: Seen,
    run: Callable[..., Float[Tensor, "B T D"]],
) -> Float[Tensor, "B T D"]:
    """Hidden states of new tokens behind older ones, whose keys and values the caches hold; theirs are written to slots
    seen.last, the same of every row.

    Each row is one document, whose last token is its last slot. run is partial(block, config), or what a caller has made of it,
    such as torch.compile's. A RoPE that depends on the length of the text takes it as it is now; keys that are cached keep their
    angles, as in transformers.
    """
    x = _embedded(config, params, tokens)
    places, slots = places_of(config, positions, positions[:, -1:] + 1, seen, x.dtype), seen.last[0]
    for i, cache in enumerate(caches):
        x = run(layer_of(params, i), layer_of(deltas, i), x, places[layer_kind(config, i)], (cache, slots))
    return rms_norm(x, params["model.norm.weight"], config.norm_eps, config.norm)


def scaled_logits(config: Config, logits: Float[Tensor, "*rows V"]) -> Float[Tensor, "*rows V"]:
    """The model's logits from those of its head: divided and capped, where the family does so."""
    if config.logit_divisor != 1:
        logits = logits / config.logit_divisor
    return logits if config.final_cap is None else config.final_cap * torch.tanh(logits / config.final_cap)


def forward(
    config: Config,
    params: Params,
    tokens: Int[Tensor, "B T"],
    deltas: Deltas = NO_DELTAS,
    *,
    segment_ids: Int[Tensor, "B T"] | None = None,
) -> Float[Tensor, "B T V"]:
    """Logits of every token; training never holds these whole, see Model.token_losses."""
    name = head_name(config)
    states = hidden(config, params, tokens, deltas, segment_ids=segment_ids)
    return scaled_logits(config, linear(states, params[name], deltas.get(name)))


def _attend(
    config: Config,
    w: Params,
    proj: Callable[[str, Tensor], Tensor],
    norm: Callable[[str, Tensor], Tensor],
    x: Tensor,
    places: Places,
    cache: tuple[Cache, Tensor] | None,
) -> Tensor:
    def heads(x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, config.d_head)).transpose(1, 2)

    if config.fused:
        n_rows = [n * config.d_head for n in (config.n_heads, config.n_kv_heads, config.n_kv_heads)]
        q, k, v = proj("self_attn.qkv_proj", x).split(n_rows, dim=-1)
    else:
        q, k, v = (proj(f"self_attn.{name}_proj", x) for name in "qkv")
    if config.qk_norm == "projection":
        q, k = norm("self_attn.q_norm", q), norm("self_attn.k_norm", k)
    q, k, v = heads(q), heads(k), heads(v)
    if config.qk_norm == "head":
        q, k = norm("self_attn.q_norm", q), norm("self_attn.k_norm", k)
    if places.rope is not None:
        if config.rope_pairs == "neighbours":  # the same order for queries and keys leaves their products as they are
            q, k = (x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2) for x in (q, k))
        q, k = rotate(q, places.rope), rotate(k, places.rope)
    if places.rope is not None and config.qk_norm == "rotated":
        q, k = (rms_norm(x, x.new_ones(config.d_head), config.norm_eps) for x in (q, k))
    if places.query_scale is not None:
        q = q * places.query_scale[:, None, :, None].to(q.dtype)
    if cache is not None:
        new = Cache(*(x.to(old.dtype) for x, old in zip((k, v), cache[0], strict=True)))
        k, v = (x.to(q.dtype) for x in tree.donate_at(cache[0], cache[1], new, dim=2))
    scale, soft_cap, sinks = config.attention_scale, config.attention_cap, w.get("self_attn.sinks")
    out = attention(q, k, v, places.seen, scale=scale, soft_cap=soft_cap, sinks=sinks)
    return proj("self_attn.o_proj", out.transpose(1, 2).flatten(2))


def _feed_forward(config: Config, w: Params, deltas: Deltas, proj: Callable[[str, Tensor], Tensor], x: Tensor) -> Tensor:
    if config.experts is not None and is_routed(config.experts, w):
        return routed_feed_forward(config.experts, w, deltas, x)
    mlp = config.mlp
    gate, up = (
        proj(f"{mlp}.gate_up_proj", x).chunk(2, dim=-1)
        if config.fused
        else (proj(f"{mlp}.gate_proj", x), proj(f"{mlp}.up_proj", x))
    )
    return proj(f"{mlp}.down_proj", ACTIVATIONS[config.activation](gate, up))


def _embedded(config: Config, params: Params, tokens: Tensor) -> Tensor:
    x = embed(tokens, params["model.embed_tokens.weight"])
    if config.embedding_multiplier == "sqrt_d_model":  # rounded to the dtype of the weights, as it was in training
        return x * torch.tensor(config.d_model**0.5, dtype=params["model.embed_tokens.weight"].dtype, device=x.device)
    return x if config.embedding_multiplier == 1 else x * config.embedding_multiplier


def places_of(config: Config, positions: Tensor, lengths: int | Tensor, seen: Seen, dtype: torch.dtype) -> dict[Kind, Places]:
    """The places of every kind of layer that the model has, each run of keys and each table of angles made once."""
    kinds = dict.fromkeys(layer_kind(config, i) for i in range(config.n_layers))
    reach: dict[Reach, Seen] = {"full": seen, "window": seen, "chunk": seen}
    if config.window is not None and any(kind.reach == "window" for kind in kinds):
        reach["window"] = windowed(seen, config.window)
    if config.chunk is not None and any(kind.reach == "chunk" for kind in kinds):
        reach["chunk"] = chunked(seen, positions, config.chunk)
    wide = torch.promote_types(dtype, torch.float32) if config.rope_in_float32 else dtype
    rules = {
        kind: (config.window_rope_theta, None)
        if kind.reach == "window" and config.window_rope_theta is not None
        else (config.rope_theta, config.rope_scaling)
        for kind in kinds
    }
    tables = {rule: _angles(config, *rule, positions, lengths, wide) for rule in dict.fromkeys(rules.values())}
    scale = rope.query_scale(config.rope_scaling, positions)
    nope_scale = scale
    if config.nope_growth is not None:
        nope_scale = 1 + config.nope_growth * torch.log1p(torch.floor((positions + 1) / config.nope_span))
    return {
        kind: Places(tables[rules[kind]], reach[kind.reach], scale) if kind.rope else Places(None, reach[kind.reach], nope_scale)
        for kind in kinds
    }


def _angles(
    config: Config, theta: float, scaling: rope.Scaling | None, positions: Tensor, lengths: int | Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    f = rope.frequencies(config.d_rotary, theta, scaling, lengths, config.max_positions)
    return rope_table(positions, f.to(positions.device), dtype, rope.magnitude(scaling, config.max_positions))


def _layer_shapes(config: Config, i: int) -> dict[str, tuple[int, ...]]:
    """The weights of layer i by their names within it."""
    c, d, q, kv = config, config.d_model, config.n_heads * config.d_head, config.n_kv_heads * config.d_head
    attention_in, attention_out, mlp_in, mlp_out = NORMS[c.norms]
    qkv_bias = c.attention_bias or c.qkv_bias
    layer: dict[str, tuple[int, ...]] = {**_norm_shape(attention_in, d)}
    if c.fused:
        layer |= _linear_shapes("self_attn.qkv_proj", q + 2 * kv, d, qkv_bias)
    else:
        for name, out in (("q", q), ("k", kv), ("v", kv)):
            layer |= _linear_shapes(f"self_attn.{name}_proj", out, d, qkv_bias)
    if c.qk_norm in ("head", "projection"):
        n_q, n_k = (c.d_head, c.d_head) if c.qk_norm == "head" else (q, kv)
        layer |= {"self_attn.q_norm.weight": (n_q,), "self_attn.k_norm.weight": (n_k,)}
    layer |= _linear_shapes("self_attn.o_proj", d, q, c.attention_bias)
    layer |= {"self_attn.sinks": (c.n_heads,)} if c.sinks else {}
    layer |= _norm_shape(attention_out, d) | _norm_shape(mlp_in, d)
    if c.experts is not None and c.experts.at(i):
        return layer | expert_shapes(c.experts, d) | _norm_shape(mlp_out, d)
    for name in ("gate_up",) if c.fused else ("gate", "up"):
        layer |= _linear_shapes(f"{c.mlp}.{name}_proj", 2 * c.d_ff if c.fused else c.d_ff, d, c.mlp_bias)
    return layer | _linear_shapes(f"{c.mlp}.down_proj", d, c.d_ff, c.mlp_bias) | _norm_shape(mlp_out, d)


def _norm_shape(name: str | None, d: int) -> dict[str, tuple[int, ...]]:
    return {} if name is None else {f"{name}.weight": (d,)}


def _linear_shapes(name: str, out: int, in_: int, bias: bool) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (out, in_)} | ({f"{name}.bias": (out,)} if bias else {})


def layer_of(leaves: Mapping[str, Any], i: int) -> dict[str, Any]:
    """The leaves of layer i by their names within it."""
    prefix = f"model.layers.{i}."
    return {name.removeprefix(prefix): leaf for name, leaf in leaves.items() if name.startswith(prefix)}

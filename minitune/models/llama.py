"""Llama 2, 3, 3.1, 3.2, 3.3 and what shares their shape.

Touvron et al. 2023, arXiv 2307.09288; Grattafiori et al. 2024, arXiv 2407.21783.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, NamedTuple

import msgspec
import torch
from jaxtyping import Bool, Float, Int
from msgspec import Meta
from torch import Tensor

from minitune import tree
from minitune.attention import attention, document_mask, document_positions
from minitune.models import rope
from minitune.ops import embed, linear, rms_norm, rope_table, rotate, swiglu
from minitune.types import NO_DELTAS, Deltas, InputError, Params

Size = Annotated[int, Meta(gt=0)]


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The numbers that a Llama is made of."""

    n_layers: Size
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
    attention_bias: bool = False
    mlp_bias: bool = False

    def __post_init__(self) -> None:
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_heads {self.n_heads} is no multiple of n_kv_heads {self.n_kv_heads}")
        if self.d_head % 2:
            raise ValueError(f"d_head {self.d_head} is odd, expected an even number: RoPE rotates pairs")


HANDLED = frozenset(
    [
        "model_type",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "hidden_size",
        "head_dim",
        "intermediate_size",
        "vocab_size",
        "rms_norm_eps",
        "rope_theta",
        "rope_scaling",
        "rope_parameters",
        "tie_word_embeddings",
        "max_position_embeddings",
        "attention_bias",
        "mlp_bias",
        "hidden_act",
        "attention_dropout",
    ]
)
HARMLESS = frozenset(
    [
        "architectures",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "dtype",
        "torch_dtype",
        "use_cache",
        "transformers_version",
        "initializer_range",
        "pretraining_tp",
        "_name_or_path",
        "_attn_implementation_autoset",
        "return_dict",
        "output_attentions",
        "output_hidden_states",
    ]
)


def from_hf(hf: Mapping[str, Any], where: str = "config.json") -> Config:
    """The Config of a Hugging Face config.json; InputError names a field that is neither handled nor known to be harmless."""
    unknown = [key for key in hf if key not in HANDLED and key not in HARMLESS]
    if unknown:
        raise InputError(
            f"models: {where} has {unknown[0]!r} = {hf[unknown[0]]!r}, unknown to the llama family; is it another family?"
        )
    if hf.get("hidden_act", "silu") != "silu" or hf.get("attention_dropout", 0.0):
        found = {key: hf[key] for key in ("hidden_act", "attention_dropout") if key in hf}
        raise InputError(f"models: {where} has {found}, expected hidden_act 'silu' and attention_dropout 0")
    theta, scaling = rope.from_hf(hf, where)
    n_heads = hf.get("num_attention_heads")
    fields = {
        "n_layers": hf.get("num_hidden_layers"),
        "n_heads": n_heads,
        "n_kv_heads": hf.get("num_key_value_heads") or n_heads,
        "d_model": hf.get("hidden_size"),
        "d_head": hf.get("head_dim") or (hf["hidden_size"] // n_heads if n_heads and hf.get("hidden_size") else None),
        "d_ff": hf.get("intermediate_size"),
        "vocab_size": hf.get("vocab_size"),
        "norm_eps": hf.get("rms_norm_eps", 1e-6),
        "rope_theta": theta,
        "rope_scaling": msgspec.to_builtins(scaling),
        "tie_embeddings": hf.get("tie_word_embeddings", False),
        "max_positions": hf.get("max_position_embeddings", 2048),
        "attention_bias": hf.get("attention_bias", False),
        "mlp_bias": hf.get("mlp_bias", False),
    }
    try:
        return msgspec.convert(fields, Config)
    except msgspec.ValidationError as error:
        raise InputError(f"models: {where}: {error} (in minitune's names for the fields)") from None


def to_hf(config: Config) -> dict[str, Any]:
    """A config.json that transformers 4.x and 5.x read alike."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "hidden_size": config.d_model,
        "head_dim": config.d_head,
        "intermediate_size": config.d_ff,
        "vocab_size": config.vocab_size,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "max_position_embeddings": config.max_positions,
        "attention_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
        "hidden_act": "silu",
        **rope.to_hf(config.rope_theta, config.rope_scaling),
    }


def shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Every weight's name and shape, [out, in], in the order of the forward; a tied head is not listed: it is the embedding."""
    c, d, q, kv = config, config.d_model, config.n_heads * config.d_head, config.n_kv_heads * config.d_head
    layer: dict[str, tuple[int, ...]] = {"input_layernorm.weight": (d,)}
    for name, out, in_ in (("q", q, d), ("k", kv, d), ("v", kv, d), ("o", d, q)):
        layer[f"self_attn.{name}_proj.weight"] = (out, in_)
        if c.attention_bias:
            layer[f"self_attn.{name}_proj.bias"] = (out,)
    layer["post_attention_layernorm.weight"] = (d,)
    for name, out, in_ in (("gate", c.d_ff, d), ("up", c.d_ff, d), ("down", d, c.d_ff)):
        layer[f"mlp.{name}_proj.weight"] = (out, in_)
        if c.mlp_bias:
            layer[f"mlp.{name}_proj.bias"] = (out,)
    weights: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (c.vocab_size, d)}
    for i in range(c.n_layers):
        weights |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    weights["model.norm.weight"] = (d,)
    if not c.tie_embeddings:
        weights["lm_head.weight"] = (c.vocab_size, d)
    return weights


def head_name(config: Config) -> str:
    """The weight that turns hidden states into logits: the embedding itself when tied."""
    return "model.embed_tokens.weight" if config.tie_embeddings else "lm_head.weight"


class Cache(NamedTuple):
    """Keys and values of one layer: a slot for every token of the whole decode, filled from the left."""

    k: Float[Tensor, "B K slots E"]
    v: Float[Tensor, "B K slots E"]


def block(
    config: Config,
    w: Params,
    deltas: Deltas,
    x: Float[Tensor, "B T D"],
    angles: tuple[Float[Tensor, "b T E"], Float[Tensor, "b T E"]],
    mask: Bool[Tensor, "B 1 T S"] | None,
    cache: tuple[Cache, Int[Tensor, "T"]] | None = None,
) -> Float[Tensor, "B T D"]:
    """One decoder block: x + attention(norm(x)), then x + swiglu(norm(x)).

    w and deltas hold this layer's leaves by Hugging Face name. With (cache, slots) the keys and values of x are written to these
    slots, and x attends to the first S of all.
    """

    def proj(name: str, x: Tensor) -> Tensor:
        return linear(x, w[f"{name}.weight"], deltas.get(f"{name}.weight"), w.get(f"{name}.bias"))

    def heads(x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, config.d_head)).transpose(1, 2)

    h = rms_norm(x, w["input_layernorm.weight"], config.norm_eps)
    q, k, v = (heads(proj(f"self_attn.{name}_proj", h)) for name in "qkv")
    q, k = rotate(q, angles), rotate(k, angles)
    if cache is not None:
        assert mask is not None, "a cache is read through a mask"
        written, slots = cache
        k, v = (kept[:, :, : mask.shape[-1]] for kept in tree.donate_at(written, slots, Cache(k, v), dim=2))
    x = x + proj("self_attn.o_proj", attention(q, k, v, mask).transpose(1, 2).flatten(2))
    h = rms_norm(x, w["post_attention_layernorm.weight"], config.norm_eps)
    return x + proj("mlp.down_proj", swiglu(proj("mlp.gate_proj", h), proj("mlp.up_proj", h)))


def hidden(
    config: Config,
    params: Params,
    tokens: Int[Tensor, "B T"],
    deltas: Deltas = NO_DELTAS,
    *,
    segment_ids: Int[Tensor, "B T"] | None = None,
    wrap: Callable[[Callable[..., Tensor]], Callable[..., Tensor]] = lambda f: f,
) -> Float[Tensor, "B T D"]:
    """Final normed hidden states; `wrap` transforms the block (remat, compile), segment_ids keep packed documents apart."""
    length = tokens.shape[1]
    if segment_ids is None:
        positions, mask = torch.arange(length, device=tokens.device)[None], None
    else:
        positions, mask = document_positions(segment_ids), document_mask(segment_ids)
        if isinstance(config.rope_scaling, rope.Dynamic) and length > config.max_positions:
            raise InputError(
                f"models: rows of {length} tokens, expected at most {config.max_positions}: dynamic RoPE scaling depends on each "
                "document's length, so longer packed rows would change it; shorten seq_len"
            )
    x = embed(tokens, params["model.embed_tokens.weight"])
    angles = _angles(config, positions, length, x.dtype)

    def run(w: Params, d: Deltas, x: Tensor, angles: tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor:
        return block(config, w, d, x, angles, mask)

    run = wrap(run)
    for i in range(config.n_layers):
        x = run(_layer(params, i), _layer(deltas, i), x, angles, mask)
    return rms_norm(x, params["model.norm.weight"], config.norm_eps)


def decode(
    config: Config,
    params: Params,
    tokens: Int[Tensor, "B T"],
    deltas: Deltas,
    caches: Sequence[Cache],
    filled: int,
    positions: Int[Tensor, "B T"],
    mask: Bool[Tensor, "B 1 T S"],
    run: Callable[..., Float[Tensor, "B T D"]],
) -> Float[Tensor, "B T D"]:
    """Hidden states of new tokens behind `filled` older ones, whose keys and values the caches hold; theirs are written there.

    The mask covers the first S slots, at least filled + T. run is partial(block, config), or what a caller has made of it,
    such as torch.compile's.
    """
    x = embed(tokens, params["model.embed_tokens.weight"])
    end = filled + tokens.shape[1]
    angles = _angles(config, positions, end, x.dtype)
    slots = torch.arange(filled, end, device=x.device)
    for i, cache in enumerate(caches):
        x = run(_layer(params, i), _layer(deltas, i), x, angles, mask, (cache, slots))
    return rms_norm(x, params["model.norm.weight"], config.norm_eps)


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
    return linear(hidden(config, params, tokens, deltas, segment_ids=segment_ids), params[name], deltas.get(name))


def _angles(config: Config, positions: Tensor, length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    f = rope.frequencies(config.d_head, config.rope_theta, config.rope_scaling, length, config.max_positions)
    return rope_table(positions, f.to(positions.device), dtype)


def _layer(leaves: Mapping[str, Any], i: int) -> dict[str, Any]:
    prefix = f"model.layers.{i}."
    return {name.removeprefix(prefix): leaf for name, leaf in leaves.items() if name.startswith(prefix)}

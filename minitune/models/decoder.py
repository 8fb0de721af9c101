"""Decoder behind every family: tokens to hidden states to logits, block after block, with
or without a cache.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from minitune.models import rope_scaling
from minitune.models.config import DecoderConfig, LayerKind, layer_kind, layer_kinds
from minitune.models.mixers.mixer import TokenPositions
from minitune.models.mixers.registry import MIXERS
from minitune.models.weights import layer_of
from minitune.nn.attention.key_range import (
    KeyRange,
    causal,
    document_keys,
    document_lengths,
    document_positions,
)
from minitune.nn.dropout import row_seeds, uniform
from minitune.nn.elementwise import rms_norm
from minitune.nn.linear import embed
from minitune.sharding.gather import gather
from minitune.sharding.tokens import TokenShares
from minitune.tree import Tree
from minitune.types import Params

# the function of layer i, called as (its leaves, x, its mixer's inputs)
BlockOf = Callable[[int], Callable[..., Tensor]]


def hidden(
    config: DecoderConfig,
    params: Params,
    tokens: Int[Tensor, "B T"],
    *,
    segment_ids: Int[Tensor, "B T"] | None = None,
    block_of: BlockOf,
    noise: Float[Tensor, "B T D"] | None = None,
    shares: TokenShares | None = None,
) -> Float[Tensor, "B T D"]:
    """Final normed hidden states; segment_ids keep packed documents apart, block_of(i) is layer i.

    noise is added to the embedded tokens (see neftune_noise). With shares, of the tokens that
    are this rank's: [B n_own D].
    """
    x, inputs = before_first_block(config, params, tokens, segment_ids, noise, shares)
    for i in range(config.n_layers):
        x = block_of(i)(layer_of(params, i), x, inputs[layer_kind(config, i)])
    return rms_norm(x, params["model.norm.weight"], config.norm_eps, config.norm)


def before_first_block(
    config: DecoderConfig,
    params: Params,
    tokens: Int[Tensor, "B T"],
    segment_ids: Int[Tensor, "B T"] | None,
    noise: Float[Tensor, "B T D"] | None = None,
    shares: TokenShares | None = None,
) -> tuple[Float[Tensor, "B T D"], dict[LayerKind, Any]]:
    """Embedded tokens, and the inputs that the mixers of every kind of layer share."""
    where = token_positions(config, tokens, segment_ids, shares)
    if shares is not None:
        tokens = shares.own(tokens)
        noise = None if noise is None else shares.own(noise)
    x = _embedded(config, params, tokens, noise)
    return x, mixer_inputs(config, where, x.dtype)


def neftune_noise(
    config: DecoderConfig,
    seeds: Int[Tensor, "B"],
    segment_ids: Int[Tensor, "B_parts T"],
    alpha: float,
) -> Float[Tensor, "B_parts T D"]:
    """Uniform on (-1, 1) times alpha / sqrt(L d_model), L the tokens of a token's document; 0 on
    padding.

    Jain et al. 2023, arXiv 2310.05914, algorithm 1, where a row is one document: packed documents
    have the noise that each would have alone. Drawn from each row's seed.
    """
    n_rows, n_tokens = segment_ids.shape
    own = row_seeds(seeds, n_rows, "neftune")
    lengths = document_lengths(segment_ids).clamp(min=1)
    size = alpha / (lengths * config.d_model).float().sqrt()
    size = torch.where(segment_ids > 0, size, 0.0)
    return size[..., None] * uniform(own, n_tokens, config.d_model)


def token_positions(
    config: DecoderConfig,
    tokens: Int[Tensor, "B T"],
    segment_ids: Int[Tensor, "B T"] | None,
    shares: TokenShares | None = None,
) -> TokenPositions:
    """Positions of tokens that are one document a row, or of the documents that segment_ids tell
    apart.
    """
    n_tokens = tokens.shape[1]
    n_all = n_tokens if shares is None else shares.size * shares.n_own(n_tokens)
    lengths: int | Tensor = n_tokens
    if segment_ids is None:
        keys = causal(n_all, tokens.device)
        positions = keys.last
    else:
        segment_ids = F.pad(segment_ids, (0, n_all - n_tokens))
        keys, positions = document_keys(segment_ids), document_positions(segment_ids)
        if isinstance(config.rope_scaling, rope_scaling.BY_LENGTH):
            lengths = document_lengths(segment_ids)
    if shares is None:
        return TokenPositions(positions, lengths, keys)
    seen_lengths = lengths if isinstance(lengths, int) else shares.of_mixer(lengths)
    sharers = () if shares.context is None else shares.context.sharers
    return TokenPositions(shares.of_mixer(positions), seen_lengths, keys, sharers)


def mixer_inputs(
    config: DecoderConfig, where: TokenPositions, dtype: torch.dtype
) -> dict[LayerKind, Any]:
    """Inputs of every kind of layer that the model has, made by the kind's mixer."""
    inputs: dict[LayerKind, Any] = {}
    for name in dict.fromkeys(config.mixers):
        kinds = [kind for kind in layer_kinds(config) if kind.mixer == name]
        inputs |= MIXERS[name].inputs(config, kinds, where, dtype)
    return inputs


def decode(
    config: DecoderConfig,
    params: Params,
    tokens: Int[Tensor, "B T"],
    caches: Sequence[Tree],
    positions: Int[Tensor, "B T"],
    keys: KeyRange,
    block_of: BlockOf,
) -> Float[Tensor, "B T D"]:
    """Hidden states of new tokens after older ones, whose state the caches hold.

    The state of the new tokens is written to slots keys.last, which are the same in every row.

    Each row is one document, whose last token is its last slot. A RoPE that depends on the length
    of the text takes it as it is now; keys that are cached keep their angles, as in transformers. A
    caller whose text grows beyond rope_scaling.border writes the state of all its tokens again.
    """
    x = _embedded(config, params, tokens)
    inputs = mixer_inputs(config, TokenPositions(positions, positions[:, -1:] + 1, keys), x.dtype)
    slots = keys.last[0]
    for i, cache in enumerate(caches):
        x = block_of(i)(layer_of(params, i), x, inputs[layer_kind(config, i)], (cache, slots))
    return rms_norm(x, params["model.norm.weight"], config.norm_eps, config.norm)


def empty_caches(config: DecoderConfig, n_rows: int, n_slots: int, like: Tensor) -> list[Tree]:
    """One empty cache a layer, for n_rows rows of n_slots tokens."""
    mixers = [MIXERS[layer_kind(config, i).mixer] for i in range(config.n_layers)]
    return [mixer.empty_cache(config, n_rows, n_slots, like) for mixer in mixers]


def filled_caches(config: DecoderConfig, caches: Sequence[Tree], n_slots: int) -> list[Tree]:
    """First n_slots slots of every cache, as views."""
    mixers = [MIXERS[layer_kind(config, i).mixer] for i in range(config.n_layers)]
    return [mixer.filled(cache, n_slots) for mixer, cache in zip(mixers, caches, strict=True)]


def scaled_logits(
    config: DecoderConfig, logits: Float[Tensor, "*rows V"]
) -> Float[Tensor, "*rows V"]:
    """Logits of the model from those of its head: divided and capped, where the family does so."""
    if config.logit_divisor != 1:
        logits = logits / config.logit_divisor
    return (
        logits
        if config.final_cap is None
        else config.final_cap * torch.tanh(logits / config.final_cap)
    )


def _embedded(
    config: DecoderConfig,
    params: Params,
    tokens: Tensor,
    noise: Tensor | None = None,
) -> Tensor:
    w = gather(params["model.embed_tokens.weight"])
    x = embed(tokens, w)
    if noise is not None:
        x = x + noise.to(x.dtype)
    # rounded to the dtype of the weights, as it was in training
    if config.embedding_multiplier == "sqrt_d_model":
        return x * w.new_full((), config.d_model**0.5)
    return x if config.embedding_multiplier == 1 else x * config.embedding_multiplier

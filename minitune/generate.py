"""Decoding with a key/value cache."""

from collections.abc import Sequence

import torch
from torch import Tensor

from minitune import ops
from minitune.attention import document_mask, document_positions
from minitune.models import Model
from minitune.types import Deltas, InputError, Params


def greedy(
    model: Model,
    params: Params,
    prompts: Sequence[Sequence[int]],
    deltas: Deltas,
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int],
) -> list[list[int]]:
    """For each prompt, the most likely next tokens one by one, up to max_new_tokens or a stop token (which is not returned).

    Prompts of all lengths run as one batch, padded on the left; equal to taking argmax of the full forward token by token.
    """
    if any(not prompt for prompt in prompts):
        raise InputError("generate: a prompt is empty, expected at least one token")
    width = max(len(prompt) for prompt in prompts)
    like = params["model.embed_tokens.weight"]
    real = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], dtype=torch.int32, device=like.device)
    tokens = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts], device=like.device)
    stops = torch.tensor(list(stop_ids), dtype=torch.int64, device=like.device)
    caches = _empty_caches(model, len(prompts), width + max_new_tokens, like)

    with torch.no_grad():
        positions, mask = document_positions(real), document_mask(real)
        visible = real.bool()
        done = torch.zeros(len(prompts), dtype=torch.bool, device=like.device)
        written: list[Tensor] = []
        for _ in range(max_new_tokens):
            tokens = _next(model, params, tokens, deltas, caches, positions, mask)
            caches = [cache._replace(length=visible.shape[1]) for cache in caches]
            written.append(tokens)
            done = done | torch.isin(tokens[:, 0], stops)
            if bool(done.all()):
                break
            visible = torch.cat([visible, torch.ones_like(visible[:, :1])], dim=1)
            positions, mask = positions[:, -1:] + 1, visible[:, None, None]
    rows = torch.cat(written, dim=1).tolist() if written else [[] for _ in prompts]
    return [_until(row, set(stop_ids)) for row in rows]


def _next(model: Model, params: Params, tokens: Tensor, deltas: Deltas, caches: list, positions: Tensor, mask: Tensor) -> Tensor:
    hidden = model.family.decode(model.config, params, tokens, deltas, caches, positions, mask)
    name = model.family.head_name(model.config)
    return ops.linear(hidden[:, -1], params[name], deltas.get(name)).argmax(-1, keepdim=True)


def _empty_caches(model: Model, n_rows: int, length: int, like: Tensor) -> list:
    config = model.config
    shape = (n_rows, config.n_kv_heads, length, config.d_head)
    return [model.family.Cache(like.new_zeros(shape), like.new_zeros(shape), 0) for _ in range(config.n_layers)]


def _until(row: list[int], stops: set[int]) -> list[int]:
    return row[: next((i for i, token in enumerate(row) if token in stops), len(row))]

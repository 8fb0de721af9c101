"""Decoding with a static key/value cache: one loop, whose tokens a caller reads as they come."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from minitune import seeds, tree
from minitune.errors import InputError
from minitune.inference.sampling import Sampling, next_tokens
from minitune.inference.stop_strings import check_stops, first_stop, stop_string_test
from minitune.models import decoder, rope_scaling
from minitune.models.model import Model, untransformed
from minitune.nn.attention.key_range import KeyRange, document_keys, document_positions
from minitune.quant.schemes import packed
from minitune.sharding.parts import local_parts
from minitune.text.tokenizer import Tokenizer
from minitune.tree import Tree
from minitune.types import Params

# a step attends to the filled slots of the cache, rounded up to this, so that shapes rarely change
STRIDE = 128


def stream(
    model: Model,
    params: Params,
    prompts: Sequence[Sequence[int]],
    *,
    sampling: Sampling,
    row_seeds: Sequence[int],
    max_new_tokens: int,
) -> Iterator[Int[Tensor, "B"]]:
    """Tokens of each step, one a prompt, for max_new_tokens steps or until the caller stops asking.

    Row b draws from row_seeds[b], and no row depends on another. Prompts of all lengths run as one
    batch, padded on the left. The keys and values of all steps have their place from the start.
    model.block_transform, such as torch.compile, is applied to the block of the later steps.
    InputError for an empty prompt.
    """
    params = _packed(params)
    like = local_parts(params["model.embed_tokens.weight"])
    written, first_slot = _left_padded(prompts, like.device)
    width = written.shape[1]
    slots = torch.arange(_rounded(width + max_new_tokens), device=like.device)[None]
    caches = decoder.empty_caches(model.config, len(prompts), slots.shape[1], like)
    later_block_of = model._replace(n_remat=0).block_of(params)

    # the first step reads the whole prompts
    call = _first_call(model, params, written, slots[:, :width] >= first_slot)
    for step in range(max_new_tokens):
        with torch.no_grad():
            rows = _crossing_rows(model, prompts, step)
            _refill(model, params, caches, written, first_slot, rows)
            hidden = _decode(model, params, caches, call)
            logits = model.logits(params, hidden[:, -1])
            new = next_tokens(logits, written, sampling, row_seeds, step)
        yield new
        written = torch.cat([written, new[:, None]], dim=1)

        # every later step reads the one new token, which goes to the next slot
        keys = KeyRange(first_slot, slots[:, width + step : width + step + 1].clone())
        positions, n_read = call.positions[:, -1:] + 1, _rounded(width + step + 1)
        call = _Call(new[:, None], positions, keys, n_read, later_block_of)


class _Call(NamedTuple):
    """Inputs of one step of decoding."""

    tokens: Int[Tensor, "B T"]
    positions: Int[Tensor, "B T"]
    keys: KeyRange
    n_read: int  # slots of the cache
    block_of: decoder.BlockOf


def _decode(
    model: Model, params: Params, caches: Sequence[Tree], call: _Call
) -> Float[Tensor, "B T D"]:
    read = decoder.filled_caches(model.config, caches, call.n_read)
    arguments = call.tokens, read, call.positions, call.keys, call.block_of
    return decoder.decode(model.config, params, *arguments)


def _crossing_rows(model: Model, prompts: Sequence[Sequence[int]], step: int) -> list[int]:
    """Rows whose latest token, before this step, changed the angles of all that are cached."""
    border = rope_scaling.border(model.config.rope_scaling)
    if border is None or step == 0:
        return []
    return [row for row, prompt in enumerate(prompts) if len(prompt) + step == border + 1]


def _refill(
    model: Model,
    params: Params,
    caches: Sequence[Tree],
    written: Int[Tensor, "B T"],
    first_slot: Int[Tensor, "B 1"],
    rows: Sequence[int],
) -> None:
    """Write the state of all tokens of some rows to the caches again, with the angles of their
    length.
    """
    is_token = torch.arange(written.shape[1], device=written.device)[None] >= first_slot
    for row in rows:
        only = slice(row, row + 1)
        call = _first_call(model, params, written[only], is_token[only])
        row_caches = [tree.map(lambda x, only=only: x[only], cache) for cache in caches]
        _decode(model, params, row_caches, call)


def _first_call(
    model: Model, params: Params, prompts: Int[Tensor, "B T"], is_token: Bool[Tensor, "B T"]
) -> _Call:
    segments = is_token.to(torch.int32)
    keys, block_of = document_keys(segments), untransformed(model).block_of(params)
    return _Call(prompts, document_positions(segments), keys, prompts.shape[1], block_of)


def _left_padded(
    prompts: Sequence[Sequence[int]], device: torch.device
) -> tuple[Int[Tensor, "B T"], Int[Tensor, "B 1"]]:
    """(prompts padded on the left, the first slot of each); InputError for an empty prompt.

    A padded place repeats the first token of its prompt: attention never sees it, and the
    repetition penalty, which asks if a token was there, counts nothing more.
    """
    if any(not prompt for prompt in prompts):
        raise InputError("generate: a prompt is empty, expected at least one token")
    width = max(len(prompt) for prompt in prompts)
    n_pad = [width - len(prompt) for prompt in prompts]
    rows = [[prompt[0]] * n + list(prompt) for prompt, n in zip(prompts, n_pad, strict=True)]
    return torch.tensor(rows, device=device), torch.tensor(n_pad, device=device)[:, None]


def generate(
    model: Model,
    params: Params,
    prompts: Sequence[Sequence[int]],
    *,
    sampling: Sampling,
    seed: int,
    max_new_tokens: int,
    stop_ids: Sequence[int],
) -> list[list[int]]:
    """New tokens for each prompt, up to max_new_tokens or a stop token, which is not returned.

    The token of prompt i at a step depends on (seed, i, step) and that prompt alone.
    """
    row_seeds = [seeds.derive(seed, "prompt", i) for i in range(len(prompts))]
    steps = stream(
        model,
        params,
        prompts,
        sampling=sampling,
        row_seeds=row_seeds,
        max_new_tokens=max_new_tokens,
    )
    return _rows(steps, len(prompts), stop_ids, lambda row: False)


def greedy(
    model: Model,
    params: Params,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int],
) -> list[list[int]]:
    """New tokens as of `generate`, the likeliest one at every step."""
    rule = Sampling()
    return generate(
        model,
        params,
        prompts,
        sampling=rule,
        seed=0,
        max_new_tokens=max_new_tokens,
        stop_ids=stop_ids,
    )


def answers(
    model: Model,
    params: Params,
    prompts: Sequence[Sequence[int]],
    tokenizer: Tokenizer,
    *,
    sampling: Sampling,
    seed: int,
    batch_size: int,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    stop_strings: Sequence[str],
    on_progress: Callable[[int], None],
    on_cut: Callable[[int], None] = lambda i: None,
) -> list[str]:
    """Texts that the model writes after each prompt, up to a stop token or a stop string.

    Prompts run in batches of about one length, the longest first, and on_progress(how many are
    answered) follows each. on_cut(i): answer i has max_new_tokens and no end. A stop string that is
    a special token stops as that token does. InputError for an empty stop string.
    """
    special, strings = _split_stops(stop_strings, tokenizer)
    decode = partial(tokenizer.decode, skip_special=True)
    has_ended = stop_string_test(decode, strings)
    # packed once, not for every batch
    run = partial(stream, model, _packed(params), sampling=sampling, max_new_tokens=max_new_tokens)
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    texts: dict[int, str] = {}
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        row_seeds = [seeds.derive(seed, "prompt", i) for i in batch]
        steps = run([prompts[i] for i in batch], row_seeds=row_seeds)
        rows = _rows(steps, len(batch), [*stop_ids, *special], has_ended)
        for i, row in zip(batch, rows, strict=True):
            text = decode(row)
            texts[i] = text[: first_stop(text, strings)]
            if len(row) == max_new_tokens and not has_ended(row):
                on_cut(i)
        on_progress(len(texts))
    return [texts[i] for i in range(len(prompts))]


def _split_stops(stop_strings: Sequence[str], tokenizer: Tokenizer) -> tuple[list[int], list[str]]:
    """(ids of stop strings that are special tokens, the others)."""
    ids = [tokenizer.special[stop] for stop in stop_strings if stop in tokenizer.special]
    strings = [stop for stop in stop_strings if stop not in tokenizer.special]
    check_stops(strings)
    return ids, strings


def _rows(
    steps: Iterable[Tensor],
    n_rows: int,
    stop_ids: Sequence[int],
    has_ended: Callable[[Sequence[int]], bool],
) -> list[list[int]]:
    """Tokens of each row up to a stop token, or through the one that ended it; reads no step after
    the last row's end.
    """
    rows: list[list[int]] = [[] for _ in range(n_rows)]
    going, stops = set(range(n_rows)), frozenset(stop_ids)
    for tokens in steps:
        for i, token in enumerate(tokens.tolist()):
            if i not in going:
                continue
            if token not in stops:
                rows[i].append(token)
            if token in stops or has_ended(rows[i]):
                going.remove(i)
        if not going:
            break
    return rows


def _packed(params: Params) -> Params:
    """Parameters with their leaves in the order that decoding reads; torch's kernels for that take
    bfloat16 alone.
    """
    return packed(params) if params["model.embed_tokens.weight"].dtype == torch.bfloat16 else params


def _rounded(n: int) -> int:
    return -(-n // STRIDE) * STRIDE

"""Decoding with a static key/value cache: one loop, whose tokens a caller reads as they come."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

import torch
from jaxtyping import Int
from torch import Tensor

from minitune import seeds
from minitune.errors import InputError
from minitune.inference.sampling import Sampling, next_tokens
from minitune.models import decoder
from minitune.models.model import Model
from minitune.nn.attention.key_range import KeyRange, document_positions, documents
from minitune.quant.schemes import packed
from minitune.text.tokenizer import Tokenizer
from minitune.types import Params

STRIDE = 128  # a step attends to the filled slots of the cache, rounded up to this, so that shapes rarely change


def stream(
    model: Model,
    params: Params,
    prompts: Sequence[Sequence[int]],
    *,
    sampling: Sampling,
    row_seeds: Sequence[int],
    max_new_tokens: int,
) -> Iterator[Int[Tensor, "B"]]:
    """Each step's tokens, one a prompt, for max_new_tokens steps or until the caller stops asking; row b draws from row_seeds[b].

    Prompts of all lengths run as one batch, padded on the left, and no row depends on another. The keys and values of all steps
    have their place from the start. model.block_transform, such as torch.compile, is applied to the block of the later steps.
    InputError for an empty prompt.
    """
    if any(not prompt for prompt in prompts):
        raise InputError("generate: a prompt is empty, expected at least one token")
    params = _packed(params)
    width = max(len(prompt) for prompt in prompts)
    n_slots = _rounded(width + max_new_tokens)
    like = params["model.embed_tokens.weight"]
    pad = [width - len(prompt) for prompt in prompts]
    # a padded place repeats a token of its prompt: attention never sees it, and the repetition penalty has counted it
    said = torch.tensor([[p[0]] * n + list(p) for p, n in zip(prompts, pad, strict=True)], device=like.device)
    slots, first = torch.arange(n_slots, device=like.device)[None], torch.tensor(pad, device=like.device)[:, None]
    segments = (slots[:, :width] >= first).to(torch.int32)
    caches = decoder.empty_caches(model.config, len(prompts), n_slots, like)
    block_of, later = decoder.plain_block_of(model.config), model._replace(n_remat=0).block_of()

    tokens, positions, key_range, n_read = said, document_positions(segments), documents(segments), width
    for step in range(max_new_tokens):
        with torch.no_grad():
            read = decoder.filled_caches(model.config, caches, n_read)
            hidden = decoder.decode(model.config, params, tokens, read, positions, key_range, block_of)
            new = next_tokens(model.logits(params, hidden[:, -1]), said, sampling, row_seeds, step)
        yield new
        tokens, said, block_of = new[:, None], torch.cat([said, new[:, None]], dim=1), later
        filled = width + step
        positions, key_range, n_read = (
            positions[:, -1:] + 1,
            KeyRange(first, slots[:, filled : filled + 1].clone()),
            _rounded(filled + 1),
        )


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
    """New tokens for each prompt, up to max_new_tokens or a stop token, which is not returned; the token of prompt i at a step
    depends on (seed, i, step) and that prompt alone."""
    row_seeds = [seeds.derive(seed, "prompt", i) for i in range(len(prompts))]
    steps = stream(model, params, prompts, sampling=sampling, row_seeds=row_seeds, max_new_tokens=max_new_tokens)
    return _rows(steps, len(prompts), stop_ids, lambda row: False)


def greedy(
    model: Model,
    params: Params,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int],
) -> list[list[int]]:
    """generate with the most likely token at every step: argmax of the full forward, token by token."""
    rule = Sampling()
    return generate(model, params, prompts, sampling=rule, seed=0, max_new_tokens=max_new_tokens, stop_ids=stop_ids)


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
) -> list[str]:
    """The text that the model writes after each prompt, in their order, ended by a stop token or before a stop string.

    Prompts run in batches of about one length, the longest first, and on_progress(how many are answered) follows each; neither
    changes an answer. A stop string that is a special token stops as that token does. InputError for an empty stop string.
    """
    ends = [*stop_ids, *(tokenizer.special[stop] for stop in stop_strings if stop in tokenizer.special)]
    strings = [stop for stop in stop_strings if stop not in tokenizer.special]
    _check_stops(strings)
    decode = partial(tokenizer.decode, skip_special=True)
    # a token has a byte at least, and a character four at most, so the end of a text that holds a new stop string is this long
    n_tail = 4 * max(map(len, strings), default=0) + 8

    def ended(row: Sequence[int]) -> bool:
        return bool(strings) and _stop(decode(row[-n_tail:]), strings) is not None and _stop(decode(row), strings) is not None

    params = _packed(params)  # once, not for every batch
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    texts: dict[int, str] = {}
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        steps = stream(
            model,
            params,
            [prompts[i] for i in batch],
            sampling=sampling,
            row_seeds=[seeds.derive(seed, "prompt", i) for i in batch],
            max_new_tokens=max_new_tokens,
        )
        for i, row in zip(batch, _rows(steps, len(batch), ends, ended), strict=True):
            text = decode(row)
            texts[i] = text[: _stop(text, strings)]
        on_progress(len(texts))
    return [texts[i] for i in range(len(prompts))]


def pieces(tokens: Iterable[int], decode: Callable[[Sequence[int]], str], stop_strings: Sequence[str]) -> Iterator[str]:
    """The text of tokens that come one by one, in pieces as soon as each is certain; it ends before the first stop string.

    Held back: the bytes of a character that is not complete, and what may be the beginning of a stop string. The pieces
    together are decode(all tokens), cut there. InputError for an empty stop string.
    """
    _check_stops(stop_strings)
    ids: list[int] = []
    text, shown = "", 0
    for token in tokens:
        ids.append(token)
        text = decode(ids)
        stop = _stop(text, stop_strings)
        end = _certain(text, stop_strings) if stop is None else stop
        if end > shown:
            yield text[shown:end]
            shown = end
        if stop is not None:
            return
    if len(text) > shown:
        yield text[shown:]


def _rows(
    steps: Iterable[Tensor], n_rows: int, stop_ids: Sequence[int], ended: Callable[[Sequence[int]], bool]
) -> list[list[int]]:
    """Each row's tokens up to a stop token, or through the one that ended it; reads no step after the last row's end."""
    rows: list[list[int]] = [[] for _ in range(n_rows)]
    going, stops = set(range(n_rows)), frozenset(stop_ids)
    for tokens in steps:
        for i, token in enumerate(tokens.tolist()):
            if i not in going:
                continue
            if token not in stops:
                rows[i].append(token)
            if token in stops or ended(rows[i]):
                going.remove(i)
        if not going:
            break
    return rows


def _packed(params: Params) -> Params:
    """params with their leaves in the order that decoding reads; torch's kernels for that take bfloat16 alone."""
    return packed(params) if params["model.embed_tokens.weight"].dtype == torch.bfloat16 else params


def _rounded(n: int) -> int:
    return -(-n // STRIDE) * STRIDE


def _check_stops(stop_strings: Sequence[str]) -> None:
    if "" in stop_strings:
        raise InputError("generate: a stop string is empty, expected at least one character; remove it")


def _stop(text: str, stop_strings: Sequence[str]) -> int | None:
    """Where the first stop string in a text begins."""
    return min((at for stop in stop_strings if (at := text.find(stop)) >= 0), default=None)


def _certain(text: str, stop_strings: Sequence[str]) -> int:
    """How many characters of a text stay as they are, whatever follows."""
    whole = text.rstrip("\N{REPLACEMENT CHARACTER}")
    heads = (len(whole) - n for stop in stop_strings for n in range(1, len(stop)) if whole.endswith(stop[:n]))
    return min(heads, default=len(whole))

"""Likelihood of given texts: log-probs of continuations, many in one forward, and the metrics of a
model on labelled batches.
"""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from minitune.errors import InputError
from minitune.hardware import to_device, widest_float
from minitune.losses.token import cross_entropy
from minitune.models import decoder
from minitune.models.model import Model
from minitune.nn.head import head_chunk
from minitune.types import Batch, Params


class Score(NamedTuple):
    """log p(continuation | context) in nats, and whether greedy decoding would have written the
    continuation.
    """

    logp_nats: float
    greedy: bool


class TokenMetrics(NamedTuple):
    """Metrics of a model on the target tokens of a data set."""

    loss_nats: float  # mean of -log p of a target
    accuracy: float  # share of targets that were the most likely token
    n_targets: int

    @property
    def perplexity(self) -> float:
        """exp(loss), which is cut at e^700: beyond that it is no float."""
        return math.exp(min(self.loss_nats, 700.0))


def token_metrics(model: Model, params: Params, batches: Iterable[Batch]) -> TokenMetrics:
    """Loss and accuracy over the target tokens of all batches; TypeError if there is no batch."""
    # Read once, behind the last forward; an accelerator may lack the float64 that the batches are
    # added up in.
    sums = [_token_sums(model, params, batch) for batch in batches]
    if not sums:
        raise TypeError("score: no batch to measure on, expected at least one")
    nats, n_right, n_targets = torch.stack(sums).to("cpu", torch.float64).sum(0).tolist()
    divisor = max(n_targets, 1.0)
    return TokenMetrics(nats / divisor, n_right / divisor, int(n_targets))


def _token_sums(model: Model, params: Params, batch: Batch) -> Float[Tensor, "3"]:
    """Nats, the number of targets that were the likeliest tokens, and the number of targets, summed
    over a batch.
    """

    def values(logits: Tensor, targets: Tensor) -> Tensor:
        return torch.stack(
            [cross_entropy(logits, targets), (logits.argmax(-1) == targets).float()], dim=-1
        )

    with torch.no_grad():
        nats_and_right = model.token_losses(params, batch, values, n_values=2)
        sums = nats_and_right.to(widest_float(nats_and_right.device)).sum((0, 1))
    n_targets = to_device(batch.target_mask().sum(), sums.device).to(sums.dtype)
    return torch.cat([sums, n_targets[None]])


def continuations(
    model: Model,
    params: Params,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    batch_size: int,
    max_length: int,
) -> list[Score]:
    """Score of each (context, continuation), token ids both, in the order given.

    Contexts are cut on the left so that a row has at most max_length tokens. Rows run from long to
    short, batch_size at a time, and pairs that differ in their last token alone share one: the
    answers A, B, C, D to a question cost one forward of a row. InputError for an empty context and
    for a continuation that is empty or longer than max_length.
    """
    sharers = _pairs_by_row(pairs, max_length)
    rows = sorted(sharers, key=len, reverse=True)
    scores: dict[int, Score] = {}
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        served = [(b, n) for b, row in enumerate(batch) for n in sharers[row]]
        targets = [pairs[n][1] for _, n in served]
        places = [
            (b, len(batch[b]) - len(t) + i)
            for (b, _), t in zip(served, targets, strict=True)
            for i in range(len(t))
        ]
        logps, greedy = _read(model, params, batch, places, [token for t in targets for token in t])
        sizes = [len(t) for t in targets]
        for (_, n), logp, hits in zip(served, logps.split(sizes), greedy.split(sizes), strict=True):
            scores[n] = Score(float(logp.sum()), bool(hits.all()))
    return [scores[n] for n in range(len(pairs))]


def _pairs_by_row(
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]], max_length: int
) -> dict[tuple[int, ...], list[int]]:
    """Numbers of the pairs that each row serves, by the row's tokens: all but the last, cut."""
    sharers: dict[tuple[int, ...], list[int]] = {}
    for n, (context, continuation) in enumerate(pairs):
        if not context or not 0 < len(continuation) <= max_length:
            raise InputError(
                f"score: a context of {len(context)} and a continuation of {len(continuation)} "
                f"tokens, expected a context of 1 or more and a continuation of 1 to {max_length}"
            )
        row = (*context, *continuation)[-max_length - 1 : -1]
        sharers.setdefault(row, []).append(n)
    return sharers


def _read(
    model: Model,
    params: Params,
    rows: Sequence[Sequence[int]],
    places: Sequence[tuple[int, int]],
    targets: Sequence[int],
) -> tuple[Float[Tensor, "n"], Bool[Tensor, "n"]]:
    """(log p of each target at its (row, position), whether it is the argmax there), on the CPU; no
    other logits are computed.
    """
    width, device = max(map(len, rows)), params["model.embed_tokens.weight"].device
    tokens = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=device)
    b, t = torch.tensor(places, device=device).T
    labels = torch.tensor(targets, device=device)
    with torch.no_grad():
        # rows are padded on the right, where a causal model never looks: no mask, so attention
        # takes its fastest path
        block_of = model.block_of(params)
        hidden = decoder.hidden(model.config, params, tokens, block_of=block_of)[b, t]
        chunk = head_chunk(model.head(params))
        pieces = [
            _judge(model.logits(params, h), y)
            for h, y in zip(hidden.split(chunk), labels.split(chunk), strict=True)
        ]
    logps, greedy = (torch.cat(side).cpu() for side in zip(*pieces, strict=True))
    return logps, greedy


def _judge(
    logits: Float[Tensor, "n V"], targets: Int[Tensor, "n"]
) -> tuple[Float[Tensor, "n"], Bool[Tensor, "n"]]:
    return -cross_entropy(logits, targets), logits.argmax(-1) == targets

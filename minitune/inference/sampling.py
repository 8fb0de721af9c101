"""Choice of the next token from logits: filters, the repetition penalty, and draws that a seed
determines.
"""

import math
from collections.abc import Sequence
from typing import Annotated

import torch
from jaxtyping import Float, Int
from msgspec import Meta
from torch import Tensor

from minitune import seeds
from minitune.hardware import to_device, widest_float
from minitune.structs import CheckedStruct
from minitune.types import NonNegativeFloat, PositiveFloat, PositiveInt, UnitInterval, widen

RowLogits = Float[Tensor, "B V"]  # of the next token of each row
MIN_TEMPERATURE = 1e-4  # below it logits divided by it leave the range of float32


class Sampling(CheckedStruct, frozen=True, forbid_unknown_fields=True):
    """Likeliest token at temperature 0, else a draw from softmax(logits / temperature) after the
    filters.
    """

    # 0: the likeliest token; 1: the model's own chances; more is more varied
    temperature: NonNegativeFloat = 0.0
    top_k: PositiveInt | None = None  # keep the k likeliest tokens
    # keep the likeliest tokens that together reach this probability
    top_p: Annotated[float, Meta(gt=0.0, le=1.0)] | None = None
    min_p: UnitInterval | None = None  # keep tokens at least this share as likely as the likeliest
    # over prompt and answer; above 1 makes what was said less likely
    repetition_penalty: PositiveFloat = 1.0

    def check_together(self) -> None:
        """ValueError for a number that is not finite, a temperature that divides by almost zero,
        and filters at temperature 0.
        """
        for name in self.__struct_fields__:
            if not math.isfinite(getattr(self, name) or 0):
                raise ValueError(f"{name} is {getattr(self, name)}, expected a finite number")
        if 0 < self.temperature < MIN_TEMPERATURE:
            expected = f"expected 0 or at least {MIN_TEMPERATURE}"
            raise ValueError(f"temperature is {self.temperature}, {expected}")
        idle = [name for name in ("top_k", "top_p", "min_p") if getattr(self, name) is not None]
        if self.temperature == 0 and idle:
            raise ValueError(
                f"{idle[0]} is {getattr(self, idle[0])} at temperature 0, which takes the "
                "likeliest token whatever the filters; expected a temperature above 0, such as 1.0"
            )


def penalized(logits: RowLogits, said: Int[Tensor, "B T"], penalty: float) -> RowLogits:
    """Logits of the tokens of a row that are in `said` divided by the penalty where positive, else
    times it (Keskar et al. 2019, arXiv 1909.05858, section 4.1, with a sign rule that keeps a
    penalty a penalty).
    """
    chosen = logits.gather(1, said)
    return logits.scatter(1, said, torch.where(chosen < 0, chosen * penalty, chosen / penalty))


def top_k(logits: RowLogits, k: int) -> RowLogits:
    """-inf but for the k largest logits of each row, and ties with the last (Fan et al. 2018, arXiv
    1805.04833, section 5.2).
    """
    least = logits.topk(min(k, logits.shape[1]), dim=1).values[:, -1:]
    return logits.masked_fill(logits < least, -torch.inf)


def top_p(logits: RowLogits, p: float) -> RowLogits:
    """-inf but for the smallest set of likeliest tokens with total probability >= p (Holtzman et
    al. 2020, arXiv 1904.09751, eq. 2-3); the likeliest stays.
    """
    ascending, order = logits.sort(dim=1, stable=True)
    rest = ascending.softmax(1).cumsum(1) <= 1 - p  # at most 1 - p lies in these tokens together
    rest = rest & (torch.arange(logits.shape[1], device=logits.device) < logits.shape[1] - 1)
    return logits.masked_fill(torch.zeros_like(rest).scatter(1, order, rest), -torch.inf)


def min_p(logits: RowLogits, share: float) -> RowLogits:
    """-inf where a token's probability is below share * the likeliest one's (Nguyen et al. 2024,
    arXiv 2407.01082, section 3).
    """
    probs = logits.softmax(1)
    return logits.masked_fill(probs < share * probs.amax(1, keepdim=True), -torch.inf)


def filtered(logits: RowLogits, said: Int[Tensor, "B T"], sampling: Sampling) -> RowLogits:
    """Logits, float32 or wider, of the distribution that a token is drawn from, -inf where never;
    at temperature 0 they are not divided. As in transformers: repetition penalty over the tokens
    `said` so far, temperature, top-k, top-p, min-p.
    """
    logits = widen(logits)
    if sampling.repetition_penalty != 1.0:
        logits = penalized(logits, said, sampling.repetition_penalty)
    if sampling.temperature > 0:
        logits = logits / sampling.temperature
    if sampling.top_k is not None:
        logits = top_k(logits, sampling.top_k)
    if sampling.top_p is not None:
        logits = top_p(logits, sampling.top_p)
    return logits if sampling.min_p is None else min_p(logits, sampling.min_p)


def next_tokens(
    logits: RowLogits,
    said: Int[Tensor, "B T"],
    sampling: Sampling,
    row_seeds: Sequence[int],
    step: int,
) -> Int[Tensor, "B"]:
    """One token a row: the likeliest at temperature 0, else the first whose cumulative probability
    exceeds a uniform number that (row_seeds[b], step) alone determines, so that no draw depends on
    other rows.
    """
    logits = filtered(logits, said, sampling)
    if sampling.temperature == 0:
        return logits.argmax(1)
    draws = [
        torch.rand((), generator=seeds.generator(seed, "token", step), dtype=torch.float64)
        for seed in row_seeds
    ]
    wide = widest_float(logits.device)
    cumulative = logits.to(wide).softmax(1).cumsum(1)
    # a total below or above 1 by rounding is scaled for; strictly more, so that a token of
    # probability 0 is never drawn
    wanted = to_device(torch.stack(draws).to(wide), logits.device)[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, wanted, right=True)[:, 0]

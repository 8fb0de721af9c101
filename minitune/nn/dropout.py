"""Dropout and noise whose draws are functions of a seed, a weight's name and an element's place.

Nothing has a state: a recomputed block, a resumed run and a batch in smaller parts draw the same
numbers. A row's draws depend on its own seed alone, not on the rows beside it or on its padding.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from minitune import seeds, tree
from minitune.types import Dropout, SeededBatch

LEVELS = 2**16  # that a rate is rounded to


def seeded(batch: Any, seed: int, step: int) -> SeededBatch:
    """Batch whose rows have seeds of their own, drawn from (seed, step, number of the row)."""
    n_rows = len(tree.leaves(batch)[0])
    numbers = torch.arange(n_rows, dtype=torch.int64)
    return SeededBatch(batch, seeds.mixed(numbers, seeds.derive(seed, "rows", step)))


def row_seeds(per_row: Int[Tensor, "B"], n_rows: int, name: str) -> Int[Tensor, "B_parts"]:
    """Seeds of what `name` draws for n_rows rows: of each part of a row, as a pair's answers."""
    n_parts = n_rows // len(per_row)
    own = [seeds.mixed(per_row, seeds.derive(part, "draws", name)) for part in range(n_parts)]
    return torch.cat(own)


def dropped(x: Float[Tensor, "B T in"], dropout: Dropout) -> Float[Tensor, "B T in"]:
    """x with elements set to zero at the rate, and the others divided by 1 - rate.

    Srivastava et al. 2014, section 10, with the division in training. The rate is rounded to a
    multiple of 2^-16, in both places.
    """
    n_changes = dropout.rate.numel()
    grouped = x.unflatten(0, (n_changes, -1))  # [n B T in]
    own = dropout.seeds.view(*grouped.shape[:2], 1, 1)
    threshold = (dropout.rate * LEVELS).round().view(n_changes, 1, 1, 1)

    # one hash of 32 bits serves two elements, one in each half of all features
    n_tokens, n_features = x.shape[-2:]
    first_feature, n_all = dropout.part or (0, n_features)
    half = -(-n_all // 2)
    first = dropout.first if isinstance(dropout.first, Tensor) else 0
    bits = seeds.hashed(_places(n_tokens, half, x.device, first), own)
    limit = threshold.to(torch.int32)
    kept = torch.cat([(bits & 0xFFFF) >= limit, ((bits >> 16) & 0xFFFF) >= limit], dim=-1)

    scale = (LEVELS / (LEVELS - threshold)).to(x.dtype)
    kept = kept.narrow(-1, first_feature, n_features)
    return torch.where(kept, grouped * scale, 0.0).flatten(0, 1)


def uniform(own: Int[Tensor, "B"], n_tokens: int, n_features: int) -> Float[Tensor, "B T D"]:
    """Draws from the uniform distribution on (-1, 1), with 24 bits, in float32."""
    bits = seeds.hashed(_places(n_tokens, n_features, own.device), own[:, None, None])
    return ((bits & 0xFFFFFF) + 0.5) * 2.0**-23 - 1.0


def _places(
    n_tokens: int, n_features: int, device: torch.device, first: int | Tensor = 0
) -> Int[Tensor, "T D"]:
    """Number of each element of a row from token `first`, which does not depend on its length."""
    t = torch.arange(n_tokens, dtype=torch.int32, device=device) + first
    return t[:, None] * n_features + torch.arange(n_features, dtype=torch.int32, device=device)

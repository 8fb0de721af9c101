"""Draws of a training step: a seed for each row, and dropout of what low-rank changes are given."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from minitune.hardware import to_device
from minitune.nn.dropout import row_seeds
from minitune.sharding import tensor_parallel
from minitune.types import Adapted, Dropout, Params


class Draws(NamedTuple):
    """Seeds of the rows of a training step, and what is drawn from them; an evaluation has none."""

    seeds: Int[Tensor, "B"]
    # rate at which inputs of low-rank changes are dropped, or that of each of n adapters
    dropout: tuple[float, ...] = (0.0,)


def with_dropout(
    params: Params,
    seeds: Int[Tensor, "B"],
    n_rows: int,
    rates: Sequence[float],
    first: int = 0,
    first_in_parts: int = 0,
) -> Params:
    """Parameters whose low-rank changes drop their inputs; params itself where all rates are 0.

    first: place in its row of the first token that they see, first_in_parts that of those whose
    weights ranks share by tensor parallelism.
    """
    if not any(rates):
        return params
    rate = to_device(torch.tensor(rates, dtype=torch.float32), seeds.device)
    adapted = {name: leaf for name, leaf in params.items() if isinstance(leaf, Adapted)}
    starts = [
        to_device(torch.tensor(n), seeds.device) if n else () for n in (first, first_in_parts)
    ]

    def dropping(name: str, leaf: Adapted) -> Adapted:
        start = starts[tensor_parallel.is_in_parts(leaf)]
        return leaf._replace(dropout=Dropout(row_seeds(seeds, n_rows, name), rate, start))

    return {**params, **{name: dropping(name, leaf) for name, leaf in adapted.items()}}

"""Importance of the columns of a weight: how large the inputs are that they are multiplied by."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from minitune.algorithms.gptq import BlockInputs, after_block, before_first_block, token_rows
from minitune.errors import InputError
from minitune.models.model import Model
from minitune.models.weights import head_name
from minitune.structs import CheckedStruct
from minitune.types import Batch, Params, PositiveInt

# of the mean of a weight: no column may count for nothing, or its codes are arbitrary
SMALLEST_SHARE = 1e-6
EMBEDDING = "model.embed_tokens.weight"


class Importance(CheckedStruct, frozen=True, forbid_unknown_fields=True):
    """Data that says which columns of a weight matter: the mean square of what they are multiplied
    by, which llama.cpp calls an importance matrix.
    """

    data: str  # name of a [data] table
    rows: PositiveInt  # of that table: more are more exact, and take longer


class _Squares(NamedTuple):
    """Sum of the squared rows that a linear map was given, and how many they were."""

    total: Float[Tensor, "in"]
    n: int


def column_importance(
    model: Model,
    params: Params,
    batches: Sequence[Batch],
    *,
    on_block: Callable[[int], None] = lambda n_done: None,
) -> dict[str, Float[Tensor, "in"]]:
    """Mean over the tokens of the squared input of every linear map, by the name of its weight, in
    float32; padding is left out. A head that is the embedding has none.

    on_block: called after each block with how many are done. InputError for no batches.
    """
    if not batches:
        raise InputError(
            "importance: no row of data to calibrate on, expected at least one; look at the data "
            "table of importance"
        )
    sums: dict[str, _Squares] = {}

    def take(name: str, rows: Float[Tensor, "n in"]) -> None:
        squares = rows.float().square().sum(0, dtype=torch.float64)
        before = sums.get(name, _Squares(torch.zeros_like(squares), 0))
        sums[name] = _Squares(before.total + squares, before.n + len(rows))

    head = head_name(model.config)
    with torch.no_grad():
        inputs = [before_first_block(model, params, batch) for batch in batches]
        for i in range(model.config.n_layers):
            inputs = [_after_block(model, params, i, one, take) for one in inputs]
            on_block(i + 1)
        for batch in batches if head != EMBEDDING else ():
            take(head, model.hidden(params, batch)[batch.segment_ids > 0])
    return {name: _positive(squares.total / max(1, squares.n)) for name, squares in sums.items()}


def _after_block(
    model: Model,
    params: Params,
    i: int,
    inputs: BlockInputs,
    take: Callable[[str, Tensor], None],
) -> BlockInputs:
    """Batch behind block i; take(name, rows) sees what each of its linear maps is given."""

    def tap(name: str, x: Tensor, y: Tensor) -> None:
        take(f"model.layers.{i}.{name}", token_rows(x, inputs))

    return after_block(model, params, i, inputs, tap)


def _positive(mean: Float[Tensor, "in"]) -> Float[Tensor, "in"]:
    """Means, the smallest of them raised; ones where no input but zeros was seen."""
    whole = mean.mean()
    floor = torch.where(whole > 0, SMALLEST_SHARE * whole, 1.0)
    return mean.clamp(min=floor).float()

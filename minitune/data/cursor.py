"""Cursor: how far a run has read its data, as a value."""

from collections.abc import Callable
from typing import NamedTuple, TypeVar

Row = TypeVar("Row")


class Cursor(NamedTuple):
    """Place of the next row to take, to be saved and resumed from."""

    epoch: int
    row: int


def next_rows(
    order: Callable[[int, int], list[Row]], cursor: Cursor, n_rows: int, seed: int
) -> tuple[list[Row], Cursor]:
    """Take the next n_rows, through as many epochs as that needs; returns them and the cursor after
    them.

    order(seed, epoch): the rows of an epoch.
    """
    rows: list[Row] = []
    epoch, row = cursor
    while len(rows) < n_rows:
        epoch_order = order(seed, epoch)
        taken = epoch_order[row : row + n_rows - len(rows)]
        rows += taken
        row += len(taken)
        if row >= len(epoch_order):
            epoch += 1
            row = 0
    return rows, Cursor(epoch, row)

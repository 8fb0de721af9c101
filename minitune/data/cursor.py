"""Cursor: how far a run has read its data, as a value."""

from collections.abc import Callable
from typing import NamedTuple, TypeVar

Row = TypeVar("Row")


class Cursor(NamedTuple):
    """The next row to take: a place in the data, to be saved and resumed from."""

    epoch: int
    row: int


def next_rows(order: Callable[[int, int], list[Row]], cursor: Cursor, n_rows: int, seed: int) -> tuple[list[Row], Cursor]:
    """The next n_rows of the epochs' orders and the cursor after them."""
    rows: list[Row] = []
    epoch, row = cursor
    while len(rows) < n_rows:
        whole = order(seed, epoch)
        taken = whole[row : row + n_rows - len(rows)]
        rows += taken
        epoch, row = (epoch, row + len(taken)) if row + len(taken) < len(whole) else (epoch + 1, 0)
    return rows, Cursor(epoch, row)

"""Weights of rows: what all targets of a row count in the loss, from a column of the table."""

from collections.abc import Mapping
from typing import Any

from minitune.data.source import Source
from minitune.errors import InputError
from minitune.text.chat import Tokens

REFERENCE = 'columns = { weight = "..." } names the column of weights, and "" none'


def row_weight(row: Mapping[str, Any], source: Source, where: str) -> float:
    """Weight of a row, from 0 (it is not trained) to 1, which is also that of a row without one.

    Tables of text, such as csv, hold the number as a string. InputError for anything else, and
    for a row without the column that the source names.
    """
    key = source.columns.get("weight", "weight")
    value = row.get(key)
    if value in (None, ""):
        if source.columns.get("weight") and key not in row:
            names = ", ".join(row) or "nothing"
            found = f'data: {where} has no "{key}" (only {names})'
            raise InputError(f"{found}, expected a number from 0 to 1; {REFERENCE}")
        return 1.0
    weight = _number(value)
    # A NaN is not between 0 and 1 either.
    if weight is None or not 0 <= weight <= 1:
        found = f'data: {where} has "{key}" = {value!r}'
        raise InputError(f"{found}, expected a number from 0 to 1; correct it, or {REFERENCE}")
    return weight


def weighted(tokens: Tokens, weight: float) -> Tokens:
    """Tokens whose targets count a row's weight times as much."""
    if weight == 1:
        return tokens
    return tokens._replace(mask=[weight * one if one and weight else False for one in tokens.mask])


def refuse_weight(row: Mapping[str, Any], where: str) -> None:
    """InputError for a row of preferences that has a weight other than 1."""
    if "weight" in row and _number(row["weight"]) != 1:
        found = f'data: {where} has "weight" = {row["weight"]!r}'
        raise InputError(
            f"{found}, expected no weight or 1 where answers are compared; "
            "leave out the column, or the rows that are not to count"
        )


def _number(value: Any) -> float | None:
    """Number that a value is, or that its text means; None for anything else."""
    try:
        return float(value) if isinstance(value, (bool, int, float, str)) else None
    except (ValueError, OverflowError):
        return None

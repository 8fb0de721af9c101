"""Rows that are encoded one by one, and those among them that can't be."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

from minitune.data.readers import rows_with_location
from minitune.data.source import Source
from minitune.errors import InputError

Encoded = TypeVar("Encoded")

MAX_NAMED = 5  # rows that one refusal names
LOOK_AHEAD = 1000  # rows that are read after the first that is refused, for others of its kind


def encoded_rows(
    source: Source,
    encode: Callable[[Mapping[str, Any], str], Encoded],
    refused: list[str],
) -> Iterator[tuple[str, Encoded]]:
    """Yield ("file:line", encode(row, "file:line")) of every row of the source's own file.

    With invalid = "skip" a row with an InputError is left out and its location added to refused.
    Else an InputError names the first of such rows, and where the next ones are.
    """
    first: InputError | None = None
    n_ahead = 0
    for where, row in rows_with_location(source):
        if first is not None:
            n_ahead += 1
            if n_ahead > LOOK_AHEAD or len(refused) >= MAX_NAMED:
                break
        try:
            encoded = encode(row, where)
        except InputError as error:
            refused.append(where)
            if source.invalid == "refuse":
                first = first or error
            continue
        if first is None:
            yield where, encoded
    if first is not None:
        raise _with_others(first, refused)


def _with_others(first: InputError, refused: list[str]) -> InputError:
    """First refusal, with the lines of the others and what leaves them out."""
    if len(refused) == 1:
        return first
    file, _, _ = refused[0].rpartition(":")
    # Lines of the same file need no name of it.
    lines = ", ".join(where.removeprefix(f"{file}:") for where in refused[1:])
    advice = 'invalid = "skip" leaves such rows out and counts them'
    return InputError(f"{first} (also refused: {lines}; {advice})")

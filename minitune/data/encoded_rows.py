"""Rows that are encoded one by one, and those among them that can't be."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from minitune.data.readers import rows_with_location
from minitune.data.source import Source
from minitune.data.token_store import Report
from minitune.errors import InputError, cut

Encoded = TypeVar("Encoded")

MAX_REASON = 200  # characters of a refusal that a report quotes
MAX_NAMED = 5  # rows that one refusal names
LOOK_AHEAD = 1000  # rows that are read after the first that is refused, for others of its kind


class Refused(NamedTuple):
    """Row that is left out, and the words of its refusal.

    is_malformed: it is no row at all, such as a line that is no JSON.
    """

    where: str
    is_malformed: bool
    reason: str


def encoded_rows(
    source: Source,
    encode: Callable[[Mapping[str, Any], str], Encoded],
    refused: list[Refused],
) -> Iterator[tuple[str, Encoded]]:
    """Yield ("file:line", encode(row, "file:line")) of every row of the source's own files.

    With invalid = "skip" a row with an InputError is left out and added to refused, and only if
    all rows are is it an InputError. Else an InputError names the first of such rows, and where
    the next ones are.
    """
    first: InputError | None = None
    n_before = len(refused)
    n_ahead = n_encoded = 0
    for where, row in rows_with_location(source):
        if first is not None and source.invalid == "refuse":
            n_ahead += 1
            if n_ahead > LOOK_AHEAD or len(refused) >= MAX_NAMED:
                break
        try:
            if isinstance(row, InputError):
                raise row
            encoded = encode(row, where)
        except InputError as error:
            reason = str(error).removeprefix(f"data: {where} ")
            refused.append(Refused(where, isinstance(row, InputError), reason))
            first = first or error
            continue
        if first is None or source.invalid == "skip":
            n_encoded += 1
            yield where, encoded
    if first is not None and source.invalid == "refuse":
        raise _with_others(first, refused)
    if first is not None and n_encoded == 0:
        found = f"all {len(refused) - n_before:,} rows of {source.path_names} are refused"
        raise InputError(f"{first} ({found}, expected one to train on)")


def with_refused(report: Report, refused: Sequence[Refused]) -> Report:
    """Report with the counts of rows that were left out, and the first of them."""
    n_malformed = sum(one.is_malformed for one in refused)
    first = cut(f"{refused[0].where}: {refused[0].reason}", MAX_REASON) if refused else ""
    return report._replace(
        n_refused=len(refused) - n_malformed, n_malformed=n_malformed, first_refused=first
    )


def _with_others(first: InputError, refused: Sequence[Refused]) -> InputError:
    """First refusal, with the lines of the others and what leaves them out."""
    if len(refused) == 1:
        return first
    file, _, _ = refused[0].where.rpartition(":")
    # Lines of the same file need no name of it.
    lines = ", ".join(one.where.removeprefix(f"{file}:") for one in refused[1:])
    advice = 'invalid = "skip" leaves such rows out and counts them'
    return InputError(f"{first} (also refused: {lines}; {advice})")

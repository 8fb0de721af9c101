"""Rows of data files, each with the location that an error message names."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from minitune.data.files import UTF8_BOM, FileKind, data_files, kind_of, opened
from minitune.data.source import Source
from minitune.data.tables import arrow_rows, csv_rows, parquet_rows
from minitune.errors import InputError

NO_JSON_NUMBER = re.compile(rb"[:,\[\s](-?Infinity|NaN)\b")  # as Python's json writes them
HALF_PAIR = re.compile(rb"\\u[dD][89abAB][0-9a-fA-F]{2}(?!\\u[dD][c-fC-F])")


RowOrError = dict[str, Any] | InputError


def read_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (number, object) of every row of a path: by line in jsonl, json, csv, tsv, else by row.

    A list of objects, on one line or many, is read as the rows that it holds. Files may be
    compressed; a folder, and a pattern such as data/train-*.parquet, are the rows of all their
    files. InputError with file and line for anything else, and for a file without a row.
    """
    for file in data_files(path):
        for number, row in _rows_of_file(file):
            yield number, _required(row)


def first_row(path: Path) -> dict[str, Any]:
    """First row of a path that can be read; InputError if there is none."""
    error: InputError | None = None
    for file in data_files(path):
        for _, row in _rows_of_file(file):
            if not isinstance(row, InputError):
                return row
            error = error or row
    raise error or InputError(f"data: {path} has no row, expected at least one; look at the file")


def require_rows(source: Source) -> None:
    """InputError unless every file of a source begins with a row, or with one that it skips."""
    for file in source.files():
        _, row = next(_rows_of_file(file))
        if source.invalid == "refuse":
            _required(row)


def _rows_of_file(path: Path) -> Iterator[tuple[int, RowOrError]]:
    """Yield (number, row) of one file, without the values that are null.

    In place of a row that can't be read, where the next ones can, stands its InputError.
    """
    readers: dict[FileKind, Callable[[Path], Iterator[tuple[int, RowOrError]]]] = {
        "lines": _line_rows,
        "list": _list_rows,
        "csv": csv_rows,
        "tsv": partial(csv_rows, delimiter="\t"),
        "parquet": parquet_rows,
        "arrow": arrow_rows,
    }
    for number, row in readers[kind_of(path)](path):
        yield number, row if isinstance(row, InputError) else present(row)


def _required(row: RowOrError) -> dict[str, Any]:
    if isinstance(row, InputError):
        raise row
    return row


def rows_with_location(source: Source) -> Iterator[tuple[str, RowOrError]]:
    """Yield ("file:line", row) of every row in the source's part of its files.

    In place of a row that is malformed, such as a line that is no JSON, stands its InputError.
    InputError for files that can't be read on, and if the part has no row.
    """
    n_read = n_taken = 0
    for path in source.files():
        for number, row in _rows_of_file(path):
            n_read += 1
            if isinstance(row, InputError) or source.split is None or source.split.takes(row):
                n_taken += 1
                yield f"{path}:{number}", row
    if n_taken == 0 and source.split is not None:
        raise InputError(
            f"data: {source.path_names} has no row of {n_read} in the part {source.split.part!r} "
            "of split, "
            "expected one; change its fraction"
        )


@contextmanager
def error_location(where: str) -> Iterator[None]:
    """Add the location of a row to errors that are raised inside the block, such as a chat
    template's.
    """
    try:
        yield
    except InputError as error:
        raise InputError(f"data: {where} {error}") from None


def _line_rows(path: Path) -> Iterator[tuple[int, RowOrError]]:
    is_empty = True
    with opened(path) as file:
        for number, line in enumerate(file, 1):
            if number == 1:
                line = line.removeprefix(UTF8_BOM)
            if line.strip():
                is_empty = False
                yield number, _object(line, path, number, "one JSON object a line")
    if is_empty:
        raise InputError(
            f"data: {path} holds no line, expected one JSON object a line; correct the path"
        )


def _list_rows(path: Path) -> Iterator[tuple[int, RowOrError]]:
    expected = "a list of JSON objects"
    with opened(path) as file:
        content = file.read().removeprefix(UTF8_BOM)
    try:
        rows = msgspec.json.decode(content, type=list[msgspec.Raw])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        stop = re.search(r"\(byte (\d+)\)", str(error))
        number = 1 + content.count(b"\n", 0, int(stop[1]) if stop else len(content))
        raise InputError(
            f"data: {path}:{number} {error}, expected {expected}; correct the line"
        ) from None
    if not rows:
        raise InputError(f"data: {path} holds an empty list, expected {expected}; correct the path")
    # The line of a row is found by counting line ends up to it. Only a comma and blanks lie between
    # two rows, so searching for a row from the end of the one before finds the place where it
    # stands.
    number = 1
    end = 0
    for row in map(bytes, rows):
        start = content.index(row, end)
        number += content.count(b"\n", end, start)
        yield number, _object(row, path, number, expected)
        number += row.count(b"\n")
        end = start + len(row)


def present(value: Any) -> Any:
    """Copy a value without the keys that are null: a null is no value, as transformers reads
    messages.

    Parquet gives every object the keys of all the others, and so does jsonl that was written from
    such a table.
    """
    if isinstance(value, dict):
        return {key: present(child) for key, child in value.items() if child is not None}
    return [present(child) for child in value] if isinstance(value, list) else value


def _object(text: bytes, path: Path, number: int, expected: str) -> RowOrError:
    """Row that a JSON text holds; an InputError with its line for anything but an object."""
    try:
        row = msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        found, advice = _explain(text, error)
        return InputError(f"data: {path}:{number} {found}, expected {expected}; {advice}")
    if not isinstance(row, dict):
        found = f"data: {path}:{number} holds a {type(row).__name__}"
        return InputError(f"{found}, expected {expected}; correct the line")
    return row


def _explain(text: bytes, error: Exception) -> tuple[str, str]:
    """(what was found, what to do) for a text that is no JSON."""
    number = NO_JSON_NUMBER.search(text)
    if number is not None:
        return f"holds {number[1].decode()}, which is no JSON", "write null or leave the key out"
    if HALF_PAIR.search(text):
        return "holds half of a surrogate pair, which is no character", "write the text without it"
    return str(error), "correct the line"

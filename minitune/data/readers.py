"""Rows of data files, each with the location that an error message names."""

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from minitune.data.encodings import UTF8_BOM, decoded, not_utf8
from minitune.data.files import FileKind, data_files, kind_of, opened
from minitune.data.source import Source
from minitune.data.tables import arrow_rows, csv_rows, parquet_rows
from minitune.errors import InputError, nearest

NO_JSON_NUMBER = re.compile(rb"[:,\[\s](-?Infinity|NaN)\b")  # as Python's json writes them
BLANKS = re.compile(r"\s*")
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
    """InputError unless every file of a source begins with a row, or with one that it skips, and
    each column that the source names is in a row of them.
    """
    for file in source.files():
        _, row = next(_rows_of_file(file))
        if source.invalid == "refuse":
            _required(row)
    _require_columns(source)


def _require_columns(source: Source) -> None:
    """InputError for a name in `columns` that is no column of any row; most rows have all."""
    missing = {name for name in source.columns.values() if name}
    found: dict[str, None] = {}
    for file in source.files():
        for _, row in _whole_rows(file):
            if not missing:
                return
            if not isinstance(row, InputError):
                found |= dict.fromkeys(row)
                missing -= row.keys()
    for name, column in source.columns.items():
        if column in missing:
            has = f"data: {source.path_names} has no column {column!r} in any row"
            near = nearest(column, [*found]) or "; correct the name, or leave it out"
            raise InputError(
                f"{has} (only {', '.join(found) or 'nothing'}), expected the column that columns = "
                f'{{ {name} = "{column}" }} names{near}'
            )


def _rows_of_file(path: Path) -> Iterator[tuple[int, RowOrError]]:
    """Yield (number, row) of one file, without the values that are null.

    In place of a row that can't be read, where the next ones can, stands its InputError.
    """
    for number, row in _whole_rows(path):
        yield number, row if isinstance(row, InputError) else present(row)


def _whole_rows(path: Path) -> Iterator[tuple[int, RowOrError]]:
    """Yield (number, row) of one file, with the values that are null."""
    readers: dict[FileKind, Callable[[Path], Iterator[tuple[int, RowOrError]]]] = {
        "lines": _line_rows,
        "list": _list_rows,
        "objects": _object_rows,
        "text": _text_row,
        "csv": csv_rows,
        "tsv": partial(csv_rows, delimiter="\t"),
        "parquet": parquet_rows,
        "arrow": arrow_rows,
    }
    yield from readers[kind_of(path)](path)


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
            "of split, expected one; change its fraction"
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
        decoded(content, path)  # which names the line of an encoding that is none
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


def _object_rows(path: Path) -> Iterator[tuple[int, RowOrError]]:
    """Rows of a file of objects that go over several lines each, as indent = 4 writes them."""
    with opened(path) as file:
        content = file.read().removeprefix(UTF8_BOM)
    text = decoded(content, path)
    decoder = json.JSONDecoder()
    end = _after_blanks(text, 0)
    number, counted = 1, 0
    while end < len(text):
        start = end
        number, counted = number + text.count("\n", counted, start), start
        try:
            _, end = decoder.raw_decode(text, start)
        except json.JSONDecodeError as error:
            found = f"data: {path}:{error.lineno} {error.msg}"
            expected = f"one JSON object after the other (this one begins in line {number})"
            raise InputError(f"{found}, expected {expected}; correct the line") from None
        except RecursionError:
            raise InputError(f"data: {path}:{number} is nested too deeply, expected rows") from None
        yield number, _object(text[start:end].encode(), path, number, "JSON objects")
        end = _after_blanks(text, end)


def _after_blanks(text: str, start: int) -> int:
    """Place of the first character from start on that is no blank."""
    blanks = BLANKS.match(text, start)
    return blanks.end() if blanks else start


def _text_row(path: Path) -> Iterator[tuple[int, RowOrError]]:
    """Row of a file of plain text, which is one text."""
    with opened(path) as file:
        text = decoded(file.read().removeprefix(UTF8_BOM), path)
    if not text.strip():
        raise InputError(f"data: {path} holds no text, expected some; correct the path")
    yield 1, {"text": text}


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
    encoding = not_utf8(text)
    if encoding is not None:
        return encoding
    number = NO_JSON_NUMBER.search(text)
    if number is not None:
        return f"holds {number[1].decode()}, which is no JSON", "write null or leave the key out"
    if HALF_PAIR.search(text):
        return "holds half of a surrogate pair, which is no character", "write the text without it"
    return str(error), "correct the line"

"""Rows of jsonl, json and parquet files, each with the location that an error message names."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any

import msgspec

from minitune.data.source import Source
from minitune.errors import InputError


def read_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (number, object) of every row: by line in jsonl and json, by row in parquet.

    A .json holds a list of objects, or is read as jsonl. InputError with file and line for anything but JSON
    objects, and for a file without a row.
    """
    if path.suffix == ".parquet":
        return _parquet_rows(path)
    if path.suffix == ".json":
        with open_rows(path) as file:
            start = file.read(4096).lstrip()
        if start.startswith(b"["):
            return _list_rows(path)
    return _line_rows(path)


def rows_with_location(source: Source) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield ("file:line", object) of every row that is in the source's part of its file; InputError if none is."""
    path = Path(source.path)
    n_read = n_taken = 0
    for number, row in read_rows(path):
        n_read += 1
        if source.split is None or source.split.takes(row):
            n_taken += 1
            yield f"{path}:{number}", row
    if n_taken == 0 and source.split is not None:
        raise InputError(
            f"data: {path} has no row of {n_read} in the part {source.split.part!r} of split, expected one; change its fraction"
        )


@contextmanager
def error_location(where: str) -> Iterator[None]:
    """Add the location of a row to errors that are raised inside the block, such as a chat template's."""
    try:
        yield
    except InputError as error:
        raise InputError(f"data: {where} {error}") from None


def open_rows(path: Path) -> BufferedReader:
    """Open a data file, to be read as bytes; InputError if there is no such file."""
    if not path.is_file():
        raise InputError(f"data: {path} is no file, expected a jsonl, json or parquet file; correct the path")
    return path.open("rb")


def _line_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    is_empty = True
    with open_rows(path) as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                is_empty = False
                yield number, _object(line, path, number, "one JSON object a line")
    if is_empty:
        raise InputError(f"data: {path} holds no line, expected one JSON object a line; correct the path")


def _list_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    expected = "a list of JSON objects"
    with open_rows(path) as file:
        content = file.read()
    try:
        rows = msgspec.json.decode(content, type=list[msgspec.Raw])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        stop = re.search(r"\(byte (\d+)\)", str(error))
        number = 1 + content.count(b"\n", 0, int(stop[1]) if stop else len(content))
        raise InputError(f"data: {path}:{number} {error}, expected {expected}; correct the line") from None
    if not rows:
        raise InputError(f"data: {path} holds an empty list, expected {expected}; correct the path")
    # The line of a row is found by counting line ends up to it. Only a comma and blanks lie between two rows, so
    # searching for a row from the end of the one before finds the place where it stands.
    number = 1
    end = 0
    for row in map(bytes, rows):
        start = content.index(row, end)
        number += content.count(b"\n", end, start)
        yield number, _object(row, path, number, expected)
        number += row.count(b"\n")
        end = start + len(row)


def _parquet_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise InputError(
            f"data: {path} needs the package pyarrow, which is not installed; pip install 'minitune[parquet]'"
        ) from None
    open_rows(path).close()
    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield number, present(row)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"data: {path}:{number + 1} {error}, expected a parquet file; fetch the file again") from None
    if number == 0:
        raise InputError(f"data: {path} holds no row, expected a parquet file with rows; correct the path")


def present(value: Any) -> Any:
    """Copy a value without the keys that are null: a null is no value, as transformers reads
    messages.

    Parquet gives every object the keys of all the others, and so does jsonl that was written from
    such a table.
    """
    if isinstance(value, dict):
        return {key: present(child) for key, child in value.items() if child is not None}
    return [present(child) for child in value] if isinstance(value, list) else value


def _object(text: bytes, path: Path, number: int, expected: str) -> dict[str, Any]:
    """Row that a JSON text holds; InputError with its line for anything but an object."""
    try:
        row = msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"data: {path}:{number} {error}, expected {expected}; correct the line") from None
    if not isinstance(row, dict):
        raise InputError(f"data: {path}:{number} holds a {type(row).__name__}, expected {expected}; correct the line")
    return present(row)

"""Rows of files that hold a table: csv, tsv, parquet and arrow."""

import csv
from collections.abc import Iterator, Sequence
from io import TextIOWrapper
from itertools import chain
from pathlib import Path
from typing import Any

from minitune.data.encodings import decoded
from minitune.data.files import opened
from minitune.errors import InputError

BATCH_ROWS = 1024
DELIMITERS = ",;\t"


def csv_rows(
    path: Path,
    delimiter: str | None = None,
) -> Iterator[tuple[int, dict[str, Any] | InputError]]:
    """Yield (line, row) of a csv file whose first row names the columns.

    In place of a row with another number of fields stands its InputError.
    delimiter: the one that the first line has most of if it is None, as spreadsheets differ.
    """
    number = 1
    is_empty = True
    try:
        with opened(path) as file, TextIOWrapper(file, encoding="utf-8-sig", newline="") as text:
            header = text.readline()
            if delimiter is None:
                delimiter = max(DELIMITERS, key=header.count)
            rows = csv.reader(chain([header], text), delimiter=delimiter, strict=True)
            names = next(rows, [])
            twice = next((name for name in names if name and names.count(name) > 1), None)
            if twice is not None:
                found = f"data: {path}:1 names the column {twice!r} twice"
                raise InputError(f"{found}, expected each once; rename one")
            # A field in quotes may go over several lines: a row's line is its first one.
            number = rows.line_num + 1
            for fields in rows:
                if fields:
                    is_empty = False
                    yield number, _csv_row(names, fields, f"{path}:{number}")
                number = rows.line_num + 1
    except (csv.Error, UnicodeDecodeError) as error:
        with opened(path) as file:
            decoded(file.read(), path)  # which names the line of an encoding that is none
        raise InputError(f"data: {path}:{number} {_csv_fault(error)}") from None
    if is_empty:
        found = f"data: {path} holds no row"
        raise InputError(f"{found}, expected names of columns and rows; correct the path")


def _csv_fault(error: Exception) -> str:
    """Words for what Python's reader could not read."""
    if "field larger" in str(error):
        longest = f"{csv.field_size_limit():,} characters"
        return (
            f"has a cell of more than {longest}, expected at most so many; close the quotation "
            "mark that opens it, or write rows that are so long as jsonl"
        )
    if "unexpected end" in str(error):
        return "opens a quotation mark that is never closed, expected csv; close it"
    return f"{error}, expected csv; correct it or write jsonl"


def _csv_row(
    names: Sequence[str],
    fields: Sequence[str],
    where: str,
) -> dict[str, Any] | InputError:
    """Row of a csv file; an InputError for another number of fields than of names."""
    if len(fields) == len(names):
        return dict(zip(names, fields, strict=True))
    columns = f"{len(names)} of the first line ({', '.join(names)})"
    found = f"data: {where} has {len(fields)} fields"
    return InputError(f"{found}, expected the {columns}; correct the line")


def parquet_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (number, row) of a parquet file."""
    pa = _pyarrow(path)
    import pyarrow.parquet as pq

    def batches() -> Iterator[Any]:
        with opened(path) as file, pq.ParquetFile(pa.PythonFile(file)) as table:
            yield from table.iter_batches(batch_size=BATCH_ROWS)

    return _rows_of_batches(path, batches(), "a parquet file")


def arrow_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (number, row) of an arrow file, or of an arrow stream, which `datasets` saves."""
    pa = _pyarrow(path)

    def batches() -> Iterator[Any]:
        with opened(path) as file:
            is_file = file.read(6) == b"ARROW1"
            file.seek(0)
            source = pa.PythonFile(file)
            if not is_file:
                yield from pa.ipc.open_stream(source)
                return
            reader = pa.ipc.open_file(source)
            for n in range(reader.num_record_batches):
                yield reader.get_batch(n)

    return _rows_of_batches(path, batches(), "an arrow file")


def _rows_of_batches(
    path: Path,
    batches: Iterator[Any],
    expected: str,
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (number, row) of record batches; InputError for a damaged or an empty file."""
    pa = _pyarrow(path)
    number = 0
    try:
        for batch in batches:
            for row in batch.to_pylist():
                number += 1
                yield number, row
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        found = f"data: {path}:{number + 1} {error}"
        raise InputError(f"{found}, expected {expected}; fetch the file again") from None
    if number == 0:
        found = f"data: {path} holds no row"
        raise InputError(f"{found}, expected {expected} with rows; correct the path")


def _pyarrow(path: Path) -> Any:
    try:
        import pyarrow
    except ImportError:
        found = f"data: {path} needs the package pyarrow, which is not installed"
        raise InputError(f"{found}; pip install 'minitune[parquet]'") from None
    return pyarrow

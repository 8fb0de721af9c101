"""Rows of files that hold a table: csv, tsv, parquet and arrow."""

import csv
from collections.abc import Iterator
from io import TextIOWrapper
from pathlib import Path
from typing import Any

from minitune.data.files import opened
from minitune.errors import InputError

BATCH_ROWS = 1024
DELIMITERS = ",;\t"


def csv_rows(path: Path, delimiter: str | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line, row) of a csv file whose first line names the columns.

    delimiter: the one that the first line has most of if it is None, as spreadsheets differ.
    """
    number = 1
    try:
        with opened(path) as file, TextIOWrapper(file, encoding="utf-8-sig", newline="") as text:
            header = text.readline()
            if delimiter is None:
                delimiter = max(DELIMITERS, key=header.count)
            names = next(csv.reader([header], delimiter=delimiter), [])
            for fields in csv.reader(text, delimiter=delimiter, strict=True):
                number += 1
                if not fields:
                    continue
                if len(fields) != len(names):
                    raise InputError(
                        f"data: {path}:{number} has {len(fields)} fields, expected the "
                        f"{len(names)} of the first line ({', '.join(names)}); correct the line"
                    )
                yield number, dict(zip(names, fields, strict=True))
    except (csv.Error, UnicodeDecodeError) as error:
        found = f"data: {path}:{number + 1} {error}"
        raise InputError(f"{found}, expected csv in UTF-8; correct it or write jsonl") from None
    if number == 1:
        found = f"data: {path} holds no row"
        raise InputError(f"{found}, expected names of columns and rows; correct the path")


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

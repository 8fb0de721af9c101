"""Rows of data files: jsonl, json and parquet, which of them a [data] table takes, and where an error is to be found."""

import hashlib
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from io import BufferedReader
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from minitune import paths
from minitune.chat import TrainOn
from minitune.types import InputError

COLUMNS = {
    "instruct": ("instruction", "input", "output"),
    "chat": ("messages", "tools"),
    "text": ("text",),
    "pairs": ("prompt", "chosen", "rejected", "tools"),
    "judged": ("prompt", "completion", "label", "chosen", "rejected", "tools"),
}
EXPECTED = {str: "a string", list: "a list of messages", bool: "true or false"}
Share = Annotated[float, msgspec.Meta(gt=0, lt=1)]
Single = Literal["instruct", "chat", "text"]  # the formats whose rows are one document each


class Split(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One part of a file in two: a row is held out where a hash of what it says falls below the fraction.

    So no row changes sides when others come or go, and rows that say the same stand on the same side.
    """

    fraction: Share  # of the rows, that are held out
    part: Literal["train", "heldout"]

    def takes(self, row: Mapping[str, Any]) -> bool:
        """Whether a row is of this part."""
        said = hashlib.sha256(msgspec.json.encode(row, order="deterministic", enc_hook=str)).digest()
        heldout = int.from_bytes(said[:8]) < self.fraction * 2**64
        return heldout == (self.part == "heldout")


class Mixed(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Another file whose documents are mixed into a table's own."""

    path: str
    share: Share  # of the documents of an epoch, the table's own having the rest
    format: Single | None = None  # the table's own if absent
    columns: dict[str, str] = {}
    split: Split | None = None
    chat_template_kwargs: dict[str, Any] | None = None  # the table's own if absent


class Source(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One data file and how to read it; columns: the format's own name of a column -> its name in the file.

    An epoch goes once through the file and, with `mix`, through as many documents of each other file as its share asks for:
    the next ones of that file's own endless shuffled order, so that over the epochs all of them come equally often.
    """

    path: str
    format: Literal["instruct", "chat", "text", "pairs", "judged"]  # the last two are read by pairs.prepare
    seq_len: Annotated[int, msgspec.Meta(gt=0)]  # tokens
    packed: bool = True
    overlong: Literal["truncate", "drop"] = "drop"
    columns: dict[str, str] = {}
    train_on: TrainOn = "assistant"  # of a conversation: every turn of the assistant, its last one, or every token
    split: Split | None = None
    mix: tuple[Mixed, ...] = ()
    chat_template_kwargs: dict[str, Any] = {}  # told to the chat template, over those of [model]

    def __post_init__(self) -> None:
        for format, columns in ((self.format, self.columns), *((one.format or self.format, one.columns) for one in self.mix)):
            _check_columns(format, columns)
        if self.format not in ("instruct", "chat") and self.train_on != "assistant":
            trained = "every token" if self.format == "text" else "the answer"
            raise InputError(
                f"data: train_on = {self.train_on!r} with format = {self.format!r}, expected it with instruct or chat only; "
                f"remove it: {trained} is trained"
            )
        if self.format == "text" and self.chat_template_kwargs:
            raise InputError("data: chat_template_kwargs with format = 'text', expected it with conversations only; remove it")
        if self.mix and self.format in ("pairs", "judged"):
            raise InputError(f"data: mix with format = {self.format!r}, expected instruct, chat or text; remove it")
        if (total := sum(one.share for one in self.mix)) >= 1:
            raise InputError(
                f"data: mix has shares of {total:g} together, expected less than 1; the table's own file has the rest"
            )

    def parts(self) -> "list[Source]":
        """The table's own file and then those that are mixed in, each as a table of its own."""
        others = [
            msgspec.structs.replace(
                self,
                path=str(paths.locate(one.path)),
                format=one.format or self.format,
                columns=one.columns,
                split=one.split,
                train_on="assistant" if one.format == "text" else self.train_on,
                chat_template_kwargs=self._told(one),
                mix=(),
            )
            for one in self.mix
        ]
        return [msgspec.structs.replace(self, mix=()), *others]

    def _told(self, one: Mixed) -> dict[str, Any]:
        if one.chat_template_kwargs is not None:
            return one.chat_template_kwargs
        return {} if one.format == "text" else self.chat_template_kwargs


def read_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object) of every row: lines of jsonl, objects in the list of a .json, or rows of a .parquet, by number.

    InputError with file and line for anything but JSON objects, and for a file without a row.
    """
    if path.suffix == ".parquet":
        return _parquet_rows(path)
    if path.suffix == ".json":
        with opened(path) as file:
            start = file.read(4096).lstrip()
        if start.startswith(b"["):
            return _list_rows(path)
    return _line_rows(path)


def located(source: Source) -> Iterator[tuple[str, dict[str, Any]]]:
    """("file:line", object) of every row of the file that is of the source's part; InputError if none is."""
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
def at(where: str) -> Iterator[None]:
    """Errors of the chat template, raised in the block, get the place of the sample."""
    try:
        yield
    except InputError as error:
        raise InputError(f"data: {where} {error}") from None


def column(row: Mapping[str, Any], name: str, kinds: tuple[type, ...], source: Source, where: str) -> Any:
    """The value of a column, under the name that the source gives it; InputError if it is missing or of none of the kinds."""
    key = source.columns.get(name, name)
    expected = " or ".join(EXPECTED[kind] for kind in kinds)
    if key not in row:
        raise InputError(
            f'data: {where} has no "{key}" (only {", ".join(row) or "nothing"}), expected {expected}; '
            f'name the column with columns = {{ {name} = "..." }}'
        )
    if not isinstance(row[key], kinds):
        raise InputError(f'data: {where} "{key}" is a {type(row[key]).__name__}, expected {expected}; correct the line')
    return row[key]


def opened(path: Path) -> BufferedReader:
    """The file, to be read as bytes; InputError if it is none."""
    if not path.is_file():
        raise InputError(f"data: {path} is no file, expected a jsonl, json or parquet file; correct the path")
    return path.open("rb")


def _check_columns(format: str, columns: Mapping[str, str]) -> None:
    for name in columns:
        if name not in COLUMNS[format]:
            near = get_close_matches(name, COLUMNS[format], n=1, cutoff=0.0)
            raise InputError(
                f"data: columns names {name!r}, expected {' or '.join(COLUMNS[format])} with format = "
                f"{format!r}; did you mean {near[0]!r}? (the name here = the name in the file)"
            )


def _line_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    empty = True
    with opened(path) as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                empty = False
                yield number, _object(line, path, number, "one JSON object a line")
    if empty:
        raise InputError(f"data: {path} holds no line, expected one JSON object a line; correct the path")


def _list_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    expected = "a list of JSON objects"
    with opened(path) as file:
        content = file.read()
    try:
        rows = msgspec.json.decode(content, type=list[msgspec.Raw])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        stop = re.search(r"\(byte (\d+)\)", str(error))
        number = 1 + content.count(b"\n", 0, int(stop[1]) if stop else len(content))
        raise InputError(f"data: {path}:{number} {error}, expected {expected}; correct the line") from None
    if not rows:
        raise InputError(f"data: {path} holds an empty list, expected {expected}; correct the path")
    number, end = 1, 0
    for row in map(bytes, rows):
        start = content.index(row, end)  # which is where it stands: only a comma and blanks lie between
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
    opened(path).close()
    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield number, _present(row)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"data: {path}:{number + 1} {error}, expected a parquet file; fetch the file again") from None
    if number == 0:
        raise InputError(f"data: {path} holds no row, expected a parquet file with rows; correct the path")


def _present(value: Any) -> Any:
    """value without the keys that are null: parquet gives every object the keys of all the others."""
    if isinstance(value, dict):
        return {key: _present(child) for key, child in value.items() if child is not None}
    return [_present(child) for child in value] if isinstance(value, list) else value


def _object(text: bytes, path: Path, number: int, expected: str) -> dict[str, Any]:
    try:
        row = msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"data: {path}:{number} {error}, expected {expected}; correct the line") from None
    if not isinstance(row, dict):
        raise InputError(f"data: {path}:{number} holds a {type(row).__name__}, expected {expected}; correct the line")
    return row

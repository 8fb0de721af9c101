"""jsonl to messages to tokens to Batch: read once, kept memory-mapped, in an order that is a function of (seed, epoch).

A document is one tokenized sample. A packed row holds whole documents, never a part of one.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from functools import lru_cache
from io import BufferedReader
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

import msgspec
import numpy as np
import torch

from minitune import arrays, documents
from minitune.chat import Message, Template, Tokens, encode_chat, encode_prompt
from minitune.documents import Documents, Report, padded
from minitune.seeds import generator
from minitune.tokenizer import Tokenizer
from minitune.types import Batch, InputError

Row = TypeVar("Row")

LAYOUT = 1  # of the token cache: another number makes every cache anew
WINDOW = 4096  # documents that are packed longest first before the next ones come
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}
COLUMNS = {
    "instruct": ("instruction", "input", "output"),
    "chat": ("messages",),
    "text": ("text",),
    "pairs": ("prompt", "chosen", "rejected"),
    "judged": ("prompt", "completion", "label", "chosen", "rejected"),
}
EXPECTED = {str: "a string", list: "a list of messages", bool: "true or false"}


class Source(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One jsonl file and how to read it; columns: the format's own name of a column -> its name in the file."""

    path: str
    format: Literal["instruct", "chat", "text", "pairs", "judged"]  # the last two are read by pairs.prepare
    seq_len: Annotated[int, msgspec.Meta(gt=0)]  # tokens
    packed: bool = True
    overlong: Literal["truncate", "drop"] = "drop"
    columns: dict[str, str] = {}

    def __post_init__(self) -> None:
        for name in self.columns:
            if name not in COLUMNS[self.format]:
                near = get_close_matches(name, COLUMNS[self.format], n=1, cutoff=0.0)
                raise InputError(
                    f"data: columns names {name!r}, expected {' or '.join(COLUMNS[self.format])} with format = "
                    f"{self.format!r}; did you mean {near[0]!r}? (the name here = the name in the file)"
                )


class Dataset(NamedTuple):
    """Document i is tokens[offsets[i] : offsets[i + 1]]; mask: True for targets; order(seed, epoch): the rows of documents.

    key: a hash of all that the tokens depend on.
    """

    tokens: np.ndarray
    mask: np.ndarray
    offsets: np.ndarray
    report: Report
    order: Callable[[int, int], list[list[int]]]
    key: str


class Cursor(NamedTuple):
    """The next row to take: a place in the data, to be saved and resumed from."""

    epoch: int
    row: int


class Prompt(NamedTuple):
    """What to ask, as token ids and as messages, and the answer that the data gives."""

    ids: list[int]
    reference: str
    messages: list[Message]


def read_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object) of every line that isn't blank; InputError with file and line for anything but JSON objects."""
    empty = True
    with _opened(path) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = msgspec.json.decode(line)
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
                raise InputError(f"data: {path}:{number} {error}, expected one JSON object a line; correct the line") from None
            if not isinstance(row, dict):
                raise InputError(
                    f"data: {path}:{number} holds a {type(row).__name__}, expected one JSON object a line; correct the line"
                )
            empty = False
            yield number, row
    if empty:
        raise InputError(f"data: {path} holds no line, expected one JSON object a line; correct the path")


def located(source: Source) -> Iterator[tuple[str, dict[str, Any]]]:
    """("file:line", object) of every line of the source."""
    path = Path(source.path)
    return ((f"{path}:{number}", row) for number, row in read_rows(path))


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


def messages(row: Mapping[str, Any], source: Source, where: str) -> list[Message]:
    """The conversation in a row of format instruct or chat (OpenAI's messages, ShareGPT's conversations); where = "file:line".

    InputError for a missing column or a value of another type.
    """
    if source.format == "instruct":
        instruction, output = column(row, "instruction", (str,), source, where), column(row, "output", (str,), source, where)
        given = row.get(source.columns.get("input", "input")) is not None
        context = column(row, "input", (str,), source, where) if given else ""
        asked = f"{instruction}\n{context}" if context else instruction
        return [{"role": "user", "content": asked}, {"role": "assistant", "content": output}]
    sharegpt = "conversations" in row and "messages" not in {**row, **source.columns}
    name = "conversations" if sharegpt else "messages"
    return conversation(column(row, name, (list,), source, where), where)


def conversation(turns: Sequence[Any], where: str) -> list[Message]:
    """Messages in OpenAI's form: ShareGPT's from and value become role and content; InputError for no message."""
    if not turns:
        raise InputError(f"data: {where} holds a conversation of no messages, expected at least one; remove the line")
    return [_turn(turn, f"{where} message {n}") for n, turn in enumerate(turns, 1)]


def answered(turns: Sequence[Message], where: str) -> tuple[list[Message], Message]:
    """(what was asked, the answer to it); InputError if the last message is not the assistant's."""
    *asked, answer = turns
    if answer["role"] != "assistant":
        raise InputError(
            f"data: {where} ends with a message of {answer['role']!r}, expected an answer of 'assistant'; correct it"
        )
    return asked, answer


def prepare(source: Source, tokenizer: Tokenizer, template: Template, cache: Path) -> Dataset:
    """The source's documents, tokenized once into a folder of `cache` whose name is a hash of all that they depend on.

    InputError for a malformed line, and for data without a single trained token.
    """
    if source.format in ("pairs", "judged"):
        raise InputError(
            f"data: {source.path} has format {source.format!r}, expected instruct, chat or text; pairs are for preference losses"
        )
    key = cache_key(source, tokenizer, template)
    if not (cache / key).is_dir():
        samples = ([_document(row, where, source, tokenizer, template)] for where, row in located(source))
        found, _, report = documents.collect(samples, source.path, source.seq_len, source.overlong)
        documents.save(cache / key, found, report)
    found, _, report = documents.load(cache / key, 1)
    lengths = np.diff(found.offsets).tolist()
    # an instance's own memo: the order is a pure function, but a step can't afford to compute it
    order = lru_cache(maxsize=2)(lambda seed, epoch: epoch_rows(lengths, source.seq_len, source.packed, seed, epoch))
    return Dataset(*found, report, order, key)


def epoch_rows(lengths: Sequence[int], seq_len: int, packed: bool, seed: int, epoch: int) -> list[list[int]]:
    """The rows of one epoch, as document numbers: every document once, in an order that (seed, epoch) determines.

    Unpacked: one document a row. Packed: each document goes into the fullest row that has room for it (best fit), the
    longest of WINDOW shuffled documents first; then the rows are shuffled. O(n log n) for n documents.
    """
    shuffled = permutation(len(lengths), seed, "documents", epoch)
    if not packed:
        return [[i] for i in shuffled]
    rows: list[list[int]] = []
    by_room: list[list[int]] = [[] for _ in range(seq_len + 1)]  # rows by the tokens that are free in them
    rooms = 0  # bit r: some row has r tokens free; so the least sufficient room is the lowest set bit
    for start in range(0, len(shuffled), WINDOW):
        for i in sorted(shuffled[start : start + WINDOW], key=lambda i: -lengths[i]):
            enough = rooms >> lengths[i]
            if enough:
                room = lengths[i] + (enough & -enough).bit_length() - 1
                row = by_room[room].pop()
                rooms ^= 0 if by_room[room] else 1 << room
            else:
                room, row = seq_len, len(rows)
                rows.append([])
            rows[row].append(i)
            left = room - lengths[i]
            if left > 0:
                by_room[left].append(row)
                rooms |= 1 << left
    return [rows[i] for i in permutation(len(rows), seed, "rows", epoch)]


def permutation(n: int, seed: int, name: str, epoch: int) -> list[int]:
    """The numbers below n, shuffled by (seed, name, epoch)."""
    return torch.randperm(n, generator=generator(seed, name, epoch)).tolist()


def take(dataset: Dataset, cursor: Cursor, n_rows: int, source: Source, seed: int) -> tuple[Batch, Cursor]:
    """The next n_rows rows and the cursor after them; where an epoch ends, the next one completes the batch."""
    rows, cursor = next_rows(dataset.order, cursor, n_rows, seed)
    return _batch(dataset, rows, source), cursor


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


def batches(dataset: Dataset, source: Source, n_rows: int) -> Iterator[Batch]:
    """One pass in the order of the file, for evaluation; a packed row is full when the next document has no room in it."""
    rows: list[list[int]] = []
    room = 0
    for i, length in enumerate(np.diff(dataset.offsets).tolist()):
        if source.packed and length <= room:
            rows[-1].append(i)
        else:
            rows.append([i])
            room = source.seq_len
        room = room - length
    for start in range(0, len(rows), n_rows):
        yield _batch(dataset, rows[start : start + n_rows], source)


def prompts(source: Source, tokenizer: Tokenizer, template: Template) -> list[Prompt]:
    """What to generate from: each conversation without its last message, which must be the assistant's, the reference."""
    if source.format not in ("instruct", "chat"):
        asks = "plain text asks for no answer" if source.format == "text" else "a pair has no one answer"
        raise InputError(f"data: {source.path} has format {source.format!r}, expected instruct or chat; {asks}")
    found = []
    for where, row in located(source):
        asked, answer = answered(messages(row, source, where), where)
        if not isinstance(answer.get("content"), str):
            raise InputError(f"data: {where} has an answer without text, expected a string to compare with; correct it")
        with at(where):
            found.append(Prompt(encode_prompt(tokenizer, template, asked), answer["content"], asked))
    return found


def cache_key(source: Source, tokenizer: Tokenizer, template: Template) -> str:
    """A hash of everything that a source's tokens depend on."""
    with _opened(Path(source.path)) as file:
        content = hashlib.file_digest(file, "sha256").hexdigest()
    rules = (source.format, source.seq_len, source.overlong, sorted(source.columns.items()))
    return arrays.key(LAYOUT, content, tokenizer.fingerprint, template.source, sorted(template.special_names.items()), *rules)


def _opened(path: Path) -> BufferedReader:
    if not path.is_file():
        raise InputError(f"data: {path} is no file, expected a jsonl file; correct the path")
    return path.open("rb")


def _turn(turn: Any, where: str) -> Message:
    """A message in OpenAI's form; ShareGPT's from and value become role and content, other keys stay."""
    if isinstance(turn, dict) and "from" in turn:
        turn = {{"from": "role", "value": "content"}.get(key, key): value for key, value in turn.items()}
        turn = {**turn, "role": SHAREGPT_ROLES.get(str(turn["role"]), turn["role"])}
    if not (isinstance(turn, dict) and isinstance(turn.get("role"), str)):
        raise InputError(f'data: {where} has no "role", expected an object with "role" and "content"; correct it')
    if not isinstance(turn.get("content"), (str, list, type(None))):
        found = type(turn["content"]).__name__
        raise InputError(f'data: {where} has a "content" of type {found}, expected a string; correct it')
    return turn


def _document(row: Mapping[str, Any], where: str, source: Source, tokenizer: Tokenizer, template: Template) -> Tokens:
    if source.format != "text":
        conversation = messages(row, source, where)
        with at(where):
            return encode_chat(tokenizer, template, conversation)
    # The text format is raw: what it writes is what the model sees, the strings of special tokens included.
    ids = tokenizer.encode(column(row, "text", (str,), source, where), parse_special=True)
    bos, eos = ([i] if i is not None else [] for i in (tokenizer.bos_id, tokenizer.eos_id))
    ids = [*(bos if ids[:1] != bos else []), *ids, *eos]
    return Tokens(ids, [True] * len(ids))


def _batch(dataset: Dataset, rows: Sequence[Sequence[int]], source: Source) -> Batch:
    """Packed: T = seq_len, so that shapes never change; unpacked: T = the longest row."""
    held = Documents(dataset.tokens, dataset.mask, dataset.offsets)
    return padded([[held.at(i) for i in row] for row in rows], source.seq_len if source.packed else None)

"""Rows to messages to tokens to Batch: read once, kept memory-mapped, in an order that is a function of (seed, epoch).

A document is one tokenized sample. A packed row holds whole documents, never a part of one.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import msgspec
import numpy as np

from minitune import arrays, documents
from minitune.chat import Message, Template, Tokens, encode_chat, encode_prompt
from minitune.documents import Documents, Report, padded
from minitune.packing import epoch_rows, fill
from minitune.packing import permutation as permutation
from minitune.source import Source, at, column, located, opened
from minitune.source import read_rows as read_rows
from minitune.template import Tool, with_options
from minitune.tokenizer import Tokenizer
from minitune.types import Batch, InputError

Row = TypeVar("Row")

LAYOUT = 2  # of the token cache: another number makes every cache anew
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "observation": "tool", "function_response": "tool"}


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

    def fill(self, source: Source, seed: int) -> float:
        """The share of tokens in the first epoch's rows that are no padding, with source.packed."""
        return fill(self.order(seed, 0), np.diff(self.offsets).tolist(), source.seq_len)


class Cursor(NamedTuple):
    """The next row to take: a place in the data, to be saved and resumed from."""

    epoch: int
    row: int


class Prompt(NamedTuple):
    """What to ask, as token ids and as messages, and the answer that the data gives."""

    ids: list[int]
    reference: str
    messages: list[Message]


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


def tools(row: Mapping[str, Any], source: Source, where: str) -> list[Tool]:
    """The functions that the assistant may call in a row, as JSON schemas: a list of objects, or that as a string of JSON."""
    name = source.columns.get("tools", "tools")
    value = row.get(name)
    if isinstance(value, str):
        try:
            value = msgspec.json.decode(value) if value.strip() else None
        except (msgspec.DecodeError, RecursionError) as error:
            raise InputError(
                f'data: {where} "{name}" is no JSON ({error}), expected a list of objects; correct the line'
            ) from None
    if not isinstance(value, list | None) or not all(isinstance(tool, dict) for tool in value or []):
        raise InputError(f'data: {where} "{name}" is a {type(value).__name__}, expected a list of objects; correct the line')
    return value or []


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
        files: list[int] = []  # of each sample that is read

        def samples() -> Iterator[list[Tokens]]:
            for number, part in enumerate(source.parts()):
                for _, tokens in tokenized(part, tokenizer, template):
                    files.append(number)
                    yield [tokens]

        found, kept, report = documents.collect(samples(), source.path, source.seq_len, source.overlong)
        documents.save(cache / key, found, report, file=np.array(files, dtype=np.int32)[kept])
    found, (file,), report = documents.load(cache / key, 1, "file")
    sizes = np.bincount(file, minlength=1 + len(source.mix)).tolist()
    for size, part in zip(sizes, source.parts(), strict=True):
        if size == 0:
            raise InputError(
                f"data: {part.path} leaves nothing to train on, expected an assistant's turn that fits; raise seq_len"
            )
    lengths, shares = np.diff(found.offsets).tolist(), [one.share for one in source.mix]
    # an instance's own memo: the order is a pure function, but a step can't afford to compute it
    order = lru_cache(maxsize=2)(
        lambda seed, epoch: epoch_rows(lengths, source.seq_len, source.packed, seed, epoch, sizes=sizes, shares=shares)
    )
    return Dataset(*found, report, order, key)


def tokenized(source: Source, tokenizer: Tokenizer, template: Template) -> Iterator[tuple[str, Tokens]]:
    """("file:line", tokens) of every row of the table's own file."""
    template = with_options(template, source.chat_template_kwargs, source.path)
    return ((where, _document(row, where, source, tokenizer, template)) for where, row in located(source))


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
    for part in source.parts():
        if part.format not in ("instruct", "chat"):
            asks = "plain text asks for no answer" if part.format == "text" else "a pair has no one answer"
            raise InputError(f"data: {part.path} has format {part.format!r}, expected instruct or chat; {asks}")
    found = []
    for part in source.parts():
        told = with_options(template, part.chat_template_kwargs, part.path)
        for where, row in located(part):
            asked, answer = answered(messages(row, part, where), where)
            if not isinstance(answer.get("content"), str):
                raise InputError(f"data: {where} has an answer without text, expected a string to compare with; correct it")
            with at(where):
                ids = encode_prompt(tokenizer, told, asked, tools=tools(row, part, where))
            found.append(Prompt(ids, answer["content"], asked))
    return found


def cache_key(source: Source, tokenizer: Tokenizer, template: Template) -> str:
    """A hash of everything that a source's tokens depend on."""
    rules = []
    for part in source.parts():
        with opened(Path(part.path)) as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        # neither where the file lies nor how rows are packed is in the tokens; the suffix says how it is read
        ruled = msgspec.structs.replace(part, path=Path(part.path).suffix, packed=True)
        rules.append((content, msgspec.json.encode(ruled, order="deterministic").decode()))
    names = sorted(template.special_names.items())
    sources = [template.source, template.tool_use.source if template.tool_use else None]
    options = msgspec.json.encode(dict(template.options), order="deterministic").decode()
    return arrays.key(LAYOUT, tokenizer.fingerprint, sources, names, options, rules)


def _turn(turn: Any, where: str) -> Message:
    """A message in OpenAI's form; ShareGPT's from and value become role and content, other keys stay."""
    if isinstance(turn, dict) and "from" in turn:
        turn = {{"from": "role", "value": "content"}.get(key, key): value for key, value in turn.items()}
        turn = {**turn, "role": SHAREGPT_ROLES.get(str(turn["role"]), turn["role"])}
        if turn["role"] == "function_call":
            call = _decoded(turn.get("content"))
            if not isinstance(call, dict):
                raise InputError(f'data: {where} has a function_call that is no JSON object, expected "name" and "arguments"')
            turn = {**turn, "role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}]}
    if not (isinstance(turn, dict) and isinstance(turn.get("role"), str)):
        raise InputError(f'data: {where} has no "role", expected an object with "role" and "content"; correct it')
    if not isinstance(turn.get("content"), (str, list, type(None))):
        found = type(turn["content"]).__name__
        raise InputError(f'data: {where} has a "content" of type {found}, expected a string; correct it')
    calls = turn.get("tool_calls")
    return {**turn, "tool_calls": [_call(call) for call in calls]} if isinstance(calls, list) else turn


def _call(call: Any) -> Any:
    """A tool call with its arguments as an object, as servers hand them to templates, and not as OpenAI's string of JSON."""
    if not isinstance(call, dict) or not isinstance(inner := call.get("function", call), dict):
        return call
    arguments = _decoded(inner.get("arguments"))
    if not isinstance(arguments, dict):
        return call
    inner = {**inner, "arguments": arguments}
    return {**call, "function": inner} if "function" in call else inner


def _decoded(text: Any) -> Any:
    """What a string of JSON says; anything else as it is."""
    try:
        return msgspec.json.decode(text) if isinstance(text, str) else text
    except (msgspec.DecodeError, RecursionError):
        return text


def _document(row: Mapping[str, Any], where: str, source: Source, tokenizer: Tokenizer, template: Template) -> Tokens:
    if source.format != "text":
        said, callable_ = messages(row, source, where), tools(row, source, where)
        with at(where):
            return encode_chat(tokenizer, template, said, tools=callable_, train_on=source.train_on)
    # The text format is raw: what it writes is what the model sees, the strings of special tokens included.
    ids = tokenizer.encode(column(row, "text", (str,), source, where), parse_special=True)
    bos, eos = ([i] if i is not None else [] for i in (tokenizer.bos_id, tokenizer.eos_id))
    ids = [*(bos if ids[:1] != bos else []), *ids, *eos]
    return Tokens(ids, [True] * len(ids))


def _batch(dataset: Dataset, rows: Sequence[Sequence[int]], source: Source) -> Batch:
    """Packed: T = seq_len, so that shapes never change; unpacked: T = the longest row."""
    held = Documents(dataset.tokens, dataset.mask, dataset.offsets)
    return padded([[held.at(i) for i in row] for row in rows], source.seq_len if source.packed else None)

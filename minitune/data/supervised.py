"""Supervised data: rows that are tokenized once, kept memory-mapped, and taken as batches."""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, cast

import msgspec
import numpy as np

from minitune.data import packing
from minitune.data.conversations import messages, tools
from minitune.data.cursor import Cursor, next_rows
from minitune.data.encoded_rows import Refused, encoded_rows, with_refused
from minitune.data.files import opened
from minitune.data.packing import epoch_rows
from minitune.data.readers import error_location
from minitune.data.row_weights import row_weight, weighted
from minitune.data.source import PREFERENCE_FORMATS, Source, column
from minitune.data.token_store import (
    Documents,
    OnSample,
    Report,
    filter_documents,
    load,
    no_one,
    padded,
    save,
)
from minitune.errors import InputError
from minitune.io import array_cache
from minitune.text.chat import Tokens, encode_chat
from minitune.text.served import encode_answers
from minitune.text.template import Template, with_options
from minitune.text.tokenizer import Tokenizer
from minitune.types import Batch

LAYOUT = 7  # version of the token cache; another number makes every cache anew


class Dataset(NamedTuple):
    """Tokenized documents and the order in which epochs take them.

    Document i is tokens[offsets[i] : offsets[i + 1]]; mask: True for the tokens that are trained.
    order(seed, epoch): the epoch's rows, each a list of documents. key: a hash of all that the
    tokens depend on.
    """

    tokens: np.ndarray
    mask: np.ndarray
    offsets: np.ndarray
    report: Report
    order: Callable[[int, int], list[list[int]]]
    key: str

    def fill(self, source: Source, seed: int) -> float:
        """Share of tokens in the first epoch's rows that are no padding, for packed rows."""
        return packing.fill(self.order(seed, 0), np.diff(self.offsets).tolist(), source.max_seq_len)


def prepare(
    source: Source,
    tokenizer: Tokenizer,
    template: Template,
    cache: Path,
    on_sample: OnSample = no_one,
) -> Dataset:
    """Tokenize the source's documents once, into a folder of `cache` whose name is a hash of all
    that they depend on.

    on_sample: called after each sample with how many there are. InputError for a malformed line,
    and for data without a single trained token.
    """
    if source.format in PREFERENCE_FORMATS:
        found = f"data: {source.path_names} has format {source.format!r}"
        expected = "expected instruct, chat or text; pairs are for preference losses"
        raise InputError(f"{found}, {expected}")
    key = cache_key(source, tokenizer, template)
    if not array_cache.is_whole(cache / key):
        _write(cache / key, source, tokenizer, template, on_sample)
    documents, (file,), report = load(cache / key, 1, "file")
    sizes = np.bincount(file, minlength=1 + len(source.mix)).tolist()
    for size, part in zip(sizes, source.parts(), strict=True):
        if size == 0:
            raise InputError(
                f"data: {part.path_names} leaves nothing to train on, expected an assistant's "
                "turn that fits; raise seq_len"
            )
    lengths = np.diff(documents.offsets).tolist()
    shares = [component.share for component in source.mix]
    # A cache of this Dataset's own: the order is a pure function, but a step can't afford to
    # compute it.
    order = lru_cache(maxsize=2)(
        lambda seed, epoch: epoch_rows(
            lengths, source.max_seq_len, source.packed, seed, epoch, sizes=sizes, shares=shares
        )
    )
    return Dataset(*documents, report, order, key)


def tokenized(
    source: Source,
    tokenizer: Tokenizer,
    template: Template,
    refused: list[Refused] | None = None,
) -> Iterator[tuple[str, Tokens]]:
    """Yield ("file:line", tokens) of every sample of the table's own file.

    A sample is a row; with turns = "each" an answer, with overlong = "split" a part of a text of
    at most seq_len tokens. refused gets the rows that invalid = "skip" leaves out.
    """
    template = with_options(template, source.chat_template_kwargs, source.path_names)

    def encode(row: Mapping[str, Any], where: str) -> list[Tokens]:
        return _documents(row, where, source, tokenizer, template)

    for where, documents in encoded_rows(source, encode, [] if refused is None else refused):
        for tokens in documents:
            yield where, tokens


def take(
    dataset: Dataset, cursor: Cursor, n_rows: int, source: Source, seed: int
) -> tuple[Batch, Cursor]:
    """Take the next n_rows rows, and the cursor after them; where an epoch ends, the next one
    completes the batch.
    """
    rows, cursor = next_rows(dataset.order, cursor, n_rows, seed)
    return _batch(dataset, rows, source), cursor


def batches(dataset: Dataset, source: Source, n_rows: int) -> Iterator[Batch]:
    """Yield one pass in the order of the file, for evaluation.

    Packed rows are filled in that order too: a row ends where the next document does not fit.
    """
    rows: list[list[int]] = []
    room = 0
    for i, length in enumerate(np.diff(dataset.offsets).tolist()):
        if source.packed and length <= room:
            rows[-1].append(i)
        else:
            rows.append([i])
            room = source.max_seq_len
        room = room - length
    for start in range(0, len(rows), n_rows):
        yield _batch(dataset, rows[start : start + n_rows], source)


def cache_key(source: Source, tokenizer: Tokenizer, template: Template) -> str:
    """Hash of everything that a source's tokens depend on."""
    files = []
    for part in source.parts():
        # Tokens depend neither on where files lie nor on how rows are packed; the suffix says how
        # one is read.
        rules = msgspec.structs.replace(part, path="any", packed=True)
        written = msgspec.json.encode(rules, order="deterministic").decode()
        for path in part.files():
            with opened(path) as file:
                content = hashlib.file_digest(cast(Any, file), "sha256").hexdigest()
            files.append((content, path.suffixes, written))
    names = sorted(template.special_names.items())
    sources = [template.source, template.tool_use.source if template.tool_use else None]
    options = msgspec.json.encode(dict(template.options), order="deterministic").decode()
    return array_cache.key(LAYOUT, tokenizer.fingerprint, sources, names, options, files)


def _write(
    folder: Path,
    source: Source,
    tokenizer: Tokenizer,
    template: Template,
    on_sample: OnSample,
) -> None:
    """Tokenize all files of a source into a token cache, with the number of the file of each
    document.
    """
    file_numbers: list[int] = []  # of each sample that is read
    refused: list[Refused] = []
    rows: Counter[str] = Counter()  # samples of each row

    def samples() -> Iterator[list[Tokens]]:
        for number, part in enumerate(source.parts()):
            for where, tokens in tokenized(part, tokenizer, template, refused):
                file_numbers.append(number)
                rows[where] += source.overlong == "split"
                yield [tokens]
                on_sample(len(file_numbers))

    documents, kept, report = filter_documents(
        samples(), source.path_names, source.max_seq_len, source.overlong
    )
    n_split = sum(n > 1 for n in rows.values())
    report = with_refused(report._replace(n_split=n_split), refused)
    save(folder, documents, report, file=np.array(file_numbers, dtype=np.int32)[kept])


def _documents(
    row: Mapping[str, Any],
    where: str,
    source: Source,
    tokenizer: Tokenizer,
    template: Template,
) -> list[Tokens]:
    """Samples of a row: a conversation, each answer of it, or text between bos and eos."""
    if source.format == "text":
        samples = _texts(row, where, source, tokenizer)
    else:
        samples = _conversations(row, where, source, tokenizer, template)
    weight = row_weight(row, source, where)
    return [weighted(tokens, weight) for tokens in samples]


def _conversations(
    row: Mapping[str, Any],
    where: str,
    source: Source,
    tokenizer: Tokenizer,
    template: Template,
) -> list[Tokens]:
    """Samples of a row that is a conversation."""
    conversation = messages(row, source, where)
    functions = tools(row, source, where)
    with error_location(where):
        if source.turns == "each":
            answers = encode_answers(tokenizer, template, conversation, tools=functions)
            # A row without an answer to train is a sample without a target, and counted as such.
            return answers or [Tokens([], [])]
        train_on = source.train_on
        return [encode_chat(tokenizer, template, conversation, tools=functions, train_on=train_on)]


def _texts(
    row: Mapping[str, Any],
    where: str,
    source: Source,
    tokenizer: Tokenizer,
) -> list[Tokens]:
    """Samples of a row of format text: several where a long one is split."""
    tokens = _text(row, where, source, tokenizer)
    if source.overlong != "split":
        return [tokens]
    # Two parts share a token, which the second one has as context: each token is a target once.
    starts = range(0, max(1, len(tokens.ids) - 1), max(1, source.max_seq_len - 1))
    ends = [start + source.max_seq_len for start in starts]
    return [Tokens(tokens.ids[i:j], tokens.mask[i:j]) for i, j in zip(starts, ends, strict=True)]


def _text(row: Mapping[str, Any], where: str, source: Source, tokenizer: Tokenizer) -> Tokens:
    """Tokens of a row of format text."""
    # The text format is raw: the strings of special tokens in it are special tokens.
    ids = tokenizer.encode(column(row, "text", (str,), source, where), parse_special=True)
    bos_id, eos_id = tokenizer.bos_id, tokenizer.eos_id
    if tokenizer.add_bos and bos_id is not None and ids[:1] != [bos_id]:
        ids = [bos_id, *ids]
    if eos_id is not None:
        ids = [*ids, eos_id]
    return Tokens(ids, [True] * len(ids))


def _batch(dataset: Dataset, rows: Sequence[Sequence[int]], source: Source) -> Batch:
    """Batch of rows of documents; packed: T = seq_len, so that shapes never change; unpacked: T =
    the longest row.
    """
    documents = Documents(dataset.tokens, dataset.mask, dataset.offsets)
    n_tokens = source.max_seq_len if source.packed else None
    return padded([[documents.at(i) for i in row] for row in rows], n_tokens)

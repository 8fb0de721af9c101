"""Preference data: rows to Pairs (two answers to a prompt) or UnpairedBatch (single answers, each desirable or not).

The rows are those that TRL documents. What is trained is the answer: the last message, with its end-of-turn token.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from minitune import tree
from minitune.data.conversations import answered, conversation, tools
from minitune.data.cursor import Cursor, next_rows
from minitune.data.packing import permutation
from minitune.data.readers import error_location, rows_with_location
from minitune.data.source import Source, column
from minitune.data.supervised import cache_key
from minitune.data.token_store import Document, Documents, Report, filter_documents, load, padded, save
from minitune.errors import InputError
from minitune.text.chat import Tokens, encode_chat
from minitune.text.template import Message, Template, with_options
from minitune.text.tokenizer import Tokenizer
from minitune.types import Pairs, UnpairedBatch

FORMATS = ("pairs", "unpaired")


class PairSet(NamedTuple):
    """Pair i is answers 2 i (chosen) and 2 i + 1 (rejected); with `desirable`, answer i stands alone, labelled desirable or not.

    mismatched[i]: an answer to another prompt than answer i's, fixed, so that what a frozen model says of it can be kept.
    order(seed, epoch): all pairs (or answers) in the order of an epoch. key: a hash of all that the tokens depend on.
    """

    answers: Documents
    desirable: np.ndarray | None
    mismatched: np.ndarray | None
    report: Report
    order: Callable[[int, int], list[int]]
    key: str


def prepare(source: Source, tokenizer: Tokenizer, template: Template, cache: Path) -> PairSet:
    """The source's answers, tokenized once into a folder of `cache` whose name is a hash of all that they depend on.

    Overlong pairs are dropped or cut as a whole, and pairs whose answers are the same are left out and counted. InputError for
    a malformed line, for data that leaves nothing, and for unpaired answers to a single prompt.
    """
    if source.format not in FORMATS:
        raise InputError(f"pairs: {source.path} has format {source.format!r}, expected pairs or unpaired; a row there is no pair")
    key = cache_key(source, tokenizer, template)
    unpaired = source.format == "unpaired"
    if not (cache / key).is_dir():
        _write(cache / key, source, tokenizer, template)
    per_sample, more = (1, ("desirable", "mismatched")) if unpaired else (2, ())
    answers, others, report = load(cache / key, per_sample, *more)
    desirable, mismatched = others or (None, None)
    # an instance's own memo: the order is a pure function, but a step can't afford to compute it
    order = lru_cache(maxsize=2)(lambda seed, epoch: permutation(report.n_samples, seed, "pairs", epoch))
    return PairSet(answers, desirable, mismatched, report, order, key)


def take(
    pairset: PairSet, cursor: Cursor, n_rows: int, source: Source, seed: int, reference: np.ndarray | None = None
) -> tuple[Pairs | UnpairedBatch, Cursor]:
    """The next n_rows pairs (or unpaired answers) and the cursor after them; where an epoch ends, the next completes the batch.

    reference: a frozen model's log-probs [n, 2] of the whole set, of which the batch gets its rows.
    """
    rows, cursor = next_rows(pairset.order, cursor, n_rows, seed)
    return select(pairset, rows, source, reference), cursor


def batches(
    pairset: PairSet, source: Source, n_rows: int, reference: np.ndarray | None = None
) -> Iterator[Pairs | UnpairedBatch]:
    """One pass in the order of the file, for evaluation."""
    n = pairset.report.n_samples
    return (select(pairset, range(i, min(i + n_rows, n)), source, reference) for i in range(0, n, n_rows))


def select(pairset: PairSet, rows: Sequence[int], source: Source, reference: np.ndarray | None = None) -> Pairs | UnpairedBatch:
    """These pairs (or unpaired answers), all padded to the longest one, so that both halves go through one forward."""
    answers, mismatched = pairset.answers, pairset.mismatched
    if mismatched is None:
        both = [answers.at(2 * i) for i in rows] + [answers.at(2 * i + 1) for i in rows]
    else:
        other = (_mismatch(answers.at(i), answers.at(int(mismatched[i])), source.seq_len) for i in rows)
        both = [*(answers.at(i) for i in rows), *other]
    batch = padded([[one] for one in both])
    first, second = (tree.map(lambda x, half=half: x.chunk(2)[half], batch) for half in (0, 1))
    said = () if reference is None else torch.from_numpy(np.array(reference[list(rows)], dtype=np.float32))
    if pairset.desirable is None:
        return Pairs(first, second, said)
    return UnpairedBatch(first, second, torch.from_numpy(np.array(pairset.desirable[list(rows)], dtype=np.bool_)), said)


def conversations(row: Mapping[str, Any], source: Source, where: str) -> list[tuple[list[Message], bool]]:
    """The conversations of a row, each ending with an answer, and whether that is the better (or a desirable) one.

    prompt is a string (a user's message) or messages; an answer a string, messages, or a whole conversation with the prompt
    at its start; chosen_conversations and rejected_conversations are answers too. A row of format unpaired may be a pair.
    InputError for anything else; where = "file:line".
    """
    row = _plain_names(row, source)
    has = {name: source.columns.get(name, name) in row for name in ("prompt", "chosen", "completion")}
    if source.format == "unpaired" and (has["completion"] or not has["chosen"]):
        names, desirable = ("completion",), [column(row, "label", (bool,), source, where)]
    else:
        names, desirable = ("chosen", "rejected"), [True, False]
    values = [column(row, name, (str, list), source, where) for name in names]
    needed = has["prompt"] or any(isinstance(value, str) for value in values)
    prompt = column(row, "prompt", (str, list), source, where) if needed else []
    found = [_whole(prompt, value, where) for value in values]
    if found[0][0] != found[-1][0]:
        raise InputError(f"pairs: {where} has answers to different prompts, expected one at the start of both; correct the line")
    for turns in found:
        if not answered(turns, where)[0]:
            raise InputError(f"pairs: {where} has an answer to nothing, expected a prompt before it; correct the line")
    return list(zip(found, desirable, strict=True))


def tokenized(source: Source, tokenizer: Tokenizer, template: Template) -> Iterator[tuple[str, list[tuple[Tokens, bool]]]]:
    """("file:line", [(tokens, whether it is the better one, or desirable)]) of every row, the last answer alone trained."""
    template = with_options(template, source.chat_template_kwargs, source.path)
    for where, row in rows_with_location(source):
        answers, called = conversations(row, source, where), tools(row, source, where)
        with error_location(where):
            yield (
                where,
                [(encode_chat(tokenizer, template, turns, tools=called, train_on="last"), better) for turns, better in answers],
            )


def _plain_names(row: Mapping[str, Any], source: Source) -> Mapping[str, Any]:
    """The row with chosen_conversations and rejected_conversations called chosen and rejected, where these names are free."""
    aliases = {f"{name}_conversations": name for name in ("chosen", "rejected")}
    if any(name in row or name in source.columns for name in aliases.values()):
        return row
    return {aliases.get(key, key): value for key, value in row.items()}


def _whole(prompt: str | list[Any], answer: str | list[Any], where: str) -> list[Message]:
    """Prompt and answer as one conversation; an answer that has the prompt already, as some data sets do, keeps it once."""
    asked = conversation(prompt, where) if prompt and isinstance(prompt, list) else []
    if isinstance(prompt, str):
        asked = [{"role": "user", "content": prompt}]
    if isinstance(answer, str):
        return [*asked, {"role": "assistant", "content": answer}]
    turns = conversation(answer, where)
    opens = turns[0]["role"] != "assistant" if isinstance(prompt, str) else turns[: len(asked)] == asked
    return turns if opens else [*asked, *turns]


def _write(folder: Path, source: Source, tokenizer: Tokenizer, template: Template) -> None:
    if source.format == "pairs":
        samples = ([tokens for tokens, _ in row] for _, row in tokenized(source, tokenizer, template))
        answers, _, report = filter_documents(samples, source.path, source.seq_len, source.overlong)
        return save(folder, answers, report)
    labels: list[bool] = []  # of each answer that is read

    def single() -> Iterator[list[Tokens]]:
        for _, row in tokenized(source, tokenizer, template):
            for tokens, desirable in row:
                labels.append(desirable)
                yield [tokens]

    answers, kept, report = filter_documents(single(), source.path, source.seq_len, source.overlong)
    mismatched = _mismatched(answers, source.path)
    return save(folder, answers, report, desirable=np.array(labels)[kept], mismatched=mismatched)


def _mismatched(answers: Documents, path: str) -> np.ndarray:
    """For each answer the one half the data away or, if that has the same prompt, the next one after it that has not."""
    numbers: dict[bytes, int] = {}
    asked = []
    for i in range(len(answers.offsets) - 1):
        one = answers.at(i)
        asked.append(numbers.setdefault(one.tokens[: _start(one)].tobytes(), len(numbers)))
    if len(numbers) < 2:
        raise InputError(
            f"pairs: {path} has answers to one prompt only, expected two or more: each is compared with an answer to another one"
        )
    n = len(asked)
    after = [0] * n  # the next answer, in a circle, to another prompt; twice round, because a run may span the end
    for i in [*range(n - 1, -1, -1)] * 2:
        after[i] = (i + 1) % n if asked[i] != asked[(i + 1) % n] else after[(i + 1) % n]
    opposite = [(i + n // 2) % n for i in range(n)]
    return np.array([j if asked[j] != asked[i] else after[j] for i, j in enumerate(opposite)], dtype=np.int64)


def _start(answer: Document) -> int:
    return int(answer.mask.argmax())


def _mismatch(asked: Document, answered: Document, seq_len: int) -> Document:
    """The prompt of one with the answer of the other; as both were cut from seq_len tokens, some of the answer always fits."""
    i, j = _start(asked), _start(answered)
    tokens = np.concatenate([asked.tokens[:i], answered.tokens[j:]])
    return Document(tokens[:seq_len], np.concatenate([asked.mask[:i], answered.mask[j:]])[:seq_len])

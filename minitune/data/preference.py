"""Preference data: rows to Pairs (two answers to a prompt) or UnpairedBatch (single answers,
desirable or not).

The formats of rows are those that TRL documents. Only the answer is trained: the last message, with
its end-of-turn token.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from minitune import tree
from minitune.data.conversations import conversation, opening, split_answer, tools
from minitune.data.cursor import Cursor, next_rows
from minitune.data.encoded_rows import Refused, encoded_rows, with_refused
from minitune.data.packing import permutation
from minitune.data.readers import error_location
from minitune.data.row_weights import refuse_weight
from minitune.data.source import PREFERENCE_FORMATS, Source, column
from minitune.data.supervised import cache_key
from minitune.data.token_store import (
    Document,
    Documents,
    Report,
    filter_documents,
    load,
    padded,
    save,
)
from minitune.errors import InputError
from minitune.io import array_cache
from minitune.text.chat import Tokens, encode_chat
from minitune.text.template import Message, Template, with_options
from minitune.text.tokenizer import Tokenizer
from minitune.types import Pairs, UnpairedBatch


class PairSet(NamedTuple):
    """Tokenized answers and the order in which epochs take them.

    Pair i is answers 2 i (chosen) and 2 i + 1 (rejected). With `desirable`, answers are unpaired:
    answer i stands alone, labelled desirable or not.
    mismatched[i]: the number of an answer to another prompt than answer i's. It is fixed, so that
    the log-probs that a frozen model gives it can be kept.
    order(seed, epoch): all pairs (or answers) in the order of an epoch. key: a hash of all that the
    tokens depend on.
    """

    answers: Documents
    desirable: np.ndarray | None
    mismatched: np.ndarray | None
    report: Report
    order: Callable[[int, int], list[int]]
    key: str


def prepare(source: Source, tokenizer: Tokenizer, template: Template, cache: Path) -> PairSet:
    """Tokenize the source's answers once, into a folder of `cache` whose name is a hash of all that
    they depend on.

    Overlong pairs are dropped or cut as a whole; pairs whose answers are equal are left out and
    counted. InputError for a malformed line, for data that leaves nothing, and for unpaired answers
    to a single prompt.
    """
    if source.format not in PREFERENCE_FORMATS:
        found = f"data: {source.path_names} has format {source.format!r}"
        raise InputError(f"{found}, expected pairs or unpaired; a row there is no pair")
    key = cache_key(source, tokenizer, template)
    desirable = mismatched = None
    if source.format == "pairs":
        if not array_cache.is_whole(cache / key):
            _write_pairs(cache / key, source, tokenizer, template)
        answers, _, report = load(cache / key, 2)
    else:
        if not array_cache.is_whole(cache / key):
            _write_unpaired(cache / key, source, tokenizer, template)
        answers, (desirable, mismatched), report = load(cache / key, 1, "desirable", "mismatched")
    # A cache of this PairSet's own: the order is a pure function, but a step can't afford to
    # compute it.
    order = lru_cache(maxsize=2)(
        lambda seed, epoch: permutation(report.n_samples, seed, "pairs", epoch)
    )
    return PairSet(answers, desirable, mismatched, report, order, key)


def take(
    pairset: PairSet,
    cursor: Cursor,
    n_rows: int,
    source: Source,
    seed: int,
    reference: np.ndarray | None = None,
) -> tuple[Pairs | UnpairedBatch, Cursor]:
    """Take the next n_rows pairs (or unpaired answers), and the cursor after them; the next epoch
    completes a batch.

    reference: a frozen model's log-probs [n, 2] of the whole set, of which the batch gets its rows.
    """
    rows, cursor = next_rows(pairset.order, cursor, n_rows, seed)
    return select(pairset, rows, source, reference), cursor


def batches(
    pairset: PairSet, source: Source, n_rows: int, reference: np.ndarray | None = None
) -> Iterator[Pairs | UnpairedBatch]:
    """Yield one pass in the order of the file, for evaluation."""
    n = pairset.report.n_samples
    for start in range(0, n, n_rows):
        yield select(pairset, range(start, min(start + n_rows, n)), source, reference)


def select(
    pairset: PairSet, rows: Sequence[int], source: Source, reference: np.ndarray | None = None
) -> Pairs | UnpairedBatch:
    """Batch of these pairs (or unpaired answers), all padded to the longest, so that both halves go
    through one forward.
    """
    answers = pairset.answers
    mismatched = pairset.mismatched
    if mismatched is None:
        firsts = [answers.at(2 * i) for i in rows]
        seconds = [answers.at(2 * i + 1) for i in rows]
    else:
        firsts = [answers.at(i) for i in rows]
        seconds = [
            _swap_answer(answers.at(i), answers.at(int(mismatched[i])), source.seq_len)
            for i in rows
        ]
    batch = padded([[document] for document in [*firsts, *seconds]])
    first, second = (tree.map(lambda x, half=half: x.chunk(2)[half], batch) for half in (0, 1))
    logps = (
        ()
        if reference is None
        else torch.from_numpy(np.array(reference[list(rows)], dtype=np.float32))
    )
    if pairset.desirable is None:
        return Pairs(first, second, logps)
    desirable = torch.from_numpy(np.array(pairset.desirable[list(rows)], dtype=np.bool_))
    return UnpairedBatch(first, second, desirable, logps)


def conversations(
    row: Mapping[str, Any], source: Source, where: str
) -> list[tuple[list[Message], bool]]:
    """Conversations of a row, each ending with an answer, and whether that is the chosen (or a
    desirable) one.

    prompt is a string (a user's message) or messages. An answer is a string, messages, or a whole
    conversation that begins with the prompt; chosen_conversations and rejected_conversations are
    answers too. A row of format unpaired may be a pair: it gives a desirable answer and one that is
    not. InputError for anything else; where = "file:line".
    """
    row = _plain_names(row, source)
    has = {
        name: source.columns.get(name, name) in row for name in ("prompt", "chosen", "completion")
    }
    is_single = source.format == "unpaired" and (has["completion"] or not has["chosen"])
    if is_single:
        names = ["completion"]
        desirable = [_label(row, source, where)]
    else:
        names = ["chosen", "rejected"]
        desirable = [True, False]
    answers = [_answer(row, name, source, where) for name in names]
    # An answer that is a string needs a prompt; one that is a list may hold it.
    needs_prompt = has["prompt"] or any(isinstance(answer, str) for answer in answers)
    prompt = column(row, "prompt", (str, list), source, where) if needs_prompt else []
    whole = [_with_prompt(prompt, answer, where) for answer in answers]
    if whole[0][0] != whole[-1][0]:
        raise InputError(
            f"data: {where} has answers to different prompts, expected one at the start of both; "
            "correct the line"
        )
    whole = [opening(row, source, where, turns) for turns in whole]
    for turns in whole:
        asked, _ = split_answer(turns, where)
        if not asked:
            raise InputError(
                f"data: {where} has an answer to nothing, expected a prompt before it; correct "
                "the line"
            )
    return list(zip(whole, desirable, strict=True))


def _label(row: Mapping[str, Any], source: Source, where: str) -> bool:
    """Label of an answer: true or false, or 1 or 0."""
    label = column(row, "label", (bool, int), source, where)
    if label not in (0, 1):
        key = source.columns.get("label", "label")
        raise InputError(
            f'data: {where} "{key}" is {label}, expected true or false, or 1 or 0; correct the line'
        )
    return bool(label)


def _answer(row: Mapping[str, Any], name: str, source: Source, where: str) -> str | list[Any]:
    """Answer of a row: a string, or messages; a single message stands for a list of it."""
    answer = column(row, name, (str, list, dict), source, where)
    return [answer] if isinstance(answer, dict) else answer


def tokenized(
    source: Source,
    tokenizer: Tokenizer,
    template: Template,
    refused: list[Refused] | None = None,
) -> Iterator[tuple[str, list[tuple[Tokens, bool]]]]:
    """Yield ("file:line", answers) of every row; answers: (tokens, whether it is the chosen or a
    desirable one).

    Of the tokens only the last message is trained. refused gets the rows that
    invalid = "skip" leaves out.
    """
    template = with_options(template, source.chat_template_kwargs, source.path_names)

    def encode(row: Mapping[str, Any], where: str) -> list[tuple[Tokens, bool]]:
        answers = []
        refuse_weight(row, where)
        functions = tools(row, source, where)
        for turns, is_desirable in conversations(row, source, where):
            with error_location(where):
                tokens = encode_chat(tokenizer, template, turns, tools=functions, train_on="last")
            if any(weight not in (0, 1) for weight in tokens.mask):
                raise InputError(
                    f"data: {where} weighs an answer by a fraction, expected 0 or 1 where answers "
                    "are compared; correct it"
                )
            answers.append((tokens, is_desirable))
        return answers

    return encoded_rows(source, encode, [] if refused is None else refused)


def _plain_names(row: Mapping[str, Any], source: Source) -> Mapping[str, Any]:
    """Row with chosen_conversations and rejected_conversations called chosen and rejected, if these
    names are free.
    """
    aliases = {f"{name}_conversations": name for name in ("chosen", "rejected")}
    if any(name in row or name in source.columns for name in aliases.values()):
        return row
    return {aliases.get(key, key): value for key, value in row.items()}


def _with_prompt(prompt: str | list[Any], answer: str | list[Any], where: str) -> list[Message]:
    """Prompt and answer as one conversation; an answer that holds the prompt already, as in some
    data sets, keeps it once.
    """
    asked: list[Message] = []
    if isinstance(prompt, str):
        asked = [{"role": "user", "content": prompt}]
    elif prompt:
        asked = conversation(prompt, where)
    if isinstance(answer, str):
        return [*asked, {"role": "assistant", "content": answer}]
    turns = conversation(answer, where)
    if isinstance(prompt, str):
        holds_prompt = turns[0]["role"] != "assistant"
    else:
        holds_prompt = turns[: len(asked)] == asked
    return turns if holds_prompt else [*asked, *turns]


def _write_pairs(folder: Path, source: Source, tokenizer: Tokenizer, template: Template) -> None:
    """Tokenize a file of pairs into a token cache, two answers a sample."""
    refused: list[Refused] = []
    rows = tokenized(source, tokenizer, template, refused)
    samples = ([tokens for tokens, _ in answers] for _, answers in rows)
    answers, _, report = filter_documents(
        samples, source.path_names, source.seq_len, source.overlong
    )
    save(folder, answers, with_refused(report, refused))


def _write_unpaired(folder: Path, source: Source, tokenizer: Tokenizer, template: Template) -> None:
    """Tokenize a file of unpaired answers into a token cache, with their labels and their
    mismatched answers.
    """
    labels: list[bool] = []  # of each answer that is read
    refused: list[Refused] = []

    def samples() -> Iterator[list[Tokens]]:
        for _, answers in tokenized(source, tokenizer, template, refused):
            for tokens, desirable in answers:
                labels.append(desirable)
                yield [tokens]

    answers, kept, report = filter_documents(
        samples(), source.path_names, source.seq_len, source.overlong
    )
    mismatched = _mismatched(answers, source.path_names)
    report = with_refused(report, refused)
    save(folder, answers, report, desirable=np.array(labels)[kept], mismatched=mismatched)


def _mismatched(answers: Documents, path: str) -> np.ndarray:
    """For each answer, the number of one to another prompt.

    That is the answer half the data away or, if that has the same prompt, the next one after it
    that has not. InputError if all answers are to one prompt.
    """
    numbers: dict[bytes, int] = {}  # of the prompts
    prompts = []  # the number of each answer's prompt
    for i in range(len(answers.offsets) - 1):
        answer = answers.at(i)
        prompt = answer.tokens[: _answer_start(answer)].tobytes()
        prompts.append(numbers.setdefault(prompt, len(numbers)))
    if len(numbers) < 2:
        raise InputError(
            f"data: {path} has answers to one prompt only, expected two or more: each is compared "
            "with an answer to another one"
        )
    n = len(prompts)
    # next_other[i]: the next answer after i, in a circle, to another prompt. Built from the last
    # answer to the first, and twice round, because a run of answers to one prompt may span the end.
    next_other = [0] * n
    for i in [*range(n - 1, -1, -1)] * 2:
        after = (i + 1) % n
        next_other[i] = after if prompts[after] != prompts[i] else next_other[after]
    mismatched = []
    for i in range(n):
        opposite = (i + n // 2) % n
        mismatched.append(opposite if prompts[opposite] != prompts[i] else next_other[opposite])
    return np.array(mismatched, dtype=np.int64)


def _answer_start(document: Document) -> int:
    """Place of the first trained token, where the answer begins."""
    return int(document.mask.argmax())


def _swap_answer(asked: Document, other: Document, seq_len: int) -> Document:
    """Prompt of one document with the answer of the other, cut to seq_len tokens.

    Some of the answer always fits, because the prompt left room for an answer of its own.
    """
    i = _answer_start(asked)
    j = _answer_start(other)
    tokens = np.concatenate([asked.tokens[:i], other.tokens[j:]])
    mask = np.concatenate([asked.mask[:i], other.mask[j:]])
    return Document(tokens[:seq_len], mask[:seq_len])

"""Preference data: rows to Pairs (two answers to a prompt) or UnpairedBatch (single answers,
desirable or not).
"""

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from minitune import tree
from minitune.data.cursor import Cursor, next_rows
from minitune.data.encoded_rows import Refused, with_refused
from minitune.data.mismatched import mismatched_answers, swap_answer
from minitune.data.packing import permutation
from minitune.data.preference_rows import tokenized
from minitune.data.source import PREFERENCE_FORMATS, Source
from minitune.data.supervised import cache_key
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
from minitune.text.chat import Tokens
from minitune.text.template import Template
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


def prepare(
    source: Source,
    tokenizer: Tokenizer,
    template: Template,
    cache: Path,
    on_sample: OnSample = no_one,
) -> PairSet:
    """Tokenize the source's answers once, into a folder of `cache` whose name is a hash of all that
    they depend on; on_sample: as for supervised data.

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
            _write_pairs(cache / key, source, tokenizer, template, on_sample)
        answers, _, report = load(cache / key, 2)
    else:
        if not array_cache.is_whole(cache / key):
            _write_unpaired(cache / key, source, tokenizer, template, on_sample)
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
            swap_answer(answers.at(i), answers.at(int(mismatched[i])), source.max_seq_len)
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


def _write_pairs(
    folder: Path, source: Source, tokenizer: Tokenizer, template: Template, on_sample: OnSample
) -> None:
    """Tokenize a file of pairs into a token cache, two answers a sample."""
    refused: list[Refused] = []
    rows = tokenized(source, tokenizer, template, refused)

    def samples() -> Iterator[list[Tokens]]:
        for n, (_, answers) in enumerate(rows, 1):
            yield [tokens for tokens, _ in answers]
            on_sample(n)

    answers, _, report = filter_documents(
        samples(), source.path_names, source.max_seq_len, source.overlong
    )
    save(folder, answers, with_refused(report, refused))


def _write_unpaired(
    folder: Path, source: Source, tokenizer: Tokenizer, template: Template, on_sample: OnSample
) -> None:
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
                on_sample(len(labels))

    answers, kept, report = filter_documents(
        samples(), source.path_names, source.max_seq_len, source.overlong
    )
    mismatched = mismatched_answers(answers, source.path_names)
    report = with_refused(report, refused)
    save(folder, answers, report, desirable=np.array(labels)[kept], mismatched=mismatched)

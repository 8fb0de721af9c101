"""Tokenized documents end to end in three arrays, kept memory-mapped on disk, and how rows of them
make a Batch.
"""

from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import msgspec
import numpy as np
import torch

from minitune.errors import InputError
from minitune.io import array_cache
from minitune.text.chat import Tokens
from minitune.types import Batch

OnSample = Callable[[int], None]  # called after each sample with how many are tokenized


def no_one(_: int) -> None:
    """Listen to nothing: the OnSample of who shows no progress."""


class Report(NamedTuple):
    """Counts of what became of a file's samples; a pair of answers is one sample.

    n_samples, n_tokens and n_target_tokens count what was kept; n_truncated of the samples were
    cut. Left out were n_dropped that are too long, n_cut_off that were cut before their first
    trained token, n_without_target with nothing to train, and n_identical pairs whose answers are
    equal. n_split of the texts were split into several samples. n_malformed rows are none, such as
    lines that are no JSON, and n_refused others can't be encoded; both were left out, as asked for,
    and first_refused says where the first of them stands, and why it was.
    unwritten: how often a message holds something under a key that the template does not write, by
    key. longest: tokens of the longest document, before it was cut or left out for its length.
    """

    n_samples: int
    n_tokens: int
    n_target_tokens: int
    n_truncated: int
    n_dropped: int
    n_without_target: int
    n_identical: int = 0
    n_split: int = 0
    n_refused: int = 0
    n_malformed: int = 0
    unwritten: Mapping[str, int] = MappingProxyType({})
    longest: int = 0
    n_cut_off: int = 0
    first_refused: str = ""


class Document(NamedTuple):
    """Tokenized text; mask: True for the tokens that are trained, or what each counts."""

    tokens: np.ndarray
    mask: np.ndarray


class Documents(NamedTuple):
    """Many tokenized texts; document i is tokens[offsets[i] : offsets[i + 1]], with its part of
    mask.
    """

    tokens: np.ndarray
    mask: np.ndarray
    offsets: np.ndarray

    def at(self, i: int) -> Document:
        """Document i, as views."""
        span = slice(int(self.offsets[i]), int(self.offsets[i + 1]))
        return Document(self.tokens[span], self.mask[span])


def filter_documents(
    samples: Iterable[Sequence[Tokens]], path: str, seq_len: int, overlong: str
) -> tuple[Documents, np.ndarray, Report]:
    """(documents that can be trained, numbers of the samples that are kept, report).

    A sample is one text, or the answers to one prompt; its documents are kept or left out together.
    overlong: drop or truncate one of more than seq_len tokens. InputError if nothing is left.
    """
    growing, kept = _Growing(array("i"), array("f"), array("q", [0])), array("q")
    n_truncated, longest, n_left_out, unwritten = 0, 0, Counter[str](), Counter[str]()
    for number, sample in enumerate(samples):
        n_longest = max(len(one.ids) for one in sample)
        drops = n_longest > seq_len and overlong == "drop"
        documents = [_cut(one, seq_len) for one in sample]
        reason = "dropped" if drops else _reason_against(sample, documents)
        longest = longest if reason == "without_target" else max(longest, n_longest)
        if reason is not None:
            n_left_out.update([f"n_{reason}"])
            continue
        n_truncated += n_longest > seq_len
        kept.append(number)
        unwritten.update(key for one in sample for key in one.unwritten)
        growing.add(documents)
    if not kept:
        raise _nothing_left(path, seq_len, n_left_out)
    arrays = growing.documents()
    report = Report(
        n_samples=len(kept),
        n_tokens=len(arrays.tokens),
        n_target_tokens=int((arrays.mask > 0).sum()),
        n_truncated=n_truncated,
        n_dropped=n_left_out["n_dropped"],
        unwritten=dict(unwritten),
        longest=longest,
        n_without_target=n_left_out["n_without_target"],
        n_identical=n_left_out["n_identical"],
        n_cut_off=n_left_out["n_cut_off"],
    )
    return arrays, np.array(kept, dtype=np.int64), report


class _Growing(NamedTuple):
    """Documents while they are collected.

    Python's arrays take 4 bytes a token each while they grow, where lists take 8 and more.
    """

    tokens: array
    mask: array
    offsets: array

    def add(self, documents: Sequence[tuple[Sequence[int], list[bool | float]]]) -> None:
        """Put more documents, as _cut gives them, behind the others."""
        for ids, trained in documents:
            self.tokens.extend(ids)
            self.mask.extend(trained)
            self.offsets.append(len(self.tokens))

    def documents(self) -> Documents:
        """Arrays of what was collected, whose mask holds numbers only where some are fractions."""
        weights = np.array(self.mask, dtype=np.float32)
        if not ((weights > 0) & (weights < 1)).any():
            weights = weights.astype(np.bool_)
        offsets = np.array(self.offsets, dtype=np.int64)
        return Documents(np.array(self.tokens, dtype=np.int32), weights, offsets)


def _cut(one: Tokens, seq_len: int) -> tuple[Sequence[int], list[bool | float]]:
    """(ids, mask) of a document's first seq_len tokens."""
    # The first token is no target, because nothing predicts it.
    return one.ids[:seq_len], [False, *one.mask[1:seq_len]]


def _reason_against(
    sample: Sequence[Tokens], documents: Sequence[tuple[Sequence[int], list[bool | float]]]
) -> str | None:
    """Word for why a sample's documents, as _cut gives them, can't be trained; None if they can."""
    if not all(any(trained) for _, trained in documents):
        return "cut_off" if all(any(one.mask[1:]) for one in sample) else "without_target"
    if any(ids == documents[0][0] for ids, _ in documents[1:]):
        return "identical"
    return None


def _nothing_left(path: str, seq_len: int, n_left_out: Mapping[str, int]) -> InputError:
    """Error for data of which every sample was left out."""
    remedies = {
        "n_dropped": 'raise seq_len, or set overlong = "truncate"',
        "n_cut_off": "raise seq_len",
        "n_without_target": "check the columns and train_on",
        "n_identical": "check the columns",
    }
    reasons = {
        "n_dropped": f"longer than {seq_len} tokens",
        "n_cut_off": f"cut at seq_len = {seq_len} before the first answer",
        "n_without_target": "without a trained token",
        "n_identical": "with two answers that are the same",
    }
    found = {key: n for key, n in n_left_out.items() if n}
    counts = ", ".join(f"{n:,} {reasons[key]}" for key, n in found.items())
    most = max(found, key=lambda key: found[key], default="n_without_target")
    return InputError(
        f"data: {path} leaves nothing to train on ({sum(found.values()):,} samples"
        f"{': ' if counts else ''}{counts}), expected an assistant's turn that fits; "
        f"{remedies[most]}"
    )


def save(folder: Path, documents: Documents, report: Report, **more: np.ndarray) -> None:
    """Write a token cache, whole or not at all; more: arrays with an entry a sample."""
    arrays = {**documents._asdict(), **more}
    n_bytes = sum(values.nbytes for values in arrays.values())
    with array_cache.filling(folder, n_bytes) as unfinished:
        for name, values in arrays.items():
            np.save(unfinished / f"{name}.npy", values)
        (unfinished / "report.json").write_bytes(msgspec.json.encode(report))


def load(folder: Path, per_sample: int, *more: str) -> tuple[Documents, list[np.ndarray], Report]:
    """Open a token cache, memory-mapped: (documents, the arrays named in more, report).

    per_sample: documents a sample. InputError for a damaged cache.
    """
    with array_cache.intact(folder, "a token cache"):
        tokens, mask, offsets, *others = array_cache.load(folder, *Documents._fields, *more)
        report = msgspec.json.decode((folder / "report.json").read_bytes(), type=Report)
        sizes = [len(tokens), len(mask), len(offsets), *map(len, others)]
        n_documents = per_sample * report.n_samples
        expected = [
            report.n_tokens,
            report.n_tokens,
            n_documents + 1,
            *[report.n_samples] * len(more),
        ]
        if sizes != expected:
            raise ValueError(
                f"arrays of {', '.join(map(str, sizes))} entries, not "
                f"{', '.join(map(str, expected))}"
            )
    return Documents(tokens, mask, offsets), others, report


def padded(rows: Sequence[Sequence[Document]], n_tokens: int | None = None) -> Batch:
    """Batch [B, T] of rows of documents, which are numbered from 1 in segment_ids; padding has
    segment 0.

    T = n_tokens, or the longest row's length if that is None.
    """
    if n_tokens is None:
        n_tokens = max(sum(len(document.tokens) for document in row) for row in rows)
    tokens = np.zeros((len(rows), n_tokens), dtype=np.int64)
    segment_ids = np.zeros((len(rows), n_tokens), dtype=np.int32)
    loss_mask = np.zeros((len(rows), n_tokens), dtype=rows[0][0].mask.dtype)
    for b, row in enumerate(rows):
        start = 0
        for segment, document in enumerate(row, 1):
            end = start + len(document.tokens)
            tokens[b, start:end] = document.tokens
            segment_ids[b, start:end] = segment
            loss_mask[b, start:end] = document.mask
            start = end
    return Batch(
        torch.from_numpy(tokens), torch.from_numpy(segment_ids), torch.from_numpy(loss_mask)
    )

"""Tokenized documents end to end in three arrays, kept memory-mapped on disk, and how rows of them make a Batch."""

from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
import torch

from minitune.errors import InputError
from minitune.io import array_cache
from minitune.text.chat import Tokens
from minitune.types import Batch


class Report(NamedTuple):
    """What became of a file's samples; n_samples and the tokens count what was kept, n_truncated of them were cut.

    A pair of answers is one sample; it is without contrast if both are the same.
    """

    n_samples: int
    n_tokens: int
    n_target_tokens: int
    n_truncated: int
    n_dropped: int
    n_without_target: int
    n_identical: int = 0


class Document(NamedTuple):
    """One tokenized text; mask: True for targets."""

    tokens: np.ndarray
    mask: np.ndarray


class Documents(NamedTuple):
    """Document i is tokens[offsets[i] : offsets[i + 1]]; mask: True for targets."""

    tokens: np.ndarray
    mask: np.ndarray
    offsets: np.ndarray

    def at(self, i: int) -> Document:
        """Document i."""
        here = slice(int(self.offsets[i]), int(self.offsets[i + 1]))
        return Document(self.tokens[here], self.mask[here])


def filter_documents(
    samples: Iterable[Sequence[Tokens]], path: str, seq_len: int, overlong: str
) -> tuple[Documents, np.ndarray, Report]:
    """(documents, the numbers of the samples that were kept, report) of samples: one text, or the answers to one prompt.

    The documents of a sample are kept or left out together; overlong says what to do with one of more than seq_len tokens:
    drop or truncate. InputError if nothing is left.
    """
    tokens, mask, offsets, kept = array("i"), array("b"), array("q", [0]), array("q")
    n_read = n_truncated = n_dropped = n_without_target = n_identical = 0
    for sample in samples:
        n_read += 1
        too_long = any(len(ids) > seq_len for ids, _ in sample)
        if too_long and overlong == "drop":
            n_dropped += 1
            continue
        # nothing predicts the first token
        cut = [(ids[:seq_len], [False, *trained[1:seq_len]]) for ids, trained in sample]
        if not all(any(trained) for _, trained in cut):
            n_without_target += 1
            continue
        if any(ids == cut[0][0] for ids, _ in cut[1:]):
            n_identical += 1
            continue
        n_truncated += too_long
        kept.append(n_read - 1)
        for ids, trained in cut:
            tokens.extend(ids)
            mask.extend(trained)
            offsets.append(len(tokens))
    if not kept:
        same = f", {n_identical} with two answers that are the same" if n_identical else ""
        raise InputError(
            f"data: {path} leaves nothing to train on ({n_read} samples: {n_dropped} longer than {seq_len} tokens, "
            f"{n_without_target} without a trained token{same}), expected an assistant's turn that fits; raise seq_len, set "
            'overlong = "truncate" or check the columns'
        )
    found = Documents(np.array(tokens, dtype=np.int32), np.array(mask, dtype=np.bool_), np.array(offsets, dtype=np.int64))
    report = Report(len(kept), len(tokens), sum(mask), n_truncated, n_dropped, n_without_target, n_identical)
    return found, np.array(kept, dtype=np.int64), report


def save(folder: Path, documents: Documents, report: Report, **more: np.ndarray) -> None:
    """Write a token cache: whole or not at all."""
    with array_cache.filling(folder) as aside:
        for name, values in {**documents._asdict(), **more}.items():
            np.save(aside / f"{name}.npy", values)
        (aside / "report.json").write_bytes(msgspec.json.encode(report))


def load(folder: Path, per_sample: int, *more: str) -> tuple[Documents, list[np.ndarray], Report]:
    """A token cache, memory-mapped: its documents, `per_sample` of them a sample, and the arrays `more`, an entry a sample.

    InputError for a damaged one.
    """
    with array_cache.intact(folder, "a token cache"):
        tokens, mask, offsets, *others = array_cache.load(folder, *Documents._fields, *more)
        report = msgspec.json.decode((folder / "report.json").read_bytes(), type=Report)
        found = [len(tokens), len(mask), len(offsets), *map(len, others)]
        sizes = [report.n_tokens, report.n_tokens, per_sample * report.n_samples + 1, *(report.n_samples for _ in more)]
        if found != sizes:
            raise ValueError(f"arrays of {', '.join(map(str, found))} entries, not {', '.join(map(str, sizes))}")
    return Documents(tokens, mask, offsets), others, report


def padded(rows: Sequence[Sequence[Document]], n_tokens: int | None = None) -> Batch:
    """Each row's documents side by side, numbered from 1 in segment_ids; T = n_tokens, or the longest row if that is None."""
    if n_tokens is None:
        n_tokens = max(sum(len(one.tokens) for one in row) for row in rows)
    tokens = np.zeros((len(rows), n_tokens), dtype=np.int64)
    segment_ids = np.zeros((len(rows), n_tokens), dtype=np.int32)
    loss_mask = np.zeros((len(rows), n_tokens), dtype=np.bool_)
    for b, row in enumerate(rows):
        start = 0
        for segment, one in enumerate(row, 1):
            here = slice(start, start + len(one.tokens))
            tokens[b, here] = one.tokens
            segment_ids[b, here] = segment
            loss_mask[b, here] = one.mask
            start = here.stop
    return Batch(torch.from_numpy(tokens), torch.from_numpy(segment_ids), torch.from_numpy(loss_mask))

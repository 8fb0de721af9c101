"""Which documents an epoch holds and how rows of them are filled: functions of (seed, epoch)."""

from collections.abc import Sequence
from itertools import accumulate

import torch

from minitune.seeds import generator

WINDOW = 4096  # documents that are packed longest first before the next ones come


def epoch_rows(
    lengths: Sequence[int],
    seq_len: int,
    packed: bool,
    seed: int,
    epoch: int,
    *,
    sizes: Sequence[int] = (),
    shares: Sequence[float] = (),
) -> list[list[int]]:
    """The rows of one epoch, as document numbers, in an order that (seed, epoch) determines: every document once or, with
    sizes and shares, those that epoch_documents says.

    Unpacked: one document a row. Packed: rows are filled from WINDOW shuffled documents at a time, as filled_rows does; then they
    are shuffled. No document is cut.
    """
    documents = epoch_documents(sizes or [len(lengths)], shares, seed, epoch)
    shuffled = [documents[i] for i in permutation(len(documents), seed, "documents", epoch)]
    if not packed:
        return [[i] for i in shuffled]
    starts = range(0, len(shuffled), WINDOW)
    rows = [row for start in starts for row in filled_rows(shuffled[start : start + WINDOW], lengths, seq_len)]
    return [rows[i] for i in permutation(len(rows), seed, "rows", epoch)]


def filled_rows(documents: Sequence[int], lengths: Sequence[int], seq_len: int) -> list[list[int]]:
    """Rows of at most seq_len tokens that hold every document once: each begins with the longest that is left and goes on with
    the longest that fits or, where its room is no more than twice that, with the one or two that fill it best.

    O(n seq_len) for n documents at worst, and near O(n) as long as many lengths are left to choose from.
    """
    left: list[list[int]] = [[] for _ in range(seq_len + 1)]  # by length
    there = 0  # bit n: a document of n tokens is left; so the longest that fits is the highest bit below the room's
    for i in documents:
        left[lengths[i]].append(i)
        there |= 1 << lengths[i]
    rows: list[list[int]] = []
    while there:
        row, room = [], seq_len
        while fits := there & ((2 << room) - 1):
            longest = fits.bit_length() - 1
            pair = room <= 2 * longest and len(row) > 0
            for length in _best_pair(fits, room, left) if pair else (longest,):
                row.append(left[length].pop())
                room = room - length
                there ^= 0 if left[length] else 1 << length
        rows.append(row)
    return rows


def _best_pair(fits: int, room: int, left: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """The lengths of the one or two documents that fill a room best; fits: as bits, the lengths up to the room that are left."""
    best: tuple[int, ...] = (fits.bit_length() - 1,)
    rest = fits
    while rest and sum(best) < min(room, 2 * (rest.bit_length() - 1)):
        longer = rest.bit_length() - 1
        rest = rest ^ 1 << longer
        shorter = (rest | (1 << longer if len(left[longer]) > 1 else 0)) & ((2 << room - longer) - 1)
        if shorter and longer + shorter.bit_length() - 1 > sum(best):
            best = (longer, shorter.bit_length() - 1)
    return best


def epoch_documents(sizes: Sequence[int], shares: Sequence[float], seed: int, epoch: int) -> Sequence[int]:
    """The numbers of an epoch's documents: all of the first file's and, of each other one's, the next few of its endless order.

    sizes: documents a file, which are numbered through; shares: of the epoch's documents, of every file but the first. So file
    k gives sizes[0] * shares[k] / (1 - sum(shares)) documents an epoch, and at least one.
    """
    chosen = list(range(sizes[0]))
    for name, (size, first, share) in enumerate(zip(sizes[1:], accumulate(sizes), shares, strict=False), 1):
        n = max(1, round(sizes[0] * share / (1 - sum(shares))))
        for round_ in range(epoch * n // size, ((epoch + 1) * n - 1) // size + 1):
            order = permutation(size, seed, f"documents of file {name}", round_)
            chosen += [first + i for i in order[max(0, epoch * n - round_ * size) : (epoch + 1) * n - round_ * size]]
    return chosen


def permutation(n: int, seed: int, name: str, epoch: int) -> list[int]:
    """The numbers below n, shuffled by (seed, name, epoch)."""
    return torch.randperm(n, generator=generator(seed, name, epoch)).tolist()


def fill(rows: Sequence[Sequence[int]], lengths: Sequence[int], seq_len: int) -> float:
    """The share of the rows' tokens that are no padding."""
    return sum(lengths[i] for row in rows for i in row) / (len(rows) * seq_len)

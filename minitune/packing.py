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

    Unpacked: one document a row. Packed: each document goes into the fullest row that has room for it (best fit), the
    longest of WINDOW shuffled documents first; then the rows are shuffled. O(n log n) for n documents.
    """
    documents = epoch_documents(sizes or [len(lengths)], shares, seed, epoch)
    shuffled = [documents[i] for i in permutation(len(documents), seed, "documents", epoch)]
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

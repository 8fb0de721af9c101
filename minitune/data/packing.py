"""Packing: which documents an epoch holds, and how rows are filled with them; functions of (seed,
epoch).
"""

from collections.abc import Sequence
from itertools import accumulate

import torch

from minitune.seeds import generator

WINDOW = 4096  # documents that are packed, longest first, before the next ones are looked at


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
    """Rows of one epoch as numbers of documents, in an order that (seed, epoch) determines.

    lengths: tokens a document. sizes and shares: those of `epoch_documents` for a mixture; without
    them the epoch holds every document once. Unpacked rows hold one document each. Packed ones are
    filled by `filled_rows` from WINDOW shuffled documents at a time, and then shuffled. No document
    is cut.
    """
    documents = epoch_documents(sizes or [len(lengths)], shares, seed, epoch)
    shuffled = [documents[i] for i in permutation(len(documents), seed, "documents", epoch)]
    if not packed:
        return [[i] for i in shuffled]
    rows: list[list[int]] = []
    for start in range(0, len(shuffled), WINDOW):
        rows += filled_rows(shuffled[start : start + WINDOW], lengths, seq_len)
    return [rows[i] for i in permutation(len(rows), seed, "rows", epoch)]


def filled_rows(documents: Sequence[int], lengths: Sequence[int], seq_len: int) -> list[list[int]]:
    """Rows of at most seq_len tokens that hold every document once.

    A row begins with the longest document that is left and goes on with the longest that fits.
    Where the row's room is at most twice that one's length, it takes the one or two documents that
    fill the room best.

    Which lengths are left is kept as the bits of one integer: bit n is set while a document of n
    tokens is left. So the lengths that fit into a room are its lowest room + 1 bits, and the
    longest of them is the highest bit set there: a few operations on machine words in place of a
    search through a list. O(n seq_len) for n documents at worst, and near O(n) as long as many
    lengths are left to choose from.
    """
    by_length: list[list[int]] = [[] for _ in range(seq_len + 1)]
    lengths_left = 0
    for i in documents:
        by_length[lengths[i]].append(i)
        lengths_left |= 1 << lengths[i]

    rows: list[list[int]] = []
    while lengths_left:
        row: list[int] = []
        room: int = seq_len
        while fitting := _bits_up_to(lengths_left, room):
            longest = _highest_bit(fitting)
            chosen: tuple[int, ...] = (longest,)
            if row and room <= 2 * longest:
                chosen = _best_pair(fitting, room, by_length)
            for length in chosen:
                row.append(by_length[length].pop())
                room -= length
                if not by_length[length]:
                    lengths_left ^= 1 << length
        rows.append(row)
    return rows


def _best_pair(fitting: int, room: int, by_length: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """Lengths of the one or two documents that fill a room best; fitting: the lengths that fit into
    it, as bits.
    """
    best: tuple[int, ...] = (_highest_bit(fitting),)
    untried: int = fitting
    # Longer ones first. Two documents of at most the longest untried length can't fill more than
    # twice that.
    while untried and sum(best) < min(room, 2 * _highest_bit(untried)):
        longer = _highest_bit(untried)
        untried ^= 1 << longer
        # The second may have the same length if there is another document of it.
        candidates: int = untried
        if len(by_length[longer]) > 1:
            candidates |= 1 << longer
        candidates = _bits_up_to(candidates, room - longer)
        if candidates and longer + _highest_bit(candidates) > sum(best):
            best = (longer, _highest_bit(candidates))
    return best


def _bits_up_to(bits: int, n: int) -> int:
    """Bits 0 to n of an integer, with the others cleared."""
    return bits & ((2 << n) - 1)


def _highest_bit(bits: int) -> int:
    """Number of the highest bit that is set."""
    return bits.bit_length() - 1


def epoch_documents(
    sizes: Sequence[int], shares: Sequence[float], seed: int, epoch: int
) -> Sequence[int]:
    """Numbers of an epoch's documents: all of the first file's, and a share of each other file's.

    sizes: documents a file; documents are numbered through all files. shares: the part of the
    epoch's documents that each file but the first gives. So file k gives sizes[0] * shares[k] / (1
    - sum(shares)) documents an epoch, and at least one. They are the next ones of an endless order,
    one shuffle of the file after the other, so that over the epochs all its documents come equally
    often.
    """
    chosen = list(range(sizes[0]))
    first_numbers = list(accumulate(sizes))[:-1]
    for file, (size, first, share) in enumerate(
        zip(sizes[1:], first_numbers, shares, strict=True), 1
    ):
        n = max(1, round(sizes[0] * share / (1 - sum(shares))))
        start = epoch * n
        stop = start + n
        for shuffle in range(start // size, (stop - 1) // size + 1):
            order = permutation(size, seed, f"documents of file {file}", shuffle)
            # The part of this shuffle that lies in start to stop of the endless order.
            part = order[max(0, start - shuffle * size) : stop - shuffle * size]
            chosen += [first + i for i in part]
    return chosen


def permutation(n: int, seed: int, name: str, epoch: int) -> list[int]:
    """Numbers below n, shuffled by (seed, name, epoch)."""
    return torch.randperm(n, generator=generator(seed, name, epoch)).tolist()


def fill(rows: Sequence[Sequence[int]], lengths: Sequence[int], seq_len: int) -> float:
    """Share of the rows' tokens that are no padding."""
    n_tokens = sum(lengths[i] for row in rows for i in row)
    return n_tokens / (len(rows) * seq_len)

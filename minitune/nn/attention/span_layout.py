"""Layout of packed rows for attention in blocks: spans of tokens that see one another, and blocks
of queries in them.

A span begins where a query sees itself alone, because no later query of its row sees past it; a
packed document is a span.
"""

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

PADDED = 1.5  # slots for each token that spans of one group may take together


class Table(NamedTuple):
    """Tokens, counted over all rows of a batch, in the slots of some boxes of [spans, places].

    A slot past the end of its span repeats the span's last token, so that no product meets memory
    that was never written.
    """

    tokens: list[Int[np.ndarray, "_ _"]]
    filled: list[Bool[np.ndarray, "_ _"]]  # False past the end of a span

    def gathered(
        self, x: Float[Tensor, "B H T c"], *, zeros: bool = False
    ) -> list[Float[Tensor, "_ H _ c"]]:
        """Rows of x in each box; with `zeros` the slots past the end of a span hold zeros."""
        n_heads, width = x.shape[1], x.shape[3]
        heads = np.arange(n_heads)[:, None]
        index = np.concatenate([(box[:, None] * n_heads + heads).ravel() for box in self.tokens])
        # a view where the heads of a token lie side by side, as a linear map leaves them
        rows = x.transpose(1, 2).reshape(-1, width).index_select(0, torch.from_numpy(index))

        if zeros and not all(box.all() for box in self.filled):
            empty = np.concatenate(
                [np.repeat(~box[:, None], n_heads, 1).ravel() for box in self.filled]
            )
            rows = rows.masked_fill(torch.from_numpy(empty)[:, None], 0.0)

        parts = rows.split([box.size * n_heads for box in self.tokens])
        return [
            part.view(len(box), n_heads, -1, width)
            for part, box in zip(parts, self.tokens, strict=True)
        ]

    def scattered(
        self, parts: list[Float[Tensor, "_ H _ c"]], shape: torch.Size
    ) -> Float[Tensor, "B H T c"]:
        """Inverse of gathered, for an x whose first three sizes are those of `shape`.

        The heads of a token lie side by side, as the next linear map wants them.
        """
        n_rows, n_heads, n_tokens = shape[:3]
        index = np.empty((n_rows * n_tokens, n_heads), dtype=np.int64)
        base = 0
        for part, box, filled in zip(parts, self.tokens, self.filled, strict=True):
            slots = (
                np.arange(base, base + box.size * n_heads)
                .reshape(part.shape[:3])
                .transpose(0, 2, 1)
            )
            index[box[filled]] = slots[filled]
            base += box.size * n_heads
        rows = torch.cat([part.reshape(-1, part.shape[3]) for part in parts])
        rows = rows.index_select(0, torch.from_numpy(index.ravel()))
        return rows.view(n_rows, n_tokens, n_heads, -1).transpose(1, 2)


class QueryBlock(NamedTuple):
    """Queries start .. end of the n_spans longest spans of a group, counted from the beginning of
    each span.
    """

    group: int
    n_spans: int
    start: int
    end: int
    lowest: int  # the first key that any of them sees
    # the first key of each; None: all see their span from its beginning
    first: Int[np.ndarray, "#s t"] | None


class Layout(NamedTuple):
    """Blocks of a batch; a box of `queries` for each of them, and a box of `keys` for each group of
    spans.
    """

    blocks: list[QueryBlock]
    queries: Table
    keys: Table


def layout(first: Int[np.ndarray, "B T"], size: int) -> Layout:
    """Layout of rows whose query t sees the keys first[t] .. t, in blocks of `size` queries."""
    # spans, the longest first
    n_tokens = first.shape[1]
    begins = np.flatnonzero(first == np.arange(n_tokens))
    lengths = np.diff(begins, append=first.size)
    # the first key of each query, counted from the beginning of its span
    reach = first.ravel() - np.repeat(begins % n_tokens, lengths)
    has_windows = bool(reach.any())
    order = np.argsort(-lengths, kind="stable")
    begins, lengths = begins[order], lengths[order]

    blocks: list[QueryBlock] = []
    queries = Table([], [])
    keys = Table([], [])
    taken = 0
    while taken < len(lengths):
        longest = int(lengths[taken])
        members = slice(taken, taken + _group_size(lengths[taken:]))
        ends, place = lengths[members, None], np.arange(longest)
        tokens, filled = begins[members, None] + np.minimum(place, ends - 1), place < ends
        keys.tokens.append(tokens)
        keys.filled.append(filled)

        for start in range(0, longest, size):
            # of the spans, which are sorted, those that reach this block
            n_spans = int((ends > start).sum())
            box = tokens[:n_spans, start : start + size]
            is_filled = filled[:n_spans, start : start + size]
            lows = _lowest_keys(reach, box, is_filled) if has_windows else None
            lowest = 0 if lows is None else int(lows[:, 0].min())
            group, end = len(keys.tokens) - 1, start + box.shape[1]
            blocks.append(QueryBlock(group, n_spans, start, end, lowest, lows))
            queries.tokens.append(box)
            queries.filled.append(is_filled)
        taken = members.stop
    return Layout(blocks, queries, keys)


def _lowest_keys(
    reach: Int[np.ndarray, "tokens"],
    box: Int[np.ndarray, "spans slots"],
    is_filled: Bool[np.ndarray, "spans slots"],
) -> Int[np.ndarray, "#spans slots"]:
    """First key that each query of a box sees; one row for all spans where they agree."""
    # an empty slot is given the first key of the longest span, which fills every slot
    lows = np.where(is_filled, reach[box], reach[box[:1]])
    return lows[:1] if (lows == lows[:1]).all() else lows


def _group_size(lengths: Int[np.ndarray, "n"]) -> int:
    """Number of spans, of those sorted by falling length, that fit in a box of the first one's
    length without much padding.
    """
    slots = np.arange(1, len(lengths) + 1) * lengths[0]
    too_many = slots > PADDED * lengths.cumsum()
    return int(np.argmax(too_many)) if too_many.any() else len(lengths)

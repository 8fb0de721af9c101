"""Ranges of keys that each query sees: causal, documents apart, windows, chunks."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor


class KeyRange(NamedTuple):
    """Keys that each query attends to: positions first .. last without a gap, neither of which
    falls along a row.

    Causal rows, packed documents, windows, chunks and padding are all of this kind.
    """

    first: Int[Tensor, "b T"] | tuple[()]  # (): the first key of all
    last: Int[Tensor, "b T"]  # the place of the query

    def starts(self) -> Int[Tensor, "b T"]:
        """First key of every query."""
        return self.first if isinstance(self.first, Tensor) else torch.zeros_like(self.last)

    def mask(self, n_keys: int) -> Bool[Tensor, "b 1 T {n_keys}"]:
        """True where a query sees a key."""
        keys = torch.arange(n_keys, device=self.last.device)
        return ((keys >= self.starts()[..., None]) & (keys <= self.last[..., None]))[:, None]


def causal(n_tokens: int, device: torch.device) -> KeyRange:
    """Every token sees itself and all before it."""
    return KeyRange((), torch.arange(n_tokens, device=device)[None])


def document_keys(segment_ids: Int[Tensor, "B T"]) -> KeyRange:
    """Every token sees itself and what comes before it in its own document; padding (0) sees
    padding only.
    """
    index = torch.arange(segment_ids.shape[1], device=segment_ids.device)
    return KeyRange(_starts(segment_ids, index), index[None])


def windowed(key_range: KeyRange, window: int) -> KeyRange:
    """Last `window` keys of what each query sees, itself included (Beltagy et al. 2020, arXiv
    2004.05150, figure 2b).
    """
    return key_range._replace(
        first=torch.maximum(key_range.starts(), key_range.last - (window - 1))
    )


def chunked(key_range: KeyRange, chunk: int) -> KeyRange:
    """Keys of what each query sees that lie in the chunk of the query: those whose position p,
    counted from the first key that it sees, has the same p // chunk.
    """
    starts = key_range.starts()
    place = (key_range.last - starts) % chunk
    return key_range._replace(first=torch.maximum(starts, key_range.last - place))


def document_positions(segment_ids: Int[Tensor, "B T"]) -> Int[Tensor, "B T"]:
    """Position of each token within its document, from 0."""
    index = torch.arange(segment_ids.shape[1], device=segment_ids.device)
    return index - _starts(segment_ids, index)


def document_lengths(segment_ids: Int[Tensor, "B T"]) -> Int[Tensor, "B T"]:
    """Number of tokens in the document of each token."""
    index = torch.arange(segment_ids.shape[1], device=segment_ids.device)
    # of the row read backwards: each document's last token
    back = _starts(segment_ids.flip(1), index).flip(1)
    return segment_ids.shape[1] - back - _starts(segment_ids, index)


def _starts(segment_ids: Tensor, index: Tensor) -> Tensor:
    changed = (
        torch.cat(
            [torch.ones_like(segment_ids[:, :1]), segment_ids[:, 1:] - segment_ids[:, :-1]], dim=1
        )
        != 0
    )
    return torch.where(changed, index, 0).cummax(dim=1).values

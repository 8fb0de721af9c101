"""Outcomes that the ranks of a run share: where one fails, all of them do, with its sentence."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import final

import torch
from torch import Tensor

from minitune.errors import MAX_MESSAGE, DiskFullError, InputError, RankLostError
from minitune.sharding.ranks import Ranks

# a failure is sent as its number here, counted from 1; any other one as the last
FAILURES = (DiskFullError, InputError, OSError, RankLostError)
TEXT_BYTES = 4 * MAX_MESSAGE  # what a message may have in UTF-8


@final
class SharedOutcome:
    """Blocks of code that every rank enters, in the same order; each ends without an error on all
    ranks, or with one on all.

    Blocks may lie in one another: after the first failure, none waits for the other ranks again.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self._is_over = False

    @contextmanager
    def block(self) -> Iterator[None]:
        """Context whose end waits for that of all ranks. Where one raised an error, it raises its
        own, and the others one of the same kind with the same sentence.

        RankLostError where a rank has ended.
        """
        try:
            yield
        except RankLostError:
            self._is_over = True
            raise
        except Exception as error:
            self._share(error)
            raise
        self._share(None)

    def gather(self, row: Tensor) -> Tensor:
        """Rows of all ranks [ranks, n], given this rank's integers [n]."""
        own = torch.arange(self.ranks.size, device=row.device) == self.ranks.rank
        (rows,) = self._sum(own[:, None] * row)
        return rows

    def _share(self, error: Exception | None) -> None:
        if self.ranks.size == 1 or self._is_over:
            return
        self._is_over = True
        kinds = self.gather(torch.tensor([_kind(error)])).flatten().tolist()
        failed = next((rank for rank, kind in enumerate(kinds) if kind), None)
        if failed is None:
            self._is_over = False
            return
        text = self._text_of(failed, "" if error is None else str(error))
        if error is None:
            raise FAILURES[kinds[failed] - 1](text)

    def _text_of(self, rank: int, text: str) -> str:
        own = text.encode()[:TEXT_BYTES] if rank == self.ranks.rank else b""
        padded = bytearray(own.ljust(TEXT_BYTES, b"\0"))
        (total,) = self._sum(torch.frombuffer(padded, dtype=torch.uint8))
        return bytes(total.tolist()).rstrip(b"\0").decode(errors="replace")

    def _sum(self, x: Tensor) -> tuple[Tensor]:
        return (x,) if self.ranks.size == 1 else tuple(self.ranks.sum((x,)))


def _kind(error: Exception | None) -> int:
    if error is None:
        return 0
    kinds = (i for i, kind in enumerate(FAILURES, 1) if isinstance(error, kind))
    return next(kinds, len(FAILURES))

"""Ranks: the processes of one run, and the few ways in which they act together.

A single process has ALONE, for which every one of them is the identity.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from itertools import islice
from typing import Any, Generic, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from minitune import tree
from minitune.sharding.collectives import lost_in_words, sum_over_ranks
from minitune.tree import Tree

Part = TypeVar("Part")
# Ranks wait so long for the first one, which evaluates, generates and writes alone. One that has
# died is noticed at once: its connections close.
TIMEOUT = timedelta(days=1)


class Dealt(NamedTuple, Generic[Part]):
    """Part of something that all ranks share out; one that does not count stands for none."""

    part: Part
    counts: bool


class Ranks(NamedTuple):
    """Number of this process among those of a run, which all call the same functions of it in the
    same order.

    RankLostError where another process has ended.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0  # on this node
    # neighbours that work on the same rows together, such as each on some of their tokens
    sharers: int = 1
    group: Any = None  # torch's process group that they talk through; None: the default one

    @property
    def is_first(self) -> bool:
        """True for the rank that logs and writes."""
        return self.rank == 0

    def share(self, n_rows: int) -> int:
        """Rows of a batch of which each rank works on as many, the last one on fewer."""
        return -(-n_rows // (self.size // self.sharers))

    def deal(self, parts: Iterable[Part]) -> Iterator[Dealt[Part]]:
        """Parts of this rank: number i goes to the ranks i modulo their number, or to those that
        work on it together.

        Every rank gets as many, because all make the same calls: where there is none left for it,
        it gets one of another rank's again, which does not count. Of several that work on one part
        the first one counts it: what the others find is the same.
        """
        place, among = divmod(self.rank, self.sharers)
        rest = iter(parts)
        while round_of_parts := list(islice(rest, self.size // self.sharers)):
            own = min(place, len(round_of_parts) - 1)
            yield Dealt(round_of_parts[own], counts=own == place and among == 0)

    def sum(self, values: Tree) -> Tree:
        """Sum of every leaf over all ranks; the tree itself in a single process."""
        return sum_over_ranks(values, self.group)

    def any(self, flag: bool) -> bool:
        """True if the flag is set on any rank."""
        if self.size == 1:
            return flag
        with lost_in_words():
            n_set = torch.tensor(int(flag))
            dist.all_reduce(n_set, group=self.group)
        return bool(n_set)

    def barrier(self) -> None:
        """Wait until every rank has come here."""
        self.any(False)

    @contextmanager
    def apart(self) -> Iterator["Ranks"]:
        """Same ranks with a process group of their own, through which a thread may talk while
        another one uses these. Every rank enters it.
        """
        if self.size == 1:
            yield self
            return
        group: Any = dist.new_group(timeout=TIMEOUT, backend="gloo")
        yield self._replace(group=group)
        # not after an error: the other ends may be gone, and the default group's end is this one's
        with suppress(RuntimeError):
            dist.destroy_process_group(group)

    @contextmanager
    def first_on_node(self) -> Iterator[None]:
        """Context in which the first rank of each node goes before the others of it, so that they
        find what it leaves in a cache.
        """
        if self.local_rank:
            self.barrier()
        yield
        if not self.local_rank:
            self.barrier()

    def from_first(self, values: Tree) -> Tree:
        """Tree of rank 0, given one with the same structure, shapes and dtypes on every rank."""
        if self.size == 1:
            return values
        with lost_in_words():
            return tree.map(lambda leaf: _broadcast(leaf, self.group), values)

    def text_from_first(self, text: str) -> str:
        """Text of rank 0; what the others give is ignored."""
        if self.size == 1:
            return text
        content = text.encode() if self.is_first else b""
        (n_bytes,) = self.from_first([torch.tensor(len(content))])
        padded = bytearray(content.ljust(int(n_bytes), b"\0"))
        if not padded:
            return ""
        (received,) = self.from_first([torch.frombuffer(padded, dtype=torch.uint8)])
        return bytes(received.tolist()).decode()


ALONE = Ranks()


def counted(evaluate: Callable[[Part], Tree]) -> Callable[[Dealt[Part]], Tree]:
    """Function of a dealt part that gives evaluate(part), and zeros for one that does not count.

    It is evaluated all the same: there may be calls in it that every rank has to make.
    """

    def of_dealt(dealt: Dealt[Part]) -> Tree:
        value = evaluate(dealt.part)
        return value if dealt.counts else tree.map(torch.zeros_like, value)

    return of_dealt


def _broadcast(leaf: Tensor, group: Any) -> Tensor:
    """Leaf of rank 0, sent as bytes, because not every backend knows every dtype."""
    copy = leaf.detach().clone(memory_format=torch.contiguous_format)
    if copy.numel():
        dist.broadcast(copy.view(-1).view(torch.uint8), src=0, group=group)
    return copy

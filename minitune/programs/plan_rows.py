"""Lengths of the rows that a training really takes, for plans of data that was read."""

from collections.abc import Mapping
from itertools import pairwise

import msgspec

from minitune.data.table_facts import Lengths
from minitune.programs.data_facts import TableFacts
from minitune.programs.plan import Planned
from minitune.programs.stages.train import Train
from minitune.programs.state import AbstractState


def with_longest(first: AbstractState, tables: Mapping[str, TableFacts]) -> AbstractState:
    """State whose tables without packing have rows as long as their longest document.

    A batch of these is padded to the longest of its documents, which seq_len only bounds.
    """

    def length(name: str, max_seq_len: int) -> int:
        facts = tables.get(name)
        if facts is None or facts.fill is not None:
            return max_seq_len
        return min(max_seq_len, facts.lengths.longest)

    data = {
        name: msgspec.structs.replace(source, seq_len=length(name, source.max_seq_len))
        for name, source in first.data.items()
    }
    return first._replace(data=data)


def as_taken(one: Planned, facts: TableFacts | None) -> Planned:
    """Plan whose step has the rows of an average batch, for its time; memory stays that of the
    longest.
    """
    if facts is None or facts.fill is not None:
        return one
    step = one.step
    n_documents = step.n_rows * step.n_micro_batches
    n_tokens = round(expected_longest(facts.lengths, n_documents))
    return one._replace(step=step._replace(n_tokens=min(step.n_tokens, max(1, n_tokens))))


def step_tokens(one: Planned) -> int:
    """Tokens of a step on all ranks, which may have room for more rows than a batch has."""
    step = one.step
    n_rows = step.n_rows * step.n_micro_batches * step.mesh.n_shares
    if isinstance(one.stage, Train):
        n_rows = min(n_rows, one.stage.batch_size * one.stage.rows_per_sample)
    return n_rows * step.n_tokens


def expected_longest(lengths: Lengths, n: int) -> float:
    """Expected length of the longest of n documents that are drawn from a histogram."""
    total, seen, below = sum(lengths.counts), 0, [0.0]
    for count in lengths.counts:
        seen = seen + count
        below.append((seen / total) ** n)
    middles = ((i + 0.5) * lengths.width for i in range(len(lengths.counts)))
    of_bars = (after - before for before, after in pairwise(below))
    mean = sum(x * p for x, p in zip(middles, of_bars, strict=True))
    return min(mean, float(lengths.longest))

"""Lengths of rows for plans: the longest of a batch, beside draws of many batches, and who is padded to it."""

from types import SimpleNamespace

import numpy as np
import pytest

from minitune.data.source import Source
from minitune.data.table_facts import Lengths
from minitune.models.families import llama
from minitune.models.model import Model
from minitune.planning.step_spec import StepSpec
from minitune.programs.data_facts import TableFacts
from minitune.programs.plan import Planned
from minitune.programs.plan_rows import as_taken, expected_longest, with_longest
from minitune.programs.state import AbstractState

HISTOGRAM = Lengths(width=7, counts=[3, 0, 11, 25, 8, 1], mean=0.0, median=0.0, longest=41)


def facts(fill: float | None) -> TableFacts:
    return TableFacts("d.jsonl", "pairs", 256, 48, 999, 500, 48, {}, HISTOGRAM, 0, fill)


@pytest.mark.parametrize("n", [1, 5, 16])
def test_the_longest_of_a_batch_is_that_of_many_drawn_batches(n: int) -> None:
    rng = np.random.default_rng(n)
    share = np.array(HISTOGRAM.counts) / sum(HISTOGRAM.counts)
    bars = rng.choice(len(share), size=(20_000, n), p=share).max(1)
    wanted = np.minimum((bars + 0.5) * HISTOGRAM.width, HISTOGRAM.longest).mean()
    assert expected_longest(HISTOGRAM, n) == pytest.approx(wanted, rel=0.01)


def test_rows_without_packing_are_as_long_as_their_longest_document_and_packed_ones_as_seq_len() -> None:
    source = Source(path="d.jsonl", format="pairs", seq_len=256)
    first = AbstractState({"a": source, "b": source, "c": source}, Model(llama.FAMILY, None), {})
    found = with_longest(first, {"a": facts(None), "b": facts(0.9)}).data
    assert {name: one.max_seq_len for name, one in found.items()} == {"a": 41, "b": 256, "c": 256}


def test_a_step_is_timed_on_rows_of_an_average_batch() -> None:
    step = StepSpec(*(None for _ in range(7)), n_rows=4, n_tokens=256)
    one = Planned(SimpleNamespace(), step, {"weights": 5}, 1.0)
    timed = as_taken(one, facts(None))
    assert timed.step.n_tokens == round(expected_longest(HISTOGRAM, 4)) < 41
    assert (timed.parts, timed.step.n_rows) == (one.parts, 4)
    assert as_taken(one, facts(0.9)) == as_taken(one, None) == one

"""Several processes take the step that one process takes on all their rows."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minitune import tree
from minitune.sharding.ranks import ALONE, Ranks, counted
from minitune.types import Batch
from support.models import SMALL, random_batch
from support.ranks import Ranks as Processes
from support.scripts import rank_steps
from support.scripts.rank_steps import Case

CASES = [
    Case("sft", 6, 1, ()),
    Case("sft", 5, 2, (0, 1)),  # the first rank's first micro-batch has no target
    Case("sft", 1, 1, ()),  # the others have no row
    Case("sft", 3, 3, (2,)),
    Case("sft", 5, None, (1,)),  # each has its share
    Case("sft", 4, 1, (0, 1, 2, 3)),  # nothing to train on: the step is skipped on every rank
    Case("pairs", 5, 2, ()),
    Case("pairs", 1, 1, ()),
    Case("sweep", 5, 2, (4,)),
    Case("sweep", 1, 1, ()),
]


def assert_equal_steps(on_rank: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert on_rank.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(on_rank[name], value, rtol=1e-5, atol=1e-6)


def test_a_batch_that_ranks_share_out_is_the_step_of_one_process(ranks: Processes) -> None:
    wanted = rank_steps.steps(CASES)
    for n in (2, 3):
        for on_rank in ranks.run(n, rank_steps.steps_of_ranks, CASES):
            for found, expected in zip(on_rank, wanted, strict=True):
                assert_equal_steps(found, expected)


def test_without_a_size_of_micro_batches_each_rank_works_on_its_share(ranks: Processes) -> None:
    assert ranks.run(2, rank_steps.rows_of_forwards, 5) == [[3], [2]]


def test_rows_of_each_ranks_own_are_the_step_of_one_process(ranks: Processes) -> None:
    # uneven on purpose: the first rank has one row, and on the last one every token is masked
    batch = random_batch(SMALL, 6, 11)
    batch = batch._replace(loss_mask=batch.loss_mask & (torch.arange(6) < 4)[:, None])
    parts = [tree.map(lambda x, i=i, j=j: x[i:j], batch) for i, j in ((0, 1), (1, 4), (4, 6))]
    wanted = rank_steps._step(Case("sft", 6, 1, ()), batch, ALONE)
    for on_rank in ranks.run(3, rank_steps.step_on_own_rows, parts):
        assert_equal_steps(on_rank, wanted)


@settings(max_examples=50)
@given(st.lists(st.integers(), max_size=20), st.integers(1, 7))
def test_each_part_counts_once_and_every_rank_gets_as_many(parts: list[int], size: int) -> None:
    dealt = [list(Ranks(rank, size).deal(iter(parts))) for rank in range(size)]
    assert len({len(own) for own in dealt}) == 1
    rounds = [part for round_of_parts in zip(*dealt, strict=True) for part in round_of_parts]
    assert [one.part for one in rounds if one.counts] == parts
    assert all(one.part in parts for one in rounds)


def test_what_does_not_count_is_zero_and_not_nan() -> None:
    nan = {"x": torch.tensor([torch.nan, 1.0]), "n": torch.tensor(3)}
    evaluate = counted(lambda part: nan)
    own, others = Ranks(0, 2).deal([1]), Ranks(1, 2).deal([1])
    assert tree.leaves(evaluate(next(own)))[0].isnan().any()
    assert not any(bool(leaf.any()) for leaf in tree.leaves(evaluate(next(others))))


def test_a_single_process_is_the_identity() -> None:
    batch: Batch = random_batch(SMALL, 2, 5)
    assert ALONE.sum(batch) is batch
    assert ALONE.from_first(batch) is batch
    assert (ALONE.any(True), ALONE.any(False), ALONE.text_from_first("é")) == (True, False, "é")
    with ALONE.first_on_node():
        ALONE.barrier()
    assert [dealt.part for dealt in ALONE.deal("abc")] == ["a", "b", "c"]

"""Ranks that the other tests of this room start: they answer in order, and nobody waits for one that failed."""

import pytest

from support import rank_calls
from support.ranks import RankError, Ranks


def test_each_call_is_made_by_a_group_of_its_own(ranks: Ranks) -> None:
    assert ranks.run(3, rank_calls.sum_of, 0.5) == [(rank, 3, 4.5) for rank in range(3)]
    assert ranks.run(2, rank_calls.sum_of, 1.0) == [(0, 2, 3.0), (1, 2, 3.0)]


def test_a_rank_that_fails_ends_the_call_with_its_own_words() -> None:
    ranks = Ranks()
    with pytest.raises(RankError, match=r"(?s)rank 1 of 2 failed:.*ValueError: this one"):
        ranks.run(2, rank_calls.fail_on, 1)
    # the pool starts anew
    assert len(ranks.run(1, rank_calls.sum_of, 0.0)) == 1
    ranks.close()


def test_ranks_that_wait_for_one_another_for_ever_are_ended(ranks: Ranks) -> None:
    ranks.run(2, rank_calls.sum_of, 0.0)
    with pytest.raises(RankError, match=r"ranks \[0, 1\] of 2 gave no result in time"):
        ranks.run(2, rank_calls.wait_for_rank_1, timeout_s=1.0)

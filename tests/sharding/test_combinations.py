"""Whatever is mixed, ranks take the step that one process takes: the table of docs/sharding.md."""

import math

import pytest

from minitune.sharding.plans import named_plan
from support import combinations
from support.closeness import distances, root_mean_square
from support.combinations import FEW_RANKS, MESHES, ROUNDING_RATIO, Combination
from support.ranks import Ranks
from support.sharded import on_shared_rows, rows_of, said_to, trained, trained_in_float64

EVERY = combinations.allowed()
FEW = [*combinations.covering(EVERY)]


def check(ranks: Ranks, one: Combination, mesh: dict[str, int]) -> None:
    case, n_ranks = one.case(), math.prod(mesh.values())
    # one more than there are ranks, so that some have more than others
    batches = [rows_of(case, n_ranks + 1, seed) for seed in range(case.n_steps)]
    exact = trained_in_float64(case, batches)
    rounding = root_mean_square(distances(trained(case, batches), exact))
    assert rounding < 1e-5
    for found in ranks.run(n_ranks, on_shared_rows, case, batches, named_plan(one.plan), mesh):
        far = distances(found, exact)
        worst = max(far, key=lambda name: far[name])
        assert root_mean_square(far) <= ROUNDING_RATIO * rounding, f"{worst} is {far[worst]:.1e} off, one process {rounding:.1e}"


@pytest.mark.parametrize("one", FEW, ids="-".join)
def test_any_two_choices_go_together(ranks: Ranks, one: Combination) -> None:
    check(ranks, one, FEW_RANKS[one.plan])


@pytest.mark.soak
@pytest.mark.parametrize("one", [one for one in EVERY if one not in FEW or MESHES[one.plan] != FEW_RANKS[one.plan]], ids="-".join)
def test_all_choices_go_together(ranks: Ranks, one: Combination) -> None:
    check(ranks, one, MESHES[one.plan])


@pytest.mark.parametrize("plan", MESHES)
def test_what_may_not_be_mixed_is_refused_with_the_reason(ranks: Ranks, plan: str) -> None:
    refused = [one for one in combinations.every() if one.plan == plan and one.refused()]
    # a loss, rows and what is recomputed have no part in it
    kinds = [*{(one.trains, one.base): one for one in refused}.values()]
    for said in ranks.run(
        math.prod(MESHES[plan].values()), said_to, [one.case() for one in kinds], named_plan(plan), MESHES[plan]
    ):
        for one, words in zip(kinds, said, strict=True):
            refusal = one.refused()
            assert refusal is not None
            assert refusal.said in words


def test_every_two_choices_meet() -> None:
    assert set().union(*map(combinations.pairs_of, FEW)) == set().union(*map(combinations.pairs_of, EVERY))
    assert len(FEW) < len(EVERY) / 10


def test_the_page_has_the_table() -> None:
    page = combinations.PAGE.read_text("utf-8")
    assert page == combinations.written(page), combinations.COMMAND

"""Whatever is mixed, ranks take the step that one process takes: the table of docs/sharding.md."""

import math

import pytest
import torch

from minitune.sharding.plans import named_plan
from support import combinations
from support.combinations import MESHES, Combination
from support.ranks import Ranks
from support.sharded import on_shared_rows, rows_of, trained

EVERY = combinations.allowed()
FEW = [*combinations.covering(EVERY)]


def check(ranks: Ranks, one: Combination) -> None:
    case, mesh = one.case(), MESHES[one.plan]
    batches = [rows_of(case, 5, seed) for seed in range(case.n_steps)]
    wanted = trained(case, batches)
    for found in ranks.run(math.prod(mesh.values()), on_shared_rows, case, batches, named_plan(one.plan), mesh):
        assert found.keys() == wanted.keys()
        for name, x in wanted.items():
            close: dict[str, float] = {"rtol": 0, "atol": 2e-6 * max(1.0, float(x.abs().max()) if x.numel() else 1.0)}
            torch.testing.assert_close(found[name], x, **close, equal_nan=True, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("one", FEW, ids="-".join)
def test_any_two_choices_go_together(ranks: Ranks, one: Combination) -> None:
    check(ranks, one)


@pytest.mark.soak
@pytest.mark.parametrize("one", [one for one in EVERY if one not in FEW], ids="-".join)
def test_all_choices_go_together(ranks: Ranks, one: Combination) -> None:
    check(ranks, one)


def test_every_two_choices_meet() -> None:
    assert set().union(*map(combinations.pairs_of, FEW)) == set().union(*map(combinations.pairs_of, EVERY))
    assert len(FEW) < len(EVERY) / 10


def test_the_page_has_the_table() -> None:
    page = combinations.PAGE.read_text("utf-8")
    assert page == combinations.written(page), combinations.COMMAND

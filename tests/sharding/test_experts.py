"""Ranks that share the experts of a mixture take the step that one process takes on all rows."""

from typing import Any

import msgspec
import pytest
import torch

from minitune.errors import InputError
from minitune.models.weights import dims
from minitune.sharding.experts import check_experts
from minitune.sharding.placements import check_plan
from minitune.sharding.plans import named_plan
from support.closeness import assert_trees_close, distances
from support.families import config_of
from support.models import SMALL, random_params
from support.ranks import Ranks
from support.sharded import (
    Case,
    balanced_gradients,
    dealt,
    losses_by_compiled_blocks,
    on_ranks,
    read_whole,
    rows_of,
    saved_and_continued,
    shares_of_experts,
    trained,
)

LAYOUTS = ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss", "llama4_text"]


def mixture(name: str) -> Any:
    """Small model of a family with a number of experts that four ranks share evenly."""
    config = config_of(name)
    return msgspec.structs.replace(config, experts=msgspec.structs.replace(config.experts, n_experts=4))


CASES = {
    f"{name} {trains}": Case(mixture(name), trains=trains, n_remat=n % 2, dtype=torch.float64)
    for n, name in enumerate(LAYOUTS)
    for trains in ("lora", "full")
}


def check(ranks: Ranks, case: Case, mesh: dict[str, int], batches: list[Any], sizes: list[int]) -> None:
    wanted = trained(case, batches)
    parts = [dealt(batch, sizes) for batch in batches]
    for found in ranks.run(len(sizes), on_ranks, case, parts, named_plan("ep"), mesh):
        assert found.keys() == wanted.keys()
        for name, x in wanted.items():
            close: dict[str, float] = {"rtol": 2e-6, "atol": 2e-6 * max(1.0, float(x.abs().max()) if x.numel() else 1.0)}
            torch.testing.assert_close(found[name], x, **close, equal_nan=True, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("name", CASES)
def test_ranks_take_the_step_of_one_process(ranks: Ranks, name: str) -> None:
    case = CASES[name]
    check(ranks, case, {"data": 1, "expert": 2}, [rows_of(case, 3, seed) for seed in range(2)], [2, 1])


MORE = {
    "adapted experts": Case(mixture("mixtral"), trains="experts", n_remat=2),
    "adapted stacks": Case(mixture("gpt_oss"), trains="experts", dtype=torch.float64),
    "one adapted expert": Case(mixture("qwen3_moe"), trains="one expert"),
    "one adapted expert, recomputed": Case(mixture("qwen3_moe"), trains="one expert", n_remat=9),
    "dpo": Case(mixture("qwen2_moe"), loss="dpo", trains="full", n_remat=1),
    "int8": Case(mixture("mixtral"), base="int8", trains="experts", is_packed=False),
}


@pytest.mark.parametrize("name", MORE)
def test_ranks_that_share_rows_and_experts_take_it(ranks: Ranks, name: str) -> None:
    """The last rank has rows without a target."""
    case = MORE[name]
    mask = torch.tensor([True, True, True, True, False])
    batches = [rows_of(case, 5, seed, mask) for seed in range(2)]
    check(ranks, case, {"data": 2, "expert": 2}, batches, [2, 1, 1, 1])


def test_a_loss_of_the_router_is_that_of_one_process(ranks: Ranks) -> None:
    """A step in micro-batches of one row, of which one rank has one more than the other; routers are cut along their experts."""
    config = mixture("qwen3_moe")
    batch = rows_of(Case(config), 3, 0)
    wanted = balanced_gradients(config, batch, {})
    for found in ranks.run(2, balanced_gradients, config, batch, {"data": 1, "expert": 2}, named_plan("ep")):
        far = distances(found, wanted)
        assert max(far.values()) < 1e-5, far


@pytest.mark.soak
def test_compiled_blocks_compute_as_others_do_and_few_graphs_are_made(ranks: Ranks) -> None:
    """Experts are left out of the graphs, or each number of rows would have one of its own."""
    for found, n_graphs in ranks.run(2, losses_by_compiled_blocks, mixture("mixtral"), (11, 13, 9, 12), {"data": 1, "expert": 2}):
        for plain, compiled in found:
            assert_trees_close(compiled, plain, 1e-5)
        assert n_graphs[1:] == n_graphs[1:2] * 3


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_a_rank_holds_and_computes_with_its_share_of_the_experts(ranks: Ranks, name: str) -> None:
    case = Case(mixture(name))
    found = ranks.run(2, shares_of_experts, case, rows_of(case, 2, 0), {"data": 1, "expert": 2})
    for at_rest, in_block, _ in found:
        assert (at_rest, in_block) == (0.5, 0.5)
    if name == "mixtral":
        first, second = (own for _, _, own in found)
        assert first
        assert second
        assert not first & second


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_a_state_of_experts_is_read_under_any_plan(ranks: Ranks, name: str, tmp_path: Any) -> None:
    case = Case(mixture(name), trains="full")
    mesh, batches = {"data": 1, "expert": 2}, [dealt(rows_of(case, 2, seed), [1, 1]) for seed in range(2)]
    wanted = ranks.run(2, on_ranks, case, batches, named_plan("ep"), mesh)[0]
    found = ranks.run(2, saved_and_continued, case, batches, named_plan("ep"), mesh, tmp_path)[0]
    for leaf, x in wanted.items():
        assert torch.equal(found[leaf], x), leaf
    (one,) = ranks.run(1, read_whole, case, {}, {"data": 1}, tmp_path)
    three = ranks.run(3, read_whole, case, named_plan("fsdp"), {"data": 3}, tmp_path)
    again = ranks.run(2, read_whole, case, named_plan("ep"), mesh, tmp_path)
    for leaf, x in one.items():
        assert all(torch.equal(other[leaf], x) for other in (*three, *again)), leaf
        assert not torch.equal(x, random_params(case.config)[leaf]), leaf


def test_what_can_not_be_is_refused() -> None:
    with pytest.raises(InputError, match=r"the axis expert has 3 ranks, among which 4 experts .* one of 1, 2, 4"):
        check_experts(4, 3)
    with pytest.raises(InputError, match="the plan cuts 'experts', which no matrix of this model has: it is no mixture"):
        check_plan(named_plan("ep"), dims(SMALL), {"data": 2, "expert": 2})
    with pytest.raises(InputError, match="the mesh has the axis 'expert', along which the plan cuts no experts"):
        check_plan(named_plan("fsdp"), dims(mixture("mixtral")), {"data": 2, "expert": 2})
